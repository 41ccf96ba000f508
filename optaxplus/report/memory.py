"""What parameters, gradients and optimizer state will take, before they are made."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from optaxplus import trees, validation
from optaxplus.custom_types import DTypeName, PyTree
from optaxplus.report.models import MODELS, abstract_params
from optaxplus.report.tables import format_bytes, format_table
from optaxplus.sharding.placement import Placement
from optaxplus.sharding.state_specs import state_sharding

__all__ = ["MemoryReport", "memory_report"]


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of a training run, activations aside; `str()` is the table.

    Attributes:
      num_params: Number of scalar parameters.
      params: Bytes of the parameters.
      grads: Bytes of the gradients.
      state: Bytes of the optimizer state.
      total: Sum of the three.
      bytes_per_param: total / num_params (0 for an empty tree).
      by_label: Bytes of state under each label of a partitioned optimizer, and under
        "shared" what lies outside the partition; of any other, under "all".
      by_dtype: Bytes of all three under each dtype.
      per_device: Bytes of "params", "grads", "state" and their "total" on each device,
        of which all have equally many, as JAX cuts arrays evenly; None where no
        parameter has a `NamedSharding`, or not all of these are on one mesh.
    """

    num_params: int
    params: int
    grads: int
    state: int
    total: int
    bytes_per_param: float
    by_label: dict[str, int]
    by_dtype: dict[str, int]
    per_device: dict[str, int] | None

    def to_dict(self) -> dict[str, Any]:
        """The attributes as plain data."""
        return asdict(self)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table; all columns but the first are numbers."""
        groups = {
            "  shared state" if label == "shared" else f"  state of {label}": count
            for label, count in self.by_label.items()
            if count and len(self.by_label) > 1
        }
        entries = {
            "parameters": self.params,
            "gradients": self.grads,
            "optimizer state": self.state,
            **groups,
            "total": self.total,
        }
        header = [f"{self.num_params:,} parameters", "bytes", "per parameter"]
        rows = [
            [name, format_bytes(count), f"{_ratio(count, self.num_params):.3f}"]
            for name, count in entries.items()
        ]
        if self.per_device is not None:
            header.append("per device")
            *texts, total = map(format_bytes, self.per_device.values())
            texts += [*["-"] * len(groups), total]
            for row, text in zip(rows, texts, strict=True):
                row.append(text)
        return header, rows

    def __str__(self) -> str:
        header, rows = self.table()
        return format_table(header, rows, right=(1, 2, 3))


def memory_report(
    tx: optax.GradientTransformation,
    params: PyTree,
    *,
    grads_dtype: DTypeName | None = None,
    frozen: PyTree = None,
) -> MemoryReport:
    """Counts the bytes of parameters, gradients and optimizer state.

    Exact, and nothing is allocated: the state's shapes come from
    `jax.eval_shape(tx.init, params)`, and where parameters have shardings, those of the
    state from `optaxplus.state_sharding`. `python -m optaxplus memory` prints it.

    Args:
      tx: Any gradient transformation.
      params: Arrays or `jax.ShapeDtypeStruct`s, or the name of a published model in
        float32, such as "llama-70b"; `optaxplus.abstract_params` lists them, and makes
        them in other dtypes.
      grads_dtype: Dtype of the gradients; None is that of the parameters. Every
        parameter is counted, also one that `tx` leaves alone, whose gradient a compiled
        step may leave out.
      frozen: More parameters, given as `params` are, which have no gradients and which
        `tx` never sees, as the base of a LoRA that is differentiated for its factors
        alone; None for none.

    Returns:
      A `MemoryReport`; `str()` prints it, `to_dict()` is the data.

    Raises:
      TypeError: If `tx` is no gradient transformation, or `grads_dtype` no
        floating-point dtype.
      ValueError: If there is no model of this name.

    Example:
      >>> import jax, optax, optaxplus as ox
      >>> params = {"w": jax.ShapeDtypeStruct((8192, 8192), "bfloat16")}
      >>> report = ox.memory_report(ox.adamw(1e-3), params, grads_dtype="float32")
      >>> round(report.bytes_per_param)
      14
      >>> ox.memory_report(ox.muon(1e-3), "llama-70b").total // 10**9
      829
    """
    name = "memory_report"
    validation.check_transformation(name, "tx", tx)
    given = {"params": params, "frozen": frozen}
    for argument, tree in given.items():
        if isinstance(tree, str):
            validation.check_choice(name, argument, tree, MODELS)
            given[argument] = abstract_params(tree)
    params, frozen = given.values()
    if grads_dtype is not None:
        validation.check_floating_dtype(name, grads_dtype=grads_dtype)
    trained, rest = jax.eval_shape(lambda *both: both, params, frozen)
    grads = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, grads_dtype or p.dtype), trained
    )
    state = jax.eval_shape(tx.init, trained)
    sizes = [_tree_bytes(tree) for tree in ((trained, rest), grads, state)]
    num_params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves((trained, rest)))
    by_dtype: dict[str, int] = {}
    for leaf in jax.tree.leaves((trained, rest, grads, state)):
        dtype = str(leaf.dtype)
        by_dtype[dtype] = by_dtype.get(dtype, 0) + _leaf_bytes(leaf)
    return MemoryReport(
        num_params=num_params,
        params=sizes[0],
        grads=sizes[1],
        state=sizes[2],
        total=sum(sizes),
        bytes_per_param=_ratio(sum(sizes), num_params),
        by_label=_by_label(state),
        by_dtype=by_dtype,
        per_device=_per_device(tx, params, frozen, grads, state),
    )


def _ratio(count: int, num_params: int) -> float:
    return count / num_params if num_params else 0.0


def _per_device(
    tx: optax.GradientTransformation,
    params: PyTree,
    frozen: PyTree,
    grads: PyTree,
    state: PyTree,
) -> dict[str, int] | None:
    """Bytes on each device, as far as the shardings of the parameters tell."""

    def given(tree: PyTree) -> list[NamedSharding | None]:
        found = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree)]
        return [s if isinstance(s, NamedSharding) else None for s in found]

    meshes = {s.mesh for s in given((params, frozen)) if s is not None}
    if len(meshes) != 1:
        return None
    (mesh,) = meshes

    def shardings(tree: PyTree) -> list[NamedSharding]:
        """Without one an array is whole on every device."""
        whole = NamedSharding(mesh, PartitionSpec())
        return [whole if sharding is None else sharding for sharding in given(tree)]

    specs = [sharding.spec for sharding in shardings(params)]
    placement = Placement(mesh, trees.unflatten_like(params, specs))
    of_state = jax.tree.leaves(state_sharding(tx, params, placement))
    counts = {
        "params": _shard_bytes((params, frozen), shardings((params, frozen))),
        "grads": _shard_bytes(grads, shardings(params)),
        "state": _shard_bytes(state, of_state),
    }
    return {**counts, "total": sum(counts.values())}


def _shard_bytes(tree: PyTree, shardings: list[NamedSharding]) -> int:
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(jax.tree.leaves(tree), shardings, strict=True)
    )


def _leaf_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _tree_bytes(tree: PyTree) -> int:
    return sum(map(_leaf_bytes, jax.tree.leaves(tree)))


def _partitions(state: Any) -> Iterator[optax.transforms.PartitionState]:
    def is_partition(node: Any) -> bool:
        return isinstance(node, optax.transforms.PartitionState)

    return filter(is_partition, jax.tree.leaves(state, is_leaf=is_partition))


def _by_label(state: Any) -> dict[str, int]:
    by_label: dict[str, int] = {}
    for partition in _partitions(state):
        for label, inner in partition.inner_states.items():
            size = _tree_bytes(inner)
            by_label[str(label)] = by_label.get(str(label), 0) + size
    outside = _tree_bytes(state) - sum(by_label.values())
    if outside or not by_label:
        by_label["shared" if by_label else "all"] = outside
    return by_label
