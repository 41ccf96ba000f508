"""How abstract parameters would lie on a mesh that is only described by numbers."""

from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from optaxplus import trees, validation
from optaxplus.custom_types import PyTree
from optaxplus.partition.inference import Decision, decide
from optaxplus.partition.rules import DEFAULT_RULES, Rule

__all__ = ["MESH_AXES", "lay_out", "mesh_sizes"]

MESH_AXES = ("data", "fsdp", "tensor")
"""Names of the axes of such a mesh."""


def mesh_sizes(text: str) -> dict[str, int]:
    """Reads a mesh such as "fsdp=8,tensor=4".

    Args:
      text: Axes and their sizes.

    Returns:
      The size of each axis.

    Raises:
      ValueError: If that is no mesh.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if (
            name not in MESH_AXES
            or name in sizes
            or not (size.isascii() and size.isdigit() and int(size))
        ):
            raise ValueError(
                f"mesh={text!r} is not allowed; it must be like 'fsdp=8,tensor=4', "
                f"with axes of {', '.join(MESH_AXES)}, each at most once, and sizes "
                ">= 1."
            )
        sizes[name] = int(size)
    return sizes


def lay_out(
    params: PyTree, sizes: Mapping[str, int], rules: Sequence[Rule] = DEFAULT_RULES
) -> PyTree:
    """Gives parameters the shardings that they would have on a mesh.

    A matrix is cut along "fsdp" where it sums over its input and along "tensor" where
    its output is: each takes the first of these axes of the array that divides by the
    size of the mesh axis, or else the first of the other kind, and where none divides
    the matrix stays whole along this mesh axis. Tables and heads are matrices as
    others, vectors are whole on every device, and along "data" everything is repeated.
    Axes that count layers or experts are not cut.

    Args:
      params: Arrays or `jax.ShapeDtypeStruct`s.
      sizes: Size of each axis of the mesh, of `MESH_AXES`.
      rules: What each parameter is.

    Returns:
      `jax.ShapeDtypeStruct`s with a sharding on a `jax.sharding.AbstractMesh`.

    Raises:
      TypeError: If a size is no integer.
      ValueError: If a size is below 1, an axis has another name, or no rule decides a
        parameter.

    Example:
      >>> import jax
      >>> params = {"mlp": {"kernel": jax.ShapeDtypeStruct((8192, 28672), "bfloat16")}}
      >>> lay_out(params, {"fsdp": 8, "tensor": 4})["mlp"]["kernel"].sharding.spec
      P('fsdp', 'tensor')
    """
    for axis, size in sizes.items():
        if axis not in MESH_AXES:
            raise ValueError(
                f"lay_out: sizes={dict(sizes)!r} is not allowed; axes must be of "
                f"{', '.join(MESH_AXES)}."
            )
        validation.check_int("lay_out", minimum=1, **{axis: size})
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    leaves = [
        jax.ShapeDtypeStruct(
            decision.shape,
            decision.dtype,
            sharding=NamedSharding(mesh, _spec(decision, sizes)),
        )
        for decision in decide("lay_out", params, rules)
    ]
    return trees.unflatten_like(params, leaves)


def _spec(decision: Decision, sizes: Mapping[str, int]) -> PartitionSpec:
    axes = decision.axes
    cut: dict[int, str] = {}
    if decision.role == "vector":
        return PartitionSpec()
    for name, candidates in (
        ("fsdp", (*axes.fan_in, *axes.fan_out)),
        ("tensor", (*axes.fan_out, *axes.fan_in)),
    ):
        for axis in candidates if name in sizes else ():
            if axis not in cut and decision.shape[axis] % sizes[name] == 0:
                cut[axis] = name
                break
    return PartitionSpec(*map(cut.get, range(max(cut, default=-1) + 1)))
