"""Chains that round once."""

from typing import Any

import jax
import optax

from optaxplus import trees
from optaxplus.custom_types import PyTree

__all__ = ["chain_in_float32"]


def chain_in_float32(
    *links: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """`optax.chain` that computes in float32 and rounds once, at the end.

    Low-precision gradients and parameters are widened to float32 before the first
    link and the update is rounded to the gradient's dtype after the last one, so that
    neither a weight decay nor a learning rate is rounded on the way. float32,
    float64 and complex leaves are computed in their own dtype.

    Args:
      *links: Transformations whose state does not depend on the parameters' dtype, as
        all of this library's. (optax's `trace` and `scale_by_adam` take the dtype of
        the parameters unless they are given an accumulator dtype.)

    Returns:
      A transformation whose update has the dtype of the gradient, with the state of
      `optax.chain`. Extra arguments reach the links that take them.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = ox.chain_in_float32(ox.scale_by_sign(), optax.scale(-0.1))
      >>> params = jnp.ones(3, jnp.bfloat16)
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> updates.dtype.name
      'bfloat16'
    """
    chain = optax.chain(*links)

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        wide_params = None if params is None else jax.tree.map(trees.widen, params)
        wide, state = chain.update(
            jax.tree.map(trees.widen, updates), state, wide_params, **extra_args
        )
        return trees.cast_like(wide, updates), state

    return optax.GradientTransformationExtraArgs(chain.init, update_fn)
