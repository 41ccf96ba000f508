"""Matrices cut into tiles, so that no statistic of a side outgrows its use.

A Kronecker factor has the square of the size of its side. Sides above a largest size
are cut evenly, and each tile counts as a matrix of its own; the splits of a fused
projection are tiles too.
"""

import math
from dataclasses import dataclass

import jax

from optaxplus.numerics.matrix_axes import (
    MatrixAxes,
    from_matrices,
    resolve_axes,
    to_matrices,
)

__all__ = ["Tiling", "tile"]

# Tiles that are narrower than this share of what was asked for are refused.
_NARROWEST = 4


@dataclass(frozen=True)
class Tiling:
    """How an array of one shape is a batch of tiles of equal shape.

    Attributes:
      axes: Its matrix axes, non-negative.
      shape: Of the array.
      size: (m, n) of a tile.
      counts: Tiles along fan_in, along fan_out.
    """

    axes: MatrixAxes
    shape: tuple[int, ...]
    size: tuple[int, int]
    counts: tuple[int, int]

    @property
    def batch(self) -> tuple[int, ...]:
        """Sizes of the batch axes, and the number of tiles of each matrix."""
        sides = self.axes.fan_in + self.axes.fan_out
        sizes = (n for axis, n in enumerate(self.shape) if axis not in sides)
        return (*sizes, math.prod(self.counts))

    def to_tiles(self, x: jax.Array) -> jax.Array:
        """Views `x` as tiles: shape (*batch axes, tiles, m, n)."""
        matrices = to_matrices(x, self.axes)
        *batch, rows, columns = matrices.shape
        if self.counts == (1, 1):
            return matrices.reshape(*batch, 1, rows, columns)
        (down, right), (m, n) = self.counts, self.size
        cut = matrices.reshape(*batch, down, m, right, n).swapaxes(-2, -3)
        return cut.reshape(*batch, down * right, m, n)

    def from_tiles(self, tiles: jax.Array) -> jax.Array:
        """Inverse of `to_tiles`."""
        *batch, _, m, n = tiles.shape
        down, right = self.counts
        cut = tiles.reshape(*batch, down, right, m, n).swapaxes(-2, -3)
        matrices = cut.reshape(*batch, down * m, right * n)
        return from_matrices(matrices, self.axes, self.shape)


def tile(axes: MatrixAxes, shape: tuple[int, ...], max_dim: int | None) -> Tiling:
    """Cuts the matrices of an array into as few even tiles as `max_dim` allows.

    Splits of one width are tiles; those of several widths are cut into pieces of their
    greatest common divisor.

    Args:
      axes: Its matrix axes.
      shape: Of the array.
      max_dim: Largest side of a tile; None cuts at splits alone.

    Raises:
      ValueError: If a side has no divisor between a quarter of `max_dim` and `max_dim`.
    """
    axes = resolve_axes(axes, shape)
    rows, columns = (
        math.prod(shape[axis] for axis in side) for side in (axes.fan_in, axes.fan_out)
    )
    m = _even(rows, max_dim)
    n = _even(math.gcd(*axes.splits) if axes.splits else columns, max_dim)
    counts = rows // m if m else 1, columns // n if n else 1
    return Tiling(axes, shape, (m, n), counts)


def _even(size: int, largest: int | None) -> int:
    if largest is None or size <= largest:
        return size
    divisors = (n for n in range(largest, 0, -1) if size % n == 0)
    widest = next(divisors)
    if _NARROWEST * widest < largest:
        raise ValueError(
            f"a side of {size} has no even tiles of up to {largest}: the widest are "
            f"{widest}"
        )
    return widest
