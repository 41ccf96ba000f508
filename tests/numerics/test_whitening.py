"""Fitting Kronecker factors: the reference, what it keeps, what it converges to."""

import functools

import jax
import numpy as np
import pytest

from optaxplus.numerics import whitening
from tests.assertions import assert_trees_close, assert_trees_equal
from tests.references.psgd import fit_factor

SHAPE = (6, 4)
# Which factors are diagonal: of rows, of columns.
KINDS = [(False, False), (False, True), (True, False), (True, True)]
each_kind = pytest.mark.parametrize("diagonal", KINDS)

# Compiling takes longer than running.
_FAST = {"xla_backend_optimization_level": 0}
fit_factors = jax.jit(whitening.fit_factors, compiler_options=_FAST)
precondition = jax.jit(whitening.precondition, compiler_options=_FAST)


def factors(diagonal=(False, False), seed: int = 0, dtype="float32"):
    """Upper triangular factors, or the diagonals of diagonal ones."""
    rng = np.random.default_rng(seed)
    found = []
    for side, is_diagonal in zip(SHAPE, diagonal, strict=True):
        scales = rng.uniform(0.5, 2.0, (side, 1))
        mixing = np.triu(rng.standard_normal((side, side)), 1)
        found.append(scales if is_diagonal else np.diag(scales[:, 0]) + 0.3 * mixing)
    return tuple(factor.astype(dtype) for factor in found)


def normal(*shape: int, seed: int = 0, dtype="float32") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def full(factor: np.ndarray) -> np.ndarray:
    """As a matrix."""
    factor = np.asarray(factor, np.float64)
    return np.diag(factor[:, 0]) if factor.shape[-1] == 1 else factor


def kronecker(left, right) -> np.ndarray:
    """P, as a matrix of pairs of rows and columns."""
    left, right = full(left), full(right)
    return np.kron(left.T @ left, right.T @ right)


def reference(m, left, right, v, rate):
    left, right = full(left), full(right)
    h = m + np.sqrt(2.0**-23) * np.abs(m).mean() * v
    a = left @ h @ right.T
    b = np.linalg.inv(left).T @ v @ np.linalg.inv(right)
    return a, b, left, right


@each_kind
@pytest.mark.parametrize("rate", [0.1, 0.9])
def test_reference(diagonal, rate: float, x64):
    left, right = factors(diagonal, dtype="float64")
    m, v = (normal(*SHAPE, seed=seed, dtype="float64") for seed in (1, 2))
    a, b, full_left, full_right = reference(m, left, right, v, rate)
    expected = kronecker(
        fit_factor(full_left, a @ a.T, b @ b.T, rate, diagonal[0]),
        fit_factor(full_right, a.T @ a, b.T @ b, rate, diagonal[1]),
    )
    # Float64 roundings; P, because the factors are balanced otherwise.
    found = kronecker(*fit_factors(m, left, right, v, rate))
    assert_trees_close(found, expected, rtol=1e-13)
    p = full_left.T @ full_left @ m @ full_right.T @ full_right
    update = precondition(m, left, right, None)
    assert_trees_close(update, p, rtol=1e-13)
    limited = precondition(m, left, right, 0.5)
    assert_trees_close(limited, p * 0.5 / np.sqrt((p**2).mean()), rtol=1e-13)


@each_kind
def test_factors_stay_upper_triangular_and_positive(diagonal):
    left, right = factors(diagonal)
    for step in range(30):
        # From almost nothing to almost everything, of rank 1.
        m = 1e3 ** (step % 5 - 2) * np.outer(normal(6, seed=step), normal(4))
        left, right = fit_factors(m, left, right, normal(*SHAPE, seed=step), 0.99)
        for factor in (left, right):
            assert np.linalg.eigvals(full(factor)).min() > 0
            np.testing.assert_array_equal(np.tril(full(factor), -1), 0.0)


def test_the_bound_of_the_norm():
    for seed in range(20):
        root = normal(6, 6, seed=seed) * np.geomspace(1.0, 10.0**-seed, 6)
        gram = np.float32(root @ root.T)
        exact = np.linalg.norm(gram, 2)
        bound = float(whitening._spectral_norm_bound(gram)[0, 0])
        # Never above the norm, but for rounding; never below the longest column.
        assert bound <= exact * (1 + 1e-5)
        assert bound >= np.linalg.norm(gram, axis=0).max() * (1 - 1e-5)


@each_kind
def test_balance_changes_nothing_but_the_factors(diagonal):
    left, right = factors(diagonal)
    m, v = normal(*SHAPE, seed=1), normal(*SHAPE, seed=2)
    expected = fit_factors(m, left, right, v, 0.1)
    for shift in (-20, 20):
        unbalanced = left * np.float32(2.0) ** shift, right * np.float32(2.0) ** -shift
        found = fit_factors(m, *unbalanced, v, 0.1)
        # Powers of 2, so bit by bit.
        assert_trees_equal(
            precondition(m, *unbalanced, None), precondition(m, left, right, None)
        )
        assert_trees_equal(
            precondition(m, *found, None), precondition(m, *expected, None)
        )
        sizes = [np.abs(factor).max() for factor in found]
        assert 1 / 4 <= sizes[0] / sizes[1] <= 4


@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e-10, 1e10, 1e30, 1e37])
def test_any_size_of_gradient(size: float):
    left, right = factors()
    v, signs = normal(*SHAPE, seed=2), np.sign(normal(*SHAPE, seed=1))
    m = signs * np.float32(size)
    # Beside V what is this small is nothing, and what is this large is all.
    small = size < 1
    extreme = signs * np.float32(1e-9 if small else 1e9)
    expected = fit_factors(extreme, left, right, v, 0.1)
    assert_trees_close(fit_factors(m, left, right, v, 0.1), expected, rtol=1e-6)
    update = precondition(m, left, right, 1.1)
    rms = float(np.sqrt(np.mean(np.square(update))))
    if small:
        assert np.abs(update).max() < 1e3 * size
        assert np.all(np.asarray(update) != 0)
    else:
        np.testing.assert_allclose(rms, 1.1, rtol=1e-6)


def test_gradients_times_c_are_factors_over_root_c():
    left, right = factors()
    m, v = normal(*SHAPE, seed=1), normal(*SHAPE, seed=2)
    update = precondition(m, *fit_factors(m, left, right, v, 0.1), None)
    for exponent in (-10, 10):
        c = np.float32(4.0) ** exponent
        other = fit_factors(m * c, left / np.sqrt(c), right, v, 0.1)
        # Powers of 2 again, but the larger of A and B is another, so it is rounded.
        assert_trees_close(precondition(m * c, *other, None), update, rtol=2e-6)


@pytest.mark.parametrize("bad", [0.0, 1e-45, np.nan, np.inf])
def test_unusable_matrices_keep_their_factors(bad: float):
    left, right = (np.stack([factor] * 2) for factor in factors())
    m = normal(2, *SHAPE, seed=1)
    m[0] = 0.0
    m[0, 0, 1] = bad
    found = fit_factors(m, left, right, normal(*SHAPE), 0.1)
    for new, old in zip(found, (left, right), strict=True):
        assert_trees_equal(new[0], old[0])
        assert np.all(np.asarray(new[1]) != old[1], where=old[1] != 0)
        assert np.isfinite(new).all()


@each_kind
def test_batches_are_one_after_the_other(diagonal):
    pairs = [factors(diagonal, seed=seed) for seed in range(3)]
    left, right = (np.stack(side) for side in zip(*pairs, strict=True))
    m = normal(3, *SHAPE, seed=4) * np.float32([1e-6, 1.0, 1e6]).reshape(3, 1, 1)
    v = normal(*SHAPE)
    together = fit_factors(m, left, right, v, 0.1)
    updates = precondition(m, left, right, 1.1)
    for index, pair in enumerate(pairs):
        alone = fit_factors(m[index], *pair, v, 0.1)
        # Sums in another order.
        assert_trees_close([q[index] for q in together], list(alone), rtol=1e-6)
        update = precondition(m[index], *pair, 1.1)
        assert_trees_close(updates[index], update, rtol=1e-6)


@functools.cache
def mixed_gradients(steps: int):
    """A·Z·B with Z normal: A·Aᵀ of condition 900, BᵀB of condition 100."""
    rng = np.random.default_rng(0)

    def mixing(side: int, smallest: float) -> np.ndarray:
        left, right = (
            np.linalg.qr(rng.standard_normal((side, side)))[0] for _ in range(2)
        )
        return left * np.geomspace(smallest, 1.0, side) @ right

    a, b = mixing(4, 1 / 30), mixing(3, 1 / 10)
    z, v = rng.standard_normal((2, steps, 4, 3))
    return a, b, np.float32(a @ z @ b), np.float32(v)


def test_preconditioned_gradients_become_white():
    steps = 6000
    a, b, grads, noise = mixed_gradients(steps)

    @jax.jit
    def run(grads, noise):
        def step(pair, inputs):
            g, v = inputs
            pair = whitening.fit_factors(g, *pair, v, 0.02)
            return pair, whitening.precondition(g, *pair, None)

        return jax.lax.scan(
            step,
            (np.eye(4, dtype="float32"), np.eye(3, dtype="float32")),
            (grads, noise),
        )

    (left, right), updates = run(grads, noise)
    # The exact covariance, P·C·P, of which C has eigenvalues from 1.1e-5 to 1; the fit
    # to single gradients is noisy.
    p = kronecker(left, right)
    eigenvalues = np.linalg.eigvalsh(p @ np.kron(a @ a.T, b.T @ b) @ p)
    assert 0.5 < eigenvalues.min() < eigenvalues.max() < 2.0
    # The last third, while the fit goes on: 2000 samples are 0.1 from their mean.
    found = np.cov(np.asarray(updates)[-2000:].reshape(-1, 12).T)
    assert np.abs(found - np.eye(12)).max() < 0.3
