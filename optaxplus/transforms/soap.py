"""SOAP: Adam in the eigenbasis of Shampoo's factors.

For each matrix G:

    first step:  L = (1 - β₃)·G·Gᵀ, R = (1 - β₃)·Gᵀ·G, Q_L and Q_R their eigenvectors;
                 the update is zero and Adam has seen nothing
    later:       G' = Q_Lᵀ·G·Q_R
                 M <- β₁·M + (1 - β₁)·G',  V <- β₂·V + (1 - β₂)·G'²
                 U = sqrt(1 - β₂ᵗ)/(1 - β₁ᵗ) · Q_L·[M/(sqrt(V) + ε)]·Q_Rᵀ
                 L <- β₃·L + (1 - β₃)·G·Gᵀ,  R <- β₃·R + (1 - β₃)·Gᵀ·G
    every k-th:  Q_L, Q_R <- one orthogonal iteration (`numerics.matrix_roots`);
                 M turned into the new bases, the columns of V in their order

t counts the steps after the first one. A side above `max_dim` has no basis, or is cut
into tiles; a vector is Adam's.

Letters to arguments: β₁, β₂, β₃ are `b1`, `b2`, `b3`; k is `update_interval`, ε is
`eps`. To the state: M, V are `mu`, `nu`, both in the eigenbases; L, R are `factor_in`,
`factor_out`, Q_L, Q_R `basis_in`, `basis_out`.

Source: Vyas et al., SOAP, arXiv 2409.11321, Algorithm 3, and the authors' code
(nikhilvyas/SOAP, `soap.py`), which the first step and ε are from. Theirs decays weights
after the step; `optaxplus.descend` before it.
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
    by_platform,
    eigenbasis,
    in_groups,
    iterated_eigenbasis,
    next_eigenbasis,
    second_moment,
)
from optaxplus.numerics.moving_averages import bias_correction, mix
from optaxplus.numerics.norms import mix_square
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

__all__ = ["ScaleBySoapState", "scale_by_soap"]


class ScaleBySoapState(NamedTuple):
    """State of `scale_by_soap`.

    The factors of a side of n have shape (*batch axes, tiles, n, n), float32 (float64
    for float64 parameters); a side without one has `optax.MaskedNode()`.

    Attributes:
      count: Gradients seen; shape (), int32.
      mu: First moment M; like the parameters, in `mu_dtype`.
      nu: Second moment V; like the parameters, in `nu_dtype`.
      factor_in: Factors L, of fan_in.
      factor_out: Factors R, of fan_out.
      basis_in: Eigenvectors Q_L of L as columns; zeros before the first step.
      basis_out: Eigenvectors Q_R of R; likewise.
    """

    count: jax.Array
    mu: PyTree
    nu: PyTree
    factor_in: PyTree
    factor_out: PyTree
    basis_in: PyTree
    basis_out: PyTree


class _Leaf(NamedTuple):
    """Arrays (..., m, n) of one parameter, or of several; None for no factor."""

    update: jax.Array  # the gradient before the step
    mu: jax.Array
    nu: jax.Array
    factor_in: jax.Array | None
    factor_out: jax.Array | None
    basis_in: jax.Array | None
    basis_out: jax.Array | None


_FIELDS = Fields(
    moments=2,
    sides=(0, 1, 0, 1),
    kinds=("full",),
    slow=frozenset({"basis_in", "basis_out"}),
)


def _turn(x: jax.Array, left: jax.Array | None, right: jax.Array | None) -> jax.Array:
    """leftᵀ·x·right, without what is None."""
    x = x if left is None else product(left.mT, x)
    return x if right is None else product(x, right)


def _transposed(basis: jax.Array | None) -> jax.Array | None:
    return None if basis is None else basis.mT


def _adam_in_bases(
    leaf: _Leaf,
    *,
    is_first: jax.Array,
    b1: Scalar,
    b2: Scalar,
    b3: Scalar,
    eps: Scalar,
    scale: Scalar,
) -> _Leaf:
    """One step of Adam in the eigenbases, and the factors with this gradient."""
    g, mu, nu, factor_in, factor_out, basis_in, basis_out = leaf
    b1, b2, b3, eps, scale = (trees.scalar_for(x, g) for x in (b1, b2, b3, eps, scale))
    rotated = jnp.where(is_first, 0.0, _turn(g, basis_in, basis_out))
    m = mix(b1, mu.astype(g.dtype), rotated)
    v = mix_square(b2, nu.astype(g.dtype), rotated)
    adam = scale * m / (jnp.sqrt(v) + eps)
    return _Leaf(
        update=_turn(adam, _transposed(basis_in), _transposed(basis_out)),
        mu=m.astype(mu.dtype),
        nu=v.astype(nu.dtype),
        factor_in=factor_in
        if factor_in is None
        else mix(b3, factor_in, second_moment(g)).astype(factor_in.dtype),
        factor_out=factor_out
        if factor_out is None
        else mix(b3, factor_out, second_moment(g.mT)).astype(factor_out.dtype),
        basis_in=basis_in,
        basis_out=basis_out,
    )


def _first_bases(leaves: list[_Leaf], copies: tuple[str, ...]) -> list[_Leaf]:
    """The eigenvectors of all factors; mu and nu are zero."""
    factors = [x for leaf in leaves for x in leaf[3:5] if x is not None]
    function = by_platform(
        lambda x: (eigenbasis(x),), lambda x: (iterated_eigenbasis(x),)
    )
    bases = iter(in_groups(shared(function, copies), factors))

    def of(factor: jax.Array | None) -> jax.Array | None:
        return None if factor is None else next(bases)[0]

    return [
        leaf._replace(basis_in=of(leaf.factor_in), basis_out=of(leaf.factor_out))
        for leaf in leaves
    ]


def _next_bases(leaves: list[_Leaf], copies: tuple[str, ...]) -> list[_Leaf]:
    """The bases one iteration further, mu and nu in them."""
    factors = [x for leaf in leaves for x in leaf[3:5] if x is not None]
    bases = [x for leaf in leaves for x in leaf[5:7] if x is not None]
    function = by_platform(next_eigenbasis, partial(next_eigenbasis, by_panels=True))
    results = iter(in_groups(shared(function, copies), factors, bases))

    def turned(leaf: _Leaf) -> _Leaf:
        mu, nu = leaf.mu.astype(leaf.update.dtype), leaf.nu
        new_in, new_out = leaf.basis_in, leaf.basis_out
        if leaf.basis_in is not None:
            new_in, order = next(results)
            mu = product(product(new_in.mT, leaf.basis_in), mu)
            nu = jnp.take_along_axis(nu, order[..., :, None], axis=-2)
        if leaf.basis_out is not None:
            new_out, order = next(results)
            mu = product(mu, product(leaf.basis_out.mT, new_out))
            nu = jnp.take_along_axis(nu, order[..., None, :], axis=-1)
        mu = mu.astype(leaf.mu.dtype)
        return leaf._replace(mu=mu, nu=nu, basis_in=new_in, basis_out=new_out)

    return [turned(leaf) for leaf in leaves]


# Compiled by itself so that an update outside of `jax.jit` compiles it only once.
@partial(jax.jit, static_argnames="copies", inline=True)
def _refreshed(
    turn: jax.Array, leaves: list[_Leaf], copies: tuple[str, ...]
) -> list[_Leaf]:
    """0: the bases stay; 1: an iteration; 2: a decomposition."""

    def changing(leaves: list[_Leaf]) -> list[tuple[jax.Array | None, ...]]:
        # What comes out of a branch is copied there, changed or not.
        return [(leaf.mu, leaf.nu, *leaf[5:7]) for leaf in leaves]

    branches = [
        changing,
        lambda leaves: changing(_next_bases(leaves, copies)),
        lambda leaves: changing(_first_bases(leaves, copies)),
    ]
    return [
        _Leaf(leaf.update, mu, nu, *leaf[3:5], *bases)
        for leaf, (mu, nu, *bases) in zip(
            leaves, lax.switch(turn, branches, leaves), strict=True
        )
    ]


def _soap(
    leaves: list[_Leaf],
    *,
    is_due: jax.Array,
    is_first: jax.Array,
    copies: tuple[str, ...],
    **arguments: Any,
) -> list[_Leaf]:
    """One step of all leaves."""
    stepped = [_adam_in_bases(leaf, is_first=is_first, **arguments) for leaf in leaves]
    turn = jnp.where(is_first, 2, jnp.where(is_due, 1, 0))
    return _refreshed(turn, stepped, copies)


def scale_by_soap(
    b1: Scalar = 0.95,
    b2: Scalar = 0.95,
    *,
    b3: Scalar | None = None,
    eps: Scalar = 1e-8,
    update_interval: int = 10,
    max_dim: int = 10000,
    large_dims: str = "diagonal",
    axes: Axes = None,
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
    placement: Placement | str | None = "auto",
) -> optax.GradientTransformation:
    """Adam in a basis where the coordinates of every matrix are least correlated.

    The first gradient only makes the bases: its update is zero. Vectors are Adam's from
    the second step on.

    State: 8 bytes per parameter, and 8·n² for each side of n <= max_dim: 24 bytes per
    parameter in all for square matrices, 42 for those four times as long as wide. A
    step costs six products, three with each side; a refresh three products and a QR
    decomposition a side, the first step two decompositions into eigenvectors. On TPUs,
    whose compiler takes minutes for those, the first step iterates 32 times instead:
    a few percent of a factor may be left off the diagonal of its first basis.

    Args:
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      b3: Decay rate of the factors, in [0, 1); None is `b2`. Static if None.
      eps: Added to the root of the second moment before its bias correction. > 0.
      update_interval: Steps from one refresh of the bases to the next, >= 1. Static.
      max_dim: Largest side that has a basis, >= 1. Static.
      large_dims: What becomes of larger sides: "diagonal" leaves them as they are (the
        eigenbasis of a diagonal factor), "tiles" cuts them into equal tiles of at most
        `max_dim`, each a matrix of its own. Static.
      axes: Matrix axes, see `optaxplus.custom_types`. Splits are matrices of their own.
      mu_dtype: Dtype of the first moment, see `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of the second moment. Static.
      placement: Which device does the work, see `optaxplus.custom_types`. Static.

    Returns:
      A transformation with state `ScaleBySoapState`; emits float32. Under
      `optax.inject_hyperparams` pass
      `static_args=("b3", "update_interval", "max_dim")`; leave out "b3" if it is given.

      A zero gradient leaves all of the update to Adam's mean. Gradients with entries
      above about 1e15 are in the factors as if these were the largest. Where the
      squares of a rotated gradient overflow float32 (entries above about 1e19) the
      update is 0 from then on, as with Adam; where a gradient is not finite its matrix
      is NaN from then on.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not real floating
        point.
      ValueError: If an argument is out of range, axes or specs do not fit, or a side
        has no equal tiles between a quarter of `max_dim` and `max_dim`.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = optax.chain(ox.scale_by_soap(), ox.descend(3e-3, 0.01))
      >>> state = tx.init({"w": jnp.ones((8, 4)), "b": jnp.ones(4)})
      >>> state[0].basis_in["w"].shape, state[0].basis_out["w"].shape
      ((1, 8, 8), (1, 4, 4))

    References:
      Vyas et al., SOAP: Improving and Stabilizing Shampoo using Adam, arXiv 2409.11321.
    """
    name = "scale_by_soap"
    validation.check_decay_rate(name, b1=b1, b2=b2)
    if b3 is not None:
        validation.check_decay_rate(name, b3=b3)
    validation.check_positive(name, eps=eps)
    validation.check_int(name, minimum=1, update_interval=update_interval)
    validation.check_floating_dtype(name, mu_dtype=mu_dtype, nu_dtype=nu_dtype)
    check_max_dim(name, max_dim, large_dims)
    check_placement(name, placement)
    b1, b2, eps = as_decay_rate(b1), as_decay_rate(b2), as_epsilon(eps)
    b3 = b2 if b3 is None else as_decay_rate(b3)

    def init_fn(params: PyTree) -> ScaleBySoapState:
        trees.check_floating(name, params, real=True)
        check_specs(name, placement, params)
        sides = sides_of(
            name, axes, params, max_dim, large_dims, vectors=("none", "none")
        )
        factors = [init_side(params, sides, side, _FIELDS.kinds) for side in (0, 1)]
        return ScaleBySoapState(
            jnp.zeros([], jnp.int32),
            trees.init_moment(name, params, mu_dtype),
            trees.init_moment(name, params, nu_dtype),
            *factors,
            *jax.tree.map(jnp.zeros_like, factors),
        )

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, ScaleBySoapState]:
        del params
        count = jnp.maximum(state.count, 1)
        scale = jnp.sqrt(bias_correction(b2, count)) / bias_correction(b1, count)
        updates, *rest = on_matrices(
            name,
            _soap,
            _Leaf,
            _FIELDS,
            (jax.tree.map(trees.widen, updates), *state[1:]),
            sides_of(
                name, axes, updates, max_dim, large_dims, vectors=("none", "none")
            ),
            placement,
            is_due=state.count % update_interval == 0,
            is_first=state.count == 0,
            b1=b1,
            b2=b2,
            b3=b3,
            eps=eps,
            scale=scale,
        )
        return updates, ScaleBySoapState(trees.increment(state.count), *rest)

    return optax.GradientTransformation(init_fn, update_fn)
