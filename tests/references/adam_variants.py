"""References of the methods that change one thing in Adam.

References:
    Dozat, Incorporating Nesterov momentum into Adam, 2016, Algorithm 2, with the
    schedule of ``torch.optim.NAdam`` (NAdam).
    Liu et al., On the variance of the adaptive learning rate and beyond, 2020,
    https://arxiv.org/abs/1908.03265, Algorithm 2, with the threshold and the epsilon of
    ``torch.optim.RAdam`` (RAdam).
    Wortsman et al., Stable and low-precision training for large-scale vision-language
    models, 2023, https://arxiv.org/abs/2304.13013, Algorithm 2, with the epsilons and
    the averages of optimi's ``StableAdamW`` (StableAdamW).
    Zhang et al., Adam-mini: use fewer learning rates to gain more, 2024,
    https://arxiv.org/abs/2406.16793, Algorithm 1 (Adam-mini).
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from tests.references.conventions import (
    Array,
    Grads,
    LearningRate,
    as_float64,
    learning_rate_at,
    rms,
)
from tests.references.weight_decay import descend, follow


def nadam(
    params: npt.ArrayLike,
    grads: Grads,
    *,
    learning_rate: LearningRate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    momentum_decay: float = 4e-3,
    weight_decay: float = 0.0,
) -> list[Array]:
    """Runs NAdam and returns the parameters after every step.

    Dozat's momentum ``mu_t`` grows from ``b1 / 2`` to ``b1`` and corrects the biases;
    the moments themselves decay with ``b1`` and ``b2``.

    Args:
        params: the initial parameters.
        grads: one gradient per step.
        learning_rate: number or function of the 0-based step.
        b1: decay of the first moment, and what ``mu_t`` tends to.
        b2: decay of the second moment.
        eps: added to the square root of the corrected second moment.
        momentum_decay: psi in ``mu_t = b1 * (1 - 0.96 ** (t * psi) / 2)``.
        weight_decay: decoupled weight decay.
    """

    def mu(t: int) -> float:
        return b1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))

    def directions() -> Iterator[Array]:
        m: Array | float = 0.0
        v: Array | float = 0.0
        product = 1.0
        for t, g in enumerate(map(as_float64, grads), start=1):
            product *= mu(t)
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * g**2
            m_hat = mu(t + 1) * m / (1 - product * mu(t + 1))
            g_hat = (1 - mu(t)) * g / (1 - product)
            yield (m_hat + g_hat) / (np.sqrt(v / (1 - b2**t)) + eps)

    return follow(
        params, directions(), learning_rate=learning_rate, weight_decay=weight_decay
    )


def radam_directions(
    grads: Grads,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    threshold: float = 5.0,
) -> Iterator[Array]:
    """Yields RAdam's direction of every step.

    Args:
        grads: one gradient per step.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the square root of the second moment before its bias is corrected,
            as in the authors' code and in PyTorch (optax: after that).
        threshold: the direction is the corrected first moment alone unless rho, the
            length of the average behind the second moment, is greater than this.
    """
    m: Array | float = 0.0
    v: Array | float = 0.0
    rho_inf = 2 / (1 - b2) - 1
    for t, g in enumerate(map(as_float64, grads), start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        m_hat = m / (1 - b1**t)
        rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
        if rho > threshold:
            rectification = np.sqrt(
                (rho - 4) / (rho_inf - 4) * (rho - 2) / (rho_inf - 2) * rho_inf / rho
            )
            yield rectification * m_hat * np.sqrt(1 - b2**t) / (np.sqrt(v) + eps)
        else:
            yield m_hat


def radam(
    params: npt.ArrayLike,
    grads: Grads,
    *,
    learning_rate: LearningRate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    threshold: float = 5.0,
    weight_decay: float = 0.0,
) -> list[Array]:
    """Runs RAdam and returns the parameters after every step.

    Args:
        params: the initial parameters.
        grads: one gradient per step.
        learning_rate: number or function of the 0-based step.
        b1: see `radam_directions`.
        b2: see `radam_directions`.
        eps: see `radam_directions`.
        threshold: see `radam_directions`.
        weight_decay: decoupled weight decay.
    """
    return follow(
        params,
        radam_directions(grads, b1=b1, b2=b2, eps=eps, threshold=threshold),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
    )


def stable_adamw(
    params: npt.ArrayLike,
    grads: Grads,
    *,
    learning_rate: LearningRate,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-6,
    weight_decay: float = 1e-2,
) -> list[Array]:
    """Runs StableAdamW and returns the parameters after every step.

    The learning rate of the block, and with it the weight decay, falls where the
    gradient is larger than its second moment says.

    Args:
        params: the initial parameters.
        grads: one gradient per step.
        learning_rate: number or function of the 0-based step.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the square root of the second moment; its square is the least
            second moment in the RMS.
        weight_decay: decoupled weight decay.
    """
    p = as_float64(params)
    m = np.zeros_like(p)
    v = np.zeros_like(p)
    trajectory = []
    for t, g in enumerate(map(as_float64, grads), start=1):
        # Averages with these rates are the bias-corrected moments.
        b1_hat = b1 * (1 - b1 ** (t - 1)) / (1 - b1**t)
        b2_hat = b2 * (1 - b2 ** (t - 1)) / (1 - b2**t)
        m = b1_hat * m + (1 - b1_hat) * g
        v = b2_hat * v + (1 - b2_hat) * g**2
        excess = rms(g / np.sqrt(np.maximum(v, eps**2)))
        lr = learning_rate_at(learning_rate, t - 1) / max(1.0, excess)
        p = descend(p, m / (np.sqrt(v) + eps), lr, weight_decay)
        trajectory.append(p)
    return trajectory


def adam_mini(
    params: npt.ArrayLike,
    grads: Grads,
    *,
    learning_rate: LearningRate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    by_output: bool = False,
) -> list[Array]:
    """Runs Adam-mini and returns the parameters after every step.

    AdamW whose second moment is one number for the whole block, the average of the mean
    of the squared gradient.

    Args:
        params: the initial parameters.
        grads: one gradient per step.
        learning_rate: number or function of the 0-based step.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the square root of the second moment.
        weight_decay: decoupled weight decay.
        by_output: whether every column of a (fan_in, fan_out) matrix is a block of its
            own.
    """
    over = 0 if by_output else None

    def directions() -> Iterator[Array]:
        m: Array | float = 0.0
        v: Array | float = 0.0
        for t, g in enumerate(map(as_float64, grads), start=1):
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * np.mean(g**2, axis=over)
            yield m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)

    return follow(
        params, directions(), learning_rate=learning_rate, weight_decay=weight_decay
    )
