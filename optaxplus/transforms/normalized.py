"""Second moments of orthogonalized updates: of a neuron, or of an entry.

Orthogonalization makes all singular values 1, not all rows and columns, nor entries.
For O, the polar factor of a momentum, the update of the same matrix is

    NorMuon    v <- β₂·v + (1 - β₂)·mean(O²)  over the inputs of each output neuron
               U = O / (√v + ε)
               u = U · ‖O‖ / ‖U‖
    AdaMuon    v <- β₂·v + (1 - β₂)·O²
               U = O / (√v + ε)
               u = U · √min(fan_in, fan_out) / ‖U‖

Neither average is corrected for its bias, which the norm that follows takes out again.

Letters to arguments: β₂ is `b2`, ε is `eps`, v is `nu`.

Sources: Li et al., NorMuon, arXiv 2510.05491, and zichongli5/NorMuon; Si et al.,
AdaMuon, arXiv 2507.11005, and Chongjie-Si/AdaMuon.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxplus import trees, validation
from optaxplus.custom_types import Axes, DTypeName, PyTree, Scalar
from optaxplus.numerics.hyperparameters import as_decay_rate, as_epsilon
from optaxplus.numerics.matrix_axes import (
    MatrixAxes,
    reduce_blocks,
    resolve_axes,
    scale_matrices,
)
from optaxplus.numerics.moving_averages import mix
from optaxplus.numerics.norms import block_norm, mean_square, mix_square
from optaxplus.transforms.orthogonalized import matrix_axes_of

__all__ = [
    "NormalizeNeuronsState",
    "ScaleByAdamuonState",
    "normalize_neurons",
    "scale_by_adamuon",
]


class NormalizeNeuronsState(NamedTuple):
    """State of `normalize_neurons`.

    Attributes:
      nu: Mean square v of every neuron; like the parameters, in `nu_dtype`, with the
        axes of fan_in of size 1.
    """

    nu: PyTree


def normalize_neurons(
    b2: Scalar = 0.95,
    *,
    eps: Scalar = 1e-10,
    nu_dtype: DTypeName = "float32",
    axes: Axes = None,
) -> optax.GradientTransformation:
    """Gives all neurons of a matrix the same root mean square, on average over time.

    Comes after an orthogonalization, whose Frobenius norm it keeps.

    Args:
      b2: Decay rate β₂ of the mean squares, in [0, 1).
      eps: Added to the denominators. > 0.
      nu_dtype: Dtype of the mean squares, see `optaxplus.custom_types`. Static.
      axes: Matrix axes, see `optaxplus.custom_types`. A neuron is an index of fan_out.

    Returns:
      A transformation with state `NormalizeNeuronsState`; emits float32.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not real floating
        point.
      ValueError: If an argument is out of range, axes do not fit, or a parameter is a
        vector.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = optax.chain(
      ...     ox.scale_by_ema(0.95),
      ...     ox.orthogonalize_via_newton_schulz(),
      ...     ox.normalize_neurons(),
      ... )
      >>> tx.init({"kernel": jnp.ones((4, 8))})[2].nu["kernel"].shape
      (1, 8)

    References:
      NorMuon, arXiv 2510.05491, algorithm 1. microsoft/dion has eps=1e-8;
      modded-nanogpt and NVIDIA's Emerging-Optimizers take the mean over the longer
      side, inputs or outputs.
    """
    name = "normalize_neurons"
    validation.check_decay_rate(name, b2=b2)
    validation.check_positive(name, eps=eps)
    validation.check_floating_dtype(name, nu_dtype=nu_dtype)
    b2, eps = as_decay_rate(b2), as_epsilon(eps)

    def init_fn(params: PyTree) -> NormalizeNeuronsState:
        trees.check_floating(name, params, real=True)

        def of_neurons(zeros: jax.Array, leaf_axes: MatrixAxes) -> jax.Array:
            fan_in = resolve_axes(leaf_axes, zeros.shape).fan_in
            return jnp.sum(zeros, axis=fan_in, keepdims=True)

        zeros = trees.init_moment(name, params, nu_dtype)
        resolved = matrix_axes_of(name, axes, params)
        return NormalizeNeuronsState(jax.tree.map(of_neurons, zeros, resolved))

    def leaf(
        o: jax.Array, nu: jax.Array, leaf_axes: MatrixAxes
    ) -> tuple[jax.Array, jax.Array]:
        o = trees.widen(o)
        fan_in = resolve_axes(leaf_axes, o.shape).fan_in
        nu = mix(b2, nu.astype(o.dtype), mean_square(o, fan_in))
        u = o / (jnp.sqrt(nu) + eps)
        # Finite, so that 0·norm is 0, also where a square overflows.
        norm = jnp.minimum(block_norm(o, leaf_axes), jnp.finfo(o.dtype).max)
        return u / (block_norm(u, leaf_axes) + eps) * norm, nu

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, NormalizeNeuronsState]:
        del params
        resolved = matrix_axes_of(name, axes, updates)
        updates, nu = trees.map_several(leaf, 2, updates, state.nu, resolved)
        return updates, NormalizeNeuronsState(trees.cast_like(nu, state.nu))

    return optax.GradientTransformation(init_fn, update_fn)


class ScaleByAdamuonState(NamedTuple):
    """State of `scale_by_adamuon`.

    Attributes:
      nu: Average v of the squares; like the parameters, in `nu_dtype`.
    """

    nu: PyTree


def scale_by_adamuon(
    b2: Scalar = 0.999,
    *,
    eps: Scalar = 1e-8,
    nu_dtype: DTypeName = "float32",
    axes: Axes = None,
) -> optax.GradientTransformation:
    """Divides an orthogonalized update by the root mean square of each entry over time.

    The result has the Frobenius norm of an exactly orthogonal matrix, so the scales of
    `scale_by_matrix_shape` mean what they mean for Muon.

    Args:
      b2: Decay rate β₂ of the squares, in [0, 1).
      eps: Added to the denominators. > 0.
      nu_dtype: Dtype of the squares, see `optaxplus.custom_types`. Static.
      axes: Matrix axes, see `optaxplus.custom_types`.

    Returns:
      A transformation with state `ScaleByAdamuonState`; emits float32.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not real floating
        point.
      ValueError: If an argument is out of range, axes do not fit, or a parameter is a
        vector.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = optax.chain(
      ...     ox.scale_by_ema(0.95),
      ...     ox.orthogonalize_via_newton_schulz(),
      ...     ox.scale_by_adamuon(),
      ... )
      >>> tx.init({"kernel": jnp.ones((4, 8))})[2].nu["kernel"].shape
      (4, 8)

    References:
      AdaMuon, arXiv 2507.11005.
    """
    name = "scale_by_adamuon"
    validation.check_decay_rate(name, b2=b2)
    validation.check_positive(name, eps=eps)
    validation.check_floating_dtype(name, nu_dtype=nu_dtype)
    b2, eps = as_decay_rate(b2), as_epsilon(eps)

    def init_fn(params: PyTree) -> ScaleByAdamuonState:
        trees.check_floating(name, params, real=True)
        matrix_axes_of(name, axes, params)
        return ScaleByAdamuonState(trees.init_moment(name, params, nu_dtype))

    def leaf(
        o: jax.Array, nu: jax.Array, leaf_axes: MatrixAxes
    ) -> tuple[jax.Array, jax.Array]:
        o = trees.widen(o)
        nu = mix_square(b2, nu.astype(o.dtype), o)

        def sum_of_squares(u: jax.Array, over: tuple[int, ...]) -> jax.Array:
            return jnp.sum(jnp.square(u), axis=over, keepdims=True)

        u = o / (jnp.sqrt(nu) + eps)
        norm = jnp.sqrt(reduce_blocks(sum_of_squares, u, leaf_axes))
        # To the norm of a polar factor.
        u = scale_matrices(u / (norm + eps), leaf_axes, lambda *s: math.sqrt(min(s)))
        return u, nu

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, ScaleByAdamuonState]:
        del params
        resolved = matrix_axes_of(name, axes, updates)
        updates, nu = trees.map_several(leaf, 2, updates, state.nu, resolved)
        return updates, ScaleByAdamuonState(trees.cast_like(nu, state.nu))

    return optax.GradientTransformation(init_fn, update_fn)
