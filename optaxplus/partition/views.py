"""The shapes that rules look at, of the whole tree or of one layer of a stack."""

import re
from collections.abc import Mapping

from optaxplus.partition.stacks import (
    NO_SIBLINGS,
    Shape,
    Siblings,
    layer_axes,
    layer_shape,
    siblings_of,
)

__all__ = ["View"]


class View:
    """The shapes that rules may look at: of the whole tree, or without a stack's axis.

    The default rules know paths with dots in place of slashes, as in a flat dictionary
    of "h.0.attn.c_attn.weight". In a tree of which part is masked away nothing counts
    as evidence.
    """

    def __init__(self, function: str, shapes: Mapping[str, Shape], *, is_masked: bool):
        self.function = function
        self.shapes = shapes
        self.is_masked = is_masked
        is_flat = not any("/" in path for path in shapes)
        self.slashed = {
            path: path.replace(".", "/") if is_flat else path for path in shapes
        }
        by_slashes = {self.slashed[path]: shape for path, shape in shapes.items()}
        proven = {} if is_masked else layer_axes(by_slashes)
        self.layers = {path: proven.get(self.slashed[path], ()) for path in shapes}
        self._siblings = {} if is_masked else siblings_of(shapes)
        self._siblings_in_layer = (
            {}
            if is_masked
            else siblings_of(
                {
                    path: layer_shape(shape, proven[path])
                    for path, shape in by_slashes.items()
                },
                by_slashes,
            )
        )
        self._stacks: dict[tuple[str, int], View] = {}

    def siblings(self, path: str) -> Siblings:
        """What is beside a parameter."""
        return self._siblings.get(path.rpartition("/")[0], NO_SIBLINGS)

    def siblings_in_layer(self, path: str) -> Siblings:
        """What is beside a parameter, given with slashes, in one layer."""
        return self._siblings_in_layer.get(path.rpartition("/")[0], NO_SIBLINGS)

    def without(self, pattern: str, axis: int) -> "View":
        """The view of one layer of the stacks whose paths match `pattern`."""
        if (pattern, axis) not in self._stacks:
            self._check_stack(pattern, axis)
            shapes = {
                path: layer_shape(shape, (axis,)) if re.search(pattern, path) else shape
                for path, shape in self.shapes.items()
            }
            view = View(self.function, shapes, is_masked=self.is_masked)
            self._stacks[pattern, axis] = view
        return self._stacks[pattern, axis]

    def _check_stack(self, pattern: str, axis: int) -> None:
        """Refuses an axis that not all parameters of a stack have in common."""
        call = f"{self.function}: stacked({pattern!r}, axis={axis})"
        firsts: dict[str, str] = {}
        for path, shape in self.shapes.items():
            match = re.search(pattern, path)
            if match is None:
                continue
            if not axis < len(shape):
                raise ValueError(
                    f"{call}: parameter {path!r} of shape {shape} has no axis {axis}."
                )
            first = firsts.setdefault(_stack_of(path, match.end()), path)
            if shape[axis] != self.shapes[first][axis]:
                raise ValueError(
                    f"{call}: the axis has {self.shapes[first][axis]} entries in "
                    f"{first!r} of shape {self.shapes[first]}, but {shape[axis]} in "
                    f"{path!r} of shape {shape}; all parameters of a stack have the "
                    "same number of layers. Correct the axis, or narrow the pattern to "
                    "what is stacked."
                )


def _stack_of(path: str, end: int) -> str:
    """The module that a pattern has found in a path, up to `end`."""
    if end == 0 or path[end - 1] == "/":
        return path[:end]
    return path[:end] + path[end:].partition("/")[0]
