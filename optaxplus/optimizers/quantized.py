"""Optimizers with their state in 8 bits: the usual ones in `quantize_state`."""

from collections.abc import Collection, Sequence

import optax

from optaxplus.custom_types import Mask, Scalar, ScalarOrSchedule
from optaxplus.optimizers.adaptive import adamw
from optaxplus.optimizers.sign import lion
from optaxplus.partition.rules import DEFAULT_RULES, Rule
from optaxplus.precision.quantized_state import quantize_state

__all__ = ["adamw8bit", "lion8bit"]


def adamw8bit(
    learning_rate: ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: Mask = None,
    decay: str = "decoupled",
    block_size: int = 256,
    min_size: int = 4096,
    code: str = "root",
    keep: Collection[str] = ("embedding",),
    rules: Sequence[Rule] = DEFAULT_RULES,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with both moments in 8 bits, where they are large.

    `quantize_state(adamw(...))`. State: 2.03 bytes per parameter in place of 8;
    embeddings and small parameters keep 8. With `code="dynamic"` the codes are those of
    bitsandbytes' AdamW8bit, its blocks lie otherwise.

    Args:
      learning_rate: See `optaxplus.custom_types`. 1e-3 is usual.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator outside the square root. > 0.
      weight_decay: As in `optaxplus.adamw`, >= 0. Static if 0.
      mask: Which parameters decay, see `optaxplus.custom_types`; None is all.
      decay: Form of the weight decay, see `optaxplus.descend`. Static.
      block_size: About how many entries share a scale. >= 8. Static.
      min_size: Parameters with fewer entries keep float32 moments. >= 1. Static.
      code: "root" or "dynamic", see `optaxplus.quantize_state`. Static.
      keep: Roles whose moments stay in float32. Static.
      rules: Ordered rules that give the roles; put your own in front. Static.

    Returns:
      A transformation whose update has the dtype of the gradient, with state
      `QuantizedState`.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range, the mask does not fit, or `update` is
        called without the params that it needs.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = ox.adamw8bit(1e-3)
      >>> params = {"dense": {"kernel": jnp.ones((512, 512))}}
      >>> round(ox.memory_report(tx, params).state / 512**2, 2)
      2.03

    References:
      Dettmers et al., 8-bit optimizers via block-wise quantization, arXiv 2110.02861.
    """
    return quantize_state(
        adamw(
            learning_rate,
            b1=b1,
            b2=b2,
            eps=eps,
            weight_decay=weight_decay,
            mask=mask,
            decay=decay,
        ),
        block_size=block_size,
        min_size=min_size,
        code=code,
        keep=keep,
        rules=rules,
    )


def lion8bit(
    learning_rate: ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    weight_decay: ScalarOrSchedule = 1e-3,
    mask: Mask = None,
    decay: str = "decoupled",
    block_size: int = 256,
    min_size: int = 4096,
    code: str = "root",
    keep: Collection[str] = ("embedding",),
    rules: Sequence[Rule] = DEFAULT_RULES,
) -> optax.GradientTransformationExtraArgs:
    """Lion with its momentum in 8 bits, where it is large.

    `quantize_state(lion(...))`. State: 1.02 bytes per parameter in place of 4;
    embeddings and small parameters keep 4.

    Args:
      learning_rate: See `optaxplus.custom_types`. 1e-4 is usual.
      b1: Weight of the momentum in the signed mixture, in [0, 1).
      b2: Decay rate of the momentum, in [0, 1).
      weight_decay: As in `optaxplus.lion`, >= 0. Static if 0.
      mask: Which parameters decay, see `optaxplus.custom_types`; None is all.
      decay: Form of the weight decay, see `optaxplus.descend`. Static.
      block_size: About how many entries share a scale. >= 8. Static.
      min_size: Parameters with fewer entries keep a float32 momentum. >= 1. Static.
      code: "root" or "dynamic", see `optaxplus.quantize_state`. Static.
      keep: Roles whose momentum stays in float32. Static.
      rules: Ordered rules that give the roles; put your own in front. Static.

    Returns:
      A transformation whose update has the dtype of the gradient, with state
      `QuantizedState`.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range, the mask does not fit, or `update` is
        called without the params that it needs.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = ox.lion8bit(1e-4)
      >>> params = {"dense": {"kernel": jnp.ones((512, 512))}}
      >>> round(ox.memory_report(tx, params).state / 512**2, 2)
      1.02

    References:
      Chen et al., arXiv 2302.06675; Dettmers et al., arXiv 2110.02861.
    """
    return quantize_state(
        lion(
            learning_rate,
            b1=b1,
            b2=b2,
            weight_decay=weight_decay,
            mask=mask,
            decay=decay,
        ),
        block_size=block_size,
        min_size=min_size,
        code=code,
        keep=keep,
        rules=rules,
    )
