"""Abstract trees from paths, and what the rules say of a tree, as plain data."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from optaxplus import DEFAULT_RULES, Rule
from optaxplus.partition.inference import decide

Shape = tuple[int, ...]
Routing = dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]]


def abstract(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """A nested dict of abstract float32 arrays from "/"-joined paths."""
    tree: dict[str, Any] = {}
    for path, shape in shapes.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jax.ShapeDtypeStruct(shape, "float32")
    return tree


def routing(params: Any, rules: Sequence[Rule] = DEFAULT_RULES) -> Routing:
    """{path: (role, fan_in, fan_out)} of every parameter."""
    decisions = decide("test", params, rules)
    assert not any(d.axes.splits for d in decisions)
    return {d.path: (d.role, d.axes.fan_in, d.axes.fan_out) for d in decisions}
