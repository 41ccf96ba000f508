"""RMSProp's direction, centered and not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from tests.assertions import assert_finite, assert_trees_close, assert_trees_equal
from tests.problems import gradients, normal_tree
from tests.trajectories import updates_at

SHAPES = {"w": (3, 4), "b": (4,), "s": ()}
STEPS = 6
PARAMS = normal_tree(SHAPES, seed=0)
GRADS = jax.tree.map(lambda *g: jnp.stack(g), *gradients(SHAPES, steps=STEPS))


# By hand


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # v = 0.25, 1.1875
        ({}, [2.0, 2 / 1.1875**0.5]),
        # a = 0.25, 0.6875
        ({"centered": True}, [0.1875**-0.5, 2 / (1.1875 - 0.6875**2) ** 0.5]),
        ({"eps": 0.5}, [1.0, 2 / (1.1875**0.5 + 0.5)]),
        ({"eps": 0.0, "eps_root": 0.75}, [1.0, 2 / 1.9375**0.5]),
    ],
    ids=str,
)
def test_two_steps_by_hand(arguments, expected):
    tx = ox.scale_by_rmsprop(0.75, **arguments)
    updates = updates_at(tx, jnp.ones(1), jnp.asarray([[1.0], [2.0]]))
    # A root and a quotient in float32; eps adds up to 1e-8.
    np.testing.assert_allclose(np.ravel(updates), expected, rtol=5e-7)


# Reductions


@pytest.mark.parametrize("b2", [0.5, 0.99])
def test_it_is_adam_without_momentum_and_bias_correction(b2: float):
    updates = updates_at(ox.scale_by_rmsprop(b2, eps=1e-30), PARAMS, GRADS)
    adam = updates_at(ox.scale_by_adam(0.0, b2, eps=1e-30), PARAMS, GRADS)
    correction = np.sqrt(1 - b2 ** np.arange(1, STEPS + 1))
    expected = jax.tree.map(
        lambda u: u / correction.reshape(-1, *[1] * (u.ndim - 1)).astype(np.float32),
        adam,
    )
    # Float32 roundings of two roots and two quotients.
    assert_trees_close(updates, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("centered", "theirs"),
    [
        (False, optax.scale_by_rms(0.9, 1e-8)),
        (True, optax.scale_by_stddev(0.9, 1e-8)),
    ],
)
def test_optax(centered: bool, theirs):
    ours = ox.scale_by_rmsprop(0.9, eps=0.0, eps_root=1e-8, centered=centered)
    # Float32 roundings; the difference of two squares of the first step, a tenth of
    # the larger, takes ten of them.
    assert_trees_close(
        updates_at(ours, PARAMS, GRADS), updates_at(theirs, PARAMS, GRADS), rtol=5e-6
    )


# Invariances


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("power", [-35, 45])
def test_scale_does_not_matter(centered: bool, power: int):
    tx = ox.scale_by_rmsprop(0.9, eps=1e-30, centered=centered)
    scaled = jax.tree.map(lambda g: g * 2.0**power, GRADS)
    # A power of two scales every rounding; only fusion may differ.
    assert_trees_close(
        updates_at(tx, PARAMS, scaled), updates_at(tx, PARAMS, GRADS), rtol=1e-6
    )


@pytest.mark.parametrize("centered", [False, True])
def test_complex_parameters_share_one_denominator(centered: bool):
    # A complex number of constant phase behaves like its magnitude.
    tx = ox.scale_by_rmsprop(centered=centered)
    phase = np.exp(1j * np.linspace(0, 2, 4)).astype(np.complex64)
    params = PARAMS["b"].astype(jnp.complex64)
    assert tx.init(params).nu.dtype == jnp.float32
    updates = updates_at(tx, params, GRADS["b"] * phase)
    expected = updates_at(tx, PARAMS["b"], GRADS["b"]) * phase
    # Float32 roundings, a few more than for real numbers.
    assert_trees_close(updates, expected, rtol=2e-6)


# The variance


def test_steady_gradients_have_steps_bounded_by_eps_alone():
    # v and |a|² are 1 - 2^-n and its square, both 1 after enough halvings.
    tx = ox.scale_by_rmsprop(0.5, eps=1e-3, centered=True)
    updates = updates_at(tx, jnp.ones(()), jnp.ones(40))
    power = 0.5 ** np.arange(1, 21)
    expected = 1 / (np.sqrt(power * (1 - power)) + 1e-3)
    # The difference of two numbers close to 1 keeps 2^-24 / 2^-n of its digits.
    np.testing.assert_allclose(updates[:10], expected[:10], rtol=1e-4)
    # One quotient; the variance itself is exactly 0.
    np.testing.assert_allclose(updates[30:], np.full(10, 1000.0), rtol=2e-7)
    assert (np.diff(updates) >= 0).all()


def test_a_variance_that_rounds_below_zero_counts_as_zero():
    tx = ox.scale_by_rmsprop(0.99, eps=1e-4, centered=True)
    g = jnp.linspace(0.1, 1.0, 64)
    # Steady for a long time, with a mean square that lost its last digit.
    start = ox.ScaleByRmspropState(mu=g, nu=jnp.square(g) * (1 - 2e-7))
    updates, state = tx.update(g, start)
    # The test would show nothing if the rounded difference were never negative.
    assert (state.nu - jnp.square(state.mu)).min() < 0
    assert_finite(updates)
    # Float32 roundings of the quotient.
    assert (updates <= g / 1e-4 * (1 + 1e-6)).all()


@pytest.mark.parametrize("centered", [False, True])
def test_huge_gradients_stop_and_are_never_nan(centered: bool):
    # The square overflows; centered, infinity minus infinity would be NaN.
    tx = ox.scale_by_rmsprop(centered=centered)
    grads = jnp.stack([jnp.ones(2), jnp.asarray([1e30, 1.0]), jnp.ones(2)])
    updates = updates_at(tx, jnp.ones(2), grads)
    np.testing.assert_array_equal(updates[1:, 0], [0.0, 0.0])
    assert_finite(updates)
    assert np.abs(updates[:, 1]).min() > 0.5


def test_bad_entries_stay_visible_and_where_they_are():
    grads = GRADS["w"].at[2, 0, 0].set(jnp.nan)
    for centered in (False, True):
        tx = ox.scale_by_rmsprop(centered=centered)
        updates = np.asarray(updates_at(tx, PARAMS["w"], grads))
        assert np.isnan(updates[2:, 0, 0]).all()
        assert np.isnan(updates).sum() == STEPS - 2


# The state


def test_the_mean_is_kept_only_where_it_is_used():
    assert ox.scale_by_rmsprop().init(PARAMS).mu is None
    tx = ox.scale_by_rmsprop(0.75, centered=True, mu_dtype="bfloat16")
    state = tx.init(PARAMS["b"])
    assert (state.mu.dtype, state.nu.dtype) == (jnp.bfloat16, jnp.float32)
    _, state = tx.update(jnp.full(4, 2.0), state)
    # Powers of two are exact.
    np.testing.assert_array_equal(state.mu.astype(jnp.float32), np.full(4, 0.5))
    np.testing.assert_array_equal(state.nu, np.ones(4))


# Errors


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"b2": 1.0}, r"b2=1.0 is not allowed; .* \[0, 1\)"),
        (TypeError, {"b2": "0.9"}, "b2='0.9' is not allowed"),
        (ValueError, {"eps": 0.0}, "eps=0.0 is not allowed; eps or eps_root must be"),
        (ValueError, {"eps_root": -1.0}, "eps_root=-1.0 is not allowed; .* >= 0"),
        (TypeError, {"centered": 1}, "centered=1 is not allowed; .* True or False"),
        (TypeError, {"mu_dtype": "int8"}, "mu_dtype='int8' .* floating-point"),
        (TypeError, {"nu_dtype": None}, "nu_dtype=None is not allowed"),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message: str):
    with pytest.raises(error, match=f"scale_by_rmsprop: {message}"):
        ox.scale_by_rmsprop(**arguments)


@pytest.mark.parametrize("centered", [False, True])
def test_wrong_parameters_are_refused(centered: bool):
    message = "scale_by_rmsprop: parameter 'n' of dtype int32 is not allowed"
    with pytest.raises(TypeError, match=message):
        ox.scale_by_rmsprop(centered=centered).init({"n": jnp.ones(2, jnp.int32)})


def test_zero_gradients_give_zero():
    zeros = jax.tree.map(jnp.zeros_like, GRADS)
    for arguments in ({"centered": True}, {"eps": 0.0, "eps_root": 1e-8}):
        tx = ox.scale_by_rmsprop(**arguments)
        assert_trees_equal(updates_at(tx, PARAMS, zeros), zeros)
