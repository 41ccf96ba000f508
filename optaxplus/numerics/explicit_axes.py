"""Operations whose results lie as their arguments do, whatever happens between.

Under a mesh with Explicit axes every operation has to say how its result is sharded,
and some, such as merging two axes of which the second is sharded, cannot.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

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
      **arguments: Hyper-parameters, traced or not, and whatever else is no array.
    """
    given = tuple(jax.typeof(x).sharding for x in arrays)
    if not any(explicit_axes(sharding.mesh) for sharding in given):
        return function(*arrays, **arguments)
    results = given if shardings is None else shardings
    # What is traced has to come in as an argument, where its type is changed.
    traced = {k: v for k, v in arguments.items() if isinstance(v, jax.Array)}

    def inside(traced: dict[str, jax.Array], *arrays: jax.Array) -> Any:
        return function(*arrays, **(arguments | traced))

    return jax.sharding.auto_axes(inside, out_sharding=results)(traced, *arrays)
