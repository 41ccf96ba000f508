"""Chains that round once."""

from typing import Any

import jax
import optax

from optaxplus import trees, validation
from optaxplus.custom_types import PyTree

__all__ = ["chain_in_float32"]


def chain_in_float32(
    *links: optax.GradientTransformation,
    requires_params: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`optax.chain` that computes in float32 and rounds once, at the end.

    Low-precision gradients and parameters are widened to float32 before the first
    link and the update is rounded to the gradient's dtype after the last one, so that
    neither a weight decay nor a learning rate is rounded on the way. float32,
    float64 and complex leaves are computed in their own dtype.

    Args:
      *links: Transformations. State keeps the dtype that `init` gave it: float32 for
        this library's links, that of the parameters for many of optax's unless they
        are given an accumulator dtype.
      requires_params: Name of the optimizer whose `update` needs params, to refuse a
        call without them; None if it does not.

    Returns:
      A transformation whose update has the dtype of the gradient, with the state of
      `optax.chain`. Extra arguments reach the links that take them.

    Raises:
      TypeError: If a link is no gradient transformation.
      ValueError: If `update` is called without the params that it requires, or a link
        is `master_weights` or another wrapper that stands outermost.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = ox.chain_in_float32(ox.scale_by_sign(), optax.scale(-0.1))
      >>> params = jnp.ones(3, jnp.bfloat16)
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> updates.dtype.name
      'bfloat16'
    """
    for index, link in enumerate(links):
        validation.check_transformation("chain_in_float32", f"links[{index}]", link)
    chain = optax.chain(*links)

    def init_fn(params: PyTree) -> Any:
        return trees.check_not_outermost("chain_in_float32", chain.init(params))

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        if requires_params is not None:
            validation.check_params(requires_params, params)
        wide_params = None if params is None else jax.tree.map(trees.widen, params)
        wide, new_state = chain.update(
            jax.tree.map(trees.widen, updates), state, wide_params, **extra_args
        )
        return trees.cast_like(wide, updates), trees.cast_like(new_state, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
