"""References of the methods that scale the step of a block by a ratio of norms.

The array given to a reference is one block (in the papers: one layer).

References:
    You, Gitman, Ginsburg, Large batch training of convolutional networks, 2017,
    https://arxiv.org/abs/1708.03888, equation 6 and Algorithm 1 (LARS).
    You et al., Large batch optimization for deep learning: training BERT in 76 minutes,
    2020, https://arxiv.org/abs/1904.00962, Algorithm 2 (LAMB).
"""

from typing import Literal

import numpy as np
import numpy.typing as npt

from tests.references.adaptive import adam_directions
from tests.references.conventions import (
    Array,
    Grads,
    LearningRate,
    as_float64,
    learning_rate_at,
    norm,
)


def lars(
    params: npt.ArrayLike,
    grads: Grads,
    *,
    learning_rate: LearningRate,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    trust_coefficient: float = 0.001,
    eps: float = 0.0,
    form: Literal["paper", "optax"] = "paper",
) -> list[Array]:
    """Runs LARS and returns the parameters after every step.

    The two forms differ in the denominator of the trust ratio only. In both, the
    learning rate is inside the momentum buffer, so a schedule acts on each gradient
    when it arrives. A ratio with a zero norm on either side is 1.

    Args:
        params: the initial parameters.
        grads: one gradient per step.
        learning_rate: gamma, number or function of the 0-based step.
        momentum: decay of the buffer.
        nesterov: whether to step along ``d + momentum * u`` instead of the buffer
            ``u``, where ``d`` is what enters the buffer in this step (not in the
            paper; as in optax).
        weight_decay: beta, an L2 penalty that enters the gradient.
        trust_coefficient: eta.
        eps: added to the denominator (not in the paper).
        form: "paper" divides by ``norm(g) + weight_decay * norm(w)``, "optax" by
            ``norm(g + weight_decay * w)``.
    """
    w = as_float64(params)
    u = np.zeros_like(w)
    trajectory = []
    for step, g in enumerate(map(as_float64, grads)):
        decayed = g + weight_decay * w
        if form == "paper":
            denominator = norm(g) + weight_decay * norm(w)
        else:
            denominator = norm(decayed)
        if norm(w) == 0.0 or denominator == 0.0:
            local_rate = 1.0
        else:
            local_rate = trust_coefficient * norm(w) / (denominator + eps)
        d = learning_rate_at(learning_rate, step) * local_rate * decayed
        u = momentum * u + d
        w = w - (d + momentum * u if nesterov else u)
        trajectory.append(w)
    return trajectory


def lamb(
    params: npt.ArrayLike,
    grads: Grads,
    *,
    learning_rate: LearningRate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    eps_root: float = 0.0,
    weight_decay: float = 0.0,
) -> list[Array]:
    """Runs LAMB and returns the parameters after every step.

    With bias correction and phi the identity, as TensorFlow Addons and optax do. A
    ratio with a zero norm on either side is 1.

    Args:
        params: the initial parameters.
        grads: one gradient per step.
        learning_rate: number or function of the 0-based step.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the square root of the second moment.
        eps_root: added under the root.
        weight_decay: lambda; enters the direction before its norm is taken.
    """
    x = as_float64(params)
    directions = adam_directions(grads, b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    trajectory = []
    for step, r in enumerate(directions):
        q = r + weight_decay * x
        ratio = norm(x) / norm(q) if norm(x) and norm(q) else 1.0
        x = x - learning_rate_at(learning_rate, step) * ratio * q
        trajectory.append(x)
    return trajectory
