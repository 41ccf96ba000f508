"""Lion."""

import optax

from optaxplus import validation
from optaxplus.custom_types import DTypeName, Mask, Scalar, ScalarOrSchedule
from optaxplus.transforms.chaining import chain_in_float32
from optaxplus.transforms.sign import scale_by_lion

__all__ = ["lion"]


def lion(
    learning_rate: ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    weight_decay: Scalar = 1e-3,
    mask: Mask = None,
    mu_dtype: DTypeName = "float32",
) -> optax.GradientTransformationExtraArgs:
    """Lion: sign updates with a slow momentum; half the state of Adam.

    Every coordinate moves by exactly `learning_rate`, so use a learning rate 3 to 10
    times smaller and a weight decay 3 to 10 times larger than for AdamW. State: 4
    bytes per parameter.

    Args:
      learning_rate: See `optaxplus.custom_types`. 1e-4 is usual.
      b1: Weight of the momentum in the signed mixture, in [0, 1).
      b2: Decay rate of the momentum, in [0, 1).
      weight_decay: Decay per step, relative to the learning rate. >= 0. The default is
        optax's.
      mask: Which parameters decay, see `optaxplus.custom_types`; None is all.
      mu_dtype: Dtype of the momentum, see `optaxplus.custom_types`. Static.

    Returns:
      A transformation whose update has the dtype of the gradient and needs params.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range, or `update` is called without params.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = ox.lion(0.1, weight_decay=0.0)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, state = tx.update(2 * params, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates))
      [ 0.9 -1.9]

    References:
      Chen et al., arXiv 2302.06675.
    """
    validation.check_learning_rate("lion", learning_rate)
    validation.check_non_negative("lion", weight_decay=weight_decay)
    return chain_in_float32(
        scale_by_lion(b1, b2, mu_dtype=mu_dtype),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
        requires_params="lion",
    )
