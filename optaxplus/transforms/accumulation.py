"""Gradient accumulation: one update for the mean of k gradients.

    a <- a + g in k - 1 micro-steps,      inner update of (a + g)/k,  a <- 0 in the k-th

Letters to arguments: k is `every_k`; a is the state's `grad_sum`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxplus import trees, validation
from optaxplus.custom_types import DTypeName, PyTree

__all__ = ["AccumulateState", "accumulate"]


class AccumulateState(NamedTuple):
    """State of `accumulate`.

    Attributes:
      micro_step: Gradients in the sum, 0 to every_k - 1; shape (), int32.
      grad_sum: Their sum a; like the parameters, in `accumulator_dtype`.
      inner_state: State of the wrapped optimizer.
    """

    micro_step: jax.Array
    grad_sum: PyTree
    inner_state: Any


def accumulate(
    inner: optax.GradientTransformation,
    every_k: int,
    *,
    accumulator_dtype: DTypeName = "float32",
) -> optax.GradientTransformationExtraArgs:
    """Updates once per `every_k` gradients, with their mean.

    The other steps return zeros and run nothing of `inner`: no orthogonalization, no
    collective. `optax.MultiSteps` runs it every time and throws the result away. State:
    4 bytes per parameter beside that of `inner`.

    k micro-batches equal one batch if they carry equal weight. The step counts of
    `inner`, and so its schedules, count updates and not micro-steps.

    Args:
      inner: The optimizer; it sees one gradient in `every_k` calls, in float32. Put
        clipping inside, so that it sees the mean.
      every_k: Gradients per update. >= 1. Static.
      accumulator_dtype: Dtype of the sum; see `mu_dtype` in `optaxplus.custom_types`.
        Static.

    Returns:
      A transformation with state `AccumulateState`; emits float32. Extra arguments of
      the k-th call reach `inner`.

    Raises:
      TypeError: If `inner` is no transformation, an argument has a wrong type, or a
        parameter is not floating point.
      ValueError: If `every_k` < 1.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> tx = ox.accumulate(ox.sgd(1.0), every_k=2)
      >>> state = tx.init(jnp.zeros(2))
      >>> first, state = tx.update(jnp.array([1.0, 2.0]), state)
      >>> second, state = tx.update(jnp.array([3.0, 4.0]), state)
      >>> print(first, second)
      [0. 0.] [-2. -3.]
    """
    name = "accumulate"
    validation.check_transformation(name, "inner", inner)
    validation.check_int(name, minimum=1, every_k=every_k)
    validation.check_floating_dtype(name, accumulator_dtype=accumulator_dtype)
    wrapped = optax.with_extra_args_support(inner)

    def init_fn(params: PyTree) -> AccumulateState:
        return AccumulateState(
            micro_step=jnp.zeros([], jnp.int32),
            grad_sum=trees.init_moment(name, params, accumulator_dtype),
            inner_state=wrapped.init(params),
        )

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, AccumulateState]:
        def sum_of(g: jax.Array, total: jax.Array) -> jax.Array:
            wide = trees.widen(g)
            return total.astype(wide.dtype) + wide

        count = state.micro_step + 1

        def step() -> tuple[PyTree, PyTree, Any]:
            mean = jax.tree.map(
                lambda g, total: sum_of(g, total) / trees.scalar_for(count, g),
                updates,
                state.grad_sum,
            )
            new, inner_state = wrapped.update(
                mean, state.inner_state, params, **extra_args
            )
            # Many of optax's moments take the dtype of the gradients that they meet.
            inner_state = trees.cast_like(inner_state, state.inner_state)
            zeros = jax.tree.map(jnp.zeros_like, state.grad_sum)
            return trees.cast_like(new, mean), zeros, inner_state

        def wait() -> tuple[PyTree, PyTree, Any]:
            zeros = jax.tree.map(lambda g: jnp.zeros_like(trees.widen(g)), updates)
            total = jax.tree.map(
                lambda g, total: sum_of(g, total).astype(total.dtype),
                updates,
                state.grad_sum,
            )
            return zeros, total, state.inner_state

        # More have come if a state was saved with a larger every_k.
        is_last = count >= every_k
        new, grad_sum, inner_state = jax.lax.cond(is_last, step, wait)
        micro_step = jnp.where(is_last, 0, count)
        return new, AccumulateState(micro_step, grad_sum, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
