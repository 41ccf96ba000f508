"""What parameters, gradients and optimizer state will take, before they are made."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import jax
import optax

from optaxplus import validation
from optaxplus.custom_types import DTypeName, PyTree
from optaxplus.report.tables import format_bytes, format_table

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
    """

    num_params: int
    params: int
    grads: int
    state: int
    total: int
    bytes_per_param: float
    by_label: dict[str, int]
    by_dtype: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """The attributes as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        groups = {
            f"  state of {label}": count
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
        rows = [
            (name, format_bytes(count), f"{count / max(self.num_params, 1):.3f}")
            for name, count in entries.items()
        ]
        header = (f"{self.num_params:,} parameters", "bytes", "per parameter")
        return format_table(header, rows, right=(1, 2))


def memory_report(
    tx: optax.GradientTransformation,
    params: PyTree,
    *,
    grads_dtype: DTypeName | None = None,
) -> MemoryReport:
    """Counts the bytes of parameters, gradients and optimizer state.

    Exact, and nothing is allocated: the state's shapes come from
    `jax.eval_shape(tx.init, params)`.

    Args:
      tx: Any gradient transformation.
      params: Arrays or `jax.ShapeDtypeStruct`s.
      grads_dtype: Dtype of the gradients; None is that of the parameters. Every
        parameter is counted, also a frozen one, whose gradient a compiled step may
        leave out.

    Returns:
      A `MemoryReport`; `str()` prints it, `to_dict()` is the data.

    Raises:
      TypeError: If `grads_dtype` is no floating-point dtype.

    Example:
      >>> import jax, optax, optaxplus as ox
      >>> params = {"w": jax.ShapeDtypeStruct((8192, 8192), "bfloat16")}
      >>> report = ox.memory_report(ox.adamw(1e-3), params, grads_dtype="float32")
      >>> round(report.bytes_per_param)
      14
    """
    if grads_dtype is not None:
        validation.check_floating_dtype("memory_report", grads_dtype=grads_dtype)
    abstract = jax.eval_shape(lambda tree: tree, params)
    state = jax.eval_shape(tx.init, abstract)
    grads = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, grads_dtype or p.dtype), abstract
    )
    sizes = [_tree_bytes(tree) for tree in (abstract, grads, state)]
    num_params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract))
    by_dtype: dict[str, int] = {}
    for leaf in jax.tree.leaves((abstract, grads, state)):
        name = str(leaf.dtype)
        by_dtype[name] = by_dtype.get(name, 0) + _leaf_bytes(leaf)
    return MemoryReport(
        num_params=num_params,
        params=sizes[0],
        grads=sizes[1],
        state=sizes[2],
        total=sum(sizes),
        bytes_per_param=sum(sizes) / num_params if num_params else 0.0,
        by_label=_by_label(state),
        by_dtype=by_dtype,
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
