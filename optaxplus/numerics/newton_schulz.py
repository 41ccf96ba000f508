"""The polar factor of a matrix by the Newton-Schulz iteration.

The polar factor of G = U·S·Vᵀ is U·Vᵀ, the nearest semi-orthogonal matrix. An odd
polynomial p acts on a matrix through its singular values alone,
p(X) = U·p(S)·Vᵀ, so polynomials that push every value in (0, 1] towards 1, applied
one after the other, turn G / ‖G‖ into U·Vᵀ with nothing but matrix products:

    X <- G / ‖G‖_F                             singular values in [0, 1]
    A <- X·Xᵀ                                  the small Gram matrix
    X <- a·X + (b·A + c·A·A)·X                 for each row (a, b, c)

Source: Keller Jordan et al., Muon (2024); Bernstein and Newhouse, arXiv 2409.20325.
Differs from KellerJordan/Muon: the norm is taken in float32 and relative to the
largest entry, so that the direction does not depend on the gradient's scale.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from optaxplus import validation
from optaxplus.numerics.coefficients import resolve_coefficients

__all__ = ["check_compute_dtype", "polar_factor"]

_COMPUTE_DTYPES = ("bfloat16", "float16", "float32", "float64")


def check_compute_dtype(function: str, compute_dtype: str) -> None:
    """Refuses dtypes that the iteration is not made for."""
    validation.check_floating_dtype(function, compute_dtype=compute_dtype)
    name = jnp.dtype(compute_dtype).name
    validation.check_choice(function, "compute_dtype", name, _COMPUTE_DTYPES)


def polar_factor(
    x: jax.Array,
    *,
    ns_steps: int = 5,
    ns_coeffs: str | Sequence[Sequence[float]] = "polar_express",
    compute_dtype: str = "bfloat16",
    eps: float = 1e-7,
) -> jax.Array:
    """Approximates U·Vᵀ of the singular value decomposition x = U·S·Vᵀ.

    Args:
      x: Shape (..., m, n), real floating point. Leading axes are a batch.
      ns_steps: Number of iterations, >= 1. Static.
      ns_coeffs: Name of a table in `optaxplus.numerics.COEFFICIENT_TABLES` or
        `ns_steps` rows (a, b, c). The tables say what band of singular values they
        leave. Static.
      compute_dtype: Dtype of the operands of the products, "bfloat16", "float16",
        "float32" or "float64". The matrix is rounded to it first; products
        accumulate in float32, and so do the norm and the coefficients (in float64
        for "float64"). Static.
      eps: Relative margin added to the Frobenius norm. >= 0.

    Returns:
      Shape of `x`, float32 (float64 for compute dtype "float64"). The result is the
      same for x and for any positive multiple of it whose entries are normal float32
      numbers (largest entry 1e-34 to 1e37), up to rounding. A zero matrix
      gives zeros; one with a NaN or an infinity gives NaN throughout; singular values
      of 0 (rank deficiency) stay 0. A single row or column is normalised to a length
      inside the table's band.

    Raises:
      TypeError: If `x` is not real floating point, or an argument has a wrong type.
      ValueError: If `x` has fewer than two axes, or an argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxplus.numerics import polar_factor
      >>> polar = polar_factor(
      ...     jnp.array([[3.0, 0.0, 0.0], [0.0, 0.5, 0.0]]),
      ...     ns_coeffs="deepseek", ns_steps=10, compute_dtype="float32",
      ... )
      >>> print(polar.round(2))
      [[1. 0. 0.]
       [0. 1. 0.]]
    """
    rows = resolve_coefficients("polar_factor", ns_coeffs, ns_steps)
    check_compute_dtype("polar_factor", compute_dtype)
    validation.check_non_negative("polar_factor", eps=eps)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"polar_factor: x of dtype {x.dtype} is not allowed; it must be real "
            "floating point."
        )
    if x.ndim < 2:
        raise ValueError(
            f"polar_factor: x of shape {x.shape} is not allowed; it must have at "
            "least two axes, the last two forming the matrix."
        )
    wide = x.shape[-2] <= x.shape[-1]
    # The Gram matrix is formed on the shorter side.
    x = _normalise(x if wide else x.mT, jnp.dtype(compute_dtype), eps)
    for a, b, c in rows:
        x = _newton_schulz_step(x, a, b, c, jnp.dtype(compute_dtype))
    return x if wide else x.mT


def _normalise(x: jax.Array, dtype: jnp.dtype, eps: float) -> jax.Array:
    # Dividing by the largest entry before squaring keeps the norm of gradients of
    # size 1e-30 and 1e30 finite; the cast to float16 has to come after it, the cast
    # to the other types commutes with it.
    accumulator = _accumulator(dtype)
    if dtype != jnp.float16:
        x = x.astype(dtype)
    x = x.astype(accumulator)
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True, initial=0.0)
    is_zero = largest == 0.0
    x = x / jnp.where(is_zero, 1.0, largest)
    norm = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    return x / jnp.where(is_zero, 1.0, norm * (1.0 + eps))


def _newton_schulz_step(
    x: jax.Array, a: float, b: float, c: float, dtype: jnp.dtype
) -> jax.Array:
    gram = _product(x, x, dtype, transpose_right=True)
    gram_polynomial = b * gram + c * _product(gram, gram, dtype, transpose_right=True)
    return a * x + _product(gram_polynomial, x, dtype)


def _product(
    left: jax.Array, right: jax.Array, dtype: jnp.dtype, transpose_right: bool = False
) -> jax.Array:
    # lax.dot_general, not jnp.matmul: matmul widens the operands to the type of the
    # result, which keeps the products off the bfloat16 matrix units.
    rank = left.ndim
    batch = tuple(range(rank - 2))
    contracted = rank - 1 if transpose_right else rank - 2
    return lax.dot_general(
        left.astype(dtype),
        right.astype(dtype),
        (((rank - 1,), (contracted,)), (batch, batch)),
        preferred_element_type=_accumulator(dtype),
        # "highest" keeps float32 operands from being rounded on accelerators.
        precision=lax.Precision.HIGHEST if dtype.itemsize >= 4 else None,
    )


def _accumulator(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
