"""Confidence: updates that stay close to their own average are trusted.

For an update U of a matrix of shape (fan_in, fan_out):

    M_t = β₁·M_{t-1} + (1 - β₁)·U_t
    R_t = β₃·R_{t-1} + (1 - β₃)·(mean over fan_out of (U_t - M_t)² + ε)     one a row
    C_t = β₃·C_{t-1} + (1 - β₃)·(mean over fan_in  of (U_t - M_t)² + ε)     one a column
    Ŝ_t = R_t·C_t / mean(R_t),     U <- M_t / sqrt(Ŝ_t)

Vectors become M_t. After `factored_rms` it is CAME.

Letters to arguments: β₁, β₃ are `b1`, `b3`, ε is `eps`; M, R, C are the state's `mu`,
`residual_row`, `residual_col`.

Source: Luo et al., CAME, arXiv 2307.02047, Algorithm 2, and the authors' package
came-pytorch.
"""

from typing import Any, NamedTuple

import jax
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
    spread_rows,
)
from optaxplus.numerics.hyperparameters import as_decay_rate, as_epsilon
from optaxplus.numerics.matrix_axes import (
    MatrixAxes,
    from_matrices,
    to_matrices,
)
from optaxplus.numerics.moving_averages import mix
from optaxplus.partition.inference import axes_of

__all__ = ["ScaleByConfidenceState", "scale_by_confidence"]


class ScaleByConfidenceState(NamedTuple):
    """State of `scale_by_confidence`.

    The residuals have the parameters' tree and rank, in `nu_dtype`; where a leaf is not
    factored, all of their axes have size 1.

    Attributes:
      mu: Average M; like the parameters, in `mu_dtype`.
      residual_row: Row statistics R; the axes of fan_out have size 1. With splits the
        first of them has one entry a split.
      residual_col: Column statistics C; the axes of fan_in have size 1.
    """

    mu: PyTree
    residual_row: PyTree
    residual_col: PyTree


def _confidence_leaf(
    u: jax.Array,
    mu: jax.Array,
    residual_row: jax.Array,
    residual_col: jax.Array,
    axes: MatrixAxes,
    *,
    b1: Scalar,
    b3: Scalar,
    eps: Scalar,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One factored leaf: (update, M, R, C)."""
    wide = trees.widen(u)
    m = mix(b1, mu.astype(wide.dtype), wide)
    rows, columns = factor_squares(
        to_matrices(wide - m, axes),
        to_matrices(trees.widen(residual_row), axes),
        to_matrices(trees.widen(residual_col), axes),
        axes.splits,
        decay=b3,
        eps=eps,
    )
    row_factors, column_factors = inverse_root_factors(rows, columns)
    scaled = to_matrices(m, axes) * spread_rows(row_factors, axes.splits)
    return (
        from_matrices(scaled * column_factors, axes, u.shape),
        m.astype(mu.dtype),
        from_matrices(rows, axes, residual_row.shape).astype(residual_row.dtype),
        from_matrices(columns, axes, residual_col.shape).astype(residual_col.dtype),
    )


def scale_by_confidence(
    b1: Scalar = 0.9,
    b3: Scalar = 0.9999,
    *,
    eps: Scalar = 1e-16,
    min_dim_size_to_factor: int = 1,
    axes: Axes = None,
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformation:
    """Averages updates and divides by how far they stray from their average.

    State: 4 bytes per parameter, and one row and one column a matrix.

    Args:
      b1: Decay rate of the average, in [0, 1).
      b3: Decay rate of the squared distance from it, in [0, 1).
      eps: Added to the squared distance. > 0.
      min_dim_size_to_factor: Matrices whose shorter side is smaller are averaged only,
        as vectors are. >= 1. Static.
      axes: Matrix axes, see `optaxplus.custom_types`; batch axes are never reduced.
      mu_dtype: Dtype of the average, see `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of the residuals. Static.

    Returns:
      A transformation with state `ScaleByConfidenceState`; emits float32. A zero
      average gives a zero update.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not real floating
        point.
      ValueError: If an argument is out of range or axes do not fit.

    Example:
      >>> import optax, optaxplus as ox
      >>> tx = optax.chain(
      ...     ox.factored_rms(b2=0.999), ox.scale_by_confidence(), ox.descend(1e-4)
      ... )

    References:
      Luo et al., arXiv 2307.02047, Algorithm 2; the authors' package came-pytorch.
    """
    name = "scale_by_confidence"
    validation.check_decay_rate(name, b1=b1, b3=b3)
    validation.check_positive(name, eps=eps)
    validation.check_int(name, minimum=1, min_dim_size_to_factor=min_dim_size_to_factor)
    validation.check_floating_dtype(name, mu_dtype=mu_dtype, nu_dtype=nu_dtype)
    b1, b3, eps = as_decay_rate(b1), as_decay_rate(b3), as_epsilon(eps)

    def init_fn(params: PyTree) -> ScaleByConfidenceState:
        trees.check_floating(name, params, real=True)

        def init_leaf(
            zeros: jax.Array, leaf_axes: MatrixAxes
        ) -> tuple[jax.Array, jax.Array]:
            if is_factored(leaf_axes, zeros.shape, min_dim_size_to_factor):
                return init_factors(zeros, leaf_axes)
            return collapsed(zeros), collapsed(zeros)

        rows, columns = trees.map_several(
            init_leaf,
            2,
            trees.init_moment(name, params, nu_dtype),
            axes_of(name, axes, params),
        )
        mu = trees.init_moment(name, params, mu_dtype)
        return ScaleByConfidenceState(mu, rows, columns)

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, ScaleByConfidenceState]:
        del params

        def leaf(
            u: jax.Array,
            mu: jax.Array,
            rows: jax.Array,
            columns: jax.Array,
            leaf_axes: MatrixAxes,
        ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
            if is_factored(leaf_axes, u.shape, min_dim_size_to_factor):
                return left_to_compiler(
                    _confidence_leaf,
                    *(u, mu, rows, columns),
                    axes=leaf_axes,
                    b1=b1,
                    b3=b3,
                    eps=eps,
                )
            wide = trees.widen(u)
            m = mix(b1, mu.astype(wide.dtype), wide)
            return m, m.astype(mu.dtype), rows, columns

        updates, *fields = trees.map_several(
            leaf, 4, updates, *state, axes_of(name, axes, updates)
        )
        return updates, ScaleByConfidenceState(*fields)

    return optax.GradientTransformation(init_fn, update_fn)
