"""PSGD-Kron: its reference, when it refreshes, blocks, what it does to problems."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from optaxplus import MatrixAxes
from tests.assertions import assert_trees_close
from tests.references.psgd import kron_steps, refreshes
from tests.transforms.kron_runs import (
    STACK,
    follow,
    gradients,
    kron_noise,
    normal,
)

STEPS = 10
# What compiles another program of a kind that another test has compiled.
slow = pytest.mark.slow
# Refreshes in steps 1, 2, 4, 8, 12, ...
QUICK = {"warmup_steps": 2, "update_interval": 4, "interval_growth": 0.3}


# Agreement


@pytest.mark.parametrize(
    ("shape", "arguments", "theirs"),
    [
        ((6, 4), {}, {}),
        pytest.param(
            *((6, 4), {"max_dim": 5}, {"diagonal": (True, False)}), marks=slow
        ),
        pytest.param(
            (4, 6),
            {"max_dim": 5, "b1": 0.0},
            {"diagonal": (False, True), "b1": 0.0},
            marks=slow,
        ),
        pytest.param(
            (6, 4),
            {"max_dim": 1, "init_scale": 0.1, "preconditioner_learning_rate": 0.5},
            {
                "diagonal": (True, True),
                "init_scale": 0.1,
                "preconditioner_learning_rate": 0.5,
            },
            marks=slow,
        ),
        (
            (4, 6),
            {**QUICK, "max_update_rms": 0.7},
            {"refresh": refreshes(STEPS, **QUICK), "max_update_rms": 0.7},
        ),
    ],
    ids=["triangular", "rows", "columns", "diagonal", "schedule"],
)
def test_reference(shape, arguments, theirs, x64):
    grads = [np.float64(g) for g in gradients(shape, steps=STEPS)]
    updates, states = follow(grads, **arguments)
    expected = kron_steps(grads, kron_noise(shape, STEPS), **theirs)
    for update, state, step in zip(updates, states, expected, strict=True):
        # V is float32, and its last bits depend on how it is compiled; measured 3e-8.
        assert_trees_close(update, step.update, rtol=3e-7)
        # The factors are balanced otherwise.
        for ours, full in (
            (state.factor_in, step.left),
            (state.factor_out, step.right),
        ):
            (ours,) = ours
            ours = np.diag(ours[:, 0]) if ours.shape[-1] == 1 else ours
            full = full / np.abs(full).max()
            assert_trees_close(ours / np.abs(ours).max(), full, rtol=3e-7)


def test_reference_in_float32():
    grads = gradients((6, 4), steps=STEPS)
    updates, _ = follow(grads)
    expected = kron_steps(grads, kron_noise((6, 4), STEPS))
    for update, step in zip(updates, expected, strict=True):
        # Float32 roundings, amplified by the condition of the factors; measured 5e-7.
        assert_trees_close(update, step.update, rtol=5e-6)


# Refreshes


def refreshed_at(steps: int, **arguments) -> list[int]:
    """The steps at which the factors change."""
    tx = ox.scale_by_kron(axes=MatrixAxes((0,), (1,)), **arguments)
    g = jnp.ones((1, 1))

    def step(state, _):
        _, new = tx.update(g, state)
        changed = jnp.any(new.factor_in != state.factor_in)
        is_due = new.refreshed != state.refreshed
        return new, (changed | jnp.any(new.factor_out != state.factor_out), is_due)

    train = jax.jit(lambda: jax.lax.scan(step, tx.init(g), length=steps)[1])
    changed, is_due = map(np.asarray, train())
    # Once fitted, a factor may stay as it is.
    assert not (changed & ~is_due).any()
    return list(1 + np.flatnonzero(is_due))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (QUICK, [1, 2, 4, 8, 12, 16, 20]),
        ({**QUICK, "interval_growth": None}, [1, 2, 6, 10, 14, 18]),
        ({"warmup_steps": 0, "update_interval": 5, "interval_growth": None}, [5, 10]),
        ({"warmup_steps": 0, "update_interval": 1}, list(range(1, 13))),
        ({"warmup_steps": 3, "interval_growth": 0.0}, list(range(1, 13))),
    ],
    ids=str,
)
def test_refreshes(arguments, expected):
    steps = expected[-1] + 1 if arguments is QUICK else expected[-1]
    assert refreshed_at(steps, **arguments) == expected


def test_default_refreshes_are_the_published_ones():
    expected = 1 + np.flatnonzero(refreshes(6000))
    assert refreshed_at(6000) == list(expected)
    # Every step at first, every 34th in the end.
    assert list(expected[:500]) == list(range(1, 501))
    assert set(np.diff(expected[-50:])) == {34}


def test_between_refreshes_factors_are_left_alone():
    grads = gradients((6, 4), steps=5)
    _, states = follow(grads, **QUICK)
    for step, (before, after) in enumerate(itertools.pairwise(states), 2):
        is_due = step in (2, 4)
        for name in ("factor_in", "factor_out"):
            same = np.array_equal(getattr(before, name), getattr(after, name))
            assert same != is_due
        assert after.refreshed == (step if is_due else step - 1)


@pytest.mark.slow
def test_all_leaves_are_fitted_in_one_branch_by_shape():
    params = [jnp.ones((6, 4)), jnp.ones((4, 6)), jnp.ones((2, 2, 3)), jnp.ones((6, 4))]
    tx = ox.scale_by_kron(axes=STACK)
    compiled = jax.jit(tx.update).lower(params, tx.init(params)).compile().as_text()
    assert compiled.count(" conditional(") == 1
    # The fit of each of three shapes; four products for P·M of each of four leaves.
    assert len(re.findall(r'custom_call_target="\w*trsm', compiled)) == 3 * 2
    assert compiled.count(" dot(") == 3 * 12 + 4 * 4


# Invariances


@slow
def test_transpose():
    # V has the shape of the matrix, fan_in first, however it is stored.
    grads = gradients((6, 4), steps=3)
    expected, _ = follow(grads)
    turned, _ = follow([g.T for g in grads], axes=MatrixAxes((1,), (0,)))
    for ours, theirs in zip(turned, expected, strict=True):
        # Sums in another order.
        assert_trees_close(ours, theirs.T, rtol=2e-6)


@slow
def test_axes_are_flattened_and_the_batch_may_stand_anywhere():
    shapes = (3, 2, 3, 4)  # A window of 3×2, three kernels, four outputs.
    grads = gradients(shapes, steps=2)
    ours, _ = follow(grads, axes=MatrixAxes((0, 1), (3,)))
    moved = [np.moveaxis(g, 2, 0).reshape(3, 6, 4) for g in grads]
    theirs, _ = follow(moved, axes=STACK)
    for one, other in zip(ours, theirs, strict=True):
        other = np.moveaxis(other.reshape(3, 3, 2, 4), 0, 2)
        assert_trees_close(one, other, rtol=2e-6)


@pytest.mark.slow
def test_stacks_and_trees_are_their_slices():
    sizes = np.float32([1e-9, 1.0, 1e9]).reshape(3, 1, 1)
    grads = [g * sizes for g in gradients((3, 6, 4), steps=4)]
    updates, states = follow(grads, axes=STACK, **QUICK)
    names = ("z", "a", "m")
    separate = [dict(zip(names, g, strict=True)) for g in grads]
    expected, after = follow(separate, axes=STACK, **QUICK)
    for index, name in enumerate(names):
        for step in range(4):
            assert_trees_close(updates[step][index], expected[step][name], rtol=2e-6)
        left, right = after[-1].factor_in[name], after[-1].factor_out[name]
        assert_trees_close(states[-1].factor_in[index], left, rtol=2e-6)
        assert_trees_close(states[-1].factor_out[index], right, rtol=2e-6)


def test_splits_have_factors_of_their_own():
    # One triangular, one diagonal factor of the columns.
    arguments = {"max_dim": 6}
    axes = MatrixAxes((1,), (2,), splits=(3, 7))
    grads = gradients((2, 4, 10), steps=2)
    updates, states = follow(grads, axes=axes, **arguments)
    shapes = states[-1].factor_in.shape, states[-1].factor_out.shape
    # A tile for each split, filled up to the widest.
    assert shapes == ((2, 2, 4, 4), (2, 2, 7, 3))
    for part, columns in enumerate((slice(0, 3), slice(3, 10))):
        parts = [g[..., columns] for g in grads]
        expected, after = follow(parts, axes=STACK, **arguments)
        for ours, theirs in zip(updates, expected, strict=True):
            assert_trees_close(ours[..., columns], theirs, rtol=2e-6)
        left, right = states[-1].factor_in[:, [part]], states[-1].factor_out[:, [part]]
        assert_trees_close(left, after[-1].factor_in, rtol=2e-6)
        size, width = after[-1].factor_out.shape[-2:]
        kept = right[..., :size, :width]
        assert_trees_close(kept, after[-1].factor_out, rtol=2e-6)
        assert np.count_nonzero(right) == np.count_nonzero(kept)


@slow
def test_tiles_are_matrices_of_their_own():
    grads = gradients((8, 6), steps=3)
    ours, states = follow(grads, max_dim=4, large_dims="tiles")
    assert states[-1].factor_in.shape == (4, 4, 4)
    tiles = [g.reshape(2, 4, 2, 3).swapaxes(1, 2) for g in grads]
    expected, _ = follow(tiles, axes=STACK)
    for update, wanted in zip(ours, expected, strict=True):
        assert_trees_close(update, wanted.swapaxes(1, 2).reshape(8, 6), rtol=2e-6)


@slow
def test_vectors_are_matrices_of_one_row():
    vectors = gradients({"b": (5,), "s": ()}, steps=3)
    updates, states = follow(vectors)
    assert states[-1].factor_out["b"].shape == (1, 5, 1)
    assert states[-1].factor_in["s"].shape == (1, 1, 1)
    rows = [jax.tree.map(lambda g: g.reshape(1, -1), g) for g in vectors]
    expected, _ = follow(rows, max_dim=1, axes=MatrixAxes((0,), (1,)))
    for ours, theirs in zip(updates, expected, strict=True):
        rowed = jax.tree.map(lambda u: u.reshape(1, -1), ours)
        assert_trees_close(rowed, theirs, rtol=2e-6)


# What it does


@pytest.mark.parametrize("size", [1e-12, pytest.param(1e12, marks=slow)])
def test_the_scale_of_the_gradient_is_forgotten(size: float):
    tx = ox.scale_by_kron(b1=0.5, max_update_rms=None)
    g = np.float32(size) * normal((400, 4, 3), seed=0)
    step = lambda state, g: tx.update(g, state)[::-1]  # noqa: E731
    _, updates = jax.jit(lambda g: jax.lax.scan(step, tx.init(g[0]), g))(g)
    # Momentum of white gradients, whitened again: 1, within the noise of the fit.
    rms = np.sqrt(np.mean(np.square(updates[-50:])))
    np.testing.assert_allclose(rms, 1.0, atol=0.2)


@pytest.mark.slow
def test_descends_where_rows_and_columns_are_mixed():
    """½‖A·X·B‖² of condition 1e6: no direction of an entry is special."""
    rng = np.random.default_rng(0)

    def mixing(side: int) -> np.ndarray:
        left, right = (
            np.linalg.qr(rng.standard_normal((side, side)))[0] for _ in range(2)
        )
        return np.float32(left * np.geomspace(1.0, 10**1.5, side) @ right)

    a, b = mixing(6), mixing(5)
    begin = normal((6, 5), seed=1)

    def loss(x):
        return 0.5 * jnp.sum(jnp.square(a @ x @ b))

    def final(tx, steps=500):
        def step(carry, _):
            x, state = carry
            updates, state = tx.update(jax.grad(loss)(x), state, x)
            return (optax.apply_updates(x, updates), state), None

        (x, _), _ = jax.lax.scan(step, (begin, tx.init(begin)), length=steps)
        return loss(x) / loss(begin)

    def best(make, rates):
        decay = jax.vmap(lambda rate: final(make(lambda t: rate * (1 - t / 500))))
        return float(np.nanmin(jax.jit(decay)(jnp.asarray(rates))))

    kron = best(
        lambda rate: optax.chain(ox.scale_by_kron(), ox.descend(rate)), [0.03, 0.1]
    )
    adam = best(ox.adam, np.geomspace(1e-3, 1.0, 7))
    sgd = best(lambda rate: ox.sgd(rate, momentum=0.9), np.geomspace(1e-7, 1e-5, 5))
    assert kron < 0.01 * min(adam, sgd)
