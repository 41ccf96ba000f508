"""Means of squares kept as one row and one column of each matrix.

Everything here is seen as in `matrix_axes.to_matrices`: matrices (*batch, m, n), their
rows' means R (*batch, m, k) for k splits stored side by side, their columns' means
C (*batch, 1, n). The matrix of squares is approximated by V̂ = R·C / mean(R).

Source: Shazeer and Stern, Adafactor, arXiv 1804.04235, section 3, with means for sums.
"""

import jax
import jax.numpy as jnp
import numpy as np

from optaxplus.numerics.hyperparameters import Scalar
from optaxplus.numerics.matrix_axes import MatrixAxes, block_shape, split_columns
from optaxplus.numerics.moving_averages import mix
from optaxplus.numerics.norms import abs_square, scaled_square

__all__ = [
    "collapsed",
    "factor_squares",
    "init_factors",
    "inverse_root_factors",
    "is_factored",
    "mean_square_of_scaled",
    "spread_rows",
]

Splits = tuple[int, ...]


def collapsed(zeros: jax.Array, axes: tuple[int, ...] | None = None) -> jax.Array:
    """Zeros with `axes` (None: all) of size 1, in the sharding that remains."""
    return jnp.sum(zeros, axis=axes, keepdims=True, dtype=zeros.dtype)


def is_factored(axes: MatrixAxes, shape: tuple[int, ...], min_size: int) -> bool:
    """Whether a parameter is of matrices with no side, or split, below `min_size`."""
    return axes.is_matrix and min(block_shape(axes, shape)) >= min_size


def init_factors(zeros: jax.Array, axes: MatrixAxes) -> tuple[jax.Array, jax.Array]:
    """R and C in the rank of the parameter, whose zeros are given.

    R has size 1 in the axes of fan_out, the first has one entry a split; C has size 1
    in those of fan_in.
    """
    rows = collapsed(zeros, axes.fan_out)
    if axes.splits:
        rows = jnp.repeat(rows, len(axes.splits), axes.fan_out[0])
    return rows, collapsed(zeros, axes.fan_in)


def _row_means(squares: jax.Array, splits: Splits) -> jax.Array:
    """(*batch, m, number of splits)."""
    blocks = split_columns(squares, splits)
    return jnp.concatenate([b.mean(axis=-1, keepdims=True) for b in blocks], axis=-1)


def factor_squares(
    matrices: jax.Array,
    rows: jax.Array,
    columns: jax.Array,
    splits: Splits,
    *,
    decay: Scalar,
    eps: Scalar,
) -> tuple[jax.Array, jax.Array]:
    """Moves the means R and C towards those of the squares of `matrices`, plus eps."""
    # Every reduction squares for itself, in an expression of its own: what two of them
    # share is stored, a temporary of the size of the parameter.
    row_means = -_row_means(-matrices * matrices, splits)
    column_means = abs_square(matrices).mean(axis=-2, keepdims=True)
    return mix(decay, rows, row_means + eps), mix(decay, columns, column_means + eps)


def inverse_root_factors(
    rows: jax.Array, columns: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Two factors, for rows and for columns, whose product is 1 / sqrt(V̂)."""
    # One after the other: products and quotients of means may underflow. A sum that
    # overflowed says nothing of its rows any more: inf / inf would be NaN.
    mean = rows.mean(axis=-2, keepdims=True)
    row_factors = jnp.sqrt(mean) * jax.lax.rsqrt(rows)
    return jnp.where(jnp.isinf(mean), 0.0, row_factors), jax.lax.rsqrt(columns)


def mean_square_of_scaled(
    matrices: jax.Array, row_factors: jax.Array, columns: jax.Array, splits: Splits
) -> jax.Array:
    """Mean square of matrices / sqrt(V̂), (*batch, 1, number of splits).

    Summed from the rows, so that the scaled matrices need not be stored.
    """
    in_rows = _row_means(scaled_square(1.0 / columns, matrices), splits)
    return (in_rows * row_factors * row_factors).mean(axis=-2, keepdims=True)


def spread_rows(row_factors: jax.Array, splits: Splits) -> jax.Array:
    """Row factors as they broadcast against matrices: one column, or n with splits."""
    if not splits:
        return row_factors
    return jnp.repeat(row_factors, np.asarray(splits), axis=-1)
