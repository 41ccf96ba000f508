"""Gradient centralization: the inputs of an output share no common push.

    g <- g - mean of g over fan_in                       each column of a matrix

and of an embedding (tokens, features) each row, as the authors' code does: the mean
over tokens would move those that never occur.

Source: Yong et al., Gradient centralization, arXiv 2004.01461, equation 1. Differs from
`optax.centralize`, which keeps axis 0 whatever it means and treats stacks as one.
"""

import math
from typing import Any

import jax
import optax

from optaxplus import trees
from optaxplus.custom_types import Axes, PyTree
from optaxplus.numerics.matrix_axes import MatrixAxes
from optaxplus.partition.inference import axes_of, decide
from optaxplus.partition.rules import DEFAULT_RULES

__all__ = ["centralize"]


def _centralize_leaf(g: jax.Array, axes: MatrixAxes) -> jax.Array:
    wide = trees.widen(g)
    inputs = math.prod(g.shape[axis] for axis in axes.fan_in)
    # The mean of a single input is all of it, which would never learn.
    if not axes.is_matrix or inputs < 2:
        return wide
    return wide - wide.mean(axis=axes.fan_in, keepdims=True)


def _inferred(params: PyTree) -> PyTree:
    """Matrix axes by names and shapes; an embedding is averaged over its features."""

    def leaf(leaf_axes: MatrixAxes, role: str) -> MatrixAxes:
        if role == "embedding" and leaf_axes.is_matrix:
            return MatrixAxes(leaf_axes.fan_out, leaf_axes.fan_in)
        return leaf_axes

    remedy = "axes=ox.infer_matrix_axes(params, {rules})"
    decisions = decide("centralize", params, DEFAULT_RULES, remedy)
    return trees.unflatten_like(params, [leaf(d.axes, d.role) for d in decisions])


def centralize(*, axes: Axes = None) -> optax.GradientTransformation:
    """Subtracts from the gradient of every weight matrix its mean over the inputs.

    A constraint on the weights: each column keeps the sum it started with. Vectors and
    matrices with a single input pass unchanged. No state.

    Args:
      axes: Matrix axes, see `optaxplus.custom_types`: the mean is that over fan_in.
        None also turns embeddings round.

    Returns:
      A transformation with an empty state; emits float32.

    Raises:
      TypeError: If a parameter is not floating point.
      ValueError: If axes do not fit.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> grads = {"kernel": jnp.array([[1.0, 5.0], [3.0, 5.0]])}
      >>> tx = ox.centralize()
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> print(updates["kernel"])
      [[-1.  0.]
       [ 1.  0.]]

    References:
      Yong et al., arXiv 2004.01461, equation 1.
    """
    name = "centralize"
    axes = _inferred if axes is None else axes

    def init_fn(params: PyTree) -> optax.EmptyState:
        trees.check_floating(name, params)
        axes_of(name, axes, params)
        return optax.EmptyState()

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, optax.EmptyState]:
        del params
        return (
            jax.tree.map(_centralize_leaf, updates, axes_of(name, axes, updates)),
            state,
        )

    return optax.GradientTransformation(init_fn, update_fn)
