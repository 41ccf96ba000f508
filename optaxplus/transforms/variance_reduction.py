"""Variance reduction: gradients corrected by how they changed since the last step.

    c_t = g_t + γ·β₁/(1 - β₁)·(g_t - g_{t-1}),  g_0 = 0
    c_t <- c_t / max(1, ‖c_t‖/c_max)                     for each matrix or vector

Letters to arguments: γ is `gamma`, β₁ is `b1`, c_max is `max_norm`; g_{t-1} is the
state's `previous_grads`.

Source: Yuan et al., MARS, arXiv 2411.10438, equations 2.3 and 2.4 in the approximate
form (the last gradient instead of the last parameters' gradient on today's batch), and
the authors' code (AGI-Arena/MARS).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxplus import trees, validation
from optaxplus.custom_types import Axes, DTypeName, PyTree, Scalar
from optaxplus.numerics.hyperparameters import as_decay_rate
from optaxplus.numerics.matrix_axes import MatrixAxes
from optaxplus.numerics.norms import block_norm
from optaxplus.partition.inference import axes_of

__all__ = ["MarsCorrectionState", "mars_correction"]


class MarsCorrectionState(NamedTuple):
    """State of `mars_correction`.

    Attributes:
      previous_grads: The last gradient; like the parameters, in `mu_dtype`.
    """

    previous_grads: PyTree


def _mars_leaf(
    g: jax.Array,
    previous: jax.Array,
    axes: MatrixAxes,
    *,
    gain: Scalar,
    max_norm: Scalar | None,
) -> tuple[jax.Array, jax.Array]:
    """One leaf: (c, g). `gain` is γ·β₁/(1 - β₁)."""
    wide = trees.widen(g)
    c = wide + gain * (wide - previous.astype(wide.dtype))
    if max_norm is not None:
        norm = block_norm(c, axes)
        c = c * jnp.where(norm > max_norm, max_norm / norm, 1.0)
    return c, wide.astype(previous.dtype)


def mars_correction(
    *,
    gamma: Scalar = 0.025,
    b1: Scalar = 0.95,
    max_norm: Scalar | None = 1.0,
    axes: Axes = None,
    mu_dtype: DTypeName = "float32",
) -> optax.GradientTransformation:
    """Extrapolates the gradient along its last change, before any rule with momentum.

    State: 4 bytes per parameter.

    Args:
      gamma: Strength of the correction. >= 0; 0 leaves the clipping alone.
      b1: Decay rate of the momentum that follows, in [0, 1).
      max_norm: Largest norm of a matrix or vector, > 0, or None for no clipping.
        Static if None.
      axes: Matrix axes, see `optaxplus.custom_types`.
      mu_dtype: Dtype of the last gradient, see `optaxplus.custom_types`. Static.

    Returns:
      A transformation with state `MarsCorrectionState`; emits float32. Where the
      squares of a block overflow float32 (a norm above 1.8e19) its update is 0.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range or axes do not fit.

    Example:
      >>> import optax, optaxplus as ox
      >>> tx = optax.chain(
      ...     ox.mars_correction(), ox.scale_by_lion(0.95, 0.95), ox.descend(3e-4, 0.1)
      ... )

    References:
      Yuan et al., arXiv 2411.10438, equations 2.3 and 2.4; AGI-Arena/MARS with
      `is_approx=True`.
    """
    name = "mars_correction"
    validation.check_non_negative(name, gamma=gamma)
    validation.check_decay_rate(name, b1=b1)
    if max_norm is not None:
        validation.check_positive(name, max_norm=max_norm)
    validation.check_floating_dtype(name, mu_dtype=mu_dtype)
    b1 = as_decay_rate(b1)
    gain = gamma * b1 / (1 - b1)

    def init_fn(params: PyTree) -> MarsCorrectionState:
        axes_of(name, axes, params)
        return MarsCorrectionState(trees.init_moment(name, params, mu_dtype))

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, MarsCorrectionState]:
        del params
        updates, previous = trees.map_several(
            lambda *leaves: _mars_leaf(*leaves, gain=gain, max_norm=max_norm),
            2,
            updates,
            state.previous_grads,
            axes_of(name, axes, updates),
        )
        return updates, MarsCorrectionState(previous)

    return optax.GradientTransformation(init_fn, update_fn)
