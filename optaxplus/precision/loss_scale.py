"""Dynamic loss scaling, for gradients in float16.

float16 has no numbers below 6e-8, and many gradients are smaller. The loss is
multiplied by a scale s before it is differentiated, the gradients are divided by it:

    all finite:      u <- inner(g/s),   k <- k + 1;    k = K:  s <- f·s,  k <- 0
    otherwise:       u = 0,             s <- b·s,  k <- 0,  inner is left alone

Letters to arguments: K is `growth_interval`, f, b are `growth_factor`,
`backoff_factor`; s, k are the state's `scale`, `finite_steps`.

Sources: Micikevicius et al., Mixed precision training, arXiv 1710.03740, section 3.2;
rule and defaults of PyTorch's `torch.amp.GradScaler`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxplus import trees, validation
from optaxplus.custom_types import PyTree

__all__ = ["LossScaleState", "dynamic_loss_scale", "loss_scale", "skipped_steps"]

# Powers of two, so that scaling rounds nothing; float32 has room for both.
_SMALLEST, _LARGEST = 2.0**-24, 2.0**64


class LossScaleState(NamedTuple):
    """State of `dynamic_loss_scale`.

    Attributes:
      scale: Loss scale s; shape (), float32.
      finite_steps: Steps k since the scale changed; shape (), int32.
      skipped_steps: Steps with gradients that were not finite; shape (), int32.
      inner_state: State of the wrapped optimizer.
    """

    scale: jax.Array
    finite_steps: jax.Array
    skipped_steps: jax.Array
    inner_state: Any


def dynamic_loss_scale(
    inner: optax.GradientTransformation,
    *,
    init_scale: float = 65536.0,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
    growth_interval: int = 2000,
) -> optax.GradientTransformationExtraArgs:
    """Divides gradients by the loss scale, and skips steps in which they overflowed.

    Multiply the loss by `loss_scale(state)` before you differentiate it:

        def scaled_loss(params):
            return loss(params) * ox.loss_scale(state)

        updates, state = tx.update(jax.grad(scaled_loss)(params), state, params)

    A step with a NaN or infinite gradient anywhere returns zeros, runs nothing of
    `inner` and leaves its state alone, step count included. Put everything that looks
    at the size of gradients inside: clipping, the optimizer, `accumulate` and
    `optax.MultiSteps` (which around it would add a NaN to its sum for good). With
    bfloat16, whose range is that of float32, there is nothing to scale. Many of optax's
    optimizers keep their moments in the dtype of the parameters, where squares of
    float16 gradients are 0: put `master_weights` around them, or use this library's.

    Args:
      inner: The optimizer; it gets gradients in float32.
      init_scale: First scale, in [2^-24, 2^64]; powers of two round nothing.
      growth_factor: The scale is multiplied by it after `growth_interval` steps with
        finite gradients, up to 2^64. >= 1.
      backoff_factor: It is multiplied by it in a step without, down to 2^-24. In
        (0, 1).
      growth_interval: Steps. >= 1. Static.

    Returns:
      A transformation with state `LossScaleState`, which `loss_scale` and
      `skipped_steps` read; emits float32. Extra arguments reach `inner`.

    Raises:
      TypeError: If `inner` is no transformation or an argument has a wrong type.
      ValueError: If an argument is out of range, or `inner` scales losses already.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> tx = ox.dynamic_loss_scale(ox.sgd(1.0))
      >>> params = jnp.ones(2, jnp.float16)
      >>> updates, state = tx.update(jnp.array([jnp.inf, 1.0]), tx.init(params), params)
      >>> print(updates, ox.loss_scale(state), ox.skipped_steps(state))
      [0. 0.] 32768.0 1

    References:
      Micikevicius et al., arXiv 1710.03740, section 3.2; `torch.amp.GradScaler`.
    """
    name = "dynamic_loss_scale"
    validation.check_transformation(name, "inner", inner)
    validation.check_positive(name, init_scale=init_scale, growth_factor=growth_factor)
    validation.check_at_least(name, _SMALLEST, init_scale=init_scale)
    validation.check_at_most(name, _LARGEST, init_scale=init_scale)
    validation.check_at_least(name, 1.0, growth_factor=growth_factor)
    validation.check_between_zero_and_one(name, backoff_factor=backoff_factor)
    validation.check_int(name, minimum=1, growth_interval=growth_interval)
    wrapped = optax.with_extra_args_support(inner)

    def init_fn(params: PyTree) -> LossScaleState:
        inner_state = wrapped.init(params)
        if _scales(inner_state):
            raise ValueError(
                f"{name}: inner scales losses already; keep the outer one of the two."
            )
        return LossScaleState(
            scale=jnp.asarray(init_scale, jnp.float32),
            finite_steps=jnp.zeros([], jnp.int32),
            skipped_steps=jnp.zeros([], jnp.int32),
            inner_state=inner_state,
        )

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, LossScaleState]:
        is_finite = jnp.all(
            jnp.array([jnp.isfinite(g).all() for g in jax.tree.leaves(updates)])
        )

        def step() -> tuple[PyTree, PyTree]:
            grads = jax.tree.map(
                lambda g: trees.widen(g) / trees.scalar_for(state.scale, g), updates
            )
            new, inner_state = wrapped.update(
                grads, state.inner_state, params, **extra_args
            )
            inner_state = trees.cast_like(inner_state, state.inner_state)
            return trees.cast_like(new, grads), inner_state

        def skip() -> tuple[PyTree, PyTree]:
            zeros = jax.tree.map(lambda g: jnp.zeros_like(trees.widen(g)), updates)
            return zeros, state.inner_state

        new, inner_state = jax.lax.cond(is_finite, step, skip)
        finite_steps = jnp.where(is_finite, state.finite_steps + 1, 0)
        grows = finite_steps >= growth_interval
        factor = jnp.where(grows, growth_factor, 1.0)
        scale = state.scale * jnp.where(is_finite, factor, backoff_factor)
        return new, LossScaleState(
            scale=jnp.clip(scale, _SMALLEST, _LARGEST).astype(jnp.float32),
            finite_steps=jnp.where(grows, 0, finite_steps),
            skipped_steps=state.skipped_steps + jnp.where(is_finite, 0, 1),
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def loss_scale(state: PyTree) -> jax.Array:
    """The scale by which the next loss has to be multiplied.

    Args:
      state: State with a `LossScaleState` in it, at any depth.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: If there is none in it, or more than one.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> state = ox.dynamic_loss_scale(ox.sgd(1.0)).init(jnp.ones(2, jnp.float16))
      >>> print(ox.loss_scale(state))
      65536.0
    """
    return _the_scale("loss_scale", state).scale


def skipped_steps(state: PyTree) -> jax.Array:
    """How many steps were skipped because gradients were not finite.

    Args:
      state: State with a `LossScaleState` in it, at any depth.

    Returns:
      An int32 scalar.

    Raises:
      ValueError: If there is none in it, or more than one.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> tx = ox.dynamic_loss_scale(ox.sgd(1.0))
      >>> grads = jnp.array([jnp.nan, 1.0])
      >>> updates, state = tx.update(grads, tx.init(jnp.ones(2)))
      >>> print(ox.skipped_steps(state))
      1
    """
    return _the_scale("skipped_steps", state).skipped_steps


def _the_scale(function: str, state: PyTree) -> LossScaleState:
    found = _scales(state)
    if len(found) != 1:
        raise ValueError(
            f"{function}: the state has {len(found)} loss scales in it; it must have "
            "one, from ox.dynamic_loss_scale."
        )
    return found[0]


def _scales(state: PyTree) -> list[LossScaleState]:
    def is_scale(node: Any) -> bool:
        return isinstance(node, LossScaleState)

    return trees.find_nodes(state, is_scale)
