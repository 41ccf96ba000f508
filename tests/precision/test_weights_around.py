"""Weights in low precision in other wrappers; their noise and their refusals."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState

import optaxplus as ox
from tests.assertions import assert_trees_equal
from tests.precision.weight_rules import (
    FAST,
    GRADS,
    PARAMS,
    SGD,
    WIDE_GRADS,
    WRAPPERS,
    each_dtype,
    each_wrapper,
    kept_of,
    resolution,
    train,
    weights_of,
    wide,
)
from tests.trajectories import updates_at

# Inside and around


@each_wrapper
def test_extra_arguments_reach_inner(name: str):
    def update(updates, state, params=None, *, value, **extra_args):
        return jax.tree.map(lambda g: g * value, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = WRAPPERS[name](inner)
    params = jnp.ones(64, jnp.bfloat16)
    g = jnp.ones_like(params)
    updates, _ = tx.update(g, tx.init(params), params, value=3.0, other=None)
    np.testing.assert_array_equal(updates, np.full(64, 3.0))
    # An inner that takes none is not given any.
    plain = WRAPPERS[name](ox.sgd(1.0))
    updates, _ = plain.update(g, plain.init(params), params, value=3.0)
    np.testing.assert_array_equal(updates, np.full(64, -1.0))


@each_wrapper
def test_masked(name: str):
    params = {"w": jnp.ones(64, jnp.bfloat16), "steps": jnp.zeros((), jnp.int32)}
    tx = optax.masked(WRAPPERS[name](SGD), {"w": True, "steps": False})
    alone, _ = train(WRAPPERS[name](SGD), params["w"], [params["w"]] * 3)
    ends, _ = train(tx, params, [params] * 3)
    assert_trees_equal(ends, {"w": alone, "steps": params["steps"]})


def test_partition_with_a_wrapper_for_each_group():
    inner = ox.adamw(0.01, weight_decay=0.1)
    params = {name: PARAMS for name in WRAPPERS}
    tx = optax.partition(
        {name: wrap(inner) for name, wrap in WRAPPERS.items()},
        {name: name for name in WRAPPERS},
    )
    ends, _ = train(tx, params, [{name: g for name in WRAPPERS} for g in GRADS])
    for name, wrap in WRAPPERS.items():
        alone, _ = train(wrap(inner), PARAMS, GRADS)
        assert_trees_equal(ends[name], alone)


def bad_gradient(g: Any) -> Any:
    return {**g, "scale": jnp.full_like(g["scale"], jnp.nan)}


# optax.apply_if_finite around takes no update of another dtype than the gradient's.


@pytest.mark.parametrize("place", ["inside", "around"])
@each_wrapper
def test_nonfinite_gradients_may_be_skipped(name: str, place: str):
    guarded = partial(optax.apply_if_finite, max_consecutive_errors=3)
    inner, wrap = ox.sgd(0.25, momentum=0.9, weight_decay=0.3), WRAPPERS[name]
    tx = wrap(guarded(inner)) if place == "inside" else guarded(wrap(inner))
    # Not compiled, optax's branches would be compiled in every call.
    tx = tx._replace(update=jax.jit(tx.update, compiler_options=FAST))
    first, second, _ = WIDE_GRADS
    params, state = train(tx, PARAMS, [first])
    updates, after = tx.update(bad_gradient(second), state, params)
    assert_trees_equal(optax.apply_updates(params, updates), params)
    assert_trees_equal(
        jax.tree.map(wide, weights_of(name, params, unguarded(after, place))),
        jax.tree.map(wide, weights_of(name, params, unguarded(state, place))),
    )
    # The next good one is taken.
    updates, _ = tx.update(second, after, params)
    assert np.any(updates["kernel"])


def unguarded(state: Any, place: str) -> Any:
    return state if place == "inside" else state.inner_state


@pytest.mark.parametrize(
    "name",
    [
        "master32",
        "master24",
        "stochastic",
        "compensated",
    ],
)
def test_zero_updates_move_nothing(name: str):
    # An odd number, so that a tie rounds away from it; a little less than half of the
    # spacing above it is lost, and is half of it in bfloat16.
    params = jnp.full(64, 1 + 2.0**-7, jnp.bfloat16)
    tx = WRAPPERS[name](ox.sgd(1.0))
    lost = jnp.full(64, -(2.0**-8) + 2.0**-18)
    moved, state = train(tx, params, [lost])
    updates, _ = tx.update(jnp.zeros(64), state, moved)
    assert_trees_equal(optax.apply_updates(moved, updates), moved)


@each_wrapper
def test_multi_steps_around(name: str):
    tx = optax.MultiSteps(WRAPPERS[name](SGD), every_k_schedule=2)
    params, state = PARAMS, tx.init(PARAMS)
    update = jax.jit(tx.update, compiler_options=FAST)
    expected, _ = train(WRAPPERS[name](SGD), PARAMS, WIDE_GRADS[:2])
    for g in WIDE_GRADS[:2]:
        updates, state = update(g, state, params)
        assert not any(np.any(u) for u in jax.tree.leaves(updates))
        # The mean of two equal gradients is exact.
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    assert_trees_equal(params, expected)


@pytest.mark.parametrize("place", ["inside", "around"])
@each_wrapper
def test_accumulated_micro_batches_equal_one_batch(name: str, place: str):
    wrap = WRAPPERS[name]
    accumulated = partial(ox.accumulate, every_k=2)
    tx = wrap(accumulated(SGD)) if place == "inside" else accumulated(wrap(SGD))
    params, state = PARAMS, tx.init(PARAMS)
    update = jax.jit(tx.update, compiler_options=FAST)
    micro = [GRADS[0], GRADS[1], GRADS[2], GRADS[0]]
    for step, g in enumerate(micro):
        before = params
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        if step % 2 == 0:
            assert_trees_equal(params, before)
    # Means of two numbers in bfloat16 are exact in float32.
    means = [
        jax.tree.map(lambda a, b: (jnp.float32(a) + jnp.float32(b)) / 2, *pair)
        for pair in (micro[:2], micro[2:])
    ]
    expected, expected_state = train(wrap(SGD), PARAMS, means)
    if place == "around" or name in ("master32", "compensated"):
        assert_trees_equal(params, expected)
        state = state if place == "inside" else state.inner_state
        assert_trees_equal(
            weights_of(name, params, state),
            weights_of(name, expected, expected_state),
        )
    else:
        # Noise counts the calls of `update`, of which there are twice as many: two
        # numbers for which two steps rounded otherwise.
        for ours, theirs in zip(
            jax.tree.leaves(params), jax.tree.leaves(expected), strict=True
        ):
            room = 2 * resolution("stochastic", theirs, "bfloat16")
            assert (np.abs(wide(ours) - wide(theirs)) <= room).all()


@each_wrapper
def test_injected_hyperparameters_stay_float32(name: str):
    # On bfloat16 parameters optax rounds them: a decay rate of 0.999 becomes 1.
    injected = optax.inject_hyperparams(ox.adamw)(learning_rate=0.1)
    tx = WRAPPERS[name](injected)
    _, state = train(tx, PARAMS, GRADS[:1])
    values = state.inner_state.hyperparams
    assert {value.dtype.name for value in values.values()} == {"float32"}
    assert values["learning_rate"] == np.float32(0.1)
    assert values["b2"] == np.float32(0.999)
    # They may be changed between steps: without a learning rate nothing moves.
    params, state = train(tx, PARAMS, GRADS[:1])
    values["learning_rate"] = jnp.zeros(())
    state = state._replace(inner_state=state.inner_state._replace(hyperparams=values))
    updates, _ = tx.update(GRADS[1], state, params)
    assert_trees_equal(optax.apply_updates(params, updates), params)


@each_wrapper
def test_flax_train_state(name: str):
    tx = WRAPPERS[name](ox.adamw(0.01))
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    for g in GRADS:
        state = state.apply_gradients(grads=g)
    expected, opt_state = train(tx, PARAMS, GRADS)
    assert_trees_equal(state.params, expected)
    assert_trees_equal(state.opt_state, opt_state)


# Noise


def rounded_up(seed: int, shape: Any, part: Any, *, steps: int, dtype="bfloat16"):
    """For every step and entry whether 1 plus a part of its spacing was rounded up."""
    part = jnp.asarray(part, jnp.float32)
    gap = float(jnp.finfo(dtype).eps)
    params = jax.tree.map(
        lambda shape: jnp.ones(shape, dtype),
        shape,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    grads = jax.tree.map(
        lambda p: jnp.broadcast_to(-gap * part, (steps, *p.shape)), params
    )
    tx = ox.stochastic_rounding(ox.sgd(1.0), seed=seed)
    updates = updates_at(tx, params, grads)
    assert all(np.isin(u, [0.0, gap]).all() for u in jax.tree.leaves(updates))
    return jax.tree.map(lambda u: np.asarray(u > 0), updates)


@each_dtype
def test_rounding_is_right_on_average(dtype: str):
    steps, size = 16, 2**13
    parts = np.float32([1 / 32, 0.25, 0.5, 0.875])[:, None]
    up = rounded_up(0, (4, size), parts, steps=steps, dtype=dtype)
    # 131,072 trials, five deviations: 0.007 of a spacing at a half, 0.0024 at 1/32.
    deviation = np.sqrt(parts[:, 0] * (1 - parts[:, 0]) / (steps * size))
    assert (np.abs(up.mean(axis=(0, 2)) - parts[:, 0]) <= 5 * deviation).all()
    # Counts over the steps vary as those of independent ones do: noise that repeats
    # would multiply the variance by 16, one that took turns would lower it. The
    # variance of 8192 counts is known to 1.6 %, at 1/32 to 2.3 %; five times that.
    variance = up.sum(axis=0).var(axis=1) / (steps * (parts * (1 - parts))[:, 0])
    np.testing.assert_allclose(variance, 1.0, atol=0.12)
    # Beside each other, in either direction, and from step to step.
    halves = up[:, 2] - 0.5
    for axis in (0, 1):
        ahead, behind = (
            np.take(halves, np.arange(start, halves.shape[axis] + start - 1), axis)
            for start in (0, 1)
        )
        # Correlations of 120,000 pairs: five deviations.
        assert abs(4 * np.mean(ahead * behind)) <= 5 / np.sqrt(ahead.size)


def test_noise_differs_by_leaf_step_and_seed_and_repeats():
    size = 2**12
    tree = {"a": (size,), "b": (size,)}
    up = rounded_up(0, tree, 0.5, steps=2)
    again = rounded_up(0, tree, 0.5, steps=2)
    other = rounded_up(1, tree, 0.5, steps=2)
    np.testing.assert_array_equal(up["a"], again["a"])
    np.testing.assert_array_equal(up["b"], again["b"])
    samples = [up["a"][0], up["a"][1], up["b"][0], up["b"][1]]
    samples += [other["a"][0], other["a"][1], other["b"][0], other["b"][1]]
    for i, x in enumerate(samples):
        for y in samples[:i]:
            # Half of the entries agree, 4096 of them: five deviations.
            assert abs(np.mean(x == y) - 0.5) <= 5 * 0.5 / np.sqrt(size)


def test_seeds_of_24_bits():
    # Below 1 a unit of 24 bits is 2^-16.
    params, unit = jnp.ones(64, jnp.bfloat16), jnp.full(64, 2.0**-16)

    def correction(seed: int, g: jax.Array) -> jax.Array:
        tx = ox.master_weights(ox.sgd(1.0), bits=24, seed=seed)
        return kept_of(train(tx, params, [g])[1])

    halves = [correction(seed, unit / 2) for seed in (0, 0, 1, 2**40 + 5)]
    np.testing.assert_array_equal(halves[0], halves[1])
    assert len({tuple(map(int, x)) for x in halves}) == 3
    assert all(set(map(int, x)) == {0, -1} for x in halves)
    # What needs no rounding needs no noise.
    for seed in (0, 1):
        np.testing.assert_array_equal(correction(seed, unit), np.full(64, -1))


def test_noise_is_the_same_for_all_members_of_a_vmap():
    tx = ox.stochastic_rounding(ox.sgd(2.0**-9))
    params = jnp.ones((3, 64), jnp.bfloat16)
    update = jax.jit(jax.vmap(tx.update), compiler_options=FAST)
    updates, _ = update(params, jax.vmap(tx.init)(params), params)
    alone, _ = tx.update(params[0], tx.init(params[0]), params[0])
    np.testing.assert_array_equal(updates, np.broadcast_to(alone, (3, 64)))
    assert len(np.unique(updates)) == 2


# Errors


@pytest.mark.parametrize("inside", WRAPPERS)
@each_wrapper
def test_two_wrappers_are_refused(name: str, inside: str):
    function = {"stochastic": "stochastic_rounding", "compensated": "compensated"}
    message = (
        f"{function.get(name, 'master_weights')}: inner decides "
        "already how weights are rounded; keep one of master_weights, "
        "stochastic_rounding and compensated, outermost"
    )
    inner = optax.chain(optax.clip(1.0), WRAPPERS[inside](ox.sgd(0.1)))
    with pytest.raises(ValueError, match=message):
        WRAPPERS[name](inner).init(PARAMS)
    group = optax.partition({"a": inner, "b": ox.sgd(0.1)}, lambda p: "a")
    with pytest.raises(ValueError, match=message):
        WRAPPERS[name](group).init(PARAMS)


@pytest.mark.parametrize(
    ("function", "around"),
    [
        ("lookahead", ox.lookahead),
        ("cautious", ox.cautious),
        ("chain_in_float32", lambda tx: ox.chain_in_float32(tx, optax.scale(0.5))),
    ],
)
@each_wrapper
def test_what_changes_updates_is_refused_around(name: str, function: str, around):
    tx = around(optax.chain(WRAPPERS[name](ox.sgd(0.1))))
    message = f"{function}: there is a wrapper inside that .* Put the wrapper around"
    with pytest.raises(ValueError, match=message):
        tx.init(PARAMS)
    # The other way round it is what was meant.
    WRAPPERS[name](around(ox.sgd(0.1))).init(PARAMS)


@pytest.mark.parametrize(
    ("function", "error", "arguments", "message"),
    [
        (function, TypeError, {"inner": inner}, message)
        for function in ("master_weights", "stochastic_rounding", "compensated")
        for inner, message in (
            (None, "inner=None is not allowed; .*GradientTransformation"),
            (ox.adamw, "inner=<function adamw"),
        )
    ]
    + [
        (function, error, {"seed": seed}, message)
        for function in ("master_weights", "stochastic_rounding")
        for error, seed, message in (
            (ValueError, -1, "seed=-1 is not allowed; it must be an integer >= 0"),
            (TypeError, 1.0, "seed=1.0 is not allowed; it must be an integer >= 0"),
            (TypeError, True, "seed=True is not allowed"),
            (
                TypeError,
                jnp.asarray(1),
                r"seed shapes the compiled program .* static_args=\('seed',\)",
            ),
        )
    ]
    + [
        ("master_weights", error, {"bits": bits}, message)
        for error, bits, message in (
            (ValueError, 16, "bits=16 is not allowed; it must be 24 or 32"),
            (ValueError, 0, "bits=0 is not allowed"),
            (TypeError, 32.0, "bits=32.0 is not allowed; it must be an integer"),
            (TypeError, "32", "bits='32' is not allowed; it must be an integer"),
            (
                TypeError,
                jnp.asarray(32),
                r"bits shapes the compiled program .* static_args=\('bits',\)",
            ),
        )
    ],
)
def test_wrong_arguments_are_refused(function, error, arguments, message: str):
    with pytest.raises(error, match=f"{function}: {message}"):
        getattr(ox, function)(**{"inner": ox.sgd(0.1), **arguments})


@each_wrapper
def test_params_are_needed(name: str):
    function = {"stochastic": "stochastic_rounding", "compensated": "compensated"}
    message = f"{function.get(name, 'master_weights')}: params=None is not allowed"
    tx = WRAPPERS[name](ox.sgd(0.1))
    with pytest.raises(ValueError, match=message):
        tx.update(GRADS[0], tx.init(PARAMS))


@each_wrapper
def test_wrong_parameters_are_refused(name: str):
    message = ": parameter 'a/n' of dtype int32 is not allowed; it must be floating"
    with pytest.raises(TypeError, match=message):
        WRAPPERS[name](optax.identity()).init({"a": {"n": jnp.ones(2, jnp.int32)}})


@pytest.mark.parametrize("other", [*WRAPPERS, "none"])
@each_wrapper
def test_the_state_of_another_wrapper_is_refused(name: str, other: str):
    tx = WRAPPERS[name](SGD)
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    state = (WRAPPERS[other](SGD) if other in WRAPPERS else SGD).init(params)
    if other == name:
        tx.update(params, state, params)
        return
    with pytest.raises(ValueError, match=r"a state with .* must be of this wrapper"):
        tx.update(params, state, params)


def test_a_checkpoint_of_another_wrapper_is_refused(tmp_path):
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    with ocp.StandardCheckpointer() as checkpointer:
        state = WRAPPERS["master24"](SGD).init(params)
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        for name in ("master32", "compensated", "stochastic"):
            target = jax.eval_shape(WRAPPERS[name](SGD).init, params)
            with pytest.raises(ValueError, match="correction"):
                checkpointer.restore(tmp_path / "state", target)


@pytest.mark.parametrize("name", ["master32", "master24", "compensated"])
def test_parameters_of_another_dtype_than_at_init_are_refused(name: str):
    tx = WRAPPERS[name](ox.sgd(0.1))
    params = {"dense": {"kernel": jnp.ones((2, 2), jnp.bfloat16), "bias": None}}
    wide = optax.tree.cast(params, "float32")
    message = r"parameter 'dense/kernel' of dtype {} .* {} at init"
    with pytest.raises(TypeError, match=message.format("float32", "narrower")):
        tx.update(wide, tx.init(params), wide)
    with pytest.raises(TypeError, match=message.format("bfloat16", "wider")):
        tx.update(params, tx.init(wide), params)
    with pytest.raises(TypeError, match=message.format("float32", "narrower")):
        jax.eval_shape(tx.update, params, tx.init(params), wide)


@each_wrapper
def test_weights_of_8_bits_are_refused(name: str):
    params = {"dense": {"kernel": jnp.ones((2, 2), jnp.float8_e4m3fn)}}
    message = "'dense/kernel' of dtype float8_e4m3fn .* bfloat16, float16, float32"
    with pytest.raises(TypeError, match=message):
        WRAPPERS[name](ox.sgd(0.1)).init(params)


@each_wrapper
def test_numbers_that_are_no_arrays_pass(name: str):
    params = {"kernel": jnp.ones(2, jnp.bfloat16), "temperature": 1.0}
    tx = WRAPPERS[name](ox.sgd(0.1))
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["temperature"], -0.1)
