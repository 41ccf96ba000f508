"""Reference of APOLLO.

References:
    Zhu et al., APOLLO: SGD-like memory, AdamW-level performance, 2024,
    https://arxiv.org/abs/2412.05270, Algorithm 1; the order of bias correction and
    limiter, the side that is projected and the margins from the authors' package
    apollo-torch 1.0.3 (`apollo.py`, `random_projector.py`).
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt

from tests.references.conventions import (
    Array,
    Grads,
    LearningRate,
    as_float64,
    learning_rate_at,
    norm,
)


def apollo(
    params: npt.ArrayLike,
    grads: Grads,
    projection: Callable[[int], npt.ArrayLike],
    *,
    learning_rate: LearningRate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    scale: float = 1.0,
    scaling: Literal["channel", "tensor"] = "channel",
    max_norm_growth: float | None = 1.01,
    weight_decay: float = 0.0,
    decays_last: bool = False,
    margin: float = 0.0,
) -> list[Array]:
    """Runs APOLLO on one matrix (fan_in, fan_out); returns it after every step.

    Args:
        params: the initial parameters.
        grads: one gradient per step.
        projection: step, counted from 0, to P, shape (rank, shorter side).
        learning_rate: a number or a schedule.
        b1: decay of the mean.
        b2: decay of the mean square.
        eps: added to the root of the mean square, before the bias correction.
        scale: the update is multiplied by its root.
        scaling: one factor for each column of the matrix turned so that it has at least
            as many columns as rows, or one for all.
        max_norm_growth: largest ratio of the norm to that of the step before.
        weight_decay: relative to the learning rate.
        decays_last: whether what the step made is decayed, and not what was before.
        margin: added to norms that divide; the package has 1e-8.
    """
    w = as_float64(params)
    is_turned = w.shape[0] > w.shape[1]
    m = v = last = None
    trajectory = []
    for step, gradient in enumerate(map(as_float64, grads)):
        g = gradient.T if is_turned else gradient
        r = as_float64(projection(step)) @ g
        m = (1 - b1) * r if m is None else b1 * m + (1 - b1) * r
        v = (1 - b2) * r**2 if v is None else b2 * v + (1 - b2) * r**2
        adam = m / (np.sqrt(v) + eps)
        if scaling == "channel":
            lengths = np.linalg.norm(adam, axis=0) / (
                np.linalg.norm(r, axis=0) + margin
            )
        else:
            lengths = norm(adam) / (norm(r) + margin)
        u = g * lengths
        if max_norm_growth is not None:
            if last is not None:
                growth = norm(u) / (last + margin)
                u = u * max_norm_growth / max(growth, max_norm_growth)
            last = norm(u)
        t = step + 1
        u = u * np.sqrt(scale) * np.sqrt(1 - b2**t) / (1 - b1**t)
        rate = learning_rate_at(learning_rate, step)
        moved = rate * (u.T if is_turned else u)
        if decays_last:
            w = (w - moved) * (1 - rate * weight_decay)
        else:
            w = w * (1 - rate * weight_decay) - moved
        trajectory.append(w)
    return trajectory
