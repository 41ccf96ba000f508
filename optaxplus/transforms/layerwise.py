"""Steps in proportion to the size of the weights they change.

For one matrix or vector w with update u:

    trust ratio   u <- (u + λ·w) · η·‖w‖ / (‖u‖ + λ·‖w‖ + ε)
    parameter RMS u <- u · max(ε₂, RMS(w))

With λ = 0 the first is LAMB's ratio; with λ > 0 and η = 0.001 it is LARS, which takes
the norms of gradient and decay apart. Where w is zero, or the denominator is, the
ratio is 1.

Letters to arguments: λ is `weight_decay`, η is `trust_coefficient`, ε is `eps`, ε₂ is
`min_rms`.

Sources: You et al., LARS, arXiv 1708.03888, Algorithm 1; You et al., LAMB, arXiv
1904.00962, Algorithm 2 with the identity for φ; Shazeer and Stern, Adafactor, arXiv
1804.04235, section 8 (relative step size).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaxplus import trees, validation
from optaxplus.custom_types import Axes, PyTree, Scalar
from optaxplus.numerics.matrix_axes import MatrixAxes
from optaxplus.numerics.norms import block_norm, block_rms
from optaxplus.partition.inference import axes_of

__all__ = ["scale_by_param_rms", "trust_ratio"]


def _trust_ratio_leaf(
    u: jax.Array,
    p: jax.Array,
    axes: MatrixAxes,
    *,
    trust_coefficient: Scalar,
    weight_decay: Scalar,
    eps: Scalar,
) -> jax.Array:
    wide, weights = trees.widen(u), trees.widen(p).astype(trees.compute_dtype(u.dtype))
    param_norm = block_norm(weights, axes)
    denominator = block_norm(wide, axes) + weight_decay * param_norm + eps
    undefined = (param_norm == 0.0) | (denominator == 0.0)
    ratio = trust_coefficient * param_norm / jnp.where(undefined, 1.0, denominator)
    return (wide + weight_decay * weights) * jnp.where(undefined, 1.0, ratio)


def trust_ratio(
    *,
    trust_coefficient: Scalar = 1.0,
    weight_decay: Scalar = 0.0,
    eps: Scalar = 0.0,
    axes: Axes = None,
) -> optax.GradientTransformation:
    """Scales the update of every matrix or vector to the norm of its parameters.

    Each layer then moves by the same relative amount, which keeps very large batches
    stable. In a stack of layers each layer has its own ratio.

    Args:
      trust_coefficient: Relative length η of a step before the learning rate. > 0.
      weight_decay: LARS's λ: decay that enters the update and, as a norm of its own,
        the denominator. Leave it 0 where decay was added before (LAMB).
      eps: Added to the denominator, in units of the update. >= 0.
      axes: Matrix axes, see `optaxplus.custom_types`. Vectors are scaled too, as in
        optax; `optax.masked` leaves them out.

    Returns:
      A transformation without state that needs `params`; emits float32.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range, axes do not fit, or `update` is
        called without params.
    """
    name = "trust_ratio"
    validation.check_positive(name, trust_coefficient=trust_coefficient)
    validation.check_non_negative(name, weight_decay=weight_decay, eps=eps)

    def init_fn(params: PyTree) -> optax.EmptyState:
        trees.check_floating(name, params)
        axes_of(name, axes, params)
        return optax.EmptyState()

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, optax.EmptyState]:
        validation.check_params(name, params)

        def leaf(u: jax.Array, p: jax.Array, leaf_axes: MatrixAxes) -> jax.Array:
            return _trust_ratio_leaf(
                u,
                p,
                leaf_axes,
                trust_coefficient=trust_coefficient,
                weight_decay=weight_decay,
                eps=eps,
            )

        return jax.tree.map(leaf, updates, params, axes_of(name, axes, updates)), state

    return optax.GradientTransformation(init_fn, update_fn)


def scale_by_param_rms(
    *, min_rms: Scalar = 1e-3, axes: Axes = None
) -> optax.GradientTransformation:
    """Multiplies the update of every matrix or vector by the RMS of its parameters.

    Args:
      min_rms: Lower bound of the factor, so that zeros can grow. > 0.
      axes: Matrix axes, see `optaxplus.custom_types`.

    Returns:
      A transformation without state that needs `params`; emits float32.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range, axes do not fit, or `update` is
        called without params.
    """
    name = "scale_by_param_rms"
    validation.check_positive(name, min_rms=min_rms)

    def init_fn(params: PyTree) -> optax.EmptyState:
        trees.check_floating(name, params)
        axes_of(name, axes, params)
        return optax.EmptyState()

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, optax.EmptyState]:
        validation.check_params(name, params)

        def leaf(u: jax.Array, p: jax.Array, leaf_axes: MatrixAxes) -> jax.Array:
            weights = trees.widen(p).astype(trees.compute_dtype(u.dtype))
            scale = jnp.maximum(block_rms(weights, leaf_axes), min_rms)
            return trees.widen(u) * scale

        return jax.tree.map(leaf, updates, params, axes_of(name, axes, updates)), state

    return optax.GradientTransformation(init_fn, update_fn)
