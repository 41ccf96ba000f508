"""Reference of stochastic gradient descent with momentum.

References:
    Polyak, Some methods of speeding up the convergence of iteration methods, 1964.
    Sutskever, Martens, Dahl, Hinton, On the importance of initialization and momentum
    in deep learning, 2013, equations 3 and 4.
    PyTorch documentation of ``torch.optim.SGD`` (the algorithm box, for dampening and
    for the first value of the buffer).
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


def sgd(
    params: npt.ArrayLike,
    grads: Grads,
    *,
    learning_rate: LearningRate,
    momentum: float = 0.0,
    nesterov: bool = False,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
) -> list[Array]:
    """Runs SGD in PyTorch's form and returns the parameters after every step.

    The buffer starts as the first gradient, undampened, and the learning rate stays
    outside of it. Weight decay is an L2 penalty: it enters the gradient. Without
    momentum there is no buffer, hence no dampening either.

    Args:
        params: the initial parameters.
        grads: one gradient per step.
        learning_rate: number or function of the 0-based step.
        momentum: mu, the decay of the buffer.
        nesterov: whether to step along ``g + mu * b`` instead of ``b``.
        dampening: tau, the share of every gradient but the first that is dropped.
        weight_decay: the L2 coefficient.
    """
    p = as_float64(params)
    b = np.zeros_like(p)
    trajectory = []
    for t, g in enumerate(map(as_float64, grads), start=1):
        g = g + weight_decay * p
        if momentum == 0.0:
            step = g
        else:
            b = g if t == 1 else momentum * b + (1 - dampening) * g
            step = g + momentum * b if nesterov else b
        p = p - learning_rate_at(learning_rate, t - 1) * step
        trajectory.append(p)
    return trajectory
