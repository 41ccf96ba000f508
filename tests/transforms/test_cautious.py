"""Which coordinates a cautious direction keeps, and how long it stays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from optaxplus import MatrixAxes
from tests.assertions import assert_trees_close, assert_trees_equal
from tests.problems import STACKED_MATRIX, gradients, normal_tree
from tests.trajectories import run

SHAPES = {"w": (3, 4), "b": (4,), "s": ()}
PARAMS = normal_tree(SHAPES, seed=0)
TREES = gradients(SHAPES, steps=4)


def direction(u) -> optax.GradientTransformation:
    """Steps along `u` whatever the gradient."""
    return optax.stateless(lambda updates, params: u)


def filtered(u, g, **arguments):
    tx = ox.cautious(direction(u), **arguments)
    return tx.update(g, tx.init(g))[0]


# What is kept


def test_directions_that_agree_pass():
    # The fraction is exactly 1.
    updates, _ = run(ox.cautious(ox.scale_by_sign()), PARAMS, TREES)
    expected, _ = run(ox.scale_by_sign(), PARAMS, TREES)
    assert_trees_equal(updates, expected)


def test_where_nothing_agrees_there_is_no_step():
    updates, _ = run(ox.cautious(optax.scale(-1.0)), PARAMS, TREES)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    assert_trees_equal(updates, [zeros] * len(TREES))


def test_kept_coordinates_by_hand():
    # A zero on either side agrees with nothing: one of four is kept.
    updates = filtered(jnp.asarray([3.0, -2.0, 0.0, 5.0]), jnp.asarray([1.0, 1, 1, 0]))
    np.testing.assert_array_equal(updates, [12.0, 0.0, 0.0, 0.0])


@pytest.mark.parametrize("kept", [1, 2, 3, 8])
def test_mean_length_is_kept(kept: int):
    # Of steps of equal size.
    signs = jnp.where(jnp.arange(8) < kept, 1.0, -1.0)
    updates = filtered(0.3 * signs, jnp.ones(8))
    # A quotient and a sum in float32.
    np.testing.assert_allclose(jnp.abs(updates).mean(), 0.3, rtol=5e-7)
    np.testing.assert_array_equal(updates != 0, signs > 0)


@pytest.mark.parametrize(("min_fraction", "growth"), [(0.5, 2.0), (1.0, 1.0)])
def test_least_divisor(min_fraction: float, growth: float):
    u = jnp.asarray([3.0, -2.0, -1.0, -4.0])
    updates = filtered(u, jnp.ones(4), min_fraction=min_fraction)
    np.testing.assert_array_equal(updates, [3.0 * growth, 0, 0, 0])


def test_with_adam_the_mean_decides():
    updates, state = run(ox.cautious(ox.scale_by_adam()), PARAMS, TREES)
    (adam, inner) = run(ox.scale_by_adam(), PARAMS, TREES)
    assert_trees_equal(state.inner_state, inner)
    agrees = jax.tree.map(lambda m, g: np.asarray(m * g > 0), inner.mu, TREES[-1])
    # The test would show little if everything agreed.
    assert 0.1 < agrees["w"].mean() < 0.9
    expected = jax.tree.map(
        lambda u, keep: np.where(keep, u / max(keep.mean(), 1e-3), 0.0),
        adam[-1],
        agrees,
    )
    # One float32 quotient.
    assert_trees_close(updates[-1], expected, rtol=2e-7)


def test_products_that_underflow_still_have_a_sign():
    u = jnp.asarray([1e-30, -1e-30, 1e30])
    updates = filtered(u, jnp.asarray([1e-30, 1e-30, 1e30]))
    # Two of three; float32 roundings.
    np.testing.assert_allclose(updates, [1.5e-30, 0.0, 1.5e30], rtol=3e-7)


def test_complex_numbers_agree_within_a_right_angle():
    u = jnp.asarray([1 + 1j, 1 + 1j, -1j, 2.0], jnp.complex64)
    g = jnp.asarray([2.0, -3j, -1 - 1j, 1j], jnp.complex64)
    # Angles of 45, 135, 45 and 90 degrees.
    np.testing.assert_array_equal(filtered(u, g), [2 + 2j, 0, -2j, 0])


# Blocks


def test_fraction_of_every_slice():
    g = jnp.ones((2, 2, 4))
    u = jnp.stack([jnp.ones((2, 4)), jnp.asarray([[1.0, 1, -1, -1], [-1, -1, -1, -1]])])
    updates = filtered(u, g, axes=STACKED_MATRIX)
    expected = [[[1] * 4] * 2, [[4, 4, 0, 0], [0, 0, 0, 0]]]
    np.testing.assert_array_equal(updates, expected)


def test_fraction_of_every_split():
    u = jnp.asarray([[1.0, -1.0, 1.0], [1.0, -1.0, -1.0]])
    axes = MatrixAxes((0,), (1,), splits=(1, 2))
    updates = filtered(u, jnp.ones((2, 3)), axes=axes)
    np.testing.assert_array_equal(updates, [[1, 0, 4], [1, 0, 0]])


# Limits, dtypes and state


def test_nan_stays_visible():
    u = jnp.asarray([jnp.nan, 1.0, -1.0, jnp.inf])
    updates = filtered(u, jnp.ones(4))
    # Two agree, NaN is no agreement.
    np.testing.assert_array_equal(updates, [jnp.nan, 2.0, 0.0, jnp.inf])


def test_updates_are_float32():
    g = jnp.asarray([1.0, -1.0], jnp.bfloat16)
    updates = filtered(g, jnp.ones(2, jnp.bfloat16))
    assert updates.dtype == jnp.float32
    np.testing.assert_array_equal(updates, [2.0, 0.0])


def test_extra_arguments_reach_the_inner_transformation():
    def update(updates, state, params=None, *, value, **extra_args):
        return jax.tree.map(lambda g: g * value * params, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = ox.cautious(inner)
    g = jnp.ones(2)
    updates, _ = tx.update(g, tx.init(g), jnp.full(2, 3.0), value=2.0, other=None)
    np.testing.assert_array_equal(updates, [6.0, 6.0])


# Errors


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (TypeError, {"inner": ox.scale_by_adam}, "inner=<function .*GradientTransf"),
        (TypeError, {"inner": None}, "inner=None is not allowed"),
        (ValueError, {"min_fraction": 0.0}, "min_fraction=0.0 is not allowed; .* > 0"),
        (ValueError, {"min_fraction": 2.0}, "min_fraction=2.0 is not .* at most 1"),
        (ValueError, {"min_fraction": float("nan")}, "min_fraction=nan is not"),
        (TypeError, {"min_fraction": None}, "min_fraction=None is not allowed"),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message: str):
    with pytest.raises(error, match=f"cautious: {message}"):
        ox.cautious(**{"inner": ox.scale_by_adam(), **arguments})


def test_axes_that_do_not_fit_are_refused():
    tx = ox.cautious(ox.scale_by_sign(), axes=STACKED_MATRIX)
    with pytest.raises(ValueError, match=r"cautious: parameter 'b': .* axis -2 is out"):
        tx.init(PARAMS)
