"""Dion: orthonormal updates of low rank, from one power iteration a step.

For one matrix B as the authors turn it, with at least as many rows as columns; M the
momentum, Q the basis, one unit vector a column:

    B <- M + G
    P = orth(B·Q),  R = Bᵀ·P                     QR of B·Q; P's columns orthonormal
    M <- B - (1 - μ)·P·Rᵀ                        error feedback
    q_j <- r_j / (‖r_j‖ + ε)                     each column
    U = P·Qᵀ

Only what P captures decays; the rest stays in M until it is captured. At full rank P
captures everything and M is plain momentum. B·Q and Bᵀ·P are a power iteration that
starts where the last step ended, so for a momentum that turns slowly Q is near its
leading right singular vectors and U near the polar factor of its leading part.

Where B has fewer directions than Q has columns, the surplus columns of P are arbitrary
and their r_j rounding errors: those within rounding of the columns before them. Such
columns leave U and M alone and their q_j as it was. A zero matrix is the extreme case.

Letters to arguments: μ is `b1`, ε is `eps`; M, Q are the state's `mu`, `basis`.

Source: Ahn et al., Dion, arXiv 2504.05295, Algorithm 1, and the authors' code
(microsoft/dion, `dion_reference.py`). Theirs turns (fan_out, fan_in) matrices over if
fan_out < fan_in, so Q is on the shorter side, on fan_in if both are equal. Differs from
it: ε is relative to the matrix, so that no result depends on the gradient's scale;
surplus columns are left out; NaN is not replaced by 0, which would stop the matrix for
good without a word; Householder QR in place of randomized Cholesky QR.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxplus import trees, validation
from optaxplus.custom_types import Axes, DTypeName, PyTree, Scalar
from optaxplus.numerics.explicit_axes import left_to_compiler
from optaxplus.numerics.hyperparameters import as_decay_rate
from optaxplus.numerics.matrix_axes import (
    MatrixAxes,
    from_matrices,
    split_columns,
    to_matrices,
)
from optaxplus.numerics.matrix_sides import side_by_side, split_shapes, zeros_along
from optaxplus.numerics.products import product
from optaxplus.transforms.orthogonalized import matrix_axes_of

__all__ = ["ScaleByDionState", "scale_by_dion"]

# Surplus columns measure up to 0.3 units in the last place of the matrix's norm.
_ROUNDING = 4


class ScaleByDionState(NamedTuple):
    """State of `scale_by_dion`.

    Bases of splits stand side by side, filled up with rows of zeros.

    Attributes:
      mu: Momentum M; like the parameters, in `mu_dtype`.
      basis: Bases Q; (*batch axes, shorter side, rank), float32 (float64 for float64
        parameters).
    """

    mu: PyTree
    basis: PyTree


def _unit_columns(side: int, rank: int, seed: int) -> jax.Array:
    """Random directions, which depend on nothing but the arguments."""
    key = jax.random.key(seed, impl="threefry2x32")
    columns = jax.random.normal(key, (side, rank), jnp.float32)
    return columns / jnp.linalg.norm(columns, axis=0, keepdims=True)


def _magnitude(matrices: jax.Array) -> jax.Array:
    """The power of 2 above the largest entry of each matrix, shape (*batch, 1, 1).

    Bounded, so that it and its inverse are normal numbers; NaN if an entry is not
    finite.
    """
    limits = jnp.finfo(matrices.dtype)
    largest = jnp.max(jnp.abs(matrices), axis=(-2, -1), keepdims=True)
    size = jnp.clip(largest, limits.tiny, 2.0 ** (limits.maxexp - 3))
    mantissa, _ = jnp.frexp(size)
    return jnp.where(jnp.isfinite(largest), size / mantissa, jnp.nan)


def _power_iteration(
    b: jax.Array, basis: jax.Array, eps: Scalar
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """P, R, the columns of R at length 1, and Q; zeros in R for surplus columns."""
    left, _ = jnp.linalg.qr(product(b, basis))
    right = product(b.mT, left)
    # How far each column is from the span of those before it. Their lengths would not
    # tell: a surplus column of P may lean towards the last one that is none.
    distances = jnp.diagonal(jnp.linalg.qr(right, mode="r"), axis1=-2, axis2=-1)
    tolerance = _ROUNDING * jnp.finfo(b.dtype).eps
    norm = jnp.linalg.norm(b, axis=(-2, -1), keepdims=True)
    surplus = jnp.abs(distances)[..., None, :] <= tolerance * norm
    right = jnp.where(surplus, 0.0, right)
    lengths = jnp.linalg.norm(right, axis=-2, keepdims=True)
    directions = right / jnp.where(surplus, 1.0, lengths + eps)
    return left, right, directions, jnp.where(surplus, basis, directions)


def _dion_matrices(
    momentum: jax.Array,
    basis: jax.Array,
    *,
    b1: Scalar,
    eps: Scalar,
    power_iterations: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Matrices (*batch, fan_in, fan_out) of M + G and their bases: (U, M, Q)."""
    if momentum.size == 0:
        return momentum, momentum, basis
    is_turned = momentum.shape[-2] <= momentum.shape[-1]
    tall = momentum.mT if is_turned else momentum
    magnitude = _magnitude(tall)
    b = tall * (1.0 / magnitude)
    for _ in range(power_iterations - 1):
        *_, basis = _power_iteration(b, basis, eps)
    left, right, directions, basis = _power_iteration(b, basis, eps)
    update = product(left, directions.mT)
    tall = tall - (1 - b1) * (product(left, right.mT) * magnitude)
    if is_turned:
        return update.mT, tall.mT, basis
    return update, tall, basis


def _dion_leaf(
    g: jax.Array,
    mu: jax.Array,
    basis: jax.Array,
    axes: MatrixAxes,
    *,
    ranks: tuple[int, ...],
    b1: Scalar,
    eps: Scalar,
    power_iterations: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One leaf: (U, M, Q). `ranks` are those of its splits."""
    wide = trees.widen(g)
    momentum = to_matrices(mu.astype(wide.dtype) + wide, axes)
    results = [
        _dion_matrices(
            matrices,
            columns[..., : min(matrices.shape[-2:]), :],
            b1=b1,
            eps=eps,
            power_iterations=power_iterations,
        )
        for matrices, columns in zip(
            split_columns(momentum, axes.splits),
            split_columns(basis.astype(wide.dtype), ranks),
            strict=True,
        )
    ]
    update, momentum, columns = map(side_by_side, zip(*results, strict=True))
    return (
        from_matrices(update, axes, g.shape),
        from_matrices(momentum, axes, g.shape).astype(mu.dtype),
        columns.astype(basis.dtype),
    )


def scale_by_dion(
    b1: Scalar = 0.95,
    *,
    rank_fraction: float = 1.0,
    rank_multiple: int = 1,
    power_iterations: int = 1,
    eps: Scalar = 1e-8,
    seed: int = 0,
    axes: Axes = None,
    mu_dtype: DTypeName = "float32",
) -> optax.GradientTransformation:
    """Replaces every matrix by an orthonormal one of low rank, with error feedback.

    What Muon does to the leading directions of the momentum, without the others: U has
    `rank` orthonormal directions on the longer side, each paired with a unit vector on
    the shorter one. Neither the learning rate nor the factor of the shape is in it;
    Dion's is `scale_by_matrix_shape("spectral")`. In a stack every layer (expert, head)
    has a basis of its own.

    State: 4 bytes per parameter, and 4·s·r for the basis of a matrix of shorter side s
    and rank r. A step costs four products and two QR decompositions, of both factors.

    Args:
      b1: The paper's μ, in [0, 1): what a step leaves of the part of the momentum that
        it captures. The gradient enters with weight 1.
      rank_fraction: Rank as a fraction of the shorter side, in (0, 1]. Static.
      rank_multiple: The rank is rounded up to a multiple of it, but not above the
        shorter side. >= 1. Static.
      power_iterations: Power iterations in each step, >= 1. Static.
      eps: Added to the length of the columns that become the basis; in units of the
        largest entry of the matrix, rounded up to a power of 2. >= 0; may be 0.
      seed: Seed of the random basis to start from, >= 0. It depends on the seed and on
        the shape of a matrix alone, not on where it stands in the tree. Static.
      axes: Matrix axes, see `optaxplus.custom_types`. Each split has its own basis.
      mu_dtype: Dtype of the momentum, see `optaxplus.custom_types`. Static.

    Returns:
      A transformation with state `ScaleByDionState`; emits float32. Under
      `optax.inject_hyperparams` pass
      `static_args=("rank_fraction", "rank_multiple", "power_iterations", "seed")`.

      The scale of the gradients does not matter as long as their entries are normal
      numbers. While the momentum is zero the update is zero and the basis stays. A
      momentum of lower rank gives an update of that rank; directions below 5e-7 of its
      norm count as missing. A NaN or infinity in the gradient makes its matrix NaN,
      momentum and basis included, from then on.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not real floating
        point.
      ValueError: If an argument is out of range, axes do not fit, or a parameter is a
        vector.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = optax.chain(
      ...     ox.scale_by_dion(rank_fraction=0.25),
      ...     ox.scale_by_matrix_shape("spectral"),
      ...     ox.descend(0.01, 0.01),
      ... )
      >>> state = tx.init({"w": jnp.ones((64, 16))})
      >>> state[0].basis["w"].shape
      (16, 4)

    References:
      Ahn et al., Dion: Distributed Orthonormalized Updates, arXiv 2504.05295.
    """
    name = "scale_by_dion"
    validation.check_decay_rate(name, b1=b1)
    validation.check_fraction(name, rank_fraction=rank_fraction)
    validation.check_int(
        name, minimum=1, rank_multiple=rank_multiple, power_iterations=power_iterations
    )
    validation.check_int(name, minimum=0, seed=seed)
    validation.check_non_negative(name, eps=eps)
    validation.check_floating_dtype(name, mu_dtype=mu_dtype)
    b1 = as_decay_rate(b1)

    def rank_of(side: int) -> int:
        # 0.07 · 100 is 7.000000000000001 and means 7.
        multiples = math.ceil(float(rank_fraction) * side / rank_multiple - 1e-9)
        return min(side, rank_multiple * multiples)

    def init_basis(param: jax.Array, leaf_axes: MatrixAxes) -> jax.Array:
        shapes = split_shapes(leaf_axes, param.shape)
        sides = [min(shape) for shape in shapes]
        columns = [_unit_columns(side, rank_of(side), seed) for side in sides]
        basis = side_by_side(columns)
        # fan_out cut into splits is no side.
        fan_out = () if leaf_axes.splits else leaf_axes.fan_out
        side = leaf_axes.fan_in if max(sides) == shapes[0][0] else fan_out
        dtype = trees.compute_dtype(param.dtype)
        zeros = zeros_along(param, leaf_axes, side, dtype)
        batch = [1] * (zeros.ndim - basis.ndim)
        return zeros + basis.astype(zeros.dtype).reshape(*batch, *basis.shape)

    def init_fn(params: PyTree) -> ScaleByDionState:
        trees.check_floating(name, params, real=True)
        leaf_axes = matrix_axes_of(name, axes, params)
        return ScaleByDionState(
            mu=trees.init_moment(name, params, mu_dtype),
            basis=jax.tree.map(init_basis, params, leaf_axes),
        )

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, ScaleByDionState]:
        del params

        def leaf(
            g: jax.Array, mu: jax.Array, basis: jax.Array, leaf_axes: MatrixAxes
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            shapes = split_shapes(leaf_axes, g.shape)
            return left_to_compiler(
                _dion_leaf,
                *(g, mu, basis),
                axes=leaf_axes,
                ranks=tuple(rank_of(min(shape)) for shape in shapes),
                b1=trees.scalar_for(b1, g),
                eps=trees.scalar_for(eps, g),
                power_iterations=power_iterations,
            )

        updates, mu, basis = trees.map_several(
            leaf,
            3,
            updates,
            state.mu,
            state.basis,
            matrix_axes_of(name, axes, updates),
        )
        return updates, ScaleByDionState(mu, basis)

    return optax.GradientTransformation(init_fn, update_fn)
