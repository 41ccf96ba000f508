"""Weights in low precision: what `inner` sees, odd trees, what others change."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from tests.assertions import assert_same_types, assert_trees_equal
from tests.precision.weight_rules import (
    FAST,
    GRADS,
    PARAMS,
    SGD,
    SHAPES,
    WRAPPERS,
    each_dtype,
    each_wrapper,
    kept_of,
    resolution,
    spacing,
    train,
    weights_of,
    wide,
)
from tests.problems import cast, normal_tree
from tests.trajectories import run

# What inner sees


INNERS = {
    "sgd": ox.sgd(0.1, momentum=0.9),
    "adamw": ox.adamw(0.01, weight_decay=0.3),
    "lion": ox.lion(0.01, weight_decay=0.3),
    "muon": ox.muon(0.01, ns_steps=2),
    "lookahead": ox.lookahead(ox.adamw(0.01), every_k=2),
    "optax": optax.adamw(0.01),
    "quantized": ox.quantize_state(ox.adamw(0.01), min_size=4),
}


@pytest.mark.parametrize("inner", INNERS)
@each_wrapper
def test_inner_sees_float32_weights_and_gradients(name: str, inner: str):
    tx, inner = WRAPPERS[name](INNERS[inner]), INNERS[inner]
    params, state = PARAMS, tx.init(PARAMS)
    weights = jax.tree.map(jnp.float32, params)
    by_hand = inner.init(weights)
    assert_trees_equal(state.inner_state, by_hand)
    before = state
    for g in GRADS[:2]:
        u, by_hand = inner.update(jax.tree.map(jnp.float32, g), by_hand, weights)
        target = jax.tree.map(lambda w, u: wide(w) + wide(u), weights, u)
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        # Not compiled, so by the same operations.
        assert_trees_equal(state.inner_state, by_hand)
        weights = jax.tree.map(jnp.asarray, weights_of(name, params, state))
        for w, x in zip(jax.tree.leaves(weights), jax.tree.leaves(target), strict=True):
            assert (np.abs(w - x) <= resolution(name, x, "bfloat16")).all()
    assert_same_types(state, before)


@each_wrapper
def test_decay_acts_on_the_weights_with_what_they_have_lost(name: str):
    # An update that is the weight itself: 1 - 2^-10, of which bfloat16 is 1.
    inner = optax.stateless(lambda updates, params: jax.tree.map(jnp.copy, params))
    tx = WRAPPERS[name](optax.chain(inner, optax.trace(0.0)))
    params = jnp.ones((), jnp.bfloat16)
    state = tx.init(params)
    if name == "master32":
        state = state._replace(kept={"master": jnp.float32(1 - 2.0**-10)})
    elif name == "master24":
        # 1/256 of the spacing below 1, 2^-8.
        state = state._replace(kept={"correction": jnp.int8(-64)})
    elif name == "compensated":
        state = state._replace(kept={"lost": jnp.bfloat16(-(2.0**-10))})
    _, state = tx.update(jnp.zeros_like(params), state, params)
    seen = optax.tree.get(state, "trace")
    assert seen == (1.0 if name == "stochastic" else 1 - 2.0**-10)


# Trees


@each_wrapper
def test_wide_leaves_pass_and_narrow_ones_are_kept(name: str):
    values = jnp.linspace(-1.0, 1.0, 64)
    params = {
        "wide": values,
        "complex": values + 2j * values,
        "bfloat16": values.astype(jnp.bfloat16),
        "float16": values.astype(jnp.float16),
        "scalar": jnp.ones((), jnp.bfloat16),
        "empty": jnp.zeros((0, 64), jnp.bfloat16),
        "none": None,
        "masked": optax.MaskedNode(),
    }
    grads = jax.tree.map(lambda p: (p * 0.3 + 0.1).astype(p.dtype), params)
    tx, inner = WRAPPERS[name](optax.sgd(0.01, momentum=0.9)), optax.sgd(0.01, 0.9)
    others = {key: params[key] for key in ("wide", "complex")}
    wide_grads = {key: grads[key] for key in others}
    alone, _ = run(inner, others, [wide_grads] * 2)
    all_updates, state = run(tx, params, [grads] * 2)
    for updates, expected in zip(all_updates, alone, strict=True):
        assert_trees_equal({key: updates[key] for key in others}, expected)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        for key in ("bfloat16", "float16", "scalar", "empty"):
            assert updates[key].dtype == jnp.float32
            assert updates[key].shape == params[key].shape
    assert_same_types(state, tx.init(params))
    # No copy and no correction of what needs none.
    for kept in state.kept.values():
        assert kept["wide"] is None
        assert kept["complex"] is None


@each_wrapper
def test_gradients_in_low_precision_of_wide_parameters(name: str):
    # inner gets float32, and so does the parameter: nothing is rounded twice.
    params, g = jnp.ones(64), jnp.full(64, 0.3, jnp.bfloat16)
    tx, inner = WRAPPERS[name](ox.sgd(0.1)), ox.sgd(0.1)
    updates, _ = tx.update(g, tx.init(params), params)
    expected, _ = inner.update(g.astype(jnp.float32), inner.init(params), params)
    assert_trees_equal(updates, expected)


@each_wrapper
def test_wide_trees_are_the_inner_optimizer(name: str):
    params = normal_tree(SHAPES, seed=0)
    grads = [normal_tree(SHAPES, seed=seed) for seed in (1, 2)]
    inner = ox.adamw(0.1, weight_decay=0.3)
    updates, state = run(WRAPPERS[name](inner), params, grads)
    expected, inner_state = run(inner, params, grads)
    assert_trees_equal(updates, expected)
    assert_trees_equal(state.inner_state, inner_state)


@each_wrapper
def test_float64(name: str, x64):
    params, g = jnp.linspace(0.1, 1, 4), jnp.linspace(1, 2, 4)
    updates, _ = run(WRAPPERS[name](ox.sgd(0.1)), params, [g])
    assert updates[0].dtype == jnp.float64
    np.testing.assert_array_equal(updates[0], -0.1 * np.asarray(g))


@each_wrapper
def test_buffers_are_not_shared_and_may_be_donated(name: str):
    inner = ox.lookahead(ox.adamw(0.1), every_k=2)
    for tx in (WRAPPERS[name](inner), WRAPPERS[name](optax.adamw(0.1))):
        params = cast(normal_tree(SHAPES, seed=0), "mixed")
        state = tx.init(params)
        leaves = jax.tree.leaves((params, state))
        buffers = [x.unsafe_buffer_pointer() for x in leaves]
        assert len(set(buffers)) == len(buffers)

    def step(params: Any, state: Any, g: Any):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    # A buffer that cannot be donated makes a warning, which is an error.
    donating = jax.jit(step, donate_argnums=(0, 1), compiler_options=FAST)
    before = params, state
    for g in GRADS:
        params, state = donating(params, state, g)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert_same_types(state, tx.init(params))


@each_wrapper
def test_state_of_a_parameter_is_found(name: str):
    # As sharding and checkpointing a state do.
    tx = WRAPPERS[name](ox.adamw(0.1))
    marked = optax.tree_map_params(
        tx, lambda _: "p", tx.init(PARAMS), transform_non_params=lambda _: "other"
    )
    assert marked.count == "other"
    if name == "stochastic":
        assert marked.kept == {}
    else:
        assert kept_of(marked) == jax.tree.map(lambda _: "p", PARAMS)


# Parameters that somebody else changes


@each_dtype
@each_wrapper
def test_parameters_win_over_the_state(name: str, dtype: str):
    tx = WRAPPERS[name](SGD)
    rng = np.random.default_rng(0)
    start = jnp.asarray(rng.uniform(1, 2, 64), dtype)
    grads = jnp.asarray(rng.standard_normal((3, 64)), jnp.float32)
    params, state = train(tx, start, grads[:2])
    weights = weights_of(name, params, state)
    is_changed = np.arange(64) % 2 == 0
    changed = jnp.where(is_changed, params * 0.75, params).astype(dtype)
    updates, after = tx.update(grads[2], state, changed)
    moved = optax.apply_updates(changed, updates)
    u = wide(grads[2]) * np.float32(-(2.0**-8))
    expected = np.where(is_changed, wide(changed), weights) + u
    # Changed ones start from what they were changed to, with 24 bits up to half of its
    # spacing, compensated up to half of that of the old one; the others from where they
    # were. The second term is what one step rounds.
    room = {"master24": changed, "compensated": params}.get(name)
    slack = 0.0 if room is None else 0.5 * is_changed * spacing(room, dtype)
    errors = np.abs(weights_of(name, moved, after) - expected)
    assert (errors <= slack + resolution(name, expected, dtype)).all()
    if name == "master32":
        np.testing.assert_array_equal(kept_of(after), expected)
    # The test sees the difference: it is 30 spacings.
    assert (np.abs(wide(changed) - wide(params))[is_changed] > 0.2).all()


@each_dtype
@each_wrapper
def test_a_pruned_parameter_starts_from_zero(name: str, dtype: str):
    tx = WRAPPERS[name](SGD)
    rng = np.random.default_rng(0)
    sign = rng.choice([-1.0, 1.0], 64)
    start = jnp.asarray(sign * rng.uniform(1, 2, 64), dtype)
    grads = jnp.asarray(rng.standard_normal((2, 64)), jnp.float32)
    params, state = train(tx, start, grads[:1])
    zeros = jnp.zeros_like(params) * params  # of both signs
    updates, after = tx.update(grads[1], state, zeros)
    moved = optax.apply_updates(zeros, updates)
    u = wide(grads[1]) * np.float32(-(2.0**-8))
    # With 24 bits a correction is that of a zero: nothing beside the update. What
    # `compensated` carries is at most half of a spacing of the old parameter.
    slack = 0.5 * spacing(params, dtype) if name == "compensated" else 0.0
    # In float16 the correction of 0 counts 2^-32, up to 128 of them.
    tiny = 2.0**-25 if (name, dtype) == ("master24", "float16") else 1e-37
    weights = weights_of(name, moved, after)
    errors = np.abs(weights - u)
    assert (errors <= slack + tiny + resolution(name, u, dtype)).all()


# What is not finite


@each_dtype
@each_wrapper
def test_nonfinite_updates_stay_where_they_are(name: str, dtype: str):
    tx = WRAPPERS[name](ox.sgd(1.0))
    params = jnp.linspace(-2, 2, 64, dtype=dtype)
    good = jnp.full(64, 2.0**-9)
    bad = good.at[1:4].set(jnp.asarray([jnp.nan, jnp.inf, -jnp.inf]))
    others = np.r_[0, 4:64]
    ends, state = train(tx, params, [bad])
    # As in float32.
    np.testing.assert_array_equal(wide(ends)[1:4], [np.nan, -np.inf, np.inf])
    ends, state = train(tx, params, [bad, good, good])
    assert not np.isfinite(wide(ends)[1:4]).any()
    # The others are what they are without them.
    clean, clean_state = train(tx, params, [good] * 3)
    for ours, theirs in zip(
        jax.tree.leaves((ends, state)),
        jax.tree.leaves((clean, clean_state)),
        strict=True,
    ):
        if ours.shape:
            np.testing.assert_array_equal(wide(ours)[others], wide(theirs)[others])


@each_dtype
@each_wrapper
def test_a_parameter_that_is_restored_goes_on(name: str, dtype: str):
    tx = WRAPPERS[name](SGD)
    params = jnp.linspace(-2, 2, 64, dtype=dtype)
    g = jnp.full(64, 2.0**4)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        _, state = train(tx, params, [g, g.at[7].set(bad)])
        updates, _ = tx.update(g, state, params)
        moved = wide(optax.apply_updates(params, updates))
        # A step of 2^-4, and what is on its way of less than a spacing at 2.
        room = 2 * spacing(2.0, dtype)
        np.testing.assert_allclose(moved, wide(params) - 2.0**-4, rtol=0, atol=room)


# A sign, an exponent of ones, and a payload: what x86, NVIDIA's and other devices make.
NANS = np.uint32([0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00001])


@each_dtype
@each_wrapper
def test_every_nan_stays_one(name: str, dtype: str):
    # No arithmetic on the way that might make another one.
    inner = optax.stateless(lambda updates, params: updates)
    params = jnp.linspace(-2, 2, 64, dtype=dtype)
    g = jnp.asarray(np.resize(NANS, 64).view(np.float32))
    ends, _ = train(WRAPPERS[name](inner), params, [g])
    assert np.isnan(wide(ends)).all()


@each_dtype
@each_wrapper
def test_overflow(name: str, dtype: str):
    tx = WRAPPERS[name](ox.sgd(1.0))
    largest = float(jnp.finfo(dtype).max)
    step = spacing(largest, dtype)
    params = jnp.where(jnp.arange(64) % 2, -largest, largest).astype(dtype)
    # Away from 0 by more than half of a spacing, and the last one towards it.
    away = jnp.where(params > 0, -0.75 * step, 0.75 * step)
    g = away.astype(jnp.float32).at[-1].set(-step)
    ends, state = train(tx, params, [g])
    expected = wide(params) * np.inf
    expected[-1] = step - largest
    np.testing.assert_array_equal(wide(ends), expected)
    if name in ("master24", "compensated"):
        assert not np.any(kept_of(state))
    # They never come back as numbers.
    ends, _ = train(tx, params, [g, -g])
    assert not np.isfinite(wide(ends)[:-1]).any()
    # The largest number is the nearest one up to half of its spacing beyond, and one of
    # the two between which a random choice would be is no number.
    ends, _ = train(tx, params, [g / 4])
    np.testing.assert_array_equal(wide(ends)[:-1], wide(params)[:-1])
