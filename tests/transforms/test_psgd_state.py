"""PSGD-Kron: its state, where that lies, degenerate matrices, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxplus as ox
from optaxplus import MatrixAxes
from tests.assertions import assert_finite, assert_trees_close, assert_trees_equal
from tests.transforms.kron_runs import STACK, follow, gradients, normal, start

MATRIX = MatrixAxes((0,), (1,))
TILES = {"large_dims": "tiles"}


# State


@pytest.mark.parametrize(
    ("shape", "axes", "arguments", "expected"),
    [
        ((6, 4), MATRIX, {}, ((1, 6, 6), (1, 4, 4))),
        ((6, 4), MATRIX, {"max_dim": 5}, ((1, 6, 1), (1, 4, 4))),
        ((6, 4), MATRIX, {"max_dim": 3}, ((1, 6, 1), (1, 4, 1))),
        ((6, 4), MATRIX, {"max_dim": 3, **TILES}, ((4, 3, 3), (4, 2, 2))),
        ((1, 4), MATRIX, {}, ((1, 1, 1), (1, 4, 4))),
        ((4,), MatrixAxes((), (0,)), {}, ((1, 1, 1), (1, 4, 1))),
        ((3, 4), MatrixAxes((), (1,)), {}, ((3, 1, 1, 1), (3, 1, 4, 1))),
        ((2, 3, 4, 5), MatrixAxes((0, 2), (3,)), {}, ((3, 1, 8, 8), (3, 1, 5, 5))),
        ((4, 9), MatrixAxes((0,), (1,), (3, 3, 3)), {}, ((3, 4, 4), (3, 3, 3))),
        ((4, 9), MatrixAxes((0,), (1,), (7, 2)), {}, ((2, 4, 4), (2, 7, 7))),
        ((0, 4), MATRIX, {}, ((1, 0, 0), (1, 4, 4))),
    ],
)
def test_shapes_of_factors(shape, axes, arguments, expected):
    tx = ox.scale_by_kron(axes=axes, **arguments)
    state = jax.eval_shape(tx.init, jax.ShapeDtypeStruct(shape, "bfloat16"))
    assert (state.factor_in.shape, state.factor_out.shape) == expected
    assert {state.factor_in.dtype, state.factor_out.dtype} == {jnp.dtype("float32")}


def test_factors_start_from_the_identity():
    state = start(jnp.ones((2, 3, 7)), axes=MatrixAxes((1,), (2,), (2, 5)), max_dim=4)
    # Two layers with a tile for each split, the first filled up to the second.
    left = np.broadcast_to(np.eye(3), (2, 2, 3, 3))
    right = np.zeros((2, 2, 5, 2))
    right[:, 0, :2], right[:, 1, :, 0] = np.eye(2), 1.0
    np.testing.assert_array_equal(state.factor_in, left)
    np.testing.assert_array_equal(state.factor_out, right)
    scaled = start(jnp.ones((2, 3)), init_scale=0.25)
    np.testing.assert_array_equal(scaled.factor_in, 0.5 * np.eye(2)[None])


@pytest.mark.parametrize(
    "dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)]
)
def test_low_precision_gradients_are_computed_in_float32(dtype: str):
    grads = [g.astype(jnp.dtype(dtype)) for g in gradients((6, 4), steps=2)]
    updates, states = follow(grads)
    wide, wide_states = follow([g.astype("float32") for g in grads])
    assert_trees_equal(updates, wide)
    assert_trees_equal(states, wide_states)
    assert updates[0].dtype.name == "float32"


def test_bfloat16_state():
    grads = gradients((6, 4), steps=4)
    updates, states = follow(grads, mu_dtype="bfloat16", factor_dtype="bfloat16")
    _, mu, *factors = states[-1][1:]
    assert {x.dtype.name for x in (mu, *factors)} == {"bfloat16"}
    exact, _ = follow(grads)
    # Four times 2^-9, of both factors and squared.
    assert_trees_close(updates, exact, rtol=16 * 2**-9)


@pytest.mark.slow
def test_the_seed_decides():
    grads = gradients((6, 4), steps=1)
    ours, _ = follow(grads)
    other, _ = follow(grads, seed=1)
    assert np.abs(ours[0] - other[0]).max() > 1e-3


# Placement


def shardings(state):
    return state.factor_in.sharding, state.factor_out.sharding


@pytest.mark.parametrize(
    ("axes", "spec", "expected"),
    [
        # Rows as the side itself, columns as the other one.
        (
            MatrixAxes((1,), (2,)),
            P(None, "x", "y"),
            (P(None, None, "x", "y"), P(None, None, "y", "x")),
        ),
        (
            MatrixAxes((2,), (1,)),
            P(None, ("x", "y"), None),
            (P(None, None, None, ("x", "y")), P(None, None, ("x", "y"), None)),
        ),
        (MatrixAxes((1,), (2,)), P("x", None, None), (P("x"), P("x"))),
        # Two axes of one side.
        (
            MatrixAxes((0, 1), (2,)),
            P("x", "y", None),
            (P(None, ("x", "y"), None), P(None, None, ("x", "y"))),
        ),
    ],
)
@pytest.mark.parametrize(
    "kind", [pytest.param(AxisType.Auto, marks=pytest.mark.slow), AxisType.Explicit]
)
def test_factors_are_placed_as_their_sides(axes: MatrixAxes, spec, expected, kind):
    mesh = jax.make_mesh((2, 4), ("x", "y"), (kind,) * 2)
    tx = ox.scale_by_kron(axes=axes)
    g = normal((2, 8, 16), seed=0)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(g, NamedSharding(mesh, spec))
        state = tx.init(sharded)
        planned = ox.state_sharding(tx, sharded)
        compiled = jax.jit(tx.init, out_shardings=planned)(sharded)
        for each in (state, planned, compiled):
            found = (
                (each.factor_in, each.factor_out)
                if each is planned
                else shardings(each)
            )
            for sharding, wanted in zip(found, expected, strict=True):
                wanted = NamedSharding(mesh, wanted)
                rank = state.factor_in.ndim
                assert sharding.is_equivalent_to(wanted, rank), sharding
        assert_trees_equal(jax.device_get(compiled), jax.device_get(state))


def test_sides_that_do_not_divide_stay_whole():
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Explicit,))
    g = jax.device_put(normal((8, 6), seed=0), NamedSharding(mesh, P("x", None)))
    with jax.set_mesh(mesh):
        state = ox.scale_by_kron(axes=MATRIX, max_dim=7).init(g)
    # A diagonal factor has one column, and six rows are none for eight devices.
    assert state.factor_in.sharding.spec == P(None, "x", None)
    assert state.factor_out.sharding.spec == P(None, None, None)


@pytest.mark.parametrize(
    "kind", [pytest.param(AxisType.Auto, marks=pytest.mark.slow), AxisType.Explicit]
)
def test_many_devices_agree_with_one(kind):
    mesh = jax.make_mesh((2, 4), ("x", "y"), (kind,) * 2)
    tx = ox.scale_by_kron(axes=MATRIX)
    grads = gradients((8, 16), steps=2)
    expected, expected_states = follow(grads, axes=MATRIX)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(g, NamedSharding(mesh, P("x", "y"))) for g in grads]
        state = tx.init(placed[0])
        before = shardings(state)
        step = jax.jit(
            tx.update, compiler_options={"xla_backend_optimization_level": 0}
        )
        for g in placed:
            update, state = step(g, state)
    # Under Auto axes the next link says where an update lies.
    if kind is AxisType.Explicit:
        assert update.sharding.is_equivalent_to(placed[0].sharding, 2)
    for old, new in zip(before, shardings(state), strict=True):
        assert new.is_equivalent_to(old, 3)
    # Sums over devices in another order, amplified by the condition of the factors.
    assert_trees_close(jax.device_get(update), expected[-1], rtol=5e-6)
    assert_trees_close(jax.device_get(state), expected_states[-1], rtol=5e-6)


# Limits


def test_zero_gradients_give_zero_and_keep_the_factors():
    g = normal((6, 4), seed=0)
    zeros = np.zeros_like(g)
    updates, states = follow([*[zeros] * 30, g])
    assert_trees_equal(updates[:30], [zeros] * 30)
    untouched = start(zeros)
    assert_trees_equal(states[29].factor_in, untouched.factor_in)
    assert_trees_equal(states[29].factor_out, untouched.factor_out)
    assert states[29].refreshed == 30
    assert_finite((updates, states))
    assert np.all(updates[30] != 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_entry_stays_in_its_matrix(bad: float):
    g = normal((2, 6, 4), seed=0)
    poisoned = g.copy()
    poisoned[0, 1, 1] = bad
    updates, states = follow([g, poisoned, g], axes=STACK)
    clean, clean_states = follow([g, g, g], axes=STACK)
    for update, expected in zip(updates[1:], clean[1:], strict=True):
        assert np.isnan(update[0]).all()
        assert_trees_equal(update[1], expected[1])
    # The factors survive it, though the momentum does not.
    assert_trees_equal(states[-1].factor_in[0], states[0].factor_in[0])
    assert_trees_equal(states[-1].factor_in[1], clean_states[-1].factor_in[1])


def test_empty_none_and_masked_leaves_pass():
    params = {
        "n": None,
        "m": optax.MaskedNode(),
        "rows": jnp.zeros((0, 3)),
        "columns": jnp.zeros((3, 0)),
        "layers": jnp.zeros((0, 3, 4)),
    }
    (updates,), (after,) = follow([params], axes=STACK)
    assert_trees_equal(updates, params)
    assert after.factor_in["layers"].shape == (0, 1, 3, 3)
    assert_trees_equal(after.factor_in, start(params, axes=STACK).factor_in)


@pytest.mark.slow
def test_hyperparameters_change_without_compiling():
    tx = optax.inject_hyperparams(
        ox.scale_by_kron,
        static_args=("update_interval", "warmup_steps", "max_dim", "seed", "axes"),
        hyperparam_dtype=jnp.float32,
    )(axes=MATRIX, update_interval=4, warmup_steps=1)
    g = normal((6, 4), seed=0)
    update = jax.jit(tx.update)
    state = tx.init(g)
    _, slow = update(g, state)
    state.hyperparams["preconditioner_learning_rate"] = jnp.float32(0.5)
    _, fast = update(g, state)
    moved = [np.abs(s.inner_state.factor_in - np.eye(6)).max() for s in (slow, fast)]
    assert moved[1] > 3 * moved[0]
    assert update._cache_size() == 1
