"""How a GPT and its data lie on a mesh of devices.

The parameters are those of `gpt.py`. A layout says for each of them which axis is cut
into pieces along which axis of the mesh, and puts batches on the devices; it serves
meshes with axes of either type, whichever process the devices belong to.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# How kernels lie, by the name of their layer: the width along `fsdp`, heads and hidden
# units along `tensor`. Everything else is small, and whole on every device.
SPECS = {
    "token_embedding": P("tensor", "fsdp"),
    "position_embedding": P(None, "fsdp"),
    "query": P("fsdp", "tensor", None),
    "key": P("fsdp", "tensor", None),
    "value": P("fsdp", "tensor", None),
    "out": P("tensor", None, "fsdp"),
    "up": P("fsdp", "tensor"),
    "down": P("tensor", "fsdp"),
    "lm_head": P("fsdp", "tensor"),
}
AXES = ("data", "fsdp", "tensor")
COLLECTIVES = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"


class MeshError(ValueError):
    """A mesh does not fit the devices or the batch."""


@dataclass(frozen=True)
class Layout:
    """How parameters and data lie on a mesh."""

    mesh: Mesh

    def __str__(self) -> str:
        """The mesh as `--mesh` takes it."""
        return ",".join(f"{name}={size}" for name, size in self.mesh.shape.items())

    @property
    def is_explicit(self) -> bool:
        """Whether the types of arrays say how they are sharded."""
        return AxisType.Explicit in self.mesh.axis_types

    @property
    def whole(self) -> NamedSharding:
        """The sharding of what every device has all of."""
        return NamedSharding(self.mesh, P())

    def params(self, params: Any) -> Any:
        """The sharding of each parameter."""

        def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
            is_cut = leaf.ndim > 1 and path[-2].key in SPECS
            spec = SPECS[path[-2].key] if is_cut else P()
            sizes = zip(spec, leaf.shape, strict=False)
            return NamedSharding(self.mesh, P(*(self._fit(*each) for each in sizes)))

        return jax.tree_util.tree_map_with_path(sharding, params)

    def _fit(self, axis: str | None, size: int) -> str | None:
        """The mesh axis, if the mesh has it and the size divides by it."""
        fits = axis in self.mesh.shape and size % self.mesh.shape[axis] == 0
        return axis if fits else None

    def gather(self, params: Any) -> Any:
        """Makes the pieces along `fsdp` whole, within a compiled function.

        This is what FSDP means: weights are gathered for use, and the batch stays cut.
        Left to itself, the compiler may move activations instead.
        """
        # Within `jax.sharding.auto_axes` explicit axes are of this type, too.
        mesh = Mesh(self.mesh.devices, self.mesh.axis_names)

        def gathered(sharding: NamedSharding) -> NamedSharding:
            kept = (None if axis == "fsdp" else axis for axis in sharding.spec)
            return NamedSharding(mesh, P(*kept))

        shardings = jax.tree.map(gathered, self.params(params))
        return jax.lax.with_sharding_constraint(params, shardings)

    def place(self, windows: np.ndarray) -> jax.Array:
        """Puts a batch, which every process has, on the devices: each its windows."""
        axes = tuple(name for name in self.mesh.axis_names if name != "tensor")
        devices = math.prod(self.mesh.shape[name] for name in axes)
        if len(windows) % devices:
            raise MeshError(
                f"--mesh {self}: a batch of {len(windows)} cannot be shared out to the "
                f"{devices} devices along data and fsdp; choose --batch accordingly."
            )
        sharding = NamedSharding(self.mesh, P(axes))
        return jax.make_array_from_callback(
            windows.shape, sharding, lambda index: windows[index]
        )

    def on_auto_axes(self, function: Callable[..., Any], results: Any) -> Any:
        """Leaves it to the compiler how arrays within a function are sharded.

        The layers of Flax do not say it, as the operations on explicit axes want.
        """
        if not self.is_explicit:
            return function
        return jax.sharding.auto_axes(function, out_sharding=results)


def make_layout(sizes: dict[str, int], *, explicit: bool) -> Layout:
    """Makes a mesh of all devices."""
    if math.prod(sizes.values()) != jax.device_count():
        text = ",".join(f"{name}={size}" for name, size in sizes.items())
        raise MeshError(
            f"--mesh {text} has {math.prod(sizes.values())} devices, but there are "
            f"{jax.device_count()}; the sizes must multiply to that."
        )
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return Layout(jax.make_mesh((*sizes.values(),), (*sizes,), (kind,) * len(sizes)))


def other_sizes(sizes: dict[str, int], batch: int) -> dict[str, int] | None:
    """Another mesh of as many devices; None if there is none."""
    devices = math.prod(sizes.values())
    candidates = ({"fsdp": devices // 2, "tensor": 2}, {"fsdp": devices})
    for other in candidates if devices > 1 else ():
        fits = math.prod(other.values()) == devices and batch % other["fsdp"] == 0
        if fits and other != sizes:
            return other
    return None


def mesh_sizes(text: str) -> dict[str, int]:
    """Reads the axes of a mesh from the command line."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in AXES or name in sizes or not size.isdecimal() or int(size) == 0:
            raise argparse.ArgumentTypeError(
                f"must be like fsdp=4,tensor=2, with axes of {', '.join(AXES)}, each "
                f"at most once; got {text!r}"
            )
        sizes[name] = int(size)
    return sizes


def bytes_on_devices(tree: Any) -> dict[str, int]:
    """The bytes of all arrays in a tree, and those on the fullest device of here."""
    on_device: Counter[Any] = Counter()
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            on_device[shard.device] += shard.data.nbytes
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    return {"total": total, "per_device": max(on_device.values())}


def collectives(compiled: Any) -> dict[str, int]:
    """How often each kind of communication occurs in a compiled step."""
    found = re.findall(rf" ({COLLECTIVES})(?:-start)?\(", compiled.as_text())
    return dict(Counter(found))
