"""Shampoo: every matrix between the inverse roots of the second moments of its sides.

For each matrix G:

    L <- β₂·L + (1 - β₂)·G·Gᵀ,  R <- β₂·R + (1 - β₂)·Gᵀ·G      sums for β₂ = 1
    M <- β₁·M + (1 - β₁)·G
    every k-th step:  P_L = L̂^(-1/p), P_R = R̂^(-1/p)           p = 4; 2 for vectors
    U = P_L·M̂·P_R                                  L̂ = L/(1 - β₂ᵗ), M̂ = M/(1 - β₁ᵗ)
    U <- U·‖D‖/‖U‖                                              grafting

D is the step of another method, whose size U takes (`grafting`), with V the average
V <- β₃·V + (1 - β₃)·G² or, for "adagrad", the sum:

    sgd        M̂
    adagrad    M̂/(sqrt(V) + ε_D)
    adam       M̂/(sqrt(V/(1 - β₃ᵗ)) + ε_D)

A side above `max_dim` is cut into tiles or keeps the diagonal of its factor alone; a
vector has the factor R alone.

Letters to arguments: β₁, β₂, β₃ are `b1`, `b2`, `b3`; k is `update_interval`, p is
`root_order`, ε_D is `grafting_eps`. To the state: M, V are `mu`, `nu`; L, R are
`factor_in`, `factor_out`, P_L, P_R `root_in`, `root_out`.

Sources: Gupta et al., Shampoo, arXiv 1802.09568, Algorithm 1 (β₁ = 0, β₂ = 1, k = 1);
Anil et al., arXiv 2002.09018, and Shi et al., arXiv 2309.06497 (facebookresearch's
Distributed Shampoo), on averages, grafting and tiles. Differs from both in ε, which is
relative to the factor (`optaxplus.numerics.inverse_root`), so that the update does not
depend on the scale of the gradients; Algorithm 1 starts L and R from ε·I.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optaxplus import trees, validation
from optaxplus.custom_types import Axes, DTypeName, PyTree, Scalar
from optaxplus.numerics.hyperparameters import as_decay_rate, as_epsilon
from optaxplus.numerics.matrix_roots import (
    ROOT_METHODS,
    by_platform,
    diagonal_of_second_moment,
    in_groups,
    inverse_root,
    second_moment,
)
from optaxplus.numerics.moving_averages import bias_correction, mix
from optaxplus.numerics.norms import euclidean_norm, or_one
from optaxplus.numerics.products import product
from optaxplus.sharding.owners import shared
from optaxplus.sharding.placement import Placement, check_placement, check_specs
from optaxplus.transforms.kronecker import (
    Fields,
    check_max_dim,
    init_side,
    on_matrices,
    sides_of,
)

__all__ = ["ScaleByShampooState", "scale_by_shampoo"]

GRAFTINGS = ("sgd", "adagrad", "adam")


class ScaleByShampooState(NamedTuple):
    """State of `scale_by_shampoo`.

    The factors of a side of n have shape (*batch axes, tiles, n, n), float32 (float64
    for float64 parameters), or (*batch axes, tiles, n, 1) if only their diagonal is
    kept; a side without one has `optax.MaskedNode()`.

    Attributes:
      count: Finished updates; shape (), int32.
      mu: First moment M; like the parameters, in `mu_dtype`.
      nu: Second moment V of "adagrad" and "adam"; like the parameters, in `nu_dtype`.
        Else None.
      factor_in: Factors L, of fan_in.
      factor_out: Factors R, of fan_out.
      root_in: Inverse roots P_L of L; zeros before the first step.
      root_out: Inverse roots P_R of R; likewise.
    """

    count: jax.Array
    mu: PyTree
    nu: Any
    factor_in: PyTree
    factor_out: PyTree
    root_in: PyTree
    root_out: PyTree


class _Leaf(NamedTuple):
    """Arrays (..., m, n) of one parameter, or of several; None for what it has not."""

    update: jax.Array  # the gradient before the step
    mu: jax.Array
    nu: jax.Array | None
    factor_in: jax.Array | None
    factor_out: jax.Array | None
    root_in: jax.Array | None
    root_out: jax.Array | None


_FIELDS = Fields(
    moments=2,
    sides=(0, 1, 0, 1),
    kinds=("full", "diagonal"),
    slow=frozenset({"root_in", "root_out"}),
)


def _is_diagonal(factor: jax.Array, x: jax.Array, side: int) -> bool:
    return factor.shape[-1] == 1 < x.shape[-2 + side]


def _second_moment(g: jax.Array, side: int, *, is_diagonal: bool) -> jax.Array:
    """G·Gᵀ for fan_in, Gᵀ·G for fan_out, or its diagonal as a column."""
    rows = g if side == 0 else g.mT
    if is_diagonal:
        return diagonal_of_second_moment(rows)
    return second_moment(rows)


def _between(
    x: jax.Array, roots: tuple[jax.Array | None, jax.Array | None]
) -> jax.Array:
    """P_L·x·P_R, without what is None."""
    left, right = roots
    if left is not None:
        x = left * x if _is_diagonal(left, x, 0) else product(left, x)
    if right is not None:
        x = x * right.mT if _is_diagonal(right, x, 1) else product(x, right)
    return x


def _moments(
    leaf: _Leaf, *, b1: Scalar, weights: tuple[Any, ...], grafted: tuple[Any, ...]
) -> _Leaf:
    """The averages with this gradient; `weights` of the old value and of the new."""
    g = leaf.update
    b1 = trees.scalar_for(b1, g)
    (old, new), (old_nu, new_nu) = (
        [trees.scalar_for(x, g) for x in pair] for pair in (weights, grafted)
    )
    fields: dict[str, jax.Array] = {"mu": mix(b1, leaf.mu.astype(g.dtype), g)}
    if leaf.nu is not None:
        fields["nu"] = old_nu * leaf.nu.astype(g.dtype) + new_nu * g * g
    for side, name in enumerate(("factor_in", "factor_out")):
        factor = getattr(leaf, name)
        if factor is not None:
            is_diagonal = _is_diagonal(factor, g, side)
            moment = _second_moment(g, side, is_diagonal=is_diagonal)
            fields[name] = (old * factor + new * moment).astype(factor.dtype)
    return leaf._replace(**fields)


# Compiled by itself so that an update outside of `jax.jit` compiles it only once.
@partial(
    jax.jit, static_argnames=("copies", "root_order", "method", "margin"), inline=True
)
def _refreshed(
    is_due: jax.Array,
    leaves: list[_Leaf],
    debias: Scalar,
    eps: jax.Array,
    *,
    copies: tuple[str, ...],
    root_order: int | None,
    method: str,
    margin: float | None,
) -> list[_Leaf]:
    """The leaves, with new roots if they are due; ε is `margin`, or `eps` if None."""

    def kept(leaves: list[_Leaf]) -> list[tuple[jax.Array | None, ...]]:
        return [leaf[5:7] for leaf in leaves]

    def new(leaves: list[_Leaf]) -> list[tuple[jax.Array | None, ...]]:
        rooted = _roots(
            leaves,
            copies,
            root_order=root_order,
            method=method,
            eps=eps if margin is None else margin,
            debias=debias,
        )
        return kept(rooted)

    # What comes out of a branch is copied there, changed or not.
    roots = lax.cond(is_due, new, kept, leaves)
    return [_Leaf(*x[:5], *own) for x, own in zip(leaves, roots, strict=True)]


def _roots(
    leaves: list[_Leaf],
    copies: tuple[str, ...],
    *,
    root_order: int | None,
    method: str,
    eps: Scalar,
    debias: Scalar,
) -> list[_Leaf]:
    """The inverse roots of all factors, `debias` being 1 - β₂ᵗ."""

    def order_of(leaf: _Leaf) -> int:
        return root_order or 2 * sum(x is not None for x in leaf[3:5])

    def is_full(x: jax.Array | None) -> bool:
        return x is not None and x.shape[-1] == x.shape[-2]

    results = {}
    for order in {order_of(leaf) for leaf in leaves}:

        def root(x: jax.Array, order: int = order) -> tuple[jax.Array, ...]:
            return (
                inverse_root(x, order, eps=trees.scalar_for(eps, x), method=method),
            )

        keys = [
            (i, side)
            for i, leaf in enumerate(leaves)
            for side in (0, 1)
            if order_of(leaf) == order and is_full(leaf[3 + side])
        ]
        factors: list[Any] = [leaves[i][3 + side] for i, side in keys]
        roots = in_groups(shared(by_platform(root), copies), factors)
        results |= {key: y for key, (y,) in zip(keys, roots, strict=True)}

    def of(i: int, leaf: _Leaf, side: int) -> jax.Array | None:
        factor, order = leaf[3 + side], order_of(leaf)
        if factor is None:
            return None
        y = results.get((i, side))
        if y is None:
            y = _root_of_diagonal(factor, order, trees.scalar_for(eps, factor))
        return y * trees.scalar_for(debias, y) ** (1 / order)

    return [
        leaf._replace(root_in=of(i, leaf, 0), root_out=of(i, leaf, 1))
        for i, leaf in enumerate(leaves)
    ]


def _root_of_diagonal(x: jax.Array, order: int, eps: Scalar) -> jax.Array:
    """max(x, ε·‖x‖)^(-1/p) of a column; zeros for zeros."""
    largest = jnp.max(x, axis=-2, keepdims=True, initial=0.0)
    unit = x / jnp.where(largest > 0, largest, 1.0)
    norm = jnp.linalg.norm(unit, axis=-2, keepdims=True)
    shifted = jnp.maximum(unit, eps * norm)
    positive = shifted > 0
    root = jnp.where(positive, shifted, 1.0) ** (-1 / order)
    scale = jnp.where(largest > 0, largest, 1.0) ** (-1 / order)
    return jnp.where(positive, root * scale, jnp.where(jnp.isnan(x), x, 0.0))


def _direction(
    leaf: _Leaf,
    *,
    scale_mu: Scalar,
    scale_nu: Scalar,
    grafting: str | None,
    grafting_eps: Scalar,
) -> jax.Array:
    """U of one leaf."""
    dtype = leaf.update.dtype
    scale_mu, scale_nu, eps = (
        trees.scalar_for(x, leaf.update) for x in (scale_mu, scale_nu, grafting_eps)
    )
    mean = scale_mu * leaf.mu.astype(dtype)
    u = _between(mean, (leaf.root_in, leaf.root_out))
    if grafting is None:
        return u
    if leaf.nu is not None:
        mean = mean / (jnp.sqrt(scale_nu * leaf.nu.astype(dtype)) + eps)
    wanted, has = (euclidean_norm(x, (-2, -1)) for x in (mean, u))
    return u * (wanted / or_one(has))


def _shampoo(
    leaves: list[_Leaf],
    *,
    is_due: jax.Array,
    copies: tuple[str, ...],
    b1: Scalar,
    b2_old: Scalar,
    b2_new: Scalar,
    b3_old: Scalar,
    b3_new: Scalar,
    eps: Scalar,
    debias: Scalar,
    scale_mu: Scalar,
    scale_nu: Scalar,
    root_order: int | None,
    method: str,
    grafting: str | None,
    grafting_eps: Scalar,
) -> list[_Leaf]:
    """One step of all leaves."""
    stepped = [
        _moments(leaf, b1=b1, weights=(b2_old, b2_new), grafted=(b3_old, b3_new))
        for leaf in leaves
    ]

    is_array = isinstance(eps, jax.Array)
    stepped = _refreshed(
        is_due,
        stepped,
        debias,
        jnp.asarray(eps),
        copies=copies,
        root_order=root_order,
        method=method,
        margin=None if is_array else eps,
    )
    results = []
    for leaf, old in zip(stepped, leaves, strict=True):
        update = _direction(
            leaf,
            scale_mu=scale_mu,
            scale_nu=scale_nu,
            grafting=grafting,
            grafting_eps=grafting_eps,
        )
        moments = trees.cast_like((leaf.mu, leaf.nu), (old.mu, old.nu))
        results.append(_Leaf(update, *moments, *leaf[3:]))
    return results


def scale_by_shampoo(
    b1: Scalar = 0.95,
    b2: Scalar = 0.95,
    *,
    b3: Scalar = 0.95,
    eps: Scalar = 1e-6,
    update_interval: int = 10,
    max_dim: int = 1024,
    large_dims: str = "tiles",
    grafting: str | None = "adam",
    grafting_eps: Scalar = 1e-8,
    root_order: int | None = None,
    root_method: str = "eigh",
    axes: Axes = None,
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
    placement: Placement | str | None = "auto",
) -> optax.GradientTransformation:
    """Multiplies matrices with inverse roots of the moments of their rows and columns.

    With both averages off and roots in every step the update of a matrix is its polar
    factor, Muon's; averages make it that of the gradients' distribution. `grafting`
    leaves the size of the step to another method, whose learning rate then fits.

        Gupta et al.          b1=0.0, b2=1.0, update_interval=1, grafting=None
        Distributed Shampoo   b1=0.9, b2=1.0, update_interval=1, grafting=None

    State: 4 bytes per parameter, 4 for V, and 8·n² for each side of n of a tile: 24
    bytes per parameter for square matrices. A step costs four products, a
    refresh an inverse root of each.

    Args:
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the factors, in [0, 1), or 1 for sums. Static if 1.
      b3: Decay rate of the second moment of grafting "adam", in [0, 1). (In
        `scale_by_soap` b2 is that of the second moment and b3 that of the factors.)
      eps: Smallest eigenvalue of a factor, relative to its Frobenius norm, see
        `optaxplus.numerics.inverse_root`. >= 0. Static for `root_method="newton"`.
      update_interval: Steps from one refresh of the roots to the next, >= 1; the first
        step is one. Static.
      max_dim: Largest side that has a full factor, >= 1. Static.
      large_dims: What becomes of larger sides: "tiles" cuts them into equal tiles of at
        most `max_dim`, each a matrix of its own, "diagonal" keeps the diagonal of their
        factor. Static.
      grafting: The method whose norm the step of every tile takes, "sgd", "adagrad" or
        "adam", or None. Static.
      grafting_eps: Added to the root of its second moment. > 0.
      root_order: p >= 1; None: twice the number of sides, 4 for matrices and 2 for
        vectors. Static.
      root_method: "eigh", or "newton", which is made of products, for TPUs: their
        compiler takes minutes for an eigendecomposition. See
        `optaxplus.numerics.inverse_root`. Static.
      axes: Matrix axes, see `optaxplus.custom_types`. Splits are matrices of their own.
      mu_dtype: Dtype of the first moment, see `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of the second moment. Static.
      placement: Which device does the work, see `optaxplus.custom_types`. Static.

    Returns:
      A transformation with state `ScaleByShampooState`; emits float32. Under
      `optax.inject_hyperparams` pass `static_args=("update_interval", "max_dim")`, and
      "root_order" if it is given, "b2" if it is 1, "eps" with "newton".

      Without grafting the scale of the gradients does not matter for b2 < 1, as long as
      their largest entries are between about 1e-18 and 1e15: below, the factors are 0
      and so is the update; above, they do not grow any more, and the update does. A
      zero gradient leaves all of the update to the mean. Where squares overflow
      (entries above about 1e19) that of grafting "adam" and "adagrad" is 0 from then
      on. Where a gradient is not finite its matrix is NaN from the next refresh
      on at the latest, and not finite until then.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not real floating
        point.
      ValueError: If an argument is out of range, axes or specs do not fit, or a side
        has no equal tiles between a quarter of `max_dim` and `max_dim`.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = optax.chain(ox.scale_by_shampoo(), ox.descend(1e-3, 0.1))
      >>> state = tx.init({"w": jnp.ones((8, 4)), "b": jnp.ones(4)})
      >>> state[0].root_in["w"].shape, state[0].root_out["b"].shape
      ((1, 8, 8), (1, 4, 4))

    References:
      Gupta et al., Shampoo: Preconditioned Stochastic Tensor Optimization, arXiv
      1802.09568; Shi et al., arXiv 2309.06497.
    """
    name = "scale_by_shampoo"
    validation.check_decay_rate(name, b1=b1, b3=b3)
    validation.check_non_negative(name, b2=b2, eps=eps)
    validation.check_at_most(name, 1.0, b2=b2)
    is_sum = not isinstance(b2, jax.Array) and b2 == 1
    validation.check_positive(name, grafting_eps=grafting_eps)
    validation.check_int(name, minimum=1, update_interval=update_interval)
    if root_order is not None:
        validation.check_int(name, minimum=1, root_order=root_order)
    validation.check_choice(name, "grafting", grafting, (*GRAFTINGS, None))
    validation.check_choice(name, "root_method", root_method, ROOT_METHODS)
    if root_method == "newton":
        validation.check_static_margin(name, eps=eps)
    validation.check_floating_dtype(name, mu_dtype=mu_dtype, nu_dtype=nu_dtype)
    check_max_dim(name, max_dim, large_dims)
    check_placement(name, placement)
    eps = eps if isinstance(eps, jax.Array) else float(eps)
    b1, b3, grafting_eps = (
        as_decay_rate(b1),
        as_decay_rate(b3),
        as_epsilon(grafting_eps),
    )
    b2 = 1.0 if is_sum else as_decay_rate(b2)

    def init_fn(params: PyTree) -> ScaleByShampooState:
        trees.check_floating(name, params, real=True)
        check_specs(name, placement, params)
        sides = sides_of(
            name, axes, params, max_dim, large_dims, vectors=("none", "full")
        )
        factors = [init_side(params, sides, side, _FIELDS.kinds) for side in (0, 1)]
        has_nu = grafting in ("adagrad", "adam")
        return ScaleByShampooState(
            jnp.zeros([], jnp.int32),
            trees.init_moment(name, params, mu_dtype),
            trees.init_moment(name, params, nu_dtype) if has_nu else None,
            *factors,
            *jax.tree.map(jnp.zeros_like, factors),
        )

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, ScaleByShampooState]:
        del params
        count = trees.increment(state.count)
        is_mean = grafting == "adam"
        updates, *rest = on_matrices(
            name,
            _shampoo,
            _Leaf,
            _FIELDS,
            (jax.tree.map(trees.widen, updates), *state[1:]),
            sides_of(
                name, axes, updates, max_dim, large_dims, vectors=("none", "full")
            ),
            placement,
            is_due=state.count % update_interval == 0,
            b1=b1,
            b2_old=b2,
            b2_new=1.0 if is_sum else 1 - b2,
            b3_old=b3 if is_mean else 1.0,
            b3_new=1 - b3 if is_mean else 1.0,
            eps=eps,
            debias=1.0 if is_sum else bias_correction(b2, count),
            scale_mu=1.0 / bias_correction(b1, count),
            scale_nu=1.0 / bias_correction(b3, count) if is_mean else 1.0,
            root_order=root_order,
            method=root_method,
            grafting=grafting,
            grafting_eps=grafting_eps,
        )
        return updates, ScaleByShampooState(count, *rest)

    return optax.GradientTransformation(init_fn, update_fn)
