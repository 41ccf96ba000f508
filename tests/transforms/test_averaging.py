"""Lookahead: slow parameters by hand, what it reduces to, and its state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from tests.assertions import assert_same_types, assert_trees_close, assert_trees_equal
from tests.problems import gradients, normal_tree
from tests.trajectories import follow

SHAPES = {"w": (3, 4), "b": (4,), "s": ()}
STEPS = 7
PARAMS = normal_tree(SHAPES, seed=0)
TREES = gradients(SHAPES, steps=STEPS)
GRADS = jax.tree.map(lambda *g: jnp.stack(g), *TREES)


def train(tx, params, grads):
    """The parameters and states after every step."""
    state, history = tx.init(params), []
    for g in grads:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        history.append((params, state))
    return history


# By hand and reductions


def test_steps_by_hand():
    tx = ox.lookahead(ox.sgd(1.0), every_k=2, alpha=0.25)
    history = train(tx, jnp.zeros(()), [jnp.float32(-4.0)] * 5)
    # Fast steps of 4; every second one falls back to a quarter of the way.
    assert [float(p) for p, _ in history] == [4, 2, 6, 4, 8]
    assert [float(state.slow) for _, state in history] == [0, 2, 2, 4, 4]
    assert [int(state.steps_since_sync) for _, state in history] == [1, 0, 1, 0, 1]


def test_with_alpha_one_it_is_the_inner_optimizer():
    inner = ox.adamw(0.1, weight_decay=0.3)
    params, _ = follow(ox.lookahead(inner, every_k=2, alpha=1.0), PARAMS, GRADS)
    # p + ((p + u) - p) rounds three times.
    assert_trees_close(params, follow(inner, PARAMS, GRADS)[0], rtol=5e-7)


def test_with_k_one_every_step_is_shortened():
    inner = ox.scale_by_sign()
    tx = ox.lookahead(optax.chain(inner, ox.descend(0.25)), every_k=1, alpha=0.5)
    _, updates = follow(tx, PARAMS, GRADS)
    expected = jax.tree.map(lambda g: -0.125 * jnp.sign(g), GRADS)
    # The difference of two parameters of about 1 is 0.125 up to their last place.
    for ours, theirs in zip(
        jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("every_k", [1, 3])
def test_optax(every_k: int):
    ours = ox.lookahead(optax.adam(0.1), every_k=every_k, alpha=0.3)
    theirs = optax.lookahead(optax.adam(0.1), every_k, 0.3)
    expected = train(theirs, optax.LookaheadParams.init_synced(PARAMS), TREES)
    for (fast, state), (pair, _) in zip(
        train(ours, PARAMS, TREES), expected, strict=True
    ):
        # Float32 roundings of a few steps.
        assert_trees_close(fast, pair.fast, rtol=2e-6)
        assert_trees_close(state.slow, pair.slow, rtol=2e-6)


def test_inner_state_never_notices():
    # Gradients that do not depend on the parameters, no decay: the moments are Adam's.
    inner = ox.adam(0.1)
    (_, state) = train(ox.lookahead(inner, every_k=3), PARAMS, TREES)[-1]
    (_, expected) = train(inner, PARAMS, TREES)[-1]
    assert_trees_equal(state.inner_state, expected)


# The slow parameters


def test_slow_parameters_are_float32_and_found_by_name():
    params = {"x": jnp.ones(2, jnp.bfloat16), "z": jnp.ones(2, jnp.complex64)}
    tx = ox.chain_in_float32(ox.lookahead(ox.sgd(0.1), every_k=2))
    slow = optax.tree.get(tx.init(params), "slow")
    assert_trees_equal(slow, {"x": jnp.ones(2), "z": params["z"]})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_equal_the_slow_ones_after_every_kth_step(dtype: str):
    start = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    tx = ox.lookahead(ox.adamw(0.01), every_k=3)
    for t, (params, state) in enumerate(train(tx, start, TREES), start=1):
        widened = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        gap = jax.tree.map(lambda p, s: np.abs(p - s).max(), widened, state.slow)
        if t % 3:
            assert min(jax.tree.leaves(gap)) > 1e-3
        else:
            # The last place of the parameter's dtype, of numbers below 4.
            assert max(jax.tree.leaves(gap)) <= 4 * float(jnp.finfo(dtype).eps)


def test_slow_parameters_keep_what_bfloat16_would_round_away():
    # Each synchronisation moves them by 2^-11, an eighth of a unit of bfloat16 at 1.
    tx = ox.lookahead(ox.sgd(1.0), every_k=1, alpha=0.5)
    params = jnp.ones((), jnp.bfloat16)
    _, state = tx.update(jnp.float32(-(2.0**-10)), tx.init(params), params)
    np.testing.assert_array_equal(state.slow, np.float32(1 + 2.0**-11))


def test_parameters_and_state_may_be_donated():
    tx = ox.lookahead(ox.adamw(0.1), every_k=2)

    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.array, PARAMS)
    state = tx.init(params)
    before = params, state
    # A buffer that both shared could not be donated twice, and a warning is an error.
    donating = jax.jit(step, donate_argnums=(0, 1))
    for g in TREES:
        params, state = donating(params, state, g)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    expected, _ = train(tx, PARAMS, TREES)[-1]
    # Float32 roundings that fusion may order differently.
    assert_trees_close(params, expected, rtol=2e-6)


def test_types_are_stable():
    tx = ox.lookahead(ox.adamw(0.1), every_k=2)
    start = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    state = tx.init(start)
    updates, after = jax.eval_shape(tx.update, start, state, start)
    assert_same_types(after, jax.eval_shape(lambda: state))
    assert {u.dtype.name for u in jax.tree.leaves(updates)} == {"float32"}


def test_extra_arguments_reach_the_inner_optimizer():
    def update(updates, state, params=None, *, value, **extra_args):
        return jax.tree.map(lambda g: g * value, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = ox.lookahead(inner, every_k=2)
    g = jnp.ones(2)
    updates, _ = tx.update(g, tx.init(g), g, value=3.0, other=None)
    np.testing.assert_array_equal(updates, [3.0, 3.0])


# Errors


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (TypeError, {"inner": None}, "inner=None is not allowed; .*GradientTransf"),
        (TypeError, {"inner": ox.adam}, "inner=<function adam"),
        (ValueError, {"every_k": 0}, "every_k=0 is not allowed; .* integer >= 1"),
        (TypeError, {"every_k": 2.0}, "every_k=2.0 is not allowed; .* integer >= 1"),
        (
            TypeError,
            {"every_k": jnp.asarray(2)},
            r"every_k shapes the compiled program .* static_args=\('every_k',\)",
        ),
        (ValueError, {"alpha": 0.0}, "alpha=0.0 is not allowed; .* > 0"),
        (ValueError, {"alpha": 1.5}, "alpha=1.5 is not allowed; .* at most 1"),
        (TypeError, {"alpha": "0.5"}, "alpha='0.5' is not allowed"),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message: str):
    with pytest.raises(error, match=f"lookahead: {message}"):
        ox.lookahead(**{"inner": ox.adam(0.1), **arguments})


def test_params_are_needed():
    tx = ox.lookahead(ox.adam(0.1))
    with pytest.raises(ValueError, match="lookahead: params=None is not allowed"):
        tx.update(TREES[0], tx.init(PARAMS))


def test_wrong_parameters_are_refused():
    message = "lookahead: parameter 'n' of dtype int32 is not allowed"
    with pytest.raises(TypeError, match=message):
        ox.lookahead(optax.identity()).init({"n": jnp.ones(2, jnp.int32)})
