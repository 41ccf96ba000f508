"""Small trees of parameters that reach every branch, and losses to descend on.

Nothing here is random twice: every tree comes from a seed.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaxplus.numerics.matrix_axes import MatrixAxes

Tree = Any

# A transformer in miniature: what Flax calls its parameters, a stack of two layers
# included: an embedding, attention heads, a scanned kernel with its
# bias, a norm, a scalar. Equal shapes spare compilations.
MIXED_SHAPES: Mapping[str, Any] = {
    "embedding": (5, 4),
    "attention": {"query": {"kernel": (2, 4, 3), "bias": (4, 3)}},
    "layers": {"kernel": (2, 4, 3), "bias": (2, 3)},
    "norm": {"scale": (4,)},
    "temperature": (),
}

# The same without vectors, for what takes nothing but matrices.
MATRIX_SHAPES: Mapping[str, Any] = {
    "dense": {"kernel": (5, 4)},
    "attention": {"query": {"kernel": (2, 4, 3)}, "out": {"kernel": (4, 3, 2)}},
}

# Every degenerate shape: one row, one column, one number, nothing at all.
ODD_SHAPES: Mapping[str, Any] = {
    "row": (1, 4),
    "column": (5, 1),
    "single": (1, 1),
    "no_rows": (0, 4),
    "no_columns": (4, 0),
    "scalar": (),
    "empty": (0,),
}
ODD_MATRIX_SHAPES: Mapping[str, Any] = {
    name: shape for name, shape in ODD_SHAPES.items() if len(shape) == 2
}

STACKED_MATRIX = MatrixAxes((-2,), (-1,))


def is_shape(node: Any) -> bool:
    """Whether a node of a tree of shapes is a shape."""
    return isinstance(node, tuple)


def normal_tree(shapes: Any, *, seed: int, scale: float = 1.0) -> Tree:
    """Standard normal float32 arrays of the given shapes, times `scale`."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(scale * rng.standard_normal(shape), jnp.float32),
        shapes,
        is_leaf=is_shape,
    )


def gradients(shapes: Any, *, steps: int, seed: int = 7) -> list[Tree]:
    """Gradients of `steps` steps whose size differs by up to 1e4 between leaves."""
    trees = [normal_tree(shapes, seed=seed + step) for step in range(steps)]
    leaves, treedef = jax.tree.flatten(trees[0])
    sizes = np.geomspace(1e-2, 1e2, len(leaves))
    scales = jax.tree.unflatten(treedef, [float(size) for size in sizes])
    return [jax.tree.map(lambda g, scale: g * scale, tree, scales) for tree in trees]


def cast(tree: Tree, dtype: Any) -> Tree:
    """Every leaf in `dtype`; "mixed" gives bfloat16, float16 and float32 in turn."""
    leaves, treedef = jax.tree.flatten(tree)
    turns = ("bfloat16", "float16", "float32") if dtype == "mixed" else (dtype,)
    return jax.tree.unflatten(
        treedef,
        [leaf.astype(turns[index % len(turns)]) for index, leaf in enumerate(leaves)],
    )


def _quadratic(x: jax.Array, target: jax.Array) -> jax.Array:
    """½·Σ h·(x - target)², with curvatures h from 1 to 0.1."""
    curvature = jnp.linspace(1.0, 0.1, x.size).reshape(x.shape)
    return 0.5 * jnp.sum(curvature * jnp.square(x - target))


def _least_squares(x: jax.Array, target: jax.Array) -> jax.Array:
    """½·‖A·x - A·target‖² / rows, for a matrix x; A mixes the rows."""
    rows = x.shape[0]
    mixing = jnp.asarray(
        np.random.default_rng(3).standard_normal((2 * rows, rows)), jnp.float32
    )
    return 0.5 * jnp.sum(jnp.square(mixing @ (x - target))) / (2 * rows)


DESCENT_SHAPES: Mapping[str, Any] = {
    "quadratic": {"x": (5,)},
    "least_squares": {"w": (6, 4)},
    "transformer": MIXED_SHAPES,
}


def _loss_tree(function: Callable, params: Tree, targets: Tree) -> Tree:
    return jax.tree.map(
        lambda p, target: function(p.astype(jnp.float32), target), params, targets
    )


def descent_targets() -> Tree:
    """Where every loss is 0."""
    return normal_tree(DESCENT_SHAPES, seed=11)


def descent_start() -> Tree:
    """Small parameters on the target's side of zero.

    Steps of LAMB and Adafactor are relative to the parameter, so a scalar stops at
    zero before it could change its sign.
    """
    return jax.tree.map(
        lambda x, target: jnp.abs(x) * jnp.sign(target),
        normal_tree(DESCENT_SHAPES, seed=5, scale=0.3),
        descent_targets(),
    )


def descent_losses(params: Tree) -> Tree:
    """The loss of every leaf of a tree of `DESCENT_SHAPES`; their sum is the problem.

    Curved, ill-conditioned and mixing, each with its minimum of 0 at a target.
    """
    targets = descent_targets()
    functions = {
        "quadratic": _quadratic,
        "least_squares": _least_squares,
        "transformer": _quadratic,
    }
    return {
        problem: _loss_tree(function, params[problem], targets[problem])
        for problem, function in functions.items()
    }
