"""Contracts that every transformation keeps inside optax's wrappers and JAX's vmap."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from tests import problems
from tests.assertions import (
    assert_finite,
    assert_same_types,
    assert_trees_close,
    assert_trees_equal,
)
from tests.cases import CASES, NAMED, Case, one_of_each_family, variants_are_slow
from tests.trajectories import run

each_factory = pytest.mark.parametrize("case", variants_are_slow(CASES))
each_family = pytest.mark.parametrize("case", one_of_each_family(CASES))

SHAPES = {"dense": {"kernel": (5, 4)}, "norm": {"scale": (4,)}}
MATRIX_SHAPES = {"dense": {"kernel": (5, 4)}}

# 1 - b2 in float32 is 0.001 to 6e-5 of itself, where Python forms it to 1e-16.
INJECTED_RTOL = 1e-4


def shapes_of(case: Case) -> dict[str, Any]:
    return MATRIX_SHAPES if case.matrix_only else SHAPES


def problem(case: Case, steps: int = 2):
    params = problems.normal_tree(shapes_of(case), seed=1)
    return params, problems.gradients(shapes_of(case), steps=steps)


def inject(case: Case, **options: Any):
    """`optax.inject_hyperparams` over the row, its learning rate included."""
    factory = optax.inject_hyperparams(
        case.factory, static_args=case.static_args, **options
    )
    return factory(**case.arguments())


@each_factory
def test_injected_hyperparameters_equal_plain_ones(case: Case) -> None:
    params, grads = problem(case)
    plain, _ = run(case.make(), params, grads)
    injected, state = run(inject(case, hyperparam_dtype=jnp.float32), params, grads)
    numbers = {
        name: value
        for name, value in case.arguments().items()
        if isinstance(value, float) and name not in case.static_args
    }
    assert numbers.keys() <= state.hyperparams.keys()
    for ours, theirs in zip(injected, plain, strict=True):
        assert_trees_close(ours, theirs, rtol=max(INJECTED_RTOL, case.rtol))


@each_factory
def test_injected_hyperparameters_can_be_changed_without_compiling(case: Case) -> None:
    tx = inject(case, hyperparam_dtype=jnp.float32)
    params, (grads,) = problem(case, 1)
    state = tx.init(params)
    names = sorted(state.hyperparams)
    traced = jax.jit(tx.update).trace(grads, state, params)
    # Every numeric argument is an input of the compiled program, none a constant.
    _, after = traced.out_info
    assert sorted(after.hyperparams) == names
    assert_same_types(after.inner_state, jax.eval_shape(lambda s: s, state.inner_state))


@each_factory
def test_hyperparameters_rounded_by_optax_stay_finite(case: Case) -> None:
    # Without hyperparam_dtype optax rounds them to the dtype of the parameters: a
    # decay rate of 0.999 is 1 in bfloat16, an eps of 1e-8 is 0 in float16.
    tx = inject(case)
    for dtype in ("bfloat16", "float16"):
        params, grads = problem(case)
        zeros = jax.tree.map(jnp.zeros_like, grads[0])
        updates, state = run(
            tx,
            problems.cast(params, dtype),
            [problems.cast(g, dtype) for g in (*[zeros] * 3, *grads)],
        )
        assert_finite((updates, state.inner_state))


@pytest.mark.parametrize(
    ("case", "argument"),
    [
        pytest.param(case, name, id=f"{case}-{name}")
        for case in CASES
        for name, parameter in case.parameters.items()
        if type(parameter.default) is int
    ],
)
def test_traced_structural_argument_names_the_remedy(case: Case, argument: str) -> None:
    params, _ = problem(case)
    others = tuple(name for name in case.static_args if name != argument)
    tx = optax.inject_hyperparams(case.factory, static_args=others)(**case.arguments())
    with pytest.raises(TypeError, match=rf"{argument}.*static_args=\('{argument}',\)"):
        tx.init(params)


@each_family
def test_equal_micro_batches_equal_one_batch(case: Case) -> None:
    params, (grads,) = problem(case, 1)
    (plain,), _ = run(case.make(), params, [grads])
    tx = optax.MultiSteps(case.make(), every_k_schedule=2)
    # An update for each micro-batch: compiled once, zero and then the whole.
    update = jax.jit(tx.update)
    state = tx.init(params)
    first, state = update(grads, state, params)
    second, state = update(grads, state, params)
    assert_trees_equal(first, jax.tree.map(jnp.zeros_like, plain))
    # The mean of two equal numbers is exact; the rest is compilation.
    assert_trees_close(second, plain, rtol=case.rtol)
    assert optax.tree.get(state, "gradient_step") == 1


@pytest.mark.parametrize("case", one_of_each_family(NAMED))
def test_accumulated_micro_batches_equal_one_batch(case: Case) -> None:
    params, grads = problem(case, 2)
    mean = jax.tree.map(lambda *g: sum(g) / 2, *grads)
    (plain,), _ = run(case.make(), params, [mean])
    tx = ox.accumulate(case.make(), every_k=2)
    (first, second), state = run(tx, params, grads, update=jax.jit(tx.update))
    assert_trees_equal(first, jax.tree.map(jnp.zeros_like, plain))
    # Half a sum is exact; the rest is compilation.
    assert_trees_close(second, plain, rtol=case.rtol)
    assert_trees_equal(state.grad_sum, jax.tree.map(jnp.zeros_like, params))


@each_factory
def test_masked_and_partitioned_trees(case: Case) -> None:
    params, grads = ({"w": x} for x in problems.gradients((5, 4), steps=2))
    (alone,), _ = run(case.make(), params, [grads])
    others = {"other": jnp.ones((4,)), "frozen": jnp.ones((2, 2))}
    wholes = params | others, [grads | others]
    (masked,), _ = run(
        optax.masked(case.make(), {"w": True, "other": False, "frozen": False}), *wholes
    )
    assert_trees_equal(masked, alone | others)
    labels = {"w": "ours", "other": "theirs", "frozen": "none"}
    (split,), _ = run(
        optax.partition(
            {
                "ours": case.make(),
                "theirs": optax.identity(),
                "none": optax.set_to_zero(),
            },
            labels,
        ),
        *wholes,
    )
    zeros = jnp.zeros_like(others["frozen"])
    assert_trees_equal(split, alone | {"other": others["other"], "frozen": zeros})


@each_family
def test_nonfinite_steps_are_skipped(case: Case) -> None:
    params, (first, second) = problem(case)
    tx = optax.apply_if_finite(case.make(), max_consecutive_errors=5)
    bad = jax.tree.map(lambda g: g.at[0].set(jnp.inf), second)
    (_, skipped, after), state = run(
        tx, params, [first, bad, second], update=jax.jit(tx.update)
    )
    (_, expected), plain = run(case.make(), params, [first, second])
    assert_trees_equal(skipped, jax.tree.map(jnp.zeros_like, skipped))
    # Compiled and not.
    assert_trees_close(after, expected, rtol=case.rtol)
    assert_trees_close(state.inner_state, plain, rtol=4e-6)


@each_factory
def test_chains_and_unknown_extra_arguments(case: Case) -> None:
    params, (grads,) = problem(case, 1)
    (plain,), _ = run(case.make(), params, [grads])
    chained = optax.chain(optax.scale(2.0), optax.scale(0.5), case.make())
    for tx in (chained, optax.with_extra_args_support(case.make())):
        update, _ = tx.update(grads, tx.init(params), params, loss=jnp.ones([]), x=None)
        assert_trees_equal(update, plain)


@each_factory
def test_state_can_be_searched_and_mapped(case: Case) -> None:
    tx = case.make()
    params, (grads,) = problem(case, 1)
    _, state = run(tx, params, [grads])
    # Marks every array that belongs to a parameter, as sharding a state does.
    marked = optax.tree_map_params(
        tx, lambda _: "param", state, transform_non_params=lambda _: "other"
    )
    assert jax.tree.structure(marked) == jax.tree.structure(state)
    marks = jax.tree.leaves(marked)
    for leaf, mark in zip(jax.tree.leaves(state), marks, strict=True):
        # Counts and the like are scalars; no parameter here is.
        assert mark == ("param" if leaf.ndim else "other")
    if case.is_link:
        for name in state._fields:
            assert_trees_equal(optax.tree.get(state, name), getattr(state, name))


@each_family
def test_vmap_is_one_after_the_other(case: Case) -> None:
    params, grads = problem(case)
    pairs = jax.tree.map(lambda *leaves: jnp.stack(leaves), params, grads[0])
    tx = case.make()

    @jax.vmap
    def updates_of(params, grads):
        update, state = tx.update(grads, tx.init(params), params)
        return update, tx.update(grads, state, params)[0]

    together = updates_of(pairs, jax.tree.map(lambda x: x[::-1], pairs))
    for index, (p, g) in enumerate([(params, grads[0]), (grads[0], params)]):
        expected, _ = run(tx, p, [g, g])
        for ours, theirs in zip(together, expected, strict=True):
            # Sums over a slice may be ordered differently.
            one = jax.tree.map(lambda x, index=index: x[index], ours)
            assert_trees_close(one, theirs, rtol=case.rtol)


@pytest.mark.parametrize("case", variants_are_slow(NAMED))
def test_learning_rate_may_be_anything_scalar(case: Case) -> None:
    params, grads = problem(case)
    plain, _ = run(case.make(0.25), params, grads)
    for rate in (np.float32(0.25), jnp.asarray(0.25), lambda step: 0.25):
        updates, _ = run(case.make(rate), params, grads)
        for ours, theirs in zip(updates, plain, strict=True):
            assert_trees_close(ours, theirs, rtol=2e-7)  # one rounding
    # In bfloat16 the learning rate must not be rounded with the gradient.
    narrow = problems.cast(params, "bfloat16"), problems.cast(grads[0], "bfloat16")
    traced = jax.eval_shape(
        lambda rate, p, g: (tx := case.make(rate)).update(g, tx.init(p), p)[0],
        jax.ShapeDtypeStruct((), jnp.float32),
        *narrow,
    )
    wanted = problems.cast(narrow[1], "float32") if case.emits_float32 else narrow[1]
    assert_same_types(traced, jax.eval_shape(lambda g: g, wanted))


def test_masked_trees_are_not_guessed_at() -> None:
    # The bias that tells a stack of layers from a convolution is masked away here.
    params = {"layers": {"kernel": jnp.ones((2, 4, 3)), "bias": jnp.ones((2, 3))}}
    mask = {"layers": {"kernel": True, "bias": False}}
    with pytest.raises(ValueError, match="layers/kernel"):
        optax.masked(ox.trust_ratio(), mask).init(params)
