"""Shampoo: its roots and refreshes, grafting, invariances, what it does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from optaxplus import MatrixAxes
from tests.assertions import assert_trees_close
from tests.transforms.kron_runs import STACK, gradients, normal
from tests.transforms.kronecker_runs import (
    FAST,
    MATRIX,
    QUICK,
    RTOL,
    SHAPE,
    best_descent,
    primitives,
    tiles_of,
)
from tests.transforms.kronecker_runs import follow as follow_any

STEPS = 7
PLAIN = {**QUICK, "grafting": None}
# What Algorithm 1 of the paper does in its first step, and in every step.
ONE_STEP = {"b1": 0.0, "update_interval": 1, "grafting": None, "eps": 0.0}
# What compiles another program of a kind that another test has compiled.
slow = pytest.mark.slow
follow = functools.partial(follow_any, ox.scale_by_shampoo)


def with_singular_values(shape, values, *, seed: int = 0):
    """A matrix with these singular values, and its polar factor."""
    u, _, vt = np.linalg.svd(np.float64(normal(shape, seed=seed)), full_matrices=False)
    values = np.asarray(values)
    return np.float32(u * values @ vt), np.float32(u @ vt)


# One step


def test_one_step_without_averages_gives_the_polar_factor():
    # L^(-1/4) = U·Σ^(-1/2)·Uᵀ
    square, polar = with_singular_values((4, 4), [3.0, 1.0, 0.3, 0.1])
    (update,), _ = follow([square], **ONE_STEP, axes=MATRIX)
    # Both smallest eigenvalues are 900 roundings of 6e-8 uncertain; their fourth roots
    # a quarter of that.
    assert_trees_close(update, polar, rtol=5e-5)


@slow
@pytest.mark.parametrize("order", [1, 2, 3, 6])
def test_root_order(order: int):
    values = np.geomspace(3.0, 0.5, 4)
    g, _ = with_singular_values((4, 4), values)
    (update,), _ = follow([g], **ONE_STEP, root_order=order, axes=MATRIX)
    u, _, vt = np.linalg.svd(np.float64(g))
    # σ · (σ²)^(-1/p) · (σ²)^(-1/p)
    expected = u * values ** (1 - 4 / order) @ vt
    assert_trees_close(update, np.float32(expected), rtol=1e-5)


def test_vectors_have_one_side_and_a_square_root():
    grads = gradients({"b": (4,)}, steps=2)
    updates, states = follow(grads, **ONE_STEP, b2=1.0)
    assert isinstance(states[0].root_in["b"], optax.MaskedNode)
    # (g·gᵀ)^(-1/2)·g
    unit = grads[0]["b"] / np.linalg.norm(grads[0]["b"])
    # The roots of the three eigenvalues that are 0 are large, and multiply roundings.
    assert_trees_close(updates[0]["b"], unit, rtol=2e-3)
    assert_trees_close(states[1].factor_out["b"][0], sum_of(grads), rtol=1e-6)


def sum_of(grads):
    return np.float32(sum(np.outer(g["b"], g["b"]) for g in np.asarray(grads)))


def test_factors_are_averages():
    grads = gradients(SHAPE, steps=3)
    moments = [np.float64(g) @ np.float64(g).mT for g in grads]
    _, states = follow(grads, **PLAIN)
    average = 0.05 * (0.95**2 * moments[0] + 0.95 * moments[1] + moments[2])
    assert_trees_close(states[-1].factor_in[:, 0], np.float32(average), rtol=1e-6)


def test_a_large_side_may_keep_its_diagonal():
    g = normal((6, 4), seed=0)
    arguments = {**ONE_STEP, "max_dim": 5, "large_dims": "diagonal"}
    (update,), (state,) = follow([g], **arguments, b2=1.0, axes=MATRIX)
    rows = np.sum(np.float64(g) ** 2, axis=1, keepdims=True)
    assert_trees_close(state.factor_in[0], np.float32(rows), rtol=1e-6)
    assert_trees_close(state.root_in[0], np.float32(rows ** (-1 / 4)), rtol=1e-6)
    values, vectors = np.linalg.eigh(np.float64(g.T @ g))
    right = (vectors * values ** (-1 / 4)) @ vectors.T
    expected = np.float32(rows ** (-1 / 4) * g @ right)
    assert_trees_close(update, expected, rtol=1e-5)


# Refreshes


def test_roots_change_every_kth_step_and_factors_every_step():
    grads = gradients(SHAPE, steps=STEPS)
    _, states = follow(grads, **QUICK)
    assert states[0].root_in.any()
    for t in range(1, STEPS):
        before, after = states[t - 1], states[t]
        for name in ("root_in", "root_out"):
            same = np.array_equal(getattr(before, name), getattr(after, name))
            assert same == (t not in (3, 6)), (t, name)
        assert not np.array_equal(before.factor_in, after.factor_in)
        assert not np.array_equal(before.factor_out, after.factor_out)
        assert after.count == t + 1


# On CPUs in a loop, elsewhere at once.
@pytest.mark.parametrize(
    ("method", "name", "count"), [("eigh", "eigh", 2), ("newton", "scan", 3)]
)
def test_all_leaves_have_their_roots_in_one_branch(method: str, name: str, count: int):
    params = [jnp.ones((4, 4)), jnp.ones((2, 4, 4)), jnp.ones((4, 5))]
    tx = ox.scale_by_shampoo(axes=STACK, root_method=method)
    program = jax.make_jaxpr(tx.update)(params, tx.init(params))
    found = list(primitives(program.jaxpr))
    assert [inside for other, inside in found if other == "cond"].count(False) == 1
    # For each of two sizes.
    places = [inside for other, inside in found if other == name]
    assert places == 2 * count * [True]


def test_compiles_once():
    tx = ox.scale_by_shampoo(max_dim=3, large_dims="diagonal")
    update = jax.jit(tx.update, compiler_options=FAST)
    g = jnp.ones((4, 5))
    state = tx.init(g)
    for _ in range(3):
        _, state = update(g, state)
    assert update._cache_size() == 1


def test_newton_is_near_eigh():
    # No eigenvalue is near ε, which means another thing to each.
    g = with_singular_values((4, 4), [1.0, 0.9, 0.8, 0.6])[0]
    grads = [g + 0.05 * x for x in normal((4, 4, 4), seed=2)]
    arguments = {**PLAIN, "axes": MATRIX}
    expected, _ = follow(grads, **arguments)
    updates, _ = follow(grads, **arguments, root_method="newton")
    for ours, theirs in zip(updates, expected, strict=True):
        assert_trees_close(ours, theirs, rtol=2e-5)


# Grafting


def grafted_step(grafting: str, grads):
    """D of the last of these gradients."""
    grads = np.float64(grads)
    t = len(grads)
    weights = 0.95 ** np.arange(t)[::-1] * 0.05 / (1 - 0.95**t)
    mean = np.tensordot(weights, grads, 1)
    if grafting == "sgd":
        return mean
    if grafting == "adagrad":
        return mean / (np.sqrt(np.sum(grads**2, axis=0)) + 1e-8)
    return mean / (np.sqrt(np.tensordot(weights, grads**2, 1)) + 1e-8)


@pytest.mark.parametrize(
    "grafting", [pytest.param("sgd", marks=slow), "adagrad", "adam"]
)
def test_grafting_gives_the_size_and_keeps_the_direction(grafting: str):
    grads = gradients(SHAPE, steps=STEPS)
    updates, states = follow(grads, **{**QUICK, "grafting": grafting})
    directions, _ = follow(grads, **PLAIN)
    assert (states[0].nu is None) == (grafting == "sgd")
    for t, (update, direction) in enumerate(zip(updates, directions, strict=True), 1):
        wanted = np.linalg.norm(grafted_step(grafting, grads[:t]), axis=(-2, -1))
        size = np.linalg.norm(update, axis=(-2, -1))
        np.testing.assert_allclose(size, wanted, rtol=1e-5)
        scale = (size / np.linalg.norm(direction, axis=(-2, -1)))[:, None, None]
        assert_trees_close(update, scale * direction, rtol=5e-6)


# Invariances


@pytest.mark.parametrize("exponent", [-40, 40, 48])
def test_without_grafting_the_scale_of_the_gradient_is_forgotten(exponent: int):
    grads = gradients(SHAPE, steps=4)
    expected, _ = follow(grads, **PLAIN)
    scaled = [np.float32(2.0**exponent) * g for g in grads]
    # Squares are in the range of float32.
    assert np.abs(scaled).max() < 1e18
    updates, _ = follow(scaled, **PLAIN)
    for ours, theirs in zip(updates, expected, strict=True):
        # LAPACK scales what is very small or very large.
        assert_trees_close(ours, theirs, rtol=RTOL)


@slow
def test_sums_grow_as_the_root_of_the_number_of_steps():
    g = gradients(SHAPE, steps=1)[0]
    updates, _ = follow([g] * 5, **ONE_STEP, b2=1.0, axes=STACK)
    for t, update in enumerate(updates, 1):
        expected = updates[0] / np.float32(np.sqrt(t))
        assert_trees_close(update, expected, rtol=RTOL)


def test_rotated_gradients_give_rotated_updates():
    grads = gradients(SHAPE, steps=STEPS)
    left, right = np.linalg.qr(normal((2, *SHAPE), seed=3))[0]
    expected, _ = follow(grads, **PLAIN)
    rotated, _ = follow([left @ g @ right for g in grads], **PLAIN)
    for ours, theirs in zip(rotated, expected, strict=True):
        assert_trees_close(ours, left @ theirs @ right, rtol=RTOL)


def test_stacks_are_their_slices():
    sizes = np.float32([1e-6, 1.0, 1e6]).reshape(3, 1, 1)
    grads = [g * sizes for g in gradients(SHAPE, steps=STEPS)]
    updates, states = follow(grads, **QUICK)
    names = ("z", "a", "m")
    separate = [dict(zip(names, g, strict=True)) for g in grads]
    expected, after = follow(separate, **QUICK)
    for index, name in enumerate(names):
        for ours, theirs in zip(updates, expected, strict=True):
            assert_trees_close(ours[index], theirs[name], rtol=RTOL)
        for field in ("factor_in", "factor_out"):
            ours, theirs = getattr(states[-1], field), getattr(after[-1], field)
            assert_trees_close(ours[index], theirs[name], rtol=2e-6)


@slow
def test_equal_splits_are_matrices_of_their_own():
    grads = gradients(SHAPE, steps=4)
    expected, _ = follow(grads, **QUICK)
    fused = [np.concatenate(list(g), axis=-1) for g in grads]
    axes = MatrixAxes((0,), (1,), (4, 4, 4))
    updates, states = follow(fused, axes=axes, update_interval=3)
    assert states[0].root_out.shape == (3, 4, 4)
    for ours, theirs in zip(updates, expected, strict=True):
        theirs = np.concatenate(list(theirs), axis=-1)
        assert_trees_close(ours, theirs, rtol=RTOL)


@pytest.mark.parametrize(
    "arguments",
    [{}, pytest.param({"max_dim": 4, "large_dims": "diagonal"}, marks=slow)],
)
def test_unequal_splits_are_matrices_of_their_own(arguments):
    axes = MatrixAxes((0,), (1,), (3, 5))
    grads = gradients((4, 8), steps=4)
    arguments = {**PLAIN, **arguments}
    updates, _ = follow(grads, **{**arguments, "axes": axes})
    parts = [dict(zip("ab", np.split(g, [3], axis=1), strict=True)) for g in grads]
    expected, _ = follow(parts, **arguments)
    for ours, theirs in zip(updates, expected, strict=True):
        theirs = np.concatenate([theirs["a"], theirs["b"]], axis=1)
        # Directions that a gradient has not are multiplied with ε^(-1/4), 32 times as
        # much as the largest.
        assert_trees_close(ours, theirs, rtol=RTOL)


@slow
def test_tiles_are_matrices_of_their_own():
    grads = gradients((6, 8), steps=4)
    updates, states = follow(grads, axes=MATRIX, update_interval=3, max_dim=4)
    assert states[0].root_in.shape == (4, 3, 3)
    assert states[0].root_out.shape == (4, 4, 4)
    expected, _ = follow([tiles_of(g) for g in grads], **QUICK)
    for ours, theirs in zip(updates, expected, strict=True):
        # Each has its own size of the grafted step too.
        assert_trees_close(tiles_of(ours), theirs, rtol=RTOL)


@slow
def test_axes_may_stand_anywhere():
    grads = gradients(SHAPE, steps=4)
    expected, _ = follow(grads, **QUICK)
    moved = [np.moveaxis(g, 0, 1).reshape(2, 2, 3, 4) for g in grads]
    axes = MatrixAxes((0, 1), (3,))
    updates, _ = follow(moved, axes=axes, update_interval=3)
    for ours, theirs in zip(updates, expected, strict=True):
        theirs = np.moveaxis(theirs, 0, 1).reshape(2, 2, 3, 4)
        assert_trees_close(ours, theirs, rtol=RTOL)


# What it does


@pytest.mark.slow
def test_descends_where_rows_and_columns_are_mixed():
    adam = ox.scale_by_adam(b1=0.95, b2=0.95)
    adams = best_descent(adam, np.geomspace(1e-3, 1.0, 7))
    ours = best_descent(ox.scale_by_shampoo(), [0.03, 0.1])
    assert ours < 0.1 * adams
