"""All that belongs to one matrix on one device, for rules that have more than it.

A rule with Kronecker factors multiplies a matrix with its factors several times a step.
If every device keeps its pieces, each product moves whole matrices; if pieces are
traded for whole matrices first, as much is moved as there is, once there and once back:

    pieces of all arrays ── all-to-all ──> all arrays of some matrices
    the rule, as on one device
    results ── all-to-all ──> pieces

Matrices of one shape are shared out evenly over the mesh axes that cut them. Along the
others everything is repeated, and so is the rule, but for what is done once in a while:
that is `shared` out over them.

A stack whose matrices divide evenly among the devices keeps its factors whole, on their
owners (`Lies.factor`); they never move.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from optaxplus.numerics.tiles import Tiling

__all__ = ["Lies", "lies", "on_owners", "shared"]

Names = tuple[str, ...]


@dataclass(frozen=True)
class Lies:
    """How the tiles of one parameter lie on a mesh, and what belongs to them.

    Attributes:
      tiling: The tiles.
      batch: Mesh axes along each of `tiling.batch`.
      rows: Mesh axes along the rows, in the order of the mesh.
      columns: Mesh axes along the columns.
      owners: The mesh axes of both, the outermost first.
      is_resident: Whether every device can own whole matrices without moving factors.
    """

    tiling: Tiling
    batch: tuple[Names, ...]
    rows: Names
    columns: Names
    owners: Names
    is_resident: bool

    @property
    def matrices(self) -> PartitionSpec:
        """Of arrays (*batch, tiles, m, n)."""
        return _spec(*self.batch, self.rows, self.columns)

    @property
    def rows_alone(self) -> PartitionSpec:
        """Of arrays (*batch, m, n) that are parts of the columns."""
        return _spec(*self.batch[:-1], self.rows, ())

    def factor(self, side: int, width: int, mesh: Mapping[str, int]) -> PartitionSpec:
        """Of arrays (*batch, tiles, size of the side, width)."""
        if self.is_resident:
            first, *others = self.batch
            return _spec(first + self.owners, *others, (), ())
        own, other = (self.rows, self.columns)[:: -1 if side else 1]
        other = other if width % _devices(other, mesh) == 0 else ()
        return _spec(*self.batch, own, other)


def lies(tiling: Tiling, spec: PartitionSpec, mesh: Mapping[str, int]) -> Lies:
    """How the tiles of a parameter lie.

    Args:
      tiling: Of the parameter.
      spec: How the parameter is sharded.
      mesh: Sizes of the mesh axes, in their order.
    """
    axes = tiling.axes
    entries = [_names(entry) for entry in spec]
    entries += [()] * (len(tiling.shape) - len(entries))

    def along(side: tuple[int, ...], size: int) -> Names:
        given = {name for axis in side for name in entries[axis]}
        names: Names = ()
        for name in mesh:
            if name in given and size % _devices((*names, name), mesh) == 0:
                names += (name,)
        return names

    sides = axes.fan_in + axes.fan_out
    batch = [
        tuple(name for name in entry if name in mesh)
        for axis, entry in enumerate(entries)
        if axis not in sides
    ]
    batch.append(())
    rows = along(axes.fan_in, tiling.size[0])
    columns = along(axes.fan_out, tiling.size[1])
    # The last one of a side is traded first: its pieces are the smallest.
    owners = tuple(name for name in reversed([*mesh]) if name in rows + columns)
    parts = _devices(batch[0] + owners, mesh)
    is_resident = bool(owners) and tiling.batch[0] % parts == 0
    return Lies(tiling, tuple(batch), rows, columns, owners, is_resident)


def _names(entry: Any) -> Names:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _spec(*entries: Names) -> PartitionSpec:
    return PartitionSpec(*(entry or None for entry in entries))


def _devices(names: Names, mesh: Mapping[str, int]) -> int:
    return math.prod(mesh[name] for name in names)


Leaf = Any  # a NamedTuple of arrays (*batch, tiles, rows, columns), None for none


def on_owners(
    work: Callable[..., Sequence[Leaf]],
    leaves: Sequence[Leaf],
    specs: Sequence[Leaf],
    where: Sequence[Lies],
    mesh: Mesh | AbstractMesh,
    *,
    axes: Names,
    slow: frozenset[str],
    is_due: jax.Array,
    **arguments: Any,
) -> list[Leaf]:
    """Calls `work` with the matrices that a device owns.

    Args:
      work: Maps leaves whose arrays are (count, rows, columns), and the keyword
        arguments `is_due`, `copies` (mesh axes along which it is repeated) and
        `arguments`, to leaves of the same shapes and dtypes.
      leaves: Tuples with names of arrays (*batch, tiles, rows, columns), or None.
      specs: How these lie, in tuples of the same names.
      where: The same for the matrices of each.
      mesh: Of the specs.
      axes: Its axes.
      slow: Names of what `work` changes only when it is due.
      is_due: Boolean scalar.
      **arguments: Scalars, traced or not.
    """
    sizes = {name: mesh.shape[name] for name in axes if mesh.shape[name] > 1}
    used = {name for own in where for name in own.owners + sum(own.batch, ())}
    copies = tuple(name for name in sizes if name not in used)
    groups = _groups(leaves, specs, where)
    routes = {
        (g, name): _route(spec, where[members[0]])
        for g, members in enumerate(groups)
        for name, spec in specs[members[0]]._asdict().items()
        if spec is not None
    }
    # What is traced has to come in as an argument.
    traced = {k: v for k, v in arguments.items() if isinstance(v, jax.Array)}

    def inside(
        leaves: list[Leaf], is_due: jax.Array, traced: dict[str, jax.Array]
    ) -> list[Leaf]:
        stacks = {
            (g, name): _stacked([getattr(leaves[i], name) for i in groups[g]])
            for g, name in routes
        }
        owned = _to_owners(stacks, routes, sizes)
        results = work(
            [
                type(leaves[members[0]])(
                    *(owned.get((g, name)) for name in leaves[members[0]]._fields)
                )
                for g, members in enumerate(groups)
            ],
            is_due=is_due,
            copies=copies,
            **(arguments | traced),
        )
        changed = {(g, name): getattr(results[g], name) for g, name in routes}
        counts = {key: len(x) for key, x in stacks.items()}
        unchanged = {key: x for key, x in stacks.items() if key[1] in slow}

        def all_back(changed: Stacks, _: Stacks) -> Stacks:
            return _from_owners(changed, routes, counts, sizes)

        def most_back(changed: Stacks, unchanged: Stacks) -> Stacks:
            now = {key: x for key, x in changed.items() if key not in unchanged}
            return _from_owners(now, routes, counts, sizes) | unchanged

        # In one place: collectives that do not wait for each other can run in another
        # order on each device, and wait for each other forever.
        back = lax.cond(is_due, all_back, most_back, changed, unchanged)
        return _unstacked(back, leaves, groups)

    return jax.shard_map(
        inside,
        mesh=mesh,
        in_specs=(list(specs), PartitionSpec(), PartitionSpec()),
        out_specs=list(specs),
        axis_names=set(axes),
        check_vma=False,
    )(list(leaves), is_due, traced)


def _groups(
    leaves: Sequence[Leaf], specs: Sequence[Leaf], where: Sequence[Lies]
) -> list[list[int]]:
    """The leaves whose matrices can be shared out together."""
    groups: dict[Any, list[int]] = {}
    for index, (leaf, spec, own) in enumerate(zip(leaves, specs, where, strict=True)):
        sides = tuple(s and s[-2:] for s in spec)
        dtypes = tuple(x is not None and x.dtype for x in leaf)
        key = (own.tiling.size, sides, dtypes)
        groups.setdefault(index if own.is_resident else key, []).append(index)
    return list(groups.values())


class _Route(NamedTuple):
    """The mesh axes along which pieces of rows and of columns lie, and the owners."""

    rows: Names
    columns: Names
    owners: Names  # () if every device has whole what it owns


def _route(spec: PartitionSpec, own: Lies) -> _Route:
    first, (rows, columns) = _names(spec[0]), map(_names, spec[-2:])
    is_owned = own.is_resident and set(own.owners) <= set(first)
    return _Route(rows, columns, () if is_owned else own.owners)


Stacks = dict[Any, jax.Array]


def _to_owners(
    stacks: Stacks, routes: Mapping[Any, _Route], sizes: Mapping[str, int]
) -> Stacks:
    """Pieces (count, rows, columns) of every matrix for whole ones of a share."""
    stacks = {
        key: _padded(x, _devices(routes[key].owners, sizes))
        for key, x in stacks.items()
    }
    for axis in reversed([*sizes]):
        parts = {}
        for key, x in stacks.items():
            if axis in routes[key].rows + routes[key].columns:
                if axis in routes[key].owners:
                    parts[key] = _cut(x, 0, sizes[axis])
            elif axis in routes[key].owners:
                stacks[key] = _own(x, (axis,), sizes)
        for key, x in _all_to_all(parts, axis).items():
            side = 1 if axis in routes[key].rows else 2
            stacks[key] = _merged(jnp.moveaxis(x, 0, side), side)
    return stacks


def _from_owners(
    stacks: Stacks,
    routes: Mapping[Any, _Route],
    counts: Mapping[Any, int],
    sizes: Mapping[str, int],
) -> Stacks:
    """The way back."""
    stacks = dict(stacks)
    for axis, size in sizes.items():
        parts = {}
        for key, x in stacks.items():
            rows, columns, owners = routes[key]
            if axis not in owners:
                continue
            if axis in rows + columns:
                side = 1 if axis in rows else 2
                parts[key] = jnp.moveaxis(_cut(x, side, size), side, 0)
            else:
                stacks[key] = lax.all_gather(x, axis, axis=0, tiled=True)
        for key, x in _all_to_all(parts, axis).items():
            stacks[key] = _merged(x, 0)
    return {key: x[: counts[key]] for key, x in stacks.items()}


def _all_to_all(parts: Stacks, axis: str) -> Stacks:
    """Row i of every array goes to the i-th device, all of one dtype together."""
    results = {}
    # In an order that is the same in every process.
    for dtype in dict.fromkeys(x.dtype for x in parts.values()):
        some = {key: x for key, x in parts.items() if x.dtype == dtype}
        rows = [x.reshape(len(x), x.size // len(x)) for x in some.values()]
        flat = jnp.concatenate(rows, axis=1)
        flat = lax.all_to_all(flat, axis, split_axis=0, concat_axis=0, tiled=True)
        ends = list(itertools.accumulate(row.shape[1] for row in rows))
        for (key, x), part in zip(
            some.items(), jnp.split(flat, ends[:-1], axis=1), strict=True
        ):
            results[key] = part.reshape(x.shape)
    return results


def _cut(x: jax.Array, axis: int, parts: int) -> jax.Array:
    """Two axes in place of one, the first of size `parts`."""
    size = x.shape[axis] // parts
    return x.reshape(*x.shape[:axis], parts, size, *x.shape[axis + 1 :])


def _merged(x: jax.Array, axis: int) -> jax.Array:
    """One axis in place of two."""
    size = x.shape[axis] * x.shape[axis + 1]
    return x.reshape(*x.shape[:axis], size, *x.shape[axis + 2 :])


def _padded(x: jax.Array, multiple: int) -> jax.Array:
    return jnp.pad(x, [(0, -len(x) % multiple)] + [(0, 0)] * (x.ndim - 1))


def _stacked(arrays: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate(
        [x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:]) for x in arrays]
    )


def _unstacked(
    stacks: Stacks, leaves: Sequence[Leaf], groups: Sequence[Sequence[int]]
) -> list[Leaf]:
    results = list(leaves)
    for (g, name), stack in stacks.items():
        start = 0
        for index in groups[g]:
            like = getattr(leaves[index], name)
            count = math.prod(like.shape[:-2])
            part = stack[start : start + count].reshape(like.shape)
            results[index] = results[index]._replace(**{name: part})
            start += count
    return results


def _own(x: jax.Array, axes: Names, sizes: Mapping[str, int]) -> jax.Array:
    """This device's share of what every device along these axes has."""
    share = len(x) // _devices(axes, sizes)
    return lax.dynamic_slice_in_dim(x, lax.axis_index(axes) * share, share)


def shared(
    function: Callable[..., tuple[jax.Array, ...]], copies: Names
) -> Callable[..., tuple[jax.Array, ...]]:
    """`function` of what all devices along some mesh axes have, each doing a share.

    Args:
      function: Maps stacks (count, ...) to stacks (count, ...), one by one.
      copies: The mesh axes, as inside of a `jax.shard_map`; () for none.
    """
    if not copies:
        return function

    def share(*stacks: jax.Array) -> tuple[jax.Array, ...]:
        if not stacks[0].size:
            return function(*stacks)
        sizes = {axis: lax.axis_size(axis) for axis in copies}
        devices = _devices(copies, sizes)
        mine = [_own(_padded(x, devices), copies, sizes) for x in stacks]
        return tuple(
            lax.all_gather(y, copies, axis=0, tiled=True)[: len(stacks[0])]
            for y in function(*mine)
        )

    return share
