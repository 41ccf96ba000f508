"""References of SGD with momentum, of AdaGrad and of RMSProp.

References:
    Polyak, Some methods of speeding up the convergence of iteration methods, 1964.
    Sutskever, Martens, Dahl, Hinton, On the importance of initialization and momentum
    in deep learning, 2013, equations 3 and 4.
    Duchi, Hazan, Singer, Adaptive subgradient methods for online learning and
    stochastic optimization, 2011, Figure 1 (the diagonal form).
    Hinton, Neural networks for machine learning, lecture 6e, 2012 (RMSProp).
    Graves, Generating sequences with recurrent neural networks, 2013,
    https://arxiv.org/abs/1308.0850, equations 38 to 45 (centered).
    PyTorch documentation of ``torch.optim.SGD``, ``Adagrad`` and ``RMSprop`` (the
    algorithm boxes, for dampening, the first value of the buffers and the epsilons).
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


def adagrad(
    params: npt.ArrayLike,
    grads: Grads,
    *,
    learning_rate: LearningRate,
    eps: float = 1e-10,
    eps_root: float = 0.0,
    initial_accumulator: float = 0.0,
    weight_decay: float = 0.0,
) -> list[Array]:
    """Runs AdaGrad and returns the parameters after every step.

    Args:
        params: the initial parameters.
        grads: one gradient per step.
        learning_rate: number or function of the 0-based step.
        eps: added to the square root of the sum of squares (PyTorch).
        eps_root: added under the root (optax).
        initial_accumulator: what the sum of squares starts from.
        weight_decay: an L2 penalty that enters the gradient.
    """
    p = as_float64(params)
    s = np.full_like(p, initial_accumulator)
    trajectory = []
    for step, g in enumerate(map(as_float64, grads)):
        g = g + weight_decay * p
        s = s + g**2
        u = g / (np.sqrt(s + eps_root) + eps)
        p = p - learning_rate_at(learning_rate, step) * u
        trajectory.append(p)
    return trajectory


def rmsprop(
    params: npt.ArrayLike,
    grads: Grads,
    *,
    learning_rate: LearningRate,
    b2: float = 0.99,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    centered: bool = False,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> list[Array]:
    """Runs RMSProp and returns the parameters after every step.

    No bias is corrected. The learning rate stays outside of the momentum buffer.

    Args:
        params: the initial parameters.
        grads: one gradient per step.
        learning_rate: number or function of the 0-based step.
        b2: decay of the second moment, and of the mean.
        eps: added to the square root (PyTorch).
        eps_root: added under the root (optax).
        centered: whether the square of the mean gradient is taken off the second
            moment. Rounding can make the difference negative, which counts as zero.
        momentum: decay of the sum of the scaled gradients.
        weight_decay: an L2 penalty that enters the gradient.
    """
    p = as_float64(params)
    v = np.zeros_like(p)
    mean = np.zeros_like(p)
    b = np.zeros_like(p)
    trajectory = []
    for step, g in enumerate(map(as_float64, grads)):
        g = g + weight_decay * p
        v = b2 * v + (1 - b2) * g**2
        if centered:
            mean = b2 * mean + (1 - b2) * g
        d = np.sqrt(np.maximum(v - mean**2, 0.0) + eps_root) + eps
        b = momentum * b + g / d
        p = p - learning_rate_at(learning_rate, step) * b
        trajectory.append(p)
    return trajectory
