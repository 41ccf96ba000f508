"""Explicit meshes: any axis may be sharded, also one that becomes part of a side."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxplus as ox
from optaxplus.numerics import polar_factor
from tests.assertions import assert_trees_close
from tests.selection import mostly
from tests.sharding.meshes import make_mesh, normal, place

M = ox.MatrixAxes
SHAPES = {
    "conv": (3, 3, 16, 32),
    "out": (4, 8, 32),
    "fused": (32, 96),
    "experts": (4, 16, 32),
}
AXES = {
    "conv": M((0, 1, 2), (3,)),
    "out": M((0, 1), (2,)),
    "fused": M((0,), (1,), (32, 48, 16)),
    "experts": M((1,), (2,)),
}
SPECS = {
    "conv": P(None, None, "fsdp", "tensor"),
    "out": P(None, "tensor", "fsdp"),
    "fused": P("fsdp", "tensor"),
    "experts": P("fsdp", None, "tensor"),
}
RULES = tuple(ox.Rule(rf"^{name}$", axes, "hidden") for name, axes in AXES.items())
FLOAT32 = {"rules": RULES, "compute_dtype": "float32", "ns_steps": 2}
FACTORIES = {
    "muon": lambda rate: ox.muon(rate, **FLOAT32),
    "muon, left to the compiler": lambda rate: ox.muon(rate, placement=None, **FLOAT32),
    "normuon": lambda rate: ox.normuon(rate, **FLOAT32),
    "adamuon": lambda rate: ox.adamuon(rate, **FLOAT32),
    "scion": lambda rate: ox.scion(rate, **FLOAT32),
    "dion": lambda rate: ox.dion(rate, rules=RULES),
    "kron": lambda rate: ox.kron(rate, rules=RULES),
    "apollo": lambda rate: ox.apollo(rate, rank=4, rules=RULES),
    "came": lambda rate: ox.came(rate, axes=AXES, min_dim_size_to_factor=1),
    "adafactor": lambda rate: ox.adafactor(rate, axes=AXES, min_dim_size_to_factor=1),
    "lamb": lambda rate: ox.lamb(rate, axes=AXES),
}
# Sums go over other partial sums, and two steps of Newton-Schulz multiply small
# singular values by 31, see test_placed_values; norms and means sum over more.
RTOL = 100 * 2**-24
# AdaMuon divides entries by the roots of their own mean squares: errors of small ones
# count as much as those of the largest. Dion's QR divides by what is left of columns
# that are nearly parallel to others.
RTOL_OF = {"adamuon": 10 * RTOL, "dion": 10 * RTOL}


def two_steps(tx: optax.GradientTransformation, params):
    update = jax.jit(tx.update)
    state = jax.jit(tx.init)(params)
    _, state = update(params, state, params)
    return update(jax.tree.map(jnp.sin, params), state, params)


@pytest.mark.parametrize("name", mostly(["muon", "lamb"], FACTORIES))
def test_explicit_axes_agree_with_one_device(name: str) -> None:
    tx = FACTORIES[name](1e-2)
    params = normal(SHAPES)
    expected, _ = two_steps(tx, params)
    mesh = make_mesh(AxisType.Explicit, fsdp=4, tensor=2)
    placed = place(params, mesh, SPECS)
    with jax.set_mesh(mesh):
        updates, state = two_steps(tx, placed)
    assert_trees_close(updates, expected, rtol=RTOL_OF.get(name, RTOL))
    for key, spec in SPECS.items():
        assert updates[key].sharding.is_equivalent_to(
            NamedSharding(mesh, spec), len(SHAPES[key])
        )
    planned = ox.state_sharding(tx, placed)
    assert jax.tree.all(
        jax.tree.map(
            lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, planned
        )
    )


@pytest.mark.parametrize("name", mostly(["adafactor"], ["came", "adafactor", "dion"]))
def test_traced_hyperparameters(name: str) -> None:
    factory = {"came": ox.came, "adafactor": ox.adafactor, "dion": ox.dion}[name]
    given = {"rules": RULES} if name == "dion" else {"axes": AXES}
    if name != "dion":
        given["min_dim_size_to_factor"] = 1
    traced = {"learning_rate", "b1", "b2", "b3", "eps", "weight_decay"}
    static = tuple(inspect.signature(factory).parameters.keys() - traced)
    tx = optax.inject_hyperparams(factory, static_args=static)(1e-2, **given)
    params = normal(SHAPES)
    expected, _ = two_steps(tx, params)
    mesh = make_mesh(AxisType.Explicit, fsdp=4, tensor=2)
    with jax.set_mesh(mesh):
        updates, _ = two_steps(tx, place(params, mesh, SPECS))
    assert_trees_close(updates, expected, rtol=RTOL_OF.get(name, RTOL))


@pytest.mark.parametrize("spec", [P("fsdp"), P(None, "fsdp"), P(None, None, "fsdp")])
def test_polar_factor_of_a_sharded_array(spec: P) -> None:
    (x,) = normal({"x": (8, 16, 64)}).values()
    arguments = {"compute_dtype": "float32", "ns_steps": 2}
    mesh = make_mesh(AxisType.Explicit, fsdp=8)
    placed = jax.device_put(x, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: polar_factor(x, **arguments))(placed)
    assert y.sharding.is_equivalent_to(placed.sharding, 3)
    expected = polar_factor(x, **arguments)
    atol = RTOL * float(np.abs(expected).max())
    np.testing.assert_allclose(y, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "name", mostly(["dion"], ["came", "adafactor", "dion", "muon"])
)
def test_gradients_from_no_mesh(name: str) -> None:
    """Such as those of NumPy, beside parameters and state that have one."""
    tx = FACTORIES[name](1e-2)
    params, grads = normal(SHAPES), normal(SHAPES, seed=1)
    expected, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    mesh = make_mesh(AxisType.Explicit, fsdp=4, tensor=2)
    placed = place(params, mesh, SPECS)
    host = jax.tree.map(np.asarray, grads)
    with jax.set_mesh(mesh):
        updates, _ = jax.jit(tx.update)(host, jax.jit(tx.init)(placed), placed)
    assert_trees_close(updates, expected, rtol=RTOL_OF.get(name, RTOL))


def test_polar_factor_within_a_shard_map_over_some_axes() -> None:
    (x,) = normal({"x": (4, 16, 64)}).values()
    arguments = {"compute_dtype": "float32", "ns_steps": 2}
    mesh = make_mesh(AxisType.Explicit, fsdp=4, tensor=2)
    placed = jax.device_put(x, NamedSharding(mesh, P("fsdp", None, "tensor")))
    with jax.set_mesh(mesh):
        factor = jax.shard_map(
            lambda x: polar_factor(x, **arguments),
            axis_names={"fsdp"},
            in_specs=P("fsdp"),
            out_specs=P("fsdp"),
        )
        y = jax.jit(factor)(placed)
    expected = polar_factor(x, **arguments)
    atol = RTOL * float(np.abs(expected).max())
    np.testing.assert_allclose(y, expected, rtol=0, atol=atol)
