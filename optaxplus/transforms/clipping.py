"""Clipping: updates that are too long are shortened, never turned.

    global norm:   u = g · min(1, c / ‖g‖)            ‖g‖ over all leaves together
    update RMS:    u = g / max(1, RMS(g) / d)         RMS over one matrix or vector

Letters to arguments: c is `max_norm`, d is `threshold`.

Sources: Pascanu et al., arXiv 1211.5063; Shazeer and Stern, Adafactor, arXiv
1804.04235, section 6 (update clipping).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaxplus import trees, validation
from optaxplus.custom_types import Axes, PyTree, Scalar
from optaxplus.numerics.matrix_axes import MatrixAxes
from optaxplus.numerics.norms import abs_square, block_rms
from optaxplus.partition.inference import axes_of

__all__ = ["clip_by_global_norm", "clip_update_rms"]


def clip_by_global_norm(max_norm: Scalar) -> optax.GradientTransformation:
    """Shortens the whole gradient to length `max_norm` where it is longer.

    The semantics of `optax.clip_by_global_norm`, written as one multiplication of each
    leaf by a scalar, which XLA fuses into whatever follows: the clipped gradient is
    never stored. Inside `optax.partition` the norm would be that of the group; clip
    outside, or use the `clip_norm` of the named optimizers.

    Args:
      max_norm: Largest Euclidean norm of all leaves together, in units of the
        gradient. > 0.

    Returns:
      A transformation without state; emits float32. Squares are summed in float32:
      where they overflow (a norm above 1.8e19) the update is 0, and a NaN anywhere
      makes every leaf NaN, as in optax.

    Raises:
      TypeError: If `max_norm` is not a number or a parameter is not floating point.
      ValueError: If `max_norm` is not finite and > 0.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> grads = {"w": jnp.array([3.0]), "b": jnp.array([-4.0])}
      >>> tx = ox.clip_by_global_norm(1.0)
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> print(updates["w"], updates["b"])
      [0.6] [-0.8]

    References:
      Pascanu et al., arXiv 1211.5063, Algorithm 1.
    """
    validation.check_positive("clip_by_global_norm", max_norm=max_norm)

    def init_fn(params: PyTree) -> optax.EmptyState:
        trees.check_floating("clip_by_global_norm", params)
        return optax.EmptyState()

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, optax.EmptyState]:
        del params
        wide = jax.tree.map(trees.widen, updates)
        squares = [jnp.sum(abs_square(g)) for g in jax.tree.leaves(wide)]
        norm = jnp.sqrt(sum(squares, start=jnp.zeros([], jnp.float32)))
        scale = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda g: g * trees.scalar_for(scale, g), wide), state

    return optax.GradientTransformation(init_fn, update_fn)


def clip_update_rms(
    threshold: Scalar = 1.0, *, axes: Axes = None
) -> optax.GradientTransformation:
    """Shortens the update of every matrix or vector whose RMS exceeds `threshold`.

    Args:
      threshold: Largest root mean square, in units of the update. > 0.
      axes: Matrix axes, see `optaxplus.custom_types`. Vectors are clipped too.

    Returns:
      A transformation without state; emits float32.

    Raises:
      TypeError: If `threshold` is not a number or a parameter is not floating point.
      ValueError: If `threshold` is not finite and > 0, or axes do not fit.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> grads = {"b1": jnp.array([1.0, -7.0]), "b2": jnp.array([0.5])}
      >>> tx = ox.clip_update_rms(1.0)
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> print(updates["b1"], updates["b2"])
      [ 0.2 -1.4] [0.5]

    References:
      Shazeer and Stern, arXiv 1804.04235, section 6.
    """
    name = "clip_update_rms"
    validation.check_positive(name, threshold=threshold)

    def init_fn(params: PyTree) -> optax.EmptyState:
        trees.check_floating(name, params)
        axes_of(name, axes, params)
        return optax.EmptyState()

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, optax.EmptyState]:
        del params

        def leaf(u: jax.Array, leaf_axes: MatrixAxes) -> jax.Array:
            wide = trees.widen(u)
            return wide / jnp.maximum(1.0, block_rms(wide, leaf_axes) / threshold)

        return jax.tree.map(leaf, updates, axes_of(name, axes, updates)), state

    return optax.GradientTransformation(init_fn, update_fn)
