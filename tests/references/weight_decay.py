"""References of the forms of weight decay that stay out of the gradient.

References:
    Loshchilov, Hutter, Decoupled weight decay regularization, 2019,
    https://arxiv.org/abs/1711.05101, Algorithm 2.
    Chen et al., Cautious weight decay, 2025, https://arxiv.org/abs/2510.12402,
    Algorithm 1.
    Xie et al., Adan: adaptive Nesterov momentum algorithm for faster optimizing deep
    models, 2022, https://arxiv.org/abs/2208.06677, Algorithm 1 line 7 (proximal).
"""

from collections.abc import Iterable
from typing import Literal

import numpy.typing as npt

from tests.references.conventions import (
    Array,
    LearningRate,
    as_float64,
    learning_rate_at,
)

Decay = Literal["decoupled", "independent", "cautious", "proximal"]


def descend(
    p: Array,
    u: Array,
    learning_rate: float,
    weight_decay: float,
    decay: Decay = "decoupled",
) -> Array:
    """Returns the parameters after one step along ``-u``, decayed.

    Args:
        p: the parameters before the step.
        u: the direction, before learning rate and weight decay.
        learning_rate: eta of this step.
        weight_decay: lambda.
        decay: "decoupled" is ``p - eta * (u + lambda * p)``, both terms with the old
            ``p``; the same as PyTorch's ``p * (1 - eta * lambda) - eta * u``.
            "independent" leaves eta out of the decay: ``p - eta * u - lambda * p``.
            "cautious" decays only where ``u * p >= 0``, where the step does not already
            lead away from zero. "proximal" is ``(p - eta * u) / (1 + eta * lambda)``.
    """
    if decay == "decoupled":
        return p - learning_rate * (u + weight_decay * p)
    if decay == "independent":
        return p - learning_rate * u - weight_decay * p
    if decay == "cautious":
        return p - learning_rate * (u + weight_decay * p * (u * p >= 0))
    return (p - learning_rate * u) / (1 + learning_rate * weight_decay)


def follow(
    params: npt.ArrayLike,
    directions: Iterable[Array],
    *,
    learning_rate: LearningRate,
    weight_decay: float = 0.0,
    decay: Decay = "decoupled",
) -> list[Array]:
    """Descends along one direction per step; returns the parameters after every one.

    Args:
        params: the initial parameters.
        directions: one per step, computed from the gradients alone.
        learning_rate: number or function of the 0-based step.
        weight_decay: see `descend`.
        decay: see `descend`.
    """
    p = as_float64(params)
    trajectory = []
    for step, u in enumerate(directions):
        lr = learning_rate_at(learning_rate, step)
        p = descend(p, u, lr, weight_decay, decay)
        trajectory.append(p)
    return trajectory
