"""References of Lookahead and of Ranger, which is built on it.

References:
    Yong et al., Gradient centralization: a new optimization technique for deep neural
    networks, 2020, https://arxiv.org/abs/2004.01461, equation 1.
    Zhang et al., Lookahead optimizer: k steps forward, 1 step back, 2019,
    https://arxiv.org/abs/1907.08610, Algorithm 1.
    Wright, Ranger, version 20.4.11, 2020,
    https://github.com/lessw2020/Ranger-Deep-Learning-Optimizer, ``ranger/ranger.py``.
"""

from collections.abc import Iterable

import numpy.typing as npt

from tests.references.adam_variants import radam_directions
from tests.references.conventions import (
    Array,
    Grads,
    LearningRate,
    as_float64,
    learning_rate_at,
)
from tests.references.weight_decay import Decay, descend


def centralized(grad: npt.ArrayLike) -> Array:
    """Returns the gradient with zero mean in front of every output.

    Args:
        grad: a (fan_in, fan_out) matrix, whose mean over fan_in is taken off, or a
            vector, which has no fan_in and stays as it is.
    """
    g = as_float64(grad)
    return g - g.mean(axis=0) if g.ndim == 2 else g


def lookahead(
    params: npt.ArrayLike,
    directions: Iterable[Array],
    *,
    learning_rate: LearningRate,
    every_k: int = 5,
    alpha: float = 0.8,
    weight_decay: float = 0.0,
    decay: Decay = "decoupled",
) -> list[Array]:
    """Runs Lookahead and returns the fast parameters after every step.

    The slow parameters start where the fast ones do. After every ``every_k``-th step
    they move towards the fast ones, which then go on from there; the moments behind
    the directions never notice.

    Args:
        params: the initial parameters.
        directions: what the inner method would step along, such as
            ``adam_directions(grads)``.
        learning_rate: of the inner method; number or function of the 0-based step.
        every_k: number of fast steps to one slow step.
        alpha: how far the slow parameters go towards the fast ones.
        weight_decay: of the inner method, see `descend`.
        decay: see `descend`.
    """
    fast = slow = as_float64(params)
    trajectory = []
    for t, u in enumerate(directions, start=1):
        lr = learning_rate_at(learning_rate, t - 1)
        fast = descend(fast, u, lr, weight_decay, decay)
        if t % every_k == 0:
            fast = slow = slow + alpha * (fast - slow)
        trajectory.append(fast)
    return trajectory


def ranger(
    params: npt.ArrayLike,
    grads: Grads,
    *,
    learning_rate: LearningRate,
    b1: float = 0.95,
    b2: float = 0.999,
    eps: float = 1e-5,
    threshold: float = 5.0,
    every_k: int = 6,
    alpha: float = 0.5,
    weight_decay: float = 0.0,
    centralize: bool = True,
) -> list[Array]:
    """Runs Ranger: RAdam on centralized gradients, inside Lookahead.

    Args:
        params: the initial parameters.
        grads: one gradient per step.
        learning_rate: number or function of the 0-based step.
        b1: see `radam_directions`.
        b2: see `radam_directions`.
        eps: see `radam_directions`.
        threshold: see `radam_directions`.
        every_k: see `lookahead`.
        alpha: see `lookahead`.
        weight_decay: decoupled weight decay.
        centralize: whether the gradient of a matrix loses its mean over fan_in.
    """
    if centralize:
        grads = map(centralized, grads)
    return lookahead(
        params,
        radam_directions(grads, b1=b1, b2=b2, eps=eps, threshold=threshold),
        learning_rate=learning_rate,
        every_k=every_k,
        alpha=alpha,
        weight_decay=weight_decay,
    )
