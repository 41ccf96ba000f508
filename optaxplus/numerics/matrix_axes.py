"""How an array is a batch of matrices: the axes, the view, and the way back.

An optimizer that treats weight matrices as matrices has to know which axes of a
parameter are summed over in the forward product (fan-in), which index its outputs
(fan-out), and which merely count copies (batch): layers stacked by a scan, experts,
attention heads. `MatrixAxes` says so once, and every per-matrix statistic of the
library reads it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from optaxplus.numerics.explicit_axes import left_to_compiler

__all__ = [
    "MatrixAxes",
    "block_axes",
    "block_shape",
    "block_statistic",
    "from_matrices",
    "map_all_matrices",
    "reduce_blocks",
    "resolve_axes",
    "scale_matrices",
    "split_columns",
    "spread_statistic",
    "to_matrices",
]


@dataclass(frozen=True)
class MatrixAxes:
    """Which axes of an array form a matrix; axes named nowhere are the batch.

    A leaf for `jax.tree`, never a pytree, so a pytree of `MatrixAxes` has the
    structure of the parameters it describes.

    Attributes:
      fan_in: Axes that the forward product sums over, in the order in which they are
        flattened into the rows; () for a vector or a scalar.
      fan_out: Axes that index the outputs, flattened into the columns. The elements
        of a vector are its fan_out. Negative axes count from the end, so the same
        value fits a parameter with and without leading batch axes.
      splits: Sizes along the flattened fan_out of projections that are stored side by
        side (fused query, key and value); each of them is a matrix of its own. () for
        one matrix.

    Raises:
      TypeError: If an entry is not an integer.
      ValueError: If an axis is named twice, or a split is not positive.

    Example:
      A Flax query projection of shape (features, heads, head_dim) is one matrix:

      >>> MatrixAxes(fan_in=(0,), fan_out=(1, 2))
      MatrixAxes(fan_in=(0,), fan_out=(1, 2), splits=())

      and the biases (layers, features) of a scanned stack are one vector a layer:

      >>> MatrixAxes(fan_in=(), fan_out=(1,))
      MatrixAxes(fan_in=(), fan_out=(1,), splits=())
    """

    fan_in: tuple[int, ...]
    fan_out: tuple[int, ...]
    splits: tuple[int, ...] = ()

    def __post_init__(self):
        for field in ("fan_in", "fan_out", "splits"):
            value = getattr(self, field)
            if not isinstance(value, tuple) or not all(
                isinstance(entry, int) and not isinstance(entry, bool)
                for entry in value
            ):
                raise TypeError(
                    f"MatrixAxes: {field}={value!r} is not allowed; it must be a tuple "
                    "of integers."
                )
        if len(set(self.fan_in + self.fan_out)) != len(self.fan_in + self.fan_out):
            raise ValueError(
                f"MatrixAxes: fan_in={self.fan_in}, fan_out={self.fan_out} is not "
                "allowed; an axis may be named only once."
            )
        if any(size <= 0 for size in self.splits):
            raise ValueError(
                f"MatrixAxes: splits={self.splits} is not allowed; sizes must be > 0."
            )

    @property
    def is_matrix(self) -> bool:
        """Whether both sides have axes; otherwise the blocks are vectors."""
        return bool(self.fan_in) and bool(self.fan_out)


def resolve_axes(axes: MatrixAxes, shape: tuple[int, ...]) -> MatrixAxes:
    """Returns `axes` with non-negative entries, checked against `shape`.

    Raises:
      ValueError: If an axis lies outside the shape, two entries name the same axis,
        or the splits do not add up to the flattened fan_out.
    """
    rank = len(shape)
    for axis in axes.fan_in + axes.fan_out:
        if not -rank <= axis < rank:
            raise ValueError(
                f"{axes} does not fit shape {shape}: axis {axis} is out of range"
            )
    fan_in = tuple(axis % rank for axis in axes.fan_in)
    fan_out = tuple(axis % rank for axis in axes.fan_out)
    if len(set(fan_in + fan_out)) != len(fan_in + fan_out):
        raise ValueError(f"{axes} does not fit shape {shape}: it names an axis twice")
    width = math.prod(shape[axis] for axis in fan_out)
    if axes.splits and sum(axes.splits) != width:
        raise ValueError(
            f"{axes} does not fit shape {shape}: the splits add up to "
            f"{sum(axes.splits)}, the flattened fan_out has {width} (in a stack, "
            "negative axes count from behind its axis of layers)"
        )
    return MatrixAxes(fan_in, fan_out, axes.splits)


def block_axes(axes: MatrixAxes) -> tuple[int, ...]:
    """The axes that one matrix or vector extends over, splits disregarded."""
    return axes.fan_in + axes.fan_out


def block_shape(axes: MatrixAxes, shape: tuple[int, ...]) -> tuple[int, int]:
    """(fan_in, fan_out) sizes of one matrix; of its narrowest split if it has any."""
    axes = resolve_axes(axes, shape)
    fan_out = math.prod(shape[axis] for axis in axes.fan_out)
    return (
        math.prod(shape[axis] for axis in axes.fan_in),
        min(axes.splits) if axes.splits else fan_out,
    )


def to_matrices(x: jax.Array, axes: MatrixAxes) -> jax.Array:
    """Views `x` as batches of matrices, shape (*batch, fan_in, fan_out).

    Batch axes keep their order and are not flattened, so that their sharding
    survives. A vector becomes a matrix of one row. Splits are not applied. Reduced
    statistics, whose fan_in or fan_out axes have another size, are viewed alike.

    Args:
      x: Array of the rank that `axes` was resolved for.
      axes: Non-negative axes, from `resolve_axes`.
    """
    shape = tuple(x.shape[axis] for axis in _batch_axes(axes, x.ndim))
    rows = math.prod(x.shape[axis] for axis in axes.fan_in)
    columns = math.prod(x.shape[axis] for axis in axes.fan_out)
    return jnp.transpose(x, _order(axes, x.ndim)).reshape(*shape, rows, columns)


def from_matrices(
    matrices: jax.Array, axes: MatrixAxes, shape: tuple[int, ...]
) -> jax.Array:
    """Inverse of `to_matrices` for an array of shape `shape`."""
    order = _order(axes, len(shape))
    permuted = matrices.reshape(tuple(shape[axis] for axis in order))
    return jnp.transpose(permuted, [order.index(axis) for axis in range(len(shape))])


def _batch_axes(axes: MatrixAxes, rank: int) -> tuple[int, ...]:
    return tuple(axis for axis in range(rank) if axis not in block_axes(axes))


def _order(axes: MatrixAxes, rank: int) -> tuple[int, ...]:
    return _batch_axes(axes, rank) + axes.fan_in + axes.fan_out


def split_columns(matrices: jax.Array, splits: tuple[int, ...]) -> list[jax.Array]:
    """Cuts (*batch, m, n) into the matrices that `splits` stores side by side."""
    ends = [sum(splits[: index + 1]) for index in range(len(splits) - 1)]
    return jnp.split(matrices, ends, axis=-1) if splits else [matrices]


def map_all_matrices(
    function: Callable[[list[jax.Array]], Sequence[jax.Array]],
    xs: Sequence[jax.Array],
    axes: Sequence[MatrixAxes],
) -> list[jax.Array]:
    """Applies `function` to arrays seen as batches of matrices, and puts them back.

    Args:
      function: Maps a list of arrays of shape (*batch, m, n), all matrices of all
        arrays, splits apart, to as many arrays of the same shapes. Called once.
      xs: Any shapes that `axes` fits.
      axes: The matrix axes of each.

    Returns:
      The results in the shapes of `xs`.
    """
    resolved = [resolve_axes(a, x.shape) for a, x in zip(axes, xs, strict=True)]

    def mapped(*xs: jax.Array) -> tuple[jax.Array, ...]:
        blocks = [
            split_columns(to_matrices(x, a), a.splits)
            for x, a in zip(xs, resolved, strict=True)
        ]
        results = iter(function([block for parts in blocks for block in parts]))
        return tuple(
            from_matrices(
                jnp.concatenate([next(results) for _ in parts], axis=-1), a, x.shape
            )
            for x, a, parts in zip(xs, resolved, blocks, strict=True)
        )

    return list(left_to_compiler(mapped, *xs))


def scale_matrices(
    x: jax.Array, axes: MatrixAxes, factor: Callable[[int, int], Any]
) -> jax.Array:
    """Multiplies every matrix by a number that depends on its shape alone.

    Args:
      x: Any shape that `axes` fits.
      axes: The matrix axes of `x`; each split counts as a matrix.
      factor: Maps (fan_in, fan_out) to the number, traced or not. Not asked about
        matrices without entries.
    """
    axes = resolve_axes(axes, x.shape)
    if not x.size:
        return x
    rows = math.prod(x.shape[axis] for axis in axes.fan_in)
    columns = math.prod(x.shape[axis] for axis in axes.fan_out)
    if not axes.splits:
        return x * jnp.asarray(factor(rows, columns), x.dtype)
    # One number for each column, in the order and the places of fan_out.
    numbers = [jnp.full(n, factor(rows, n), x.dtype) for n in axes.splits]
    row = MatrixAxes((), axes.fan_out)
    shape = tuple(n if a in axes.fan_out else 1 for a, n in enumerate(x.shape))
    spread = jnp.concatenate(numbers).reshape(
        *(1,) * (x.ndim - len(axes.fan_out)), 1, columns
    )
    return x * from_matrices(spread, row, shape)


def block_statistic(
    function: Callable[[jax.Array, tuple[int, ...]], jax.Array],
    x: jax.Array,
    axes: MatrixAxes,
) -> jax.Array:
    """Reduces each matrix or vector of `x` to one number, as it is stored.

    Args:
      function: Maps (array, axes) to the reduction over those axes, kept at size 1.
      x: Any shape that `axes` fits.
      axes: The matrix axes of `x`; a scalar is its own block.

    Returns:
      An array of the rank of `x` whose block axes have size 1; the first axis of
      fan_out has the number of splits where there are any.
    """
    axes = resolve_axes(axes, x.shape)
    if not axes.splits:
        return function(x, block_axes(axes))
    shape = [1 if axis in block_axes(axes) else n for axis, n in enumerate(x.shape)]
    shape[axes.fan_out[0]] = len(axes.splits)

    def statistic(x: jax.Array) -> jax.Array:
        blocks = split_columns(to_matrices(x, axes), axes.splits)
        values = [function(block, (-2, -1)) for block in blocks]
        return from_matrices(jnp.concatenate(values, axis=-1), axes, tuple(shape))

    return left_to_compiler(statistic, x, shardings=_of_batch(x, axes))


def _of_batch(x: jax.Array, axes: MatrixAxes) -> NamedSharding:
    """The sharding of x, with the axes of its blocks whole."""
    sharding = jax.typeof(x).sharding
    spec = (*sharding.spec, *(None,) * (x.ndim - len(sharding.spec)))
    kept = (None if a in block_axes(axes) else entry for a, entry in enumerate(spec))
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))


def spread_statistic(
    statistic: jax.Array, axes: MatrixAxes, shape: tuple[int, ...]
) -> jax.Array:
    """Repeats a `block_statistic` so that it broadcasts against an array of `shape`."""
    axes = resolve_axes(axes, shape)
    if not axes.splits:
        return statistic
    columns = jnp.repeat(
        to_matrices(statistic, axes),
        np.asarray(axes.splits),
        axis=-1,
        total_repeat_length=sum(axes.splits),
    )
    row = tuple(1 if axis in axes.fan_in else n for axis, n in enumerate(shape))
    return from_matrices(columns, axes, row)


def reduce_blocks(
    function: Callable[[jax.Array, tuple[int, ...]], jax.Array],
    x: jax.Array,
    axes: MatrixAxes,
) -> jax.Array:
    """Reduces each matrix or vector of `x` to one number.

    Arguments as in `block_statistic`.

    Returns:
      An array that broadcasts against `x`.
    """
    return spread_statistic(block_statistic(function, x, axes), axes, x.shape)
