"""NAdam's direction: its momentum schedule by hand and what it reduces to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaxplus as ox
from tests.assertions import assert_finite, assert_trees_close
from tests.problems import gradients, normal_tree
from tests.trajectories import run, updates_at

SHAPES = {"w": (3, 4), "b": (4,), "s": ()}
STEPS = 6
PARAMS = normal_tree(SHAPES, seed=0)
TREES = gradients(SHAPES, steps=STEPS)
GRADS = jax.tree.map(lambda *g: jnp.stack(g), *TREES)


def momentum(step: int, b1: float = 0.9, decay: float = 4e-3) -> float:
    return b1 * (1 - 0.5 * 0.96 ** (step * decay))


# By hand


@pytest.mark.parametrize("decay", [0.0, 4e-3, 5.0])
def test_first_step_by_hand(decay: float):
    now, ahead = momentum(1, decay=decay), momentum(2, decay=decay)
    # m̂ is a tenth of g, and the mean square that of g.
    expected = 1 + ahead / (1 - now * ahead) * 0.1
    tx = ox.scale_by_nadam(momentum_decay=decay, eps=1e-30)
    first = jax.tree.map(lambda g: g[:1], GRADS)
    # Float32 roundings of a dozen operations.
    assert_trees_close(
        updates_at(tx, PARAMS, first),
        jax.tree.map(lambda g: expected * jnp.sign(g), first),
        rtol=1e-6,
    )


def test_second_step_by_hand():
    tx = ox.scale_by_nadam(0.5, 0.75, momentum_decay=0.0, eps=1e-30)
    updates = updates_at(tx, jnp.ones(()), jnp.asarray([1.0, 2.0]))
    # Momentum 1/4 throughout; m = 1/2, 5/4; v = 1/4, 19/16, corrected by 7/16.
    m, v_hat = 1.25, 19 / 7
    expected = (0.75 / (1 - 1 / 16) * 2 + 0.25 / (1 - 1 / 64) * m) / v_hat**0.5
    # Float32 roundings of a dozen operations.
    np.testing.assert_allclose(updates[1], expected, rtol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 4e-3, 100.0])
def test_product_of_the_momenta(decay: float):
    tx = ox.scale_by_nadam(momentum_decay=decay)
    state = tx.init(PARAMS)
    np.testing.assert_array_equal(state.mu_product, np.float32(1))
    product = 1.0
    for t, g in enumerate(TREES, start=1):
        _, state = tx.update(g, state)
        product *= momentum(t, decay=decay)
        assert state.mu_product.dtype == jnp.float32
        # Two roundings a step.
        np.testing.assert_allclose(state.mu_product, product, rtol=1e-6)


def test_without_warmup_the_momentum_stays_at_half():
    _, state = run(ox.scale_by_nadam(momentum_decay=0.0), PARAMS, TREES)
    # Two roundings a step.
    np.testing.assert_allclose(state.mu_product, 0.45**STEPS, rtol=1e-6)


# Reductions


def test_warmed_up_momentum_is_adam_with_nesterov():
    ours = ox.scale_by_nadam(momentum_decay=1e4)
    # Two moments of a few float32 roundings each.
    assert_trees_close(
        updates_at(ours, PARAMS, GRADS),
        updates_at(ox.scale_by_adam(nesterov=True), PARAMS, GRADS),
        rtol=2e-6,
    )


def test_without_momentum_it_is_adam_without_momentum():
    # A few float32 roundings.
    assert_trees_close(
        updates_at(ox.scale_by_nadam(0.0, 0.9), PARAMS, GRADS),
        updates_at(ox.scale_by_adam(0.0, 0.9), PARAMS, GRADS),
        rtol=1e-6,
    )


def test_moments_are_those_of_adam():
    _, state = run(ox.scale_by_nadam(0.8, 0.9), PARAMS, TREES)
    _, adam = run(ox.scale_by_adam(0.8, 0.9), PARAMS, TREES)
    # The same operations.
    assert_trees_close(state.mu, adam.mu, rtol=1e-7)
    assert_trees_close(state.nu, adam.nu, rtol=1e-7)


# Invariances and limits


@pytest.mark.parametrize("power", [-35, 45])
def test_scale_does_not_matter(power: int):
    tx = ox.scale_by_nadam(eps=1e-30)
    scaled = jax.tree.map(lambda g: g * 2.0**power, GRADS)
    # A power of two scales every rounding; only fusion may differ.
    assert_trees_close(
        updates_at(tx, PARAMS, scaled), updates_at(tx, PARAMS, GRADS), rtol=1e-6
    )


def test_a_product_that_underflows_is_no_bias():
    # Thousands of momenta below 0.9 multiply to 0: both corrections are then 1.
    tx = ox.scale_by_nadam()
    g = jnp.asarray([2.0])
    state = ox.ScaleByNadamState(jnp.int32(9999), jnp.float32(1e-37), g, g**2)
    updates, state = tx.update(g, state)
    now, ahead = momentum(10_000), momentum(10_001)
    corrected = (1 - 0.999**10_000) ** 0.5
    # A few float32 roundings.
    np.testing.assert_allclose(updates, [(1 - now + ahead) * corrected], rtol=1e-6)
    for _ in range(30):
        updates, state = tx.update(g, state)
    np.testing.assert_array_equal(state.mu_product, np.float32(0))
    assert_finite(updates)


def test_huge_gradients_stop_and_never_explode():
    grads = jnp.stack([jnp.ones(2), jnp.asarray([1e30, 1.0]), jnp.ones(2)])
    updates = updates_at(ox.scale_by_nadam(), jnp.ones(2), grads)
    np.testing.assert_array_equal(updates[1:, 0], [0.0, 0.0])
    assert_finite(updates)
    assert np.abs(updates[:, 1]).min() > 0.5


@pytest.mark.parametrize("moments", [{"mu_dtype": "bfloat16"}, {"nu_dtype": "float16"}])
def test_low_precision_moments(moments):
    state = ox.scale_by_nadam(**moments).init(PARAMS["w"])
    assert state.mu.dtype == moments.get("mu_dtype", "float32")
    assert state.nu.dtype == moments.get("nu_dtype", "float32")
    grads = GRADS["w"] / jnp.abs(GRADS["w"]).max()
    # A rounding of 2^-9 a step, weighted like the gradients.
    assert_trees_close(
        updates_at(ox.scale_by_nadam(**moments), PARAMS["w"], grads),
        updates_at(ox.scale_by_nadam(), PARAMS["w"], grads),
        rtol=6 * 2**-9,
    )


# Errors


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"b1": 1.0}, r"b1=1.0 is not allowed; .* \[0, 1\)"),
        (ValueError, {"b2": -0.1}, r"b2=-0.1 is not allowed; .* \[0, 1\)"),
        (ValueError, {"eps": 0.0}, "eps=0.0 is not allowed; .* > 0"),
        (ValueError, {"momentum_decay": -1e-3}, "momentum_decay=-0.001 .* >= 0"),
        (TypeError, {"momentum_decay": None}, "momentum_decay=None is not allowed"),
        (TypeError, {"b1": True}, "b1=True is not allowed"),
        (TypeError, {"mu_dtype": "int8"}, "mu_dtype='int8' .* floating-point"),
        (TypeError, {"nu_dtype": 8}, "nu_dtype=8 is not allowed"),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message: str):
    with pytest.raises(error, match=f"scale_by_nadam: {message}"):
        ox.scale_by_nadam(**arguments)


def test_wrong_parameters_are_refused():
    message = "scale_by_nadam: parameter 'n' of dtype int32 is not allowed"
    with pytest.raises(TypeError, match=message):
        ox.scale_by_nadam().init({"n": jnp.ones(2, jnp.int32)})
