"""References of the methods that keep a second moment by its row and column means.

References:
    Shazeer, Stern, Adafactor: adaptive learning rates with sublinear memory cost, 2018,
    https://arxiv.org/abs/1804.04235, Algorithms 4 (matrices) and 5 (vectors).
    Luo et al., CAME: confidence-guided adaptive memory efficient optimization, 2023,
    https://arxiv.org/abs/2307.02047, Algorithm 2; vectors as in the authors' code.
"""

import numpy as np
import numpy.typing as npt

from tests.references.clipping import clip_update_rms
from tests.references.conventions import (
    Array,
    Grads,
    LearningRate,
    as_float64,
    learning_rate_at,
    rms,
)
from tests.references.weight_decay import descend


def relative_step(step: int, largest: float = 1e-2) -> float:
    """Returns the paper's ``rho_t = min(1e-2, 1 / sqrt(t))``, a `learning_rate`.

    Args:
        step: the 0-based step, ``t - 1``.
        largest: the value that holds until ``1 / sqrt(t)`` falls below it.
    """
    return min(largest, (step + 1) ** -0.5)


def adafactor(
    params: npt.ArrayLike,
    grads: Grads,
    *,
    learning_rate: LearningRate,
    min_dim_size_to_factor: int = 128,
    decay_rate: float = 0.8,
    eps: float = 1e-30,
    clipping_threshold: float | None = 1.0,
    multiply_by_parameter_scale: bool = True,
    min_scale: float = 1e-3,
    momentum: float | None = None,
    weight_decay_rate: float | None = None,
) -> list[Array]:
    """Runs Adafactor and returns the parameters after every step.

    The paper's Algorithm 4 is ``learning_rate=relative_step`` with
    ``min_dim_size_to_factor=1``; momentum and weight decay are optax's additions.

    Args:
        params: the initial parameters, with one or two axes. Flatten others to the
            (fan_in, fan_out) matrix first.
        grads: one gradient per step.
        learning_rate: rho, number or function of the 0-based step, used as it is.
        min_dim_size_to_factor: a matrix is factored when both sides are at least this.
        decay_rate: the exponent in ``b2_t = 1 - t ** -decay_rate``.
        eps: epsilon_1, added to the squared gradient.
        clipping_threshold: d, the largest root mean square of the direction; None
            leaves it unclipped.
        multiply_by_parameter_scale: whether ``max(min_scale, RMS(p))`` multiplies the
            learning rate.
        min_scale: epsilon_2.
        momentum: decay of an average of the scaled updates, without bias correction;
            None for no average.
        weight_decay_rate: share of the parameters taken off in every step, not
            multiplied by the learning rate; None for no decay.

    Raises:
        ValueError: the array has more than two axes.
    """
    x = as_float64(params)
    if x.ndim > 2:
        raise ValueError(f"adafactor takes a vector or a matrix, got shape {x.shape}.")
    factored = x.ndim == 2 and min(x.shape) >= min_dim_size_to_factor
    r: Array | float = 0.0
    c: Array | float = 0.0
    v: Array | float = 0.0
    m = np.zeros_like(x)
    trajectory = []
    for t, g in enumerate(map(as_float64, grads), start=1):
        b2 = 1 - t**-decay_rate
        squared = g**2 + eps
        if factored:
            r = b2 * r + (1 - b2) * squared.sum(axis=1)
            c = b2 * c + (1 - b2) * squared.sum(axis=0)
            v = np.outer(r, c) / np.sum(r)
        else:
            v = b2 * v + (1 - b2) * squared
        u = g / np.sqrt(v)
        if clipping_threshold is not None:
            u = clip_update_rms(u, clipping_threshold)
        scale = max(min_scale, rms(x)) if multiply_by_parameter_scale else 1.0
        update = learning_rate_at(learning_rate, t - 1) * scale * u
        if momentum is not None:
            m = momentum * m + (1 - momentum) * update
            update = m
        if weight_decay_rate is not None:
            update = update + weight_decay_rate * x
        x = x - update
        trajectory.append(x)
    return trajectory


def came(
    params: npt.ArrayLike,
    grads: Grads,
    *,
    learning_rate: LearningRate,
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float = 0.9999,
    eps: float = 1e-30,
    eps_confidence: float = 1e-16,
    clip_threshold: float = 1.0,
    weight_decay: float = 0.0,
) -> list[Array]:
    """Runs CAME and returns the parameters after every step.

    No bias is corrected. A vector has a second moment of its own size and no
    confidence: it follows the average.

    Args:
        params: the initial parameters, a vector or a matrix.
        grads: one gradient per step.
        learning_rate: number or function of the 0-based step.
        b1: decay of the average of the clipped directions.
        b2: decay of the second moment.
        b3: decay of the instability, the squared distance of the directions from their
            average.
        eps: added to the squared gradient.
        eps_confidence: added to the squared distance.
        clip_threshold: d, the largest root mean square of the direction.
        weight_decay: decoupled weight decay.
    """

    p = as_float64(params)
    is_matrix = p.ndim == 2
    m = np.zeros_like(p)
    v: Array | float = 0.0
    r: Array | float = 0.0
    c: Array | float = 0.0
    r_s: Array | float = 0.0
    c_s: Array | float = 0.0
    trajectory = []
    for step, g in enumerate(map(as_float64, grads)):
        squared = g**2 + eps
        if is_matrix:
            r = b2 * r + (1 - b2) * squared.mean(axis=1)
            c = b2 * c + (1 - b2) * squared.mean(axis=0)
            v = np.outer(r, c) / np.mean(r)
        else:
            v = b2 * v + (1 - b2) * squared
        u = clip_update_rms(g / np.sqrt(v), clip_threshold)
        m = b1 * m + (1 - b1) * u
        direction = m
        if is_matrix:
            instability = (u - m) ** 2 + eps_confidence
            r_s = b3 * r_s + (1 - b3) * instability.mean(axis=1)
            c_s = b3 * c_s + (1 - b3) * instability.mean(axis=0)
            direction = m / np.sqrt(np.outer(r_s, c_s) / np.mean(r_s))
        p = descend(p, direction, learning_rate_at(learning_rate, step), weight_decay)
        trajectory.append(p)
    return trajectory
