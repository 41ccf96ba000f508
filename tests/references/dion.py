"""Reference of Dion.

References:
    Ahn et al., Dion: Distributed Orthonormalized Updates, 2025,
    https://arxiv.org/abs/2504.05295, Algorithm 1; which side of a matrix the basis is
    on from the authors' https://github.com/microsoft/dion (`dion_reference.py`).
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tests.references.conventions import Array, Grads, as_float64


class DionStep(NamedTuple):
    """What one step leaves: U, M and Q, and the factors P and R before it."""

    update: Array
    momentum: Array
    basis: Array
    left: Array
    right: Array


def dion(
    grads: Grads,
    basis: npt.ArrayLike,
    *,
    b1: float = 0.95,
    eps: float = 0.0,
    power_iterations: int = 1,
) -> list[DionStep]:
    """Runs Dion on one matrix and returns what every step leaves.

    Args:
        grads: one gradient per step, in the authors' shape (fan_out, fan_in).
        basis: the initial Q, shape (min(fan_out, fan_in), rank).
        b1: the paper's mu.
        eps: added to the norms of the columns of R.
        power_iterations: in every step.
    """
    q = as_float64(basis)
    steps = []
    m = None
    for g in map(as_float64, grads):
        # Matrices with fewer rows than columns are turned over.
        is_turned = g.shape[0] < g.shape[1]
        m = g.copy() if m is None else m + g
        b = m.T if is_turned else m
        r = q
        for _ in range(power_iterations):
            p, _ = np.linalg.qr(b @ r)
            r = b.T @ p
        b = b - (1 - b1) * p @ r.T
        q = r / (np.linalg.norm(r, axis=0, keepdims=True) + eps)
        u = p @ q.T
        m = b.T if is_turned else b
        steps.append(DionStep(u.T if is_turned else u, m, q, p, r))
    return steps
