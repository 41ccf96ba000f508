"""Which parameter goes where, and why: the table that lets a user trust the split."""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from optaxplus.custom_types import PyTree
from optaxplus.numerics.matrix_axes import MatrixAxes
from optaxplus.partition import names
from optaxplus.partition.inference import (
    ROLES,
    Decision,
    check_labels,
    decide,
    label_of_role,
)
from optaxplus.partition.rules import DEFAULT_RULES, Rule
from optaxplus.report.tables import format_table

__all__ = ["RoutingRow", "RoutingTable", "explain_routing"]

_LONGEST_RULE = 40


@dataclass(frozen=True)
class RoutingRow:
    """What was decided of one parameter.

    Attributes:
      path: "/"-joined path.
      shape: Shape of the parameter.
      dtype: Name of its dtype.
      role: What it is.
      label: Which group of the optimizer takes it.
      axes: Its matrix axes, non-negative.
      rule: The rule that decided: its name, or its pattern; "in a stack" where the
        shapes prove that an axis counts layers.
      overruled: Rules of your own behind it that say otherwise.
      layers: Axes that the shapes of the whole tree prove to count layers.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    label: str
    axes: MatrixAxes
    rule: str
    overruled: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Number of scalar parameters."""
        return math.prod(self.shape)

    @property
    def matrix(self) -> str:
        """The matrix view, "batch x (fan_in -> fan_out)"; of vectors, their length."""
        rows, columns = _matrix_sizes(self)
        batch = self.size // max(rows * columns, 1)
        block = _join(self.axes.splits) if self.axes.splits else f"{columns}"
        if self.axes.is_matrix:
            block = f"({rows} -> {block})"
        elif not self.axes.splits:
            block = f"{rows * columns}"
        return block if batch == 1 else f"{batch} x {block}"

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data, for JSON."""
        return {
            **vars(self),
            "shape": list(self.shape),
            "axes": {name: list(value) for name, value in vars(self.axes).items()},
            "matrix": self.matrix,
            "overruled": list(self.overruled),
            "layers": list(self.layers),
        }


@dataclass(frozen=True, repr=False)
class RoutingTable:
    """The rows of `explain_routing`; printed, also by a notebook, it is the table.

    Attributes:
      rows: One for every parameter, in the order of the tree's leaves.
    """

    rows: tuple[RoutingRow, ...]

    def parameters_by_label(self) -> dict[str, int]:
        """Number of scalar parameters under each label."""
        totals: dict[str, int] = {}
        for row in self.rows:
            totals[row.label] = totals.get(row.label, 0) + row.size
        return totals

    def to_dict(self) -> dict[str, Any]:
        """Rows, one for every parameter, and totals as plain data, for JSON."""
        return {
            "parameters": [row.to_dict() for row in self.rows],
            "parameters_by_label": self.parameters_by_label(),
        }

    def __str__(self) -> str:
        header = ("parameter", "shape", "dtype", "role", "label", "matrix", "rule")
        lines = [
            format_table(
                header,
                [
                    (
                        row.path,
                        str(row.shape),
                        row.dtype,
                        row.role,
                        row.label,
                        "-" if row.role == "frozen" else row.matrix,
                        _shorten(row.rule),
                    )
                    for row in _folded(self.rows)
                ],
            ),
            ", ".join(
                f"{label}: {count:,} parameters"
                for label, count in sorted(self.parameters_by_label().items())
            ),
        ]
        tree = _Tree(self.rows)
        for row in _folded(self.rows):
            lines += (f"{row.path}: {note}" for note in _notes(row, tree))
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)


def explain_routing(
    params: PyTree,
    rules: Sequence[Rule] = DEFAULT_RULES,
    labels: Mapping[str, str] | None = None,
) -> RoutingTable:
    """Says of every parameter where it goes, as which matrix, and which rule decided.

    Print it once before training: a weight matrix that goes to the wrong optimizer, or
    is orthogonalized along the wrong axes, fails silently. Parameters that differ only
    in the numbers in their paths share a line: "block_{0-11}/mlp/up/kernel". Under the
    table stand the totals, and what to look at: rules of your own that another one
    overruled or that take an axis of layers for one of a matrix, roles that look
    misspelt, fused projections that nothing splits, and hidden matrices whose shapes
    are those of an embedding, an output head or a router.

    Args:
      params: Tree of arrays or `jax.ShapeDtypeStruct`s.
      rules: As in `optaxplus.infer_matrix_axes`.
      labels: As in `optaxplus.label_params`.

    Returns:
      A `RoutingTable`: `str()` is the printed form, `rows` (one for every parameter,
      not folded) and `to_dict()` are the data.

    Raises:
      TypeError: As in `optaxplus.label_params`.
      ValueError: As in `optaxplus.label_params`.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> params = {"dense": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}}
      >>> print(ox.explain_routing(params))
      parameter     shape   dtype    role    label  matrix    rule
      ------------  ------  -------  ------  -----  --------  ----------
      dense/bias    (8,)    float32  vector  adamw  8         bias
      dense/kernel  (4, 8)  float32  hidden  muon   (4 -> 8)  any matrix
      adamw: 8 parameters, muon: 32 parameters
    """
    check_labels("explain_routing", labels, rules)
    decisions = decide("explain_routing", params, rules)
    return RoutingTable(tuple(_row(decision, labels) for decision in decisions))


def _row(decision: Decision, labels: Mapping[str, str] | None) -> RoutingRow:
    rule = decision.rule.describe()
    if decision.layers and decision.rule.per_layer:
        rule += " in a stack"
    return RoutingRow(
        path=decision.path,
        shape=decision.shape,
        dtype=str(decision.dtype),
        role=decision.role,
        label=label_of_role(decision.role, labels),
        axes=decision.axes,
        rule=rule,
        overruled=tuple(rule.describe() for rule in decision.overruled),
        layers=decision.layers,
    )


def _join(splits: Sequence[int]) -> str:
    """Splits as "8 | 8 | 8", or "32 of 64" where that is shorter."""
    if len(splits) > 4 and len(set(splits)) == 1:
        return f"{len(splits)} of {splits[0]}"
    return " | ".join(map(str, splits))


class _Tree:
    """What the shapes of all parameters tell of a hidden matrix among them.

    Attributes:
      tables: Paths of embeddings by their shape the other way round.
    """

    def __init__(self, rows: Sequence[RoutingRow]):
        self.tables = {
            row.shape[::-1]: row.path for row in rows if row.role == "embedding"
        }
        hidden = [row for row in rows if row.role == "hidden"]
        self._has_others = len(hidden) > 1
        self._has_ends = any(row.role in ("embedding", "head") for row in rows)
        self._experts = [
            (row.path, row.shape[axis])
            for row in hidden
            if row.rule.startswith("experts")
            for axis in range(len(row.shape))
            if axis not in (*row.axes.fan_in, *row.axes.fan_out, *row.layers)
        ]
        self._ends = {row.path: _matrix_sizes(row) for row in hidden}
        self._modules: dict[int, set[str]] = {}
        for row in rows:
            for size in {*row.shape, *_matrix_sizes(row)}:
                self._modules.setdefault(size, set()).add(_module(row.path))

    def is_alone(self, row: RoutingRow, size: int) -> bool:
        """Whether nothing else in the tree has this size."""
        return self._has_others and self._modules.get(size) == {_module(row.path)}

    def opposite(self, row: RoutingRow, end: int) -> str | None:
        """The one other matrix with the size of this end of the row, 0 in and 1 out.

        None where an embedding or a head is known, and side by side in one module,
        where an up- and a down-projection are such a pair.
        """
        size = _matrix_sizes(row)[end]
        pair = self._modules.get(size, set())
        others = [
            path for path in self._ends if _module(path) in pair - {_module(row.path)}
        ]
        if self._has_ends or len(pair) != 2 or len(others) != 1:
            return None
        (other,) = others
        is_beside = _parent(other) == _parent(row.path) != ""
        return None if is_beside or self._ends[other][1 - end] != size else other

    def experts(self, row: RoutingRow, count: int) -> str | None:
        """As many experts in the same block."""
        block = _parent(row.path)
        for path, number in self._experts:
            if number == count and _without_numbers(path).startswith(f"{block}/"):
                return path
        return None


def _notes(row: RoutingRow, tree: _Tree) -> Iterator[str]:
    """What a reader should look at."""
    axes = row.axes
    for rule in row.overruled:
        yield f"your rule {rule} also matches, but comes later than {row.rule}."
    if taken := {*axes.fan_in, *axes.fan_out} & {*row.layers}:
        yield (
            f"axis {min(taken)} counts {row.shape[min(taken)]} layers, but the rule "
            f"{row.rule} takes it for one of a matrix; negative axes leave it alone."
        )
    if row.role not in ROLES and (meant := get_close_matches(row.role, ROLES, 1)):
        yield f"the role {row.role!r} is a word of your own; is {meant[0]!r} meant?"
    if row.role != "hidden":
        return
    if re.search(names.FUSED, row.path) and len(axes.fan_out) == 1 and not axes.splits:
        yield (
            "one matrix, though its name says that several are stored side by side; "
            "give it a rule with `splits`."
        )
    elif row.shape in tree.tables:
        yield (
            f"has an output for every entry of {tree.tables[row.shape]}; if it is the "
            "output head, give it a rule with the role 'head'."
        )
    elif len(row.shape) == 2 and axes.is_matrix and not axes.splits:
        yield from _end_notes(row, tree)


def _end_notes(row: RoutingRow, tree: _Tree) -> Iterator[str]:
    """Signs that a matrix is not hidden, but where the model begins or ends."""
    fan_in, fan_out = _matrix_sizes(row)
    if experts := tree.experts(row, fan_out):
        yield (
            f"has an output for each of the {fan_out} experts of {experts}; if it is "
            "their router, give it a rule with the role 'other'."
        )
        return
    if tree.is_alone(row, fan_in):
        yield (
            f"nothing else has the size of its input, {fan_in}; if it is an embedding "
            "or the first layer, give it a rule with the role 'embedding'."
        )
    if tree.is_alone(row, fan_out):
        yield (
            f"nothing else has the size of its output, {fan_out}; if it is the output "
            "head, give it a rule with the role 'head'."
        )
    for end, size in enumerate((fan_in, fan_out)):
        if other := tree.opposite(row, end):
            yield (
                f"only {other} has its size {size}, too; if they are an embedding and "
                "the output head, give them rules with the roles 'embedding' and "
                "'head'."
            )


def _matrix_sizes(row: RoutingRow) -> tuple[int, int]:
    """fan_in and fan_out of the whole matrix."""
    rows = math.prod(row.shape[axis] for axis in row.axes.fan_in)
    return rows, math.prod(row.shape[axis] for axis in row.axes.fan_out)


def _module(path: str) -> str:
    """The layer that a parameter is the weight or bias of, or the parameter itself."""
    return re.sub(r"/(kernel|weight|w|bias|b)$", "", path)


def _parent(path: str) -> str:
    """The block that a layer is in, whatever the numbers in its path."""
    return _without_numbers(_module(path)).rpartition("/")[0]


def _without_numbers(path: str) -> str:
    return re.sub(r"\{[^}]*\}|\d+", "#", path)


def _shorten(rule: str) -> str:
    return rule if len(rule) <= _LONGEST_RULE else rule[: _LONGEST_RULE - 1] + "…"


# Folding

_NUMBER = re.compile(r"\d+")


def _folded(rows: Iterable[RoutingRow]) -> list[RoutingRow]:
    """One row for all that differ only in the numbers in their paths."""
    alike: dict[RoutingRow, list[str]] = {}
    for row in rows:
        alike.setdefault(replace(row, path=_NUMBER.sub("#", row.path)), []).append(
            row.path
        )
    return [
        replace(row, path=path) for row, paths in alike.items() for path in _fold(paths)
    ]


def _fold(paths: Sequence[str]) -> list[str]:
    """Paths with ranges for their numbers, where they are all of the combinations."""
    if len(paths) == 1:
        return list(paths)
    columns = [
        sorted(set(map(int, column)))
        for column in zip(*map(_NUMBER.findall, paths), strict=True)
    ]
    numbers = {tuple(map(int, _NUMBER.findall(path))) for path in paths}
    # Fewer numbers than paths: "1" and "01".
    if len(numbers) < len(paths) or numbers != set(itertools.product(*columns)):
        return list(paths)
    ranges = iter(map(_range, columns))
    return [_NUMBER.sub(lambda _: next(ranges), paths[0])]


def _range(numbers: Sequence[int]) -> str:
    """Sorted numbers as "3", "{0-11}" or "{0,2,5}"."""
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers[-1] - numbers[0] + 1 == len(numbers):
        return f"{{{numbers[0]}-{numbers[-1]}}}"
    return f"{{{','.join(map(str, numbers))}}}"
