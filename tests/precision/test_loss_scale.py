"""Loss scaling: PyTorch's rule, steps that are skipped, and training in float16."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from tests.assertions import assert_same_types, assert_trees_equal
from tests.branches import assert_products_only_in_branches
from tests.precision.scaled_losses import (
    FAST,
    GRADS,
    INNERS,
    NONFINITE,
    PARAMS,
    PLAIN,
    SHAPES,
    compiled,
    scaled,
    spoiled,
)
from tests.problems import cast
from tests.trajectories import run

# PyTorch's rule


# Recorded from torch 2.13: torch.amp.GradScaler("cpu", init_scale=8, growth_interval=3)
# around torch.optim.SGD([w], lr=0.25, momentum=0.5) with the loss Σ w·g, all of which
# is exact in float32. The tracker is what `finite_steps` counts.
BAD_STEPS = {3: np.inf, 6: np.nan, 7: -np.inf, 13: np.nan}
TORCH_SCALES = [8, 8, 16, 8, 8, 8, 4, 2, 2, 2, 4, 4, 4, 2, 2, 2]
TORCH_TRACKER = [1, 2, 0, 0, 1, 2, 0, 0, 1, 2, 0, 1, 2, 0, 1, 2]
TORCH_WEIGHTS = [
    [1.75, -1.5],
    [1.625, -1.5],
    [1.5625, -1.25],
    [1.5625, -1.25],
    [0.78125, -1.125],
    [0.140625, -0.5625],
    [0.140625, -0.5625],
    [0.140625, -0.5625],
    [-0.6796875, -0.78125],
    [-1.08984375, -0.890625],
    [-0.794921875, -0.4453125],
    [-1.3974609375, -0.47265625],
    [-1.94873046875, -0.236328125],
    [-1.94873046875, -0.236328125],
    [-1.474365234375, -0.1181640625],
    [-1.7371826171875, 0.44091796875],
]


def torch_gradients() -> np.ndarray:
    t = np.arange(16)
    grads = np.stack([t * 5 % 7 - 3, t * 3 % 5 - 2], axis=1).astype(np.float32)
    for step, value in BAD_STEPS.items():
        grads[step, step % 2] = value
    return grads


def test_steps_and_scales_are_those_of_torch():
    tx = ox.dynamic_loss_scale(
        ox.sgd(0.25, momentum=0.5), init_scale=8.0, growth_interval=3
    )
    params = jnp.asarray([1.0, -2.0])

    def step(carry: Any, g: jax.Array):
        params, state = carry
        updates, state = tx.update(scaled(g, state), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state)

    _, (weights, states) = jax.lax.scan(
        step, (params, tx.init(params)), jnp.asarray(torch_gradients())
    )
    np.testing.assert_array_equal(states.scale, TORCH_SCALES)
    np.testing.assert_array_equal(states.finite_steps, TORCH_TRACKER)
    np.testing.assert_array_equal(weights, TORCH_WEIGHTS)
    bad = np.isin(np.arange(16), list(BAD_STEPS))
    np.testing.assert_array_equal(states.skipped_steps, np.cumsum(bad))


def test_other_factors_are_those_of_torch():
    # Recorded alike: growth_factor=3, backoff_factor=0.25, growth_interval=2.
    expected = [8.0, 24.0, 24.0, 6.0, 6.0, 18.0, 18.0, 54.0, 13.5, 13.5]
    tx = compiled(
        ox.dynamic_loss_scale(
            ox.sgd(0.25),
            init_scale=8.0,
            growth_factor=3.0,
            backoff_factor=0.25,
            growth_interval=2,
        )
    )
    state = tx.init(jnp.ones(2))
    scales = []
    for step in range(10):
        g = jnp.full(2, jnp.nan if step in (3, 8) else 1.0)
        _, state = tx.update(g, state)
        scales.append(float(ox.loss_scale(state)))
    assert scales == expected


def test_defaults_are_those_of_torch():
    g = jnp.ones(2)
    state = PLAIN.init(g)
    assert ox.loss_scale(state) == 65536
    _, skipped = PLAIN.update(g * jnp.inf, state)
    assert ox.loss_scale(skipped) == 32768
    # The last is what a run with a longer interval may have saved.
    for before, after in ((1998, 65536), (1999, 131072), (5000, 131072)):
        _, grown = PLAIN.update(g, state._replace(finite_steps=jnp.int32(before)))
        assert ox.loss_scale(grown) == after


@pytest.mark.parametrize(
    ("scale", "g", "after"),
    [
        (2.0**63, 1.0, 2.0**64),
        (2.0**64, 1.0, 2.0**64),
        (2.0**-23, jnp.nan, 2.0**-24),
        (2.0**-24, jnp.nan, 2.0**-24),
    ],
)
def test_limits(scale: float, g: float, after: float):
    state = PLAIN.init(jnp.ones(2))
    # One step before the scale grows.
    state = state._replace(scale=jnp.float32(scale), finite_steps=jnp.int32(1999))
    updates, state = PLAIN.update(jnp.full(2, g), state)
    assert ox.loss_scale(state) == after
    # At the limits scales can still be divided by.
    np.testing.assert_array_equal(updates, np.full(2, -1 / scale if g == 1 else 0.0))


# Steps that are skipped


@pytest.mark.parametrize("inner", INNERS)
def test_a_skipped_step_leaves_everything_alone(inner: str):
    tx = compiled(ox.dynamic_loss_scale(INNERS[inner]))
    (_, state), params = run(tx, PARAMS, GRADS[:1]), PARAMS
    for count, value in enumerate(NONFINITE, start=1):
        updates, after = tx.update(spoiled(GRADS[1], value), state, params)
        # One leaf skips all of them.
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        assert_trees_equal(updates, zeros)
        assert_trees_equal(optax.apply_updates(params, updates), params)
        assert_trees_equal(after.inner_state, state.inner_state)
        assert ox.skipped_steps(after) == count
        assert ox.loss_scale(after) == 65536 * 0.5**count
        state = after
    # The step after is that of an optimizer that has never seen them.
    updates, state = tx.update(scaled(GRADS[1], state), state, params)
    _, clean = run(tx, PARAMS, GRADS[:1])
    expected, clean = tx.update(scaled(GRADS[1], clean), clean, params)
    assert_trees_equal(updates, expected)
    assert_trees_equal(state.inner_state, clean.inner_state)


@pytest.mark.parametrize("name", SHAPES["dense"])
def test_every_leaf_is_looked_at(name: str):
    # Gradients in float16 that overflowed, each leaf in turn.
    grads = cast(GRADS[0], "float16")
    grads["dense"][name] *= jnp.float16(60000) * jnp.float16(60000)
    updates, state = PLAIN.update(grads, PLAIN.init(PARAMS))
    assert ox.skipped_steps(state) == 1
    assert not any(np.any(u) for u in jax.tree.leaves(updates))


def test_the_largest_number_is_none_that_overflowed():
    # The largest float16 is one; beside infinity everything is skipped.
    state = PLAIN.init(jnp.ones(2, jnp.float16))
    _, kept = PLAIN.update(jnp.full(2, 65504, jnp.float16), state)
    _, skipped = PLAIN.update(jnp.asarray([1.0, jnp.inf], jnp.float16), state)
    assert (ox.skipped_steps(kept), ox.skipped_steps(skipped)) == (0, 1)


def test_a_skipped_step_multiplies_no_matrices():
    inner = optax.contrib.muon(0.1)
    tx = ox.dynamic_loss_scale(inner)
    assert_products_only_in_branches(tx, inner, jnp.ones((4, 4)))


def test_members_of_a_vmap_skip_on_their_own():
    tx = ox.dynamic_loss_scale(ox.sgd(2.0**16))
    params = jnp.ones((3, 4))
    grads = params.at[1, 2].set(jnp.nan)
    update = jax.jit(jax.vmap(tx.update), compiler_options=FAST)
    updates, state = update(grads, jax.vmap(tx.init)(params))
    np.testing.assert_array_equal(updates[:, 0], [-1.0, 0.0, -1.0])
    np.testing.assert_array_equal(state.skipped_steps, [0, 1, 0])
    np.testing.assert_array_equal(state.scale, [65536, 32768, 65536])


# What inner sees


def test_powers_of_two_round_nothing():
    # Over 24 orders of magnitude, and times 2^16 still finite.
    rng = np.random.default_rng(0)
    g = jnp.asarray(rng.standard_normal(64) * np.geomspace(1e-20, 1e20, 64), "float32")
    tx = ox.dynamic_loss_scale(optax.identity())
    updates, _ = tx.update(g * 65536, tx.init(g))
    np.testing.assert_array_equal(updates, g)


def test_inner_sees_float32_gradients():
    tx = ox.dynamic_loss_scale(optax.trace(0.0))
    params = jnp.ones(2, jnp.float16)
    # 2^-24, the smallest float16, over 2^16: no number of float16.
    g = jnp.full(2, 2.0**-24, jnp.float16)
    updates, state = tx.update(g, tx.init(params), params)
    assert updates.dtype == jnp.float32
    np.testing.assert_array_equal(updates, np.full(2, 2.0**-40))
    # The state of inner keeps the dtype that it began with.
    assert_same_types(state, tx.init(params))


def test_emits_float32_whatever_inner_emits():
    inner = optax.stateless(lambda updates, params: cast(updates, "float16"))
    tx = ox.dynamic_loss_scale(inner, init_scale=2.0)
    updates, _ = tx.update(jnp.full(2, 3.0), tx.init(jnp.ones(2)))
    assert_trees_equal(updates, jnp.full(2, 1.5))


@pytest.mark.parametrize(
    "tx",
    [
        ox.dynamic_loss_scale(ox.adam(0.1)),
        # optax's moments are in the dtype of the parameters that it is given: the
        # second one of these gradients, 1e-9, is no number of float16.
        ox.master_weights(ox.dynamic_loss_scale(optax.adam(0.1))),
    ],
    ids=["ours", "optax"],
)
def test_moments_are_those_of_float32(tx: optax.GradientTransformation):
    g = jnp.full(2, 2.0**-10)
    _, expected = run(ox.adam(0.1), jnp.ones(2), [g] * 3)
    _, state = run(compiled(tx), jnp.ones(2, jnp.float16), [g * 65536] * 3)
    for name in ("mu", "nu"):
        moment = optax.tree.get(state, name)
        assert moment.dtype == jnp.float32
        # The roundings of a few operations.
        np.testing.assert_allclose(moment, optax.tree.get(expected, name), rtol=1e-6)


def test_clipping_inside_sees_gradients_without_the_scale():
    inner = optax.chain(ox.clip_by_global_norm(0.5), ox.sgd(0.1, momentum=0.9))
    tx = compiled(ox.dynamic_loss_scale(inner))
    state = tx.init(PARAMS)
    inner, inner_state = compiled(inner), inner.init(PARAMS)
    for g in GRADS[:2]:
        updates, state = tx.update(scaled(g, state), state, PARAMS)
        expected, inner_state = inner.update(g, inner_state, PARAMS)
        for ours, theirs in zip(
            jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True
        ):
            # The same operations, compiled twice.
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    norm = optax.tree.norm(GRADS[0])
    assert norm > 1  # So that it was clipped.


def test_extra_arguments_reach_inner():
    def update(updates, state, params=None, *, value, **extra_args):
        return jax.tree.map(lambda g: g * value, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = ox.dynamic_loss_scale(inner, init_scale=2.0)
    g = jnp.ones(2)
    updates, _ = tx.update(g, tx.init(g), value=3.0, other=None)
    np.testing.assert_array_equal(updates, [1.5, 1.5])
    plain = ox.dynamic_loss_scale(ox.sgd(1.0), init_scale=2.0)
    updates, _ = plain.update(g, plain.init(g), value=3.0)
    np.testing.assert_array_equal(updates, [-0.5, -0.5])


# Training in float16


def test_gradients_that_float16_has_no_numbers_for():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((32, 4)), jnp.float16)
    target = jnp.asarray([0.5, -1.0, 0.25, 1.5], jnp.float16)

    def loss(w: jax.Array, scale: Any) -> jax.Array:
        # A model in float16, its loss in float32: one of many terms of a mean.
        errors = (x @ w).astype(jnp.float32) - (x @ target).astype(jnp.float32)
        return scale * 2.0**-30 * jnp.sum(errors**2)

    # Errors are a few units, and so what reaches the model is a few times 2^-29.
    start = jnp.zeros(4, jnp.float16)
    gradient = jax.jit(jax.grad(loss), compiler_options=FAST)
    assert not np.any(gradient(start, 1.0))
    assert np.all(gradient(start, 65536.0))

    # Too large a scale at first, and one that grows until it is too large again.
    tx = ox.dynamic_loss_scale(
        ox.adam(optax.cosine_decay_schedule(0.1, 150), eps=1e-15),
        init_scale=2.0**50,
        growth_interval=10,
    )

    def step(carry: Any, _: None):
        w, state = carry
        g = jax.grad(loss)(w, ox.loss_scale(state))
        updates, state = tx.update(g, state, w)
        w = optax.apply_updates(w, updates)
        return (w, state), (w, state.scale, jnp.isfinite(g).all())

    train = jax.jit(
        lambda carry: jax.lax.scan(step, carry, None, length=150), compiler_options=FAST
    )
    (w, state), (path, scales, finite) = train((start, tx.init(start)))
    assert np.linalg.norm(np.float32(w - target)) < 0.01 * np.linalg.norm(target)
    # It went down at once, and then up and down.
    assert not np.any(finite[:5])
    assert np.all(finite[20:25])
    assert not np.all(finite[25:])
    assert np.any(np.diff(scales) > 0)
    assert ox.skipped_steps(state) == np.sum(~finite)
    # Parameters in float16 do not move where a step is skipped, and else they do.
    moved = np.any(np.diff(path, axis=0, prepend=start[None]), axis=1)
    np.testing.assert_array_equal(moved[:60], finite[:60])
