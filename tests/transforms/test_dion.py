"""Dion: its reference, what it does to singular values and blocks, error feedback."""

import jax
import numpy as np
import pytest

import optaxplus as ox
from optaxplus import MatrixAxes
from tests.assertions import assert_finite, assert_trees_close, assert_trees_equal
from tests.references.dion import dion
from tests.references.matrix import polar_factor
from tests.transforms.dion_runs import (
    LOW_RANK,
    STACK,
    first,
    follow,
    gradients,
    normal,
    orthonormal,
    start,
)

STEPS = 10
SHAPES = [(8, 12), (12, 8), (8, 8)]


def with_singular_values(values, shape) -> np.ndarray:
    left, right = (
        orthonormal((side, len(values)), seed=seed) for seed, side in enumerate(shape)
    )
    return (left * np.float32(values)) @ right.T


# Agreement


@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        *((shape, LOW_RANK) for shape in SHAPES),
        ((8, 12), {}),
        ((8, 8), {"b1": 0.5}),
        ((12, 8), {**LOW_RANK, "power_iterations": 3}),
        ((8, 8), {"rank_fraction": 0.1, "rank_multiple": 3, "b1": 0.0}),
    ],
    ids=str,
)
def test_reference(shape, arguments, x64):
    grads = [np.float64(g) for g in gradients(shape, steps=STEPS)]
    # The epsilon of the paper is absolute.
    updates, states = follow(grads, eps=0.0, **arguments)
    basis = start(grads[0], eps=0.0, **arguments).basis
    known = {"b1", "power_iterations"} & arguments.keys()
    expected = dion([g.T for g in grads], basis, **{k: arguments[k] for k in known})
    for update, state, step in zip(updates, states, expected, strict=True):
        # Float64 roundings, amplified by the condition of B·Q; measured 7e-15.
        assert_trees_close(update, step.update.T, rtol=1e-12)
        assert_trees_close(state.mu, step.momentum.T, rtol=1e-12)
        # Which way a column of Q points depends on the QR.
        assert_trees_close(np.abs(state.basis), np.abs(step.basis), rtol=1e-12)


@pytest.mark.parametrize(
    ("shape", "arguments"), [((8, 12), {}), *((shape, LOW_RANK) for shape in SHAPES)]
)
def test_reference_in_float32(shape, arguments):
    grads = gradients(shape, steps=STEPS)
    updates, states = follow(grads, **arguments)
    basis = start(grads[0], **arguments).basis
    expected = dion([g.T for g in grads], basis)
    for update, state, step in zip(updates, states, expected, strict=True):
        # Float32 roundings, amplified by the condition of B·Q; measured 5e-7.
        assert_trees_close(update, step.update.T, rtol=1e-5)
        assert_trees_close(state.mu, step.momentum.T, rtol=2e-6)


@pytest.mark.parametrize(
    ("shape", "arguments", "expected"),
    [
        ((8, 12), {}, (8, 8)),
        ((12, 8), {}, (8, 8)),
        ((10, 20), {"rank_fraction": 0.25}, (10, 3)),
        ((20, 10), {"rank_fraction": 0.25, "rank_multiple": 2}, (10, 4)),
        ((10, 20), {"rank_fraction": 1e-9}, (10, 1)),
        ((10, 20), {"rank_fraction": 0.9, "rank_multiple": 8}, (10, 10)),
        ((10, 20), {"rank_multiple": 128}, (10, 10)),
    ],
)
def test_rank_is_rounded_up_and_capped(shape, arguments, expected):
    tx = ox.scale_by_dion(**arguments)
    state = jax.eval_shape(tx.init, jax.ShapeDtypeStruct(shape, "float32"))
    assert state.basis.shape == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_longer_side_is_orthonormal_and_shorter_side_of_unit_columns(shape):
    update, state = first(normal(shape, seed=0), **LOW_RANK)
    # U = P·Qᵀ with P on fan_out unless that is the shorter side.
    turned = update.T if shape[0] <= shape[1] else update
    left = turned @ np.linalg.pinv(state.basis.T)
    np.testing.assert_allclose(left.T @ left, np.eye(2), atol=1e-5)
    np.testing.assert_allclose(left @ state.basis.T, turned, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(state.basis, axis=0), 1.0, rtol=1e-6)


def test_eps_is_added_to_lengths_in_units_of_the_matrix():
    for size in (1.0, 2.0**-90, 2.0**90):
        # 3 is 0.75·4.
        update, _ = first(np.float32([[3.0 * size]]), eps=0.25)
        np.testing.assert_allclose(update, [[0.75 / (0.75 + 0.25)]], rtol=1e-6)


# Singular values


@pytest.mark.parametrize("rank_fraction", [1.0, 0.5, 0.25])
def test_squared_norm_is_the_rank(rank_fraction: float):
    updates, _ = follow(gradients((8, 12), steps=3), rank_fraction=rank_fraction)
    for update in updates:
        # Orthonormal columns, each with a unit vector; float32 roundings.
        np.testing.assert_allclose(np.sum(update**2), 8 * rank_fraction, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_singular_values_give_the_polar_factor_at_once(shape):
    polar = with_singular_values(np.ones(8), shape)
    update, _ = first(5.0 * polar)
    # Float32 roundings.
    np.testing.assert_allclose(update, polar, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_constant_gradient_leads_to_the_polar_factor(shape):
    g = with_singular_values(2.0 ** -np.arange(8), shape)
    updates, states = follow([g] * 30)
    distances = [np.abs(u - polar_factor(g)).max() for u in updates]
    # A random basis gives another matrix; then a factor (σ_j / σ_i)² = 1/4 a step,
    # down to roundings of σ_8, 2^-7 of the largest.
    assert distances[0] > 0.1
    assert distances[-1] < 1e-4
    rows = np.linalg.svd(g if shape[0] > shape[1] else g.T)[2]
    agreement = np.abs(rows @ np.asarray(states[-1].basis))
    np.testing.assert_allclose(agreement, np.eye(8), atol=1e-3)


def test_basis_finds_the_leading_singular_vectors():
    g = with_singular_values([8.0, 6.0, 1.0, 0.5, 0.2, 0.1], (9, 6))
    leading = np.linalg.svd(g)[2][:2]
    # While (σ_3 / σ_2)·t stays below 1 / (1 - b1), what is left over does not overtake.
    updates, states = follow([g] * 20, rank_fraction=1 / 3, b1=0.999)
    outside = states[-1].basis - leading.T @ (leading @ states[-1].basis)
    np.testing.assert_allclose(outside, 0, atol=1e-5)
    truncated = np.linalg.svd(g)[0][:, :2] @ leading
    np.testing.assert_allclose(updates[-1], truncated, atol=1e-3)


# Error feedback


@pytest.mark.parametrize("shape", SHAPES)
def test_only_what_is_captured_decays(shape):
    b1 = 0.8
    grads = gradients(shape, steps=3)
    updates, states = follow(grads, b1=b1, **LOW_RANK)
    before = states[1].mu + grads[2]
    after, update = np.asarray(states[2].mu), updates[2]
    left = np.linalg.svd(update if shape[0] > shape[1] else update.T)[0][:, :2]
    if shape[0] <= shape[1]:
        before, after = before.T, after.T
    captured = left @ (left.T @ before)
    size = np.abs(before).max()
    # Float32 roundings.
    np.testing.assert_allclose(after, before - (1 - b1) * captured, atol=3e-6 * size)
    np.testing.assert_allclose(left.T @ after, b1 * left.T @ before, atol=3e-6 * size)
    whole = before - captured
    np.testing.assert_allclose(after - left @ (left.T @ after), whole, atol=3e-6 * size)
    assert np.abs(whole).max() > 0.1 * size


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_plain_momentum(shape):
    grads = gradients(shape, steps=5)
    _, states = follow(grads, b1=0.9)
    tx = ox.scale_by_momentum(0.9)
    state = tx.init(grads[0])
    for g, ours in zip(grads, states, strict=True):
        _, state = tx.update(g, state)
        # Float32 roundings of two products.
        assert_trees_close(ours.mu, 0.9 * state.trace, rtol=2e-6)


def test_no_direction_starves():
    g = with_singular_values([4.0, 2.0, 1.0], (5, 3))
    left, _, right = np.linalg.svd(g, full_matrices=False)
    updates, _ = follow([g] * 200, rank_fraction=0.1, b1=0.9)
    # Rank 1 a step, but what is left over grows until its turn comes.
    shares = np.diag(left.T @ np.sum(updates, axis=0) @ right.T) / 200
    assert shares.min() > 0.05
    # At most 1 a step, up to rounding.
    assert shares.sum() < 1 + 1e-5


# Invariances


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_rotations(shape):
    left, right = (orthonormal((side, side), seed=side) for side in shape)
    grads = gradients(shape, steps=3)
    state = start(grads[0], **LOW_RANK)
    updates, _ = follow(grads, **LOW_RANK)
    basis = (right.T if shape[0] > shape[1] else left) @ state.basis
    rotated, _ = follow(
        [left @ g @ right for g in grads],
        state=state._replace(basis=basis),
        **LOW_RANK,
    )
    for ours, plain in zip(rotated, updates, strict=True):
        # Float32 roundings, amplified by the condition of B·Q.
        assert_trees_close(ours, left @ plain @ right, rtol=1e-5)


@pytest.mark.parametrize("size", [2.0**-100, 2.0**100, 1e-30, 1e30])
def test_scale_does_not_matter(size: float):
    grads = gradients((8, 12), steps=3)
    scaled, states = follow([g * np.float32(size) for g in grads], **LOW_RANK)
    plain, _ = follow(grads, **LOW_RANK)
    assert_finite(states)
    # A power of 2 changes no rounding.
    rtol = 0.0 if np.log2(size).is_integer() else 1e-5
    for ours, theirs in zip(scaled, plain, strict=True):
        assert_trees_close(ours, theirs, rtol=rtol)


@pytest.mark.parametrize("shape", [(8, 12), (8, 8)])
def test_transpose(shape):
    grads = gradients(shape, steps=3)
    expected, _ = follow(grads, **LOW_RANK)
    turned, _ = follow([g.T for g in grads], axes=MatrixAxes((1,), (0,)), **LOW_RANK)
    for ours, theirs in zip(turned, expected, strict=True):
        # Float32 sums in another order, amplified by the condition of B·Q.
        assert_trees_close(ours, theirs.T, rtol=1e-5)


def test_heads_are_flattened():
    grads = gradients((4, 2, 3), steps=3)
    heads, _ = follow(grads, axes=MatrixAxes((0,), (1, 2)))
    flat, _ = follow([g.reshape(4, 6) for g in grads])
    for ours, theirs in zip(heads, flat, strict=True):
        assert_trees_close(ours.reshape(4, 6), theirs, rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 8, 5), (3, 5, 8)])
def test_stack_is_its_slices(shape):
    sizes = np.float32([1e-9, 1.0, 1e9]).reshape(3, 1, 1)
    grads = [g * sizes for g in gradients(shape, steps=3)]
    arguments = {"rank_fraction": 0.5, "axes": STACK}
    state = start(grads[0], **arguments)
    # Equal at first; here every layer has its own.
    assert_trees_equal(state.basis[0], state.basis[2])
    state = state._replace(basis=normal(state.basis.shape, seed=3))
    updates, states = follow(grads, state=state, **arguments)
    axes = MatrixAxes((0,), (2,))
    moved, _ = follow(
        [np.moveaxis(g, 0, 1) for g in grads],
        state=state._replace(mu=np.moveaxis(state.mu, 0, 1)),
        **{**arguments, "axes": axes},
    )
    for index in range(3):
        one = jax.tree.map(lambda x, index=index: x[index], state)
        expected, after = follow([g[index] for g in grads], state=one, **arguments)
        for step in range(3):
            # The same operations on each slice.
            assert_trees_close(updates[step][index], expected[step], rtol=1e-6)
            assert_trees_close(moved[step][:, index], expected[step], rtol=1e-6)
        for ours, theirs in zip(states[-1], after[-1], strict=True):
            assert_trees_close(ours[index], theirs, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "axes", "basis_shape"),
    [
        ((3, 4, 9), MatrixAxes((1,), (2,), splits=(2, 7)), (3, 4, 3)),
        ((9, 4), MatrixAxes((1,), (0,), splits=(2, 7)), (4, 3)),
        ((8, 9, 1), MatrixAxes((0,), (1, 2), splits=(2, 7)), (7, 5)),
    ],
)
def test_splits_have_bases_of_their_own(shape, axes: MatrixAxes, basis_shape):
    grads = gradients(shape, steps=2)
    arguments = {"rank_fraction": 0.5}
    updates, states = follow(grads, axes=axes, **arguments)
    basis = states[-1].basis
    assert basis.shape == start(grads[0], axes=axes, **arguments).basis.shape
    assert basis.shape == basis_shape
    axis = axes.fan_out[0]
    plain = MatrixAxes(axes.fan_in, axes.fan_out)
    for part in (0, 1):
        parts = [np.split(g, [2], axis)[part] for g in grads]
        expected, after = follow(parts, axes=plain, **arguments)
        side, rank = after[-1].basis.shape[-2:]
        stored = basis[..., :rank] if part == 0 else basis[..., -rank:]
        # The same operations on each split.
        assert_trees_close(stored[..., :side, :], after[-1].basis, rtol=1e-6)
        assert not stored[..., side:, :].any()
        for ours, theirs in zip(updates, expected, strict=True):
            assert_trees_close(np.split(ours, [2], axis)[part], theirs, rtol=1e-6)
