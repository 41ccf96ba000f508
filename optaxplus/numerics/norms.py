"""Squared magnitudes, means and norms of real and complex arrays."""

import math

import jax
import jax.numpy as jnp

from optaxplus.numerics.hyperparameters import Scalar
from optaxplus.numerics.matrix_axes import MatrixAxes, reduce_blocks

__all__ = [
    "abs_square",
    "agreement",
    "block_mean",
    "block_norm",
    "block_rms",
    "euclidean_norm",
    "mean_square",
    "mix_square",
    "or_one",
    "scaled_square",
]


def abs_square(x: jax.Array) -> jax.Array:
    """|x|², elementwise and real."""
    return scaled_square(1.0, x)


def scaled_square(scale: Scalar, x: jax.Array) -> jax.Array:
    """scale·|x|², elementwise and real.

    Associated as (scale·x)·x on purpose: where x² occurs elsewhere in the program, in
    a gradient norm for instance, XLA would share it and store a temporary of the size
    of the parameter.
    """
    scaled = x if isinstance(scale, float) and scale == 1.0 else scale * x
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return scaled.real * x.real + scaled.imag * x.imag
    return scaled * x


def mix_square(decay: Scalar, average: jax.Array, x: jax.Array) -> jax.Array:
    """decay·average + (1 - decay)·|x|², elementwise; see `scaled_square`."""
    return decay * average + scaled_square(1 - decay, x)


def agreement(x: jax.Array, y: jax.Array) -> jax.Array:
    """Whether x and y point the same way (> 0), elementwise and real.

    Of signs, because the product of two small numbers is 0.
    """
    return (jnp.sign(x) * jnp.conj(jnp.sign(y))).real


def block_norm(x: jax.Array, axes: MatrixAxes) -> jax.Array:
    """Frobenius norm of each matrix or vector of `x`.

    Args:
      x: Real or complex, in the dtype in which to compute.
      axes: The matrix axes of `x`; a scalar is its own block.

    Returns:
      Real array that broadcasts against `x`, see `reduce_blocks`. 0 for an empty block.
    """
    return jnp.sqrt(
        reduce_blocks(
            lambda block, over: jnp.sum(abs_square(block), axis=over, keepdims=True),
            x,
            axes,
        )
    )


def mean_square(x: jax.Array, over: tuple[int, ...]) -> jax.Array:
    """Mean of |x|² over axes kept at size 1; 0 where they are empty."""
    size = math.prod(x.shape[axis] for axis in over)
    return jnp.sum(abs_square(x), axis=over, keepdims=True) / max(size, 1)


def block_mean(x: jax.Array, axes: MatrixAxes) -> jax.Array:
    """Mean of each matrix or vector of `x`.

    Arguments and result as in `block_norm`.
    """

    def mean(block: jax.Array, over: tuple[int, ...]) -> jax.Array:
        size = math.prod(block.shape[axis] for axis in over)
        return jnp.sum(block, axis=over, keepdims=True) / max(size, 1)

    return reduce_blocks(mean, x, axes)


def block_rms(x: jax.Array, axes: MatrixAxes) -> jax.Array:
    """Root mean square of each matrix or vector of `x`.

    Arguments and result as in `block_norm`.
    """
    return jnp.sqrt(reduce_blocks(mean_square, x, axes))


def euclidean_norm(x: jax.Array, over: tuple[int, ...]) -> jax.Array:
    """Norm of a real array over axes kept at size 1; 0 where they are empty.

    Relative to the largest entry, so that no square under- or overflows.
    """
    size = or_one(jnp.max(jnp.abs(x), axis=over, keepdims=True, initial=0.0))
    return size * jnp.sqrt(jnp.sum(jnp.square(x / size), axis=over, keepdims=True))


def or_one(norm: jax.Array) -> jax.Array:
    """1 where a norm is 0, so that what it divides stays zero."""
    return jnp.where(norm == 0.0, jnp.ones_like(norm), norm)
