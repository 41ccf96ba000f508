"""References of Shampoo and SOAP, for one matrix.

References:
    Gupta, Koren, Singer, Shampoo: Preconditioned Stochastic Tensor Optimization, 2018,
    https://arxiv.org/abs/1802.09568, Algorithm 1.
    Shi et al., A Distributed Data-Parallel PyTorch Implementation of the Distributed
    Shampoo Optimizer, 2023, https://arxiv.org/abs/2309.06497 (averages, grafting).
    Vyas et al., SOAP: Improving and Stabilizing Shampoo using Adam, 2024,
    https://arxiv.org/abs/2409.11321, Algorithm 3, and
    https://github.com/nikhilvyas/SOAP (`soap.py`: the first step, the order of things
    in a refresh, eps).

What rounding errors decide there is decided here as in the library: eigenvalues of a
root do not go below eps times the Frobenius norm, and eigenvectors of eigenvalues that
are zero come from the coordinates.
"""

import numpy as np
import numpy.typing as npt

from tests.references.conventions import (
    Array,
    Grads,
    LearningRate,
    as_float64,
    learning_rate_at,
)

# Far above what is zero up to rounding, and below any other eigenvalue of the tests.
_ZERO = 1e-9


def inverse_root(x: Array, order: int, eps: float) -> Array:
    """x^(-1/order) with eigenvalues of at least eps·‖x‖; zero for a zero matrix."""
    values, vectors = np.linalg.eigh(x)
    norm = np.linalg.norm(x)
    if norm == 0:
        return np.zeros_like(x)
    return (vectors * np.maximum(values, eps * norm) ** (-1 / order)) @ vectors.T


def eigenbasis(x: Array) -> Array:
    """Eigenvectors, the largest eigenvalue first."""
    values, vectors = np.linalg.eigh(x)
    values, vectors = values[::-1], vectors[:, ::-1]
    known = vectors[:, values > _ZERO * values[0]]
    ramp = np.diag(np.linspace(1.0, 0.5, len(x)))
    rest = np.eye(len(x)) - known @ known.T
    _, others = np.linalg.eigh(rest @ ramp @ rest)
    return np.hstack([known, others[:, ::-1][:, : len(x) - known.shape[1]]])


def next_eigenbasis(x: Array, basis: Array) -> tuple[Array, npt.NDArray[np.intp]]:
    """(one orthogonal iteration, order of the old columns)."""
    order = np.argsort(-np.diag(basis.T @ x @ basis), kind="stable")
    return np.linalg.qr(x @ basis[:, order])[0], order


def soap(
    params: Array,
    grads: Grads,
    *,
    learning_rate: LearningRate,
    b1: float = 0.95,
    b2: float = 0.95,
    b3: float | None = None,
    eps: float = 1e-8,
    update_interval: int = 10,
    max_dim: int = 10000,
    weight_decay: float = 0.0,
    fan_in: int = 0,
    fan_out: int = 0,
) -> list[Array]:
    """Runs SOAP and returns the parameters after every step.

    Args:
        params: the initial matrix.
        grads: one gradient per step; the first one makes the bases.
        learning_rate: number, or function of the number of finished steps.
        b1: decay rate of the mean.
        b2: decay rate of the mean square.
        b3: decay rate of the factors; None: b2.
        eps: added to the root of the mean square, before its bias correction.
        update_interval: steps between refreshes.
        max_dim: larger sides have no basis.
        weight_decay: decoupled, of the old parameters.
        fan_in: not needed.
        fan_out: not needed.
    """
    del fan_in, fan_out
    b3 = b2 if b3 is None else b3
    p = as_float64(params)
    rows, columns = p.shape
    left, right = np.zeros((rows, rows)), np.zeros((columns, columns))
    basis_l, basis_r = np.eye(rows), np.eye(columns)
    m, v = np.zeros_like(p), np.zeros_like(p)
    results = []
    for t, g in enumerate(map(as_float64, grads)):
        rate = learning_rate_at(learning_rate, t)
        u = np.zeros_like(p)
        if t > 0:
            rotated = basis_l.T @ g @ basis_r
            m = b1 * m + (1 - b1) * rotated
            v = b2 * v + (1 - b2) * rotated**2
            u = basis_l @ (m / (np.sqrt(v) + eps)) @ basis_r.T
            u *= np.sqrt(1 - b2**t) / (1 - b1**t)
        left = b3 * left + (1 - b3) * g @ g.T
        right = b3 * right + (1 - b3) * g.T @ g
        momentum = basis_l @ m @ basis_r.T
        if rows <= max_dim:
            if t == 0:
                basis_l = eigenbasis(left)
            elif t % update_interval == 0:
                basis_l, order = next_eigenbasis(left, basis_l)
                v = v[order]
        if columns <= max_dim:
            if t == 0:
                basis_r = eigenbasis(right)
            elif t % update_interval == 0:
                basis_r, order = next_eigenbasis(right, basis_r)
                v = v[:, order]
        m = basis_l.T @ momentum @ basis_r
        p = p - rate * (u + weight_decay * p)
        results.append(p)
    return results


def shampoo(
    params: Array,
    grads: Grads,
    *,
    learning_rate: LearningRate,
    b1: float = 0.95,
    b2: float = 0.95,
    b3: float = 0.95,
    eps: float = 1e-6,
    update_interval: int = 10,
    max_dim: int = 1024,
    grafting: str | None = "adam",
    grafting_eps: float = 1e-8,
    weight_decay: float = 0.0,
    fan_in: int = 0,
    fan_out: int = 0,
) -> list[Array]:
    """Runs Shampoo and returns the parameters after every step.

    Args:
        params: the initial matrix.
        grads: one gradient per step.
        learning_rate: number, or function of the number of finished steps.
        b1: decay rate of the mean.
        b2: decay rate of the factors; 1: sums.
        b3: decay rate of the mean square of "adam".
        eps: smallest eigenvalue of a factor, relative to its Frobenius norm.
        update_interval: steps between refreshes, of which the first step is one.
        max_dim: larger sides have a diagonal factor.
        grafting: None, "sgd", "adagrad" or "adam".
        grafting_eps: added to the root of the mean square.
        weight_decay: decoupled, of the old parameters.
        fan_in: not needed.
        fan_out: not needed.
    """
    del fan_in, fan_out
    p = as_float64(params)
    factors = [np.zeros((n, n)) for n in p.shape]
    roots = [np.zeros((n, n)) for n in p.shape]
    m, v = np.zeros_like(p), np.zeros_like(p)
    new = 1.0 if b2 == 1 else 1 - b2
    results = []
    for t, g in enumerate(map(as_float64, grads), start=1):
        moments = [g @ g.T, g.T @ g]
        for side, moment in enumerate(moments):
            if p.shape[side] > max_dim:
                moment = np.diag(np.diag(moment))
            factors[side] = b2 * factors[side] + new * moment
        m = b1 * m + (1 - b1) * g
        mean = m / (1 - b1**t)
        if (t - 1) % update_interval == 0:
            debias = 1.0 if b2 == 1 else 1 - b2**t
            roots = [inverse_root(factor / debias, 4, eps) for factor in factors]
        u = roots[0] @ mean @ roots[1]
        if grafting == "adagrad":
            v = v + g**2
            mean = mean / (np.sqrt(v) + grafting_eps)
        if grafting == "adam":
            v = b3 * v + (1 - b3) * g**2
            mean = mean / (np.sqrt(v / (1 - b3**t)) + grafting_eps)
        if grafting is not None and np.linalg.norm(u) > 0:
            u = u * np.linalg.norm(mean) / np.linalg.norm(u)
        rate = learning_rate_at(learning_rate, t - 1)
        p = p - rate * (u + weight_decay * p)
        results.append(p)
    return results
