"""PSGD-Kron: updates whitened by a Kronecker-factored preconditioner that is fitted.

For one matrix G, m×n, with factors L, m×m, and R, n×n, upper triangular or diagonal:

    M <- β·M + (1 - β)·G,   M̂ = M/(1 - βᵗ)
    on a refresh, with a random V ~ N(0, 1):
        H = M̂ + sqrt(2⁻²³)·mean|M̂|·V
        A = L·H·Rᵀ,   B = L⁻ᵀ·V·R⁻¹
        L <- L - η/‖A·Aᵀ + B·Bᵀ‖·triu(A·Aᵀ - B·Bᵀ)·L
        R <- R - η/‖Aᵀ·A + Bᵀ·B‖·triu(Aᵀ·A - Bᵀ·B)·R
    U = (LᵀL)·M̂·(RᵀR),   U <- U·min(1, c/RMS(U))

The fit makes P·H as white as V, see `optaxplus.numerics.whitening`, which has the
formulas of a diagonal factor and ‖·‖.

Step t is a refresh if at least min(k, exp(γ·(t - w))) steps have passed since the last
one; so every step up to w is.

Letters to arguments: β is `b1`, η is `preconditioner_learning_rate`, c is
`max_update_rms`, k is `update_interval`, w is `warmup_steps`, γ is `interval_growth`;
M, L, R are the state's `mu`, `factor_in`, `factor_out`.

Sources: Li, Preconditioned stochastic gradient descent, arXiv 1512.04202; Li,
Stochastic Hessian fittings on Lie groups, arXiv 2402.11858; the formulas and numbers of
psgd_jax (`kron.py`, version 0.2.9), which is Levanter's too. Differs from it: L and R
are balanced on every refresh, by powers of 2, which changes no bit of P; matrices of
one shape share V; a matrix without momentum is not fitted (its factors would grow for
ever); magnitudes are split off, so that nothing overflows; mean|M̂| and RMS(U) are
those of one matrix.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from optaxplus import trees, validation
from optaxplus.custom_types import Axes, DTypeName, PyTree, Scalar
from optaxplus.numerics.explicit_axes import explicit_axes, left_to_compiler
from optaxplus.numerics.hyperparameters import as_decay_rate
from optaxplus.numerics.matrix_axes import (
    MatrixAxes,
    block_axes,
    from_matrices,
    split_columns,
    to_matrices,
)
from optaxplus.numerics.matrix_sides import side_by_side, split_shapes
from optaxplus.numerics.moving_averages import bias_correction, mix
from optaxplus.numerics.whitening import fit_factors, precondition
from optaxplus.partition.inference import axes_of
from optaxplus.sharding.placement import sharding_of

__all__ = ["ScaleByKronState", "scale_by_kron"]


class ScaleByKronState(NamedTuple):
    """State of `scale_by_kron`.

    The factor of one matrix has shape (side, side) if it is triangular and (side, 1) if
    it is diagonal, float32 (float64 for float64 parameters). Those of splits stand side
    by side, filled up with rows of zeros.
    """

    count: jax.Array  # shape (), int32: finished updates
    refreshed: jax.Array  # shape (), int32: the last of them that fitted the factors
    mu: PyTree  # like the parameters: momentum M
    factor_in: PyTree  # (*batch axes, fan_in, fan_in or 1): L
    factor_out: PyTree  # (*batch axes, fan_out, fan_out or 1): R


class _Matrix(NamedTuple):
    """Sides of one matrix, and how many columns their factors have."""

    rows: int
    columns: int
    rows_width: int
    columns_width: int


def _layout(axes: MatrixAxes, shape: tuple[int, ...], max_dim: int) -> list[_Matrix]:
    """The matrices that `splits` stores side by side; one if there are none."""

    def width(side: int) -> int:
        return side if axes.is_matrix and side <= max_dim else 1

    return [
        _Matrix(rows, columns, width(rows), width(columns))
        for rows, columns in split_shapes(axes, shape)
    ]


def _apart(
    left: jax.Array, right: jax.Array, layout: list[_Matrix]
) -> list[tuple[jax.Array, jax.Array]]:
    """The factors of each matrix, in float32 at least."""
    lefts = split_columns(trees.widen(left), tuple(s.rows_width for s in layout))
    rights = split_columns(trees.widen(right), tuple(s.columns_width for s in layout))
    return [
        (q, r[..., : sides.columns, :])
        for q, r, sides in zip(lefts, rights, layout, strict=True)
    ]


def _precondition_leaf(
    m: jax.Array,
    left: jax.Array,
    right: jax.Array,
    *,
    axes: MatrixAxes,
    max_dim: int,
    max_update_rms: Scalar | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(U, L, R) of M̂: as many results as there are arrays, and placed as those are."""
    if m.size == 0:
        return m, left, right
    factors = _apart(left, right, _layout(axes, m.shape, max_dim))
    updates = [
        precondition(matrices, *factors, max_update_rms)
        for matrices, factors in zip(
            split_columns(to_matrices(m, axes), axes.splits), factors, strict=True
        )
    ]
    return from_matrices(jnp.concatenate(updates, -1), axes, m.shape), left, right


def _refresh_leaf(
    m: jax.Array,
    left: jax.Array,
    right: jax.Array,
    *,
    axes: MatrixAxes,
    max_dim: int,
    seed: int,
    count: jax.Array,
    rate: Scalar,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(M̂, L, R) with fitted factors."""
    if m.size == 0:
        return m, left, right
    layout = _layout(axes, m.shape, max_dim)
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), count)
    pairs = [
        fit_factors(matrices, *factors, _noise(key, sides).astype(m.dtype), rate)
        for matrices, factors, sides in zip(
            split_columns(to_matrices(m, axes), axes.splits),
            _apart(left, right, layout),
            layout,
            strict=True,
        )
    ]
    lefts, rights = ([pair[side] for pair in pairs] for side in (0, 1))
    return (
        m,
        side_by_side(lefts).astype(left.dtype),
        side_by_side(rights).astype(right.dtype),
    )


def _noise(key: jax.Array, sides: _Matrix) -> jax.Array:
    """V: float32, and the same for all matrices of one shape.

    So it depends neither on the tree nor on how matrices are stacked or placed.
    """
    for side in (sides.rows, sides.columns):
        key = jax.random.fold_in(key, side)
    return jax.random.normal(key, (sides.rows, sides.columns), jnp.float32)


# Compiled by itself so that an update outside of `jax.jit` compiles the branch once.
@partial(jax.jit, static_argnames=("axes", "max_dim", "seed"), inline=True)
def _refresh_if(
    is_due: jax.Array,
    momenta: list[jax.Array],
    lefts: list[jax.Array],
    rights: list[jax.Array],
    count: jax.Array,
    rate: jax.Array,
    *,
    axes: tuple[MatrixAxes, ...],
    max_dim: int,
    seed: int,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """The factors of all leaves, fitted to M̂ if `is_due`."""

    def refresh() -> tuple[list[jax.Array], list[jax.Array]]:
        new = [
            left_to_compiler(
                _refresh_leaf,
                *arrays,
                axes=leaf_axes,
                max_dim=max_dim,
                seed=seed,
                count=count,
                rate=trees.scalar_for(rate, arrays[0]),
            )
            for *arrays, leaf_axes in zip(momenta, lefts, rights, axes, strict=True)
        ]
        return [left for _, left, _ in new], [right for _, _, right in new]

    return lax.cond(is_due, refresh, lambda: (lefts, rights))


def _factor_shardings(
    param: jax.Array, axes: MatrixAxes, shapes: Sequence[tuple[int, ...]]
) -> list[NamedSharding] | None:
    """Of L and R: rows as their side, columns as the other one, where they divide.

    None where the parameter does not say how it lies.
    """
    sharding = sharding_of(param)
    if sharding is None:
        return None
    spec = (*sharding.spec, *(None,) * (param.ndim - len(sharding.spec)))
    batch = [entry for a, entry in enumerate(spec) if a not in block_axes(axes)]

    def entry(side: tuple[int, ...], size: int) -> tuple[Any, ...] | None:
        entries = [spec[axis] for axis in side if spec[axis] is not None]
        names = [n for e in entries for n in (e if isinstance(e, tuple) else (e,))]
        pieces = math.prod(sharding.mesh.shape[name] for name in names)
        return tuple(names) if names and size % pieces == 0 else None

    sides = (axes.fan_in, axes.fan_out)
    return [
        NamedSharding(
            sharding.mesh,
            PartitionSpec(*batch, entry(own, rows), entry(other, columns)),
        )
        for (rows, columns), own, other in zip(shapes, sides, sides[::-1], strict=True)
    ]


def _identities(
    param: jax.Array, axes: MatrixAxes, max_dim: int, scale: Scalar, dtype: DTypeName
) -> tuple[jax.Array, ...]:
    """The factors to start from: `scale` on all diagonals."""
    layout = _layout(axes, param.shape, max_dim)
    wide = trees.compute_dtype(param.dtype)
    dtype = wide if jnp.dtype(dtype) == jnp.float32 else jnp.dtype(dtype)

    def one(side: int, width: int) -> jax.Array:
        diagonal = jnp.eye(side) if width > 1 else jnp.ones((side, width))
        return (diagonal.astype(wide) * scale).astype(dtype)

    blocks = (
        side_by_side([one(sides.rows, sides.rows_width) for sides in layout]),
        side_by_side([one(sides.columns, sides.columns_width) for sides in layout]),
    )
    batch = tuple(n for a, n in enumerate(param.shape) if a not in block_axes(axes))
    zeros = jnp.zeros_like(param, dtype=wide)
    placed = _factor_shardings(zeros, axes, [block.shape for block in blocks])
    if placed is None or explicit_axes(placed[0].mesh):
        # The parameter is there for its mesh.
        return left_to_compiler(
            lambda _, *blocks: tuple(
                jnp.broadcast_to(block, (*batch, *block.shape)) for block in blocks
            ),
            *(zeros, *blocks),
            shardings=None if placed is None else tuple(placed),
        )
    return tuple(
        jnp.zeros((*batch, *block.shape), dtype, device=sharding)
        + block.reshape(*(1,) * len(batch), *block.shape)
        for block, sharding in zip(blocks, placed, strict=True)
    )


def scale_by_kron(
    b1: Scalar = 0.9,
    *,
    preconditioner_learning_rate: Scalar = 0.1,
    init_scale: Scalar = 1.0,
    update_interval: int = 34,
    warmup_steps: int = 500,
    interval_growth: Scalar | None = 1e-3,
    max_dim: int = 8192,
    max_update_rms: Scalar | None = 1.1,
    seed: int = 0,
    axes: Axes = None,
    mu_dtype: DTypeName = "float32",
    factor_dtype: DTypeName = "float32",
) -> optax.GradientTransformation:
    """Whitens the momentum of every matrix by two factors that are fitted to it.

    In the long run entries of the update are uncorrelated, with a root mean square near
    1, whatever the scale of the gradient and however its rows and columns are mixed.
    Adam's second moment does so for each entry, this for rows and columns. In a stack
    every layer (expert, head) has factors of its own, and so has every split.

    State: 4 bytes per parameter, and 4·(m² + n²) for an m×n matrix: 12 bytes per
    parameter in all if it is square. A step costs the four products of LᵀL·M̂·RᵀR, a
    refresh eight more and two triangular solves.

    Args:
      b1: Decay rate of the momentum, in [0, 1).
      preconditioner_learning_rate: Step of the fit, relative to the factors; in (0, 1).
      init_scale: Diagonal of Q = L ⊗ R to start from. > 0. It matters little: a refresh
        changes P by up to half of itself.
      update_interval: How many steps pass between refreshes in the end, >= 1. Static.
      warmup_steps: The factors are refreshed in every step up to this one. >= 0.
        Static.
      interval_growth: After these the interval is exp(interval_growth·steps), up to
        `update_interval`. >= 0; None: `update_interval` at once. Static if None.
      max_dim: A longer side has a diagonal factor, >= 1. Static.
      max_update_rms: Largest root mean square of a matrix or vector of the update, > 0,
        or None for no limit. Static if None.
      seed: Seed of V, >= 0; V depends on it, on the step and on the shape of a matrix.
        Static.
      axes: Matrix axes, see `optaxplus.custom_types`. A vector is a matrix of one row;
        its factors are diagonal.
      mu_dtype: Dtype of the momentum, see `optaxplus.custom_types`. Static.
      factor_dtype: Dtype of the factors between steps, as `mu_dtype`. Static.

    Returns:
      A transformation with state `ScaleByKronState`; emits float32. Under
      `optax.inject_hyperparams` pass
      `static_args=("update_interval", "warmup_steps", "max_dim", "seed")`.

      While its momentum is zero, or not finite, a matrix keeps its factors. A NaN or
      infinity in the gradient makes the update of its matrix NaN from then on.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not real floating
        point.
      ValueError: If an argument is out of range or axes do not fit.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = optax.chain(ox.scale_by_kron(max_dim=32), ox.descend(3e-4, 0.1))
      >>> state = tx.init({"w": jnp.ones((64, 16))})
      >>> state[0].factor_in["w"].shape, state[0].factor_out["w"].shape
      ((64, 1), (16, 16))

    References:
      Li, arXiv 1512.04202, arXiv 2402.11858; psgd_jax.
    """
    name = "scale_by_kron"
    validation.check_decay_rate(name, b1=b1)
    positive = {
        "preconditioner_learning_rate": preconditioner_learning_rate,
        "init_scale": init_scale,
    }
    validation.check_positive(name, **positive)
    validation.check_below_one(
        name, preconditioner_learning_rate=preconditioner_learning_rate
    )
    if interval_growth is not None:
        validation.check_non_negative(name, interval_growth=interval_growth)
    if max_update_rms is not None:
        validation.check_positive(name, max_update_rms=max_update_rms)
    validation.check_int(
        name, minimum=1, update_interval=update_interval, max_dim=max_dim
    )
    validation.check_int(name, minimum=0, warmup_steps=warmup_steps, seed=seed)
    validation.check_floating_dtype(name, mu_dtype=mu_dtype, factor_dtype=factor_dtype)
    b1 = as_decay_rate(b1)

    def interval(count: jax.Array) -> jax.Array:
        past = (count - warmup_steps).astype(jnp.result_type(float))
        if interval_growth is None:
            return jnp.where(past > 0, float(update_interval), 1.0)
        growth = trees.scalar_for(interval_growth, past)
        return jnp.minimum(jnp.exp(growth * past), update_interval)

    def init_fn(params: PyTree) -> ScaleByKronState:
        trees.check_floating(name, params, real=True)

        def leaf(param: jax.Array, leaf_axes: MatrixAxes) -> tuple[jax.Array, ...]:
            scale = jnp.sqrt(trees.scalar_for(init_scale, param))
            scale = scale.astype(trees.compute_dtype(param.dtype))
            return _identities(param, leaf_axes, max_dim, scale, factor_dtype)

        left, right = trees.map_several(leaf, 2, params, axes_of(name, axes, params))
        return ScaleByKronState(
            count=jnp.zeros([], jnp.int32),
            refreshed=jnp.zeros([], jnp.int32),
            mu=trees.init_moment(name, params, mu_dtype),
            factor_in=left,
            factor_out=right,
        )

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, ScaleByKronState]:
        del params
        leaf_axes = axes_of(name, axes, updates)
        count = trees.increment(state.count)
        correction = bias_correction(b1, count)

        def momentum(g: jax.Array, mu: jax.Array) -> tuple[jax.Array, jax.Array]:
            wide = trees.widen(g)
            m = mix(trees.scalar_for(b1, g), mu.astype(wide.dtype), wide)
            return m / trees.scalar_for(correction, g), m.astype(mu.dtype)

        momenta, mu = trees.map_several(momentum, 2, updates, state.mu)
        passed = count - state.refreshed
        is_due = passed.astype(jnp.result_type(float)) >= interval(count)
        left, right = _refresh_if(
            is_due,
            *map(jax.tree.leaves, (momenta, state.factor_in, state.factor_out)),
            count,
            jnp.asarray(preconditioner_learning_rate, jnp.result_type(float)),
            axes=tuple(jax.tree.leaves(leaf_axes)),
            max_dim=max_dim,
            seed=seed,
        )
        structure = jax.tree.structure(updates)
        left, right = (jax.tree.unflatten(structure, q) for q in (left, right))

        def leaf(
            m: jax.Array, left: jax.Array, right: jax.Array, leaf_axes: MatrixAxes
        ) -> tuple[jax.Array, ...]:
            limit = max_update_rms
            return left_to_compiler(
                _precondition_leaf,
                *(m, left, right),
                axes=leaf_axes,
                max_dim=max_dim,
                max_update_rms=None if limit is None else trees.scalar_for(limit, m),
            )

        updates, *_ = trees.map_several(leaf, 3, momenta, left, right, leaf_axes)
        refreshed = jnp.where(is_due, count, state.refreshed)
        return updates, ScaleByKronState(count, refreshed, mu, left, right)

    return optax.GradientTransformation(init_fn, update_fn)
