"""References of the methods whose steps are signs.

References:
    Bernstein et al., signSGD: compressed optimisation for non-convex problems, 2018,
    https://arxiv.org/abs/1802.04434, Algorithm 2 (Signum). Its momentum is an average
    here, as in optax; a sum has the same sign.
    Chen et al., Symbolic discovery of optimization algorithms, 2023,
    https://arxiv.org/abs/2302.06675, Algorithm 2 (Lion).
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from tests.references.cautious import cautious_directions
from tests.references.conventions import Array, Grads, LearningRate, as_float64
from tests.references.weight_decay import follow


def signum_directions(grads: Grads, *, b1: float = 0.9) -> Iterator[Array]:
    """Yields the sign of the average of the gradients; ``sign(0)`` is 0.

    Args:
        grads: one gradient per step.
        b1: decay of the average.
    """
    m: Array | float = 0.0
    for g in map(as_float64, grads):
        m = b1 * m + (1 - b1) * g
        yield np.sign(m)


def lion_directions(
    grads: Grads, *, b1: float = 0.9, b2: float = 0.99
) -> Iterator[Array]:
    """Yields Lion's direction of every step; ``sign(0)`` is 0.

    The step reads the old momentum, mixed with ``b1``; only then is the momentum
    updated, with ``b2``.

    Args:
        grads: one gradient per step.
        b1: share of the momentum in the mixture whose sign is taken.
        b2: decay of the momentum.
    """
    m: Array | float = 0.0
    for g in map(as_float64, grads):
        yield np.sign(b1 * m + (1 - b1) * g)
        m = b2 * m + (1 - b2) * g


def signum(
    params: npt.ArrayLike,
    grads: Grads,
    *,
    learning_rate: LearningRate,
    b1: float = 0.9,
    weight_decay: float = 0.0,
) -> list[Array]:
    """Runs Signum and returns the parameters after every step.

    Args:
        params: the initial parameters.
        grads: one gradient per step.
        learning_rate: number or function of the 0-based step.
        b1: see `signum_directions`.
        weight_decay: decoupled weight decay, multiplied by the learning rate.
    """
    return follow(
        params,
        signum_directions(grads, b1=b1),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
    )


def lion(
    params: npt.ArrayLike,
    grads: Grads,
    *,
    learning_rate: LearningRate,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.0,
    cautious: bool = False,
) -> list[Array]:
    """Runs Lion and returns the parameters after every step.

    Args:
        params: the initial parameters.
        grads: one gradient per step.
        learning_rate: number or function of the 0-based step.
        b1: see `lion_directions`.
        b2: see `lion_directions`.
        weight_decay: decoupled weight decay, multiplied by the learning rate.
        cautious: whether `cautious_directions` masks the directions.
    """
    grads = list(grads)
    directions = lion_directions(grads, b1=b1, b2=b2)
    return follow(
        params,
        cautious_directions(directions, grads) if cautious else directions,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
    )
