"""Dion: its state, degenerate matrices, and what it refuses."""

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
from tests.trajectories import updates_at
from tests.transforms.dion_runs import (
    LOW_RANK,
    STACK,
    first,
    follow,
    gradients,
    normal,
    orthonormal,
    start,
)

# State


def test_basis_depends_on_seed_and_shape_alone():
    alone = start(np.ones((8, 12), np.float32)).basis
    np.testing.assert_allclose(np.linalg.norm(alone, axis=0), 1.0, rtol=1e-6)
    tree = {"a": jnp.ones((8, 12)), "b": {"c": jnp.ones((2, 12, 8), "bfloat16")}}
    bases = start(tree, axes=STACK).basis
    # Roundings of fused operations.
    for basis in (bases["a"], *bases["b"]["c"]):
        assert_trees_close(basis, alone, rtol=1e-6)
    assert np.abs(start(alone, seed=1).basis - start(alone).basis).max() > 0.1


def test_scan_is_step_by_step():
    shapes = {"w": (8, 6), "stack": (2, 4, 5)}
    grads = gradients(shapes, steps=4)
    arguments = {"axes": STACK, **LOW_RANK}
    updates, _ = follow(grads, **arguments)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *grads)
    scanned = updates_at(ox.scale_by_dion(**arguments), grads[0], stacked)
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *updates)
    # Roundings of fused operations, amplified by the condition of B·Q.
    assert_trees_close(scanned, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_gradients_are_computed_in_float32(dtype: str):
    grads = [g.astype(jnp.dtype(dtype)) for g in gradients((8, 12), steps=2)]
    updates, states = follow(grads)
    wide, wide_states = follow([g.astype("float32") for g in grads])
    assert_trees_equal(updates, wide)
    assert_trees_equal(states, wide_states)
    assert {x.dtype.name for x in (updates[0], *states[0])} == {"float32"}


def test_bfloat16_momentum():
    grads = gradients((8, 12), steps=3)
    updates, states = follow(grads, mu_dtype="bfloat16")
    assert (states[0].mu.dtype, states[0].basis.dtype) == ("bfloat16", "float32")
    exact, exact_states = follow(grads)
    # The first update comes before the first rounding.
    assert_trees_equal(updates[0], exact[0])
    # Two roundings of 2^-9 and one of the comparison.
    assert_trees_close(
        states[-1].mu.astype("float32"), exact_states[-1].mu, rtol=3 * 2**-9
    )


@pytest.mark.parametrize(
    ("axes", "spec", "expected"),
    [
        (MatrixAxes((1,), (2,)), P("x", "y", None), P("x", "y", None)),
        (MatrixAxes((2,), (1,)), P(None, ("x", "y"), None), P(None, ("x", "y"), None)),
        (MatrixAxes((1,), (2,)), P("x", None, "y"), P("x", None, None)),
    ],
)
def test_basis_is_placed_as_batch_and_shorter_side(axes: MatrixAxes, spec, expected):
    mesh = jax.make_mesh((2, 4), ("x", "y"), (AxisType.Auto,) * 2)
    tx = ox.scale_by_dion(axes=axes, **LOW_RANK)
    g = normal((2, 8, 16), seed=0)
    sharded = jax.device_put(g, NamedSharding(mesh, spec))
    state = tx.init(sharded)
    update, after = jax.jit(tx.update)(sharded, state)
    for basis in (state.basis, after.basis):
        assert basis.sharding.is_equivalent_to(NamedSharding(mesh, expected), 3)
    # Sums over devices in another order, amplified by the condition of B·Q.
    assert_trees_close(update, first(g, axes=axes, **LOW_RANK)[0], rtol=1e-5)


# Limits


def test_zero_momentum_gives_zero_and_keeps_the_basis():
    g = normal((8, 12), seed=0)
    zeros = np.zeros_like(g)
    untouched = start(zeros)
    (still, again, moved), states = follow([zeros, zeros, g])
    assert_trees_equal((still, again), (zeros, zeros))
    assert_trees_equal(states[1], untouched)
    assert_trees_equal(moved, first(g)[0])


def test_momentum_outlives_the_gradient():
    g = normal((6, 4), seed=0)
    updates, states = follow([g, *[np.zeros_like(g)] * 20])
    # At full rank M shrinks and keeps its directions.
    np.testing.assert_allclose(states[-1].mu, g * 0.95**21, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.sum(updates[-1] ** 2), 4, rtol=1e-5)


@pytest.mark.parametrize(("shape", "rank"), [((6, 4), 1), ((6, 4), 3), ((24, 24), 8)])
def test_missing_directions_stay_out(shape, rank: int):
    # Many, because a random basis is at times nearly blind to one direction.
    left, right = (
        orthonormal((200, side, rank), seed=seed) for seed, side in enumerate(shape)
    )
    values = np.float32(np.geomspace(1.0, 1e-2, rank))
    g = (left * values) @ np.swapaxes(right, 1, 2)
    untouched = start(g, axes=STACK)
    updates, states = follow([g] * 4, axes=STACK)
    for update in updates:
        found = np.linalg.svd(update, compute_uv=False)
        np.testing.assert_allclose(np.sum(found**2, axis=-1), rank, rtol=1e-5)
        assert found[:, rank:].max() < 1e-5
    # Rounding tilts directions that the random basis nearly misses; not for long.
    outside = updates[-1] - left @ (np.swapaxes(left, 1, 2) @ updates[-1])
    assert np.abs(outside).max() < 1e-4
    # Columns of the basis without a direction keep their random start.
    kept = np.all(states[-1].basis == untouched.basis, axis=-2)
    np.testing.assert_array_equal(kept.sum(axis=-1), min(shape) - rank)
    assert_finite(states)


def test_directions_that_appear_later_are_found():
    left, right = np.eye(6, 3, dtype=np.float32), np.eye(4, 3, dtype=np.float32)
    early = np.outer(left[:, 0], right[:, 0])
    late = left[:, 1:] @ right[:, 1:].T
    updates, _ = follow([early] * 5 + [late] * 100, b1=0.5)
    # By then the early direction has decayed to 2^-100, which is nothing beside 1.
    np.testing.assert_allclose(updates[4], early, atol=1e-5)
    np.testing.assert_allclose(updates[-1], late, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1)])
def test_single_rows_are_normalised(shape):
    grads = gradients(shape, steps=3)
    updates, states = follow(grads, b1=0.9, **LOW_RANK)
    before = states[1].mu + grads[2]
    np.testing.assert_allclose(updates[2], before / np.linalg.norm(before), rtol=1e-5)
    np.testing.assert_allclose(states[2].mu, 0.9 * before, rtol=1e-5)


def test_empty_none_and_masked_leaves_pass():
    params = {
        "n": None,
        "m": optax.MaskedNode(),
        "rows": jnp.zeros((0, 3)),
        "columns": jnp.zeros((3, 0)),
        "layers": jnp.zeros((0, 3, 4)),
    }
    state = start(params, axes=STACK)
    assert state.basis["rows"].shape == state.basis["columns"].shape == (0, 0)
    assert state.basis["layers"].shape == (0, 3, 3)
    (updates,), (after,) = follow([params], axes=STACK)
    assert_trees_equal(updates, params)
    assert_trees_equal(after, state)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 4, 3)])
def test_one_bad_entry_makes_its_matrix_nan(bad: float, shape):
    g = normal(shape, seed=0)
    poisoned = g.copy()
    poisoned[0, 1, 1] = bad
    updates, states = follow([poisoned, g], axes=STACK)
    for leaf in (*updates, *states[0], *states[1]):
        assert np.isnan(leaf[0]).all()
        assert np.isfinite(leaf[1]).all()


def test_masking_vectors_away():
    params = {"d": {"kernel": normal((8, 12), seed=0), "bias": np.ones(3)}}
    tx = optax.masked(ox.scale_by_dion(), {"d": {"kernel": True, "bias": False}})
    updates, _ = jax.jit(lambda g: tx.update(g, tx.init(g)))(params)
    np.testing.assert_array_equal(updates["d"]["bias"], params["d"]["bias"])
    expected, _ = first(params["d"]["kernel"])
    # Roundings of fused operations, amplified by the condition of B·Q.
    assert_trees_close(updates["d"]["kernel"], expected, rtol=1e-5)


# Errors


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"b1": 1.0}, r"b1=1.0 is not allowed; .* \[0, 1\)"),
        (TypeError, {"b1": "0.9"}, "b1='0.9' is not allowed"),
        (ValueError, {"rank_fraction": 0.0}, r"rank_fraction=0.0 is .* in \(0, 1\]"),
        (ValueError, {"rank_fraction": 1.5}, "rank_fraction=1.5 is not allowed"),
        (TypeError, {"rank_fraction": True}, "rank_fraction=True is not allowed"),
        (
            TypeError,
            {"rank_fraction": jnp.asarray(0.5)},
            r"rank_fraction shapes .* number, .* static_args=\('rank_fraction',\)",
        ),
        (ValueError, {"rank_multiple": 0}, "rank_multiple=0 is .* integer >= 1"),
        (TypeError, {"rank_multiple": 8.0}, "rank_multiple=8.0 is not allowed"),
        (ValueError, {"power_iterations": 0}, "power_iterations=0 is .* >= 1"),
        (
            TypeError,
            {"power_iterations": jnp.asarray(2)},
            r"power_iterations shapes .* static_args=\('power_iterations',\)",
        ),
        (ValueError, {"seed": -1}, "seed=-1 is not allowed; .* integer >= 0"),
        (TypeError, {"seed": 0.5}, "seed=0.5 is not allowed"),
        (ValueError, {"eps": -1e-8}, "eps=-1e-08 is not allowed; .* >= 0"),
        (TypeError, {"eps": None}, "eps=None is not allowed"),
        (TypeError, {"mu_dtype": "int8"}, "mu_dtype='int8' is not allowed"),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message: str):
    with pytest.raises(error, match="scale_by_dion: " + message):
        ox.scale_by_dion(**arguments)


@pytest.mark.parametrize("dtype", ["int32", "complex64"])
def test_wrong_parameters_are_refused(dtype: str):
    message = f"scale_by_dion: parameter 'w' of dtype {dtype} .* real floating point"
    with pytest.raises(TypeError, match=message):
        ox.scale_by_dion().init({"w": jnp.ones((2, 3), dtype)})


@pytest.mark.parametrize(
    ("params", "axes"),
    [
        ({"d": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}, None),
        ({"d": {"bias": jnp.ones(3)}}, MatrixAxes((), (0,))),
    ],
)
def test_vectors_are_refused(params, axes):
    message = (
        r"scale_by_dion: parameter 'd/bias' of shape \(3,\) is not allowed; it is a "
        r"vector. Give it the role 'vector'"
    )
    tx = ox.scale_by_dion(axes=axes)
    with pytest.raises(ValueError, match=message):
        tx.init(params)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (MatrixAxes((0,), (5,)), "parameter 'w': .* axis 5 is out of range"),
        (MatrixAxes((0,), (-2,)), "parameter 'w': .* names an axis twice"),
        (MatrixAxes((0,), (1,), (2, 2)), "parameter 'w': .* splits add up to 4"),
    ],
)
def test_axes_that_do_not_fit_are_refused(axes, message: str):
    with pytest.raises(ValueError, match="scale_by_dion: " + message):
        ox.scale_by_dion(axes=axes).init({"w": jnp.ones((2, 3))})


def test_undecided_parameters_are_refused():
    with pytest.raises(ValueError, match=r"'kernel' of shape \(2, 3, 4\)"):
        ox.scale_by_dion().init({"kernel": jnp.ones((2, 3, 4))})
