"""SOAP: its first step, its bases and refreshes, invariances, what it does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from optaxplus import MatrixAxes
from tests.assertions import assert_trees_close, assert_trees_equal
from tests.transforms.kron_runs import STACK, gradients, normal
from tests.transforms.kronecker_runs import (
    FAST,
    MATRIX,
    QUICK,
    RTOL,
    SHAPE,
    adam_without_bases,
    assert_orthonormal,
    best_descent,
    primitives,
    tiles_of,
)
from tests.transforms.kronecker_runs import follow as follow_any

STEPS = 8
# What compiles another program of a kind that another test has compiled.
slow = pytest.mark.slow
follow = functools.partial(follow_any, ox.scale_by_soap)


# The first step


def test_the_first_gradient_only_makes_the_bases():
    grads = gradients(SHAPE, steps=2)
    updates, states = follow(grads, **QUICK)
    first = states[0]
    assert_trees_equal(updates[0], np.zeros_like(grads[0]))
    assert_trees_equal((first.mu, first.nu), (updates[0], updates[0]))
    assert np.all(updates[1] != 0)
    g = np.float64(grads[0])
    for factor, basis, moment in (
        (first.factor_in, first.basis_in, g @ g.mT),
        (first.factor_out, first.basis_out, g.mT @ g),
    ):
        assert_trees_close(factor[:, 0], np.float32(0.05 * moment), rtol=1e-6)
        # Orthonormal, and columns in the order of their eigenvalues.
        assert_orthonormal(basis)
        turned = basis.mT @ factor @ basis
        values = np.diagonal(turned, axis1=-2, axis2=-1)
        off = turned - values[..., None] * np.eye(4)
        assert np.abs(off).max() < 2e-6 * np.abs(factor).max()
        assert (np.diff(values) < 0).all()


def test_vectors_and_sides_above_max_dim_are_adam():
    # ε so large that where it stands shows.
    arguments = {"max_dim": 3, "eps": 0.1, "b1": 0.8, "b2": 0.9}
    grads = [
        jax.tree.map(np.tanh, g)
        for g in gradients({"matrix": (4, 5), "vector": (4,)}, steps=5)
    ]
    updates, states = follow(grads, **arguments)
    assert isinstance(states[0].basis_in["matrix"], optax.MaskedNode)
    assert isinstance(states[0].basis_out["matrix"], optax.MaskedNode)
    arguments.pop("max_dim")
    for leaf in grads[0]:
        expected = adam_without_bases([g[leaf] for g in grads], **arguments)
        for ours, theirs in zip(updates, expected, strict=True):
            assert_trees_close(ours[leaf], np.float32(theirs), rtol=2e-6)


def test_vectors_below_max_dim_are_adam():
    grads = gradients({"b": (4,)}, steps=4)
    updates, states = follow(grads)
    expected = adam_without_bases([g["b"] for g in grads])
    for ours, theirs in zip(updates, expected, strict=True):
        assert_trees_close(ours["b"], np.float32(theirs), rtol=2e-6)
    assert isinstance(states[0].basis_in["b"], optax.MaskedNode)
    assert isinstance(states[0].basis_out["b"], optax.MaskedNode)


# Refreshes


def test_bases_change_every_kth_step_and_factors_every_step():
    grads = gradients(SHAPE, steps=STEPS)
    _, states = follow(grads, **QUICK)
    for t in range(1, STEPS):
        before, after = states[t - 1], states[t]
        for name in ("basis_in", "basis_out"):
            same = np.array_equal(getattr(before, name), getattr(after, name))
            assert same == (t not in (3, 6)), (t, name)
        assert not np.array_equal(before.factor_in, after.factor_in)
        assert not np.array_equal(before.factor_out, after.factor_out)
        assert after.count == t + 1


def test_a_refresh_turns_the_mean_and_permutes_the_mean_square():
    b1, b2 = 0.95, 0.95
    grads = [np.float64(g) for g in gradients(SHAPE, steps=4)]
    _, states = follow(grads, **QUICK)
    old, new = ([np.float64(x) for x in s[1:3]] for s in states[2:])
    left, right = (np.float64(x[:, 0]) for x in states[2][5:])
    rotated = left.mT @ grads[3] @ right
    m = left @ (b1 * old[0] + (1 - b1) * rotated) @ right.mT
    v = b2 * old[1] + (1 - b2) * rotated**2
    left, right = (np.float64(x[:, 0]) for x in states[3][5:])
    assert_trees_close(np.float32(left @ new[0] @ right.mT), np.float32(m), rtol=5e-6)
    # Rows and columns in another order, at most.
    for axes in ((-1,), (-2,), (-2, -1)):
        ours, theirs = (np.sort(x.sum(axes), axis=-1) for x in (new[1], v))
        np.testing.assert_allclose(ours, theirs, rtol=2e-5)


def test_all_leaves_are_decomposed_in_one_branch():
    counts = []
    for params in ([jnp.ones((4, 4))], [jnp.ones((4, 4)), jnp.ones((2, 4, 4))]):
        tx = ox.scale_by_soap(axes=STACK)
        program = jax.make_jaxpr(tx.update)(params, tx.init(params))
        found = list(primitives(program.jaxpr))
        conds = [inside for name, inside in found if name == "cond"]
        assert conds.count(False) == 1
        where = {
            name: [inside for other, inside in found if other == name]
            for name in ("eigh", "qr")
        }
        for places in where.values():
            assert places
            assert all(places)
        counts.append({name: len(places) for name, places in where.items()})
    # All sides of one size share one.
    assert counts[0] == counts[1]
    # On CPUs in a loop, on TPUs by panels, in the first step too, elsewhere at once.
    assert counts[1]["qr"] == 4


def test_compiles_once():
    tx = ox.scale_by_soap(max_dim=3)
    update = jax.jit(tx.update, compiler_options=FAST)
    g = jnp.ones((4, 5))
    state = tx.init(g)
    for _ in range(3):
        _, state = update(g, state)
    assert update._cache_size() == 1


# Invariances


def test_rotated_gradients_give_rotated_updates():
    """Where first factors have full rank; else part of the basis is arbitrary."""
    grads = gradients(SHAPE, steps=STEPS)
    left, right = np.linalg.qr(normal((2, *SHAPE), seed=3))[0]
    expected, _ = follow(grads, **QUICK)
    rotated, _ = follow([left @ g @ right for g in grads], **QUICK)
    for ours, theirs in zip(rotated, expected, strict=True):
        assert_trees_close(ours, left @ theirs @ right, rtol=RTOL)
    # As an Adam without bases is not.
    plain, _ = follow(grads, axes=STACK, max_dim=1)
    turned, _ = follow([left @ g @ right for g in grads], axes=STACK, max_dim=1)
    assert np.abs(turned[-1] - left @ plain[-1] @ right).max() > 0.1


def test_the_scale_of_the_gradient_is_forgotten():
    sizes = np.float32([2.0**-30, 1.0, 2.0**30]).reshape(3, 1, 1)
    g = [np.repeat(g[:1], 3, axis=0) for g in gradients(SHAPE, steps=STEPS)]
    updates, _ = follow([sizes * x for x in g], **QUICK, eps=1e-30)
    for update in updates:
        # Powers of two round nothing, but LAPACK scales what is so small or so large.
        assert_trees_close(update, np.repeat(update[1:2], 3, axis=0), rtol=RTOL)


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
    grads = gradients(SHAPE, steps=STEPS)
    expected, _ = follow(grads, **QUICK)
    fused = [np.concatenate(list(g), axis=-1) for g in grads]
    axes = MatrixAxes((0,), (1,), (4, 4, 4))
    updates, states = follow(fused, axes=axes, update_interval=3)
    assert states[0].basis_out.shape == (3, 4, 4)
    for ours, theirs in zip(updates, expected, strict=True):
        theirs = np.concatenate(list(theirs), axis=-1)
        assert_trees_close(ours, theirs, rtol=RTOL)


def test_unequal_splits_are_matrices_of_their_own():
    # One row or column more than there are of the other: the eigenvector of the only
    # zero eigenvalue is determined too.
    axes = MatrixAxes((0,), (1,), (3, 5))
    grads = gradients((4, 8), steps=5)
    updates, _ = follow(grads, axes=axes, update_interval=3)
    parts = [dict(zip("ab", np.split(g, [3], axis=1), strict=True)) for g in grads]
    expected, _ = follow(parts, axes=MATRIX, update_interval=3)
    for ours, theirs in zip(updates, expected, strict=True):
        theirs = np.concatenate([theirs["a"], theirs["b"]], axis=1)
        assert_trees_close(ours, theirs, rtol=RTOL)


@slow
def test_tiles_are_matrices_of_their_own():
    grads = gradients((6, 8), steps=5)
    axes = MatrixAxes((0,), (1,))
    arguments = {"max_dim": 4, "large_dims": "tiles"}
    updates, states = follow(grads, axes=axes, update_interval=3, **arguments)
    # Rows have no even tiles of 4.
    assert states[0].basis_in.shape == (4, 3, 3)
    assert states[0].basis_out.shape == (4, 4, 4)
    expected, _ = follow([tiles_of(g) for g in grads], **QUICK)
    for ours, theirs in zip(updates, expected, strict=True):
        assert_trees_close(tiles_of(ours), theirs, rtol=RTOL)


@slow
def test_axes_may_stand_anywhere():
    grads = gradients(SHAPE, steps=5)
    expected, _ = follow(grads, **QUICK)
    moved = [np.moveaxis(g, 0, 1).reshape(2, 2, 3, 4) for g in grads]
    axes = MatrixAxes((0, 1), (3,))
    updates, _ = follow(moved, axes=axes, update_interval=3)
    for ours, theirs in zip(updates, expected, strict=True):
        theirs = np.moveaxis(theirs, 0, 1).reshape(2, 2, 3, 4)
        assert_trees_close(ours, theirs, rtol=RTOL)


# What it does


def test_descends_where_rows_and_columns_are_mixed():
    adam = ox.scale_by_adam(b1=0.95, b2=0.95)
    adams = best_descent(adam, np.geomspace(1e-3, 1.0, 7))
    ours = best_descent(ox.scale_by_soap(), [0.03, 0.1])
    assert ours < 0.1 * adams
