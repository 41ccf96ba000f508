"""Meshes of the eight simulated devices, and arrays on them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def make_mesh(axis_type: AxisType, **axes: int) -> Mesh:
    """A mesh of all eight devices."""
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (axis_type,) * len(axes))


def place(arrays: Any, mesh: Mesh, specs: Any) -> Any:
    """Arrays on a mesh."""
    return jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), arrays, specs
    )


def normal(shapes: Mapping[str, Sequence[int]], seed: int = 0) -> dict[str, jax.Array]:
    """Independent normal entries in float32."""
    rng = np.random.default_rng(seed)
    return {
        name: jax.numpy.asarray(rng.standard_normal(shape), "float32")
        for name, shape in shapes.items()
    }


def is_placed(x: jax.Array, mesh: Mesh, spec: P) -> bool:
    """Whether an array lies as a spec says."""
    return x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)
