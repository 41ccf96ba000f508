"""Parameters of which some moments are in codes, and those codes."""

from typing import Any

import optaxplus as ox
from optaxplus import trees
from tests.problems import normal_tree

SHAPES = {
    "embed": {"embedding": (600, 16)},
    "dense": {"kernel": (512, 96), "bias": (96,)},
    "norm": {"scale": (512,)},
}
PARAMS = normal_tree(SHAPES, seed=0)


def arrays(tree: Any) -> list[ox.QuantizedArray]:
    """Every array in codes."""
    return trees.find_nodes(tree, lambda node: isinstance(node, ox.QuantizedArray))
