"""Adam and AdamW."""

import optax

from optaxplus import validation
from optaxplus.custom_types import DTypeName, Mask, Scalar, ScalarOrSchedule
from optaxplus.transforms.adaptive import scale_by_adam
from optaxplus.transforms.chaining import chain_in_float32

__all__ = ["adam", "adamw"]


def adam(
    learning_rate: ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    amsgrad: bool = False,
    nesterov: bool = False,
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformationExtraArgs:
    """Adam: steps of about `learning_rate` in every coordinate.

    State: 8 bytes per parameter (12 with amsgrad).

    Args:
      learning_rate: See `optaxplus.custom_types`. 1e-3 is usual.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator outside the square root. >= 0, not both 0.
      eps_root: Added inside the square root. >= 0.
      amsgrad: Whether to keep the largest second moment, as in PyTorch. Static.
      nesterov: Whether to look one step ahead, as in `optax.nadam`. Static.
      mu_dtype: Dtype of the first moment, see `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of the second moment. Static.

    Returns:
      A transformation whose update has the dtype of the gradient.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = ox.adam(0.1)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, state = tx.update(2 * params, tx.init(params))
      >>> print(optax.apply_updates(params, updates))
      [ 0.9 -1.9]

    References:
      Kingma and Ba, arXiv 1412.6980.
    """
    validation.check_learning_rate("adam", learning_rate)
    return chain_in_float32(
        scale_by_adam(
            b1,
            b2,
            eps=eps,
            eps_root=eps_root,
            amsgrad=amsgrad,
            nesterov=nesterov,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )


def adamw(
    learning_rate: ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    weight_decay: Scalar = 1e-4,
    mask: Mask = None,
    amsgrad: bool = False,
    nesterov: bool = False,
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformationExtraArgs:
    """Adam with decoupled weight decay: p <- p - learning_rate·(adam + weight_decay·p).

    The default of optax; language models are usually trained with b2=0.95 and
    weight_decay=0.1. State: 8 bytes per parameter (12 with amsgrad).

    Args:
      learning_rate: See `optaxplus.custom_types`. 1e-3 is usual.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator outside the square root. >= 0, not both 0.
      eps_root: Added inside the square root. >= 0.
      weight_decay: Decay per step, relative to the learning rate. >= 0. optax's
        default; PyTorch's is 1e-2.
      mask: Which parameters decay, see `optaxplus.custom_types`; None is all.
      amsgrad: Whether to keep the largest second moment, as in PyTorch. Static.
      nesterov: Whether to look one step ahead, as in `optax.nadamw`. Static.
      mu_dtype: Dtype of the first moment, see `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of the second moment. Static.

    Returns:
      A transformation whose update has the dtype of the gradient and needs params.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range, or `update` is called without params.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = ox.adamw(0.1, weight_decay=0.1)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, state = tx.update(2 * params, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates))
      [ 0.89 -1.88]

    References:
      Loshchilov and Hutter, arXiv 1711.05101, in the form of PyTorch and optax, where
      the decay is multiplied by the learning rate.
    """
    validation.check_learning_rate("adamw", learning_rate)
    validation.check_non_negative("adamw", weight_decay=weight_decay)
    return chain_in_float32(
        scale_by_adam(
            b1,
            b2,
            eps=eps,
            eps_root=eps_root,
            amsgrad=amsgrad,
            nesterov=nesterov,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
        requires_params="adamw",
    )
