"""Sophia: clipped Newton steps with the diagonal of the Hessian."""

from collections.abc import Callable
from typing import Any

import optax

from optaxplus import validation
from optaxplus.custom_types import DTypeName, Mask, PyTree, Scalar, ScalarOrSchedule
from optaxplus.numerics.hyperparameters import is_zero
from optaxplus.transforms.chaining import chain_in_float32
from optaxplus.transforms.curvature import bind_hessian, scale_by_sophia
from optaxplus.transforms.weight_decay import descend

__all__ = ["sophia"]


def sophia(
    learning_rate: ScalarOrSchedule,
    *,
    b1: Scalar = 0.96,
    b2: Scalar = 0.99,
    gamma: Scalar = 0.01,
    eps: Scalar = 1e-12,
    weight_decay: ScalarOrSchedule = 0.1,
    mask: Mask = None,
    decay: str = "decoupled",
    update_interval: int = 10,
    first_refresh: int = 0,
    debias: bool = False,
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformationExtraArgs:
    """Sophia: AdamW's step with a diagonal of the Hessian in the denominator, clipped.

    `update` has to be given the diagonal, see `optaxplus.scale_by_sophia`:
    `hessian=lambda params: optaxplus.hutchinson(loss_fn, params, key)` (Sophia-H), or
    with `optaxplus.gauss_newton_bartlett(logits_fn, params, key)` (Sophia-G). The
    function is called in every `update_interval`-th step, with the params that `update`
    got. State: 8 bytes per parameter.

    Links: `scale_by_sophia`, `descend`.

    Args:
      learning_rate: See `optaxplus.custom_types`. The largest step of an entry; about
        that of AdamW, or somewhat less.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the diagonal, in [0, 1), per refresh.
      gamma: Scale of the diagonal, >= 0: the larger, the fewer entries are clipped.
        0.01 is usual for Sophia-H, 0.05 for Sophia-G.
      eps: Smallest denominator. > 0.
      weight_decay: Decay per step, >= 0, or a schedule of it; relative to the learning
        rate unless `decay` is "independent". Other than 0 it makes `update` need
        params. Static if 0.
      mask: Which parameters decay, see `optaxplus.custom_types`; None is all.
      decay: Form of the weight decay, see `optaxplus.descend`. Static.
      update_interval: Steps from one refresh of the diagonal to the next. >= 1. Static.
      first_refresh: Steps before the first refresh. 0 is the paper's, update_interval
        that of the authors' code. >= 0. Static.
      debias: Whether the bias of the first moment is corrected, as in optax. Static.
      mu_dtype: Dtype of the first moment, see `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of the diagonal. Static.

    Returns:
      A transformation whose update has the dtype of the gradient.

    Raises:
      TypeError: If an argument has a wrong type, a parameter is not real floating
        point, or `update` is called without `hessian`.
      ValueError: If an argument is out of range, the mask or `hessian` does not fit, or
        `update` is called without the params that it needs.

    Example:
      Sophia-G for a Flax module, with new random labels in every refresh.

      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax, optaxplus as ox
      >>> model = nn.Dense(3)
      >>> x, labels = jnp.eye(6, 4), jnp.arange(6) % 3
      >>> params = model.init(jax.random.key(0), x)
      >>> tx = ox.sophia(0.1, gamma=0.05, update_interval=5)
      >>> @jax.jit
      ... def step(params, state, key):
      ...     def loss_fn(params):
      ...         logits = model.apply(params, x)
      ...         return optax.losses.softmax_cross_entropy_with_integer_labels(
      ...             logits, labels
      ...         ).mean()
      ...
      ...     def hessian(params):
      ...         logits_fn = lambda params: model.apply(params, x)
      ...         return ox.gauss_newton_bartlett(logits_fn, params, key)
      ...
      ...     loss, grads = jax.value_and_grad(loss_fn)(params)
      ...     updates, state = tx.update(grads, state, params, hessian=hessian)
      ...     return optax.apply_updates(params, updates), state, loss
      >>> state = tx.init(params)
      >>> for key in jax.random.split(jax.random.key(1), 40):
      ...     params, state, loss = step(params, state, key)
      >>> bool(loss < 0.5)
      True

    References:
      Liu et al., Sophia, arXiv 2305.14342, Algorithm 3; the defaults are those of
      Sophia-H. `sophia(6e-4, b1=0.965, gamma=0.05, eps=1e-15, first_refresh=10)` with
      `gauss_newton_bartlett` is the authors' code with rho=0.05.
    """
    validation.check_learning_rate("sophia", learning_rate)
    validation.check_weight_decay("sophia", weight_decay)
    chain = chain_in_float32(
        scale_by_sophia(
            b1,
            b2,
            gamma=gamma,
            eps=eps,
            update_interval=update_interval,
            first_refresh=first_refresh,
            debias=debias,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
        ),
        descend(learning_rate, weight_decay, mask=mask, decay=decay),
        requires_params=None if is_zero(weight_decay) else "sophia",
    )

    def update_fn(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        hessian: PyTree | Callable[[PyTree], PyTree] = None,
        **extra_args: Any,
    ) -> tuple[PyTree, Any]:
        # The chain widens params, and a model may not take what is not its dtype.
        return chain.update(
            updates,
            state,
            params,
            hessian=bind_hessian(hessian, params),
            **extra_args,
        )

    return optax.GradientTransformationExtraArgs(chain.init, update_fn)
