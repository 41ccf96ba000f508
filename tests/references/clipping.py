"""References of the clipping rules.

References:
    Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks,
    2013, https://arxiv.org/abs/1211.5063, Algorithm 1 (global norm).
    Shazeer, Stern, Adafactor: adaptive learning rates with sublinear memory cost, 2018,
    https://arxiv.org/abs/1804.04235, section 6 (RMS of the update).
"""

from collections.abc import Sequence

import numpy.typing as npt

from tests.references.conventions import Array, as_float64, rms


def global_norm(grads: Sequence[npt.ArrayLike]) -> float:
    """Returns the L2 norm of all arrays taken as one vector."""
    return sum(float((as_float64(g) ** 2).sum()) for g in grads) ** 0.5


def clip_by_global_norm(grads: Sequence[npt.ArrayLike], max_norm: float) -> list[Array]:
    """Returns the arrays of one step, scaled down together to ``max_norm``.

    optax's semantics: unchanged below ``max_norm``, ``g / norm * max_norm`` from there.

    Args:
        grads: all arrays of one step.
        max_norm: the largest global norm that passes unchanged.
    """
    norm = global_norm(grads)
    if norm < max_norm:
        return [as_float64(g) for g in grads]
    return [as_float64(g) / norm * max_norm for g in grads]


def clip_update_rms(update: npt.ArrayLike, threshold: float = 1.0) -> Array:
    """Returns ``u / max(1, RMS(u) / d)`` (Adafactor, section 6, Algorithm 4 line 9).

    Args:
        update: the update of one block.
        threshold: ``d``, the largest root mean square that passes unchanged.
    """
    u = as_float64(update)
    return u / max(1.0, rms(u) / threshold)
