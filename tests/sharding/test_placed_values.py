"""Eight devices give what one device gives, however parameters lie on them."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optaxplus as ox
from optaxplus.sharding import orthogonalize, plan
from tests.assertions import assert_trees_close
from tests.selection import mostly
from tests.sharding.meshes import is_placed, make_mesh, normal, place

M = ox.MatrixAxes
LAST_TWO = M((-2,), (-1,))

# Sums go over other partial sums, so entries differ by 2^-24 of the largest before the
# steps, which multiply small singular values by 803: the product of the coefficients of
# X. Against float64 one device is off by up to 1.2e-5, eight by up to 2.2e-5.
RTOL = 803 * 2**-24


@dataclass(frozen=True)
class Layout:
    """Parameters, how they are matrices, and how they lie on which mesh."""

    mesh: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    specs: dict[str, P]
    axes: dict[str, ox.MatrixAxes] = field(default_factory=dict)

    def axes_of(self) -> dict[str, ox.MatrixAxes]:
        return {name: self.axes.get(name, LAST_TWO) for name in self.shapes}


SHAPES = {"stack": (3, 16, 32), "up": (16, 32), "down": (32, 16), "square": (16, 16)}
FSDP = {
    "stack": P(None, "fsdp"),
    "up": P("fsdp"),
    "down": P(None, "fsdp"),
    "square": P("fsdp"),
}
LAYOUTS = {
    "fsdp": Layout({"fsdp": 8}, SHAPES, FSDP),
    "stacked": Layout({"fsdp": 8}, {"w": (16, 8, 16)}, {"w": P(None, "fsdp")}),
    "separate": Layout(
        {"fsdp": 8},
        {f"w{i}": (8, 16) for i in range(11)},
        {f"w{i}": P("fsdp") for i in range(11)},
    ),
    "fewer than devices": Layout({"fsdp": 8}, {"w": (8, 16)}, {"w": P("fsdp")}),
    "long side": Layout(
        {"fsdp": 8},
        {"up": (3, 16, 64), "down": (64, 16)},
        {"up": P(None, None, "fsdp"), "down": P("fsdp")},
    ),
    "fsdp x tensor": Layout(
        {"fsdp": 4, "tensor": 2},
        {**SHAPES, "turned": (16, 16)},
        {
            "stack": P(None, "fsdp", "tensor"),
            "up": P("fsdp", "tensor"),
            "down": P("tensor", "fsdp"),
            "square": P("fsdp", "tensor"),
            "turned": P("tensor", "fsdp"),
        },
    ),
    "one side over both": Layout(
        {"fsdp": 4, "tensor": 2},
        {"up": (16, 32), "down": (32, 16)},
        {"up": P(("fsdp", "tensor")), "down": P(None, ("tensor", "fsdp"))},
    ),
    "replicated": Layout({"data": 8}, SHAPES, dict.fromkeys(SHAPES, P())),
    "replicated, odd": Layout(
        {"data": 8}, {"a": (19, 8, 16), "b": (8, 16)}, {"a": P(), "b": P()}
    ),
    "hybrid": Layout({"data": 2, "fsdp": 4}, SHAPES, FSDP),
    "hybrid, odd": Layout(
        {"fsdp": 2, "data": 4},
        {"a": (19, 8, 16), "b": (8, 8)},
        {"a": P(None, "fsdp"), "b": P(None, "fsdp")},
    ),
    "some replicated": Layout(
        {"fsdp": 4, "tensor": 2},
        SHAPES,
        {
            "stack": P(None, "fsdp", "tensor"),
            "up": P("fsdp"),
            "down": P(),
            "square": P(),
        },
    ),
    "experts": Layout(
        {"expert": 4, "fsdp": 2},
        {"experts": (8, 16, 32), "dense": (16, 32)},
        {"experts": P("expert", "fsdp"), "dense": P("fsdp")},
    ),
    "whole matrices": Layout({"layer": 8}, {"w": (8, 8, 16)}, {"w": P("layer")}),
    "heads": Layout(
        {"fsdp": 4, "tensor": 2},
        {"query": (16, 4, 8), "out": (4, 8, 16)},
        {"query": P("fsdp", "tensor"), "out": P("tensor", None, "fsdp")},
        {"query": M((0,), (1, 2)), "out": M((0, 1), (2,))},
    ),
    "inner axis of heads": Layout(
        {"tensor": 8},
        {"query": (16, 4, 8)},
        {"query": P(None, None, "tensor")},
        {"query": M((0,), (1, 2))},
    ),
    "fused": Layout(
        {"fsdp": 8},
        {"qkv": (16, 48)},
        {"qkv": P("fsdp")},
        {"qkv": M((0,), (1,), (24, 16, 8))},
    ),
    "fused, columns": Layout(
        {"fsdp": 4, "tensor": 2},
        {"qkv": (16, 48), "heads": (16, 3, 8)},
        {"qkv": P("fsdp", "tensor"), "heads": P("fsdp", None, "tensor")},
        {"qkv": M((0,), (1,), (24, 16, 8)), "heads": M((0,), (1, 2), (8, 16))},
    ),
    "narrow": Layout(
        {"fsdp": 8},
        {"row": (1, 16), "column": (16, 1), "empty": (0, 8), "conv": (3, 3, 8, 16)},
        {
            "row": P(None, "fsdp"),
            "column": P("fsdp"),
            "empty": P(None, "fsdp"),
            "conv": P(None, None, "fsdp"),
        },
        {"conv": M((0, 1, 2), (3,))},
    ),
}
MODES = ("explicit", "placement", "auto")


def placement_of(mode: str, mesh: jax.sharding.Mesh, specs: dict[str, P]):
    return ox.Placement(mesh, specs) if mode == "placement" else "auto"


def axis_type(mode: str) -> AxisType:
    return AxisType.Explicit if mode == "explicit" else AxisType.Auto


def check(layout: Layout, mode: str) -> None:
    grads = normal(layout.shapes)
    tx = ox.orthogonalize_via_newton_schulz(
        compute_dtype="float32", axes=layout.axes_of()
    )
    expected, _ = tx.update(grads, tx.init(grads))
    mesh = make_mesh(axis_type(mode), **layout.mesh)
    placed = place(grads, mesh, layout.specs)
    tx = ox.orthogonalize_via_newton_schulz(
        compute_dtype="float32",
        axes=layout.axes_of(),
        placement=placement_of(mode, mesh, layout.specs),
    )
    # Nothing tells an Auto mesh how results are to lie but those who ask for them.
    shardings = jax.tree.map(lambda x: x.sharding, placed)
    update = jax.jit(lambda g: tx.update(g, ())[0], out_shardings=shardings)
    updates = update(placed)
    assert_trees_close(updates, expected, rtol=RTOL)
    if mode == "explicit":
        types = jax.eval_shape(lambda g: tx.update(g, ())[0], placed)
        for name, spec in layout.specs.items():
            assert is_placed(updates[name], mesh, spec)
            assert jax.typeof(types[name]).sharding == jax.typeof(placed[name]).sharding


def in_turn(names, modes):
    """Every name with one of the modes by default, with all of them with `-m slow`."""
    return pytest.mark.parametrize(
        ("name", "mode"),
        [
            pytest.param(
                name, mode, marks=[] if (i - j) % len(modes) == 0 else pytest.mark.slow
            )
            for i, name in enumerate(names)
            for j, mode in enumerate(modes)
        ],
    )


# A layout of each kind, and every mode.
BY_DEFAULT = {
    ("fsdp", "explicit"),
    ("fsdp x tensor", "auto"),
    ("hybrid, odd", "placement"),
    ("heads", "placement"),
    ("fused, columns", "auto"),
    ("stacked", "placement"),
}


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param(*case, marks=[] if case in BY_DEFAULT else pytest.mark.slow)
        for case in itertools.product(LAYOUTS, MODES)
    ],
)
def test_eight_devices_agree_with_one(name: str, mode: str) -> None:
    check(LAYOUTS[name], mode)


@pytest.mark.parametrize("mode", mostly(["placement"], ["auto", "placement"]))
def test_a_mesh_with_axes_of_both_types(mode: str) -> None:
    """Its types tell some of how arrays lie, and no device waits for another."""
    types = (AxisType.Explicit, AxisType.Auto)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), types)
    shapes = {f"long_{i}": (16, 64) for i in range(3)}
    shapes |= {f"square_{i}": (32, 32) for i in range(3)}
    specs = dict.fromkeys(shapes, P("fsdp", "tensor"))
    grads = normal(shapes)
    tx = ox.orthogonalize_via_newton_schulz(compute_dtype="float32", axes=LAST_TWO)
    expected, _ = tx.update(grads, tx.init(grads))
    tx = ox.orthogonalize_via_newton_schulz(
        compute_dtype="float32",
        axes=LAST_TWO,
        placement=placement_of(mode, mesh, specs),
    )
    updates = jax.jit(lambda g: tx.update(g, ())[0])(place(grads, mesh, specs))
    assert_trees_close(updates, expected, rtol=RTOL)


SCARCE = {
    "short side": LAYOUTS["fewer than devices"],
    "long side": LAYOUTS["long side"],
    "stacked": Layout({"fsdp": 8}, {"w": (3, 8, 64)}, {"w": P(None, "fsdp")}),
    "fsdp x tensor": Layout(
        {"fsdp": 4, "tensor": 2},
        {"up": (16, 32), "down": (32, 16)},
        {"up": P("fsdp", "tensor"), "down": P("tensor", "fsdp")},
    ),
    "hybrid": Layout({"data": 2, "fsdp": 4}, {"a": (16, 32)}, {"a": P("fsdp")}),
    "others beside them": Layout(
        {"expert": 2, "fsdp": 4},
        {"experts": (2, 16, 64), "one": (1, 16, 16)},
        {"experts": P("expert", None, "fsdp"), "one": P(None, "fsdp")},
    ),
}


@pytest.mark.parametrize(
    "name", mostly(["fsdp x tensor", "others beside them"], SCARCE)
)
def test_panels_agree_with_one_device(name: str, monkeypatch) -> None:
    # As if arithmetic were so dear that every panel pays.
    monkeypatch.setattr(plan, "_FLOPS_PER_SECOND", 1.0)
    made, plans = plan.make_plan, []
    monkeypatch.setattr(
        orthogonalize, "make_plan", lambda *args: plans.append(made(*args)) or plans[-1]
    )
    check(SCARCE[name], "placement")
    assert plans[-1].cut


@pytest.mark.parametrize("dtype", mostly(["bfloat16"], ["bfloat16", "float16"]))
def test_narrow_products(dtype: str) -> None:
    # The scale of the gradient would leave the range of float16.
    grads = {"w": 1e-6 * normal({"w": (5, 16, 32)})["w"]}
    mesh = make_mesh(AxisType.Auto, fsdp=8)
    placed = place(grads, mesh, {"w": P(None, "fsdp")})
    make = lambda placement: ox.orthogonalize_via_newton_schulz(  # noqa: E731
        compute_dtype=dtype, axes=LAST_TWO, placement=placement
    )
    expected, _ = make("auto").update(grads, ())
    updates, _ = jax.jit(make(ox.Placement.like(placed)).update)(placed, ())
    # Roundings to bfloat16 at other places, of entries of at most 1.
    assert_trees_close(updates, expected, rtol=4e-2)


def test_comm_dtype_rounds_what_is_moved() -> None:
    grads = normal({"w": (16, 32)})
    mesh = make_mesh(AxisType.Auto, fsdp=8)
    placed = place(grads, mesh, {"w": P("fsdp")})

    def update(comm_dtype):
        tx = ox.orthogonalize_via_newton_schulz(
            compute_dtype="float32",
            axes=LAST_TWO,
            placement=ox.Placement.like(placed, comm_dtype),
        )
        return np.asarray(jax.jit(tx.update)(placed, ())[0]["w"])

    exact, rounded = update(None), update("bfloat16")
    assert not np.array_equal(exact, rounded)
    assert np.array_equal(rounded, rounded.astype(jax.numpy.bfloat16))
    np.testing.assert_allclose(rounded, exact, atol=2e-2)


# What people put Muon into

PARAMS = {
    "block": {"kernel": (8, 16), "bias": (16,)},
    "out": {"kernel": (16, 8)},
}
SPECS = {
    "block": {"kernel": P("fsdp", None), "bias": P()},
    "out": {"kernel": P(None, "fsdp")},
}


def tree(seed: int):
    leaves, structure = jax.tree.flatten(PARAMS, is_leaf=lambda x: isinstance(x, tuple))
    rng = np.random.default_rng(seed)
    arrays = [jax.numpy.asarray(rng.standard_normal(s), "float32") for s in leaves]
    return jax.tree.unflatten(structure, arrays)


FAMILY = {
    "muon": ox.muon,
    "normuon": ox.normuon,
    "adamuon": ox.adamuon,
    "scion": ox.scion,
}
INSIDE: dict[str, Callable] = {
    "chain": lambda make: optax.chain(optax.clip(1.0), make()),
    "partition": lambda make: optax.partition(
        {"m": make(), "o": ox.adamw(0.1)},
        {"block": {"kernel": "m", "bias": "o"}, "out": {"kernel": "m"}},
    ),
    "masked": lambda make: optax.masked(
        make(), {"block": {"kernel": True, "bias": False}, "out": {"kernel": True}}
    ),
    "inject_hyperparams": lambda make: make(inject=True),
    "MultiSteps": lambda make: optax.MultiSteps(
        make(), every_k_schedule=2
    ).gradient_transformation(),
    "accumulate": lambda make: ox.accumulate(make(), every_k=2),
    "lookahead": lambda make: ox.lookahead(make(), every_k=2),
}
WHOLE_TREE = {"chain", "inject_hyperparams", "MultiSteps", "accumulate", "lookahead"}


def steps(tx, params, grads):
    @jax.jit
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for g in grads:
        params, state = step(params, state, g)
    return params


def compare(build: Callable, mode: str) -> None:
    params, grads = tree(0), [tree(seed) for seed in (1, 2, 3, 4)]
    expected = steps(build("auto"), params, grads)
    mesh = make_mesh(axis_type(mode), fsdp=8)
    with jax.set_mesh(mesh):
        params, *grads = (place(x, mesh, SPECS) for x in (params, *grads))
        tx = build(placement_of(mode, mesh, SPECS))
        actual = steps(tx, params, grads)
    assert_trees_close(actual, expected, rtol=RTOL)


@in_turn(FAMILY, MODES)
def test_the_family(name: str, mode: str) -> None:
    compare(lambda p: FAMILY[name](0.1, compute_dtype="float32", placement=p), mode)


@pytest.mark.slow
@in_turn(INSIDE, ["explicit", "placement"])
def test_placement_survives(name: str, mode: str) -> None:
    def build(placement):
        if placement != "auto" and name not in WHOLE_TREE:
            # A group of a partition has the specs of its own parameters.
            kernels = {name: {"kernel": spec["kernel"]} for name, spec in SPECS.items()}
            placement = ox.Placement(placement.mesh, kernels)

        def make(inject: bool = False):
            factory = optax.inject_hyperparams(
                ox.muon,
                static_args=("compute_dtype", "ns_steps", "placement"),
                hyperparam_dtype=jax.numpy.float32,
            )
            factory = factory if inject else ox.muon
            return factory(
                learning_rate=0.1, compute_dtype="float32", placement=placement
            )

        return INSIDE[name](make)

    compare(build, mode)


@pytest.mark.parametrize("mode", ["explicit", "placement"])
def test_train_state(mode: str) -> None:
    def run(params, grads, placement):
        tx = ox.muon(0.1, compute_dtype="float32", placement=placement)
        state = TrainState.create(apply_fn=lambda: None, params=params, tx=tx)
        return jax.jit(lambda s, g: s.apply_gradients(grads=g))(state, grads).params

    expected = run(tree(0), tree(1), "auto")
    mesh = make_mesh(axis_type(mode), fsdp=8)
    with jax.set_mesh(mesh):
        params, grads = place(tree(0), mesh, SPECS), place(tree(1), mesh, SPECS)
        actual = run(params, grads, placement_of(mode, mesh, SPECS))
    assert_trees_close(actual, expected, rtol=RTOL)


def test_nnx() -> None:
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.hidden = nnx.Linear(8, 16, rngs=rngs)
            self.out = nnx.Linear(16, 8, rngs=rngs)

    def train(model, optimizer):
        @nnx.jit
        def step(model, optimizer):
            grads = nnx.grad(
                lambda m: sum(
                    (x**3).sum() for x in jax.tree.leaves(nnx.state(m, nnx.Param))
                )
            )(model)
            optimizer.update(model, grads)

        for _ in range(2):
            step(model, optimizer)
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def make(placement):
        return ox.muon(0.1, compute_dtype="float32", placement=placement)

    model = Model(nnx.Rngs(0))
    expected = train(model, nnx.Optimizer(model, make("auto"), wrt=nnx.Param))
    model = Model(nnx.Rngs(0))
    mesh = make_mesh(AxisType.Auto, fsdp=8)
    state = nnx.state(model, nnx.Param)
    specs = jax.tree.map(lambda x: P("fsdp") if x.ndim == 2 else P(), state)
    nnx.update(model, place(state, mesh, specs))
    # Variables at `init`, bare arrays at `update`.
    placement = ox.Placement.like(nnx.state(model, nnx.Param))
    actual = train(model, nnx.Optimizer(model, make(placement), wrt=nnx.Param))
    assert_trees_close(actual, expected, rtol=RTOL)
    assert is_placed(model.hidden.kernel[...], mesh, P("fsdp"))
