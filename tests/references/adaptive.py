"""References of the Adam family.

References:
    Kingma, Ba, Adam: a method for stochastic optimization, 2015,
    https://arxiv.org/abs/1412.6980, Algorithm 1.
    Loshchilov, Hutter, Decoupled weight decay regularization, 2019,
    https://arxiv.org/abs/1711.05101, Algorithm 2 (with the decay multiplied by the
    learning rate, as PyTorch and optax do).
    Reddi, Kale, Kumar, On the convergence of Adam and beyond, 2018,
    https://arxiv.org/abs/1904.09237, Algorithm 2.
    Dozat, Incorporating Nesterov momentum into Adam, 2016, Algorithm 2.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from tests.references.cautious import cautious_directions
from tests.references.conventions import Array, Grads, LearningRate, as_float64
from tests.references.weight_decay import Decay, follow


def adam_directions(
    grads: Grads,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    amsgrad: bool = False,
    nesterov: bool = False,
    bias_correction: bool = True,
) -> Iterator[Array]:
    """Yields Adam's direction of every step, before learning rate and weight decay.

    Args:
        grads: one gradient per step.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the square root of the second moment.
        eps_root: added to the bias-corrected second moment, under the root.
        amsgrad: whether the largest second moment so far replaces the current one.
            PyTorch's form: the maximum is taken of the raw second moment and corrected
            for its bias afterwards (optax takes it of the corrected one).
        nesterov: whether the numerator looks one step ahead. optax's form, with a
            constant ``b1``. `adam_variants.nadam` has Dozat's schedule of it.
        bias_correction: whether the moments are divided by ``1 - b ** t``.
    """
    m: Array | float = 0.0
    v: Array | float = 0.0
    v_max: Array | float = 0.0

    def debiased(moment: Array, b: float, t: int) -> Array:
        return moment / (1 - b**t) if bias_correction else moment

    for t, g in enumerate(map(as_float64, grads), start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        v_max = np.maximum(v_max, v)
        if nesterov:
            m_hat = b1 * debiased(m, b1, t + 1) + (1 - b1) * debiased(g, b1, t)
        else:
            m_hat = debiased(m, b1, t)
        v_hat = debiased(v_max if amsgrad else v, b2, t)
        yield m_hat / (np.sqrt(v_hat + eps_root) + eps)


def adam(
    params: npt.ArrayLike,
    grads: Grads,
    *,
    learning_rate: LearningRate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    amsgrad: bool = False,
    nesterov: bool = False,
) -> list[Array]:
    """Runs Adam and returns the parameters after every step.

    Args:
        params: the initial parameters.
        grads: one gradient per step.
        learning_rate: number or function of the 0-based step.
        b1: see `adam_directions`, as the remaining arguments.
        b2: see `adam_directions`.
        eps: see `adam_directions`.
        eps_root: see `adam_directions`.
        amsgrad: see `adam_directions`.
        nesterov: see `adam_directions`.
    """
    return adamw(
        params,
        grads,
        learning_rate=learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        eps_root=eps_root,
        weight_decay=0.0,
        amsgrad=amsgrad,
        nesterov=nesterov,
    )


def adamw(
    params: npt.ArrayLike,
    grads: Grads,
    *,
    learning_rate: LearningRate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    weight_decay: float = 1e-2,
    amsgrad: bool = False,
    nesterov: bool = False,
    cautious: bool = False,
    decay: Decay = "decoupled",
) -> list[Array]:
    """Runs AdamW and returns the parameters after every step.

    Args:
        params: the initial parameters.
        grads: one gradient per step.
        learning_rate: number or function of the 0-based step; see `descend`.
        b1: see `adam_directions`.
        b2: see `adam_directions`.
        eps: see `adam_directions`.
        eps_root: see `adam_directions`.
        weight_decay: see `descend`.
        amsgrad: see `adam_directions`.
        nesterov: see `adam_directions`.
        cautious: whether `cautious_directions` masks the directions.
        decay: see `descend`.
    """
    grads = list(grads)
    directions = adam_directions(
        grads,
        b1=b1,
        b2=b2,
        eps=eps,
        eps_root=eps_root,
        amsgrad=amsgrad,
        nesterov=nesterov,
    )
    return follow(
        params,
        cautious_directions(directions, grads) if cautious else directions,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        decay=decay,
    )
