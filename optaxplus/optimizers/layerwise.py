"""LARS and LAMB: one step length for every layer, in proportion to its weights."""

import optax

from optaxplus import validation
from optaxplus.custom_types import Axes, DTypeName, Mask, Scalar, ScalarOrSchedule
from optaxplus.transforms.adaptive.adam import scale_by_adam
from optaxplus.transforms.chaining import chain_in_float32
from optaxplus.transforms.layerwise import trust_ratio
from optaxplus.transforms.momentum import scale_by_momentum

__all__ = ["lamb", "lars"]


def lars(
    learning_rate: ScalarOrSchedule,
    *,
    momentum: Scalar = 0.9,
    nesterov: bool = False,
    weight_decay: Scalar = 0.0,
    trust_coefficient: Scalar = 1e-3,
    eps: Scalar = 0.0,
    axes: Axes = None,
    mu_dtype: DTypeName = "float32",
) -> optax.GradientTransformationExtraArgs:
    """LARS: momentum SGD whose step in every layer is relative to the layer's norm.

    Made for convolutional networks with very large batches. The learning rate enters
    before the momentum, as in the paper. In a stack every layer counts as a layer.
    State: 4 bytes per parameter.

    Args:
      learning_rate: See `optaxplus.custom_types`. Up to 34 in the ResNet-50 recipes.
      momentum: Heavy-ball coefficient, in [0, 1).
      nesterov: Whether to use Nesterov's step. Static.
      weight_decay: λ in the gradient and in the denominator ‖g‖ + λ·‖w‖. >= 0.
      trust_coefficient: Relative length η of a step of learning rate 1. > 0.
      eps: Added to the denominator. >= 0.
      axes: Matrix axes, see `optaxplus.custom_types`. Vectors are scaled too.
      mu_dtype: Dtype of the momentum, see `optaxplus.custom_types`. Static.

    Returns:
      A transformation whose update has the dtype of the gradient and needs params.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range, axes do not fit, or `update` is
        called without params.

    References:
      You et al., arXiv 1708.03888, Algorithm 1. Differs from `optax.lars`, which
      divides by ‖g + λ·w‖; without weight decay they are equal.
    """
    validation.check_learning_rate("lars", learning_rate)
    return chain_in_float32(
        trust_ratio(
            trust_coefficient=trust_coefficient,
            weight_decay=weight_decay,
            eps=eps,
            axes=axes,
        ),
        optax.scale_by_learning_rate(learning_rate),
        scale_by_momentum(momentum, nesterov=nesterov, mu_dtype=mu_dtype),
        requires_params="lars",
    )


def lamb(
    learning_rate: ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    eps_root: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    mask: Mask = None,
    axes: Axes = None,
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformationExtraArgs:
    """LAMB: Adam whose step in every layer is relative to the layer's norm.

    Made for transformers with very large batches. State: 8 bytes per parameter.

    Args:
      learning_rate: See `optaxplus.custom_types`. Relative length of a step; 1e-3 to
        1e-2 is usual.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator outside the square root. >= 0.
      eps_root: Added inside the square root. >= 0.
      weight_decay: Coefficient of the parameters in the normalised direction. >= 0.
      mask: Which parameters decay, see `optaxplus.custom_types`; None is all.
      axes: Matrix axes, see `optaxplus.custom_types`. Vectors are scaled too.
      mu_dtype: Dtype of the first moment, see `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of the second moment. Static.

    Returns:
      A transformation whose update has the dtype of the gradient and needs params.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range, axes do not fit, or `update` is
        called without params.

    References:
      You et al., arXiv 1904.00962, Algorithm 2, with the identity for φ, as in
      TensorFlow Addons and optax.
    """
    validation.check_learning_rate("lamb", learning_rate)
    validation.check_non_negative("lamb", weight_decay=weight_decay)
    return chain_in_float32(
        scale_by_adam(
            b1, b2, eps=eps, eps_root=eps_root, mu_dtype=mu_dtype, nu_dtype=nu_dtype
        ),
        optax.add_decayed_weights(weight_decay, mask),
        trust_ratio(axes=axes),
        optax.scale_by_learning_rate(learning_rate),
        requires_params="lamb",
    )
