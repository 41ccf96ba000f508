"""Where parameters lie: read from their types, or told by a `Placement`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from optaxplus import trees, validation
from optaxplus.custom_types import DTypeName, PyTree
from optaxplus.numerics.explicit_axes import axes_of_type, explicit_axes

__all__ = [
    "Placement",
    "Where",
    "check_placement",
    "check_specs",
    "device_memory",
    "placement_like",
    "sharding_of",
    "specs_of",
    "where",
]


@dataclass(frozen=True, eq=False)
class Placement:
    """How parameters are sharded, for programs in which their types do not tell.

    Under a mesh whose axes are `jax.sharding.AxisType.Explicit` the types of arrays
    say how they are sharded, and `placement="auto"` reads it there. Under `Auto` axes,
    those of `jax.sharding.Mesh(...)`, nothing inside `jax.jit` knows; this says so:

        tx = ox.muon(1e-3, placement=ox.Placement.like(params))

    Attributes:
      mesh: The mesh that the parameters lie on.
      specs: How they lie on it: a pytree of `jax.sharding.PartitionSpec`s under the
        paths of the parameters; one that stands for a whole subtree, or for all, will
        do.
      comm_dtype: Dtype in which matrices are moved; None is that of the matrix
        products. A narrower one is less to move, and rounds them.

    Raises:
      TypeError: If `mesh` is no mesh or an entry of `specs` no `PartitionSpec`, or
        leaves an axis unconstrained, or `comm_dtype` is no floating-point dtype.
      ValueError: If a spec names an axis that the mesh does not have, or one twice, or
        `comm_dtype` is "float16", whose range is that of no gradient.
    """

    mesh: Mesh | AbstractMesh
    specs: PyTree
    comm_dtype: DTypeName | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.mesh, Mesh | AbstractMesh):
            raise TypeError(
                f"Placement: mesh={self.mesh!r} is not allowed; it must be a "
                "jax.sharding.Mesh."
            )
        if self.specs is None:
            raise TypeError(
                "Placement: specs=None is not allowed; it must be a pytree of "
                "jax.sharding.PartitionSpec. PartitionSpec() is on every device."
            )
        if self.comm_dtype is not None:
            validation.check_floating_dtype("Placement", comm_dtype=self.comm_dtype)
            if jax.numpy.dtype(self.comm_dtype) == jax.numpy.float16:
                raise ValueError(
                    "Placement: comm_dtype='float16' is not allowed; gradients are "
                    "outside of its range. Move them in 'bfloat16' or 'float32'."
                )
        for path, spec in trees.leaves_with_paths(self.specs):
            name = f"specs[{path!r}]" if path else "specs"
            if not isinstance(spec, PartitionSpec):
                raise TypeError(
                    f"Placement: {name}={spec!r} is not allowed; it must be a "
                    "jax.sharding.PartitionSpec. For arrays use Placement.like(params)."
                )
            if any(entry is PartitionSpec.UNCONSTRAINED for entry in spec):
                raise TypeError(
                    f"Placement: {name}={spec} is not allowed; UNCONSTRAINED "
                    "does not say how a parameter lies."
                )
            if len(set(_names(spec))) < len(_names(spec)):
                raise ValueError(
                    f"Placement: {name}={spec} is not allowed; it names an "
                    "axis of the mesh twice."
                )
            for axis in _names(spec):
                if axis not in self.mesh.shape:
                    raise ValueError(
                        f"Placement: {name}={spec} is not allowed; the mesh "
                        f"has no axis {axis!r}. Its axes are "
                        f"{', '.join(map(repr, self.mesh.shape))}."
                    )

    @classmethod
    def like(cls, params: PyTree, comm_dtype: DTypeName | None = None) -> "Placement":
        """The placement of these parameters.

        Args:
          params: Arrays, or `jax.ShapeDtypeStruct`s with a sharding. What has no
            `NamedSharding` counts as repeated on every device.
          comm_dtype: As in the class.

        Raises:
          ValueError: If no parameter has a `NamedSharding`, or two lie on different
            meshes.
        """
        return placement_like("Placement.like", params, comm_dtype)


def placement_like(
    function: str, params: PyTree, comm_dtype: DTypeName | None = None
) -> Placement:
    """`Placement.like` on behalf of `function`."""
    mesh, specs = None, []
    for path, leaf in trees.leaves_with_paths(params):
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            specs.append(PartitionSpec())
            continue
        if mesh is not None and sharding.mesh != mesh:
            raise ValueError(
                f"{function}: parameter {path!r} lies on {sharding.mesh}, others on "
                f"{mesh}; all must lie on one mesh."
            )
        mesh = sharding.mesh
        specs.append(sharding.spec)
    if mesh is None:
        raise ValueError(
            f"{function}: no parameter has a NamedSharding, so nothing says how they "
            "lie. Give it what jax.device_put or a compiled init sharded, not what is "
            "traced, or an optaxplus.Placement(mesh, specs)."
        )
    return Placement(mesh, trees.unflatten_like(params, specs), comm_dtype)


@dataclass(frozen=True)
class Where:
    """How the leaves of a tree lie on the devices.

    Attributes:
      mesh: Their mesh.
      axes: The mesh axes along which they may lie.
      specs: The spec of every leaf; None if nothing tells.
      comm_dtype: Dtype in which matrices are moved, if it was said.
    """

    mesh: Mesh | AbstractMesh
    axes: tuple[str, ...]
    specs: tuple[PartitionSpec, ...] | None
    comm_dtype: DTypeName | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of these axes, of those with more than one device."""
        return {axis: n for axis in self.axes if (n := self.mesh.shape[axis]) > 1}


def check_placement(function: str, placement: Any) -> None:
    """Refuses what is neither "auto", None nor a `Placement`."""
    if placement not in ("auto", None) and not isinstance(placement, Placement):
        raise TypeError(
            f"{function}: placement={placement!r} is not allowed; it must be 'auto', "
            "None or an optaxplus.Placement."
        )


def where(function: str, placement: Any, tree: PyTree) -> Where | None:
    """Says where the leaves of `tree` lie; None on one device, or if nobody asks.

    Args:
      function: Name of the caller, for messages.
      placement: "auto", None or a `Placement`.
      tree: Parameters or updates, traced or not.

    Raises:
      ValueError: If a `Placement` does not fit the tree or the types of its leaves.
    """
    if placement is None:
        return None
    leaves = [leaf for _, leaf in trees.leaves_with_paths(tree)]
    types = [jax.typeof(leaf).sharding for leaf in leaves]
    if isinstance(placement, Placement):
        if any(axes_of_type(s.mesh, AxisType.Manual) for s in types):
            raise ValueError(
                f"{function}: a Placement is not allowed inside jax.shard_map or "
                "jax.pmap, where arrays are what one device has; pass placement='auto' "
                "or None."
            )
        specs = specs_of(function, placement, tree)
        _check_meshes(function, placement.mesh, types, tree)
        _check_types(function, specs, types, tree)
        mesh, around = placement.mesh, jax.sharding.get_abstract_mesh()
        if isinstance(mesh, AbstractMesh) and not around.empty:
            # The same, but this one knows for which kind of devices it is set.
            mesh = around
        axes = mesh.axis_names
        found = Where(mesh, axes, tuple(specs), placement.comm_dtype)
        return found if found.sizes or explicit_axes(found.mesh) else None
    mesh = next((s.mesh for s in types if not s.mesh.empty), None)
    if mesh is None:
        return None
    # Inside a shard_map its axes are Manual: arrays are what the device has.
    manual = axes_of_type(mesh, AxisType.Manual)
    axes = tuple(name for name in mesh.axis_names if name not in manual)
    if explicit_axes(mesh):
        # A type that was lost on the way, as optax.MultiSteps loses it, is no mesh.
        # Along axes that are Auto everything is repeated, as the types do not say.
        specs = [PartitionSpec() if s.mesh.empty else s.spec for s in types]
        return Where(mesh, axes, tuple(specs))
    found = Where(mesh, axes, None)
    return found if found.sizes else None


def sharding_of(x: Any) -> NamedSharding | None:
    """How an array lies on a mesh, as far as it tells.

    Its type says so along Explicit axes; what is not traced knows about Auto ones too.
    """
    sharding = jax.typeof(x).sharding
    if not explicit_axes(sharding.mesh):
        sharding = None if isinstance(x, Tracer) else getattr(x, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def check_specs(
    function: str, placement: Any, tree: PyTree, *, is_whole: bool = False
) -> None:
    """Refuses a `Placement` whose specs do not fit a tree of parameters.

    Args:
      function: Name of the caller, for messages.
      placement: "auto", None or a `Placement`.
      tree: Parameters.
      is_whole: Whether they are all parameters, so that a spec without one is wrong.

    Raises:
      ValueError: If a leaf has no spec, or one that does not fit its shape; if a spec
        has no leaf.
    """
    if not isinstance(placement, Placement):
        return
    specs_of(function, placement, tree)
    paths = [path for path, _ in trees.leaves_with_paths(tree)]
    for given, _ in trees.leaves_with_paths(placement.specs) if is_whole else ():
        if not any(
            f"{path}/".startswith(f"{given}/" if given else "") for path in paths
        ):
            raise ValueError(
                f"{function}: placement.specs[{given!r}] belongs to no parameter; the "
                f"parameters are {_some(paths)}."
            )


def specs_of(function: str, placement: Placement, tree: PyTree) -> list[PartitionSpec]:
    """The spec of every leaf of `tree`, checked against its shape."""
    given = dict(trees.leaves_with_paths(placement.specs))
    specs = []
    for path, leaf in trees.leaves_with_paths(tree):
        spec = _longest_prefix(given, path)
        if spec is None:
            raise ValueError(
                f"{function}: parameter {path!r} of shape {leaf.shape} has no spec in "
                f"placement.specs, which has {_some(list(given))}. The specs must have "
                "the structure of the parameters; None is no spec, and "
                "PartitionSpec() that of a parameter that every device has whole."
            )
        _check_fit(function, path, leaf.shape, spec, placement.mesh.shape)
        specs.append(spec)
    return specs


def device_memory(mesh: Mesh | AbstractMesh) -> float:
    """Bytes of memory of a device of the mesh, in whole GB; infinity if it is unknown.

    The devices of a mesh are of one kind, so those of this process speak for all, and
    what differs between processes by less is rounded off: all must plan alike.
    """
    # The mesh of a type is abstract; its devices are of the kind that runs the program.
    here = jax.local_devices()
    if isinstance(mesh, Mesh):
        # Those of a compiler's topology are none.
        here = [device for device in mesh.devices.flat if device in here]
    stats = here[0].memory_stats() if here else None
    limit = (stats or {}).get("bytes_limit")
    return math.inf if limit is None else limit // 10**9 * 1e9


def _longest_prefix(given: Mapping[str, Any], path: str) -> PartitionSpec | None:
    parts = path.split("/")
    for length in range(len(parts), -1, -1):
        if (prefix := "/".join(parts[:length])) in given:
            return given[prefix]
    return None


def _some(paths: list[str]) -> str:
    shown = ", ".join(map(repr, paths[:3]))
    return f"{shown}, …" if len(paths) > 3 else shown or "none"


def _check_fit(
    function: str,
    path: str,
    shape: tuple[int, ...],
    spec: PartitionSpec,
    mesh: Mapping[str, int],
) -> None:
    if len(spec) > len(shape):
        raise ValueError(
            f"{function}: placement.specs[{path!r}]={spec} does not fit a parameter of "
            f"shape {shape}, which has {len(shape)} axes."
        )
    for size, entry in zip(shape, spec, strict=False):
        devices = math.prod(mesh[axis] for axis in _names(PartitionSpec(entry)))
        if size % devices:
            raise ValueError(
                f"{function}: placement.specs[{path!r}]={spec} does not fit a "
                f"parameter of shape {shape}: {size} does not divide by the {devices} "
                f"devices along {entry!r}."
            )


def _check_meshes(
    function: str, mesh: Mesh | AbstractMesh, types: list[NamedSharding], tree: PyTree
) -> None:
    """Refuses a mesh other than the one that is set or that arrays lie on."""
    around = jax.sharding.get_abstract_mesh()
    others = {"jax.set_mesh": around} | {
        f"parameter {path!r}": sharding.mesh
        for (path, _), sharding in zip(
            trees.leaves_with_paths(tree), types, strict=True
        )
    }
    for name, other in others.items():
        if not other.empty and _axes(other) != _axes(mesh):
            raise ValueError(
                f"{function}: placement.mesh={mesh} is not allowed; that of {name} is "
                f"{other}. Make the placement with the mesh that parameters lie on."
            )


def _axes(mesh: Mesh | AbstractMesh) -> list[Any]:
    """What a mesh is apart from its devices, which an abstract one need not know."""
    return [*zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)]


def _check_types(
    function: str,
    specs: list[PartitionSpec],
    types: list[NamedSharding],
    tree: PyTree,
) -> None:
    """Refuses specs that contradict the types of an Explicit mesh."""
    for (path, leaf), spec, sharding in zip(
        trees.leaves_with_paths(tree), specs, types, strict=True
    ):
        # Of a mesh with axes of both types, the types say nothing of the Auto ones.
        told = explicit_axes(sharding.mesh)
        if told and _along(told, spec, leaf.ndim) != _along(
            told, sharding.spec, leaf.ndim
        ):
            raise ValueError(
                f"{function}: placement.specs[{path!r}]={spec} is not allowed; the "
                f"parameter lies as {sharding.spec} says. Under an explicit mesh leave "
                "placement='auto', which reads the types."
            )


def _along(
    axes: tuple[str, ...], spec: PartitionSpec, rank: int
) -> tuple[tuple[str, ...], ...]:
    """Which of these mesh axes shard each axis of an array."""
    entries = (*spec, *[None] * (rank - len(spec)))
    names = (_names(PartitionSpec(entry)) for entry in entries)
    return tuple(tuple(name for name in some if name in axes) for some in names)


def _names(spec: PartitionSpec) -> tuple[str, ...]:
    """The mesh axes that a spec names, in order."""
    return tuple(
        name
        for entry in spec
        for name in ((entry,) if isinstance(entry, str) else tuple(entry or ()))
    )
