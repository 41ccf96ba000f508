"""Sophia: steps of Newton along the axes, clipped where curvature is small or unknown.

    m_t = β₁·m_{t-1} + (1 - β₁)·g_t
    h_t = β₂·h_{t-1} + (1 - β₂)·ĥ_t                in every k-th step; else h_{t-1}
    u_t = clip(m_t / max(γ·h_t, ε), -1, 1)         entry by entry

ĥ is an estimate of the diagonal of the Hessian, which the caller gives: see
`optaxplus.hutchinson` (Sophia-H) and `optaxplus.gauss_newton_bartlett` (Sophia-G).

Letters to arguments: β₁, β₂, γ, ε, k are `b1`, `b2`, `gamma`, `eps`, `update_interval`;
m, h are the state's `mu`, `hessian`.

Source: Liu et al., Sophia, arXiv 2305.14342, Algorithm 3, whose first step refreshes h.
The authors' code (Liuhong99/Sophia, `sophia.py`, `train_sophiag.py`) refreshes h after
the steps k, 2k, …, so that it is used from step k + 1 on: `first_refresh=k`. It divides
by γ·B·h + 1e-15 with h the average of ĝ², which is ours with ĥ = B·ĝ² and eps=1e-15;
their training script also clips the norm of ĝ to 1.
`optax.contrib.sophia` refreshes h after the first step and corrects the bias of m:
`first_refresh=1, debias=True`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxplus import trees, validation
from optaxplus.custom_types import DTypeName, PyTree, Scalar
from optaxplus.numerics.hyperparameters import as_decay_rate, as_epsilon
from optaxplus.numerics.moving_averages import bias_correction, mix

__all__ = ["ScaleBySophiaState", "bind_hessian", "scale_by_sophia"]


class ScaleBySophiaState(NamedTuple):
    """State of `scale_by_sophia`.

    Attributes:
      count: Finished updates; shape (), int32.
      mu: First moment m; like the parameters, in `mu_dtype`.
      hessian: Average h of the estimates; like the parameters, in `nu_dtype`. Not
        called `nu`, because it may be negative.
    """

    count: jax.Array
    mu: PyTree
    hessian: PyTree


def _refreshed_leaf(hessian: jax.Array, estimate: jax.Array, b2: Scalar) -> jax.Array:
    wide = trees.widen(hessian)
    b2 = trees.scalar_for(b2, wide)
    return mix(b2, wide, estimate.astype(wide.dtype)).astype(hessian.dtype)


def _sophia_leaf(
    g: jax.Array,
    mu: jax.Array,
    hessian: jax.Array,
    *,
    b1: Scalar,
    gamma: Scalar,
    eps: Scalar,
    scale: Scalar,
) -> tuple[jax.Array, jax.Array]:
    """One leaf: (u, m). `scale` is 1/(1-β₁ᵗ) where the bias of m is corrected."""
    wide = trees.widen(g)
    b1, gamma, eps, scale = (trees.scalar_for(x, g) for x in (b1, gamma, eps, scale))
    m = mix(b1, mu.astype(wide.dtype), wide)
    curvature = jnp.maximum(gamma * hessian.astype(wide.dtype), eps)
    return jnp.clip(scale * m / curvature, -1.0, 1.0), m.astype(mu.dtype)


def scale_by_sophia(
    b1: Scalar = 0.96,
    b2: Scalar = 0.99,
    *,
    gamma: Scalar = 0.01,
    eps: Scalar = 1e-12,
    update_interval: int = 10,
    first_refresh: int = 0,
    debias: bool = False,
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformationExtraArgs:
    """Divides a running mean of the gradient by a running diagonal of the Hessian.

    No entry of the update is larger than 1: where the curvature is small, negative or
    not yet known it is the sign of the mean.

    `update(grads, state, params, hessian=…)` has to be given the estimate, either as

    - a function of params that returns a pytree like them. It is called in a branch
      that only steps with a refresh take, every `update_interval`-th, so that what it
      computes costs as much less. It gets the params that `update` got, or
    - a pytree like the gradients, which other steps ignore.

    Inside of `optax.masked` and `optax.partition` pass the pytree of the whole model,
    of which each group takes its part. A function is called with the part there, the
    rest masked; one that ignores its argument, `lambda _: estimate(params)`, works. The
    estimate is that of the loss itself: do not multiply it by a loss scale.
    `optaxplus.accumulate` calls the function once per update, `optax.MultiSteps` in
    every micro-step of an update with a refresh. `optaxplus.quantize_state` makes the
    smallest entries of the diagonal 0, so that they clip; where none is negative
    `fields={"mu": "signed", "hessian": "unsigned"}` keeps them.

    Args:
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the diagonal, in [0, 1), per refresh.
      gamma: Scale of the diagonal, >= 0: the larger, the fewer entries are clipped. The
        authors tune it until 10 % to 50 % are not; 0.01 for `hutchinson`, 0.05 for
        `gauss_newton_bartlett`.
      eps: Smallest denominator. > 0.
      update_interval: Steps from one refresh of the diagonal to the next. >= 1. Static.
      first_refresh: Steps before the first refresh, in which the update is the sign of
        the first moment. >= 0. Static.
      debias: Whether the first moment is divided by 1 - b1ᵗ, as optax and Levanter do.
        Static.
      mu_dtype: Dtype of the first moment, see `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of the diagonal. In bfloat16 it stalls once a refresh changes it
        by less than 1/256. Static.

    Returns:
      A transformation with state `ScaleBySophiaState`; emits float32 with entries in
      [-1, 1]. Under `optax.inject_hyperparams` pass
      `static_args=("update_interval", "first_refresh")`. Zero gradients give zeros.
      Where an estimate is +infinity the update is 0 from then on. NaN in a gradient or
      an estimate makes its entry NaN from then on; an infinite gradient makes it ±1,
      or NaN if the estimate is infinite too.

    Raises:
      TypeError: If an argument has a wrong type, a parameter or an entry of `hessian`
        is not real floating point, or `update` is called without `hessian`.
      ValueError: If an argument is out of range, `hessian` lacks a parameter or has
        another shape, or is a function and `update` is called without params or with a
        part of them that it does not take.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optaxplus as ox
      >>> loss = lambda params: jnp.sum(jnp.array([50.0, 2.0]) * params**2)
      >>> rule = ox.scale_by_sophia(b1=0.0, b2=0.0, gamma=1.0)
      >>> tx = optax.chain(rule, ox.descend(1.0))
      >>> params = jnp.array([0.5, -3.0])
      >>> updates, _ = tx.update(
      ...     jax.grad(loss)(params),
      ...     tx.init(params),
      ...     params,
      ...     hessian=lambda params: jnp.diag(jax.hessian(loss)(params)),
      ... )
      >>> print(optax.apply_updates(params, updates))  # Newton's, and clipped.
      [ 0. -2.]

    References:
      Liu et al., arXiv 2305.14342, Algorithm 3; Liuhong99/Sophia.
    """
    name = "scale_by_sophia"
    validation.check_decay_rate(name, b1=b1, b2=b2)
    validation.check_non_negative(name, gamma=gamma)
    validation.check_positive(name, eps=eps)
    validation.check_int(name, minimum=1, update_interval=update_interval)
    validation.check_int(name, minimum=0, first_refresh=first_refresh)
    validation.check_flag(name, debias=debias)
    validation.check_floating_dtype(name, mu_dtype=mu_dtype, nu_dtype=nu_dtype)
    b1, b2, eps = as_decay_rate(b1), as_decay_rate(b2), as_epsilon(eps)

    def init_fn(params: PyTree) -> ScaleBySophiaState:
        trees.check_floating(name, params, real=True)
        return ScaleBySophiaState(
            count=jnp.zeros([], jnp.int32),
            mu=trees.init_moment(name, params, mu_dtype),
            hessian=trees.init_moment(name, params, nu_dtype),
        )

    def refreshed(old: PyTree, estimates: PyTree) -> PyTree:
        return jax.tree.map(lambda h, new: _refreshed_leaf(h, new, b2), old, estimates)

    def update_fn(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        hessian: PyTree | Callable[[PyTree], PyTree] = None,
        **extra_args: Any,
    ) -> tuple[PyTree, ScaleBySophiaState]:
        del extra_args
        if hessian is None:
            raise TypeError(
                f"{name}: hessian=None is not allowed; call tx.update(grads, state, "
                "params, hessian=...) with an estimate of the diagonal of the Hessian, "
                "a pytree like grads or a function of params that returns one, such as "
                "hessian=lambda params: optaxplus.hutchinson(loss_fn, params, key)."
            )
        since = state.count - first_refresh
        is_due = (since >= 0) & (since % update_interval == 0)
        if _is_function(hessian):
            new = jax.lax.cond(
                is_due,
                lambda old: refreshed(old, _part_of(_called(hessian, params), updates)),
                lambda old: old,
                state.hessian,
            )
        else:
            # A choice and no branch: it is fused with the rest of the update.
            new = jax.tree.map(
                lambda new, old: jnp.where(is_due, new, old),
                refreshed(state.hessian, _part_of(hessian, updates)),
                state.hessian,
            )
        count = trees.increment(state.count)
        scale = 1.0 / bias_correction(b1, count) if debias else 1.0
        updates, mu = trees.map_several(
            lambda *leaves: _sophia_leaf(
                *leaves, b1=b1, gamma=gamma, eps=eps, scale=scale
            ),
            2,
            updates,
            state.mu,
            new,
        )
        return updates, ScaleBySophiaState(count, mu, new)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def bind_hessian(hessian: Any, params: PyTree | None) -> Any:
    """The argument `hessian`, called with these params if it is a function.

    For what gives other params to `scale_by_sophia` than it got itself.

    Args:
      hessian: A pytree, a function of params, or None.
      params: The argument of the function.

    Returns:
      What is to be passed on.
    """
    if params is None or not _is_function(hessian):
        return hessian
    return lambda _: hessian(params)


def _is_function(hessian: Any) -> bool:
    # Trees of some libraries are modules, which are callable too.
    return isinstance(hessian, jax.tree_util.Partial) or (
        callable(hessian) and all(map(callable, jax.tree.leaves(hessian)))
    )


def _called(hessian: Callable[[PyTree], PyTree], params: PyTree) -> PyTree:
    """What the function returns for params, the masked ones of a group included."""
    if params is None:
        raise ValueError(
            "scale_by_sophia: params=None is not allowed where hessian is a function; "
            "call tx.update(grads, state, params, hessian=...)."
        )

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    if not trees.find_nodes(params, is_masked):
        return hessian(params)
    try:
        return hessian(params)
    except Exception as error:
        raise ValueError(
            "scale_by_sophia: the function hessian failed on a part of the parameters, "
            "the rest masked by optax.masked or optax.partition. Let it ignore its "
            "argument and take all of them from outside, hessian=lambda _: "
            "estimate(params), or pass the pytree hessian=estimate(params). The error: "
            f"{error}"
        ) from error


def _part_of(hessian: PyTree, updates: PyTree) -> PyTree:
    """The estimates of the parameters in `updates`, which may be a group of all.

    Found by their paths, because masked leaves and boxes of Flax make other trees.
    """
    estimates = dict(trees.leaves_with_paths(hessian))
    found = []
    for path, g in trees.leaves_with_paths(updates):
        if path not in estimates:
            raise ValueError(
                f"scale_by_sophia: hessian, a {type(hessian).__name__}, has no entry "
                f"for parameter {path!r}; it must be a pytree like the gradients, or a "
                "function of the parameters that returns one."
            )
        estimate = estimates[path]
        shape, dtype = jnp.shape(estimate), jnp.result_type(estimate)
        if shape != jnp.shape(g):
            raise ValueError(
                f"scale_by_sophia: hessian of shape {shape} at {path!r} is not "
                f"allowed; it must be {jnp.shape(g)}, that of the gradient."
            )
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"scale_by_sophia: hessian of dtype {dtype} at {path!r} is not "
                "allowed; it must be real floating point."
            )
        found.append(jnp.asarray(estimate))
    return jax.tree.unflatten(jax.tree.structure(updates), found)
