"""What is said of parameters that no rule decides."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from optaxplus.partition import names
from optaxplus.partition.stacks import Shape

__all__ = ["Stack", "stack_candidates", "undecided_message"]

_MOST_PATHS = 10
_MOST_KINDS = 3


class Stack(NamedTuple):
    """Parameters that may be a stack of layers: all have an axis in common.

    Attributes:
      module: Path of the module that they are in; "" for the whole tree.
      axis: The axis, 0 or 1.
      size: Its size.
      count: How many parameters there are.
    """

    module: str
    axis: int
    size: int
    count: int

    @property
    def pattern(self) -> str:
        """A pattern for everything in the module, and in others of its name."""
        parts = re.split(r"\d+", self.module)
        return "^" + r"\d+".join(map(re.escape, parts)) + "/" if self.module else ""

    def fits(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether in each of the modules of its name the axis is common to all."""
        sizes: dict[str, set[Shape]] = {}
        for path, shape in shapes.items():
            if match := re.match(self.pattern, path):
                axis = shape[self.axis : self.axis + 1]
                sizes.setdefault(match[0], set()).add(axis)
        return all(len(found) == 1 and () not in found for found in sizes.values())

    @property
    def call(self) -> str:
        """The rules that say so."""
        axis = f", axis={self.axis}" if self.axis else ""
        return f"*ox.stacked({self.pattern!r}{axis})"


def stack_candidates(
    undecided: Mapping[str, Shape], shapes: Mapping[str, Shape]
) -> list[Stack]:
    """What the undecided parameters may be stacks of, the first axis first.

    For each of them that no other's stack contains, and for each axis, the outermost
    module of several parameters that have it in common; the whole tree only if no
    module in it is one.
    """
    found: list[Stack] = []
    for path in undecided:
        if not any(re.search(stack.pattern, path) for stack in found):
            found += _stacks_around(path, shapes)
    return found


def _stacks_around(path: str, shapes: Mapping[str, Shape]) -> list[Stack]:
    """What one parameter may be stacked in, the first axis first."""
    found = []
    for axis in (0, 1):
        module = path.rpartition("/")[0]
        best = None
        while True:
            prefix = f"{module}/" if module else ""
            below = [s for path, s in shapes.items() if path.startswith(prefix)]
            sizes = {shape[axis : axis + 1] for shape in below}
            if len(sizes) > 1 or () in sizes:
                break
            if len(below) > 1 and (module or best is None):
                best = Stack(module, axis, sizes.pop()[0], len(below))
            if not module:
                break
            module = module.rpartition("/")[0]
        if best is not None:
            found.append(best)
    return found


def undecided_message(
    function: str,
    undecided: Mapping[str, Shape],
    shapes: Mapping[str, Shape],
    remedy: str,
    *,
    given: str,
    stacks: Sequence[Stack],
    has_defaults: bool,
    is_masked: bool,
) -> str:
    """Names the parameters, and for each kind of them the rules that could decide it.

    Args:
      function: Name of the caller.
      undecided: Shapes of the undecided parameters by path.
      shapes: Shapes of all parameters by path.
      remedy: The argument that takes the missing rules, in place of "{rules}".
      given: What the rules are called that did not decide.
      stacks: Stacks that would decide them, if they are that.
      has_defaults: Whether default rules are among those that did not decide.
      is_masked: Whether part of the tree is masked away.
    """
    lines = [
        f"{function}: no rule decides what these parameters are:",
        *(
            f"  {path!r} of shape {shape}"
            for path, shape in [*undecided.items()][:_MOST_PATHS]
        ),
    ]
    if len(undecided) > _MOST_PATHS:
        lines.append(f"  and {len(undecided) - _MOST_PATHS} more")
    if is_masked:
        lines += [
            "Part of the tree is masked away (optax.partition, optax.masked), so "
            "nothing beside a parameter counts as evidence. Decide on the whole tree: "
            "pass axes=ox.infer_matrix_axes(params) where `axes` is an argument; give "
            "what is masked the role 'frozen' where `rules` is one; or build the "
            "groups inside ox.route.",
        ]
        return "\n".join(lines)
    if not has_defaults:
        lines.append(
            "No default rule is among `rules`: is *ox.DEFAULT_RULES missing at its end?"
        )
    for stack in stacks:
        where = f" under {stack.module + '/'!r}" if stack.module else ""
        call = f"({stack.call}, *{given})"
        lines += [
            f"If the {('first', 'second')[stack.axis]} axis of all {stack.count} "
            f"parameters{where}, of size {stack.size}, counts layers, pass",
            f"  {remedy.format(rules=call)}",
        ]
    first = {stack.module: stack.call for stack in reversed(stacks)}
    if len(first) > 1:
        call = f"({', '.join(reversed(first.values()))}, *{given})"
        lines += ["and if all of these are stacks", f"  {remedy.format(rules=call)}"]
    lines += [
        f"{'Otherwise put' if stacks else 'Put'} rules in front that say what the axes "
        "are. fan_in are those that the forward product sums over, fan_out those of "
        "its outputs; axes in neither count copies, each a matrix or vector of its "
        "own. The role 'hidden' goes to Muon, 'embedding', 'head', 'vector' and "
        "'other' to AdamW, 'frozen' stays as it is.",
    ]
    kinds = _kinds(undecided, shapes)
    rules = [f"rule_{index}" for index in range(1, len(kinds[:_MOST_KINDS]) + 1)]
    for name, (pattern, shape) in zip(rules, kinds, strict=False):
        for index, (axes, role, meaning) in enumerate(_suggestions(pattern, shape)):
            beginning = f"  {name} = " if index == 0 else "  # or: "
            lines.append(
                f"{beginning}ox.Rule({pattern!r}, {axes}, {role!r})  # {meaning}"
            )
    if len(kinds) > _MOST_KINDS:
        lines.append(f"  and so on for {len(kinds) - _MOST_KINDS} other kinds")
    call = f"({', '.join(rules)}, *{given})"
    lines.append(f"and pass {remedy.format(rules=call)}.")
    if given == "rules":
        lines[-1] = lines[-1][:-1] + ", where `rules` are those that you pass now."
    return "\n".join(lines)


def _kinds(
    undecided: Mapping[str, Shape], shapes: Mapping[str, Shape]
) -> list[tuple[str, Shape]]:
    """Patterns and shapes; parameters that differ only in numbers are one kind."""
    kinds: dict[tuple[str, Shape], list[str]] = {}
    for path, shape in undecided.items():
        kinds.setdefault((re.sub(r"\d+", "#", path), shape), []).append(path)
    return [(_pattern(paths, shapes), shape) for (_, shape), paths in kinds.items()]


def _pattern(paths: Sequence[str], shapes: Mapping[str, Shape]) -> str:
    """One regular expression for paths that differ only in numbers, and no others."""
    numbers = zip(*(re.findall(r"\d+", path) for path in paths), strict=True)
    texts = map(re.escape, re.split(r"\d+", paths[0]))
    pattern = next(texts)
    for column, text in zip(numbers, texts, strict=True):
        pattern += (column[0] if len({*column}) == 1 else r"\d+") + text
    matched = sum(bool(re.fullmatch(pattern, path)) for path in shapes)
    if matched > len(paths):
        pattern = f"({'|'.join(map(re.escape, paths))})"
    return f"^{pattern}$"


def _suggestions(pattern: str, shape: Shape) -> list[tuple[str, str, str]]:
    """(axes, role, what they mean) for a shape that names and neighbours left open."""
    rank = len(shape)
    last = rank - 1
    if rank <= 1:
        return [(f"ox.MatrixAxes((), {tuple(range(rank))})", "vector", "one vector")]
    if rank == 2:
        rows, columns = shape
        vectors = [
            ("ox.MatrixAxes((), (1,))", "vector", f"{rows} vectors of {columns}"),
            ("ox.MatrixAxes((), (0, 1))", "vector", "one vector"),
        ]
        axes = "ox.MatrixAxes((0,), (1,))"
        matrix = (axes, "hidden", f"a matrix {rows} -> {columns}")
        if re.search(names.BIAS, pattern.strip("^$")):
            return [*vectors, matrix]
        table = (axes, "embedding", f"a table of {rows} entries")
        head = (axes, "head", f"the output head, onto {columns}")
        if re.search(names.KERNEL, pattern.strip("^$")):
            return [matrix, head, *vectors]
        return (
            [table, matrix, head, *vectors]
            if "emb" in pattern
            else [matrix, table, head, *vectors]
        )
    one_last = math.prod(shape[:-1])
    suggestions = [
        (
            f"ox.MatrixAxes(({last - 1},), ({last},))",
            "hidden",
            f"{_matrices(one_last // max(shape[-2], 1))} {shape[-2]} -> {shape[-1]}",
        ),
        (
            f"ox.MatrixAxes({tuple(range(last))}, ({last},))",
            "hidden",
            f"one matrix {one_last} -> {shape[-1]}: a convolution, or heads merged",
        ),
        (
            f"ox.MatrixAxes((0,), {tuple(range(1, rank))})",
            "hidden",
            f"one matrix {shape[0]} -> {math.prod(shape[1:])}: onto heads",
        ),
    ]
    if re.search("weight", pattern):
        suggestions[0] = (
            f"ox.MatrixAxes({tuple(range(1, rank))}, (0,))",
            "hidden",
            f"one matrix {math.prod(shape[1:])} -> {shape[0]}: Equinox's convolution",
        )
    elif rank >= 4 and len({*shape[:-2]}) == 1:
        suggestions[:2] = suggestions[1::-1]  # it looks like a window
    table = (f"ox.MatrixAxes(({last - 1},), ({last},))", "embedding", "a table")
    whole = (f"ox.MatrixAxes((), {tuple(range(rank))})", "vector", "one vector")
    if sum(size > 1 for size in shape) <= 1:
        return [whole, *suggestions[:1]]
    if rank == 3 and not re.search(r"kernel|weight", pattern):
        # (1, n, features) is what tables of positions broadcast as.
        suggestions.insert(0 if shape[0] == 1 else len(suggestions), table)
        suggestions.append(whole)
    if shape[-2] == 1:
        axes, _, _ = suggestions[0 if rank >= 4 and len({*shape[:-2]}) == 1 else 1]
        suggestions.insert(0, (axes, "other", "a depthwise convolution"))
    return suggestions


def _matrices(count: int) -> str:
    return "one matrix" if count == 1 else f"{count} matrices, layers or experts,"
