"""Second moments from row and column statistics.

For a matrix gradient G of shape (fan_in, fan_out), with β_t = 1 - t^(-γ):

    R_t = β_t·R_{t-1} + (1 - β_t)·(mean over fan_out of G² + ε₁)       one a row
    C_t = β_t·C_{t-1} + (1 - β_t)·(mean over fan_in  of G² + ε₁)       one a column
    V̂_t = R_t·C_t / mean(R_t),     U = G / sqrt(V̂_t)

and, where updates are clipped, U <- U / max(1, RMS(U) / d) with

    RMS(U)² = mean over rows of (mean(R_t) / R_t · mean over fan_out of G² / C_t)

Vectors, and matrices with a side shorter than a threshold, keep all of V. β_1 = 0, so
no bias correction is needed.

Letters to arguments: γ is `decay_rate`, ε₁ is `eps`, d is `clip_threshold`; R, C, V are
the state's `nu_row`, `nu_col`, `nu`.

Source: Shazeer and Stern, Adafactor, arXiv 1804.04235, Algorithm 4, written with means
instead of sums, which leaves V̂ the same. Differs from optax in what is factored: the
matrix of `axes`, not the two largest axes, so experts and layers are never mixed.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxplus import trees, validation
from optaxplus.custom_types import Axes, DTypeName, PyTree, Scalar
from optaxplus.numerics.explicit_axes import left_to_compiler
from optaxplus.numerics.factored_squares import (
    collapsed,
    factor_squares,
    init_factors,
    inverse_root_factors,
    is_factored,
    mean_square_of_scaled,
    spread_rows,
)
from optaxplus.numerics.hyperparameters import as_decay_rate, as_epsilon
from optaxplus.numerics.matrix_axes import (
    MatrixAxes,
    from_matrices,
    to_matrices,
)
from optaxplus.numerics.moving_averages import mix
from optaxplus.numerics.norms import abs_square, block_mean
from optaxplus.partition.inference import axes_of

__all__ = ["FactoredRmsState", "factored_rms"]


class FactoredRmsState(NamedTuple):
    """State of `factored_rms`.

    All fields but `count` have the parameters' tree and rank, in `nu_dtype`; where a
    leaf does not use a field, all of its axes have size 1 there.

    Attributes:
      count: Finished updates; shape (), int32.
      nu_row: Row statistics R; the axes of fan_out have size 1. With splits the first
        of them has one entry a split.
      nu_col: Column statistics C; the axes of fan_in have size 1.
      nu: Mean square V of leaves that are not factored; like the parameters.
    """

    count: jax.Array
    nu_row: PyTree
    nu_col: PyTree
    nu: PyTree


def _factored_leaf(
    g: jax.Array,
    nu_row: jax.Array,
    nu_col: jax.Array,
    axes: MatrixAxes,
    *,
    decay: Scalar,
    eps: Scalar,
    clip_threshold: Scalar | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One factored leaf: (U, R, C), everything seen as (*batch, fan_in, fan_out)."""
    matrices = to_matrices(trees.widen(g), axes)
    rows = to_matrices(trees.widen(nu_row), axes)
    columns = to_matrices(trees.widen(nu_col), axes)
    rows, columns = factor_squares(
        matrices, rows, columns, axes.splits, decay=decay, eps=eps
    )
    row_factors, column_factors = inverse_root_factors(rows, columns)
    if clip_threshold is not None:
        mean_square = mean_square_of_scaled(matrices, row_factors, columns, axes.splits)
        row_factors = row_factors * _clip_scale(mean_square, clip_threshold)
    updates = matrices * spread_rows(row_factors, axes.splits) * column_factors
    return (
        from_matrices(updates, axes, g.shape),
        from_matrices(rows, axes, nu_row.shape).astype(nu_row.dtype),
        from_matrices(columns, axes, nu_col.shape).astype(nu_col.dtype),
    )


def _full_leaf(
    g: jax.Array,
    nu: jax.Array,
    axes: MatrixAxes,
    *,
    decay: Scalar,
    eps: Scalar,
    clip_threshold: Scalar | None,
) -> tuple[jax.Array, jax.Array]:
    """One leaf that keeps all of V: (U, V)."""
    wide = trees.widen(g)
    v = mix(decay, trees.widen(nu), abs_square(wide) + eps)
    updates = wide * jax.lax.rsqrt(v)
    if clip_threshold is not None:
        mean_square = block_mean(wide / v * wide, axes)
        updates = updates * _clip_scale(mean_square, clip_threshold)
    return updates, v.astype(nu.dtype)


def _clip_scale(mean_square: jax.Array, threshold: Scalar) -> jax.Array:
    """1 / max(1, RMS(U) / d)."""
    return 1.0 / jnp.maximum(1.0, jnp.sqrt(mean_square) / threshold)


def _decay_at(count: jax.Array, decay_rate: Scalar) -> jax.Array:
    """1 - t^(-γ), without cancellation; 0 in the first step."""
    return -jnp.expm1(-decay_rate * jnp.log(count.astype(jnp.result_type(float))))


def factored_rms(
    *,
    decay_rate: Scalar = 0.8,
    b2: Scalar | None = None,
    min_dim_size_to_factor: int = 128,
    eps: Scalar = 1e-30,
    clip_threshold: Scalar | None = None,
    axes: Axes = None,
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformation:
    """Divides the gradient by a root mean square kept as one row and one column.

    For an m × n matrix the state has m + n numbers instead of m·n.

    Args:
      decay_rate: Exponent γ > 0 of the decay rate 1 - t^(-γ).
      b2: A constant decay rate in [0, 1) in place of that one, without bias correction
        (CAME), or None. Static if None.
      min_dim_size_to_factor: Matrices whose shorter side is smaller keep the whole
        second moment. >= 1. Static.
      eps: Added to the squared gradient, in its units. > 0.
      clip_threshold: Largest root mean square of the update of a matrix or vector, or
        None. The same as `clip_update_rms` behind this link, up to rounding, but
        computed from the statistics, so that the update is not stored in between. > 0.
        Static if None.
      axes: Matrix axes, see `optaxplus.custom_types`; batch axes are never reduced.
      nu_dtype: Dtype of the statistics, see `optaxplus.custom_types`. Static.

    Returns:
      A transformation with state `FactoredRmsState`; emits float32. A zero gradient
      gives a zero update. Where squared gradients overflow float32 (|g| > 1.8e19) the
      update of the coordinate, or of the whole factored matrix, is 0 from then on.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not real floating
        point.
      ValueError: If an argument is out of range or axes do not fit.

    Example:
      >>> import jax, jax.numpy as jnp, optaxplus as ox
      >>> tx = ox.factored_rms(axes=ox.MatrixAxes((0,), (1,)))
      >>> state = tx.init(jnp.zeros((256, 512)))
      >>> jax.tree.map(jnp.shape, (state.nu_row, state.nu_col, state.nu))
      ((256, 1), (1, 512), (1, 1))

    References:
      Shazeer and Stern, arXiv 1804.04235, Algorithm 4, and section 6 (clipping).
    """
    name = "factored_rms"
    validation.check_positive(name, decay_rate=decay_rate, eps=eps)
    validation.check_int(name, minimum=1, min_dim_size_to_factor=min_dim_size_to_factor)
    validation.check_floating_dtype(name, nu_dtype=nu_dtype)
    if clip_threshold is not None:
        validation.check_positive(name, clip_threshold=clip_threshold)
    if b2 is not None:
        validation.check_decay_rate(name, b2=b2)
        b2 = as_decay_rate(b2)
    eps = as_epsilon(eps)

    def init_fn(params: PyTree) -> FactoredRmsState:
        trees.check_floating(name, params, real=True)
        nu = trees.init_moment(name, params, nu_dtype)

        def init_leaf(
            zeros: jax.Array, leaf_axes: MatrixAxes
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            if is_factored(leaf_axes, zeros.shape, min_dim_size_to_factor):
                return *init_factors(zeros, leaf_axes), collapsed(zeros)
            # Two arrays, not one twice: a donated buffer can be given only once.
            return collapsed(zeros), collapsed(zeros), zeros

        rows, columns, full = trees.map_several(
            init_leaf, 3, nu, axes_of(name, axes, params)
        )
        return FactoredRmsState(jnp.zeros([], jnp.int32), rows, columns, full)

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, FactoredRmsState]:
        del params
        count = trees.increment(state.count)
        decay = _decay_at(count, decay_rate) if b2 is None else b2

        def leaf(
            g: jax.Array,
            nu_row: jax.Array,
            nu_col: jax.Array,
            nu: jax.Array,
            leaf_axes: MatrixAxes,
        ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
            arguments = {
                "decay": trees.scalar_for(decay, g),
                "eps": eps,
                "clip_threshold": clip_threshold,
            }
            if is_factored(leaf_axes, g.shape, min_dim_size_to_factor):
                factored = left_to_compiler(
                    _factored_leaf, g, nu_row, nu_col, axes=leaf_axes, **arguments
                )
                return *factored, nu
            u, nu = _full_leaf(g, nu, leaf_axes, **arguments)
            return u, nu_row, nu_col, nu

        updates, rows, columns, full = trees.map_several(
            leaf,
            4,
            updates,
            state.nu_row,
            state.nu_col,
            state.nu,
            axes_of(name, axes, updates),
        )
        return updates, FactoredRmsState(count, rows, columns, full)

    return optax.GradientTransformation(init_fn, update_fn)
