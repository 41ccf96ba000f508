"""What shapes prove about stacks of layers, and what they do not."""

import pytest

from optaxplus import DEFAULT_RULES, MatrixAxes, Rule, infer_roles, stacked
from optaxplus.partition.inference import decide
from optaxplus.partition.stacks import layer_axes, layer_shape, with_layer_axes
from tests.partition.model_zoo import MODELS
from tests.partition.routing_tables import abstract, routing

BLOCK = {
    "norm/scale": (12,),
    "attention/query/kernel": (12, 3, 4),
    "attention/out/kernel": (3, 4, 12),
    "mlp/up/kernel": (12, 20),
    "mlp/down/kernel": (20, 12),
}
AROUND = {"embed/embedding": (31, 12), "final_norm/scale": (12,)}


def in_layers(axis: int, size: int, block=BLOCK, name: str = "layers"):
    """The block under `name`, an axis of layers in every shape."""
    return {
        f"{name}/{path}": (*shape[:axis], size, *shape[axis:])
        for path, shape in block.items()
    }


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 12, 20])
def test_a_block_with_a_norm_is_a_stack(axis: int, size: int):
    shapes = AROUND | in_layers(axis, size)
    stack = in_layers(axis, size)
    expected = {path: (axis,) if path in stack else () for path in shapes}
    assert layer_axes(shapes) == expected


def test_one_layer_is_no_stack():
    assert set(layer_axes(AROUND | BLOCK).values()) == {()}
    assert layer_axes({"": (3, 4)}) == {"": ()}  # a single array has no name
    assert layer_axes({}) == {}


def test_stacks_of_stacks():
    inner = in_layers(0, 5, name="inner") | {"norm/scale": (12,)}
    outer = in_layers(0, 3, inner, "outer") | AROUND
    found = layer_axes(outer)
    assert found["outer/inner/mlp/up/kernel"] == (0, 1)
    assert found["outer/norm/scale"] == (0,)
    assert found["embed/embedding"] == ()


@pytest.mark.parametrize(
    "shapes",
    [
        {"up/kernel": (5, 12, 20), "down/kernel": (5, 20, 12)},  # no proof at all
        {"norm/scale": (12,), "mix/kernel": (12, 3, 4)},  # a norm of one axis
        {"norm/scale": (5, 12), "mix/kernel": (3, 11, 4)},  # not the same axis
        {"m/kernel": (3, 3, 5), "m/bias": (3, 5)},  # two readings
        # Five layers of 12 x 12, or twelve layers of 5 x 12 along axis 1.
        {"norm/scale": (5, 12), "q/kernel": (5, 12, 12), "k/kernel": (5, 12, 12)},
    ],
)
def test_what_proves_nothing(shapes):
    shapes = {f"block/{path}": shape for path, shape in shapes.items()}
    found = layer_axes(shapes)
    assert {found[path] for path in shapes if path.endswith("kernel")} == {()}
    if any(len(shape) > 2 for shape in shapes.values()):
        with pytest.raises(ValueError, match="no rule decides"):
            infer_roles(abstract(shapes))


def test_every_reading_of_a_proof():
    proofs = {
        "bias": {"m/kernel": (5, 12, 20), "m/bias": (5, 20)},
        "bias along axis 1": {"m/kernel": (12, 5, 20), "m/bias": (20, 5)},
        "weight in Equinox's order": {"m/weight": (5, 20, 12), "m/bias": (5, 20)},
        "heads": {"query/kernel": (5, 12, 3, 4), "out/kernel": (5, 3, 4, 12)},
        "array called norm": {"ln_1": (5, 12), "w": (5, 12, 20), "v": (5, 20, 12)},
        "low rank": {"m/lora_a": (5, 12, 2), "m/lora_b": (5, 2, 20)},
    }
    for name, shapes in proofs.items():
        axis = 1 if name.endswith("1") else 0
        assert set(layer_axes(shapes).values()) == {(axis,)}, name


def test_a_router_beside_experts_is_no_vector_of_a_stack():
    # All begin with the same size by accident; a kernel of one axis is impossible.
    shapes = {
        "moe/router/kernel": (8, 8),
        "moe/up/kernel": (8, 6, 7),
        "moe/up/bias": (8, 7),
    }
    found = layer_axes(shapes)
    assert found["moe/router/kernel"] == ()
    assert found["moe/up/kernel"] == found["moe/up/bias"] == (0,)


@pytest.mark.parametrize(("axis", "size"), [(0, 41), (0, 3), (1, 41)])
@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model_stacked_is_decided_as_it_was(name: str, axis: int, size: int):
    rest = Rule(r"", MatrixAxes((), ()), "other", required=False)
    alone = decide("test", MODELS[name](), (*DEFAULT_RULES, rest))
    tall = [d for d in alone if len(d.shape) >= axis]
    shapes = {d.path: (*d.shape[:axis], size, *d.shape[axis:]) for d in tall}
    rules = stacked("", axis, (*DEFAULT_RULES, rest))
    layered = {d.path: d for d in decide("test", abstract(shapes), rules)}
    for decision in tall:
        other = layered[decision.path]
        assert other.role == decision.role
        assert other.axes == with_layer_axes(decision.axes, other.shape, (axis,))


# Views


def test_layer_axes_are_put_back():
    assert layer_shape((5, 12, 3, 4), (0, 2)) == (12, 4)
    axes = with_layer_axes(MatrixAxes((0,), (-1,), (1, 3)), (5, 12, 3, 4), (0, 2))
    assert axes == MatrixAxes((1,), (3,), (1, 3))
    with pytest.raises(ValueError, match="axis 2 is out of range"):
        with_layer_axes(MatrixAxes((0,), (2,)), (5, 12, 4), (0,))


# Rules of `stacked`

PLAIN = {"up": (5, 12, 20), "down": (5, 20, 12), "gate": (5, 12)}


def test_stacked_decides_as_if_the_axis_were_not_there():
    shapes = {f"layers/{name}": shape for name, shape in PLAIN.items()} | AROUND
    assert routing(abstract(shapes), (*stacked("^layers/"), *DEFAULT_RULES)) == {
        "layers/up": ("hidden", (1,), (2,)),
        "layers/down": ("hidden", (1,), (2,)),
        "layers/gate": ("vector", (), (1,)),
        "embed/embedding": ("embedding", (0,), (1,)),
        "final_norm/scale": ("vector", (), (0,)),
    }


def test_stacked_along_another_axis_and_inside_another_stack():
    shapes = {"layers/up": (12, 5, 20), "layers/gate": (12, 5)}
    assert routing(abstract(shapes), stacked("^layers/", axis=1)) == {
        "layers/up": ("hidden", (0,), (2,)),
        "layers/gate": ("vector", (), (0,)),
    }
    shapes = {"a/b/up": (3, 5, 12, 20), "a/up": (3, 12, 20)}
    rules = stacked("^a/", rules=(*stacked("/b/"), *DEFAULT_RULES))
    assert routing(abstract(shapes), rules) == {
        "a/b/up": ("hidden", (2,), (3,)),
        "a/up": ("hidden", (1,), (2,)),
    }


def test_stacked_uses_evidence_inside_one_layer():
    shapes = {
        "layers/m/kernel": (5, 3, 3, 4),
        "layers/m/bias": (5, 4),
        "layers/q/kernel": (5, 12, 3, 4),
        "layers/q/bias": (5, 3, 4),
    }
    assert routing(abstract(shapes), stacked("^layers/")) == {
        "layers/m/kernel": ("hidden", (1, 2), (3,)),
        "layers/m/bias": ("vector", (), (1,)),
        "layers/q/kernel": ("hidden", (1,), (2, 3)),
        "layers/q/bias": ("vector", (), (1, 2)),
    }


def test_stacked_takes_rules_of_ones_own():
    mine = Rule(r"up$", MatrixAxes((1,), (0,)), "turned")
    rules = stacked("^layers/", rules=(mine, *DEFAULT_RULES))
    shapes = {f"layers/{name}": shape for name, shape in PLAIN.items()}
    assert routing(abstract(shapes), rules)["layers/up"] == ("turned", (2,), (1,))


def test_stacked_is_required():
    with pytest.raises(ValueError, match=r"the rule '\^blocks/' matches no parameter"):
        infer_roles(abstract(AROUND), (*stacked("^blocks/"), *DEFAULT_RULES))


def test_stacked_refuses_what_has_no_such_axis():
    shapes = {"layers/up": (5, 12, 20), "layers/temperature": ()}
    message = (
        r"stacked\('\^layers/', axis=0\): parameter 'layers/temperature' of shape \(\)"
    )
    with pytest.raises(ValueError, match=message):
        infer_roles(abstract(shapes), stacked("^layers/"))


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (TypeError, {"axis": 0.5}, "stacked: axis=0.5 is not allowed"),
        (ValueError, {"axis": -1}, "stacked: axis=-1 is not allowed"),
        (TypeError, {"rules": [3]}, "stacked: rules=3 is not allowed"),
        (ValueError, {"pattern": "("}, r"Rule: pattern='\(' is not allowed"),
    ],
)
def test_stacked_refuses_nonsense(error, arguments, message: str):
    with pytest.raises(error, match=message):
        stacked(**{"pattern": "layers", **arguments})
