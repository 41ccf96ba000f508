"""StableAdam's direction: when it is Adam's, and by how much it shortens a shock."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from optaxplus import MatrixAxes
from tests.assertions import assert_finite, assert_trees_close, assert_trees_equal
from tests.problems import gradients, normal_tree
from tests.trajectories import run, updates_at

SHAPES = {"w": (3, 4), "b": (4,), "s": ()}
STEPS = 6
PARAMS = normal_tree(SHAPES, seed=0)
TREES = gradients(SHAPES, steps=STEPS)
GRADS = jax.tree.map(lambda *g: jnp.stack(g), *TREES)
# Every entry smaller than in the step before: no shock.
SHRINKING = jax.tree.map(
    lambda g: g[:1] * 0.5 ** jnp.arange(STEPS).reshape(-1, *[1] * (g.ndim - 1)), GRADS
)
STACK = MatrixAxes((-2,), (-1,))


def shock(size: float) -> float:
    """R of a gradient `size` times as large as the first one, in the second step."""
    second_moment = (0.99 * 0.01 + 0.01 * size**2) / (1 - 0.99**2)
    return size / second_moment**0.5


# Reductions


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_without_a_shock_it_is_adamw(weight_decay: float):
    adamw = optax.chain(
        ox.scale_by_adam(0.9, 0.99, eps=1e-6), optax.add_decayed_weights(weight_decay)
    )
    # In the first step R is 1 up to a few float32 roundings.
    assert_trees_close(
        updates_at(
            ox.scale_by_stable_adam(weight_decay=weight_decay), PARAMS, SHRINKING
        ),
        updates_at(adamw, PARAMS, SHRINKING),
        rtol=1e-6,
    )


def test_moments_are_those_of_adam():
    _, state = run(ox.scale_by_stable_adam(0.8, 0.9), PARAMS, TREES)
    _, adam = run(ox.scale_by_adam(0.8, 0.9), PARAMS, TREES)
    assert_trees_equal(state.mu, adam.mu)
    assert_trees_equal(state.nu, adam.nu)


# Shocks


@pytest.mark.parametrize("eps", [1e-12, 0.3])
@pytest.mark.parametrize("size", [5.0, 100.0])
def test_shock_by_hand(size: float, eps: float):
    grads = np.array([[0.1, -0.2], [0.1 * size, -0.2]])
    params = np.array([3.0, -2.0])
    m_hat = (0.09 * grads[0] + 0.1 * grads[1]) / (1 - 0.9**2)
    v_hat = (0.0099 * grads[0] ** 2 + 0.01 * grads[1] ** 2) / (1 - 0.99**2)
    roots = np.sqrt(v_hat)
    # The first of the roots is larger than eps, the second smaller than 0.3.
    rms = np.sqrt(((grads[1] / np.maximum(roots, eps)) ** 2).mean())
    assert rms > 1
    tx = ox.scale_by_stable_adam(weight_decay=0.5, eps=eps)
    updates = updates_at(tx, jnp.float32(params), jnp.float32(grads))
    # A few float32 roundings.
    np.testing.assert_allclose(
        updates[1], (m_hat / (roots + eps) + 0.5 * params) / rms, rtol=2e-6
    )


def test_every_parameter_has_a_shock_of_its_own():
    calm = jax.tree.map(jnp.ones_like, PARAMS)
    sudden = {**calm, "w": jnp.full((3, 4), 100.0)}
    tx = ox.scale_by_stable_adam(eps=1e-12)
    (_, ours), _ = run(tx, PARAMS, [calm, sudden])
    (_, adam), _ = run(ox.scale_by_adam(0.9, 0.99, eps=1e-12), PARAMS, [calm, sudden])
    # A few float32 roundings.
    expected = {**adam, "w": adam["w"] / shock(100.0)}
    assert_trees_close(ours, expected, rtol=2e-6)
    assert shock(100.0) > 1.3


def test_stacks_are_their_slices():
    sizes = jnp.asarray([1.0, 10.0, 100.0]).reshape(3, 1, 1)
    first = jnp.ones((3, 2, 4))
    grads = jnp.stack([first, first * sizes])
    updates = updates_at(ox.scale_by_stable_adam(axes=STACK), first, grads)
    whole = ox.scale_by_stable_adam(axes=MatrixAxes((0, 1), (2,)))
    together = updates_at(whole, first, grads)
    slices = [
        updates_at(ox.scale_by_stable_adam(axes=STACK), first[i], grads[:, i])
        for i in range(3)
    ]
    # Float32 sums in another order.
    assert_trees_close(updates, jnp.stack(slices, axis=1), rtol=1e-6)
    # One matrix of all three would shorten the calm slice too.
    assert (together[1, 0] < 0.9 * updates[1, 0]).all()


def test_coordinates_may_be_blocks():
    grads = jnp.asarray([[1.0, 1.0], [100.0, 0.5]])
    tx = ox.scale_by_stable_adam(axes=MatrixAxes((), ()), eps=1e-12)
    adam = updates_at(ox.scale_by_adam(0.9, 0.99, eps=1e-12), grads[0], grads)
    updates = updates_at(tx, grads[0], grads)
    # A few float32 roundings.
    np.testing.assert_allclose(
        updates[1], adam[1] / np.array([shock(100.0), 1.0]), rtol=2e-6
    )


def test_splits_are_separate():
    grads = jnp.ones((2, 2, 5)).at[1, :, :2].set(100.0)
    fused = MatrixAxes((0,), (1,), splits=(2, 3))
    updates = updates_at(ox.scale_by_stable_adam(axes=fused), grads[0], grads)
    parts = [
        updates_at(ox.scale_by_stable_adam(axes=STACK), part[0], part)
        for part in (grads[..., :2], grads[..., 2:])
    ]
    # Float32 sums in another order.
    assert_trees_close(updates, jnp.concatenate(parts, axis=-1), rtol=1e-6)


def test_small_second_moments_count_as_epsilon():
    # R = RMS(g / eps): gradients below eps shorten nothing.
    tx = ox.scale_by_stable_adam(eps=1.0)
    grads = jnp.asarray([[1e-3, 1e-3], [0.5, 0.5]])
    updates = updates_at(tx, grads[0], grads)
    adam = updates_at(ox.scale_by_adam(0.9, 0.99, eps=1.0), grads[0], grads)
    # Float32 roundings; with the unbounded quotient R would be 1.4.
    assert_trees_close(updates, adam, rtol=1e-6)


# Weight decay


def test_mask():
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    for mask in (
        {"w": True, "b": False, "s": False},
        lambda params: jax.tree.map(lambda p: p.ndim == 2, params),
    ):
        tx = ox.scale_by_stable_adam(weight_decay=0.5, mask=mask)
        updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS)
        # Half of a float32 number is one.
        assert_trees_equal(updates, {**zeros, "w": 0.5 * PARAMS["w"]})


def test_decay_of_low_precision_parameters_is_not_rounded():
    params = jnp.asarray([1.0, 3.0], jnp.bfloat16)
    tx = ox.scale_by_stable_adam(weight_decay=0.1)
    updates, _ = tx.update(jnp.zeros(2, jnp.bfloat16), tx.init(params), params)
    # One float32 rounding; bfloat16 has 4e-3.
    np.testing.assert_allclose(updates, [0.1, 0.3], rtol=1e-7)


def test_params_are_needed_for_decay_alone():
    tx = ox.scale_by_stable_adam()
    tx.update(TREES[0], tx.init(PARAMS))
    tx = ox.scale_by_stable_adam(weight_decay=0.1)
    with pytest.raises(ValueError, match="scale_by_stable_adam: params=None is not"):
        tx.update(TREES[0], tx.init(PARAMS))


# Limits


def test_huge_gradients_stop_and_never_explode():
    # In a block of its own each, since a block shares its R.
    axes = MatrixAxes((), ())
    grads = jnp.stack([jnp.ones(2), jnp.asarray([1e30, 1.0]), jnp.ones(2)])
    updates = updates_at(ox.scale_by_stable_adam(axes=axes), jnp.ones(2), grads)
    np.testing.assert_array_equal(updates[1:, 0], [0.0, 0.0])
    assert_finite(updates)
    assert np.abs(updates[:, 1]).min() > 0.5


# Errors


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"b1": 1.0}, r"b1=1.0 is not allowed; .* \[0, 1\)"),
        (ValueError, {"b2": -0.1}, "b2=-0.1 is not allowed"),
        (ValueError, {"eps": 0.0}, "eps=0.0 is not allowed; .* > 0"),
        (ValueError, {"weight_decay": -0.1}, "weight_decay=-0.1 .* >= 0"),
        (TypeError, {"weight_decay": lambda step: 0.1}, "weight_decay=<function"),
        (TypeError, {"mu_dtype": "int8"}, "mu_dtype='int8' .* floating-point"),
        (TypeError, {"nu_dtype": None}, "nu_dtype=None is not allowed"),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message: str):
    with pytest.raises(error, match=f"scale_by_stable_adam: {message}"):
        ox.scale_by_stable_adam(**arguments)


def test_wrong_parameters_and_axes_are_refused():
    message = "scale_by_stable_adam: parameter 'n' of dtype int32 is not allowed"
    with pytest.raises(TypeError, match=message):
        ox.scale_by_stable_adam().init({"n": jnp.ones(2, jnp.int32)})
    message = "scale_by_stable_adam: parameter 'b': .* axis -2 is out of range"
    with pytest.raises(ValueError, match=message):
        ox.scale_by_stable_adam(axes=STACK).init(PARAMS)


def test_wrong_masks_are_refused():
    tx = ox.scale_by_stable_adam(weight_decay=0.1, mask={"w": 1, "b": True, "s": True})
    with pytest.raises(TypeError, match="scale_by_stable_adam: mask=1 at 'w' is not"):
        tx.update(TREES[0], tx.init(PARAMS), PARAMS)
    tx = ox.scale_by_stable_adam(weight_decay=0.1, mask={"w": True})
    with pytest.raises(ValueError, match="scale_by_stable_adam: mask is not a prefix"):
        tx.update(TREES[0], tx.init(PARAMS), PARAMS)
