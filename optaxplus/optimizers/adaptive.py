"""Adam and its closest relatives."""

import optax

from optaxplus import validation
from optaxplus.custom_types import DTypeName, Mask, Scalar, ScalarOrSchedule
from optaxplus.numerics.hyperparameters import is_zero
from optaxplus.transforms.adaptive.adam import scale_by_adam
from optaxplus.transforms.adaptive.nadam import scale_by_nadam
from optaxplus.transforms.adaptive.radam import scale_by_radam
from optaxplus.transforms.chaining import chain_in_float32
from optaxplus.transforms.weight_decay import descend

__all__ = [
    "adam",
    "adamw",
    "amsgrad",
    "nadam",
    "radam",
]


def adam(
    learning_rate: ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    nesterov: bool = False,
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformationExtraArgs:
    """Adam: steps of about `learning_rate` in every coordinate.

    State: 8 bytes per parameter.

    Links: `scale_by_adam`, `descend`.

    Args:
      learning_rate: See `optaxplus.custom_types`. 1e-3 is usual.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator outside the square root. >= 0; eps and eps_root
        may not both be 0.
      eps_root: Added inside the square root. >= 0.
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
      Kingma and Ba, arXiv 1412.6980, Algorithm 1.
    """
    validation.check_learning_rate("adam", learning_rate)
    return chain_in_float32(
        scale_by_adam(
            b1,
            b2,
            eps=eps,
            eps_root=eps_root,
            nesterov=nesterov,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
        ),
        descend(learning_rate),
    )


def adamw(
    learning_rate: ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: Mask = None,
    decay: str = "decoupled",
    amsgrad: bool = False,
    nesterov: bool = False,
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformationExtraArgs:
    """Adam with decoupled weight decay: p <- p - learning_rate·(adam + weight_decay·p).

    The default of optax; language models are usually trained with b2=0.95 and
    weight_decay=0.1. State: 8 bytes per parameter (12 with amsgrad).

    Links: `scale_by_adam`, `descend`.

    Args:
      learning_rate: See `optaxplus.custom_types`. 1e-3 is usual.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator outside the square root. >= 0; eps and eps_root
        may not both be 0.
      eps_root: Added inside the square root. >= 0.
      weight_decay: Decay per step, >= 0, or a schedule of it; relative to the learning
        rate unless `decay` is "independent". Other than 0 it makes `update` need
        params. Static if 0. optax's default; PyTorch's is 1e-2.
      mask: Which parameters decay, see `optaxplus.custom_types`; None is all.
      decay: Form of the weight decay, see `optaxplus.descend`. Static.
      amsgrad: Whether to keep the largest second moment, as in PyTorch. Static.
      nesterov: Whether to look one step ahead, as in `optax.nadamw`. Static.
      mu_dtype: Dtype of the first moment, see `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of the second moment. Static.

    Returns:
      A transformation whose update has the dtype of the gradient.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range, the mask does not fit, or `update` is
        called without the params that it needs.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = ox.adamw(0.1, weight_decay=0.1)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, state = tx.update(2 * params, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates))
      [ 0.89 -1.88]

    References:
      Loshchilov and Hutter, arXiv 1711.05101, in the form of PyTorch and optax, where
      the decay is multiplied by the learning rate. The paper's decay follows the
      schedule but not the size of the learning rate: `decay="independent"` and a
      schedule for `weight_decay`.
    """
    validation.check_learning_rate("adamw", learning_rate)
    validation.check_weight_decay("adamw", weight_decay)
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
        descend(learning_rate, weight_decay, mask=mask, decay=decay),
        requires_params=None if is_zero(weight_decay) else "adamw",
    )


def amsgrad(
    learning_rate: ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformationExtraArgs:
    """AMSGrad: Adam whose second moment never falls.

    Equals `torch.optim.Adam(amsgrad=True)`. `adamw(amsgrad=True)` adds weight decay.
    State: 12 bytes per parameter.

    Links: `scale_by_adam`, `descend`.

    Args:
      learning_rate: See `optaxplus.custom_types`. 1e-3 is usual.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator outside the square root. >= 0; eps and eps_root
        may not both be 0.
      eps_root: Added inside the square root. >= 0.
      mu_dtype: Dtype of the first moment, see `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of the second moment and its maximum. Static.

    Returns:
      A transformation whose update has the dtype of the gradient.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = ox.amsgrad(0.1)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, state = tx.update(2 * params, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates))
      [ 0.9 -1.9]

    References:
      Reddi, Kale, Kumar, arXiv 1904.09237, with bias correction. Differs from
      `optax.amsgrad`, which takes the maximum after the bias correction.
    """
    validation.check_learning_rate("amsgrad", learning_rate)
    return chain_in_float32(
        scale_by_adam(
            b1,
            b2,
            eps=eps,
            eps_root=eps_root,
            amsgrad=True,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
        ),
        descend(learning_rate),
    )


def nadam(
    learning_rate: ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    momentum_decay: Scalar = 4e-3,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    decay: str = "decoupled",
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformationExtraArgs:
    """NAdam: Adam with Nesterov momentum that warms up.

    Equals `torch.optim.NAdam`, with decoupled weight decay. State: 8 bytes per
    parameter.

    Links: `scale_by_nadam`, `descend`.

    Args:
      learning_rate: See `optaxplus.custom_types`. 2e-3 is usual.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator. > 0.
      momentum_decay: How fast the momentum warms up from b1/2 to b1, see
        `optaxplus.scale_by_nadam`. >= 0.
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
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = ox.nadam(0.1)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, state = tx.update(2 * params, tx.init(params), params)
      >>> print(updates)
      [-0.10564517  0.10564517]

    References:
      Dozat, Incorporating Nesterov momentum into Adam (2016), Algorithm 8. Differs
      from `optax.nadam`, which is `adam(nesterov=True)` here.
    """
    validation.check_learning_rate("nadam", learning_rate)
    validation.check_weight_decay("nadam", weight_decay)
    return chain_in_float32(
        scale_by_nadam(
            b1,
            b2,
            eps=eps,
            momentum_decay=momentum_decay,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
        ),
        descend(learning_rate, weight_decay, mask=mask, decay=decay),
        requires_params=None if is_zero(weight_decay) else "nadam",
    )


def radam(
    learning_rate: ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    threshold: Scalar = 5.0,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    decay: str = "decoupled",
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformationExtraArgs:
    """RAdam: Adam that warms itself up.

    The first steps (five with b2 = 0.999) are momentum SGD at the same learning rate,
    long where gradients are large. Equals `torch.optim.RAdam`, with decoupled weight
    decay. State: 8 bytes per parameter.

    Links: `scale_by_radam`, `descend`.

    Args:
      learning_rate: See `optaxplus.custom_types`. 1e-3 to 1e-2 is usual.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1); with 2/3 or less nothing is ever
        rectified.
      eps: Added to the denominator before its bias correction. > 0.
      threshold: Length of the average of squares above which it is trusted, see
        `optaxplus.scale_by_radam`. > 0.
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
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = ox.radam(0.1)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, state = tx.update(2 * params, tx.init(params), params)
      >>> print(updates)
      [-0.20000003  0.40000007]

    References:
      Liu et al., arXiv 1908.03265, Algorithm 2. The authors' code skips the first steps
      instead of taking them without a denominator.
    """
    validation.check_learning_rate("radam", learning_rate)
    validation.check_weight_decay("radam", weight_decay)
    return chain_in_float32(
        scale_by_radam(
            b1,
            b2,
            eps=eps,
            threshold=threshold,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
        ),
        descend(learning_rate, weight_decay, mask=mask, decay=decay),
        requires_params=None if is_zero(weight_decay) else "radam",
    )
