"""Kronecker factors of a preconditioner that whitens matrices.

For matrices M, m×n, factors L, m×m, and R, n×n, upper triangular or diagonal, and the
preconditioner P = LᵀL ⊗ RᵀR:

    fit_factors, with V ~ N(0, 1):
        H = M + sqrt(2⁻²³)·mean|M|·V
        A = L·H·Rᵀ,   B = L⁻ᵀ·V·R⁻¹
        L <- L - η/‖A·Aᵀ + B·Bᵀ‖·triu(A·Aᵀ - B·Bᵀ)·L
        R <- R - η/‖Aᵀ·A + Bᵀ·B‖·triu(Aᵀ·A - Bᵀ·B)·R
    precondition:
        U = LᵀL·M·RᵀR,   U <- U·min(1, c/RMS(U))

The fit descends on E[tr(HᵀPH) + tr(VᵀP⁻¹V)], whose minimum makes P·H as white as V.
‖·‖ is a lower bound of the spectral norm, never below the largest diagonal entry: for
η < 1 the diagonals of L and R stay positive, and P positive definite. A diagonal factor
has the diagonal of the same formulas, with its largest entry for ‖·‖.

A factor has shape (*batch, side, side), or (*batch, side, 1) if it is diagonal. The
largest entry of a matrix is split off before anything is multiplied, so that gradients
of any size neither overflow nor vanish on the way.

Letters to arguments: M, L, R, V are `m`, `left`, `right`, `v`; η is `rate`, c is
`max_rms`. Sources: see `optaxplus.transforms.psgd`.
"""

import jax
import jax.numpy as jnp
from jax import lax

from optaxplus.numerics.hyperparameters import Scalar
from optaxplus.numerics.newton_schulz import largest_entry
from optaxplus.numerics.products import product

__all__ = ["fit_factors", "precondition"]

# The root of float32's epsilon, whatever the dtype, as the authors have it.
_DAMPING = 2.0**-11.5


def fit_factors(
    m: jax.Array, left: jax.Array, right: jax.Array, v: jax.Array, rate: Scalar
) -> tuple[jax.Array, jax.Array]:
    """One step of the fit, after which the factors are balanced.

    Args:
      m: Matrices (*batch, m, n), with entries, float32 or float64.
      left: Factors of the rows.
      right: Factors of the columns.
      v: Standard normal numbers, shape (m, n), the same for the whole batch.
      rate: Step relative to the factors, in (0, 1).

    Returns:
      New factors; the old ones of matrices that are zero or not finite.
    """
    size, is_known = _magnitude(m)
    v = jnp.broadcast_to(v, m.shape)
    h = m / jnp.where(is_known, size, 1.0)
    h = h + _DAMPING * jnp.mean(jnp.abs(h), axis=(-2, -1), keepdims=True) * v
    a = _times(right, _times(left, h).mT).mT
    b = _transposed_solve(right, _transposed_solve(left, v).mT).mT
    # Only the ratio of A to B matters: the largest entry of either becomes 1.
    largest_a, largest_b = largest_entry(a), largest_entry(b)
    ratio = size * (largest_a / largest_b)
    a = a * (jnp.minimum(ratio, 1.0) / _or_one(largest_a))
    b = b * (jnp.minimum(1.0 / ratio, 1.0) / largest_b)
    new = _balanced(_fitted(left, a, b, rate), _fitted(right, a.mT, b.mT, rate))
    return jnp.where(is_known, new[0], left), jnp.where(is_known, new[1], right)


def precondition(
    m: jax.Array, left: jax.Array, right: jax.Array, max_rms: Scalar | None
) -> jax.Array:
    """P·M, shortened.

    Args:
      m: Matrices (*batch, m, n), with entries, float32 or float64.
      left: Factors of the rows.
      right: Factors of the columns.
      max_rms: Largest root mean square of a matrix of the result; None: no limit.

    Returns:
      U, shape (*batch, m, n).
    """
    size, is_known = _magnitude(m)
    scale = jnp.where(is_known, size, 1.0)
    u = _transposed_times(left, _times(left, m / scale))
    u = _transposed_times(right, _times(right, u.mT)).mT
    if max_rms is not None:
        largest = _or_one(largest_entry(u))
        mean_square = jnp.mean(jnp.square(u / largest), axis=(-2, -1), keepdims=True)
        rms = largest * jnp.sqrt(mean_square)
        scale = jnp.minimum(scale, max_rms / _or_one(rms))
    return u * scale


def _magnitude(m: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Largest entry of each matrix, and whether it is a normal number."""
    size = largest_entry(m)
    return size, (size >= jnp.finfo(m.dtype).tiny) & jnp.isfinite(size)


def _fitted(factor: jax.Array, a: jax.Array, b: jax.Array, rate: Scalar) -> jax.Array:
    """The factor of the rows of A and B, one step later."""
    if _is_diagonal(factor):
        plus, minus = (jnp.sum(x * x, axis=-1, keepdims=True) for x in (a, b))
        return factor - rate * factor * ((plus - minus) / largest_entry(plus + minus))
    plus, minus = (product(x, x.mT) for x in (a, b))
    step = jnp.triu(plus - minus) * (rate / _spectral_norm_bound(plus + minus))
    return factor - product(step, factor)


def _balanced(left: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Largest entries within a factor of 4 of each other; no bit of P changes."""
    exponents = [jnp.frexp(largest_entry(factor))[1] for factor in (left, right)]
    shift = (exponents[0] - exponents[1]) // 2
    return jnp.ldexp(left, -shift), jnp.ldexp(right, shift)


def _spectral_norm_bound(gram: jax.Array) -> jax.Array:
    """Lower bound for positive semi-definite matrices: two steps from a column.

    The column is the longest; power iterations never shrink the quotient of norms, so
    the bound is at least its length. Entries have to be near 1.
    """
    lengths = jnp.sum(gram * gram, axis=-2, keepdims=True)
    index = jnp.argmax(lengths, axis=-1, keepdims=True)
    # A sum, not a gather: columns may be on several devices.
    chosen = lax.broadcasted_iota(index.dtype, gram.shape, gram.ndim - 1) == index
    column = jnp.sum(jnp.where(chosen, gram, 0.0), axis=-1, keepdims=True)
    direction = product(gram, column)
    return _norm(product(gram, direction / _norm(direction)))


def _is_diagonal(factor: jax.Array) -> bool:
    return factor.shape[-1] == 1


def _times(factor: jax.Array, x: jax.Array) -> jax.Array:
    return factor * x if _is_diagonal(factor) else product(factor, x)


def _transposed_times(factor: jax.Array, x: jax.Array) -> jax.Array:
    return factor * x if _is_diagonal(factor) else product(factor.mT, x)


def _transposed_solve(factor: jax.Array, x: jax.Array) -> jax.Array:
    """The inverse of the transposed factor, times x."""
    if _is_diagonal(factor):
        return x / factor
    return lax.linalg.triangular_solve(factor, x, left_side=True, transpose_a=True)


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))


def _or_one(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, 1.0)
