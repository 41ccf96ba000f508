"""Loss scaling: its state, how it is read, in other wrappers, and refusals."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from tests.assertions import assert_same_types, assert_trees_equal
from tests.precision.scaled_losses import (
    FAST,
    GRADS,
    INNERS,
    PARAMS,
    SHAPES,
    compiled,
    scaled,
    spoiled,
)
from tests.problems import cast, normal_tree
from tests.trajectories import run

# State


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "mixed"])
def test_types_are_stable(inner: str, dtype: str):
    tx = ox.dynamic_loss_scale(INNERS[inner])
    params = {
        **cast(normal_tree(SHAPES, seed=0), dtype),
        "empty": jnp.zeros((0, 3), jnp.float16),
        "none": None,
        "masked": optax.MaskedNode(),
    }
    # No compilation: types alone.
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    assert_same_types(after, state)
    assert {u.dtype.name for u in jax.tree.leaves(updates)} == {"float32"}
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_compiled_once_while_the_scale_changes():
    tx = ox.dynamic_loss_scale(ox.sgd(0.1, momentum=0.9), growth_interval=2)
    update = jax.jit(tx.update, compiler_options=FAST)
    params, state, scales = jnp.ones(2), tx.init(jnp.ones(2)), []
    for value in (1.0, 1.0, jnp.nan, 1.0):
        _, state = update(jnp.full(2, value), state, params)
        scales.append(float(ox.loss_scale(state)))
    assert scales == [65536, 131072, 65536, 65536]
    assert update._cache_size() == 1


def test_parameters_and_state_may_be_donated():
    inner = ox.lookahead(ox.adamw(0.1), every_k=2)
    tx = ox.dynamic_loss_scale(inner)
    params = jax.tree.map(jnp.array, PARAMS)
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
    for g in (GRADS[0], spoiled(GRADS[1]), GRADS[2]):
        params, state = donating(params, state, g)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert ox.skipped_steps(state) == 1


def test_no_parameters():
    tx = ox.dynamic_loss_scale(ox.sgd(1.0), growth_interval=1)
    for empty in ({}, None, {"empty": jnp.zeros((0, 3), jnp.float16)}):
        updates, state = tx.update(empty, tx.init(empty), empty)
        assert jax.tree.structure(updates) == jax.tree.structure(empty)
        assert (ox.loss_scale(state), ox.skipped_steps(state)) == (131072, 0)


# Reading it


def test_it_is_found_in_any_nesting():
    params = {"a": jnp.ones(2, jnp.float16), "b": jnp.ones(2, jnp.float16)}
    tx = ox.dynamic_loss_scale(ox.sgd(1.0), init_scale=8.0)
    nestings = [
        tx,
        optax.chain(optax.identity(), tx),
        ox.master_weights(tx),
        ox.compensated(optax.chain(tx)),
        optax.partition({"a": tx, "b": ox.adam(0.1)}, {"a": "a", "b": "b"}),
        optax.masked(tx, {"a": True, "b": False}),
        optax.MultiSteps(tx, 2),
        ox.accumulate(tx, 2),
        ox.dynamic_loss_scale(ox.accumulate(ox.sgd(1.0), 2), init_scale=8.0),
        ox.quantize_state(ox.dynamic_loss_scale(ox.adam(0.1), init_scale=8.0)),
    ]
    for nesting in nestings:
        state = nesting.init(params)
        assert (ox.loss_scale(state), ox.skipped_steps(state)) == (8.0, 0)
        # Beside other things as well.
        assert ox.loss_scale({"params": params, "opt_state": state}) == 8.0


@pytest.mark.parametrize("function", ["loss_scale", "skipped_steps"])
def test_there_must_be_one(function: str):
    read = getattr(ox, function)
    state = ox.dynamic_loss_scale(ox.sgd(1.0)).init(jnp.ones(2))
    for count, wrong in ((0, ox.adam(0.1).init(PARAMS)), (0, ()), (2, (state, state))):
        message = (
            f"{function}: the state has {count} loss scales in it; it must have one, "
            "from ox.dynamic_loss_scale"
        )
        with pytest.raises(ValueError, match=message):
            read(wrong)


# Inside and around


WEIGHTS = {
    "master32": ox.master_weights,
    "master24": partial(ox.master_weights, bits=24),
    "stochastic": ox.stochastic_rounding,
    "compensated": ox.compensated,
}


@pytest.mark.parametrize("place", ["inside", "around"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_keep_their_updates(name: str, place: str):
    wrap, inner = WEIGHTS[name], ox.sgd(2.0**-8, momentum=0.5)
    if place == "inside":  # of the loss scale
        tx = ox.dynamic_loss_scale(wrap(inner))
    else:
        tx = wrap(ox.dynamic_loss_scale(inner))
    tx = compiled(tx)
    params = alone = jnp.linspace(-1, 1, 64, dtype=jnp.float16)
    state, alone_state = tx.init(params), wrap(inner).init(params)
    grads = jnp.asarray(np.random.default_rng(0).standard_normal((3, 64)), jnp.float32)
    for is_finite, g in zip((True, False, True), grads, strict=True):
        before = params
        g = g if is_finite else g.at[5].set(jnp.nan)
        updates, state = tx.update(scaled(g, state), state, params)
        params = optax.apply_updates(params, updates)
        if is_finite:
            updates, alone_state = wrap(inner).update(g, alone_state, alone)
            alone = optax.apply_updates(alone, updates)
            assert_trees_equal(params, alone)
        else:
            assert_trees_equal(params, before)
            # Noise counts the calls of the wrapper, where it is around this one too.
            if place == "around" and "count" in alone_state._fields:
                alone_state = alone_state._replace(count=alone_state.count + 1)
    assert ox.skipped_steps(state) == 1


@pytest.mark.parametrize("place", ["inside", "around"])
def test_accumulated_micro_batches(place: str):
    inner = ox.sgd(0.25, momentum=0.5)
    if place == "inside":
        tx = ox.dynamic_loss_scale(ox.accumulate(inner, 2), growth_interval=3)
    else:
        tx = ox.accumulate(ox.dynamic_loss_scale(inner, growth_interval=3), 2)
    tx = compiled(tx)
    state = tx.init(PARAMS)
    micro = [GRADS[0], GRADS[1], spoiled(GRADS[2]), GRADS[2], GRADS[0]]
    emitted = []
    for g in micro:
        updates, state = tx.update(scaled(g, state), state, PARAMS)
        emitted.append(updates)
    # Two and two of: (0, 1), then inside (2, 0), because one micro-batch alone is
    # skipped; around, a batch with what is not finite in it is skipped, and 0 waits.
    batches = [GRADS[:2], [GRADS[2], GRADS[0]]][: 2 if place == "inside" else 1]
    means = [jax.tree.map(lambda a, b: (a + b) / 2, *pair) for pair in batches]
    expected, _ = run(inner, PARAMS, means)
    moving = [u for u in emitted if any(np.any(x) for x in jax.tree.leaves(u))]
    assert len(moving) == len(expected)
    for ours, theirs in zip(moving, expected, strict=True):
        # Halves, and multiplications by powers of two, are exact.
        assert_trees_equal(ours, theirs)
    assert ox.skipped_steps(state) == 1
    # Inside it sees every micro-batch, two good ones since the bad one; around, half
    # of them: a good one and a bad one.
    finite_steps = optax.tree.get(state, "finite_steps")
    assert (finite_steps, ox.loss_scale(state)) == (
        (2, 32768) if place == "inside" else (0, 32768)
    )


def test_injected_hyperparameters():
    factory = optax.inject_hyperparams(
        ox.dynamic_loss_scale,
        static_args=("growth_interval",),
        hyperparam_dtype=jnp.float32,
    )
    tx = factory(ox.sgd(1.0), growth_interval=1)
    params = jnp.ones(2, jnp.float16)
    state = tx.init(params)
    # Changed between steps, without compiling again.
    update = jax.jit(tx.update, compiler_options=FAST)
    scales = []
    for growth, backoff, g in ((2.0, 0.5, 1.0), (4.0, 0.5, 1.0), (4.0, 0.125, np.nan)):
        state.hyperparams.update(
            growth_factor=jnp.float32(growth), backoff_factor=jnp.float32(backoff)
        )
        _, state = update(jnp.full(2, g), state, params)
        scales.append(float(ox.loss_scale(state)))
    assert scales == [131072, 524288, 65536]
    assert update._cache_size() == 1


# Errors


def test_two_of_them_are_refused():
    inner = optax.chain(optax.clip(1.0), ox.dynamic_loss_scale(ox.sgd(1.0)))
    message = "dynamic_loss_scale: inner scales losses already; keep the outer one"
    with pytest.raises(ValueError, match=message):
        ox.dynamic_loss_scale(inner).init(PARAMS)
    with pytest.raises(ValueError, match=message):
        ox.dynamic_loss_scale(ox.master_weights(inner)).init(PARAMS)


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (TypeError, {"inner": None}, "inner=None is not allowed; .*GradientTransf"),
        (TypeError, {"inner": ox.adamw}, "inner=<function adamw"),
        (ValueError, {"init_scale": 0.0}, "init_scale=0.0 is not allowed; .* > 0"),
        (ValueError, {"init_scale": np.inf}, "init_scale=inf is not allowed; .* > 0"),
        (TypeError, {"init_scale": "auto"}, "init_scale='auto' is not allowed"),
        (ValueError, {"growth_factor": 0.5}, "growth_factor=0.5 is .*; .* at least 1"),
        (ValueError, {"growth_factor": np.nan}, "growth_factor=nan is not allowed"),
        (TypeError, {"growth_factor": None}, "growth_factor=None is not allowed"),
        (ValueError, {"backoff_factor": 0.0}, r"backoff_factor=0.0 is .* \(0, 1\)"),
        (ValueError, {"backoff_factor": 1.0}, r"backoff_factor=1.0 is .* \(0, 1\)"),
        (TypeError, {"backoff_factor": True}, "backoff_factor=True is not allowed"),
        (ValueError, {"growth_interval": 0}, "growth_interval=0 is .* integer >= 1"),
        (TypeError, {"growth_interval": 2.0}, "growth_interval=2.0 is .* integer >= 1"),
        (
            TypeError,
            {"growth_interval": jnp.asarray(2)},
            r"growth_interval shapes the .* static_args=\('growth_interval',\)",
        ),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message: str):
    with pytest.raises(error, match=f"dynamic_loss_scale: {message}"):
        ox.dynamic_loss_scale(**{"inner": ox.sgd(1.0), **arguments})


def test_params_are_needed_where_inner_needs_them():
    tx = ox.dynamic_loss_scale(ox.adamw(0.1))
    with pytest.raises(ValueError, match="adamw: params=None is not allowed"):
        tx.update(PARAMS, tx.init(PARAMS))
