"""Steps of equal length in every coordinate: Signum and Lion."""

import optax

from optaxplus import validation
from optaxplus.custom_types import DTypeName, Mask, Scalar, ScalarOrSchedule
from optaxplus.numerics.hyperparameters import is_zero
from optaxplus.transforms.chaining import chain_in_float32
from optaxplus.transforms.momentum import scale_by_ema
from optaxplus.transforms.sign import scale_by_lion, scale_by_sign
from optaxplus.transforms.weight_decay import descend

__all__ = [
    "lion",
    "signum",
]


def signum(
    learning_rate: ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    decay: str = "decoupled",
    mu_dtype: DTypeName = "float32",
) -> optax.GradientTransformationExtraArgs:
    """Signum: the sign of the momentum; every coordinate moves by `learning_rate`.

    Lion with one decay rate for both of its averages. State: 4 bytes per parameter.

    Links: `scale_by_ema`, `scale_by_sign`, `descend`.

    Args:
      learning_rate: See `optaxplus.custom_types`. 1e-4 is usual.
      b1: Decay rate of the momentum, in [0, 1). 0 is signSGD.
      weight_decay: Decay per step, >= 0, or a schedule of it; relative to the learning
        rate unless `decay` is "independent". Other than 0 it makes `update` need
        params. Static if 0.
      mask: Which parameters decay, see `optaxplus.custom_types`; None is all.
      decay: Form of the weight decay, see `optaxplus.descend`. Static.
      mu_dtype: Dtype of the momentum, see `optaxplus.custom_types`. Static.

    Returns:
      A transformation whose update has the dtype of the gradient.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range, the mask does not fit, or `update` is
        called without the params that it needs.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = ox.signum(0.1)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, state = tx.update(2 * params, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates))
      [ 0.9 -1.9]

    References:
      Bernstein et al., signSGD, arXiv 1802.04434, Algorithm 2.
    """
    validation.check_learning_rate("signum", learning_rate)
    validation.check_weight_decay("signum", weight_decay)
    return chain_in_float32(
        scale_by_ema(b1, mu_dtype=mu_dtype),
        scale_by_sign(),
        descend(learning_rate, weight_decay, mask=mask, decay=decay),
        requires_params=None if is_zero(weight_decay) else "signum",
    )


def lion(
    learning_rate: ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    weight_decay: ScalarOrSchedule = 1e-3,
    mask: Mask = None,
    decay: str = "decoupled",
    mu_dtype: DTypeName = "float32",
) -> optax.GradientTransformationExtraArgs:
    """Lion: sign updates with a slow momentum; half the state of Adam.

    Every coordinate moves by exactly `learning_rate`, so use a learning rate 3 to 10
    times smaller and a weight decay 3 to 10 times larger than for AdamW. State: 4
    bytes per parameter.

    Links: `scale_by_lion`, `descend`.

    Args:
      learning_rate: See `optaxplus.custom_types`. 1e-4 is usual.
      b1: Weight of the momentum in the signed mixture, in [0, 1).
      b2: Decay rate of the momentum, in [0, 1).
      weight_decay: Decay per step, >= 0, or a schedule of it; relative to the learning
        rate unless `decay` is "independent". Other than 0 it makes `update` need
        params. Static if 0. The default is optax's.
      mask: Which parameters decay, see `optaxplus.custom_types`; None is all.
      decay: Form of the weight decay, see `optaxplus.descend`. Static.
      mu_dtype: Dtype of the momentum, see `optaxplus.custom_types`. Static.

    Returns:
      A transformation whose update has the dtype of the gradient.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range, the mask does not fit, or `update` is
        called without the params that it needs.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = ox.lion(0.1, weight_decay=0.0)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, state = tx.update(2 * params, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates))
      [ 0.9 -1.9]

    References:
      Chen et al., arXiv 2302.06675, Algorithm 2.
    """
    validation.check_learning_rate("lion", learning_rate)
    validation.check_weight_decay("lion", weight_decay)
    return chain_in_float32(
        scale_by_lion(b1, b2, mu_dtype=mu_dtype),
        descend(learning_rate, weight_decay, mask=mask, decay=decay),
        requires_params=None if is_zero(weight_decay) else "lion",
    )
