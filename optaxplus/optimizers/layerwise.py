"""LARS and LAMB: one step length for every layer, in proportion to its weights."""

import optax

from optaxplus import trees, validation
from optaxplus.custom_types import Axes, DTypeName, Mask, Scalar, ScalarOrSchedule
from optaxplus.transforms.adaptive.adam import scale_by_adam
from optaxplus.transforms.chaining import chain_in_float32
from optaxplus.transforms.clipping import clip_by_global_norm
from optaxplus.transforms.layerwise import trust_ratio
from optaxplus.transforms.momentum import scale_by_momentum
from optaxplus.transforms.weight_decay import descend

__all__ = ["lamb", "lars"]


def lars(
    learning_rate: ScalarOrSchedule,
    *,
    momentum: Scalar = 0.9,
    nesterov: bool = False,
    weight_decay: Scalar = 0.0,
    trust_coefficient: Scalar = 1e-3,
    form: str = "paper",
    eps: Scalar = 0.0,
    mask: Mask = None,
    axes: Axes = None,
    mu_dtype: DTypeName = "float32",
) -> optax.GradientTransformationExtraArgs:
    """LARS: momentum SGD whose step in every layer is relative to the layer's norm.

    Made for convolutional networks with very large batches. In a stack every layer
    counts as a layer. State: 4 bytes per parameter.

    | form | denominator | decay in the step | learning rate |
    |---|---|---|---|
    | "paper" | ‖g‖ + λ·‖w‖ + ε | yes | before the momentum |
    | "optax" | ‖g + λ·w‖ + ε | yes | before the momentum |
    | "tensorflow" | ‖g‖ + λ·‖w‖ + ε | no, expected in the loss | before the momentum |
    | "apex" | ‖g‖ + λ·‖w‖ + ε | yes | after the momentum |

    At a constant learning rate its place does not matter. NVIDIA's apex has
    trust_coefficient=0.02 and eps=1e-8; where a gradient is zero nothing decays;
    its option to clip the ratio is left out.

    Links: `trust_ratio`, which decays too, `descend`, `scale_by_momentum`; the last two
    the other way round for "apex".

    Args:
      learning_rate: See `optaxplus.custom_types`. 1 to 10 with a warm-up is usual, up
        to 34 in the ResNet-50 recipes for batches of 32768. Parameters that are zero,
        as biases are at the start, or masked take it undiminished.
      momentum: Heavy-ball coefficient, in [0, 1).
      nesterov: Whether to use Nesterov's step. Static.
      weight_decay: λ, relative to the learning rate. >= 0.
      trust_coefficient: Relative length η of a step of learning rate 1. > 0.
      form: "paper", "optax", "tensorflow" or "apex". Static.
      eps: ε, added to the denominator. >= 0.
      mask: Which parameters are scaled and decayed, see `optaxplus.custom_types`; the
        others follow plain momentum. None is all; the recipes leave out biases and
        norms, `mask=optaxplus.decay_mask`.
      axes: Matrix axes, see `optaxplus.custom_types`. Vectors are scaled too.
      mu_dtype: Dtype of the momentum, see `optaxplus.custom_types`. Static.

    Returns:
      A transformation whose update has the dtype of the gradient and needs params.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range, axes or mask do not fit, or `update`
        is called without params.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> params = jnp.array([3.0, 4.0])
      >>> tx = ox.lars(10.0, momentum=0.0)
      >>> updates, _ = tx.update(jnp.array([0.1, -9.0]), tx.init(params), params)
      >>> print(jnp.linalg.norm(updates) / jnp.linalg.norm(params))
      0.01

    References:
      You et al., arXiv 1708.03888, Algorithm 1; `optax.lars`; `LARSOptimizer` of
      TensorFlow 1; `LARC` of NVIDIA's apex.
    """
    validation.check_learning_rate("lars", learning_rate)
    ratio = trust_ratio(
        trust_coefficient=trust_coefficient,
        weight_decay=weight_decay,
        form=form,
        eps=eps,
        mask=mask,
        axes=axes,
    )
    heavy_ball = scale_by_momentum(momentum, nesterov=nesterov, mu_dtype=mu_dtype)
    rate = descend(learning_rate)
    links = (heavy_ball, rate) if form == "apex" else (rate, heavy_ball)
    return chain_in_float32(ratio, *links, requires_params="lars")


def lamb(
    learning_rate: ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    eps_root: Scalar = 0.0,
    debias: bool = True,
    clip_norm: Scalar | None = None,
    weight_decay: Scalar = 0.0,
    mask: Mask = None,
    min_param_norm: Scalar = 0.0,
    max_param_norm: Scalar | None = None,
    trust_mask: Mask = None,
    axes: Axes = None,
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformationExtraArgs:
    """LAMB: Adam whose step in every layer is relative to the layer's norm.

    Made for transformers with very large batches. State: 8 bytes per parameter. The
    default is the form of TensorFlow Addons and optax. That of NVIDIA's apex has
    `clip_norm=1.0`, `weight_decay=0.01` and no ratio where nothing decays, so the same
    `mask` and `trust_mask`.

    Links: `clip_by_global_norm`, `scale_by_adam`, decay, `trust_ratio`, `descend`.

    Args:
      learning_rate: See `optaxplus.custom_types`. Relative length of a step; 1e-3 to
        1e-2 is usual.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator outside the square root. >= 0; eps and eps_root
        may not both be 0.
      eps_root: Added inside the square root. >= 0.
      debias: Whether the moments are corrected for their start from zero. Static.
      clip_norm: Largest norm of the whole gradient, > 0, or None. Static if None.
      weight_decay: Coefficient of the parameters in the normalised direction. >= 0.
      mask: Which parameters decay, see `optaxplus.custom_types`; None is all.
      min_param_norm: Lower bound of the norm that a step is relative to. >= 0.
      max_param_norm: Upper bound of that norm, > 0, or None. Static if None.
      trust_mask: Which parameters have a trust ratio, as `mask`; the others take
        Adam's step. TensorFlow Addons gives both masks the same exclusions.
      axes: Matrix axes, see `optaxplus.custom_types`. Vectors are scaled too.
      mu_dtype: Dtype of the first moment, see `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of the second moment. Static.

    Returns:
      A transformation whose update has the dtype of the gradient and needs params.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range, axes or masks do not fit, or `update`
        is called without params.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> params = jnp.array([3.0, 4.0])
      >>> tx = ox.lamb(0.01)
      >>> updates, _ = tx.update(jnp.array([0.1, -9.0]), tx.init(params), params)
      >>> print(jnp.linalg.norm(updates) / jnp.linalg.norm(params))
      0.01

    References:
      You et al., arXiv 1904.00962, Algorithm 2, with the bounds for φ; TensorFlow
      Addons' `LAMB`; `optax.lamb`; `FusedLAMB` of NVIDIA's apex, but for its
      `grad_averaging=False`.
    """
    validation.check_learning_rate("lamb", learning_rate)
    validation.check_non_negative("lamb", weight_decay=weight_decay)
    if clip_norm is not None:
        validation.check_positive("lamb", clip_norm=clip_norm)
    clip = optax.identity() if clip_norm is None else clip_by_global_norm(clip_norm)
    return chain_in_float32(
        clip,
        scale_by_adam(
            b1,
            b2,
            eps=eps,
            eps_root=eps_root,
            debias=debias,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
        ),
        optax.add_decayed_weights(
            weight_decay, lambda params: trees.resolve_mask("lamb", mask, params)
        ),
        trust_ratio(
            min_param_norm=min_param_norm,
            max_param_norm=max_param_norm,
            mask=trust_mask,
            axes=axes,
        ),
        descend(learning_rate),
        requires_params="lamb",
    )
