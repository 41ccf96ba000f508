"""SOAP, Shampoo and Kron on eight devices: the same updates, and where state lies."""

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxplus as ox
from tests.assertions import assert_trees_close
from tests.sharding.meshes import is_placed, make_mesh, place

M = ox.MatrixAxes
LAST_TWO = M((-2,), (-1,))
MODES = ("explicit", "placement", "auto")
RULES: dict[str, Callable] = {
    "soap": partial(ox.scale_by_soap, update_interval=2),
    "shampoo": partial(ox.scale_by_shampoo, update_interval=2),
    "kron": partial(
        ox.scale_by_kron, warmup_steps=0, update_interval=2, interval_growth=None
    ),
}
# Roundings of 2^-53, times the condition of a factor of Gaussian entries, of up to 1e5,
# which roots and bases multiply them by. Measured: at most 3e-12, often 0. Kron's
# random numbers are float32, with last bits that depend on how they are compiled.
RTOL = {"soap": 1e-10, "shampoo": 1e-10, "kron": 3e-7}


@dataclass(frozen=True)
class Layout:
    """Parameters, and how they lie on which mesh."""

    mesh: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    specs: dict[str, P]
    axes: dict[str, ox.MatrixAxes] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)

    def make(self, rule: str, placement: Any = "auto") -> Any:
        axes = {name: self.axes.get(name, LAST_TWO) for name in self.shapes}
        return RULES[rule](axes=axes, placement=placement, **self.arguments)

    def normal(self, seed: int) -> dict[str, jax.Array]:
        rng = np.random.default_rng(seed)
        return {
            name: jnp.asarray(rng.standard_normal(shape))
            for name, shape in self.shapes.items()
        }


SQUARE = {"stack": (8, 16, 16), "one": (16, 16), "two": (16, 16), "three": (16, 16)}
FSDP = {
    "stack": P(None, "fsdp"),
    "one": P("fsdp"),
    "two": P(None, "fsdp"),
    "three": P("fsdp"),
}
BOTH = {"fsdp": 4, "tensor": 2}
LAYOUTS = {
    "fsdp": Layout({"fsdp": 8}, SQUARE, FSDP),
    "fsdp x tensor": Layout(
        BOTH,
        SQUARE,
        {
            "stack": P(None, "fsdp", "tensor"),
            "one": P("fsdp", "tensor"),
            "two": P("tensor", "fsdp"),
            "three": P(("tensor", "fsdp")),
        },
    ),
    "fsdp x data": Layout({"fsdp": 4, "data": 2}, SQUARE, FSDP),
    "replicated": Layout({"data": 8}, SQUARE, dict.fromkeys(SQUARE, P())),
    "experts": Layout(
        {"expert": 2, "fsdp": 4},
        {"experts": (4, 16, 16), "dense": (16, 16)},
        {"experts": P("expert", "fsdp"), "dense": P(None, "fsdp")},
    ),
    "heads": Layout(
        BOTH,
        {"query": (16, 2, 8), "out": (2, 8, 16), "vector": (16,)},
        {"query": P("fsdp", "tensor"), "out": P("tensor", None, "fsdp"), "vector": P()},
        {"query": M((0,), (1, 2)), "out": M((0, 1), (2,)), "vector": M((), (0,))},
    ),
    "splits": Layout(
        {"fsdp": 4, "data": 2},
        {"even": (2, 16, 32), "uneven": (16, 24)},
        {"even": P(None, "fsdp"), "uneven": P(None, "fsdp")},
        {"even": M((1,), (2,), (16, 16)), "uneven": M((0,), (1,), (16, 8))},
    ),
    "tiles": Layout(
        BOTH,
        {"a": (32, 16), "b": (2, 16, 32)},
        {"a": P("fsdp", "tensor"), "b": P(None, "tensor", "fsdp")},
        arguments={"max_dim": 16, "large_dims": "tiles"},
    ),
    "diagonals": Layout(
        BOTH,
        {"a": (32, 16), "b": (2, 16, 32)},
        {"a": P("fsdp", "tensor"), "b": P(None, "tensor", "fsdp")},
        arguments={"max_dim": 16, "large_dims": "diagonal"},
    ),
}
SHORT = (
    ("soap", "fsdp x tensor", "explicit"),
    ("shampoo", "replicated", "placement"),
    ("kron", "fsdp x data", "auto"),
)
CASES = [
    pytest.param(
        *case, id="-".join(case), marks=[] if case in SHORT else pytest.mark.slow
    )
    for case in ((r, n, m) for r in RULES for n in LAYOUTS for m in MODES)
]


def mesh_of(layout: Layout, mode: str) -> Any:
    kind = AxisType.Explicit if mode == "explicit" else AxisType.Auto
    return make_mesh(kind, **layout.mesh)


def fast(function: Callable, **arguments: Any) -> Any:
    """Compiled in a hurry: it runs a few times."""
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(function, compiler_options=options, **arguments)


def assert_lies(state: Any, shardings: Any) -> None:
    paths = jax.tree_util.tree_leaves_with_path(state)
    for (path, x), wanted in zip(paths, jax.tree.leaves(shardings), strict=True):
        found = x.sharding
        assert found.is_equivalent_to(wanted, x.ndim), f"{path}: {found}, not {wanted}"


@pytest.mark.parametrize(("rule", "name", "mode"), CASES)
def test_eight_devices_agree_with_one(rule: str, name: str, mode: str, x64) -> None:
    layout = LAYOUTS[name]
    params, *grads = (layout.normal(seed) for seed in range(5))
    tx = layout.make(rule)
    state, update, expected = tx.init(params), fast(tx.update), []
    for g in grads:
        updates, state = update(g, state)
        expected.append(updates)
    mesh = mesh_of(layout, mode)
    placement = ox.Placement(mesh, layout.specs) if mode == "placement" else "auto"
    with jax.set_mesh(mesh):
        params, *grads = (place(x, mesh, layout.specs) for x in (params, *grads))
        tx = layout.make(rule, placement)
        shardings = ox.state_sharding(tx, params)
        state = (
            tx.init(params)
            if mode == "explicit"
            else fast(tx.init, out_shardings=shardings)(params)
        )
        assert_lies(state, shardings)
        update = fast(tx.update)
        for g, wanted in zip(grads, expected, strict=True):
            updates, state = update(g, state)
            assert_trees_close(updates, wanted, rtol=RTOL[rule])
            assert_lies(state, shardings)
            for key, spec in layout.specs.items():
                assert is_placed(updates[key], mesh, spec), key


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_in_float32(rule: str) -> None:
    """Of what has one eigenbasis that rounding cannot turn far."""
    layout = LAYOUTS["fsdp x tensor"]
    rng = np.random.default_rng(0)

    def grads(scale: float) -> dict[str, jax.Array]:
        def of(shape: tuple[int, ...]) -> jax.Array:
            # Gaps of 1/16 between the singular values.
            left, right = (
                np.linalg.qr(np.random.default_rng(seed).standard_normal((16, 16)))[0]
                for seed in (1, 2)
            )
            x = (left * np.linspace(2.0, 1.0, 16)) @ right.T
            noise = rng.standard_normal(shape) / 16
            return jnp.asarray(scale * (x + noise), "float32")

        return {name: of(shape) for name, shape in layout.shapes.items()}

    axes = dict.fromkeys(layout.shapes, LAST_TWO)
    tx = RULES[rule](axes=axes)
    steps = [grads(scale) for scale in (1.0, 0.5, 2.0)]
    state, update, expected = tx.init(steps[0]), fast(tx.update), []
    for g in steps:
        updates, state = update(g, state)
        expected.append(updates)
    mesh = mesh_of(layout, "explicit")
    with jax.set_mesh(mesh):
        placed = [place(g, mesh, layout.specs) for g in steps]
        state, update = tx.init(placed[0]), fast(tx.update)
        for g, wanted in zip(placed, expected, strict=True):
            updates, state = update(g, state)
            # 16 roundings of 1.2e-7 of the norm, over gaps of 1/16, in two bases.
            assert_trees_close(updates, wanted, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", ["explicit", "auto"])
def test_left_to_the_compiler(rule: str, mode: str, x64) -> None:
    layout = LAYOUTS["fsdp"]
    params, *grads = (layout.normal(seed) for seed in range(3))
    tx = layout.make(rule, None)
    state, update, expected = tx.init(params), fast(tx.update), []
    for g in grads:
        updates, state = update(g, state)
        expected.append(updates)
    mesh = mesh_of(layout, mode)
    with jax.set_mesh(mesh):
        params, *grads = (place(x, mesh, layout.specs) for x in (params, *grads))
        state, update = tx.init(params), fast(tx.update)
        for g, wanted in zip(grads, expected, strict=True):
            updates, state = update(g, state)
            assert_trees_close(updates, wanted, rtol=RTOL[rule])


# What is stored and moved


def abstract(layout: Layout, mesh: Any) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct(
            shape, "float32", sharding=NamedSharding(mesh, layout.specs[name])
        )
        for name, shape in layout.shapes.items()
    }


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_factors_are_spread_over_the_devices_of_their_parameter(
    rule: str, name: str
) -> None:
    """Nothing stored is more on a device than its parameter's share of it."""
    layout = LAYOUTS[name]
    mesh = mesh_of(layout, "explicit")
    with jax.set_mesh(mesh):
        params = abstract(layout, mesh)
        axes = {key: layout.axes.get(key, LAST_TWO) for key in params}
        tx = RULES[rule](axes=axes, **layout.arguments)
        state = jax.eval_shape(tx.init, params)
    checked = Counter[str]()
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        if x.ndim == 0:
            continue
        key = path[-1].key
        param = params[key]
        devices = param.size // math.prod(param.sharding.shard_shape(param.shape))
        share = math.prod(x.sharding.shard_shape(x.shape))
        if x.shape != param.shape and x.shape[-1] == 1:
            # A diagonal is as little as a bias.
            devices = 1
        if layout.axes.get(key, LAST_TWO).splits in ((16, 8),):
            # Tiles of several widths are cut along their rows alone.
            devices = 1
        assert share * devices <= x.size, f"{path}: {x.sharding}"
        checked[key] += 1
    assert set(checked) == set(layout.shapes)


def compiled(layout: Layout, rule: str, mode: str) -> str:
    mesh = mesh_of(layout, mode)
    placement = ox.Placement(mesh, layout.specs) if mode == "placement" else "auto"
    with jax.set_mesh(mesh):
        params = abstract(layout, mesh)
        tx = RULES[rule](
            axes=dict.fromkeys(params, LAST_TWO),
            placement=placement,
            **layout.arguments,
        )
        shardings = ox.state_sharding(tx, params)
        state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            jax.eval_shape(tx.init, params),
            shardings,
        )
        return fast(tx.update).lower(params, state).compile().as_text()


def collectives(text: str) -> dict[str, int]:
    kinds = "all-to-all|all-gather|all-reduce|collective-permute|reduce-scatter"
    return dict(Counter(re.findall(rf" ({kinds})(?:-start)?\(", text)))


# There and, in two branches, back.
MOVED = {
    "fsdp": {"all-to-all": 3},
    "fsdp x tensor": {"all-to-all": 6},
    "fsdp x data": {"all-to-all": 3, "all-gather": 6},
    "replicated": {"all-gather": 6},
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["explicit", "placement"])
@pytest.mark.parametrize("name", MOVED)
@pytest.mark.parametrize("rule", RULES)
def test_collectives_do_not_depend_on_the_number_of_leaves(
    rule: str, name: str, mode: str
) -> None:
    base = LAYOUTS[name]
    found = []
    for count in (1, 4):
        layout = Layout(
            base.mesh,
            {f"w{i}": (16, 16) for i in range(count)},
            {f"w{i}": base.specs["one"] for i in range(count)},
        )
        found.append(collectives(compiled(layout, rule, mode)))
    assert found[0] == found[1]
    for kind, number in found[0].items():
        assert number <= MOVED[name].get(kind, 0), found[0]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("shape", "spec"),
    [((0, 8, 8), P()), ((0, 8, 8), P(None, "fsdp")), ((2, 0, 8), P())],
)
def test_parameters_without_entries(rule: str, shape: tuple[int, ...], spec: P) -> None:
    layout = Layout({"fsdp": 8}, {"empty": shape}, {"empty": spec})
    text = compiled(layout, rule, "explicit")
    assert "ENTRY" in text


@pytest.mark.parametrize("rule", RULES)
def test_narrow_transport_is_refused(rule: str) -> None:
    mesh = make_mesh(AxisType.Auto, fsdp=8)
    placement = ox.Placement(mesh, P("fsdp"), comm_dtype="bfloat16")
    tx = RULES[rule](placement=placement, axes=ox.MatrixAxes((0,), (1,)))
    g = jnp.ones((8, 4))
    with pytest.raises(ValueError, match="comm_dtype='bfloat16' is not allowed"):
        tx.update(g, tx.init(g))
