"""References of the methods that scale the step of a block by a ratio of norms.

The array given to a reference is one block (in the papers: one layer).

References:
    You, Gitman, Ginsburg, Large batch training of convolutional networks, 2017,
    https://arxiv.org/abs/1708.03888, equation 6 and Algorithm 1 (LARS).
    You et al., Large batch optimization for deep learning: training BERT in 76 minutes,
    2020, https://arxiv.org/abs/1904.00962, Algorithm 2 (LAMB).
    NVIDIA apex, ``apex/parallel/LARC.py`` ("apex" below).
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
    form: Literal["paper", "optax", "apex"] = "paper",
    clip: bool = False,
) -> list[Array]:
    """Runs LARS and returns the parameters after every step.

    In the paper and in optax the learning rate is inside the momentum buffer, so a
    schedule acts on each gradient when it arrives; apex leaves it outside.

    Args:
        params: the initial parameters.
        grads: one gradient per step.
        learning_rate: gamma, number or function of the 0-based step.
        momentum: decay of the buffer.
        nesterov: whether to step along ``d + momentum * u`` instead of the buffer
            ``u``, where ``d`` is what enters the buffer in this step (not in the
            paper; as in optax, and in PyTorch's SGD, which apex wraps).
        weight_decay: beta, an L2 penalty that enters the gradient.
        trust_coefficient: eta.
        eps: added to the denominator (not in the paper; 1e-8 in apex).
        form: "paper" divides by ``norm(g) + weight_decay * norm(w)``, "optax" by
            ``norm(g + weight_decay * w)``; a ratio with a zero norm on either side is
            1. "apex" divides as the paper does, but a parameter or gradient of zero
            norm has its gradient neither scaled nor decayed.
        clip: apex's LARC, whose learning rate is the smaller of gamma and the local
            one, and not their product. For "apex" alone.
    """
    w = as_float64(params)
    u = np.zeros_like(w)
    trajectory = []
    for step, g in enumerate(map(as_float64, grads)):
        lr = learning_rate_at(learning_rate, step)
        decayed = g + weight_decay * w
        if form == "optax":
            denominator = norm(decayed)
        else:
            denominator = norm(g) + weight_decay * norm(w)
        local_rate = 1.0
        if form == "apex" and (norm(w) == 0.0 or norm(g) == 0.0):
            decayed = g
        elif norm(w) != 0.0 and denominator != 0.0:
            local_rate = trust_coefficient * norm(w) / (denominator + eps)
            if clip:
                # The buffer takes up a gradient even where the learning rate is zero.
                local_rate = min(local_rate / lr, 1.0) if lr else 1.0
        d = local_rate * decayed
        if form != "apex":
            d = lr * d
        u = momentum * u + d
        step_along = d + momentum * u if nesterov else u
        w = w - (lr * step_along if form == "apex" else step_along)
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
    param_norm_min: float = 0.0,
    param_norm_max: float = np.inf,
    bias_correction: bool = True,
) -> list[Array]:
    """Runs LAMB and returns the parameters after every step.

    The defaults are TensorFlow Addons and optax: bias correction, and phi the identity.
    A ratio with a zero on either side is 1.

    Args:
        params: the initial parameters.
        grads: one gradient per step.
        learning_rate: number or function of the 0-based step.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the square root of the second moment.
        eps_root: added under the root.
        weight_decay: lambda; enters the direction before its norm is taken.
        param_norm_min: least value of phi, the clamped norm of the parameters, and so
            the numerator of the ratio where they are zero.
        param_norm_max: largest value of phi.
        bias_correction: whether the moments are divided by ``1 - b ** t``.
    """
    x = as_float64(params)
    directions = adam_directions(
        grads,
        b1=b1,
        b2=b2,
        eps=eps,
        eps_root=eps_root,
        bias_correction=bias_correction,
    )
    trajectory = []
    for step, r in enumerate(directions):
        q = r + weight_decay * x
        phi = min(max(norm(x), param_norm_min), param_norm_max)
        ratio = phi / norm(q) if phi and norm(q) else 1.0
        x = x - learning_rate_at(learning_rate, step) * ratio * q
        trajectory.append(x)
    return trajectory
