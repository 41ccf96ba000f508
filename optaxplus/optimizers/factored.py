"""Adafactor and CAME: second moments from rows and columns."""

import optax
from jax.typing import ArrayLike

from optaxplus import validation
from optaxplus.custom_types import Axes, DTypeName, Mask, Scalar, ScalarOrSchedule
from optaxplus.numerics.hyperparameters import is_zero
from optaxplus.transforms.chaining import chain_in_float32
from optaxplus.transforms.confidence import scale_by_confidence
from optaxplus.transforms.factored import factored_rms
from optaxplus.transforms.layerwise import scale_by_param_rms
from optaxplus.transforms.momentum import scale_by_ema
from optaxplus.transforms.weight_decay import descend

__all__ = ["adafactor", "came"]


def adafactor(
    learning_rate: ScalarOrSchedule,
    *,
    b1: Scalar | None = None,
    decay_rate: Scalar = 0.8,
    min_dim_size_to_factor: int = 128,
    eps: Scalar = 1e-30,
    clip_threshold: Scalar = 1.0,
    multiply_by_param_rms: bool = True,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    decay: str = "decoupled",
    axes: Axes = None,
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformationExtraArgs:
    """Adafactor: Adam's denominator from one row and one column of statistics.

    The default form has no momentum and almost no state: 4·(m + n) bytes for an m × n
    matrix. Steps are relative to the RMS of the parameters, so learning rates are
    larger than Adam's. The paper's own schedule is
    `learning_rate=lambda step: jnp.minimum(1e-2, (step + 1) ** -0.5)`.

    Links: `factored_rms`, `scale_by_param_rms`, `descend`; with b1 the learning rate
    and `scale_by_ema` come before the latter, which then has the decay alone.

    Args:
      learning_rate: See `optaxplus.custom_types`. Relative to the RMS of the
        parameters unless `multiply_by_param_rms` is False. 1e-2 is usual.
      b1: Decay rate in [0, 1) of a moving average of the steps, after the learning rate
        (4 bytes per parameter more), or None. Static if None.
      decay_rate: Exponent of the second moment's decay rate 1 - t^(-decay_rate). > 0.
      min_dim_size_to_factor: Matrices whose shorter side is smaller keep the whole
        second moment. >= 1. Static.
      eps: Added to the squared gradient. > 0.
      clip_threshold: Largest RMS of the update of a matrix or vector before the
        learning rate. > 0.
      multiply_by_param_rms: Whether steps are relative to max(1e-3, RMS(p)). Static.
      weight_decay: Decay per step, >= 0, or a schedule of it; relative to the learning
        rate unless `decay` is "independent", which is how `optax.adafactor` means it.
      mask: Which parameters decay, see `optaxplus.custom_types`; None is all.
      decay: Form of the weight decay, see `optaxplus.descend`. Static.
      axes: Matrix axes, see `optaxplus.custom_types`; experts and layers stay apart.
      mu_dtype: Dtype of the moving average, see `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of the statistics. Static.

    Returns:
      A transformation whose update has the dtype of the gradient and needs params.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not real floating
        point.
      ValueError: If an argument is out of range, axes or mask do not fit, or `update`
        is called without params.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> tx = ox.adafactor(1e-2)
      >>> params = {"kernel": jnp.ones((256, 512))}
      >>> ox.memory_report(tx, params).state
      3080

    References:
      Shazeer and Stern, arXiv 1804.04235, Algorithm 4. Equals `optax.adafactor` but for
      what is factored, see `optaxplus.factored_rms`, and the weight decay.
    """
    validation.check_learning_rate("adafactor", learning_rate)
    validation.check_flag("adafactor", multiply_by_param_rms=multiply_by_param_rms)
    validation.check_weight_decay("adafactor", weight_decay)
    validation.check_positive("adafactor", clip_threshold=clip_threshold)
    if b1 is None:
        steps = (descend(learning_rate, weight_decay, mask=mask, decay=decay),)
    else:
        # The average is one of steps, their lengths included.
        relative_decay = _relative(weight_decay, learning_rate, decay)
        steps = (
            optax.scale_by_learning_rate(learning_rate, flip_sign=False),
            scale_by_ema(b1, mu_dtype=mu_dtype),
            descend(1.0, relative_decay, mask=mask, decay=decay),
        )
    return chain_in_float32(
        factored_rms(
            decay_rate=decay_rate,
            min_dim_size_to_factor=min_dim_size_to_factor,
            eps=eps,
            clip_threshold=clip_threshold,
            axes=axes,
            nu_dtype=nu_dtype,
        ),
        scale_by_param_rms(axes=axes) if multiply_by_param_rms else optax.identity(),
        *steps,
        requires_params="adafactor",
    )


def _relative(
    weight_decay: ScalarOrSchedule, learning_rate: ScalarOrSchedule, decay: str
) -> ScalarOrSchedule:
    """The decay of a step that has its learning rate already."""
    if is_zero(weight_decay) or decay == "independent":
        return weight_decay
    if not callable(weight_decay) and not callable(learning_rate):
        return weight_decay * learning_rate

    def at(value: ScalarOrSchedule, step: ArrayLike) -> ArrayLike:
        return value(step) if callable(value) else value

    return lambda step: at(weight_decay, step) * at(learning_rate, step)


def came(
    learning_rate: ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    b3: Scalar = 0.9999,
    eps: Scalar = 1e-30,
    eps_confidence: Scalar = 1e-16,
    clip_threshold: Scalar = 1.0,
    min_dim_size_to_factor: int = 1,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    decay: str = "decoupled",
    axes: Axes = None,
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformationExtraArgs:
    """CAME: Adafactor with momentum, which trusts updates that agree with it.

    Neither second moments nor confidence are corrected for their start from zero, so
    the first steps of a matrix are about 10 times `learning_rate` long and reach its
    length after a thousand or so: use a warm-up. Rounded to bfloat16, b2 and b3 are 1
    and steps much too long, so `optax.inject_hyperparams` needs hyperparam_dtype.
    State: 4 bytes per parameter, and two rows and two columns a matrix.

    Links: `factored_rms`, `scale_by_confidence`, `descend`.

    Args:
      learning_rate: See `optaxplus.custom_types`. 1e-4 to 1e-3 is usual.
      b1: Decay rate of the average of the updates, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      b3: Decay rate of the squared distance from the average, in [0, 1).
      eps: Added to the squared gradient. > 0.
      eps_confidence: Added to the squared distance. > 0.
      clip_threshold: Largest RMS of the update of a matrix or vector before it is
        averaged. > 0.
      min_dim_size_to_factor: Matrices whose shorter side is smaller keep the whole
        second moment and are averaged only. >= 1. Static.
      weight_decay: Decay per step, >= 0, or a schedule of it; relative to the learning
        rate unless `decay` is "independent". Other than 0 it makes `update` need
        params. Static if 0.
      mask: Which parameters decay, see `optaxplus.custom_types`; None is all.
      decay: Form of the weight decay, see `optaxplus.descend`. Static.
      axes: Matrix axes, see `optaxplus.custom_types`; experts and layers stay apart.
      mu_dtype: Dtype of the average, see `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of the statistics. Static.

    Returns:
      A transformation whose update has the dtype of the gradient.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not real floating
        point.
      ValueError: If an argument is out of range, axes or mask do not fit, or `update`
        is called without the params that it needs.

    Example:
      >>> import optax, optaxplus as ox
      >>> schedule = optax.linear_schedule(0.0, 2e-4, transition_steps=1000)
      >>> tx = ox.came(schedule, weight_decay=0.1, mask=ox.decay_mask)

    References:
      Luo et al., arXiv 2307.02047, Algorithm 2; the authors' package came-pytorch
      0.1.3.
    """
    validation.check_learning_rate("came", learning_rate)
    validation.check_weight_decay("came", weight_decay)
    validation.check_decay_rate("came", b2=b2)
    validation.check_positive(
        "came", clip_threshold=clip_threshold, eps_confidence=eps_confidence
    )
    return chain_in_float32(
        factored_rms(
            b2=b2,
            min_dim_size_to_factor=min_dim_size_to_factor,
            eps=eps,
            clip_threshold=clip_threshold,
            axes=axes,
            nu_dtype=nu_dtype,
        ),
        scale_by_confidence(
            b1,
            b3,
            eps=eps_confidence,
            min_dim_size_to_factor=min_dim_size_to_factor,
            axes=axes,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
        ),
        descend(learning_rate, weight_decay, mask=mask, decay=decay),
        requires_params=None if is_zero(weight_decay) else "came",
    )
