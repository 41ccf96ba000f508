"""Optimizers around an average of the parameters."""

import optax

from optaxplus import validation
from optaxplus.custom_types import Axes, DTypeName, Mask, Scalar, ScalarOrSchedule
from optaxplus.transforms.adaptive.radam import scale_by_radam
from optaxplus.transforms.averaging import lookahead
from optaxplus.transforms.centralization import centralize
from optaxplus.transforms.chaining import chain_in_float32
from optaxplus.transforms.weight_decay import descend

__all__ = [
    "ranger",
]


def ranger(
    learning_rate: ScalarOrSchedule,
    *,
    b1: Scalar = 0.95,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-5,
    threshold: Scalar = 5.0,
    every_k: int = 6,
    alpha: Scalar = 0.5,
    gradient_centralization: bool = True,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    decay: str = "decoupled",
    axes: Axes = None,
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformationExtraArgs:
    """Ranger: RAdam inside Lookahead, with centralized gradients.

    State: 12 bytes per parameter.

    Links: `centralize`, `scale_by_radam`, `descend`, all of them in `lookahead`.

    Args:
      learning_rate: See `optaxplus.custom_types`. 1e-3 to 1e-2 is usual: Lookahead
        halves the way, and the first steps are short where gradients are.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator before its bias correction. > 0.
      threshold: See `optaxplus.scale_by_radam`. > 0.
      every_k: Steps between synchronisations of the slow parameters. >= 1. Static.
      alpha: How far the slow parameters follow, in (0, 1].
      gradient_centralization: Whether the gradient of a matrix loses its mean over the
        inputs, as since 2020. Static.
      weight_decay: Decay per step, >= 0, or a schedule of it; relative to the learning
        rate unless `decay` is "independent". Other than 0 it makes `update` need
        params. Static if 0.
      mask: Which parameters decay, see `optaxplus.custom_types`; None is all.
      decay: Form of the weight decay, see `optaxplus.descend`. Static.
      axes: Matrix axes of the centralization, see `optaxplus.custom_types`.
      mu_dtype: Dtype of the first moment, see `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of the second moment. Static.

    Returns:
      A transformation whose update has the dtype of the gradient and needs params.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range, axes or mask do not fit, or `update`
        is called without the params that it needs.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = ox.ranger(1e-2)
      >>> params = {"kernel": jnp.ones((4, 8))}
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
      >>> slow = optax.tree.get(state, "slow")  # For evaluation.

    References:
      Wright, Ranger (2019, with gradient centralization 2020),
      lessw2020/Ranger-Deep-Learning-Optimizer; Liu et al., arXiv 1908.03265; Zhang et
      al., arXiv 1907.08610; Yong et al., arXiv 2004.01461.
    """
    validation.check_learning_rate("ranger", learning_rate)
    validation.check_weight_decay("ranger", weight_decay)
    validation.check_flag("ranger", gradient_centralization=gradient_centralization)
    radam = optax.chain(
        centralize(axes=axes) if gradient_centralization else optax.identity(),
        scale_by_radam(
            b1,
            b2,
            eps=eps,
            threshold=threshold,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
        ),
        descend(learning_rate, weight_decay, mask=mask, decay=decay),
    )
    return chain_in_float32(
        lookahead(radam, every_k=every_k, alpha=alpha), requires_params="ranger"
    )
