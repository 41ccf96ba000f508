"""How the matrices of a parameter lie on a mesh: pieces, copies, and other matrices."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jax.sharding import PartitionSpec

from optaxplus.numerics.matrix_axes import MatrixAxes, resolve_axes

__all__ = [
    "Block",
    "Dim",
    "Layout",
    "guessed_specs",
    "lay_out",
    "layout_counts",
    "mesh_size",
]


class Dim(NamedTuple):
    """One axis of a side of a matrix: its size on a device, and what shards it."""

    local: int
    axes: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """How matrices lie on a mesh; those of one layout move and are computed together.

    Attributes:
      rows: The axes that form the rows. Where the order of rows does not matter, one.
      columns: The axes that form the columns.
      splits: Widths of the matrices that lie side by side in the columns, () for one.
      batch: Mesh axes along which other matrices lie.
    """

    rows: tuple[Dim, ...]
    columns: tuple[Dim, ...]
    splits: tuple[int, ...]
    batch: tuple[str, ...]

    @property
    def axes(self) -> frozenset[str]:
        """The mesh axes along which the pieces of a matrix lie."""
        return frozenset(axis for dim in self.rows + self.columns for axis in dim.axes)

    @property
    def piece(self) -> tuple[int, int]:
        """Shape of what one device has of a matrix."""
        return (
            math.prod(dim.local for dim in self.rows),
            math.prod(dim.local for dim in self.columns),
        )

    def shape(self, mesh: Mapping[str, int]) -> tuple[int, int]:
        """Shape of the whole matrix on a mesh of these sizes."""
        rows, columns = (
            math.prod(dim.local * mesh_size(mesh, dim.axes) for dim in side)
            for side in (self.rows, self.columns)
        )
        return rows, columns

    def long_side(self, mesh: Mapping[str, int]) -> int:
        """0 if the whole matrix has more rows than columns, else 1."""
        rows, columns = self.shape(mesh)
        return 0 if rows > columns else 1


@dataclass(frozen=True)
class Block:
    """Where the matrices of one parameter, or of one split of it, lie on a mesh.

    Attributes:
      layout: How a device's piece of one of them is cut.
      count: How many of them a device has a piece of.
      is_turned: Whether its rows are the columns of the layout.
    """

    layout: Layout
    count: int
    is_turned: bool


def lay_out(
    shape: tuple[int, ...],
    axes: MatrixAxes,
    spec: PartitionSpec,
    mesh: dict[str, int],
) -> list[Block]:
    """How the matrices of a parameter lie on a mesh, one block for every split.

    Args:
      shape: Of the whole parameter.
      axes: Its matrix axes.
      spec: How it is sharded; its sizes divide those of `shape`.
      mesh: Sizes of the mesh axes, in their order.
    """
    axes = resolve_axes(axes, shape)
    dims = _local_dims(shape, spec, mesh)
    sides = axes.fan_in + axes.fan_out
    batch = [dims[axis] for axis in range(len(shape)) if axis not in sides]
    count = math.prod(dim.local for dim in batch)
    batch_axes = {axis for dim in batch for axis in dim.axes}
    rows, columns = (
        tuple(dims[axis] for axis in side) for side in (axes.fan_in, axes.fan_out)
    )
    order = tuple(axis for axis in mesh if axis in batch_axes)
    if axes.splits and any(dim.axes for dim in columns):
        # No device has the columns of one split alone.
        return [Block(Layout(rows, columns, axes.splits, order), count, False)]
    widths = axes.splits or (math.prod(dim.local for dim in columns),)
    blocks = []
    for width in widths:
        side = columns if not axes.splits else (Dim(width, ()),)
        blocks.append(
            _wide(_merged(rows, mesh), _merged(side, mesh), count, order, mesh)
        )
    return blocks


def guessed_specs(
    shapes: Sequence[tuple[int, ...]],
    axes: Sequence[MatrixAxes],
    mesh: dict[str, int],
) -> list[PartitionSpec]:
    """How parameters probably lie where nothing tells.

    Mesh axes are taken to be in the usual order, from data to tensor parallelism, and
    the size that most sides of matrices have to be the width of the network. The side
    of that size, else the shorter one, has the first axis, the other side the next one,
    each its first dimension that divides; if none does, the axis goes to the other
    side. Batch axes are taken for whole.

    Args:
      shapes: Of the parameters.
      axes: Their matrix axes, non-negative.
      mesh: Sizes of the mesh axes, in their order.
    """
    sizes = [
        [math.prod(shape[axis] for axis in side) for side in (a.fan_in, a.fan_out)]
        for shape, a in zip(shapes, axes, strict=True)
    ]
    sides: Counter[int] = Counter()
    for shape, (rows, columns) in zip(shapes, sizes, strict=True):
        count = math.prod(shape) // max(1, rows * columns)
        sides.update({rows: count})
        sides.update({columns: count})
    width = max(sides, key=lambda size: (sides[size], -size), default=0)

    def rank(side: tuple[int, ...], size: int) -> tuple[bool, int, int]:
        # Of two sides of the same size the one with fewer axes: heads have two.
        return size != width, size, len(side)

    specs = []
    for shape, a, (rows, columns) in zip(shapes, axes, sizes, strict=True):
        order = [a.fan_in, a.fan_out]
        if rank(a.fan_out, columns) < rank(a.fan_in, rows):
            order.reverse()
        specs.append(_guessed_spec(shape, order, mesh))
    return specs


def _guessed_spec(
    shape: tuple[int, ...], sides: Sequence[tuple[int, ...]], mesh: dict[str, int]
) -> PartitionSpec:
    """The mesh axes in turn on one side and the other, where they divide."""
    entries: list[tuple[str, ...]] = [()] * len(shape)
    for turn, (name, size) in enumerate(mesh.items()):
        first, second = sides[turn % 2], sides[(turn + 1) % 2]
        for axis in (*first, *second):
            taken = math.prod(mesh[other] for other in entries[axis])
            if shape[axis] % (taken * size) == 0:
                entries[axis] += (name,)
                break
    return PartitionSpec(*(entry or None for entry in entries))


def _local_dims(
    shape: tuple[int, ...], spec: PartitionSpec, mesh: dict[str, int]
) -> list[Dim]:
    """The axes of a parameter as a device has them."""
    entries = (*spec, *[None] * (len(shape) - len(spec)))
    dims = []
    for size, entry in zip(shape, entries, strict=True):
        names = (entry,) if isinstance(entry, str) else tuple(entry or ())
        names = tuple(name for name in names if name in mesh)
        dims.append(Dim(size // math.prod(mesh[name] for name in names), names))
    return dims


def _merged(side: tuple[Dim, ...], mesh: dict[str, int]) -> Dim:
    """One axis in place of several, whose order is nobody's concern."""
    names = {axis for dim in side for axis in dim.axes}
    return Dim(
        math.prod(dim.local for dim in side),
        tuple(axis for axis in mesh if axis in names),
    )


def _wide(
    rows: Dim, columns: Dim, count: int, batch: tuple[str, ...], mesh: dict[str, int]
) -> Block:
    """The block with the side as rows that more devices share, else the short one."""

    def rank(side: Dim) -> Any:
        devices = math.prod(mesh[axis] for axis in side.axes)
        return -devices, side.local * devices, [axis not in side.axes for axis in mesh]

    is_turned = rank(rows) > rank(columns)
    if is_turned:
        rows, columns = columns, rows
    return Block(Layout((rows,), (columns,), (), batch), count, is_turned)


def layout_counts(blocks: Sequence[Block]) -> dict[Layout, int]:
    """How many matrices of each layout a device has a piece of."""
    counts: dict[Layout, int] = {}
    for block in blocks:
        if block.count and math.prod(block.layout.piece):
            counts[block.layout] = counts.get(block.layout, 0) + block.count
    return counts


def mesh_size(mesh: Mapping[str, int], axes: Iterable[str]) -> int:
    """Number of devices along these mesh axes."""
    return math.prod(mesh[axis] for axis in axes)
