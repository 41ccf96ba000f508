"""Adafactor."""

import optax

from optaxplus import validation
from optaxplus.custom_types import Axes, DTypeName, Mask, Scalar, ScalarOrSchedule
from optaxplus.transforms.chaining import chain_in_float32
from optaxplus.transforms.factored import factored_rms
from optaxplus.transforms.layerwise import scale_by_param_rms
from optaxplus.transforms.momentum import scale_by_ema

__all__ = ["adafactor"]


def adafactor(
    learning_rate: ScalarOrSchedule,
    *,
    b1: Scalar | None = None,
    decay_rate: Scalar = 0.8,
    min_dim_size_to_factor: int = 128,
    eps: Scalar = 1e-30,
    clip_threshold: Scalar = 1.0,
    multiply_by_param_rms: bool = True,
    weight_decay: Scalar = 0.0,
    mask: Mask = None,
    axes: Axes = None,
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformationExtraArgs:
    """Adafactor: Adam's denominator from one row and one column of statistics.

    The default form has no momentum and almost no state: 4·(m + n) bytes for an m × n
    matrix. Steps are relative to the RMS of the parameters, so learning rates are
    larger than Adam's. The paper's own schedule is
    `learning_rate=lambda step: jnp.minimum(1e-2, (step + 1) ** -0.5)`.

    Args:
      learning_rate: See `optaxplus.custom_types`. Relative to the RMS of the
        parameters unless `multiply_by_param_rms` is False. 1e-2 is usual.
      b1: Decay rate in [0, 1) of a moving average of the update (4 bytes per parameter
        more), or None. Static if None.
      decay_rate: Exponent of the second moment's decay rate 1 - t^(-decay_rate). > 0.
      min_dim_size_to_factor: Matrices whose shorter side is smaller keep the whole
        second moment. >= 1. Static.
      eps: Added to the squared gradient. > 0.
      clip_threshold: Largest RMS of the update of a matrix or vector before the
        learning rate. > 0.
      multiply_by_param_rms: Whether steps are relative to max(1e-3, RMS(p)). Static.
      weight_decay: Decay per step, relative to the learning rate, as everywhere in
        this library. >= 0. (`optax.adafactor` does not multiply its decay by the
        learning rate.)
      mask: Which parameters decay, see `optaxplus.custom_types`; None is all.
      axes: Matrix axes, see `optaxplus.custom_types`; experts and layers stay apart.
      mu_dtype: Dtype of the moving average, see `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of the statistics. Static.

    Returns:
      A transformation whose update has the dtype of the gradient and needs params.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not real floating
        point.
      ValueError: If an argument is out of range, axes do not fit, or `update` is
        called without params.

    References:
      Shazeer and Stern, arXiv 1804.04235. Equals `optax.adafactor` with a constant
      learning rate; optax applies the learning rate before the moving average.
    """
    validation.check_learning_rate("adafactor", learning_rate)
    validation.check_flag("adafactor", multiply_by_param_rms=multiply_by_param_rms)
    validation.check_non_negative("adafactor", weight_decay=weight_decay)
    validation.check_positive("adafactor", clip_threshold=clip_threshold)
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
        optax.identity() if b1 is None else scale_by_ema(b1, mu_dtype=mu_dtype),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
        requires_params="adafactor",
    )
