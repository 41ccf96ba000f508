"""Reference of Sophia.

References:
    Liu et al., Sophia: a scalable stochastic second-order optimizer for language model
    pre-training, 2023, https://arxiv.org/abs/2305.14342, Algorithm 3.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from tests.references.conventions import Array, Grads, LearningRate, as_float64
from tests.references.weight_decay import follow


def sophia_directions(
    grads: Grads,
    hessians: Grads,
    *,
    b1: float = 0.96,
    b2: float = 0.99,
    gamma: float = 0.01,
    eps: float = 1e-12,
    update_interval: int = 10,
    first_refresh: int = 0,
    debias: bool = False,
) -> Iterator[Array]:
    """Yields the direction of every step, whose entries are at most 1.

    Args:
        grads: one gradient per step.
        hessians: one estimate of the diagonal per step, of which the steps without a
            refresh make no use.
        b1: decay of the average of the gradients.
        b2: decay of the average of the estimates.
        gamma: factor of the latter.
        eps: smallest denominator.
        update_interval: steps from one refresh to the next.
        first_refresh: 0-based step of the first refresh, which is before the update.
        debias: whether the average of the gradients is divided by ``1 - b1**t``.
    """
    m: Array | float = 0.0
    h: Array | float = 0.0
    for step, (g, estimate) in enumerate(zip(grads, hessians, strict=True)):
        m = b1 * m + (1 - b1) * as_float64(g)
        if step >= first_refresh and (step - first_refresh) % update_interval == 0:
            h = b2 * h + (1 - b2) * as_float64(estimate)
        numerator = m / (1 - b1 ** (step + 1)) if debias else m
        yield np.clip(numerator / np.maximum(gamma * h, eps), -1.0, 1.0)


def sophia(
    params: npt.ArrayLike,
    grads: Grads,
    *,
    hessians: Grads | None = None,
    learning_rate: LearningRate,
    weight_decay: float = 0.0,
    b1: float = 0.96,
    b2: float = 0.99,
    gamma: float = 0.01,
    eps: float = 1e-12,
    update_interval: int = 10,
    first_refresh: int = 0,
    debias: bool = False,
) -> list[Array]:
    """Runs Sophia and returns the parameters after every step.

    Args:
        params: the initial parameters.
        grads: one gradient per step.
        hessians: one estimate of the diagonal per step; None for the squares of the
            gradients.
        learning_rate: number or function of the 0-based step.
        weight_decay: decoupled weight decay, multiplied by the learning rate.
        b1: see `sophia_directions`.
        b2: see `sophia_directions`.
        gamma: see `sophia_directions`.
        eps: see `sophia_directions`.
        update_interval: see `sophia_directions`.
        first_refresh: see `sophia_directions`.
        debias: see `sophia_directions`.
    """
    grads = [as_float64(g) for g in grads]
    directions = sophia_directions(
        grads,
        [g * g for g in grads] if hessians is None else hessians,
        b1=b1,
        b2=b2,
        gamma=gamma,
        eps=eps,
        update_interval=update_interval,
        first_refresh=first_refresh,
        debias=debias,
    )
    return follow(
        params, directions, learning_rate=learning_rate, weight_decay=weight_decay
    )
