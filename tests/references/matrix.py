"""References of Muon and of the polar factor it approximates.

References:
    Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024,
    https://kellerjordan.github.io/posts/muon (algorithm box, Newton-Schulz).
    Liu et al., Muon is scalable for LLM training, 2025,
    https://arxiv.org/abs/2502.16982, equation 4 ("match_adamw").
    Bernstein, Deriving Muon, 2025, https://jeremybernste.in/writing/deriving-muon
    ("spectral").
    Higham, Functions of matrices, 2008, chapter 8 (polar factor).
"""

from collections.abc import Sequence
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

Coefficients = Sequence[tuple[float, float, float]]

# Every step of the Muon post's iteration.
JORDAN: Coefficients = ((3.4445, -4.7750, 2.0315),) * 5


def polar_factor(matrix: npt.ArrayLike, *, tolerance: float = 1e-12) -> Array:
    """Returns the exact (partial) polar factor ``U V^T`` of ``U S V^T``.

    Args:
        matrix: shape (m, n).
        tolerance: singular values up to this share of the largest count as zero, and
            their directions are left out.
    """
    u, s, vh = np.linalg.svd(as_float64(matrix), full_matrices=False)
    kept = s > tolerance * s[0]
    return u[:, kept] @ vh[kept, :]


def newton_schulz(
    matrix: npt.ArrayLike,
    ns_coeffs: Coefficients = JORDAN,
    *,
    eps: float = 1e-7,
    normalization: Literal["frobenius", "schatten"] = "frobenius",
) -> Array:
    """Returns the matrix after one quintic Newton-Schulz step per coefficient row.

    ``X <- a X + b (X X^T) X + c (X X^T)^2 X``, from ``X = G / (norm(G) + eps)``.

    Args:
        matrix: G, shape (m, n).
        ns_coeffs: rows (a, b, c), one per step.
        eps: added to the norm. With 0 a zero matrix still gives zero.
        normalization: the norm: "frobenius", or "schatten", the fourth root of the sum
            of the fourth powers of the singular values, ``norm(G G^T) ** (1 / 2)``.
    """
    x = as_float64(matrix)
    if not x.any():
        return x
    size = norm(x) if normalization == "frobenius" else norm(x @ x.T) ** 0.5
    x = x / (size + eps)
    for a, b, c in ns_coeffs:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def matrix_shape_scale(
    mode: Literal["keller", "spectral", "match_adamw", "none"],
    *,
    fan_in: int,
    fan_out: int,
) -> float:
    """Returns the factor that Muon puts on the orthogonalized update.

    Args:
        mode: "keller" is ``sqrt(max(1, fan_out / fan_in))``, "spectral" is
            ``sqrt(fan_out / fan_in)``, "match_adamw" is
            ``0.2 * sqrt(max(fan_in, fan_out))``, "none" is 1.
        fan_in: size of the axis that the forward product sums over.
        fan_out: size of the other axis.
    """
    return {
        "keller": max(1.0, fan_out / fan_in) ** 0.5,
        "spectral": (fan_out / fan_in) ** 0.5,
        "match_adamw": 0.2 * max(fan_in, fan_out) ** 0.5,
        "none": 1.0,
    }[mode]


def muon(
    params: npt.ArrayLike,
    grads: Grads,
    *,
    learning_rate: LearningRate,
    fan_in: int,
    fan_out: int,
    b1: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    ns_coeffs: Coefficients | None = JORDAN,
    shape_scale: Literal["keller", "spectral", "match_adamw", "none"] = "keller",
    normalization: Literal["frobenius", "schatten"] = "frobenius",
    eps: float = 1e-7,
) -> list[Array]:
    """Runs Muon on one matrix and returns the parameters after every step.

    Args:
        params: the initial parameters, shape (m, n) in either orientation.
        grads: one gradient per step.
        learning_rate: number or function of the 0-based step.
        fan_in: size of the axis that the forward product sums over.
        fan_out: size of the other axis.
        b1: decay of the momentum, an average without bias correction.
        nesterov: whether the average, mixed once more with the gradient, is
            orthogonalized instead of the average itself.
        weight_decay: decoupled weight decay, multiplied by the learning rate without
            the shape scale.
        ns_coeffs: Newton-Schulz rows, or None for the exact polar factor.
        shape_scale: see `matrix_shape_scale`.
        normalization: see `newton_schulz`.
        eps: see `newton_schulz`; not used by the exact polar factor.
    """
    w = as_float64(params)
    m = np.zeros_like(w)
    scale = matrix_shape_scale(shape_scale, fan_in=fan_in, fan_out=fan_out)
    trajectory = []
    for step, g in enumerate(map(as_float64, grads)):
        lr = learning_rate_at(learning_rate, step)
        m = b1 * m + (1 - b1) * g
        direction = b1 * m + (1 - b1) * g if nesterov else m
        if ns_coeffs is None:
            orthogonal = polar_factor(direction)
        else:
            orthogonal = newton_schulz(
                direction, ns_coeffs, eps=eps, normalization=normalization
            )
        w = w * (1 - lr * weight_decay) - lr * scale * orthogonal
        trajectory.append(w)
    return trajectory
