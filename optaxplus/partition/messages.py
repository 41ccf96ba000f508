"""What is said of parameters that no rule decides."""

import math
import re
from collections.abc import Mapping, Sequence

from optaxplus.partition.stacks import Shape

__all__ = ["undecided_message"]

_MOST_PATHS = 10
_MOST_KINDS = 3


def undecided_message(
    function: str,
    undecided: Mapping[str, Shape],
    shapes: Mapping[str, Shape],
    remedy: str,
    *,
    given: str,
    is_masked: bool,
) -> str:
    """Names the parameters, and for each kind of them the rules that could decide it.

    Args:
      function: Name of the caller.
      undecided: Shapes of the undecided parameters by path.
      shapes: Shapes of all parameters by path.
      remedy: The argument that takes the missing rules, in place of "{rules}".
      given: What the rules are called that did not decide.
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
    stack = _common_stack(undecided, shapes)
    if stack is not None:
        module, size = stack
        where = f" under {module + '/'!r}" if module else ""
        call = f"(*ox.stacked({_stack_pattern(module)!r}), *{given})"
        lines += [
            f"If the first axis of all {len(_below(module, shapes))} parameters"
            f"{where}, of size {size}, counts layers, say so and pass",
            f"  {remedy.format(rules=call)}",
            "Otherwise put rules in front that say what the axes are.",
        ]
    else:
        lines.append("Put rules in front that say what the axes are.")
    lines += [
        "fan_in are the axes that the forward product sums over, fan_out those of its "
        "outputs; axes in neither count copies, each a matrix or vector of its own.",
        "The role 'hidden' goes to Muon, 'embedding', 'head', 'vector' and 'other' to "
        "AdamW, 'frozen' stays as it is.",
    ]
    kinds = _kinds(undecided)
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
    if is_masked:
        lines.append(
            "Part of the tree is masked away, so nothing beside a parameter counts as "
            "evidence: pass `axes` explicitly, or use ox.route."
        )
    return "\n".join(lines)


def _kinds(undecided: Mapping[str, Shape]) -> list[tuple[str, Shape]]:
    """Patterns and shapes; parameters that differ only in numbers are one kind."""
    kinds: dict[tuple[str, Shape], list[str]] = {}
    for path, shape in undecided.items():
        kinds.setdefault((re.sub(r"\d+", "#", path), shape), []).append(path)
    return [(_pattern(paths), shape) for (_, shape), paths in kinds.items()]


def _pattern(paths: Sequence[str]) -> str:
    """One regular expression for paths that differ only in numbers."""
    parts = [paths[0]] if len(paths) == 1 else re.split(r"\d+", paths[0])
    return "^" + r"\d+".join(map(re.escape, parts)) + "$"


def _suggestions(pattern: str, shape: Shape) -> list[tuple[str, str, str]]:
    """(axes, role, what they mean) for a shape that names and neighbours left open."""
    rank = len(shape)
    last = rank - 1
    if rank <= 1:
        return [(f"ox.MatrixAxes((), {tuple(range(rank))})", "vector", "one vector")]
    if rank == 2:
        rows, columns = shape
        return [
            ("ox.MatrixAxes((), (1,))", "vector", f"{rows} vectors of {columns}"),
            ("ox.MatrixAxes((), (0, 1))", "vector", "one vector"),
            ("ox.MatrixAxes((0,), (1,))", "hidden", f"a matrix {rows} -> {columns}"),
        ]
    one_last = math.prod(shape[:-1])
    suggestions = [
        (
            f"ox.MatrixAxes(({last - 1},), ({last},))",
            "hidden",
            f"{one_last // max(shape[-2], 1)} matrices {shape[-2]} -> {shape[-1]}: "
            "layers or experts",
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
        suggestions += [table, whole]
    return suggestions


def _common_stack(
    undecided: Mapping[str, Shape], shapes: Mapping[str, Shape]
) -> tuple[str, int] | None:
    """The outermost module of several parameters that all begin with the same axis.

    The whole tree only if no module in it is one.
    """
    module = next(iter(undecided)).rpartition("/")[0]
    best = None
    while True:
        below = _below(module, shapes)
        sizes = {shape[:1] for shape in below.values()}
        if len(sizes) > 1 or () in sizes:
            break
        if len(below) > 1 and (module or best is None):
            best = module, next(iter(sizes))[0]
        if not module:
            break
        module = module.rpartition("/")[0]
    return best


def _below(module: str, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    prefix = f"{module}/" if module else ""
    return {path: shape for path, shape in shapes.items() if path.startswith(prefix)}


def _stack_pattern(module: str) -> str:
    """A pattern for everything under a module, and under others of its name."""
    if not module:
        return ""
    return "^" + r"\d+".join(map(re.escape, re.split(r"\d+", module))) + "/"
