"""The sides of matrices: their sizes, and arrays that lie along one of them."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from optaxplus.numerics.explicit_axes import left_to_compiler
from optaxplus.numerics.matrix_axes import MatrixAxes, block_axes, to_matrices

__all__ = ["side_by_side", "split_shapes", "zeros_along"]


def split_shapes(axes: MatrixAxes, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """(fan_in, fan_out) of each split.

    Args:
      axes: Non-negative axes, from `resolve_axes`.
      shape: Of an array that they fit.
    """
    fan_in, fan_out = (
        math.prod(shape[axis] for axis in side) for side in (axes.fan_in, axes.fan_out)
    )
    return [(fan_in, width) for width in axes.splits or (fan_out,)]


def side_by_side(matrices: Sequence[jax.Array]) -> jax.Array:
    """Matrices (*batch, m, n) as one, with rows of zeros below the shorter ones."""
    longest = max(x.shape[-2] for x in matrices)
    filled = [
        jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, longest - x.shape[-2]), (0, 0)])
        for x in matrices
    ]
    return jnp.concatenate(filled, axis=-1)


def zeros_along(
    x: jax.Array, axes: MatrixAxes, side: tuple[int, ...], dtype: Any
) -> jax.Array:
    """Zeros that are sharded as `x` is on its batch and one side of its matrices.

    Args:
      x: Array or abstract array.
      axes: Non-negative axes, from `resolve_axes`.
      side: `axes.fan_in`, `axes.fan_out`, or () for none of them.
      dtype: Of the result.

    Returns:
      Shape (*batch, side, 1); (*batch, 1, 1) for no side.
    """
    over = tuple(axis for axis in block_axes(axes) if axis not in side)
    zeros = jnp.sum(jnp.zeros_like(x, dtype=dtype), axis=over, keepdims=True)
    sharding = jax.typeof(zeros).sharding
    spec = (*sharding.spec, *(None,) * (zeros.ndim - len(sharding.spec)))
    batch = [entry for a, entry in enumerate(spec) if a not in block_axes(axes)]
    first, *others = [spec[axis] for axis in side] or [None]
    # Of several axes the first one may stay sharded if no other is.
    rows = None if any(others) else first

    def viewed(zeros: jax.Array) -> jax.Array:
        matrices = to_matrices(zeros, axes)
        return matrices if side == axes.fan_in else matrices.mT

    placed = NamedSharding(sharding.mesh, PartitionSpec(*batch, rows, None))
    return left_to_compiler(viewed, zeros, shardings=placed)
