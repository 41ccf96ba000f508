"""LoRA as pure functions on the parameters of any Flax model.

A hidden matrix W, whatever its rank as an array, gets two factors beside it in the
tree, and the model runs with W + (alpha / rank)·A·B:

    block_0/attention/query/kernel  (width, heads, head size)
    block_0/attention/query/lora_a  (width, rank)              random
    block_0/attention/query/lora_b  (rank, heads, head size)   zero

`optaxplus.infer_roles` says which parameters are hidden matrices, and
`optaxplus.infer_matrix_axes` which of their axes go in and out; axes that count copies,
as in a stack of layers, lead both factors. `optaxplus.LORA_RULES` knows these names:
given to an optimizer, they freeze all other parameters.

The sum is formed before the model runs, so the model need not know of it. The gradient
of every adapted matrix is then computed on the way to those of its factors: this saves
the optimizer's memory, not the time of a step.

References:
    Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, "LoRA: Low-Rank Adaptation of
    Large Language Models", 2021, https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import optaxplus as ox


def init_lora(
    params: Mapping[str, Any],
    rank: int,
    key: jax.Array,
    rules: Sequence[ox.Rule] = ox.DEFAULT_RULES,
) -> dict[str, Any]:
    """Puts factors beside every hidden matrix; the model stays the same at first.

    Args:
        params: The parameters of the base: nested dictionaries of arrays.
        rank: Number of columns of A and rows of B.
        key: The random key of the A; their entries are normal with variance
            1 / fan_in, so a product with A keeps the size of its input.
        rules: What decides roles and axes.

    Returns:
        The parameters and the factors in one tree.

    Raises:
        ValueError: If a parameter is undecided by the rules.
    """
    tree = leaves_by_path(params)
    roles = leaves_by_path(ox.infer_roles(params, rules))
    axes = leaves_by_path(ox.infer_matrix_axes(params, rules))
    hidden = [path for path, role in roles.items() if role == "hidden"]
    keys = jax.random.split(key, len(hidden))
    for path, key_a in zip(hidden, keys, strict=True):
        kernel = tree[path]
        copies, fan_in, fan_out = (
            tuple(kernel.shape[axis] for axis in group)
            for group in axis_groups(axes[path], kernel.ndim)
        )
        a = jax.random.normal(key_a, (*copies, *fan_in, rank), kernel.dtype)
        b = jnp.zeros((*copies, rank, *fan_out), kernel.dtype)
        path_a, path_b = factor_paths(path)
        tree |= {path_a: a / math.sqrt(math.prod(fan_in)), path_b: b}
    return unflatten_dict(tree)


def merge_lora(
    tree: Mapping[str, Any], alpha: float, rules: Sequence[ox.Rule] = ox.DEFAULT_RULES
) -> dict[str, Any]:
    """Adds the products of the factors to their matrices: what the model runs with.

    Args:
        tree: What `init_lora` returned, or the same after training.
        alpha: The products are multiplied by alpha / rank, so that a learning rate
            serves several ranks.
        rules: As for `init_lora`.

    Returns:
        Parameters without factors.
    """
    leaves = leaves_by_path(tree)
    base = base_params(tree)
    axes = leaves_by_path(ox.infer_matrix_axes(base, rules))
    merged = leaves_by_path(base)
    for path, kernel in merged.items():
        a, b = map(leaves.get, factor_paths(path))
        if a is not None and b is not None:
            product = factor_product(a, b, axes[path], kernel.ndim)
            merged[path] = kernel + alpha / a.shape[-1] * product
    return unflatten_dict(merged)


def base_params(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters without the factors beside them."""
    leaves = leaves_by_path(tree)
    factors = {factor for path in leaves for factor in factor_paths(path)}
    return unflatten_dict({p: leaf for p, leaf in leaves.items() if p not in factors})


def factor_params(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The factors without the parameters beside them."""
    leaves = leaves_by_path(tree)
    base = leaves_by_path(base_params(tree))
    return unflatten_dict({p: leaf for p, leaf in leaves.items() if p not in base})


def factor_paths(path: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Where the factors of the matrix at a path are: A and B."""
    *module, name = path
    stem = "lora" if name == "kernel" else f"{name}_lora"
    return (*module, f"{stem}_a"), (*module, f"{stem}_b")


def axis_groups(axes: ox.MatrixAxes, ndim: int) -> tuple[tuple[int, ...], ...]:
    """The axes of a matrix that count copies, that go in and that go out."""
    matrix = (*axes.fan_in, *axes.fan_out)
    copies = tuple(axis for axis in range(ndim) if axis not in matrix)
    return copies, axes.fan_in, axes.fan_out


def factor_product(
    a: jax.Array, b: jax.Array, axes: ox.MatrixAxes, ndim: int
) -> jax.Array:
    """A·B in the shape of the matrix that they belong to, of `ndim` axes."""
    copies, fan_in, fan_out = axis_groups(axes, ndim)
    rank = ndim
    return jnp.einsum(
        a, [*copies, *fan_in, rank], b, [*copies, rank, *fan_out], [*range(ndim)]
    )


def leaves_by_path(tree: Any) -> dict[tuple[str, ...], Any]:
    """The leaves of nested dictionaries."""
    return dict(flatten_dict(tree))


def is_identical(params: Any, others: Any) -> bool:
    """Whether two trees of arrays are the same to the last bit."""

    def bits(leaf: jax.Array) -> bytes:
        return np.asarray(leaf).tobytes()

    return jax.tree.map(bits, params) == jax.tree.map(bits, others)
