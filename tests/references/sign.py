"""Reference of Lion.

References:
    Chen et al., Symbolic discovery of optimization algorithms, 2023,
    https://arxiv.org/abs/2302.06675, Algorithm 2.
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


def lion(
    params: npt.ArrayLike,
    grads: Grads,
    *,
    learning_rate: LearningRate,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.0,
) -> list[Array]:
    """Runs Lion and returns the parameters after every step.

    The step reads the old momentum, mixed with ``b1``; only then is the momentum
    updated, with ``b2``. ``sign(0)`` is 0.

    Args:
        params: the initial parameters.
        grads: one gradient per step.
        learning_rate: number or function of the 0-based step.
        b1: share of the momentum in the mixture whose sign is taken.
        b2: decay of the momentum.
        weight_decay: decoupled weight decay, multiplied by the learning rate.
    """
    p = as_float64(params)
    m = np.zeros_like(p)
    trajectory = []
    for step, g in enumerate(map(as_float64, grads)):
        lr = learning_rate_at(learning_rate, step)
        c = b1 * m + (1 - b1) * g
        p = p - lr * (np.sign(c) + weight_decay * p)
        m = b2 * m + (1 - b2) * g
        trajectory.append(p)
    return trajectory
