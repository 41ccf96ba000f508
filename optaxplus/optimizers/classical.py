"""Before Adam: SGD with its momenta, AdaGrad, RMSProp."""

import optax

from optaxplus import validation
from optaxplus.custom_types import DTypeName, Scalar, ScalarOrSchedule
from optaxplus.numerics.hyperparameters import is_zero
from optaxplus.transforms.adaptive.adagrad import scale_by_adagrad
from optaxplus.transforms.adaptive.rmsprop import scale_by_rmsprop
from optaxplus.transforms.chaining import chain_in_float32
from optaxplus.transforms.momentum import scale_by_momentum
from optaxplus.transforms.weight_decay import descend

__all__ = [
    "adagrad",
    "rmsprop",
    "sgd",
]


def sgd(
    learning_rate: ScalarOrSchedule,
    *,
    momentum: Scalar = 0.0,
    nesterov: bool = False,
    dampening: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    mu_dtype: DTypeName = "float32",
) -> optax.GradientTransformationExtraArgs:
    """Stochastic gradient descent, equal to `torch.optim.SGD`.

    Weight decay is the L2 kind: it is added to the gradient and passes through the
    momentum. State: 4 bytes per parameter with momentum, none without.

    Links: decay, `scale_by_momentum`, `descend`.

    Args:
      learning_rate: See `optaxplus.custom_types`.
      momentum: Heavy-ball coefficient, in [0, 1). A constant gradient makes steps
        1 / (1 - momentum) times as long. 0 leaves the momentum, and with it the
        dampening and the state, out. Static if 0.
      nesterov: Whether to use Nesterov's step; needs momentum > 0, no dampening.
        Static.
      dampening: Reduces the weight of the gradient in the momentum from the second step
        on, to 1 - dampening. >= 0.
      weight_decay: Coefficient of the parameters added to the gradient. >= 0. Other
        than 0 it makes `update` need params. Static if 0.
      mu_dtype: Dtype of the momentum, see `optaxplus.custom_types`. Static.

    Returns:
      A transformation whose update has the dtype of the gradient.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range, Nesterov does not fit the others, or
        `update` is called without the params that it needs.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = ox.sgd(0.1, momentum=0.9)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, state = tx.update(2 * params, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates))
      [ 0.8 -1.6]

    References:
      Robbins and Monro (1951); Polyak (1964); Sutskever et al. (2013).
    """
    validation.check_learning_rate("sgd", learning_rate)
    validation.check_non_negative("sgd", weight_decay=weight_decay)
    # Made in any case, so that its arguments are checked.
    heavy_ball = scale_by_momentum(
        momentum, nesterov=nesterov, dampening=dampening, mu_dtype=mu_dtype
    )
    return chain_in_float32(
        _coupled_decay(weight_decay),
        optax.identity() if is_zero(momentum) else heavy_ball,
        descend(learning_rate),
        requires_params=None if is_zero(weight_decay) else "sgd",
    )


def adagrad(
    learning_rate: ScalarOrSchedule,
    *,
    initial_accumulator: Scalar = 0.0,
    eps: Scalar = 1e-10,
    eps_root: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformationExtraArgs:
    """AdaGrad: step lengths that only fall, faster where gradients are large.

    For sparse features and convex problems; on long runs its steps vanish. Equals
    `torch.optim.Adagrad`, whose `lr_decay` is the schedule `lambda step:
    learning_rate / (1 + step * lr_decay)`. State: 4 bytes per parameter.

    Links: decay, `scale_by_adagrad`, `descend`.

    Args:
      learning_rate: See `optaxplus.custom_types`. 1e-2 is usual.
      initial_accumulator: What the sum of squares starts from. >= 0.
      eps: Added to the denominator outside the square root. >= 0; eps and eps_root
        may not both be 0.
      eps_root: Added inside the square root. >= 0.
      weight_decay: Coefficient of the parameters added to the gradient (the L2 kind).
        >= 0. Other than 0 it makes `update` need params. Static if 0.
      nu_dtype: Dtype of the sum, see `optaxplus.custom_types`. Static.

    Returns:
      A transformation whose update has the dtype of the gradient.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range, or `update` is called without the
        params that it needs.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = ox.adagrad(0.1)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, state = tx.update(2 * params, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates))
      [ 0.9 -1.9]

    References:
      Duchi, Hazan, Singer, JMLR 12 (2011). `optax.adagrad` is
      `adagrad(initial_accumulator=0.1, eps=0.0, eps_root=1e-7)`.
    """
    validation.check_learning_rate("adagrad", learning_rate)
    validation.check_non_negative("adagrad", weight_decay=weight_decay)
    return chain_in_float32(
        _coupled_decay(weight_decay),
        scale_by_adagrad(
            initial_accumulator=initial_accumulator,
            eps=eps,
            eps_root=eps_root,
            nu_dtype=nu_dtype,
        ),
        descend(learning_rate),
        requires_params=None if is_zero(weight_decay) else "adagrad",
    )


def rmsprop(
    learning_rate: ScalarOrSchedule,
    *,
    b2: Scalar = 0.99,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    centered: bool = False,
    momentum: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformationExtraArgs:
    """RMSProp: gradients relative to their recent size.

    The classic choice for recurrent networks and reinforcement learning. Equals
    `torch.optim.RMSprop`. State: 4 bytes per parameter, 4 more with momentum, 4 more
    if centered.

    Links: decay, `scale_by_rmsprop`, `scale_by_momentum`, `descend`.

    Args:
      learning_rate: See `optaxplus.custom_types`. 1e-3 to 1e-2 is usual.
      b2: Decay rate of the averages, in [0, 1).
      eps: Added to the denominator outside the square root. >= 0; eps and eps_root
        may not both be 0.
      eps_root: Added inside the square root. >= 0.
      centered: Whether the denominator is the standard deviation. Static.
      momentum: Heavy-ball coefficient of the steps, in [0, 1). Static if 0.
      weight_decay: Coefficient of the parameters added to the gradient (the L2 kind).
        >= 0. Other than 0 it makes `update` need params. Static if 0.
      mu_dtype: Dtype of mean and momentum, see `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of the mean square. Static.

    Returns:
      A transformation whose update has the dtype of the gradient.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range, or `update` is called without the
        params that it needs.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = ox.rmsprop(0.01)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, state = tx.update(2 * params, tx.init(params), params)
      >>> print(updates)
      [-0.09999999  0.09999999]

    References:
      Tieleman and Hinton, lecture 6.5 (2012). `optax.rmsprop` is `rmsprop(b2=0.9,
      eps=0.0, eps_root=1e-8)`; with momentum its learning rate enters before the
      momentum.
    """
    validation.check_learning_rate("rmsprop", learning_rate)
    validation.check_non_negative("rmsprop", weight_decay=weight_decay)
    # Made in any case, so that its arguments are checked.
    heavy_ball = scale_by_momentum(momentum, mu_dtype=mu_dtype)
    return chain_in_float32(
        _coupled_decay(weight_decay),
        scale_by_rmsprop(
            b2,
            eps=eps,
            eps_root=eps_root,
            centered=centered,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
        ),
        optax.identity() if is_zero(momentum) else heavy_ball,
        descend(learning_rate),
        requires_params=None if is_zero(weight_decay) else "rmsprop",
    )


def _coupled_decay(weight_decay: Scalar) -> optax.GradientTransformation:
    """Decay that is part of the gradient; nothing where it is known to be 0."""
    if is_zero(weight_decay):
        return optax.identity()
    return optax.add_decayed_weights(weight_decay)
