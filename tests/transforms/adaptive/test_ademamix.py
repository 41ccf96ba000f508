"""AdEMAMix's direction: the slow mean, its warm-ups, and what it reduces to."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from tests.assertions import assert_finite, assert_trees_close, assert_trees_equal
from tests.problems import gradients, normal_tree
from tests.trajectories import run, updates_at

SHAPES = {"w": (3, 4), "b": (4,), "s": ()}
STEPS = 6
PARAMS = normal_tree(SHAPES, seed=0)
TREES = gradients(SHAPES, steps=STEPS)
GRADS = jax.tree.map(lambda *g: jnp.stack(g), *TREES)


def steps_like(g: jax.Array) -> np.ndarray:
    """1, 2, … along the first axis."""
    return np.arange(1, STEPS + 1).reshape(-1, *[1] * (g.ndim - 1))


# Reductions


@pytest.mark.parametrize("warmups", [{}, {"alpha_warmup": 3, "b3_warmup": 4}], ids=str)
def test_without_the_slow_mean_it_is_adam(warmups):
    # As many float32 roundings in both.
    assert_trees_close(
        updates_at(ox.scale_by_ademamix(alpha=0.0, **warmups), PARAMS, GRADS),
        updates_at(ox.scale_by_adam(), PARAMS, GRADS),
        rtol=1e-6,
    )


def test_slow_mean_as_fast_as_the_other_one():
    # The slow mean lacks its bias correction: it is 1 - b1^t times the other one.
    updates = updates_at(ox.scale_by_ademamix(0.9, b3=0.9, alpha=3.0), PARAMS, GRADS)
    expected = jax.tree.map(
        lambda u: u * (1 + 3 * (1 - 0.9 ** steps_like(u))).astype(np.float32),
        updates_at(ox.scale_by_adam(), PARAMS, GRADS),
    )
    # A few float32 roundings.
    assert_trees_close(updates, expected, rtol=2e-6)


def test_slow_mean_of_constant_gradients():
    _, state = run(ox.scale_by_ademamix(b3=0.99), PARAMS, [TREES[0]] * STEPS)
    expected = jax.tree.map(lambda g: g * (1 - 0.99**STEPS), TREES[0])
    # 1 - 0.99 is a Python number; a few float32 roundings.
    assert_trees_close(state.mu_slow, expected, rtol=1e-6)


@pytest.mark.parametrize("alpha", [5.0, 0.5])
def test_optax(alpha: float):
    ours = ox.scale_by_ademamix(alpha=alpha)
    theirs = optax.contrib.scale_by_ademamix(alpha=alpha)
    # optax forms 1 - 0.999**t in float32, which errs by 6e-8 / 0.001 in the first step,
    # halved by the root.
    assert_trees_close(
        updates_at(ours, PARAMS, GRADS), updates_at(theirs, PARAMS, GRADS), rtol=5e-5
    )


# Warm-ups


def test_alpha_grows_linearly_and_stays():
    # Without averages the direction is (1 + alpha) times the sign.
    tx = ox.scale_by_ademamix(0.0, 0.0, 0.0, alpha=5.0, alpha_warmup=4, eps=1e-30)
    updates = updates_at(tx, PARAMS["b"], GRADS["b"])
    alpha = np.array([1.25, 2.5, 3.75, 5.0, 5.0, 5.0])
    # A few float32 roundings.
    np.testing.assert_allclose(
        updates, (1 + alpha)[:, None] * np.sign(GRADS["b"]), rtol=1e-6
    )


def slow_weight_at(step: int, tx: optax.GradientTransformation) -> jax.Array:
    """1 - b3 of the given step: what a first gradient of 1 leaves in the slow mean."""
    state = tx.init(jnp.zeros(()))._replace(count=jnp.asarray(step - 1, jnp.int32))
    return tx.update(jnp.ones(()), state)[1].mu_slow


def half_life(decay: float) -> float:
    # The shift is that of the authors.
    return math.log(0.5) / math.log(decay + 1e-8)


@pytest.mark.parametrize("b1", [0.9, 0.0])
def test_half_life_grows_linearly(b1: float):
    with jax.enable_x64(True):
        tx = ox.scale_by_ademamix(b1, b3=0.999, b3_warmup=10)
        weights = np.array([slow_weight_at(t, tx) for t in range(1, 10)])
    lives = math.log(0.5) / np.log1p(-weights)
    expected = np.linspace(half_life(b1), half_life(0.999), 11)[1:-1]
    # Float64 roundings of the weight, amplified a thousandfold by the logarithms.
    np.testing.assert_allclose(lives, expected, rtol=1e-12)


@pytest.mark.parametrize("warmup", [1, 7, 1000, 2.5])
def test_warmups_end_exactly_at_their_values(warmup: float):
    tx = ox.scale_by_ademamix(b3=0.9999, alpha=5.0, b3_warmup=warmup)
    last = math.ceil(warmup)
    for step in (last, last + 1, 10 * last):
        np.testing.assert_array_equal(slow_weight_at(step, tx), np.float32(1 - 0.9999))
    if last > 1:
        assert slow_weight_at(last - 1, tx) > 1.0001 * (1 - 0.9999)
    # Without averages of the first kind the direction is 1 + alpha·(1 - b3).
    short = {"alpha_warmup": warmup, "eps": 1e-30}
    tx = ox.scale_by_ademamix(0.0, 0.0, 0.5, alpha=4.0, **short)
    state = tx.init(jnp.zeros(()))._replace(count=jnp.int32(last - 1))
    np.testing.assert_array_equal(tx.update(jnp.ones(()), state)[0], np.float32(3.0))


def test_weights_fall_and_stay_between_those_of_the_ends():
    tx = ox.scale_by_ademamix(0.9, b3=0.9999, b3_warmup=1000)
    weights = np.array([slow_weight_at(t, tx) for t in (1, 2, 10, 100, 999, 1000)])
    assert (np.diff(weights) < 0).all()
    # Float32 roundings.
    assert weights[0] <= 0.1 * (1 + 1e-6)


def test_traced_warmup_lengths():
    arguments = {"b1": 0.5, "b3": 0.9, "alpha": 5.0}
    lengths = {"alpha_warmup": 4.0, "b3_warmup": 3.0}
    traced = optax.inject_hyperparams(ox.scale_by_ademamix)(**arguments, **lengths)
    assert set(lengths) <= set(traced.init(PARAMS).hyperparams)
    static = updates_at(ox.scale_by_ademamix(**arguments, **lengths), PARAMS, GRADS)
    # 1 - 0.999 is taken in float32: an error of 3e-8 / 1e-3, halved by the root.
    assert_trees_close(updates_at(traced, PARAMS, GRADS), static, rtol=5e-5)
    # That the lengths matter.
    for longer in ({"alpha_warmup": 40.0}, {"b3_warmup": 30.0}):
        tx = ox.scale_by_ademamix(**arguments, **{**lengths, **longer})
        other = updates_at(tx, PARAMS["w"], GRADS["w"])
        assert np.abs(other - static["w"]).max() > 0.1


# Invariances, state and limits


@pytest.mark.parametrize("power", [-35, 45])
def test_scale_does_not_matter(power: int):
    tx = ox.scale_by_ademamix(eps=1e-30, b3_warmup=4)
    scaled = jax.tree.map(lambda g: g * 2.0**power, GRADS)
    # A power of two scales every rounding; only fusion may differ.
    assert_trees_close(
        updates_at(tx, PARAMS, scaled), updates_at(tx, PARAMS, GRADS), rtol=1e-6
    )


def test_state():
    tx = ox.scale_by_ademamix(mu_dtype="bfloat16", nu_dtype="float16")
    state = tx.init(PARAMS["w"])
    assert (state.mu.dtype, state.mu_slow.dtype, state.nu.dtype) == (
        jnp.bfloat16,
        jnp.bfloat16,
        jnp.float16,
    )
    _, state = run(ox.scale_by_ademamix(), PARAMS, TREES)
    _, adam = run(ox.scale_by_adam(), PARAMS, TREES)
    assert state.count == STEPS
    assert_trees_equal(state.mu, adam.mu)
    assert_trees_equal(state.nu, adam.nu)


def test_huge_gradients_stop_and_never_explode():
    grads = jnp.stack([jnp.ones(2), jnp.asarray([1e30, 1.0]), jnp.ones(2)])
    updates = updates_at(ox.scale_by_ademamix(), jnp.ones(2), grads)
    np.testing.assert_array_equal(updates[1:, 0], [0.0, 0.0])
    assert_finite(updates)
    assert np.abs(updates[:, 1]).min() > 0.5


# Errors


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"b1": 1.0}, r"b1=1.0 is not allowed; .* \[0, 1\)"),
        (ValueError, {"b2": -0.1}, "b2=-0.1 is not allowed"),
        (ValueError, {"b3": 1.0}, r"b3=1.0 is not allowed; .* \[0, 1\)"),
        (ValueError, {"alpha": -1.0}, "alpha=-1.0 is not allowed; .* >= 0"),
        (TypeError, {"alpha": None}, "alpha=None is not allowed"),
        (ValueError, {"eps": 0.0}, "eps=0.0 is not allowed; .* > 0"),
        (ValueError, {"alpha_warmup": 0}, "alpha_warmup=0 is not allowed; .* > 0"),
        (ValueError, {"b3_warmup": -5}, "b3_warmup=-5 is not allowed; .* > 0"),
        (TypeError, {"b3_warmup": "10"}, "b3_warmup='10' is not allowed"),
        (TypeError, {"mu_dtype": "int8"}, "mu_dtype='int8' .* floating-point"),
        (TypeError, {"nu_dtype": None}, "nu_dtype=None is not allowed"),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message: str):
    with pytest.raises(error, match=f"scale_by_ademamix: {message}"):
        ox.scale_by_ademamix(**arguments)


def test_wrong_parameters_are_refused():
    message = "scale_by_ademamix: parameter 'n' of dtype int32 is not allowed"
    with pytest.raises(TypeError, match=message):
        ox.scale_by_ademamix().init({"n": jnp.ones(2, jnp.int32)})
