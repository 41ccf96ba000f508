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
    is_masked: bool,
    remedy: str,
) -> str:
    """Names the parameters, and for each kind of them the rules that could decide it.

    Args:
      function: Name of the caller.
      undecided: Shapes of the undecided parameters by path.
      shapes: Shapes of all parameters by path.
      is_masked: Whether part of the tree is masked away.
      remedy: The argument that takes the missing rule.
    """
    lines = [
        f"{function}: no rule decides what these parameters are:",
        *(
            f"  {path!r} of shape {undecided[path]}"
            for path in [*undecided][:_MOST_PATHS]
        ),
    ]
    if len(undecided) > _MOST_PATHS:
        lines.append(f"  and {len(undecided) - _MOST_PATHS} more")
    stack = _common_stack(undecided, shapes)
    if stack is not None:
        module, size = stack
        where = f" under {module + '/'!r}" if module else ""
        lines += [
            f"If the first axis of all {len(_below(module, shapes))} parameters"
            f"{where}, of size {size}, counts layers, say so and pass",
            f"  {remedy.replace('(rule, ', '(*' + _stacked_call(module) + ', ')}",
            "Otherwise put a rule in front that says what the axes are.",
        ]
    else:
        lines.append("Put a rule in front that says what the axes are.")
    lines.append(
        "fan_in are the axes that the forward product sums over, fan_out those of its "
        "outputs; axes in neither count copies, each a matrix or vector of its own. "
        "The role 'hidden' is Muon's, 'embedding', 'head' and 'other' are AdamW's."
    )
    kinds = _kinds(undecided)
    for pattern, shape in kinds[:_MOST_KINDS]:
        lines += [
            f"  rule = ox.Rule({pattern!r}, {axes}, {role!r})  # {meaning}"
            for axes, role, meaning in _suggestions(pattern, shape)
        ]
    if len(kinds) > _MOST_KINDS:
        lines.append(f"  and so on for {len(kinds) - _MOST_KINDS} other kinds")
    lines.append(f"and pass {remedy}.")
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
    if rank == 3:
        table = f"ox.MatrixAxes(({last - 1},), ({last},))"
        suggestions.append((table, "embedding", "a table of positions or tokens"))
    return suggestions


def _common_stack(
    undecided: Mapping[str, Shape], shapes: Mapping[str, Shape]
) -> tuple[str, int] | None:
    """The innermost module of several parameters, all beginning with the same axis."""
    module = next(iter(undecided)).rpartition("/")[0]
    best = None
    while True:
        below = _below(module, shapes)
        sizes = {shape[:1] for shape in below.values()}
        if len(sizes) > 1 or () in sizes:
            break
        if len(below) > 1:
            best = module, next(iter(sizes))[0]
        if not module:
            break
        module = module.rpartition("/")[0]
    return best


def _below(module: str, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    prefix = f"{module}/" if module else ""
    return {path: shape for path, shape in shapes.items() if path.startswith(prefix)}


def _stacked_call(module: str) -> str:
    pattern = f"^{re.escape(module)}/" if module else ""
    return f"ox.stacked({pattern!r})"
