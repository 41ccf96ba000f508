"""Adan's direction: differences of gradients by hand and what it reduces to."""

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


# By hand


def test_second_step_by_hand():
    # d = 2; m = 1/2, 7/4; k = 0, 1; n = 1/2, 1/4 + (3 + 1)²/2; corrected by 3/4.
    tx = ox.scale_by_adan(0.5, 0.5, 0.5, eps=1e-30)
    updates = updates_at(tx, jnp.ones(()), jnp.asarray([1.0, 3.0]))
    # A few float32 roundings.
    np.testing.assert_allclose(updates, [1.0, 3 / 11**0.5], rtol=1e-6)


def test_weight_of_the_differences():
    # Without averages: (g + b2·d) divided by itself, d averaged with 1 - b2.
    tx = ox.scale_by_adan(0.0, 0.25, 0.0, eps=1e-30)
    updates = updates_at(tx, jnp.ones(()), jnp.asarray([1.0, 3.0]))
    # k = 3/4·2, corrected by 15/16: 8/5.
    np.testing.assert_allclose(
        updates, [1.0, (3 + 0.25 * 1.6) / (3 + 0.25 * 2)], rtol=1e-6
    )


def test_first_difference_is_zero():
    tx = ox.scale_by_adan(eps=1e-30)
    updates, state = tx.update(TREES[0], tx.init(PARAMS))
    # The corrections cancel to a few roundings.
    assert_trees_close(updates, jax.tree.map(jnp.sign, TREES[0]), rtol=5e-7)
    assert_trees_equal(state.mu_diff, jax.tree.map(jnp.zeros_like, PARAMS))
    assert_trees_equal(state.previous_grads, TREES[0])


def test_the_last_gradient_is_kept():
    _, state = run(ox.scale_by_adan(), PARAMS, TREES)
    assert_trees_equal(state.previous_grads, TREES[-1])
    assert state.count == STEPS
    narrow = ox.scale_by_adan(mu_dtype="bfloat16")
    _, state = narrow.update(TREES[0], narrow.init(PARAMS))
    assert_trees_equal(
        state.previous_grads, jax.tree.map(lambda g: g.astype(jnp.bfloat16), TREES[0])
    )
    dtypes = [m["w"].dtype.name for m in (state.mu, state.mu_diff, state.nu)]
    assert dtypes == ["bfloat16", "bfloat16", "float32"]


# Reductions


def test_constant_gradients_have_no_differences():
    constant = jax.tree.map(lambda g: jnp.broadcast_to(g[:1], g.shape), GRADS)
    # As many float32 roundings in both.
    assert_trees_close(
        updates_at(ox.scale_by_adan(0.9, 0.5, 0.99), PARAMS, constant),
        updates_at(ox.scale_by_adam(0.9, 0.99), PARAMS, constant),
        rtol=1e-6,
    )


def test_without_the_differences_it_is_adam():
    # As many float32 roundings in both.
    assert_trees_close(
        updates_at(ox.scale_by_adan(0.9, 0.0, 0.99), PARAMS, GRADS),
        updates_at(ox.scale_by_adam(0.9, 0.99), PARAMS, GRADS),
        rtol=1e-6,
    )


def test_optax_weighs_the_differences_otherwise():
    def both(b2: float):
        theirs = optax.scale_by_adan(b2=b2, eps_root=0.0)
        return [
            updates_at(tx, PARAMS["w"], GRADS["w"])
            for tx in (ox.scale_by_adan(b2=b2), theirs)
        ]

    # There 1 - b2 multiplies what b2 does here. optax forms 1 - 0.99**t in float32,
    # which errs by 6e-8 / 0.01 in the first step.
    assert_trees_close(*both(0.5), rtol=2e-5)
    ours, theirs = both(0.92)
    assert np.abs(ours - theirs).max() > 0.3


# Invariances and limits


@pytest.mark.parametrize("power", [-35, 45])
def test_scale_does_not_matter(power: int):
    tx = ox.scale_by_adan(eps=1e-30)
    scaled = jax.tree.map(lambda g: g * 2.0**power, GRADS)
    # A power of two scales every rounding; only fusion may differ.
    assert_trees_close(
        updates_at(tx, PARAMS, scaled), updates_at(tx, PARAMS, GRADS), rtol=1e-6
    )


def test_complex_parameters_share_one_second_moment():
    # A complex number of constant phase behaves like its magnitude.
    phase = np.exp(1j * np.linspace(0, 2, 4)).astype(np.complex64)
    params = PARAMS["b"].astype(jnp.complex64)
    assert ox.scale_by_adan().init(params).nu.dtype == jnp.float32
    updates = updates_at(ox.scale_by_adan(), params, GRADS["b"] * phase)
    expected = updates_at(ox.scale_by_adan(), PARAMS["b"], GRADS["b"]) * phase
    # Float32 roundings, a few more than for real numbers.
    assert_trees_close(updates, expected, rtol=3e-6)


def test_huge_gradients_stop_and_never_explode():
    # The extrapolated gradient, nearly twice as large, overflows in the second step and
    # in the third, which looks back on it.
    grads = jnp.stack([jnp.ones(2), jnp.asarray([1e30, 1.0]), jnp.ones(2)])
    updates = updates_at(ox.scale_by_adan(), jnp.ones(2), grads)
    np.testing.assert_array_equal(updates[1:, 0], [0.0, 0.0])
    assert_finite(updates)
    assert np.abs(updates[:, 1]).min() > 0.5


# Errors


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"b1": 1.0}, r"b1=1.0 is not allowed; .* \[0, 1\)"),
        (ValueError, {"b2": 1.5}, r"b2=1.5 is not allowed; .* \[0, 1\)"),
        (ValueError, {"b3": -0.1}, r"b3=-0.1 is not allowed; .* \[0, 1\)"),
        (TypeError, {"b3": "0.9"}, "b3='0.9' is not allowed"),
        (ValueError, {"eps": 0.0}, "eps=0.0 is not allowed; .* > 0"),
        (TypeError, {"mu_dtype": "int8"}, "mu_dtype='int8' .* floating-point"),
        (TypeError, {"nu_dtype": None}, "nu_dtype=None is not allowed"),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message: str):
    with pytest.raises(error, match=f"scale_by_adan: {message}"):
        ox.scale_by_adan(**arguments)


def test_wrong_parameters_are_refused():
    message = "scale_by_adan: parameter 'n' of dtype int32 is not allowed"
    with pytest.raises(TypeError, match=message):
        ox.scale_by_adan().init({"n": jnp.ones(2, jnp.int32)})
