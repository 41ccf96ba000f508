"""References of the methods that go on from Adam with further moments.

References:
    Xie et al., Adan: adaptive Nesterov momentum algorithm for faster optimizing deep
    models, 2022, https://arxiv.org/abs/2208.06677, Algorithm 1, with the decays written
    as in the authors' code (one minus those of the paper).
    Taniguchi et al., ADOPT: modified Adam can converge with any beta2 with the optimal
    rate, 2024, https://arxiv.org/abs/2411.02853, Algorithms 1 and 2;
    https://github.com/iShohei220/adopt.
    Pagliardini, Ablin, Grangier, The AdEMAMix optimizer: better, faster, older, 2024,
    https://arxiv.org/abs/2409.03137, Algorithm 1 and equation 10 (warm-up of beta3).
    Yuan et al., MARS: unleashing the power of variance reduction for training large
    models, 2024, https://arxiv.org/abs/2411.10438, Algorithms 2 (AdamW) and 3 (Lion).
"""

import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

from tests.references.conventions import (
    Array,
    Grads,
    LearningRate,
    as_float64,
    learning_rate_at,
    norm,
)
from tests.references.weight_decay import descend, follow


def adan(
    params: npt.ArrayLike,
    grads: Grads,
    *,
    learning_rate: LearningRate,
    b1: float = 0.98,
    b2: float = 0.92,
    b3: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: Literal["proximal", "decoupled"] = "proximal",
) -> list[Array]:
    """Runs Adan and returns the parameters after every step.

    Args:
        params: the initial parameters.
        grads: one gradient per step.
        learning_rate: number or function of the 0-based step.
        b1: decay of the average of the gradients.
        b2: decay of the average of their differences, and the factor in front of the
            differences.
        b3: decay of the average of the squares.
        eps: added to the square root.
        weight_decay: see `descend`.
        decay: the paper's "proximal", or "decoupled" (``no_prox`` of the code).
    """

    def directions() -> Iterator[Array]:
        m: Array | float = 0.0
        d: Array | float = 0.0
        n: Array | float = 0.0
        previous: Array | None = None
        for t, g in enumerate(map(as_float64, grads), start=1):
            difference = g - (g if previous is None else previous)
            m = b1 * m + (1 - b1) * g
            d = b2 * d + (1 - b2) * difference
            n = b3 * n + (1 - b3) * (g + b2 * difference) ** 2
            numerator = m / (1 - b1**t) + b2 * d / (1 - b2**t)
            yield numerator / (np.sqrt(n / (1 - b3**t)) + eps)
            previous = g

    return follow(
        params,
        directions(),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        decay=decay,
    )


def adopt(
    params: npt.ArrayLike,
    grads: Grads,
    *,
    learning_rate: LearningRate,
    b1: float = 0.9,
    b2: float = 0.9999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    clip: bool = False,
    b3: float | None = 0.9,
) -> list[Array]:
    """Runs ADOPT and returns the parameters after every step.

    The first gradient only fills the second moment: the parameters stay as they are,
    weight decay included. From then on each gradient is divided by the second moment of
    those before it.

    Args:
        params: the initial parameters.
        grads: one gradient per step.
        learning_rate: number or function of the 0-based step.
        b1: decay of the average of the divided gradients.
        b2: decay of the second moment.
        eps: the least divisor.
        weight_decay: decoupled weight decay.
        clip: Algorithm 2, and the released package: the divided gradients are clipped
            to ``(t - 1) ** 0.25``, their average starts from zero, and ``b3`` is of no
            concern.
        b3: Algorithm 1, where the average starts from the first divided gradient; the
            least divisor falls as ``b3 ** (t - 2)`` until it is ``eps``. None is the
            package told not to clip: neither that nor the start.
    """
    p = as_float64(params)
    m = np.zeros_like(p)
    v = np.zeros_like(p)
    annealed = b3 is not None and not clip
    trajectory = []
    for t, g in enumerate(map(as_float64, grads), start=1):
        if t == 1:
            v = g**2
            trajectory.append(p.copy())
            continue
        least = max(eps, b3 ** (t - 2)) if annealed else eps
        x = g / np.maximum(np.sqrt(v), least)
        if clip:
            x = np.clip(x, -((t - 1) ** 0.25), (t - 1) ** 0.25)
        m = x if annealed and t == 2 else b1 * m + (1 - b1) * x
        v = b2 * v + (1 - b2) * g**2
        p = descend(p, m, learning_rate_at(learning_rate, t - 1), weight_decay)
        trajectory.append(p)
    return trajectory


def ademamix(
    params: npt.ArrayLike,
    grads: Grads,
    *,
    learning_rate: LearningRate,
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float = 0.9999,
    alpha: float = 2.0,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    alpha_warmup: int | None = None,
    b3_warmup: int | None = None,
    half_life_eps: float = 1e-8,
) -> list[Array]:
    """Runs AdEMAMix and returns the parameters after every step.

    Args:
        params: the initial parameters.
        grads: one gradient per step.
        learning_rate: number or function of the 0-based step.
        b1: decay of the fast average.
        b2: decay of the second moment.
        b3: decay of the slow average, which is not corrected for its bias.
        alpha: weight of the slow average.
        eps: added to the square root of the second moment.
        weight_decay: decoupled weight decay.
        alpha_warmup: number of steps in which alpha grows linearly from 0; None for a
            constant.
        b3_warmup: number of steps in which the half-life of the slow average grows
            linearly from that of the fast one; None for a constant.
        half_life_eps: added to a decay before its half-life is taken, by the authors'
            code, for the sake of a ``b1`` of 0; 0 in the paper.
    """

    def half_life(b: float) -> float:
        return math.log(0.5) / math.log(b + half_life_eps) - 1

    def b3_at(t: int) -> float:
        if b3_warmup is None or t >= b3_warmup:
            return b3
        share = t / b3_warmup
        steps = (1 - share) * half_life(b1) + share * half_life(b3)
        return 0.5 ** (1 / (steps + 1))

    def alpha_at(t: int) -> float:
        return alpha if alpha_warmup is None else alpha * min(t / alpha_warmup, 1.0)

    def directions() -> Iterator[Array]:
        m1: Array | float = 0.0
        m2: Array | float = 0.0
        v: Array | float = 0.0
        for t, g in enumerate(map(as_float64, grads), start=1):
            m1 = b1 * m1 + (1 - b1) * g
            m2 = b3_at(t) * m2 + (1 - b3_at(t)) * g
            v = b2 * v + (1 - b2) * g**2
            numerator = m1 / (1 - b1**t) + alpha_at(t) * m2
            yield numerator / (np.sqrt(v / (1 - b2**t)) + eps)

    return follow(
        params, directions(), learning_rate=learning_rate, weight_decay=weight_decay
    )


def mars_corrections(
    grads: Grads, *, b1: float = 0.95, gamma: float = 0.025, max_norm: float = 1.0
) -> Iterator[Array]:
    """Yields the corrected gradient of every step.

    The previous gradient is that of the previous batch (the approximate form). It
    counts as zero in the first step, as in the authors' code.

    Args:
        grads: one gradient per step.
        b1: decay of the momentum that follows.
        gamma: strength of the variance reduction.
        max_norm: the largest norm of the corrected gradient, of the block.
    """
    previous: Array | float = 0.0
    for g in map(as_float64, grads):
        c = g + gamma * b1 / (1 - b1) * (g - previous)
        yield c * (max_norm / norm(c)) if norm(c) > max_norm else c
        previous = g


def mars(
    params: npt.ArrayLike,
    grads: Grads,
    *,
    learning_rate: LearningRate,
    b1: float = 0.95,
    b2: float = 0.99,
    eps: float = 1e-8,
    gamma: float = 0.025,
    max_norm: float = 1.0,
    weight_decay: float = 0.0,
    variant: Literal["adamw", "lion"] = "adamw",
) -> list[Array]:
    """Runs approximate MARS and returns the parameters after every step.

    Args:
        params: the initial parameters.
        grads: one gradient per step.
        learning_rate: number or function of the 0-based step.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the square root of the second moment.
        gamma: see `mars_corrections`.
        max_norm: see `mars_corrections`.
        weight_decay: decoupled weight decay.
        variant: "adamw" divides by the second moment, "lion" takes the sign of the
            first, which has already seen the gradient of the step.
    """

    def directions() -> Iterator[Array]:
        m: Array | float = 0.0
        v: Array | float = 0.0
        corrected = mars_corrections(grads, b1=b1, gamma=gamma, max_norm=max_norm)
        for t, c in enumerate(corrected, start=1):
            m = b1 * m + (1 - b1) * c
            v = b2 * v + (1 - b2) * c**2
            if variant == "lion":
                yield np.sign(m)
            else:
                yield m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)

    return follow(
        params, directions(), learning_rate=learning_rate, weight_decay=weight_decay
    )
