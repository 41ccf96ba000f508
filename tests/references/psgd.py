"""Reference of PSGD-Kron.

References:
    Li, Preconditioned stochastic gradient descent, 2015,
    https://arxiv.org/abs/1512.04202 (the fitted criterion, triangular factors).
    Li, Stochastic Hessian fittings on Lie groups, 2024,
    https://arxiv.org/abs/2402.11858.
    psgd_jax 0.2.9, https://github.com/evanatyourservice/psgd_jax (`kron.py`: damping,
    the bound of the norm, the schedule, the limit of the update). With its random
    numbers handed in, ten steps of this transcription are those of the package to
    float32 rounding, and 6000 steps of the schedule are the same.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tests.references.conventions import (
    Array,
    Grads,
    LearningRate,
    as_float64,
    learning_rate_at,
)


class KronStep(NamedTuple):
    """What one step leaves: U, and the factors as full matrices."""

    update: Array
    left: Array
    right: Array


def norm_bound(gram: Array) -> float:
    """A lower bound of the spectral norm of a symmetric matrix.

    Args:
        gram: shape (n, n).
    """
    scaled = gram / np.abs(gram).max()
    column = scaled[:, np.argmax((scaled**2).sum(axis=0))]
    direction = column @ scaled
    direction /= np.linalg.norm(direction)
    return float(np.abs(gram).max() * np.linalg.norm(direction @ scaled))


def fit_factor(q: Array, t1: Array, t2: Array, rate: float, diagonal: bool) -> Array:
    """One step of one factor, from the second moments of A and of B along its axis.

    Args:
        q: the factor, a full matrix.
        t1: A A^T, shape (n, n).
        t2: B B^T, shape (n, n).
        rate: relative step.
        diagonal: whether the factor is diagonal.
    """
    if diagonal:
        t1, t2 = np.diag(np.diag(t1)), np.diag(np.diag(t2))
        return q - rate / np.abs(t1 + t2).max() * (t1 - t2) @ q
    return q - rate / norm_bound(t1 + t2) * np.triu(t1 - t2) @ q


def refreshes(
    steps: int,
    *,
    update_interval: float = 1 / 0.03,
    warmup_steps: int = 500,
    interval_growth: float = 1e-3,
) -> list[bool]:
    """Which steps fit the factors: those at which 1 / probability have passed.

    Args:
        steps: how many.
        update_interval: one over the least probability.
        warmup_steps: where the probability starts to fall from 1.
        interval_growth: how fast it falls.
    """
    passed, found = 0, []
    for n in range(1, steps + 1):
        probability = np.exp(-interval_growth * (n - warmup_steps))
        passed += 1
        due = passed >= 1 / np.clip(probability, 1 / update_interval, 1.0)
        passed = 0 if due else passed
        found.append(bool(due))
    return found


def kron_steps(
    grads: Grads,
    noise: Sequence[Array],
    *,
    b1: float = 0.9,
    preconditioner_learning_rate: float = 0.1,
    init_scale: float = 1.0,
    diagonal: tuple[bool, bool] = (False, False),
    refresh: Sequence[bool] | None = None,
    max_update_rms: float = 1.1,
) -> list[KronStep]:
    """Runs PSGD-Kron on one matrix and returns what every step leaves.

    Args:
        grads: one gradient per step, shape (m, n).
        noise: V of every step.
        b1: decay of the momentum.
        preconditioner_learning_rate: relative step of the fit.
        init_scale: of Q, the Kronecker product of the factors.
        diagonal: which factor is.
        refresh: which steps fit the factors; all if None.
        max_update_rms: largest root mean square of U.
    """
    left, right = (init_scale**0.5 * np.eye(side) for side in np.shape(grads[0]))
    m, steps = np.zeros(np.shape(grads[0])), []
    for t, (g, v) in enumerate(zip(map(as_float64, grads), noise, strict=True), 1):
        v = as_float64(v)
        m = b1 * m + (1 - b1) * g
        mh = m / (1 - b1**t)
        if refresh is None or refresh[t - 1]:
            h = mh + np.sqrt(2.0**-23) * np.abs(mh).mean() * v
            a = left @ h @ right.T
            b = np.linalg.inv(left).T @ v @ np.linalg.inv(right)
            rate = preconditioner_learning_rate
            left, right = (
                fit_factor(left, a @ a.T, b @ b.T, rate, diagonal[0]),
                fit_factor(right, a.T @ a, b.T @ b, rate, diagonal[1]),
            )
            # Equal largest entries.
            ratio = np.sqrt(np.abs(left).max() / np.abs(right).max())
            left, right = left / ratio, right * ratio
        u = left.T @ left @ mh @ right.T @ right
        u = u / max(1.0, np.sqrt((u**2).mean()) / max_update_rms)
        steps.append(KronStep(u, left, right))
    return steps


def kron(
    params: Array,
    grads: Grads,
    noise: Sequence[Array],
    *,
    learning_rate: LearningRate,
    weight_decay: float = 0.0,
    **arguments,
) -> list[Array]:
    """Runs PSGD-Kron on one matrix and returns the parameters after every step.

    Args:
        params: the initial parameters, shape (m, n).
        grads: one gradient per step.
        noise: V of every step.
        learning_rate: number or function of the 0-based step.
        weight_decay: decoupled, multiplied by the learning rate.
        **arguments: see `kron_steps`.
    """
    w, trajectory = as_float64(params), []
    for step, direction in enumerate(kron_steps(grads, noise, **arguments)):
        lr = learning_rate_at(learning_rate, step)
        w = w * (1 - lr * weight_decay) - lr * direction.update
        trajectory.append(w)
    return trajectory
