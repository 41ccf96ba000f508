"""Reference of the cautious mask.

References:
    Liang et al., Cautious optimizers: improving training with one line of code, 2024,
    https://arxiv.org/abs/2411.16085, Algorithm 1. The normalizer is that of the
    authors' code; the listing in the paper adds a small number to the mean instead, and
    the first version of the code multiplied by ``size / (number kept + 1)``.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from tests.references.conventions import Array, Grads, as_float64


def cautious_directions(directions: Iterable[Array], grads: Grads) -> Iterator[Array]:
    """Yields the directions without what points against the gradient of the same step.

    What is left is scaled up by the share of it, so that a direction that keeps a
    quarter of its entries has them four times as large. Where nothing agrees nothing is
    left.

    Args:
        directions: one per step, before learning rate and weight decay.
        grads: the gradient of every step.
    """
    for u, g in zip(directions, map(as_float64, grads), strict=True):
        mask = u * g > 0
        yield u * mask / max(float(np.mean(mask)), 1e-3)
