"""APOLLO: Adam's step lengths from a random projection, on the gradient itself.

For one matrix G as the authors turn it, with at most as many rows as columns; a column
of it is a channel:

    P ~ N(0, 1/r), of r rows; another every T steps
    R = P·G
    M <- β₁·M + (1 - β₁)·R,  V <- β₂·V + (1 - β₂)·R²,  A = M / (√V + ε)
    s_j = ‖a_j‖ / ‖r_j‖  of each column,  or  s = ‖A‖ / ‖R‖  of the matrix
    D = G·diag(s)  or  s·G
    D <- D · min(1, γ·‖D_before‖ / ‖D‖)                     D_before: after this line
    U = √α · √(1 - β₂ᵗ) / (1 - β₁ᵗ) · D

Each channel goes along its gradient, without momentum, as far as Adam would go in the
projection: about √r, where Adam itself would go √rows. √α makes up for that.

Letters to arguments: β₁, β₂ are `b1`, `b2`, ε is `eps`, r is `rank`, T is
`update_interval`, γ is `max_norm_growth`, α is `scale`; M, V, ‖D‖ are the state's `mu`,
`nu`, `last_norm`.

P is not stored: it follows from the seed, the number of the interval, r and the rows.
All matrices with as many rows therefore have the same one, wherever they are in the
tree, in a stack or on a mesh.

Source: Zhu et al., APOLLO, arXiv 2412.05270, Algorithm 1, and the authors' package
apollo-torch 1.0.3. As in the package, and not in the paper: the bias correction comes
after the limiter, so ε and γ see what is not corrected; fan_in is projected where both
sides are equal; the factor is the root of `scale`. (Its `scale_front` does not matter:
the limiter compares norms of one scale.)
Differs from the package: no 1e-8 is added to ‖R‖ and ‖D_before‖, so that results depend
on the scale of the gradient by ε alone; a channel with R = 0 stands still; a zero
gradient leaves ‖D_before‖ as it was, where it is 0 there and holds the next updates at
1e-8; gradients in low precision are projected in float32; P is that of another
generator, of the shape and not of the place among the parameters.
"""

import functools
from collections.abc import Sequence
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
    block_statistic,
    from_matrices,
    split_columns,
    to_matrices,
)
from optaxplus.numerics.matrix_sides import side_by_side, split_shapes, zeros_along
from optaxplus.numerics.moving_averages import bias_correction, mix
from optaxplus.numerics.norms import euclidean_norm, mix_square, or_one
from optaxplus.numerics.products import product
from optaxplus.transforms.orthogonalized import matrix_axes_of

__all__ = ["ScaleByApolloState", "scale_by_apollo"]

# Axes of (*batch, rows, channels) that one factor s belongs to.
_SCALINGS = {"channel": (-2,), "tensor": (-2, -1)}


class ScaleByApolloState(NamedTuple):
    """State of `scale_by_apollo`.

    Moments of splits stand side by side, filled up with rows of zeros.

    Attributes:
      count: Finished updates; shape (), int32.
      mu: First moment M; (*batch axes, rank, longer side), in `mu_dtype`.
      nu: Second moment V; in the same shape, in `nu_dtype`.
      last_norm: Norm ‖D‖ of the last update; float32 (float64 for float64 parameters),
        of the parameters' rank; the axes of the matrix have size 1. With splits the
        first axis of fan_out has one entry a split. None without a limiter.
    """

    count: jax.Array
    mu: PyTree
    nu: PyTree
    last_norm: Any


def _projection(seed: int, interval: jax.Array, rank: int, side: int) -> jax.Array:
    """P, shape (rank, side), float32; depends on nothing but the arguments."""
    key = jax.random.key(seed, impl="threefry2x32")
    entries = jax.random.normal(
        jax.random.fold_in(key, interval), (rank, side), jnp.float32
    )
    return entries * max(rank, 1) ** -0.5


def _apollo_matrices(
    g: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    last_norm: jax.Array | None,
    projection: jax.Array,
    *,
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    over: tuple[int, ...],
    max_norm_growth: Scalar | None,
    factor: Scalar,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Matrices (*batch, fan_in, fan_out): (U, M, V, ‖D‖), where U = factor·D."""
    is_turned = g.shape[-2] > g.shape[-1]
    wide = g.mT if is_turned else g
    # A copy of P for each matrix: without, compilers transpose the gradients.
    copies = jnp.broadcast_to(projection, (*g.shape[:-2], *projection.shape))
    r = product(copies, wide)
    m, v = mix(b1, mu, r), mix_square(b2, nu, r)
    size = euclidean_norm(r, over)
    adam = euclidean_norm(m / or_one(jnp.sqrt(v) + eps), over)
    # The inverse of a number that is not normal may be infinite.
    is_still = size < jnp.finfo(size.dtype).tiny
    length = jnp.where(is_still, 0.0, adam)
    inverse = 1.0 / jnp.where(is_still, 1.0, size)
    if max_norm_growth is not None:
        assert last_norm is not None
        # Plain squares of G as it lies: anything else would be stored, in its size.
        squares = jnp.sum(g * g, axis=-1 if is_turned else -2, keepdims=True)
        finite = jnp.minimum(squares, jnp.finfo(g.dtype).max)
        channels = jnp.sqrt(finite.mT if is_turned else finite) * inverse
        norm = euclidean_norm(channels * length, (-1,))
        limit = max_norm_growth * last_norm
        is_limited = (last_norm > 0) & (norm > limit)
        length = length * jnp.where(is_limited, limit / or_one(norm), 1.0)
        # A limit cannot be kept to by what has no norm, nor by what follows it.
        length = jnp.where(jnp.isnan(norm), norm, length)
        new_norm = jnp.where(is_limited, limit, norm)
        last_norm = jnp.where(norm == 0, last_norm, new_norm)
    update = ((length * factor) * wide) * inverse
    return update.mT if is_turned else update, m, v, last_norm


def _apollo_leaf(
    g: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    last_norm: jax.Array | None = None,
    *,
    projections: Sequence[jax.Array],
    axes: MatrixAxes,
    **arguments: Any,
) -> tuple[jax.Array, ...]:
    """One leaf: (U, M, V, ‖D‖), or (U, M, V) without a limiter. P of each split."""
    wide = trees.widen(g)
    shapes = split_shapes(axes, g.shape)
    channels = tuple(max(shape) for shape in shapes)
    norms = [None] * len(shapes)
    if last_norm is not None:
        norms = split_columns(to_matrices(last_norm, axes), (1,) * len(shapes))
    moments = [split_columns(x.astype(wide.dtype), channels) for x in (mu, nu)]
    results = [
        _apollo_matrices(
            matrices,
            m[..., : len(projection), :],
            v[..., : len(projection), :],
            norm,
            projection.astype(wide.dtype),
            **arguments,
        )
        for matrices, m, v, norm, projection in zip(
            split_columns(to_matrices(wide, axes), axes.splits),
            *moments,
            norms,
            projections,
            strict=True,
        )
    ]

    update, m, v, norm = zip(*results, strict=True)
    leaf = (
        from_matrices(side_by_side(update), axes, g.shape),
        side_by_side(m).astype(mu.dtype),
        side_by_side(v).astype(nu.dtype),
    )
    if last_norm is None:
        return leaf
    norms = side_by_side(norm).astype(last_norm.dtype)
    return *leaf, from_matrices(norms, axes, last_norm.shape)


def scale_by_apollo(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    *,
    eps: Scalar = 1e-6,
    rank: int = 256,
    scale: Scalar = 1.0,
    scaling: str = "channel",
    update_interval: int = 200,
    max_norm_growth: Scalar | None = 1.01,
    seed: int = 0,
    axes: Axes = None,
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformation:
    """Scales the channels of every matrix by Adam's factors in a random projection.

    Channels lie along the longer side of a matrix, along fan_out if both are equal. In
    a stack every layer (expert, head) is a matrix of its own.

    State: 8 bytes per entry of (rank, longer side) and 4 per matrix. A step costs one
    product of rank · fan_in · fan_out, and random numbers for each length of the
    shorter side.

    Args:
      b1: Decay rate of the first moment of the projected gradient, in [0, 1).
      b2: Decay rate of its second moment, in [0, 1).
      eps: Added to the root of the second moment before its bias correction, in units
        of the gradient. >= 0; may be 0.
      rank: Rows of the projection, >= 1; not more than the shorter side has. Static.
      scale: The update is multiplied by its root. > 0. The authors have 1 for ranks of
        a quarter of the shorter side and 128 for rank 1: about the ratio of shorter
        side and rank.
      scaling: "channel", a factor for each channel, or "tensor", one for each matrix.
        Static.
      update_interval: Steps between two projections, >= 1. Moments are kept. Static.
      max_norm_growth: How many times longer than the update before it that of a matrix
        may be, >= 1; None for no limit. The first one that is not zero is not limited.
        After one that is small by accident, growth to normal length takes
        log(ratio)/log(max_norm_growth) steps. Static if None.
      seed: Seed of the projections, >= 0. They depend on it, the number of the
        interval, the rank and the length of the shorter side alone. Static.
      axes: Matrix axes, see `optaxplus.custom_types`. Each split is a matrix.
      mu_dtype: Dtype of the first moment, see `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of the second moment. Static.

    Returns:
      A transformation with state `ScaleByApolloState`; emits float32. Under
      `optax.inject_hyperparams` pass `static_args=("rank", "update_interval", "seed")`.

      Where (1 - b2)·|R|² overflows float32 that entry of the projection counts as 0
      from then on. A NaN or infinity in the gradient makes its matrix NaN from then on,
      for `scaling="channel"` without a limiter its channel alone. Gradients below
      1e-19, whose squares underflow, pass the limiter unseen.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not real floating
        point.
      ValueError: If an argument is out of range, axes do not fit, or a parameter is a
        vector.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = optax.chain(ox.scale_by_apollo(rank=4), ox.descend(0.01))
      >>> state = tx.init({"w": jnp.ones((64, 16))})
      >>> state[0].mu["w"].shape
      (4, 64)

    References:
      Zhu et al., APOLLO: SGD-like memory, AdamW-level performance, arXiv 2412.05270.
    """
    name = "scale_by_apollo"
    validation.check_decay_rate(name, b1=b1, b2=b2)
    validation.check_non_negative(name, eps=eps)
    validation.check_int(name, minimum=1, rank=rank, update_interval=update_interval)
    validation.check_positive(name, scale=scale)
    validation.check_choice(name, "scaling", scaling, _SCALINGS)
    if max_norm_growth is not None:
        validation.check_at_least(name, 1.0, max_norm_growth=max_norm_growth)
    validation.check_int(name, minimum=0, seed=seed)
    validation.check_floating_dtype(name, mu_dtype=mu_dtype, nu_dtype=nu_dtype)
    b1, b2 = as_decay_rate(b1), as_decay_rate(b2)

    def init_moment(dtype: DTypeName, param: jax.Array, axes: MatrixAxes) -> jax.Array:
        shapes = split_shapes(axes, param.shape)
        side = ()
        if all(fan_in <= fan_out for fan_in, fan_out in shapes):
            side = axes.fan_out
        elif not axes.splits:
            side = axes.fan_in
        moment = functools.partial(trees.init_moment, name, dtype=dtype)
        dtype = jax.eval_shape(moment, param).dtype
        row = zeros_along(param, axes, side, dtype).mT
        rows = min(rank, max(min(shape) for shape in shapes))
        channels = sum(max(shape) for shape in shapes)
        batch = [1] * (row.ndim - 2)
        return row + jnp.zeros((*batch, rows, channels), dtype)

    def init_norm(param: jax.Array, axes: MatrixAxes) -> jax.Array:
        zeros = jnp.zeros_like(param, dtype=trees.compute_dtype(param.dtype))
        return block_statistic(
            lambda x, over: jnp.sum(x, axis=over, keepdims=True), zeros, axes
        )

    def init_fn(params: PyTree) -> ScaleByApolloState:
        trees.check_floating(name, params, real=True)
        resolved = matrix_axes_of(name, axes, params)
        mu, nu = (
            jax.tree.map(functools.partial(init_moment, dtype), params, resolved)
            for dtype in (mu_dtype, nu_dtype)
        )
        is_limited = max_norm_growth is not None
        return ScaleByApolloState(
            count=jnp.zeros([], jnp.int32),
            mu=mu,
            nu=nu,
            last_norm=jax.tree.map(init_norm, params, resolved) if is_limited else None,
        )

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, ScaleByApolloState]:
        del params
        interval = state.count // update_interval
        count = trees.increment(state.count)
        correction = jnp.sqrt(bias_correction(b2, count)) / bias_correction(b1, count)
        projections: dict[int, jax.Array] = {}

        def projection_of(side: int) -> jax.Array:
            # One for all matrices, so that the program has one.
            if side not in projections:
                projections[side] = _projection(seed, interval, min(rank, side), side)
            return projections[side]

        def leaf(
            g: jax.Array, leaf_axes: MatrixAxes, *stored: jax.Array
        ) -> tuple[jax.Array, ...]:
            shapes = split_shapes(leaf_axes, g.shape)
            root = jnp.sqrt(trees.scalar_for(scale, g))
            growth = max_norm_growth
            return left_to_compiler(
                _apollo_leaf,
                *(g, *stored),
                projections=[projection_of(min(shape)) for shape in shapes],
                axes=leaf_axes,
                b1=trees.scalar_for(b1, g),
                b2=trees.scalar_for(b2, g),
                eps=trees.scalar_for(eps, g),
                over=_SCALINGS[scaling],
                max_norm_growth=None if growth is None else trees.scalar_for(growth, g),
                factor=trees.scalar_for(correction, g) * root,
            )

        stored = state.mu, state.nu
        if max_norm_growth is not None:
            stored += (state.last_norm,)
        updates, *stored = trees.map_several(
            leaf,
            1 + len(stored),
            updates,
            matrix_axes_of(name, axes, updates),
            *stored,
        )
        mu, nu, last_norm = (*stored, None)[:3]
        return updates, ScaleByApolloState(count, mu, nu, last_norm)

    return optax.GradientTransformation(init_fn, update_fn)
