"""Gradient accumulation: one batch of the mean, and nothing of the inner in between."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from tests.assertions import assert_same_types, assert_trees_close, assert_trees_equal
from tests.branches import assert_products_only_in_branches
from tests.problems import normal_tree
from tests.trajectories import follow

SHAPES = {"w": {"kernel": (4, 3)}, "b": (3,)}
EVERY_K = 3
PARAMS = normal_tree(SHAPES, seed=0)
MICRO = [normal_tree(SHAPES, seed=seed) for seed in range(1, 2 * EVERY_K + 1)]
STACKED = jax.tree.map(lambda *g: jnp.stack(g), *MICRO)
# The mean gradient of every batch of micro-batches.
BATCHES = jax.tree.map(
    lambda g: g.reshape(2, EVERY_K, *g.shape[1:]).mean(axis=1), STACKED
)

INNERS = {
    "adamw": ox.adamw(0.1, weight_decay=0.3),
    "lion": ox.lion(0.01, mu_dtype="bfloat16"),
    "muon": ox.muon(0.1, compute_dtype="float32"),
    "clipped": optax.chain(ox.clip_by_global_norm(0.5), ox.sgd(0.1, momentum=0.9)),
    "schedule": ox.sgd(optax.linear_schedule(0.1, 0.0, 2), momentum=0.9),
    "optax": optax.adamw(0.1),
}


# Equivalence


@pytest.mark.parametrize("name", INNERS)
def test_micro_batches_equal_one_batch_of_the_mean(name: str):
    params, updates = follow(ox.accumulate(INNERS[name], EVERY_K), PARAMS, STACKED)
    expected, _ = follow(INNERS[name], PARAMS, BATCHES)
    ends = jax.tree.map(lambda p: p[EVERY_K - 1 :: EVERY_K], params)
    # The mean rounds in another order, and Newton-Schulz amplifies that.
    assert_trees_close(ends, expected, rtol=2e-5 if name == "muon" else 1e-6)
    for u in jax.tree.leaves(updates):
        moved = np.abs(u).reshape(2 * EVERY_K, -1).max(axis=1) > 0
        np.testing.assert_array_equal(moved, [False, False, True] * 2)


def test_every_gradient_is_the_inner_optimizer():
    inner = INNERS["adamw"]
    # The same operations on g / 1; fusion may order them differently.
    assert_trees_close(
        follow(ox.accumulate(inner, 1), PARAMS, STACKED)[0],
        follow(inner, PARAMS, STACKED)[0],
        rtol=1e-6,
    )


def test_optax():
    inner = optax.adamw(0.1)
    theirs = optax.MultiSteps(inner, EVERY_K).gradient_transformation()
    # optax keeps a running mean: other roundings.
    assert_trees_close(
        follow(ox.accumulate(inner, EVERY_K), PARAMS, STACKED)[0],
        follow(theirs, PARAMS, STACKED)[0],
        rtol=1e-6,
    )


def test_resumed_with_fewer_micro_batches():
    g, tx = jnp.ones(2), ox.accumulate(ox.sgd(0.1), every_k=4)
    state = tx.init(g)
    for _ in range(3):
        _, state = tx.update(g, state)
    # The mean of the four that have come, and then of two.
    shorter = ox.accumulate(ox.sgd(0.1), every_k=2)
    for _ in range(2):
        updates, state = shorter.update(g, state)
        np.testing.assert_allclose(updates, -0.1, rtol=1e-6)
        _, state = shorter.update(g, state)


# The state


def test_inner_state_waits_and_counts_updates():
    inner = ox.adamw(optax.constant_schedule(0.1))
    tx = ox.accumulate(inner, EVERY_K)
    state = tx.init(PARAMS)
    assert_trees_equal(state.inner_state, inner.init(PARAMS))
    total = jax.tree.map(jnp.zeros_like, PARAMS)
    for step, g in enumerate(MICRO, start=1):
        before = state
        _, state = tx.update(g, state, PARAMS)
        assert state.micro_step == step % EVERY_K
        adam, descent = state.inner_state
        assert (adam.count, descent.count) == (step // EVERY_K,) * 2
        if step % EVERY_K:
            assert_trees_equal(state.inner_state, before.inner_state)
            total = jax.tree.map(jnp.add, total, g)
        else:
            total = jax.tree.map(jnp.zeros_like, total)
        assert_trees_equal(state.grad_sum, total)


def test_narrow_sums():
    tx = ox.accumulate(ox.sgd(1.0), 4, accumulator_dtype="bfloat16")
    state = tx.init(jnp.ones(()))
    assert state.grad_sum.dtype == jnp.bfloat16
    # 1/512 beside 1 is rounded away in each of the first three steps, not in the last.
    for g in (1.0, 2.0**-9, 2.0**-9, 2.0**-9):
        updates, state = tx.update(jnp.float32(g), state)
    np.testing.assert_array_equal(updates, -np.float32(1 + 2.0**-9) / 4)


def test_low_precision_gradients_are_summed_in_float32():
    tx = ox.accumulate(ox.sgd(1.0), 2)
    state = tx.init(jnp.ones((), jnp.bfloat16))
    assert state.grad_sum.dtype == jnp.float32
    for g in (1.0, 2.0**-9):
        updates, state = tx.update(jnp.bfloat16(g), state)
    # The inner optimizer sees, and so emits, float32.
    assert updates.dtype == jnp.float32
    np.testing.assert_array_equal(updates, -np.float32(1 + 2.0**-9) / 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "optax"])
def test_types_are_stable(name: str, dtype: str):
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    # optax's moments take the dtype of the gradients that they meet.
    inner = optax.adamw(0.1) if name == "optax" else INNERS[name]
    tx = ox.accumulate(inner, EVERY_K)
    # No compilation: types alone.
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    assert_same_types(after, state)
    assert {u.dtype.name for u in jax.tree.leaves(updates)} == {"float32"}


def test_parameters_and_state_may_be_donated():
    tx = ox.accumulate(INNERS["adamw"], EVERY_K)

    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.array, PARAMS)
    state = tx.init(params)
    before = params, state
    # A buffer that cannot be donated makes a warning, which is an error.
    donating = jax.jit(step, donate_argnums=(0, 1))
    for g in MICRO:
        params, state = donating(params, state, g)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    expected, _ = follow(tx, PARAMS, STACKED)
    # Float32 roundings that fusion may order differently.
    assert_trees_close(params, jax.tree.map(lambda p: p[-1], expected), rtol=1e-6)


# What runs when


def test_the_other_steps_multiply_no_matrices():
    # Ours chooses by platform and scale, which are branches too.
    inner = optax.contrib.muon(0.1)
    assert_products_only_in_branches(ox.accumulate(inner, EVERY_K), inner, PARAMS)


def test_extra_arguments_of_the_last_call_count():
    def update(updates, state, params=None, *, value, **extra_args):
        return jax.tree.map(lambda g: g * value, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = ox.accumulate(inner, 2)
    state = tx.init(jnp.ones(2))
    first, state = tx.update(jnp.ones(2), state, value=10.0, other=None)
    second, state = tx.update(jnp.full(2, 3.0), state, value=100.0, other=None)
    np.testing.assert_array_equal(first, [0.0, 0.0])
    np.testing.assert_array_equal(second, [200.0, 200.0])


def test_params_of_the_last_call_count():
    tx = ox.accumulate(ox.descend(1.0, 0.5), 2)
    state = tx.init(jnp.ones(()))
    _, state = tx.update(jnp.zeros(()), state, jnp.float32(8.0))
    updates, _ = tx.update(jnp.zeros(()), state, jnp.float32(2.0))
    np.testing.assert_array_equal(updates, np.float32(-1.0))


def test_vmap():
    # Members of an ensemble that are at different micro-steps.
    tx = ox.accumulate(ox.adamw(0.1), 2)
    params = normal_tree((3, 4), seed=1)
    state = jax.vmap(tx.init)(params)._replace(micro_step=jnp.asarray([0, 1, 0]))
    updates, after = jax.vmap(tx.update)(params, state, params)
    np.testing.assert_array_equal(after.micro_step, [1, 0, 1])
    np.testing.assert_array_equal(after.inner_state[0].count, [0, 1, 0])
    for member in range(3):
        one = jax.tree.map(lambda x, i=member: x[i], (params, state))
        expected, _ = tx.update(one[0], one[1], one[0])
        # Float32 roundings that vectorisation may order differently.
        assert_trees_close(updates[member], expected, rtol=1e-6)


# Errors


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (TypeError, {"inner": None}, "inner=None is not allowed; .*GradientTransf"),
        (TypeError, {"inner": ox.adamw}, "inner=<function adamw"),
        (ValueError, {"every_k": 0}, "every_k=0 is not allowed; .* integer >= 1"),
        (TypeError, {"every_k": 2.0}, "every_k=2.0 is not allowed; .* integer >= 1"),
        (TypeError, {"every_k": True}, "every_k=True is not allowed"),
        (TypeError, {"accumulator_dtype": "int8"}, "accumulator_dtype='int8' is not"),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message: str):
    with pytest.raises(error, match=f"accumulate: {message}"):
        ox.accumulate(**{"inner": ox.adamw(0.1), "every_k": 2, **arguments})


def test_a_traced_length_names_the_remedy():
    message = (
        r"accumulate: every_k shapes the compiled program .* "
        r"optax.inject_hyperparams pass static_args=\('every_k',\)"
    )
    with pytest.raises(TypeError, match=message):
        ox.accumulate(ox.adamw(0.1), jnp.asarray(2))
    with pytest.raises(TypeError, match=message):
        jax.jit(lambda k: ox.accumulate(ox.adamw(0.1), k).init(PARAMS))(2)


def test_wrong_parameters_are_refused():
    message = "accumulate: parameter 'n' of dtype int32 is not allowed"
    with pytest.raises(TypeError, match=message):
        ox.accumulate(optax.identity(), 2).init({"n": jnp.ones(2, jnp.int32)})


def test_params_are_needed_where_the_inner_optimizer_needs_them():
    tx = ox.accumulate(ox.adamw(0.1), 2)
    with pytest.raises(ValueError, match="adamw: params=None is not allowed"):
        tx.update(PARAMS, tx.init(PARAMS))
