"""Types and the few conventions that all references share.

Letters follow the papers: ``p`` (or ``w``) is the parameter, ``g`` the gradient, ``t``
the step counted from 1. A schedule is called with the step counted from 0, as optax
does, hence ``learning_rate_at(learning_rate, t - 1)`` in every loop.
"""

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Grads = Iterable[npt.ArrayLike]
LearningRate = float | Callable[[int], float]


def as_float64(x: npt.ArrayLike) -> Array:
    """Returns a float64 copy, so that no reference ever writes into its inputs."""
    return np.array(x, dtype=np.float64)


def learning_rate_at(learning_rate: LearningRate, step: int) -> float:
    """Returns the learning rate of the 0-based ``step``."""
    return float(learning_rate(step) if callable(learning_rate) else learning_rate)


def norm(x: Array) -> float:
    """Returns the Frobenius norm (the L2 norm of all entries)."""
    return float(np.sqrt(np.sum(x * x)))


def rms(x: Array) -> float:
    """Returns the root mean square of all entries."""
    return float(np.sqrt(np.mean(x * x)))
