"""Stochastic gradient descent with and without momentum."""

import optax

from optaxplus import trees, validation
from optaxplus.custom_types import DTypeName, PyTree, Scalar, ScalarOrSchedule
from optaxplus.numerics.hyperparameters import is_zero
from optaxplus.transforms.chaining import chain_in_float32
from optaxplus.transforms.momentum import scale_by_momentum

__all__ = ["sgd"]


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

    Args:
      learning_rate: See `optaxplus.custom_types`.
      momentum: Heavy-ball coefficient, in [0, 1). A constant gradient makes steps
        1 / (1 - momentum) times as long. 0 leaves the momentum, and with it the
        dampening and the state, out. Static if 0.
      nesterov: Whether to use Nesterov's step; needs momentum > 0, no dampening.
        Static.
      dampening: Reduces the weight of the gradient in the momentum from the second
        step on, to 1 - dampening.
      weight_decay: Coefficient of the parameters added to the gradient. >= 0. Other
        than 0 it makes `update` need params. Static if 0.
      mu_dtype: Dtype of the momentum, see `optaxplus.custom_types`. Static.

    Returns:
      A transformation whose update has the dtype of the gradient.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range, or Nesterov does not fit the others.

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
    decays = not is_zero(weight_decay)
    return chain_in_float32(
        optax.add_decayed_weights(weight_decay) if decays else optax.identity(),
        _no_momentum() if is_zero(momentum) else heavy_ball,
        optax.scale_by_learning_rate(learning_rate),
        requires_params="sgd" if decays else None,
    )


def _no_momentum() -> optax.GradientTransformation:
    """The identity, which refuses the parameters that the momentum would refuse."""

    def init_fn(params: PyTree) -> optax.EmptyState:
        trees.check_floating("sgd", params)
        return optax.EmptyState()

    return optax.GradientTransformation(init_fn, optax.identity().update)
