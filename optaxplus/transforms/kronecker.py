"""A factor for each side of every matrix, and who has it: for Shampoo, SOAP and Kron.

    L ≈ E[G·Gᵀ]  of fan_in,  R ≈ E[Gᵀ·G]  of fan_out          for each matrix G

A side above `max_dim` is cut into tiles (`large_dims="tiles"`) or keeps the diagonal of
its factor alone (`"diagonal"`). A vector has the factor of fan_out alone, diagonals, or
none.
Factors of splits of several widths are filled up with zeros to the widest.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from optaxplus import trees, validation
from optaxplus.custom_types import Axes, DTypeName, PyTree
from optaxplus.numerics.explicit_axes import explicit_axes, left_to_compiler
from optaxplus.numerics.matrix_axes import (
    MatrixAxes,
    from_matrices,
    resolve_axes,
    to_matrices,
)
from optaxplus.numerics.tiles import Tiling, tile
from optaxplus.partition.inference import axes_of
from optaxplus.sharding.alike import lying_as
from optaxplus.sharding.layouts import guessed_specs
from optaxplus.sharding.owners import Lies, lies, on_owners
from optaxplus.sharding.placement import Where, sharding_of, where

__all__: list[str] = []

LARGE_DIMS = ("tiles", "diagonal")


@dataclass(frozen=True)
class Sides:
    """How a parameter is cut, and what the factors of fan_in and fan_out are.

    Attributes:
      axes: Its matrix axes, non-negative.
      shape: Of the parameter.
      tilings: One; of splits of several widths, one for each as an array of its own.
      kinds: "full", "diagonal" or "none" for each side of each tiling.
    """

    axes: MatrixAxes
    shape: tuple[int, ...]
    tilings: tuple[Tiling, ...]
    kinds: tuple[tuple[str, str], ...]

    def factor_shape(self, side: int, kinds: Sequence[str]) -> tuple[int, ...] | None:
        """Of the factors of one side, if it has any of these kinds; filled with zeros.

        (*batch, tiles, n, n), or (*batch, tiles, n, 1) for a diagonal.
        """
        shapes = [
            (tiling.size[side], tiling.size[side] if kind[side] == "full" else 1)
            for tiling, kind in zip(self.tilings, self.kinds, strict=True)
            if kind[side] in kinds
        ]
        if not shapes:
            return None
        *batch, _ = self.tilings[0].batch
        tiles = sum(tiling.batch[-1] for tiling in self.tilings)
        return (*batch, tiles, *map(max, zip(*shapes, strict=True)))


def check_max_dim(name: str, max_dim: Any, large_dims: Any) -> None:
    """Refuses what is no size, or no way to treat larger ones."""
    validation.check_int(name, minimum=1, max_dim=max_dim)
    validation.check_choice(name, "large_dims", large_dims, LARGE_DIMS)


def sides_of(
    name: str,
    axes: Axes,
    tree: PyTree,
    max_dim: int,
    large_dims: str,
    *,
    vectors: tuple[str, str],
) -> list[Sides]:
    """The sides of every leaf of a tree.

    Args:
      name: Of the caller, for messages.
      axes: See `optaxplus.custom_types`.
      tree: Parameters, or what is like them.
      max_dim: Largest side that has a full factor.
      large_dims: Of `LARGE_DIMS`.
      vectors: Kinds of both sides of a vector, where a matrix has "full" ones.

    Raises:
      ValueError: If a side cannot be cut evenly, with its path.
    """
    largest = max_dim if large_dims == "tiles" else None
    resolved = jax.tree.leaves(
        axes_of(name, axes, tree), is_leaf=lambda node: isinstance(node, MatrixAxes)
    )
    results = []
    for (path, leaf), leaf_axes in zip(
        trees.leaves_with_paths(tree), resolved, strict=True
    ):
        own = resolve_axes(leaf_axes, leaf.shape)
        is_cut = own.fan_in or "full" in vectors
        try:
            tilings = _tilings(own, leaf.shape, largest if is_cut else None)
        except ValueError as error:
            raise ValueError(
                f"{name}: parameter {path!r} of shape {leaf.shape} is not allowed with "
                f"max_dim={max_dim}: {error}. Pass large_dims='diagonal' or another "
                "max_dim, or give it to another optimizer."
            ) from error
        kinds = []
        for tiling in tilings:
            fan_in, fan_out = (
                "full" if size <= max_dim else "diagonal" for size in tiling.size
            )
            if not own.fan_in:
                fan_in = fan_in if vectors[0] == "full" else vectors[0]
                fan_out = fan_out if vectors[1] == "full" else vectors[1]
            kinds.append((fan_in, fan_out))
        results.append(Sides(own, leaf.shape, tilings, tuple(kinds)))
    return results


def _tilings(
    axes: MatrixAxes, shape: tuple[int, ...], largest: int | None
) -> tuple[Tiling, ...]:
    if len(set(axes.splits)) <= 1:
        return (tile(axes, shape, largest),)
    *batch, rows, _ = jax.eval_shape(
        partial(to_matrices, axes=axes), jax.ShapeDtypeStruct(shape, jnp.float32)
    ).shape
    each = MatrixAxes((-2,), (-1,))
    return tuple(tile(each, (*batch, rows, width), largest) for width in axes.splits)


def init_side(
    params: PyTree,
    sides: Sequence[Sides],
    side: int,
    kinds: Sequence[str],
    dtype: DTypeName = "float32",
) -> PyTree:
    """Zeros for the factors of one side, on the devices of their parameter.

    "float32" stands for the width of the arithmetic. A leaf whose side has none of
    these kinds has `optax.MaskedNode()`.
    """

    def zeros(param: jax.Array, own: Sides) -> Any:
        shape = own.factor_shape(side, kinds)
        if shape is None:
            return optax.MaskedNode()
        wide = trees.compute_dtype(param.dtype)
        stored = wide if jnp.dtype(dtype) == jnp.float32 else jnp.dtype(dtype)
        sharding = sharding_of(param)
        if sharding is None:
            return jnp.zeros(shape, stored)
        sizes = {n: s for n, s in sharding.mesh.shape.items() if s > 1}
        spec = _factor_spec(own, sharding.spec, side, shape, sizes)
        placed = NamedSharding(sharding.mesh, spec)
        if explicit_axes(sharding.mesh):
            return jnp.zeros(shape, stored, out_sharding=placed)
        return jnp.zeros(shape, stored, device=placed)

    leaves, structure = jax.tree.flatten(params)
    return structure.unflatten(
        [zeros(param, own) for param, own in zip(leaves, sides, strict=True)]
    )


def _factor_spec(
    own: Sides,
    spec: PartitionSpec,
    side: int,
    shape: tuple[int, ...],
    mesh: dict[str, int],
) -> PartitionSpec:
    place = lies(_whole(own), spec, mesh)
    if len(own.tilings) == 1:
        return place.factor(side, shape[-1], mesh)
    rows = place.rows + place.columns
    if shape[-2] % math.prod(mesh[name] for name in rows):
        rows = ()
    return PartitionSpec(*(names or None for names in (*place.batch, rows)), None)


def _whole(own: Sides) -> Tiling:
    """The tiling, or the matrices with all splits for one that is cut by hand."""
    if len(own.tilings) == 1:
        return own.tilings[0]
    return tile(MatrixAxes(own.axes.fan_in, own.axes.fan_out), own.shape, None)


class Fields(NamedTuple):
    """What the fields of the leaves of some work are, after the update.

    Attributes:
      moments: How many are like the parameters.
      sides: Of what are the others: 0 for fan_in, 1 for fan_out.
      kinds: The kinds of sides that have them.
      slow: Names of those that change only when it is due.
    """

    moments: int
    sides: tuple[int, ...]
    kinds: tuple[str, ...]
    slow: frozenset[str]


def on_matrices(
    name: str,
    work: Callable[..., Sequence[Any]],
    leaf_type: Any,
    fields: Fields,
    arrays: Sequence[PyTree],
    sides: Sequence[Sides],
    placement: Any,
    *,
    is_due: jax.Array,
    **arguments: Any,
) -> list[PyTree]:
    """Does the work of one step on tiles, wherever they are.

    Args:
      name: Of the caller, for messages.
      work: See `optaxplus.sharding.owners.on_owners`; its leaves are `leaf_type`.
      leaf_type: A NamedTuple: the update, moments, what belongs to a side.
      fields: What these are.
      arrays: A tree for each field, or None; the first is that of the gradients, in
        the dtype of the arithmetic.
      sides: Of every leaf.
      placement: See `optaxplus.custom_types`.
      is_due: Boolean scalar: whether slow fields change.
      **arguments: Scalars for `work`, and whatever else is no array.

    Returns:
      The trees that the fields of the results make.
    """
    structure = jax.tree.structure(arrays[0])
    columns = [
        [None] * len(sides) if tree is None else structure.flatten_up_to(tree)
        for tree in arrays
    ]
    leaves = [
        leaf_type(*(None if isinstance(x, optax.MaskedNode) else x for x in row))
        for row in zip(*columns, strict=True)
    ]
    found = where(name, placement, arrays[0])
    if found is not None and found.comm_dtype is not None:
        raise ValueError(
            f"{name}: placement.comm_dtype={found.comm_dtype!r} is not allowed; what "
            "belongs to a matrix is moved as it is stored. Leave it None."
        )
    if not leaves:
        results = leaves
    elif found is None:
        results = _on_one_device(
            work, leaves, fields, sides, is_due=is_due, **arguments
        )
    else:
        results = _on_mesh(
            work, leaves, fields, sides, found, is_due=is_due, **arguments
        )
    back = list(zip(*results, strict=True)) or [()] * len(arrays)
    return [
        None
        if tree is None
        else structure.unflatten(
            [optax.MaskedNode() if x is None else x for x in column]
        )
        for tree, column in zip(arrays, back, strict=True)
    ]


def _on_one_device(
    work: Callable[..., Sequence[Any]],
    leaves: Sequence[Any],
    fields: Fields,
    sides: Sequence[Sides],
    **arguments: Any,
) -> list[Any]:
    arrays, form = jax.tree.flatten(leaves)

    def function(*arrays: jax.Array, **arguments: Any) -> tuple[jax.Array, ...]:
        leaves = jax.tree.unflatten(form, arrays)
        tiles = [_tiles(x, own, fields) for x, own in zip(leaves, sides, strict=True)]
        results = iter(work(list(chain(*tiles)), copies=(), **arguments))
        back = [
            _untiled(list(islice(results, len(own.tilings))), x, own, fields)
            for x, own in zip(leaves, sides, strict=True)
        ]
        return tuple(jax.tree.leaves(back))

    return jax.tree.unflatten(form, left_to_compiler(function, *arrays, **arguments))


def _on_mesh(
    work: Callable[..., Sequence[Any]],
    leaves: Sequence[Any],
    fields: Fields,
    sides: Sequence[Sides],
    found: Where,
    **arguments: Any,
) -> list[Any]:
    specs = found.specs or guessed_specs(
        [own.shape for own in sides], [own.axes for own in sides], found.sizes
    )
    tiles, of_tiles, places = [], [], []
    for leaf, own, spec in zip(leaves, sides, specs, strict=True):
        whole = lies(_whole(own), spec, found.sizes)
        place = [
            whole
            if len(own.tilings) == 1
            else lies(tiling, whole.rows_alone, found.sizes)
            for tiling in own.tilings
        ]
        bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), leaf)
        like = jax.eval_shape(partial(_tiles, own=own, fields=fields), bare)
        lying = [
            _specs(x, p, fields, found.sizes) for x, p in zip(like, place, strict=True)
        ]
        shardings = jax.tree.map(
            lambda spec: NamedSharding(found.mesh, spec), lying, is_leaf=_is_spec
        )
        arrays, form = jax.tree.flatten(leaf)

        def cut(*arrays: jax.Array, form: Any = form, own: Sides = own) -> list[Any]:
            return _tiles(jax.tree.unflatten(form, arrays), own, fields)

        tiles += left_to_compiler(cut, *arrays, shardings=shardings)
        of_tiles += lying
        places += place
    results = iter(
        on_owners(
            work,
            tiles,
            of_tiles,
            places,
            found.mesh,
            axes=found.axes,
            slow=fields.slow,
            **arguments,
        )
    )
    return [
        _put_back(list(islice(results, len(own.tilings))), leaf, own, fields, found)
        for leaf, own in zip(leaves, sides, strict=True)
    ]


def _is_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)


def _specs(leaf: Any, place: Lies, fields: Fields, mesh: dict[str, int]) -> Any:
    """How the tiles of a leaf lie where its factors are stored."""
    count = 1 + fields.moments
    moments = [None if x is None else place.matrices for x in leaf[:count]]
    factors = [
        None if x is None else place.factor(side, x.shape[-1], mesh)
        for x, side in zip(leaf[count:], fields.sides, strict=True)
    ]
    return type(leaf)(*moments, *factors)


def _put_back(
    parts: list[Any], like: Any, own: Sides, fields: Fields, found: Where
) -> Any:
    """What `_tiles` cut, in the shapes of `like`, and lying as it does."""
    arrays, form = jax.tree.flatten(parts)

    def joined(*arrays: jax.Array) -> Any:
        return _untiled(jax.tree.unflatten(form, arrays), like, own, fields)

    if explicit_axes(found.mesh):
        shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, like)
        return left_to_compiler(joined, *arrays, shardings=shardings)
    # Nothing tells how an update is to lie but the first moment, if there is one.
    lying = like._replace(**{like._fields[0]: like[1 if fields.moments else 0]})
    return jax.tree.map(
        lambda x, y: lying_as(lax.optimization_barrier(x), y), joined(*arrays), lying
    )


def _tiles(leaf: Any, own: Sides, fields: Fields) -> list[Any]:
    """The leaf as tiles, one leaf for each tiling."""
    count = 1 + fields.moments
    if len(own.tilings) == 1:
        (tiling,) = own.tilings
        moments = [None if x is None else tiling.to_tiles(x) for x in leaf[:count]]
        return [type(leaf)(*moments, *leaf[count:])]
    matrices = [None if x is None else to_matrices(x, own.axes) for x in leaf[:count]]
    starts = accumulate((t.batch[-1] for t in own.tilings), initial=0)
    columns = accumulate((t.shape[-1] for t in own.tilings), initial=0)
    parts = []
    for tiling, kinds, start, column in zip(
        own.tilings, own.kinds, starts, columns, strict=False
    ):
        moments = [
            None
            if x is None
            else tiling.to_tiles(x[..., column : column + tiling.shape[-1]])
            for x in matrices
        ]
        factors = []
        for x, side in zip(leaf[count:], fields.sides, strict=True):
            size = tiling.size[side]
            width = size if kinds[side] == "full" else 1
            tiles = slice(start, start + tiling.batch[-1])
            if x is not None:
                x = x[..., tiles, :size, :width]
            factors.append(x if kinds[side] in fields.kinds else None)
        parts.append(type(leaf)(*moments, *factors))
    return parts


def _untiled(parts: list[Any], like: Any, own: Sides, fields: Fields) -> Any:
    """The inverse of `_tiles`; `like` has the shapes."""
    count = 1 + fields.moments
    if len(parts) == 1:
        (tiling,), (part,) = own.tilings, parts
        moments = [None if x is None else tiling.from_tiles(x) for x in part[:count]]
        return type(part)(*moments, *part[count:])
    moments = []
    for xs in zip(*(part[:count] for part in parts), strict=True):
        if xs[0] is None:
            moments.append(None)
            continue
        matrices = [t.from_tiles(x) for t, x in zip(own.tilings, xs, strict=True)]
        joined = jnp.concatenate(matrices, axis=-1)
        moments.append(from_matrices(joined, own.axes, own.shape))
    factors = []
    for xs, y in zip(
        zip(*(part[count:] for part in parts), strict=True), like[count:], strict=True
    ):
        if y is None:
            factors.append(None)
            continue
        rows = [
            jnp.zeros((*y.shape[:-3], t.batch[-1], *y.shape[-2:]), y.dtype)
            if x is None
            else _filled(x, y.shape)
            for t, x in zip(own.tilings, xs, strict=True)
        ]
        factors.append(jnp.concatenate(rows, axis=-3))
    return type(like)(*moments, *factors)


def _filled(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Zeros below and to the right, up to the last two axes of `shape`."""
    missing = [(0, wide - n) for n, wide in zip(x.shape[-2:], shape[-2:], strict=True)]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + missing)
