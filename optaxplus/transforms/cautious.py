"""Caution: a step is taken only where the gradient of today agrees with it.

For one matrix or vector with direction u of any rule and gradient g:

    φ = [u·g > 0],      u <- u·φ / max(mean(φ), φ_min)

The division keeps the mean length of the steps; where nothing agrees there is no step.

Letters to arguments: φ_min is `min_fraction`.

Source: Liang et al., Cautious optimizers, arXiv 2411.16085, Algorithm 1, with the
normalisation of timm (the paper's listing has mean(φ) + ε).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxplus import trees, validation
from optaxplus.custom_types import Axes, PyTree, Scalar
from optaxplus.numerics.matrix_axes import MatrixAxes
from optaxplus.numerics.norms import agreement, block_mean
from optaxplus.partition.inference import axes_of

__all__ = ["CautiousState", "cautious"]


class CautiousState(NamedTuple):
    """State of `cautious`.

    Attributes:
      inner_state: State of the wrapped transformation.
    """

    inner_state: Any


def _cautious_leaf(
    u: jax.Array, g: jax.Array, axes: MatrixAxes, *, min_fraction: Scalar
) -> jax.Array:
    wide = trees.widen(u)
    agrees = agreement(wide, trees.widen(g)) > 0
    fraction = block_mean(agrees.astype(wide.real.dtype), axes)
    # Chosen and not multiplied, so that a step that is not taken may be NaN.
    return jnp.where(
        agrees | jnp.isnan(wide), wide / jnp.maximum(fraction, min_fraction), 0.0
    )


def cautious(
    inner: optax.GradientTransformation,
    *,
    min_fraction: Scalar = 1e-3,
    axes: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    """Drops the coordinates in which a direction points against the gradient.

    Stands around a direction (`scale_by_adam()`, `scale_by_lion()`), before weight
    decay and learning rate: those turn or shrink the update for reasons of their own.
    No state of its own.

    Args:
      inner: The transformation whose updates are filtered, one that keeps the sign of
        the gradient, as every `scale_by_*` does. Never a whole optimizer: that steps
        against the gradient, so that what is kept would be what goes uphill.
      min_fraction: Lower bound φ_min of the divisor, in (0, 1]: what is left grows at
        most 1 / min_fraction times.
      axes: Matrix axes, see `optaxplus.custom_types`: the fraction is that of a matrix
        or vector.

    Returns:
      A transformation with state `CautiousState`; emits float32 and passes extra
      arguments on to `inner`.

    Raises:
      TypeError: If `inner` is no transformation or an argument has a wrong type.
      ValueError: If an argument is out of range; at `init`, if axes do not fit or
        `inner` is `master_weights` or another wrapper that stands outermost.

    Example:
      >>> import optax, optaxplus as ox
      >>> tx = optax.chain(ox.cautious(ox.scale_by_lion()), ox.descend(1e-4, 0.1))

    References:
      Liang et al., arXiv 2411.16085, Algorithm 1, with timm's normalisation.
    """
    name = "cautious"
    validation.check_transformation(name, "inner", inner)
    validation.check_positive(name, min_fraction=min_fraction)
    validation.check_at_most(name, 1.0, min_fraction=min_fraction)
    wrapped = optax.with_extra_args_support(inner)

    def init_fn(params: PyTree) -> CautiousState:
        axes_of(name, axes, params)
        return CautiousState(trees.check_not_outermost(name, wrapped.init(params)))

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, CautiousState]:
        directions, inner_state = wrapped.update(
            updates, state.inner_state, params, **extra_args
        )
        kept = jax.tree.map(
            lambda *leaves: _cautious_leaf(*leaves, min_fraction=min_fraction),
            directions,
            updates,
            axes_of(name, axes, updates),
        )
        return kept, CautiousState(inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
