"""Which parameter goes where, and why: the table that lets a user trust the split."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optaxplus.custom_types import PyTree
from optaxplus.numerics.matrix_axes import MatrixAxes
from optaxplus.partition.inference import Decision, decide, label_of_role
from optaxplus.partition.rules import DEFAULT_RULES, Rule
from optaxplus.report.tables import format_table

__all__ = ["RoutingRow", "RoutingTable", "explain_routing"]

_LONGEST_PATTERN = 32


@dataclass(frozen=True)
class RoutingRow:
    """What was decided of one parameter.

    Attributes:
      path: "/"-joined path.
      shape: Shape of the parameter.
      dtype: Name of its dtype.
      role: What it is.
      label: Which group of the optimizer takes it.
      matrix: Its matrix view, "batch x (fan_in -> fan_out)".
      rule: Pattern of the rule that decided.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    label: str
    matrix: str
    rule: str


@dataclass(frozen=True)
class RoutingTable:
    """The rows of `explain_routing`; `str()` is the table.

    Attributes:
      rows: One for every parameter, in the order of the tree's leaves.
    """

    rows: tuple[RoutingRow, ...]

    def parameters_by_label(self) -> dict[str, int]:
        """Number of scalar parameters under each label."""
        totals: dict[str, int] = {}
        for row in self.rows:
            totals[row.label] = totals.get(row.label, 0) + math.prod(row.shape)
        return totals

    def to_dict(self) -> dict[str, Any]:
        """Rows and totals as plain data."""
        return {
            "parameters": [vars(row) | {"shape": list(row.shape)} for row in self.rows],
            "parameters_by_label": self.parameters_by_label(),
        }

    def __str__(self) -> str:
        header = ("parameter", "shape", "dtype", "role", "label", "matrix", "rule")
        rows = [
            (
                row.path,
                str(row.shape),
                row.dtype,
                row.role,
                row.label,
                row.matrix,
                _shorten(row.rule),
            )
            for row in self.rows
        ]
        totals = ", ".join(
            f"{label}: {count:,} parameters"
            for label, count in sorted(self.parameters_by_label().items())
        )
        return f"{format_table(header, rows)}\n{totals}"


def explain_routing(
    params: PyTree,
    rules: Sequence[Rule] = DEFAULT_RULES,
    labels: Mapping[str, str] | None = None,
) -> RoutingTable:
    """Says of every parameter where it goes, as which matrix, and which rule decided.

    Print it once before training: a weight matrix that goes to the wrong optimizer, or
    is orthogonalized along the wrong axes, fails silently.

    Args:
      params: Tree of arrays or `jax.ShapeDtypeStruct`s.
      rules: As in `optaxplus.infer_matrix_axes`.
      labels: As in `optaxplus.label_params`.

    Returns:
      A `RoutingTable`: `str()` prints one line per parameter with totals, `rows` and
      `to_dict()` are the data.

    Raises:
      ValueError: As in `optaxplus.infer_matrix_axes`.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> params = {"dense": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}}
      >>> print(ox.explain_routing(params))
      parameter     shape   dtype    role    label  matrix    rule
      ------------  ------  -------  ------  -----  --------  -------------------
      dense/bias    (8,)    float32  vector  adamw  8         (^|/)(bias|b|beta)$
      dense/kernel  (4, 8)  float32  hidden  muon   (4 -> 8)  (any)
      adamw: 8 parameters, muon: 32 parameters
    """
    decisions = decide("explain_routing", params, rules)
    return RoutingTable(tuple(_row(decision, labels) for decision in decisions))


def _row(decision: Decision, labels: Mapping[str, str] | None) -> RoutingRow:
    return RoutingRow(
        path=decision.path,
        shape=decision.shape,
        dtype=str(decision.dtype),
        role=decision.role,
        label=label_of_role(decision.role, labels),
        matrix=_matrix_view(decision.shape, decision.axes),
        rule=decision.rule.pattern,
    )


def _matrix_view(shape: tuple[int, ...], axes: MatrixAxes) -> str:
    """As in "3 x (64 -> 128)": how many, and from which fan-in to which fan-out."""
    rows = math.prod(shape[axis] for axis in axes.fan_in)
    columns = math.prod(shape[axis] for axis in axes.fan_out)
    batch = math.prod(shape) // max(rows * columns, 1)
    if not axes.is_matrix:
        block = f"{rows * columns}"
    elif axes.splits:
        block = f"({rows} -> {' | '.join(map(str, axes.splits))})"
    else:
        block = f"({rows} -> {columns})"
    return block if batch == 1 else f"{batch} x {block}"


def _shorten(pattern: str) -> str:
    if not pattern:
        return "(any)"
    if len(pattern) <= _LONGEST_PATTERN:
        return pattern
    return pattern[: _LONGEST_PATTERN - 1] + "…"
