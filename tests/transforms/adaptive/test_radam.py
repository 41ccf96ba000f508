"""RAdam's direction: when it is rectified, by how much, and what it tends to."""

from decimal import Decimal, localcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaxplus as ox
from optaxplus.transforms.adaptive.radam import _average_length
from tests.assertions import assert_finite, assert_trees_close
from tests.problems import gradients, normal_tree
from tests.trajectories import updates_at

SHAPES = {"w": (3, 4), "b": (4,), "s": ()}
STEPS = 6
PARAMS = normal_tree(SHAPES, seed=0)
GRADS = jax.tree.map(lambda *g: jnp.stack(g), *gradients(SHAPES, steps=STEPS))


def average_length(b2: float, step: int) -> float:
    """ρ_t from its definition, in sixty digits."""
    with localcontext() as context:
        context.prec = 60
        b2 = Decimal(b2)
        power = b2**step if b2 else Decimal(0)
        return float(2 / (1 - b2) - 1 - 2 * step * power / (1 - power))


def rectification(rho: float, b2: float) -> float:
    rho_inf = 2 / (1 - b2) - 1
    square = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    return square**0.5


def mean_of(grads, b1: float = 0.9):
    return updates_at(ox.scale_by_ema(b1, debias=True), PARAMS, grads)


# The length of the average

DECAY_RATES = [0.0, 0.1, 0.5, 0.9, 0.95, 0.99, 0.999, 0.9999, 1 - 2.0**-20]
COUNTS = [1, 2, 3, 5, 6, 7, 10, 30, 100, 500, 1000, 10_000, 1_000_000]


@pytest.mark.parametrize("b2", DECAY_RATES)
def test_length_is_that_of_the_definition(b2: float):
    lengths = _average_length(b2, jnp.asarray(COUNTS, jnp.int32))
    assert lengths.dtype == jnp.float32
    # A handful of float32 roundings. The definition itself, in float32, is off by 1e-4
    # for 0.999 and by more beyond.
    np.testing.assert_allclose(
        lengths, [average_length(b2, t) for t in COUNTS], rtol=1e-6
    )


def test_length_of_a_traced_decay_rate():
    rates = np.asarray([*DECAY_RATES, 0.85, 0.899, 0.901], np.float32)
    compute = jax.jit(jax.vmap(_average_length, in_axes=(0, None)))
    lengths = compute(rates, jnp.asarray(COUNTS, jnp.int32))
    expected = [[average_length(float(b2), t) for t in COUNTS] for b2 in rates]
    # Float32 roundings; a series that stops at the third power of 1 - b2 errs by less
    # than 1e-5 where it hands over, at 0.1.
    np.testing.assert_allclose(lengths, expected, rtol=1e-5)


def test_length_in_float64():
    with jax.enable_x64(True):
        lengths = _average_length(0.999, jnp.asarray(COUNTS))
        assert lengths.dtype == jnp.float64
    # Cancellation in 2/(1 - b2) - 2/a takes three of sixteen digits, the series of
    # small x some more.
    np.testing.assert_allclose(
        lengths, [average_length(0.999, t) for t in COUNTS], rtol=1e-8
    )


# Steps that are not rectified


def test_first_five_steps_are_the_corrected_mean():
    assert average_length(0.999, 5) < 5 < average_length(0.999, 6)
    updates = updates_at(ox.scale_by_radam(), PARAMS, GRADS)
    # A few float32 roundings.
    assert_trees_close(
        jax.tree.map(lambda u: u[:5], updates),
        jax.tree.map(lambda u: u[:5], mean_of(GRADS)),
        rtol=1e-6,
    )


def test_sixth_step_by_hand():
    updates = updates_at(ox.scale_by_radam(), PARAMS, GRADS)["w"]
    grads = np.asarray(GRADS["w"], np.float64)
    weights = 0.9 ** np.arange(5, -1, -1) * 0.1 / (1 - 0.9**6)
    squares = 0.999 ** np.arange(5, -1, -1) * 0.001 / (1 - 0.999**6)
    mean = np.tensordot(weights, grads, 1)
    root = np.sqrt(np.tensordot(squares, grads**2, 1))
    r = rectification(average_length(0.999, 6), 0.999)
    assert 0.01 < r < 0.1
    # Float32 roundings, which ρ - 4 = 2 amplifies little. eps, added before the bias
    # correction of sqrt(0.006), weighs 1e-7 beside a root of 0.1 or more.
    np.testing.assert_allclose(
        updates[5], r * mean / root, rtol=0, atol=2e-6 * np.abs(updates[5]).max()
    )


def test_epsilon_is_added_before_the_bias_correction():
    tx = ox.scale_by_radam(0.0, 0.999, eps=0.5)
    state = ox.ScaleByRadamState(jnp.int32(9), jnp.zeros(()), jnp.zeros(()))
    updates, _ = tx.update(jnp.float32(2.0), state)
    r = rectification(average_length(0.999, 10), 0.999)
    expected = r * 2 * (1 - 0.999**10) ** 0.5 / (0.004**0.5 + 0.5)
    # Float32 roundings.
    np.testing.assert_allclose(updates, expected, rtol=2e-6)


def test_short_averages_are_never_trusted():
    # ρ_∞ is 3 with b2 = 0.5, and its rectification the root of a negative number.
    constant = jax.tree.map(lambda g: jnp.tile(g, (5, *[1] * (g.ndim - 1))), GRADS)
    updates = updates_at(ox.scale_by_radam(b2=0.5), PARAMS, constant)
    assert_finite(updates)
    # A few float32 roundings.
    assert_trees_close(updates, mean_of(constant), rtol=1e-6)


@pytest.mark.parametrize("b2", [0.0, 1 / 3, 0.6, 2 / 3])
def test_rectifications_that_divide_by_zero_are_not_used(b2: float):
    # ρ_∞ is 1, 2, 4 and 5: the definition of r has a zero or its root no value.
    grads = jax.tree.map(lambda g: jnp.tile(g, (5, *[1] * (g.ndim - 1))), GRADS)
    updates = updates_at(ox.scale_by_radam(b2=b2), PARAMS, grads)
    # A few float32 roundings.
    assert_trees_close(updates, mean_of(grads), rtol=1e-6)


def test_threshold():
    never = updates_at(ox.scale_by_radam(threshold=1e9), PARAMS["w"], GRADS["w"])
    low, four = (
        np.asarray(updates_at(ox.scale_by_radam(threshold=x), PARAMS["w"], GRADS["w"]))
        for x in (1.0, 4.0)
    )
    # A few float32 roundings.
    assert_trees_close(never, mean_of(GRADS)["w"], rtol=1e-6)
    # Below 4 nothing can be rectified; the fifth step is the first with ρ > 4.
    np.testing.assert_array_equal(low, four)
    assert average_length(0.999, 4) < 4 < average_length(0.999, 5)
    assert_trees_close(four[:4], never[:4], rtol=1e-6)
    assert np.abs(four[4]).max() < 0.1 * np.abs(never[4]).max()


# What it tends to


@pytest.mark.parametrize(("count", "ratio"), [(8, 0.1), (999, 0.6), (50_000, 1.0)])
def test_ratio_to_adam_grows_to_one(count: int, ratio: float):
    g = jnp.asarray([0.5, -2.0])
    moments = jnp.int32(count), jnp.asarray([0.3, 1.0]), jnp.asarray([0.7, 2.0])
    ours, _ = ox.scale_by_radam(eps=1e-30).update(g, ox.ScaleByRadamState(*moments))
    adam = ox.scale_by_adam(eps=1e-30)
    theirs, _ = adam.update(g, ox.ScaleByAdamState(*moments, None))
    expected = rectification(average_length(0.999, count + 1), 0.999)
    # Float32 roundings.
    np.testing.assert_allclose(ours / theirs, [expected] * 2, rtol=3e-6)
    # That the definition does grow.
    np.testing.assert_allclose(expected, ratio, atol=0.06)


def test_traced_decay_rates_and_threshold():
    tx = ox.scale_by_radam(
        jnp.float32(0.9), jnp.float32(0.99), threshold=jnp.float32(5)
    )
    # As many roundings again: 1 - 0.99 is taken in float32.
    assert_trees_close(
        updates_at(tx, PARAMS, GRADS),
        updates_at(ox.scale_by_radam(0.9, 0.99), PARAMS, GRADS),
        rtol=2e-5,
    )


# Limits


def test_huge_gradients_of_rectified_steps_are_finite():
    tx = ox.scale_by_radam()
    state = tx.init(jnp.ones(3))._replace(count=jnp.int32(100))
    updates, state = tx.update(jnp.asarray([1e30, 1e19, 1.0]), state)
    assert_finite(updates)
    np.testing.assert_array_equal(updates[0], 0.0)
    assert np.abs(updates[1:]).min() > 0
    updates, _ = tx.update(jnp.ones(3), state)
    assert_finite(updates)
    np.testing.assert_array_equal(updates[0], 0.0)


def test_saturated_count():
    largest = jnp.int32(2**31 - 1)
    state = ox.scale_by_radam().init(jnp.ones(2))._replace(count=largest)
    updates, state = ox.scale_by_radam().update(jnp.ones(2), state)
    # 0.1 / sqrt(0.001); a few float32 roundings.
    np.testing.assert_allclose(updates, [0.1 / 0.001**0.5] * 2, rtol=1e-6)
    assert state.count == largest


# Errors


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"b1": 1.0}, r"b1=1.0 is not allowed; .* \[0, 1\)"),
        (ValueError, {"b2": 2}, r"b2=2 is not allowed; .* \[0, 1\)"),
        (ValueError, {"eps": 0.0}, "eps=0.0 is not allowed; .* > 0"),
        (ValueError, {"threshold": 0}, "threshold=0 is not allowed; .* > 0"),
        (TypeError, {"threshold": "5"}, "threshold='5' is not allowed"),
        (TypeError, {"b2": None}, "b2=None is not allowed"),
        (TypeError, {"mu_dtype": "bool"}, "mu_dtype='bool' .* floating-point"),
        (TypeError, {"nu_dtype": "complex64"}, "nu_dtype='complex64' is not allowed"),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message: str):
    with pytest.raises(error, match=f"scale_by_radam: {message}"):
        ox.scale_by_radam(**arguments)


def test_wrong_parameters_are_refused():
    message = "scale_by_radam: parameter 'n' of dtype int32 is not allowed"
    with pytest.raises(TypeError, match=message):
        ox.scale_by_radam().init({"n": jnp.ones(2, jnp.int32)})
