"""Parameters on meshes that are only described."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

import optaxplus as ox
from optaxplus import trees
from optaxplus.report.layout import lay_out, mesh_sizes


def abstract(*shape):
    return jax.ShapeDtypeStruct(shape, "bfloat16")


PARAMS = {
    "embed": {"embedding": abstract(50257, 64)},
    "layers": {
        "attention": {
            "query": {"kernel": abstract(5, 64, 6, 16)},
            "out": {"kernel": abstract(5, 6, 16, 64)},
        },
        "norm": {"scale": abstract(5, 64)},
    },
    "lm_head": {"kernel": abstract(64, 50257)},
}


def specs(sizes):
    laid = lay_out(PARAMS, sizes)
    assert jax.tree.structure(laid) == jax.tree.structure(PARAMS)
    return {
        path.split("/")[-2]: leaf.sharding.spec
        for path, leaf in trees.leaves_with_paths(laid)
    }


def test_inputs_along_fsdp_and_outputs_along_tensor():
    found = specs({"fsdp": 2, "tensor": 2})
    assert found["query"] == P(None, "fsdp", "tensor")
    assert found["out"] == P(None, "fsdp", None, "tensor")
    assert found["norm"] == P()


def test_the_first_axis_that_divides():
    # 6 heads do not divide by 4, the 16 entries of a head do.
    found = specs({"fsdp": 4, "tensor": 16})
    assert found["query"] == P(None, "fsdp", None, "tensor")
    assert found["out"] == P(None, None, "fsdp", "tensor")
    # The vocabulary is odd: a table is cut along its width, by the first that asks.
    assert found["embed"] == P(None, "fsdp")
    assert found["lm_head"] == P("fsdp")
    assert specs({"tensor": 4})["lm_head"] == P("tensor")


def test_what_does_not_divide_is_whole():
    assert set(specs({"fsdp": 7}).values()) == {P()}


def test_everything_is_repeated_along_data():
    assert set(specs({"data": 2}).values()) == {P()}
    laid = lay_out(PARAMS, {"data": 2, "fsdp": 2})
    assert jax.tree.leaves(laid)[0].sharding.mesh.shape == {"data": 2, "fsdp": 2}


def test_dtypes_and_shapes_stay():
    laid = lay_out(PARAMS, {"fsdp": 2})
    for before, after in zip(*map(jax.tree.leaves, (PARAMS, laid)), strict=True):
        assert (before.shape, before.dtype) == (after.shape, after.dtype)


def test_ones_own_rules():
    rule = ox.Rule("^x$", ox.MatrixAxes((1,), (0,)), "hidden")
    laid = lay_out({"x": abstract(4, 4)}, {"fsdp": 2}, (rule,))
    assert laid["x"].sharding.spec == P(None, "fsdp")


def test_undecided_parameters_are_refused():
    with pytest.raises(ValueError, match="lay_out: no rule decides"):
        lay_out({"x": {"kernel": abstract(2, 3, 4, 5)}}, {"fsdp": 2})


def test_reads_a_mesh():
    assert mesh_sizes("fsdp=8,tensor=4") == {"fsdp": 8, "tensor": 4}
    assert mesh_sizes("data=2") == {"data": 2}


@pytest.mark.parametrize(
    "text", ["", "fsdp", "fsdp=", "fsdp=0", "fsdp=-1", "fsdp=2,fsdp=2", "x=2", "fsdp=٣"]
)
def test_refuses_what_is_no_mesh(text):
    with pytest.raises(ValueError, match="it must be like 'fsdp=8,tensor=4'"):
        mesh_sizes(text)


@pytest.mark.parametrize(
    ("sizes", "kind", "message"),
    [
        ({"model": 8}, ValueError, r"lay_out: sizes=.'model': 8. .*data, fsdp, tensor"),
        ({"fsdp": 0}, ValueError, "lay_out: fsdp=0 is not allowed; .* >= 1"),
        ({"fsdp": 2.0}, TypeError, "lay_out: fsdp=2.0 is not allowed; .* integer"),
    ],
)
def test_wrong_sizes_are_refused(sizes, kind, message: str):
    params = {"mlp": {"kernel": jax.ShapeDtypeStruct((8, 16), "float32")}}
    with pytest.raises(kind, match=message):
        lay_out(params, sizes)
