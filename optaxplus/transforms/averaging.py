"""Averages of the parameters.

Lookahead, every k steps of an inner optimizer with fast parameters p:

    s <- s + α·(p - s),      p <- s

Letters to arguments: k is `every_k`, α is `alpha`; s is the state's `slow`.

Source: Zhang et al., Lookahead optimizer, arXiv 1907.08610, Algorithm 1. The state of
the inner optimizer is left alone at the synchronisation, as in the authors' default.
`optax.lookahead` does the same on a pair of parameter trees.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxplus import trees, validation
from optaxplus.custom_types import PyTree, Scalar

__all__ = ["LookaheadState", "lookahead"]


class LookaheadState(NamedTuple):
    """State of `lookahead`.

    Attributes:
      steps_since_sync: 0 to every_k - 1; shape (), int32.
      slow: Slow parameters s; like the parameters, at least float32.
      inner_state: State of the wrapped optimizer.
    """

    steps_since_sync: jax.Array
    slow: PyTree
    inner_state: Any


def _lookahead_leaf(
    u: jax.Array, p: jax.Array, slow: jax.Array, *, alpha: Scalar, is_sync: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One leaf: (update, s)."""
    now = trees.widen(p)
    step = trees.widen(u)
    s = jnp.where(is_sync, (1 - alpha) * slow + alpha * (now + step), slow)
    return jnp.where(is_sync, s - now, step), s


def lookahead(
    inner: optax.GradientTransformation,
    *,
    every_k: int = 5,
    alpha: Scalar = 0.5,
) -> optax.GradientTransformationExtraArgs:
    """Pulls the parameters back to a slow average of themselves every k steps.

    Works on plain parameters: the training loop sees the fast ones, which equal the
    slow ones, up to rounding, after every k-th step. In between, evaluate with the
    slow ones, `optax.tree.get(state, "slow")`. Stands outermost. State: 4 bytes per
    parameter beside that of `inner`.

    Args:
      inner: A whole optimizer, learning rate included. `init` needs values, of which
        the slow parameters are copies; for types alone use `jax.eval_shape`.
      every_k: Steps between synchronisations. >= 1. Static.
      alpha: How far the slow parameters follow, in (0, 1]; 1 is `inner` itself.

    Returns:
      A transformation with state `LookaheadState` that needs params; emits float32
      and passes extra arguments on to `inner`. The slow parameters are kept in
      float32 whatever the parameters' dtype is.

    Raises:
      TypeError: If `inner` is no transformation, an argument has a wrong type, or a
        parameter is not floating point.
      ValueError: If an argument is out of range; at `init`, if `inner` is
        `master_weights` or another wrapper that stands outermost; if `update` is called
        without params.

    Example:
      >>> import optaxplus as ox
      >>> tx = ox.lookahead(ox.adamw(1e-3, weight_decay=0.1), every_k=5, alpha=0.5)

    References:
      Zhang et al., arXiv 1907.08610, Algorithm 1.
    """
    name = "lookahead"
    validation.check_transformation(name, "inner", inner)
    validation.check_int(name, minimum=1, every_k=every_k)
    validation.check_positive(name, alpha=alpha)
    validation.check_at_most(name, 1.0, alpha=alpha)
    wrapped = optax.with_extra_args_support(inner)

    def init_fn(params: PyTree) -> LookaheadState:
        trees.check_floating(name, params)
        return LookaheadState(
            steps_since_sync=jnp.zeros([], jnp.int32),
            # A copy, because parameters and state may both be donated.
            slow=jax.tree.map(lambda p: jnp.array(trees.widen(p), copy=True), params),
            inner_state=trees.check_not_outermost(name, wrapped.init(params)),
        )

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, LookaheadState]:
        validation.check_params(name, params)
        steps, inner_state = wrapped.update(
            updates, state.inner_state, params, **extra_args
        )
        is_sync = state.steps_since_sync >= every_k - 1
        updates, slow = trees.map_several(
            lambda *leaves: _lookahead_leaf(*leaves, alpha=alpha, is_sync=is_sync),
            2,
            steps,
            params,
            state.slow,
        )
        since = jnp.where(is_sync, 0, state.steps_since_sync + 1)
        return updates, LookaheadState(since, slow, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
