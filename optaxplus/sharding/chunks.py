"""What goes to an owner and comes back: matrices in pieces, all of one width.

The chunk for an owner has the pieces of everything it owns one under another, whatever
their shapes, so that one all-to-all moves them all.
"""

import math
from collections.abc import Sequence
from itertools import groupby

import jax
import jax.numpy as jnp
import numpy as np

from optaxplus.numerics.matrix_axes import split_columns
from optaxplus.sharding.layouts import mesh_size
from optaxplus.sharding.plan import Exchange

__all__ = ["chunk_of_matrices", "from_chunks", "matrices_of_chunk", "to_chunks"]


def to_chunks(
    stacks: Sequence[jax.Array], exchange: Exchange, owned: np.ndarray
) -> jax.Array:
    """Shape (owners, rows, width): a chunk for every owner.

    Args:
      stacks: Pieces (count, m, n) of the matrices of each layout, in the order of their
        owners.
      exchange: Their exchange.
      owned: Shape (owners, layouts): how many matrices or panels each owner has.
    """
    folded = [
        _folded(_in_panels(stack, exchange, position, counts), exchange.width)
        for position, (stack, counts) in enumerate(zip(stacks, owned.T, strict=True))
    ]
    starts = [0] * len(stacks)
    chunks = []
    for owners, row in _runs(owned):
        parts = []
        for position, count in enumerate(row):
            stop = starts[position] + owners * count
            part = folded[position][starts[position] : stop]
            starts[position] = stop
            rows = count * part.shape[1]
            parts.append(part.reshape(owners, rows, exchange.width))
        chunk = jnp.concatenate(parts, axis=1)
        missing = exchange.chunk - chunk.shape[1]
        chunks.append(jnp.pad(chunk, [(0, 0), (0, missing), (0, 0)]))
    return jnp.concatenate(chunks)


def from_chunks(x: jax.Array, exchange: Exchange, owned: np.ndarray) -> list[jax.Array]:
    """Inverse of `to_chunks`."""
    height = exchange.rows(exchange.width)
    parts: list[list[jax.Array]] = [[] for _ in exchange.layouts]
    first = 0
    for owners, row in _runs(owned):
        chunk = x[first : first + owners]
        first += owners
        start = 0
        for position, count in enumerate(row):
            stop = start + count * height[position]
            parts[position].append(_unfolded(chunk[:, start:stop], exchange, position))
            start = stop
    return [
        _in_whole(jnp.concatenate(part), exchange, position, counts)
        for position, (part, counts) in enumerate(zip(parts, owned.T, strict=True))
    ]


def _runs(owned: np.ndarray) -> list[tuple[int, tuple[int, ...]]]:
    """(number of owners, what each owns) for owners in a row that own alike."""
    rows = [tuple(row) for row in owned.tolist()]
    return [(len(list(group)), row) for row, group in groupby(rows)]


# The panels of a matrix go to the members of a team, one to each.


def _in_panels(
    stack: jax.Array, exchange: Exchange, position: int, counts: np.ndarray
) -> jax.Array:
    """The panels of matrices (count, m, n), in the order of their owners."""
    panels, side = exchange.panels[position], 1 + exchange.cut_side(position)
    if panels == 1:
        return stack
    start = 0
    parts = []
    for teams, (count,) in _runs(counts[::panels, None]):
        part = stack[start : start + teams * count]
        start += teams * count
        members = jnp.stack(jnp.split(part, panels, axis=side), axis=1)
        members = members.reshape(teams, count, *members.shape[1:]).swapaxes(1, 2)
        parts.append(members.reshape(-1, *members.shape[3:]))
    return jnp.concatenate(parts)


def _in_whole(
    stack: jax.Array, exchange: Exchange, position: int, counts: np.ndarray
) -> jax.Array:
    """Inverse of `_in_panels`."""
    panels, side = exchange.panels[position], 1 + exchange.cut_side(position)
    if panels == 1:
        return stack
    start = 0
    parts = []
    for teams, (count,) in _runs(counts[::panels, None]):
        part = stack[start : start + teams * panels * count]
        start += teams * panels * count
        part = part.reshape(teams, panels, count, *part.shape[1:]).swapaxes(1, 2)
        part = part.reshape(-1, panels, *part.shape[3:])
        parts.append(
            jnp.concatenate([part[:, panel] for panel in range(panels)], axis=side)
        )
    return jnp.concatenate(parts)


def _folded(x: jax.Array, width: int) -> jax.Array:
    """(count, m, n) as (count, rows, width): the columns in blocks, one under another.

    On TPUs such blocks are moved as they are; flattening a matrix is not cheap there.
    """
    missing = -x.shape[2] % width
    x = jnp.pad(x, [(0, 0), (0, 0), (0, missing)])
    return jnp.concatenate(jnp.split(x, x.shape[2] // width, axis=2), axis=1)


def _unfolded(x: jax.Array, exchange: Exchange, position: int) -> jax.Array:
    """Inverse of `_folded` for any arrangement of the pieces of one layout."""
    rows, columns = exchange.pieces[position]
    x = x.reshape(-1, exchange.rows(exchange.width)[position], exchange.width)
    blocks = jnp.split(x, x.shape[1] // rows, axis=1)
    return jnp.concatenate(blocks, axis=2)[:, :, :columns]


# What an owner makes of its chunk, in pieces of all devices.


def matrices_of_chunk(
    x: jax.Array, exchange: Exchange, counts: Sequence[int]
) -> list[list[jax.Array]]:
    """For each layout the arrays (count, m, n) that it has, one for every split.

    Args:
      x: Shape (devices, rows, width).
      exchange: The exchange it came by.
      counts: How many matrices, or panels, of each layout it has.
    """
    matrices = []
    height = exchange.rows(exchange.width)
    start = 0
    for position, count in enumerate(counts):
        stop = start + count * height[position]
        arrays = []
        if count:
            whole = _whole(x[:, start:stop], exchange, position)
            arrays = split_columns(whole, exchange.layouts[position].splits)
        matrices.append(arrays)
        start = stop
    return matrices


def chunk_of_matrices(
    matrices: Sequence[Sequence[jax.Array]],
    exchange: Exchange,
    dtype: jnp.dtype,
) -> jax.Array:
    """Inverse of `matrices_of_chunk`, padded with zeros."""
    parts = [
        _in_pieces(jnp.concatenate(arrays, axis=-1), exchange, position)
        for position, arrays in enumerate(matrices)
        if arrays
    ]
    devices = mesh_size(exchange.mesh, exchange.axes)
    missing = exchange.chunk - sum(part.shape[1] for part in parts)
    parts.append(jnp.zeros((devices, missing, exchange.width), dtype))
    return jnp.concatenate(parts, axis=1)


def _arrival(exchange: Exchange, position: int) -> tuple[list[int], list[int]]:
    """Sizes of the axes of matrices in pieces, and their order in the whole.

    The pieces come as (mesh axes..., count, dims of the rows..., of the columns...);
    count is given as -1.
    """
    layout = exchange.layouts[position]
    dims = layout.rows + layout.columns
    first = len(exchange.axes)
    sizes = [exchange.mesh[axis] for axis in exchange.axes]
    sizes += [-1, *(dim.local for dim in dims)]
    if exchange.panels[position] > 1:
        # What is cut has one axis a side.
        sizes[first + 1 :] = exchange.pieces[position]
    order = [first]
    for index, dim in enumerate(dims):
        order += [exchange.axes.index(axis) for axis in dim.axes] + [first + 1 + index]
    return sizes, order


def _whole(x: jax.Array, exchange: Exchange, position: int) -> jax.Array:
    """(count, rows, columns) out of (devices, rows of their pieces, width)."""
    sizes, order = _arrival(exchange, position)
    x = _unfolded(x, exchange, position).reshape(sizes).transpose(order)
    return x.reshape(-1, *exchange.panel_shape(position))


def _in_pieces(matrices: jax.Array, exchange: Exchange, position: int) -> jax.Array:
    """Inverse of `_whole`."""
    sizes, order = _arrival(exchange, position)
    devices = math.prod(sizes[: len(exchange.axes)])
    sizes[len(exchange.axes)] = len(matrices)
    x = matrices.reshape([sizes[axis] for axis in order])
    x = x.transpose(np.argsort(order).tolist())
    x = _folded(x.reshape(-1, *exchange.pieces[position]), exchange.width)
    return x.reshape(devices, -1, exchange.width)
