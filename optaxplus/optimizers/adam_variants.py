"""What came after Adam: other momenta, other denominators."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxplus import validation
from optaxplus.custom_types import Axes, DTypeName, Mask, Scalar, ScalarOrSchedule
from optaxplus.numerics.hyperparameters import is_zero
from optaxplus.transforms.adaptive.adan import scale_by_adan
from optaxplus.transforms.adaptive.ademamix import scale_by_ademamix
from optaxplus.transforms.adaptive.adopt import scale_by_adopt
from optaxplus.transforms.adaptive.stable_adam import scale_by_stable_adam
from optaxplus.transforms.chaining import chain_in_float32
from optaxplus.transforms.weight_decay import descend

__all__ = [
    "adan",
    "ademamix",
    "adopt",
    "stable_adamw",
]


def stable_adamw(
    learning_rate: ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    eps: Scalar = 1e-6,
    weight_decay: Scalar = 1e-2,
    mask: Mask = None,
    axes: Axes = None,
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformationExtraArgs:
    """StableAdamW: AdamW that needs no gradient clipping.

    The step of a matrix or vector shrinks, weight decay included, where its gradient
    outgrew its second moment. State: 8 bytes per parameter.

    Links: `scale_by_stable_adam`, which decays too, `descend`.

    Args:
      learning_rate: See `optaxplus.custom_types`. 1e-3 is usual.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator. > 0.
      weight_decay: Decay per step, relative to the learning rate. >= 0. Static if 0.
      mask: Which parameters decay, see `optaxplus.custom_types`; None is all.
      axes: Matrix axes, see `optaxplus.custom_types`.
      mu_dtype: Dtype of the first moment, see `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of the second moment. Static.

    Returns:
      A transformation whose update has the dtype of the gradient.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range, axes or mask do not fit, or `update`
        is called without the params that it needs.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = ox.stable_adamw(0.1)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, state = tx.update(2 * params, tx.init(params), params)
      >>> print(updates)
      [-0.10099997  0.10199999]

    References:
      Wortsman et al., arXiv 2304.13013, Algorithm 2; numerics and defaults of optimi.
    """
    validation.check_learning_rate("stable_adamw", learning_rate)
    return chain_in_float32(
        scale_by_stable_adam(
            b1,
            b2,
            eps=eps,
            weight_decay=weight_decay,
            mask=mask,
            axes=axes,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
        ),
        descend(learning_rate),
        requires_params=None if is_zero(weight_decay) else "stable_adamw",
    )


def adan(
    learning_rate: ScalarOrSchedule,
    *,
    b1: Scalar = 0.98,
    b2: Scalar = 0.92,
    b3: Scalar = 0.99,
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    decay: str = "proximal",
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformationExtraArgs:
    """Adan: Adam with Nesterov momentum estimated from gradient differences.

    State: 16 bytes per parameter.

    Links: `scale_by_adan`, `descend`.

    Args:
      learning_rate: See `optaxplus.custom_types`. 1e-3 to 1e-2 is usual, more
        than Adam's.
      b1: Decay rate of the mean of the gradient, in [0, 1).
      b2: Decay rate of the mean of the difference and its weight, in [0, 1).
      b3: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator. > 0.
      weight_decay: Decay per step, >= 0, or a schedule of it; relative to the learning
        rate unless `decay` is "independent". Other than 0 it makes `update` need
        params. Static if 0.
      mask: Which parameters decay, see `optaxplus.custom_types`; None is all.
      decay: Form of the weight decay, see `optaxplus.descend`. "decoupled" is the
        authors' `no_prox`. Static.
      mu_dtype: Dtype of the means and of the last gradient, see
        `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of the second moment. Static.

    Returns:
      A transformation whose update has the dtype of the gradient.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range, the mask does not fit, or `update` is
        called without the params that it needs.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = ox.adan(0.1)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, state = tx.update(2 * params, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates))
      [ 0.9 -1.9]

    References:
      Xie et al., arXiv 2208.06677, Algorithm 1, as in sail-sg/Adan; the paper writes
      the complements of the decay rates. Differs from `optax.adan` in the weight of the
      differences (there 0.08 instead of 0.92).
    """
    validation.check_learning_rate("adan", learning_rate)
    validation.check_weight_decay("adan", weight_decay)
    return chain_in_float32(
        scale_by_adan(b1, b2, b3, eps=eps, mu_dtype=mu_dtype, nu_dtype=nu_dtype),
        descend(learning_rate, weight_decay, mask=mask, decay=decay),
        requires_params=None if is_zero(weight_decay) else "adan",
    )


def adopt(
    learning_rate: ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.9999,
    eps: Scalar = 1e-6,
    clip: bool = True,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    decay: str = "decoupled",
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformationExtraArgs:
    """ADOPT: Adam that converges whatever b2 is.

    The first step only looks and moves nothing. State: 8 bytes per
    parameter.

    Links: `scale_by_adopt`, `descend`.

    Args:
      learning_rate: See `optaxplus.custom_types`. 1e-3 is usual.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Lower bound of the denominator. > 0.
      clip: Whether normalised gradients are cut off, see `optaxplus.scale_by_adopt`.
        Static.
      weight_decay: Decay per step, >= 0, or a schedule of it; relative to the learning
        rate unless `decay` is "independent". Other than 0 it makes `update` need
        params. Static if 0.
      mask: Which parameters decay, see `optaxplus.custom_types`; None is all.
      decay: Form of the weight decay, see `optaxplus.descend`. Static.
      mu_dtype: Dtype of the first moment, see `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of the second moment. Static.

    Returns:
      A transformation whose update has the dtype of the gradient.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range, the mask does not fit, or `update` is
        called without the params that it needs.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> tx = ox.adopt(0.1)
      >>> params = jnp.array([1.0, -2.0])
      >>> first, state = tx.update(params, tx.init(params), params)
      >>> second, state = tx.update(params, state, params)
      >>> print(first.any(), second)
      False [-0.01  0.01]

    References:
      Taniguchi et al., arXiv 2411.02853v3, Algorithm 2; torch-adopt 0.1.0 with
      `decouple=True`.
    """
    validation.check_learning_rate("adopt", learning_rate)
    validation.check_weight_decay("adopt", weight_decay)

    def from_second_step(step: ArrayLike) -> jax.Array:
        now = weight_decay(step) if callable(weight_decay) else weight_decay
        return jnp.where(step == 0, 0.0, now)

    decays = not is_zero(weight_decay)
    return chain_in_float32(
        scale_by_adopt(
            b1,
            b2,
            eps=eps,
            clip=clip,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
        ),
        descend(
            learning_rate,
            from_second_step if decays else 0.0,
            mask=mask,
            decay=decay,
        ),
        requires_params="adopt" if decays else None,
    )


def ademamix(
    learning_rate: ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    b3: Scalar = 0.9999,
    alpha: Scalar = 2.0,
    eps: Scalar = 1e-8,
    alpha_warmup: Scalar | None = None,
    b3_warmup: Scalar | None = None,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    decay: str = "decoupled",
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformationExtraArgs:
    """AdEMAMix: AdamW with a second momentum that remembers thousands of steps.

    For long runs; use both warm-ups, over the whole run. State: 12 bytes per parameter.

    Links: `scale_by_ademamix`, `descend`.

    Args:
      learning_rate: See `optaxplus.custom_types`. 1e-3 is usual.
      b1: Decay rate of the fast mean, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      b3: Decay rate of the slow mean, in [0, 1).
      alpha: Weight of the slow mean beside the fast one. >= 0; 0 is AdamW. The paper
        uses 5 to 10 with a warm-up.
      eps: Added to the denominator. > 0.
      alpha_warmup: Steps over which alpha grows from 0. > 0, or None for none.
      b3_warmup: Steps over which b3 grows from b1. > 0, or None for none.
      weight_decay: Decay per step, >= 0, or a schedule of it; relative to the learning
        rate unless `decay` is "independent". Other than 0 it makes `update` need
        params. Static if 0.
      mask: Which parameters decay, see `optaxplus.custom_types`; None is all.
      decay: Form of the weight decay, see `optaxplus.descend`. Static.
      mu_dtype: Dtype of the means, see `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of the second moment. Static.

    Returns:
      A transformation whose update has the dtype of the gradient.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range, the mask does not fit, or `update` is
        called without the params that it needs.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = ox.ademamix(0.1)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, state = tx.update(2 * params, tx.init(params), params)
      >>> print(updates)
      [-0.10002001  0.10002001]

    References:
      Pagliardini, Ablin, Grangier, arXiv 2409.03137, Algorithm 1; defaults of
      apple/ml-ademamix.
      `optax.contrib.ademamix` has alpha = 5 and no warm-up of its own.
    """
    validation.check_learning_rate("ademamix", learning_rate)
    validation.check_weight_decay("ademamix", weight_decay)
    return chain_in_float32(
        scale_by_ademamix(
            b1,
            b2,
            b3,
            alpha=alpha,
            eps=eps,
            alpha_warmup=alpha_warmup,
            b3_warmup=b3_warmup,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
        ),
        descend(learning_rate, weight_decay, mask=mask, decay=decay),
        requires_params=None if is_zero(weight_decay) else "ademamix",
    )
