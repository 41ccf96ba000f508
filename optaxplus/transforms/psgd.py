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

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optaxplus import trees, validation
from optaxplus.custom_types import Axes, DTypeName, PyTree, Scalar
from optaxplus.numerics.hyperparameters import as_decay_rate
from optaxplus.numerics.matrix_roots import by_platform, in_groups
from optaxplus.numerics.moving_averages import bias_correction, mix
from optaxplus.numerics.whitening import fit_factors, precondition
from optaxplus.sharding.alike import lying_as
from optaxplus.sharding.owners import shared
from optaxplus.sharding.placement import Placement, check_placement, check_specs
from optaxplus.transforms.kronecker import (
    Fields,
    Sides,
    check_max_dim,
    init_side,
    on_matrices,
    sides_of,
)

__all__ = ["ScaleByKronState", "scale_by_kron"]


class ScaleByKronState(NamedTuple):
    """State of `scale_by_kron`.

    The factors of a side of n have shape (*batch axes, tiles, n, n) if they are
    triangular and (*batch axes, tiles, n, 1) if they are diagonal, in `factor_dtype`.
    Splits are tiles; those of several widths are filled up with zeros to the widest.

    Attributes:
      count: Finished updates; shape (), int32.
      refreshed: The last update that fitted the factors; shape (), int32.
      mu: Momentum M; like the parameters, in `mu_dtype`.
      factor_in: Factors L, of fan_in.
      factor_out: Factors R, of fan_out.
    """

    count: jax.Array
    refreshed: jax.Array
    mu: PyTree
    factor_in: PyTree
    factor_out: PyTree


class _Leaf(NamedTuple):
    """Arrays (..., m, n), (..., m, m or 1) and (..., n, n or 1) of one parameter."""

    update: jax.Array  # M̂ before the step
    factor_in: jax.Array
    factor_out: jax.Array


_FIELDS = Fields(
    moments=0,
    sides=(0, 1),
    kinds=("full", "diagonal"),
    slow=frozenset({"factor_in", "factor_out"}),
)
# A vector is a matrix of one row.
_OF_VECTORS = ("diagonal", "diagonal")


def _noise(key: jax.Array, rows: int, columns: int) -> jax.Array:
    """V: float32, and the same for all matrices of one shape.

    So it depends neither on the tree nor on how matrices are stacked or placed.
    """
    for side in (rows, columns):
        key = jax.random.fold_in(key, side)
    return jax.random.normal(key, (rows, columns), jnp.float32)


# Compiled by itself so that an update outside of `jax.jit` compiles the branch once.
@partial(jax.jit, static_argnames=("copies", "seed"), inline=True)
def _refreshed(
    is_due: jax.Array,
    leaves: list[_Leaf],
    count: jax.Array,
    rate: jax.Array,
    copies: tuple[str, ...],
    seed: int,
) -> list[_Leaf]:
    """The leaves with factors that are fitted if that `is_due`."""

    def fit(
        m: jax.Array, left: jax.Array, right: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """L and R of a stack, fitted to M̂."""
        if not m.size:
            return left, right
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), count)
        noise = _noise(key, *m.shape[-2:]).astype(m.dtype)
        wide = left.astype(m.dtype), right.astype(m.dtype)
        new = fit_factors(m, *wide, noise, trees.scalar_for(rate, m))
        return trees.cast_like(new, (left, right))

    def fitted(leaves: list[_Leaf]) -> list[tuple[jax.Array, ...]]:
        return in_groups(shared(by_platform(fit), copies), *zip(*leaves, strict=True))

    factors = lax.cond(
        is_due,
        fitted,
        # What comes out of a branch is copied there, changed or not.
        lambda leaves: [leaf[1:] for leaf in leaves],
        leaves,
    )
    return [_Leaf(leaf.update, *q) for leaf, q in zip(leaves, factors, strict=True)]


def _kron(
    leaves: list[_Leaf],
    *,
    is_due: jax.Array,
    copies: tuple[str, ...],
    count: jax.Array,
    rate: jax.Array,
    seed: int,
    max_update_rms: Scalar | None,
) -> list[_Leaf]:
    """One step of all leaves: U in place of M̂."""

    def update(leaf: _Leaf) -> jax.Array:
        if not leaf.update.size:
            return leaf.update
        m, limit = leaf.update, max_update_rms
        return precondition(
            m,
            leaf.factor_in.astype(m.dtype),
            leaf.factor_out.astype(m.dtype),
            None if limit is None else trees.scalar_for(limit, m),
        )

    return [
        leaf._replace(update=update(leaf))
        for leaf in _refreshed(is_due, leaves, count, rate, copies, seed)
    ]


def _identities(zeros: jax.Array, own: Sides, side: int, scale: Scalar) -> jax.Array:
    """The factors of one side to start from: `scale` on all diagonals."""
    rows, columns = zeros.shape[-2:]
    dtype = trees.compute_dtype(zeros.dtype)
    blocks = []
    for tiling, kinds in zip(own.tilings, own.kinds, strict=True):
        n = tiling.size[side]
        is_full = kinds[side] == "full"
        block = jnp.eye(n, dtype=dtype) if is_full else jnp.ones((n, 1), dtype)
        block = jnp.pad(block, [(0, rows - n), (0, columns - block.shape[1])])
        blocks.append(jnp.broadcast_to(block, (tiling.batch[-1], rows, columns)))
    tiles = jnp.concatenate(blocks).reshape(*(1,) * (zeros.ndim - 3), *zeros.shape[-3:])
    return zeros + (trees.scalar_for(scale, zeros) * tiles).astype(zeros.dtype)


def scale_by_kron(
    b1: Scalar = 0.9,
    *,
    preconditioner_learning_rate: Scalar = 0.1,
    init_scale: Scalar = 1.0,
    update_interval: int = 34,
    warmup_steps: int = 500,
    interval_growth: Scalar | None = 1e-3,
    max_dim: int = 8192,
    large_dims: str = "diagonal",
    max_update_rms: Scalar | None = 1.1,
    seed: int = 0,
    axes: Axes = None,
    mu_dtype: DTypeName = "float32",
    factor_dtype: DTypeName = "float32",
    placement: Placement | str | None = "auto",
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
      max_dim: Largest side that has a triangular factor, >= 1. Static.
      large_dims: What becomes of larger sides: "diagonal" gives them a diagonal factor,
        "tiles" cuts them into equal tiles of at most `max_dim`, each a matrix of its
        own. Static.
      max_update_rms: Largest root mean square of a matrix or vector of the update, > 0,
        or None for no limit. Static if None.
      seed: Seed of V, >= 0; V depends on it, on the step and on the shape of a matrix.
        Static.
      axes: Matrix axes, see `optaxplus.custom_types`. A vector is a matrix of one row;
        its factors are diagonal.
      mu_dtype: Dtype of the momentum, see `optaxplus.custom_types`. Static.
      factor_dtype: Dtype of the factors between steps, as `mu_dtype`. Static.
      placement: Which device does the work, see `optaxplus.custom_types`. Static.

    Returns:
      A transformation with state `ScaleByKronState`; emits float32. Under
      `optax.inject_hyperparams` pass
      `static_args=("update_interval", "warmup_steps", "max_dim", "seed")`.

      While its momentum is zero, or not finite, a matrix keeps its factors. A NaN or
      infinity in the gradient makes the update of its matrix NaN from then on.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not real floating
        point.
      ValueError: If an argument is out of range, axes or specs do not fit, or a side
        has no equal tiles between a quarter of `max_dim` and `max_dim`.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = optax.chain(ox.scale_by_kron(max_dim=32), ox.descend(3e-4, 0.1))
      >>> state = tx.init({"w": jnp.ones((64, 16))})
      >>> state[0].factor_in["w"].shape, state[0].factor_out["w"].shape
      ((1, 64, 1), (1, 16, 16))

    References:
      Li, arXiv 1512.04202, arXiv 2402.11858; psgd_jax.
    """
    name = "scale_by_kron"
    validation.check_decay_rate(name, b1=b1)
    validation.check_positive(name, init_scale=init_scale)
    validation.check_between_zero_and_one(
        name, preconditioner_learning_rate=preconditioner_learning_rate
    )
    if interval_growth is not None:
        validation.check_non_negative(name, interval_growth=interval_growth)
    if max_update_rms is not None:
        validation.check_positive(name, max_update_rms=max_update_rms)
    validation.check_int(name, minimum=1, update_interval=update_interval)
    validation.check_int(name, minimum=0, warmup_steps=warmup_steps, seed=seed)
    validation.check_floating_dtype(name, mu_dtype=mu_dtype, factor_dtype=factor_dtype)
    check_max_dim(name, max_dim, large_dims)
    check_placement(name, placement)
    b1 = as_decay_rate(b1)

    def interval(count: jax.Array) -> jax.Array:
        past = (count - warmup_steps).astype(jnp.result_type(float))
        if interval_growth is None:
            return jnp.where(past > 0, float(update_interval), 1.0)
        growth = trees.scalar_for(interval_growth, past)
        return jnp.minimum(jnp.exp(growth * past), update_interval)

    def sides(tree: PyTree) -> list[Sides]:
        return sides_of(name, axes, tree, max_dim, large_dims, vectors=_OF_VECTORS)

    def init_fn(params: PyTree) -> ScaleByKronState:
        trees.check_floating(name, params, real=True)
        check_specs(name, placement, params)
        cut = sides(params)
        scale = jnp.sqrt(jnp.asarray(init_scale, jnp.result_type(float)))

        def factors(side: int) -> PyTree:
            zeros = init_side(params, cut, side, _FIELDS.kinds, factor_dtype)
            leaves, structure = jax.tree.flatten(zeros)
            return structure.unflatten(
                [
                    _identities(x, own, side, scale)
                    for x, own in zip(leaves, cut, strict=True)
                ]
            )

        return ScaleByKronState(
            count=jnp.zeros([], jnp.int32),
            refreshed=jnp.zeros([], jnp.int32),
            mu=trees.init_moment(name, params, mu_dtype),
            factor_in=factors(0),
            factor_out=factors(1),
        )

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, ScaleByKronState]:
        del params
        count = trees.increment(state.count)
        correction = bias_correction(b1, count)

        def momentum(g: jax.Array, mu: jax.Array) -> tuple[jax.Array, jax.Array]:
            wide = trees.widen(g)
            m = mix(trees.scalar_for(b1, g), mu.astype(wide.dtype), wide)
            # Before M̂ is moved to who owns its matrix it lies as the parameter.
            unbiased = lying_as(m / trees.scalar_for(correction, g), mu)
            return unbiased, lying_as(m.astype(mu.dtype), mu)

        momenta, mu = trees.map_several(momentum, 2, updates, state.mu)
        passed = count - state.refreshed
        is_due = passed.astype(jnp.result_type(float)) >= interval(count)
        updates, left, right = on_matrices(
            name,
            _kron,
            _Leaf,
            _FIELDS,
            (momenta, state.factor_in, state.factor_out),
            sides(updates),
            placement,
            is_due=is_due,
            count=count,
            rate=jnp.asarray(preconditioner_learning_rate, jnp.result_type(float)),
            seed=seed,
            max_update_rms=max_update_rms,
        )
        refreshed = jnp.where(is_due, count, state.refreshed)
        return updates, ScaleByKronState(count, refreshed, mu, left, right)

    return optax.GradientTransformation(init_fn, update_fn)
