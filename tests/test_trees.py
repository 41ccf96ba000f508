"""Paths, boxes, dtypes of the arithmetic, and maps that return several trees."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from optaxplus import trees


class Layer(nnx.Module):
    def __init__(self):
        self.value = nnx.Linear(2, 3, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def state():
    return nnx.state(nnx.eval_shape(Layer), nnx.Param)


# Paths and boxes


def test_paths_are_names_joined_by_slashes():
    tree = {
        "block": [{"kernel": 1.0}, (2.0, 3.0)],
        "named": optax.MaskedState(inner_state=4.0),
        7: 5.0,
    }
    tree = {str(key): value for key, value in tree.items()}
    assert trees.leaves_with_paths(tree) == [
        ("7", 5.0),
        ("block/0/kernel", 1.0),
        ("block/1/0", 2.0),
        ("block/1/1", 3.0),
        ("named/inner_state", 4.0),
    ]


def test_path_of_a_single_array_is_empty():
    assert trees.leaves_with_paths(3.0) == [("", 3.0)]
    assert trees.path_text(()) == ""


def test_integer_keys_are_paths_too():
    assert [path for path, _ in trees.leaves_with_paths({0: 1.0, 1: 2.0})] == ["0", "1"]


def test_empty_nodes_have_no_path():
    tree = {"n": None, "m": optax.MaskedNode(), "e": {}, "x": 1.0}
    assert trees.leaves_with_paths(tree) == [("x", 1.0)]


def test_a_box_gives_its_array_under_its_own_path(state):
    # No ".value" of the Variable; the module called `value` keeps its name.
    paths = [(path, leaf.shape) for path, leaf in trees.leaves_with_paths(state)]
    assert paths == [("value/bias", (3,)), ("value/kernel", (2, 3))]
    boxed = {"kernel": nn.Partitioned(jnp.ones((2, 3)), names=("in", "out"))}
    assert [path for path, _ in trees.leaves_with_paths(boxed)] == ["kernel"]


def test_holders(state):
    assert trees.is_holder(state["value"]["kernel"])
    assert trees.is_holder(nn.Partitioned(jnp.ones(2), names=("in",)))
    assert trees.is_holder(nn.LogicallyPartitioned(jnp.ones(2), names=("in",)))
    for node in (jnp.ones(2), np.ones(2), {}, None, optax.MaskedNode(), 3.0):
        assert not trees.is_holder(node)


def test_values_replace_boxes(state):
    assert trees.unflatten_like({"a": [1.0], "n": None, "b": 2.0}, ["x", "y"]) == {
        "a": ["x"],
        "n": None,
        "b": "y",
    }
    labels = trees.unflatten_like(state, ["bias", "kernel"])
    assert jax.tree.structure(labels) == jax.tree.structure(nnx.as_pure(state))
    assert nnx.to_pure_dict(labels) == {"value": {"bias": "bias", "kernel": "kernel"}}


# Dtypes


@pytest.mark.parametrize(
    ("dtype", "compute", "real"),
    [
        ("bfloat16", "float32", "float32"),
        ("float16", "float32", "float32"),
        ("float32", "float32", "float32"),
        ("float64", "float64", "float64"),
        ("complex64", "complex64", "float32"),
        ("complex128", "complex128", "float64"),
    ],
)
def test_dtype_of_the_arithmetic(dtype: str, compute: str, real: str):
    assert trees.compute_dtype(dtype) == jnp.dtype(compute)
    assert trees.real_dtype(trees.compute_dtype(dtype)) == jnp.dtype(real)
    with jax.enable_x64(True):
        x = jnp.ones(2, dtype)
        assert trees.widen(x).dtype == jnp.dtype(compute)
        assert trees.scalar_for(jnp.float64(0.5), x).dtype == jnp.dtype(real)


def test_python_scalars_stay():
    assert trees.scalar_for(0.5, jnp.ones(2, jnp.bfloat16)) == 0.5
    assert isinstance(trees.scalar_for(1, jnp.ones(2)), int)


def test_cast_like():
    like = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2), "n": None}
    cast = trees.cast_like({"a": jnp.ones(2), "b": jnp.ones(2), "n": None}, like)
    assert (cast["a"].dtype, cast["b"].dtype, cast["n"]) == (
        "bfloat16",
        "float32",
        None,
    )


# Maps


def test_map_several():
    tree = {"a": 1, "b": [2, 3], "n": None, "m": optax.MaskedNode()}
    rest = {"a": 10, "b": [20, 30], "n": None, "m": optax.MaskedNode()}
    sums, pairs = trees.map_several(lambda x, y: (x + y, (x, y)), 2, tree, rest)
    assert sums == {"a": 11, "b": [22, 33], "n": None, "m": optax.MaskedNode()}
    # A value may itself be a tuple, or None: it is not taken for a tree.
    assert pairs["b"] == [(2, 20), (3, 30)]
    (nothing,) = trees.map_several(lambda x: (None,), 1, [1, 2])
    assert nothing == [None, None]


def test_map_several_of_nothing():
    assert trees.map_several(lambda x: (x, x), 2, {}) == ({}, {})
    assert trees.map_several(lambda x: (x, x), 2, None) == (None, None)


def test_map_several_gives_subtrees_of_the_rest():
    (result,) = trees.map_several(
        lambda x, entry: (entry,), 1, {"a": 1}, {"a": {"any": "tree"}}
    )
    assert result == {"a": {"any": "tree"}}


# Moments


@pytest.mark.parametrize(
    ("dtype", "mu_dtype", "real", "expected"),
    [
        ("bfloat16", "float32", False, "float32"),
        ("float16", jnp.float32, False, "float32"),
        ("float32", "bfloat16", False, "bfloat16"),
        ("float32", np.dtype("float16"), True, "float16"),
        ("float64", "float32", False, "float64"),
        ("float64", "bfloat16", False, "bfloat16"),
        ("complex64", "float32", False, "complex64"),
        ("complex64", "float32", True, "float32"),
        ("complex64", "bfloat16", True, "bfloat16"),
        ("complex128", "float32", True, "float64"),
    ],
)
def test_moments_have_the_width_of_the_arithmetic(dtype, mu_dtype, real, expected):
    with jax.enable_x64(True):
        params = {"w": jnp.ones((2, 3), dtype), "n": None}
        moment = trees.init_moment("test", params, mu_dtype, real=real)
    assert moment["n"] is None
    assert moment["w"].dtype == jnp.dtype(expected)
    np.testing.assert_array_equal(np.asarray(moment["w"], complex), np.zeros((2, 3)))


def test_moments_of_boxes_stay_boxed():
    params = {"w": nn.Partitioned(jnp.ones((2, 3)), names=("in", "out"))}
    moment = trees.init_moment("test", params, "float32")
    assert moment["w"].names == ("in", "out")
    np.testing.assert_array_equal(moment["w"].value, np.zeros((2, 3)))


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
def test_parameters_that_do_not_float_are_refused(dtype: str):
    params = {"layer": [jnp.ones(2), jnp.ones(2, dtype)]}
    message = (
        f"test: parameter 'layer/1' of dtype {dtype} is not allowed; it must be "
        r"floating point. Mask it away \(optax.masked\); optaxplus.muon leaves"
    )
    for call in (
        lambda: trees.check_floating("test", params),
        lambda: trees.init_moment("test", params, "float32"),
    ):
        with pytest.raises(TypeError, match=message):
            call()


def test_complex_parameters_are_refused_where_real_ones_are_needed():
    params = {"z": jnp.ones(2, jnp.complex64)}
    trees.check_floating("test", params)
    with pytest.raises(TypeError, match=r"'z' of dtype complex64 .* real floating"):
        trees.check_floating("test", params, real=True)
    with pytest.raises(TypeError, match=r"test: a moment dtype of bfloat16 .* 'fl"):
        trees.init_moment("test", params, "bfloat16")


def test_abstract_parameters_are_checked_too(state):
    trees.check_floating("test", state)
    trees.check_floating("test", jax.ShapeDtypeStruct((2, 3), "float32"))
    with pytest.raises(TypeError, match="parameter '' of dtype int32"):
        trees.check_floating("test", jax.ShapeDtypeStruct((2, 3), "int32"))


# Masks

TREE = {"a": {"x": 1.0, "y": [2.0, 3.0]}, "b": 4.0, "n": None, "m": optax.MaskedNode()}


def masked(a: object, b: object):
    return {"a": a, "b": b, "n": None, "m": optax.MaskedNode()}


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, masked({"x": True, "y": [True, True]}, True)),
        (False, masked({"x": False, "y": [False, False]}, False)),
        (masked(True, False), masked({"x": True, "y": [True, True]}, False)),
        (
            masked({"x": False, "y": np.True_}, np.False_),
            masked({"x": False, "y": [True, True]}, False),
        ),
        # An entry for what has no leaves is ignored.
        (
            {"a": True, "b": False, "n": None, "m": True},
            masked({"x": True, "y": [True, True]}, False),
        ),
        (
            lambda tree: masked(tree["b"] > 3, False),
            masked({"x": True, "y": [True, True]}, False),
        ),
    ],
    ids=["none", "one", "prefix", "numpy", "masked", "function"],
)
def test_masks_become_one_bool_a_leaf(mask, expected):
    resolved = trees.resolve_mask("test", mask, TREE)
    assert resolved == expected
    assert all(type(entry) is bool for entry in jax.tree.leaves(resolved))


def test_masks_of_abstract_parameters(state):
    mask = trees.resolve_mask("test", lambda tree: True, state)
    assert jax.tree.leaves(mask) == [True, True]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (masked(True, 1), "test: mask=1 at 'b' is not allowed; .* True or False"),
        (masked({"x": "no", "y": True}, True), "test: mask='no' at 'a/x' is not"),
        (lambda tree: 0, "test: mask=0 is not allowed"),
        (masked(True, np.ones(2, bool)), "test: mask=array.* at 'b' is not allowed"),
    ],
)
def test_entries_that_are_no_bools_are_refused(mask, message: str):
    with pytest.raises(TypeError, match=message):
        trees.resolve_mask("test", mask, TREE)


@pytest.mark.parametrize(
    "mask",
    [
        {"a": True, "b": True},
        masked({"x": True}, True),
        masked(True, {"z": True}),
        masked({"x": True, "y": [True]}, True),
        [True],
        lambda tree: (True, True),
    ],
    ids=["missing", "missing_below", "too_deep", "short_list", "list", "function"],
)
def test_masks_of_another_structure_are_refused(mask):
    message = "test: mask is not a prefix of the parameters' tree: "
    with pytest.raises(ValueError, match=message):
        trees.resolve_mask("test", mask, TREE)
