"""References of Muon's successors, and of the pieces of a Newton-Schulz iteration.

A matrix is (fan_in, fan_out) as in JAX unless ``output_axis=0`` says that it is
(fan_out, fan_in) as in PyTorch and in the papers: their rows are the outputs. Where a
method treats both axes alike the argument is missing. ``fan_in`` and ``fan_out`` only
set the factor on the update, as in `matrix.muon`.

References:
    Li et al., NorMuon: making Muon more efficient and scalable, 2025,
    https://arxiv.org/abs/2510.05491, algorithm 1.
    Si et al., AdaMuon: adaptive Muon optimizer, 2025,
    https://arxiv.org/abs/2507.11005; version 1 and versions 2 and 3 differ.
    Pethick et al., Training deep learning models with norm-constrained LMOs, 2025,
    https://arxiv.org/abs/2502.07529 (Scion).
    Ahn et al., Dion: distributed orthonormalized updates, 2025,
    https://arxiv.org/abs/2504.05295, algorithm 1.
    Kimi team, Kimi K2: open agentic intelligence, 2025,
    https://arxiv.org/abs/2507.20534, algorithm 1 (MuonClip).
    Amsel et al., The Polar Express, 2025, https://arxiv.org/abs/2505.16932.
    Zhang et al., Gram Newton-Schulz, 2026,
    https://dao-ailab.github.io/blog/2026/gram-newton-schulz.
    Boissin et al., Turbo-Muon, 2025, https://arxiv.org/abs/2512.04632 (AOL scaling).
"""

from collections.abc import Collection
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from tests.references.conventions import (
    Array,
    Grads,
    LearningRate,
    as_float64,
    learning_rate_at,
    norm,
    rms,
)
from tests.references.matrix import (
    JORDAN,
    Coefficients,
    matrix_shape_scale,
    newton_schulz,
    polar_factor,
)

Axis = Literal[0, 1]
ShapeScale = Literal["keller", "spectral", "match_adamw", "none"]
Norm = Literal["spectral", "sign", "column", "row", "bias_rms"]
Row = tuple[float, float, float]
Numbers = TypeVar("Numbers", float, Array)


# Newton-Schulz.


def newton_schulz_steps(x: npt.ArrayLike, ns_coeffs: Coefficients) -> Array:
    """Returns a matrix after the steps of `matrix.newton_schulz`, not normalized."""
    x = as_float64(x)
    for a, b, c in ns_coeffs:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def gram_newton_schulz(
    matrix: npt.ArrayLike,
    ns_coeffs: Coefficients = JORDAN,
    resets: Collection[int] = (),
    *,
    eps: float = 1e-7,
) -> Array:
    """Returns what `matrix.newton_schulz` does, iterated on the small Gram matrix.

    From ``Q = I`` and ``R = X X^T`` a step is ``Q <- Z Q``, ``R <- Z R Z`` with
    ``Z = a I + b R + c R^2``; the result is ``Q X``.

    Args:
        matrix: shape (m, n).
        ns_coeffs: rows (a, b, c), one per step.
        resets: the 0-based steps before which ``X <- Q X`` and the iteration starts
            again from there. A reset before the first step changes nothing.
        eps: see `matrix.newton_schulz`.
    """
    x = as_float64(matrix)
    if not x.any():
        return x
    if x.shape[0] > x.shape[1]:
        return gram_newton_schulz(x.T, ns_coeffs, resets, eps=eps).T
    x = x / (norm(x) + eps)
    identity = np.eye(len(x))
    q, r = identity, x @ x.T
    for step, (a, b, c) in enumerate(ns_coeffs):
        if step in resets:
            x = q @ x
            q, r = identity, x @ x.T
        z = a * identity + b * r + c * r @ r
        q, r = z @ q, z @ r @ z
    return q @ x


def aol_scaled(matrix: npt.ArrayLike, *, eps: float = 1e-8) -> Array:
    """Returns a matrix with its short side scaled so that no singular value exceeds 1.

    Each row of a wide or square X is divided by ``sqrt(sum_j |X X^T|_ij)``, each column
    of a tall one likewise. Replaces the division by the Frobenius norm, and changes the
    polar factor.

    Args:
        matrix: X, shape (m, n).
        eps: the sum is not taken smaller than this.
    """
    x = as_float64(matrix)
    if x.shape[0] > x.shape[1]:
        return aol_scaled(x.T, eps=eps).T
    sums = np.abs(x @ x.T).sum(axis=1, keepdims=True)
    return x / np.sqrt(np.maximum(sums, eps))


def schatten_scaled(matrix: npt.ArrayLike, *, eps: float = 1e-8) -> Array:
    """Returns a matrix over its Schatten-4 norm, ``sqrt(norm(X X^T))``.

    That norm lies between the largest singular value and the Frobenius norm.

    Args:
        matrix: X, shape (m, n).
        eps: ``norm(X X^T)`` is not taken smaller than this.
    """
    x = as_float64(matrix)
    return x / np.sqrt(max(norm(x @ x.T), eps))


def odd_polynomial(row: Row, x: Numbers) -> Numbers:
    """Returns ``a x + b x^3 + c x^5``."""
    a, b, c = row
    return a * x + b * x**3 + c * x**5


def best_odd_quintic(lower: float, upper: float) -> Row:
    """Returns the odd quintic that is closest to 1 on [lower, upper].

    Remez's algorithm: the error of the best one has the same size and alternating signs
    at both ends and at the two extrema between them.

    Args:
        lower: a positive number.
        upper: a larger one. Where the two are nearly equal, the system of equations is
            nearly singular and the limit is taken, of three derivatives at one point.
    """
    if lower / upper >= 1 - 5e-6:
        return 15 / 8 / upper, -10 / 8 / upper**3, 3 / 8 / upper**5
    q, r = (3 * lower + upper) / 4, (lower + 3 * upper) / 4
    error = np.inf
    a = b = c = 0.0
    # Some ten exchanges are enough; rounding may keep the error from settling exactly.
    for _ in range(100):
        system = [
            [x, x**3, x**5, sign]
            for x, sign in zip([lower, q, r, upper], [1, -1, 1, -1], strict=True)
        ]
        last_error = error
        a, b, c, error = map(float, np.linalg.solve(np.array(system), np.ones(4)))
        if abs(error - last_error) <= 1e-15:
            break
        # The zeros of the derivative a + 3 b x^2 + 5 c x^4.
        root = np.sqrt(9 * b**2 - 20 * a * c)
        q, r = (float(np.sqrt((-3 * b + s * root) / (10 * c))) for s in (-1, 1))
    return a, b, c


def polar_express_rows(
    steps: int,
    *,
    lower_bound: float = 1e-3,
    safety: float = 1.0,
    cushion: float = 0.02,
) -> list[Row]:
    """Returns the Newton-Schulz coefficients of Polar Express.

    Each row is the best odd quintic on the interval into which the rows before it take
    [lower_bound, 1].

    Args:
        steps: number of rows.
        lower_bound: smallest singular value that matters.
        safety: all rows but the last are made polynomials of ``x / safety``, and what
            follows knows of it.
        cushion: an interval is approximated from this share of its upper end on, if it
            begins below; the polynomial is then scaled to be centred on 1.
    """
    rows = []
    lower, upper = lower_bound, 1.0
    for step in range(steps):
        a, b, c = best_odd_quintic(max(lower, cushion * upper), upper)
        if cushion * upper > lower:
            ends = [odd_polynomial((a, b, c), x) for x in (lower, upper)]
            a, b, c = (2 / sum(ends) * x for x in (a, b, c))
        if step < steps - 1:
            a, b, c = a / safety, b / safety**3, c / safety**5
        rows.append((a, b, c))
        lower = odd_polynomial((a, b, c), lower)
        upper = 2 - lower
        lower = min(lower, upper)
    return rows


# Optimizers.


def orthogonalized(
    direction: Array, ns_coeffs: Coefficients | None, ns_eps: float
) -> Array:
    """Returns a direction after Newton-Schulz, or its polar factor without rows."""
    if ns_coeffs is None:
        return polar_factor(direction) if direction.any() else direction
    return newton_schulz(direction, ns_coeffs, eps=ns_eps)


def normuon(
    params: npt.ArrayLike,
    grads: Grads,
    *,
    learning_rate: LearningRate,
    fan_in: int,
    fan_out: int,
    output_axis: Axis = 1,
    b1: float = 0.95,
    b2: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    ns_coeffs: Coefficients | None = JORDAN,
    shape_scale: ShapeScale = "keller",
    rescale: Literal["norm", "rms"] = "norm",
    eps: float = 1e-10,
    ns_eps: float = 1e-7,
) -> list[Array]:
    """Runs NorMuon on one matrix and returns the parameters after every step.

    Args:
        params: the initial parameters.
        grads: one gradient per step.
        learning_rate: number or function of the 0-based step.
        fan_in: size of the axis that the forward product sums over.
        fan_out: size of the other axis.
        output_axis: the axis of `params` that numbers the outputs, the neurons.
        b1: decay of the momentum, an average without bias correction.
        b2: decay of the mean square of each neuron, without bias correction.
        nesterov: see `matrix.muon`.
        weight_decay: decoupled, multiplied by the learning rate only.
        ns_coeffs: Newton-Schulz rows, or None for the exact polar factor.
        shape_scale: see `matrix.matrix_shape_scale`.
        rescale: "norm", the authors' code, gives the update the Frobenius norm that it
            had before the division, times `shape_scale`. "rms", the paper, gives it a
            root mean square of 0.2.
        eps: added to the roots and to the norm that is divided by.
        ns_eps: see `matrix.newton_schulz`.
    """
    w = as_float64(params)
    m = np.zeros_like(w)
    v = np.zeros_like(w.mean(axis=1 - output_axis, keepdims=True))
    scale = matrix_shape_scale(shape_scale, fan_in=fan_in, fan_out=fan_out)
    trajectory = []
    for step, g in enumerate(map(as_float64, grads)):
        lr = learning_rate_at(learning_rate, step)
        m = b1 * m + (1 - b1) * g
        o = orthogonalized(b1 * m + (1 - b1) * g if nesterov else m, ns_coeffs, ns_eps)
        v = b2 * v + (1 - b2) * np.mean(o * o, axis=1 - output_axis, keepdims=True)
        u = o / (np.sqrt(v) + eps)
        length = scale * norm(o) if rescale == "norm" else 0.2 * w.size**0.5
        u = u * length / (norm(u) + eps)
        w = w * (1 - lr * weight_decay) - lr * u
        trajectory.append(w)
    return trajectory


def adamuon(
    params: npt.ArrayLike,
    grads: Grads,
    *,
    learning_rate: LearningRate,
    fan_in: int,
    fan_out: int,
    b1: float = 0.95,
    b2: float = 0.999,
    nesterov: bool = True,
    weight_decay: float = 0.01,
    sign: bool = False,
    bias_correction: bool = True,
    ns_coeffs: Coefficients | None = JORDAN,
    eps: float = 1e-8,
    norm_eps: float = 1e-8,
    ns_eps: float = 1e-7,
) -> list[Array]:
    """Runs AdaMuon on one matrix and returns the parameters after every step.

    The defaults are those of the authors' repository, the paper's version 1. Versions 2
    and 3 have ``sign=True, bias_correction=False`` and one decay rate for both moments.
    Bias correction only matters beside `eps`: the update is rescaled afterwards.

    Args:
        params: the initial parameters, in either orientation.
        grads: one gradient per step.
        learning_rate: number or function of the 0-based step.
        fan_in: size of the axis that the forward product sums over.
        fan_out: size of the other axis.
        b1: decay of the momentum, an average without bias correction.
        b2: decay of the second moment of the orthogonalized direction.
        nesterov: see `matrix.muon`.
        weight_decay: decoupled, multiplied by the learning rate only.
        sign: whether the signs of the momentum are orthogonalized instead of it.
        bias_correction: whether the second moment is corrected.
        ns_coeffs: Newton-Schulz rows, or None for the exact polar factor.
        eps: added to the root of the second moment.
        norm_eps: added to the norm of the update, which is divided by.
        ns_eps: see `matrix.newton_schulz`.
    """
    w = as_float64(params)
    m, v = np.zeros_like(w), np.zeros_like(w)
    trajectory = []
    for step, g in enumerate(map(as_float64, grads)):
        lr = learning_rate_at(learning_rate, step)
        m = b1 * m + (1 - b1) * g
        direction = b1 * m + (1 - b1) * g if nesterov else m
        if sign:
            direction = np.sign(direction)
        o = orthogonalized(direction, ns_coeffs, ns_eps)
        v = b2 * v + (1 - b2) * o * o
        correction = 1 - b2 ** (step + 1) if bias_correction else 1.0
        u = o / (np.sqrt(v / correction) + eps)
        u = 0.2 * (fan_in * fan_out) ** 0.5 * u / (norm(u) + norm_eps)
        w = w * (1 - lr * weight_decay) - lr * u
        trajectory.append(w)
    return trajectory


def norm_lmo(
    direction: npt.ArrayLike,
    kind: Norm,
    *,
    fan_in: int,
    fan_out: int,
    output_axis: Axis = 1,
    normalized: bool | None = None,
    at_least_one: bool = False,
    ns_coeffs: Coefficients | None = JORDAN,
    eps: float = 1e-8,
    ns_eps: float = 1e-7,
) -> Array:
    """Returns the element of the unit ball of a norm that is furthest along a matrix.

    ========  ==================================================  ==================
    kind      what comes out                                      not normalized
    ========  ==================================================  ==================
    spectral  the polar factor times sqrt(fan_out / fan_in)       times sqrt(fan_out)
    sign      the signs, over fan_in                              the signs
    column    what reads one input, over its root mean square     (the default)
              and over fan_in
    row       what makes one output, over its length and over     over its length
              sqrt(fan_in)
    bias_rms  everything, over its root mean square
    ========  ==================================================  ==================

    "column" and "row" are named as in the paper, of matrices (fan_out, fan_in).

    Args:
        direction: a matrix, or a vector for "sign" and "bias_rms".
        kind: the norm.
        fan_in: size of the axis that the forward product sums over.
        fan_out: size of the other axis.
        output_axis: the axis of `direction` that numbers the outputs.
        normalized: None is the authors' default, true but for "column". It is said to
            be false for an input layer, true for the others.
        at_least_one: whether the factor of "spectral" is at least 1.
        ns_coeffs: Newton-Schulz rows, or None for the exact polar factor.
        eps: added to every divisor.
        ns_eps: see `matrix.newton_schulz`.
    """
    x = as_float64(direction)
    if normalized is None:
        normalized = kind != "column"
    if kind == "spectral":
        scale = (fan_out / fan_in if normalized else fan_out) ** 0.5
        scale = max(1.0, scale) if at_least_one else scale
        return scale * orthogonalized(x, ns_coeffs, ns_eps)
    if kind == "sign":
        return np.sign(x) / (fan_in if normalized else 1)
    if kind == "bias_rms":
        return x / (rms(x) + eps)
    if kind == "column":
        sizes = np.sqrt(np.mean(x * x, axis=output_axis, keepdims=True))
        return x / (sizes * (fan_in if normalized else 1) + eps)
    lengths = np.sqrt(np.sum(x * x, axis=1 - output_axis, keepdims=True))
    return x / (lengths * (fan_in**0.5 if normalized else 1) + eps)


def scion(
    params: npt.ArrayLike,
    grads: Grads,
    *,
    learning_rate: LearningRate,
    fan_in: int,
    fan_out: int,
    kind: Norm = "spectral",
    output_axis: Axis = 1,
    b1: float = 0.9,
    radius: float = 1.0,
    constrained: bool = True,
    normalized: bool | None = None,
    at_least_one: bool = False,
    ns_coeffs: Coefficients | None = JORDAN,
    eps: float = 1e-8,
    ns_eps: float = 1e-7,
) -> list[Array]:
    """Runs Scion on one parameter and returns the parameters after every step.

    Args:
        params: the initial parameters.
        grads: one gradient per step.
        learning_rate: number or function of the 0-based step.
        fan_in: size of the axis that the forward product sums over.
        fan_out: size of the other axis.
        kind: see `norm_lmo`, for this and the arguments that are missing here.
        output_axis: the axis of `params` that numbers the outputs.
        b1: decay of the momentum, an average without bias correction. The authors'
            ``momentum`` is ``1 - b1``.
        radius: factor on the update; the authors' ``scale``.
        constrained: whether the parameters shrink by the learning rate as well, which
            keeps them in the ball of this radius. The update is not scaled by it twice.
        normalized: see `norm_lmo`.
        at_least_one: see `norm_lmo`.
        ns_coeffs: see `norm_lmo`.
        eps: see `norm_lmo`.
        ns_eps: see `norm_lmo`.
    """
    w = as_float64(params)
    m = np.zeros_like(w)
    trajectory = []
    for step, g in enumerate(map(as_float64, grads)):
        lr = learning_rate_at(learning_rate, step)
        m = b1 * m + (1 - b1) * g
        u = norm_lmo(
            m,
            kind,
            fan_in=fan_in,
            fan_out=fan_out,
            output_axis=output_axis,
            normalized=normalized,
            at_least_one=at_least_one,
            ns_coeffs=ns_coeffs,
            eps=eps,
            ns_eps=ns_eps,
        )
        w = w * (1 - lr if constrained else 1) - lr * radius * u
        trajectory.append(w)
    return trajectory


def dion(
    params: npt.ArrayLike,
    grads: Grads,
    *,
    learning_rate: LearningRate,
    fan_in: int,
    fan_out: int,
    q: npt.ArrayLike,
    output_axis: Axis = 1,
    q_axis: Axis | None = None,
    b1: float = 0.95,
    weight_decay: float = 0.01,
    eps: float = 1e-8,
    power_iterations: int = 1,
) -> list[Array]:
    """Runs Dion on one matrix and returns the parameters after every step.

    Only the product of the two factors enters, so the signs that a QR decomposition
    chooses do not matter.

    Args:
        params: the initial parameters.
        grads: one gradient per step.
        learning_rate: number or function of the 0-based step.
        fan_in: size of the axis that the forward product sums over.
        fan_out: size of the other axis.
        q: the initial right factor, shape (size of `q_axis`, rank).
        output_axis: the axis of `params` that numbers the outputs.
        q_axis: the axis of `params` along which the right factor is; the orthonormal
            one is along the other. None is the shorter axis, or that of the inputs in a
            square matrix.
        b1: share that stays of what an update has used up of the momentum, a sum. The
            rest of the momentum stays whole.
        weight_decay: decoupled, multiplied by the learning rate only.
        eps: added to the lengths that the columns of the right factor are divided by.
        power_iterations: how often the two factors are computed from each other.
    """
    w, q = as_float64(params), as_float64(q)
    m = np.zeros_like(w)
    if q_axis is None:
        q_axis = 1 - output_axis if w.shape[0] == w.shape[1] else np.argmin(w.shape)
    trajectory = []
    for step, g in enumerate(map(as_float64, grads)):
        lr = learning_rate_at(learning_rate, step)
        m = m + g
        along_q = m if q_axis == 1 else m.T
        if m.any():
            r = q
            for _ in range(power_iterations):
                p, _ = np.linalg.qr(along_q @ r)
                r = along_q.T @ p
        else:
            p, r = np.zeros((len(along_q), q.shape[1])), q
        used = p @ r.T
        q = r / (np.sqrt(np.sum(r * r, axis=0)) + eps)
        u = p @ q.T
        if q_axis == 0:
            used, u = used.T, u.T
        m = m - (1 - b1) * used
        w = w * (1 - lr * weight_decay) - lr * (fan_out / fan_in) ** 0.5 * u
        trajectory.append(w)
    return trajectory


class QKClip(NamedTuple):
    """What QK-Clip multiplies the weights of each head by, shape (heads,).

    Attributes:
        query: for the query weights, without those of the rotary part of MLA.
        key: for the key weights, without the rotary part, which MLA's heads share and
            which stays as it is.
        query_rotary: for the rotary part of MLA's query weights.
    """

    query: Array
    key: Array
    query_rotary: Array


def qk_clip_factors(
    max_logits: npt.ArrayLike, *, threshold: float = 100.0, alpha: float = 0.5
) -> QKClip:
    """Returns the factors of QK-Clip, ``gamma = min(1, threshold / max_logit)`` split.

    Args:
        max_logits: the largest logit before the softmax of each head, of one step. A
            head without a positive one is left alone.
        threshold: no logit of the step would have exceeded this with the clipped
            weights.
        alpha: share of the query weights, in the exponent.
    """
    gamma = threshold / np.maximum(as_float64(max_logits), threshold)
    return QKClip(gamma**alpha, gamma ** (1 - alpha), gamma)
