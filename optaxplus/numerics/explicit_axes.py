"""Operations whose results lie as their arguments do, whatever happens between.

Under a mesh with Explicit axes every operation has to say how its result is sharded,
and some, such as merging two axes of which the second is sharded, cannot.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

__all__ = ["axes_of_type", "explicit_axes", "left_to_compiler"]


def axes_of_type(mesh: Mesh | AbstractMesh, kind: AxisType) -> tuple[str, ...]:
    """The mesh axes of one type."""
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, axis_type in types if axis_type == kind)


def explicit_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The axes of the mesh along which the types of arrays say how they lie."""
    return axes_of_type(mesh, AxisType.Explicit)


def left_to_compiler(
    function: Callable[..., Any],
    *arrays: jax.Array,
    shardings: Any = None,
    **arguments: Any,
) -> Any:
    """Calls `function`, within which the compiler decides how arrays are sharded.

    Args:
      function: Maps `arrays` and `arguments` to arrays.
      *arrays: On an Explicit mesh or not; without one `function` is just called.
      shardings: A pytree of `NamedSharding`s for the results; None: a tuple of those
        of `arrays`.
      **arguments: Hyper-parameters, traced or not, and whatever else is no array; or
        lists of nothing but arrays that are the same on every device.
    """
    types = [jax.typeof(x).sharding for x in arrays]
    mesh = next((s.mesh for s in types if explicit_axes(s.mesh)), None)
    if mesh is None:
        return function(*arrays, **arguments)
    # An array that comes from no mesh, as from NumPy, is on every device.
    given = tuple(
        NamedSharding(mesh, PartitionSpec(*(None,) * x.ndim)) if s.mesh.empty else s
        for x, s in zip(arrays, types, strict=True)
    )
    results = given if shardings is None else shardings
    # What is traced has to come in as an argument, where its type is changed.
    traced = {k: v for k, v in arguments.items() if _holds_arrays(v)}

    def inside(traced: dict[str, Any], *arrays: jax.Array) -> Any:
        return function(*arrays, **(arguments | traced))

    # Axes that are Manual, within a jax.shard_map over some, stay so.
    compiled = jax.sharding.auto_axes(
        inside, axes=explicit_axes(mesh), out_sharding=results
    )
    return compiled(traced, *arrays)


def _holds_arrays(argument: Any) -> bool:
    leaves = jax.tree.leaves(argument)
    return bool(leaves) and all(isinstance(leaf, jax.Array) for leaf in leaves)
