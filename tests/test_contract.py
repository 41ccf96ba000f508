"""Contracts that every transformation of the library keeps: types, leaves, stacks.

Each test runs over the table in `cases`. Updates run op by op unless the contract is
about compilation: every operation then rounds by itself, which makes many comparisons
exact, and operations on the same shapes are compiled once for all rows.
"""

from contextlib import ExitStack, contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from optaxplus import trees
from tests import problems
from tests.assertions import (
    assert_finite,
    assert_same_types,
    assert_trees_close,
    assert_trees_equal,
)
from tests.cases import CASES, LINKS, NAMED, Case, variants_are_slow
from tests.trajectories import run

DTYPES = ("float32", "bfloat16", "mixed")  # float16 among the mixed
each_factory = pytest.mark.parametrize("case", variants_are_slow(CASES))


@contextmanager
def strict(case: Case):
    """JAX's strictest promotion, where none of optax's arithmetic takes part."""
    with ExitStack() as stack:
        if case.is_link:
            stack.enter_context(jax.numpy_dtype_promotion("strict"))
            stack.enter_context(jax.numpy_rank_promotion("raise"))
        yield


def params_and_gradients(case: Case, steps: int = 3, dtype: Any = "float32"):
    params = problems.normal_tree(case.shapes, seed=1)
    grads = problems.gradients(case.shapes, steps=steps)
    return problems.cast(params, dtype), [problems.cast(g, dtype) for g in grads]


# State


@each_factory
def test_types_of_states_and_updates(case: Case) -> None:
    for dtype in DTYPES:
        params, (grads,) = params_and_gradients(case, 1, dtype)
        tx = case.make()
        with strict(case):
            state = tx.init(params)
            assert_same_types(jax.eval_shape(tx.init, params), state)
            updates, after = jax.eval_shape(tx.update, grads, state, params)
        assert_same_types(after, state)
        assert_same_types(
            updates, problems.cast(grads, "float32") if case.emits_float32 else grads
        )


@each_factory
def test_state_is_the_carry_of_a_scan(case: Case) -> None:
    params, (grads,) = params_and_gradients(case, 1, "mixed")
    tx = case.make()

    def train(params, stacked):
        return jax.lax.scan(
            lambda state, g: tx.update(g, state, params)[::-1],
            tx.init(params),
            stacked,
        )

    # Nothing but shapes and dtypes goes in, and scan compares the types of its carry.
    abstract = jax.eval_shape(
        lambda *trees: trees, params, jax.tree.map(lambda g: g[None], grads)
    )
    with strict(case):
        final, _ = jax.eval_shape(train, *abstract)
        assert_same_types(final, jax.eval_shape(tx.init, abstract[0]))


@each_factory
def test_state_can_be_donated(case: Case) -> None:
    # A buffer that two leaves share would be given away twice.
    params = problems.normal_tree(case.odd_shapes | case.shapes, seed=1)
    leaves = jax.tree.leaves((params, case.make().init(params)))
    buffers = [x.unsafe_buffer_pointer() for x in leaves if x.size]
    assert len(set(buffers)) == len(buffers)


@each_factory
def test_state_holds_no_constants(case: Case) -> None:
    params, grads = params_and_gradients(case, 2)
    tx = case.make()
    _, before = run(tx, params, grads[:1])
    # Other parameters too, because their norm is no constant either.
    _, after = run(tx, jax.tree.map(lambda p: 2 * p, params), grads)
    marked = optax.tree_map_params(
        tx, lambda _: None, before, transform_non_params=lambda leaf: leaf
    )
    others = [path for path, _ in trees.leaves_with_paths(marked)]
    values = [dict(trees.leaves_with_paths(state)) for state in (before, after)]
    for path in others:
        assert not np.array_equal(values[0][path], values[1][path]), path
    # A moment that never moves would be a constant too.
    for path, leaf in trees.leaves_with_paths(after):
        assert leaf.size == 1 or np.any(np.asarray(leaf)), path


@pytest.mark.parametrize(
    "case",
    variants_are_slow(
        [case for case in CASES if {"mu_dtype", "nu_dtype"} & case.parameters.keys()]
    ),
)
def test_moments_are_stored_as_asked(case: Case) -> None:
    params, grads = params_and_gradients(case, 2)
    names = sorted({"mu_dtype", "nu_dtype"} & case.parameters.keys())
    tx = case.make(**dict.fromkeys(names, "bfloat16"))
    with strict(case):
        updates, state = run(tx, params, grads)
    assert_same_types(state, tx.init(params))
    for path, leaf in trees.leaves_with_paths(state):
        # Muon's AdamW has no argument for its second moment; a fallback has its own.
        # Scalars of the whole tree, slow parameters and what belongs to a side of a
        # matrix or to all of it are no moments.
        others = (
            "inner_states/adamw",
            "mu_product",
            "slow",
            "basis",
            "root_",
            "factor_",
            "last_norm",
        )
        if leaf.dtype != jnp.int32 and not any(other in path for other in others):
            assert leaf.dtype == jnp.bfloat16, path
    # The arithmetic, and so the update, stays float32.
    assert_same_types(updates[-1], grads[-1])


@pytest.mark.parametrize("case", [case for case in CASES if case.branches], ids=str)
def test_branches_are_reached(case: Case) -> None:
    params, _ = params_and_gradients(case)
    assert all(case.branches(case.make().init(params)).values())


# Precision


@each_factory
def test_low_precision_is_float32_rounded_once(case: Case) -> None:
    tx = case.make()
    params, grads = params_and_gradients(case, 2, "mixed")
    with strict(case):
        updates, state = run(tx, params, grads)
        wide_updates, wide_state = run(
            tx,
            problems.cast(params, "float32"),
            [problems.cast(g, "float32") for g in grads],
        )
    assert_trees_equal(state, wide_state)
    for ours, wide in zip(updates, wide_updates, strict=True):
        # Op by op the arithmetic is the same, so equality is exact.
        assert_trees_equal(ours, wide if case.is_link else trees.cast_like(wide, ours))


# Leaves


@each_factory
def test_zero_gradient(case: Case) -> None:
    tx = case.make()
    for dtype in ("float32", "mixed"):
        params, (grads,) = params_and_gradients(case, 1, dtype)
        roles = ox.infer_roles(params)
        zeros = jax.tree.map(jnp.zeros_like, grads)
        with strict(case):
            updates, state = run(tx, params, [zeros, zeros, grads])
            still, _ = run(tx, zeros, [zeros, zeros])
        assert_finite((updates, state))
        for update in still:
            assert_trees_equal(
                update, problems.cast(zeros, "float32") if case.emits_float32 else zeros
            )
        expected = jax.tree.map(
            lambda p, role: case.zero_gradient(
                np.asarray(p, np.float64), case.learning_rate or 0.0, role
            ),
            params,
            roles,
        )
        # Rounding of the update to float16 (2^-11) or bfloat16 (2^-9).
        rtol = 1e-6 if dtype == "float32" or case.is_link else 2.0**-8
        assert_trees_close(updates[0], expected, rtol=rtol)


@each_factory
def test_zero_parameters_can_grow(case: Case) -> None:
    params, (grads,) = params_and_gradients(case, 1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    with strict(case):
        (*_, updates), _ = run(case.make(), zeros, [grads] * (1 + case.silent_steps))
    assert_finite(updates)
    for path, update in trees.leaves_with_paths(updates):
        assert np.all(np.asarray(update) != 0), path


@each_factory
def test_tiny_and_huge_gradients_are_finite(case: Case) -> None:
    tx = case.make()
    params, (grads,) = params_and_gradients(case, 1)
    for size in (1e-40, 1e-30, 1e30):
        extreme = jax.tree.map(
            lambda g, size=size: jnp.sign(g) * np.float32(size), grads
        )
        with strict(case):
            updates, _ = run(tx, params, [extreme, grads, extreme])
        assert_finite(updates)


@pytest.mark.parametrize(
    # optax's semantics of the global norm: one NaN makes everything NaN.
    "case",
    variants_are_slow([case for case in CASES if case.scope != "tree"]),
)
def test_nonfinite_number_stays_where_it_is(case: Case) -> None:
    tx = case.make()
    params, (grads,) = params_and_gradients(case, 1)
    where = (1, 0, 2)
    before = [grads] * case.silent_steps
    with strict(case):
        (*_, clean), _ = run(tx, params, [*before, grads])
    clean_kernel = clean["attention"]["query"].pop("kernel")
    for bad in (np.nan, np.inf):
        poisoned = jax.tree.map(lambda g: g, grads)
        kernel = poisoned["attention"]["query"]["kernel"].at[where].set(bad)
        poisoned["attention"]["query"]["kernel"] = kernel
        with strict(case):
            (*_, dirty), _ = run(tx, params, [*before, poisoned])
        dirty_kernel = dirty["attention"]["query"].pop("kernel")
        assert_trees_equal(dirty, clean)
        if np.isnan(bad):
            assert np.isnan(dirty_kernel[where])
        if case.scope == "element":
            others = jnp.ones(kernel.shape, bool).at[where].set(False)
            assert_trees_equal(dirty_kernel[others], clean_kernel[others])


@each_factory
def test_degenerate_shapes(case: Case) -> None:
    tx = case.make()
    params = problems.normal_tree(case.odd_shapes, seed=1)
    grads = problems.gradients(case.odd_shapes, steps=2)
    with strict(case):
        updates, state = run(tx, params, grads)
    assert_finite((updates, state))
    assert_same_types(updates[-1], params)
    for path, update in trees.leaves_with_paths(updates[case.silent_steps]):
        assert update.size == 0 or np.all(np.asarray(update) != 0), path


@each_factory
def test_empty_nodes_pass_through(case: Case) -> None:
    tx = case.make()
    params, grads = ({"kernel": x} for x in problems.gradients((5, 4), steps=2))
    holes = {"none": None, "masked": optax.MaskedNode()}
    with strict(case):
        (updates,), state = run(tx, params, [grads])
        (holed,), holed_state = run(tx, params | holes, [grads | holes])
    assert_trees_equal(holed, updates | holes)
    assert len(jax.tree.leaves(holed_state)) == len(jax.tree.leaves(state))


@each_factory
def test_complex_parameters(case: Case) -> None:
    shapes = {"a": (5, 4), "c": (4, 3)}
    params = problems.normal_tree(shapes, seed=1)
    grads = problems.gradients(shapes, steps=2)
    tx = case.make()
    turned = {}
    if not case.complex_supported:
        with pytest.raises(TypeError, match=r"'a' of dtype complex64.*real floating"):
            tx.init(problems.cast(params, "complex64"))
        return
    # A rule of |g|² and of norms turns its update with gradient and parameters; one of
    # g², or of real and imaginary parts apart, does not. Numbers on the real axis
    # behave like real ones.
    for angle in (0.0, 0.7):
        phase = np.complex64(np.exp(1j * angle))
        turned[angle], state = run(
            tx,
            jax.tree.map(lambda p, phase=phase: p * phase, params),
            [jax.tree.map(lambda g, phase=phase: g * phase, g) for g in grads],
        )
        _, after = jax.eval_shape(tx.update, grads[0], tx.init(params), params)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        plain, _ = run(tx, params, grads)
        for ours, real in zip(turned[angle], plain, strict=True):
            assert all(u.dtype == jnp.complex64 for u in jax.tree.leaves(ours))
            assert_trees_close(
                ours,
                jax.tree.map(lambda u, phase=phase: u * phase, real),
                rtol=case.rtol,
            )


@each_factory
def test_integer_parameters_are_refused_by_path(case: Case) -> None:
    params = {"table": {"index": jnp.ones((4, 3), jnp.int32)}}
    with pytest.raises(TypeError, match="'table/index' of dtype int32"):
        case.make().init(params)


@each_factory
def test_params_are_needed_where_the_table_says_so(case: Case) -> None:
    params, (grads,) = params_and_gradients(case, 1)
    tx = case.make()
    state = tx.init(params)
    if case.needs_params:
        with pytest.raises(ValueError, match="params"):
            tx.update(grads, state)
    else:
        with_params, _ = tx.update(grads, state, params)
        assert_trees_equal(tx.update(grads, state)[0], with_params)


# Compilation


@each_factory
def test_compiles_once_and_agrees_with_op_by_op(case: Case) -> None:
    params, grads = params_and_gradients(case, 3)
    # A schedule is the learning rate that changes in every step.
    tx = case.make(None if case.is_link else optax.linear_schedule(0.1, 0.01, 5))
    traces = 0

    @jax.jit
    def update(grads, state, params):
        nonlocal traces
        traces += 1
        with strict(case):
            return tx.update(grads, state, params)

    compiled, compiled_state = run(tx, params, grads, update=update)
    assert traces == 1
    plain, state = run(tx, params, grads)
    # XLA contracts a·b + c and reorders sums: a few roundings.
    for ours, theirs in zip(compiled, plain, strict=True):
        assert_trees_close(ours, theirs, rtol=case.rtol)
    assert_trees_close(compiled_state, state, rtol=4e-6)


# Stacks


SPLITS = (3, 2)
STACK_SHAPES = {"stack": (2, 4, 3), "biases": (2, 3), "fused": (4, 5)}
STACK_AXES = {
    "stack": problems.STACKED_MATRIX,
    "biases": ox.MatrixAxes((), (1,)),
    "fused": ox.MatrixAxes((0,), (1,), SPLITS),
}


def _slices(tree: dict[str, Any]) -> dict[str, Any]:
    """Each matrix and vector of the leaves in `STACK_SHAPES` as a leaf of its own."""
    result = {}
    for name, x in tree.items():
        cut = jnp.split(x, np.cumsum(SPLITS)[:-1], axis=-1) if name == "fused" else x
        result |= {f"{name}_{index}": block for index, block in enumerate(cut)}
    return result


@each_factory
def test_a_stack_is_its_slices(case: Case) -> None:
    names = {"stack"} if case.matrix_only else {"stack", "biases"}
    if {"axes", "rules"} & case.parameters.keys():
        names |= {"fused"}
    shapes = {name: STACK_SHAPES[name] for name in sorted(names)}
    params = problems.normal_tree(shapes, seed=1)
    # Slices of different size, so that statistics of the whole leaf would show.
    grads = [
        jax.tree.map(
            lambda g: (
                g * jnp.array([1.0, 50.0]).reshape(2, *[1] * (g.ndim - 1))
                if g.shape[0] == 2
                else g
            ),
            g,
        )
        for g in problems.gradients(shapes, steps=2)
    ]
    apart = jax.tree.map(
        lambda x: ox.MatrixAxes(tuple(range(x.ndim - 1)), (-1,)), _slices(params)
    )
    whole = {name: STACK_AXES[name] for name in shapes}
    together, _ = run(case.make(**case.with_axes(whole)), params, grads)
    separate, _ = run(
        case.make(**case.with_axes(apart)), _slices(params), [_slices(g) for g in grads]
    )
    # Sums over a slice of a stack and over a leaf of its own may be ordered
    # differently, and products of matrices be blocked differently.
    rtol = case.rtol if case.rtol > 4e-6 else 1e-6
    for ours, theirs in zip(together, separate, strict=True):
        assert_trees_close(_slices(ours), theirs, rtol=rtol)


def test_the_table_is_in_order() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert all(case.is_link for case in LINKS)
    assert not any(case.is_link for case in NAMED)
    for case in CASES:
        # Rows of wrappers have factories of their own.
        if case.factory.__module__.startswith("optaxplus."):
            assert case.name.split("-")[0] == case.factory.__name__
        structural = {
            name
            for name, parameter in case.parameters.items()
            if type(parameter.default) is int
        }
        assert structural <= set(case.static_args), case.name
