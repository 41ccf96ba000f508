"""Momentum: the heavy ball of Polyak and the moving average, each with Nesterov's step.

Heavy ball (`scale_by_momentum`), momentum μ, dampening τ:

    b₁ = g₁,  b_t = μ·b_{t-1} + (1 - τ)·g_t          u_t = b_t, or
                                                     g_t + μ·b_t (Nesterov)

Moving average (`scale_by_ema`), decay β₁:

    m_t = β₁·m_{t-1} + (1 - β₁)·g_t                  u_t = m_t, or
                                                     β₁·m_t + (1 - β₁)·g_t (Nesterov)

Letters to arguments: μ is `momentum`, τ is `dampening`, β₁ is `b1`; b is the state's
`trace`, m its `mu`.

Sources: Polyak, Some methods of speeding up the convergence of iteration methods
(1964); Nesterov (1983) in the form of Sutskever et al. (2013) that takes the gradient
at the stored point; Keller Jordan's Muon (2024) for the average.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxplus import trees, validation
from optaxplus.custom_types import DTypeName, PyTree, Scalar
from optaxplus.numerics.hyperparameters import as_decay_rate, is_zero
from optaxplus.numerics.moving_averages import bias_correction, mix

__all__ = [
    "ScaleByEmaState",
    "ScaleByMomentumState",
    "scale_by_ema",
    "scale_by_momentum",
]


class ScaleByMomentumState(NamedTuple):
    """State of `scale_by_momentum`.

    Attributes:
      count: Finished updates; shape (), int32.
      trace: Momentum buffer b; like the parameters, in `mu_dtype`.
    """

    count: jax.Array
    trace: PyTree


def _momentum_leaf(
    g: jax.Array,
    trace: jax.Array,
    gain: Scalar,
    *,
    momentum: Scalar,
    nesterov: bool,
) -> tuple[jax.Array, jax.Array]:
    """One leaf: (u, b)."""
    wide = trees.widen(g)
    b = momentum * trace.astype(wide.dtype) + gain * wide
    return (wide + momentum * b if nesterov else b), b.astype(trace.dtype)


def scale_by_momentum(
    momentum: Scalar = 0.9,
    *,
    nesterov: bool = False,
    dampening: Scalar = 0.0,
    mu_dtype: DTypeName = "float32",
) -> optax.GradientTransformation:
    """Adds up past gradients with geometrically decaying weights (heavy ball).

    With a constant gradient the update grows to 1 / (1 - momentum) times it. Equals
    `torch.optim.SGD`, whose buffer starts from the first gradient, undampened; without
    dampening it equals `optax.trace`.

    Args:
      momentum: Factor μ of the buffer, in [0, 1).
      nesterov: Whether to step along g + μ·b instead of b. Needs momentum > 0 and no
        dampening, as in PyTorch. Static.
      dampening: τ, >= 0: from the second step on the gradient enters with weight 1 - τ.
      mu_dtype: Dtype of the buffer, see `optaxplus.custom_types`. Static.

    Returns:
      A transformation with state `ScaleByMomentumState`; emits float32.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range, or Nesterov is combined with
        dampening or zero momentum.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> grads = jnp.array([4.0, -1.0])
      >>> tx = ox.scale_by_momentum(0.5)
      >>> first, state = tx.update(grads, tx.init(grads))
      >>> second, state = tx.update(grads, state)
      >>> print(first, second)
      [ 4. -1.] [ 6.  -1.5]

    References:
      Polyak (1964); Sutskever et al. (2013); `torch.optim.SGD`.
    """
    name = "scale_by_momentum"
    validation.check_decay_rate(name, momentum=momentum)
    validation.check_non_negative(name, dampening=dampening)
    validation.check_flag(name, nesterov=nesterov)
    validation.check_floating_dtype(name, mu_dtype=mu_dtype)
    if nesterov and (
        is_zero(momentum)
        or not (isinstance(dampening, jax.Array) or is_zero(dampening))
    ):
        raise ValueError(
            f"{name}: nesterov=True is not allowed with momentum={momentum!r}, "
            f"dampening={dampening!r}; it needs momentum > 0 and dampening=0."
        )
    momentum = as_decay_rate(momentum)

    def init_fn(params: PyTree) -> ScaleByMomentumState:
        return ScaleByMomentumState(
            jnp.zeros([], jnp.int32), trees.init_moment(name, params, mu_dtype)
        )

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, ScaleByMomentumState]:
        del params
        gain = jnp.where(state.count == 0, 1.0, 1.0 - dampening)
        updates, trace = trees.map_several(
            lambda g, b: _momentum_leaf(
                g,
                b,
                trees.scalar_for(gain, g),
                momentum=momentum,
                nesterov=nesterov,
            ),
            2,
            updates,
            state.trace,
        )
        return updates, ScaleByMomentumState(trees.increment(state.count), trace)

    return optax.GradientTransformation(init_fn, update_fn)


class ScaleByEmaState(NamedTuple):
    """State of `scale_by_ema`.

    Attributes:
      count: Finished updates; shape (), int32.
      mu: Average m; like the parameters, in `mu_dtype`.
    """

    count: jax.Array
    mu: PyTree


def _ema_leaf(
    g: jax.Array,
    mu: jax.Array,
    *,
    b1: Scalar,
    nesterov: bool,
    scale_mu: Scalar,
    scale_g: Scalar,
) -> tuple[jax.Array, jax.Array]:
    """One leaf: (u, m). The scales are 1, or the bias corrections 1/(1 - β₁ᵗ)."""
    wide = trees.widen(g)
    m = mix(b1, mu.astype(wide.dtype), wide)
    if nesterov:
        u = b1 * scale_mu * m + (1 - b1) * scale_g * wide
    else:
        u = scale_mu * m
    return u, m.astype(mu.dtype)


def scale_by_ema(
    b1: Scalar = 0.9,
    *,
    nesterov: bool = False,
    debias: bool = False,
    mu_dtype: DTypeName = "float32",
) -> optax.GradientTransformation:
    """Replaces the gradient by its exponential moving average.

    Proportional to heavy-ball momentum (by 1 - b1), so methods that normalise what
    follows, such as Muon, may use either.

    Args:
      b1: Decay rate β₁, in [0, 1).
      nesterov: Whether to step along β₁·m + (1 - β₁)·g instead of m. Static.
      debias: Whether to divide the average by 1 - β₁^t, which makes it a weighted
        mean of the gradients seen; with `nesterov`, m by 1 - β₁^(t+1) and g by
        1 - β₁^t (Dozat 2016, the form of `optax.contrib.muon`). Static.
      mu_dtype: Dtype of the average, see `optaxplus.custom_types`. Static.

    Returns:
      A transformation with state `ScaleByEmaState`; emits float32.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If b1 is outside [0, 1).

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> grads = jnp.array([4.0, -1.0])
      >>> tx = ox.scale_by_ema(0.5)
      >>> first, state = tx.update(grads, tx.init(grads))
      >>> second, state = tx.update(grads, state)
      >>> print(first, second)
      [ 2.  -0.5] [ 3.   -0.75]

    References:
      Keller Jordan et al., Muon (2024).
    """
    name = "scale_by_ema"
    validation.check_decay_rate(name, b1=b1)
    validation.check_flag(name, nesterov=nesterov, debias=debias)
    validation.check_floating_dtype(name, mu_dtype=mu_dtype)
    b1 = as_decay_rate(b1)

    def init_fn(params: PyTree) -> ScaleByEmaState:
        return ScaleByEmaState(
            jnp.zeros([], jnp.int32), trees.init_moment(name, params, mu_dtype)
        )

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, ScaleByEmaState]:
        del params
        count = trees.increment(state.count)
        scale_mu = scale_g = 1.0
        if debias:
            scale_g = 1.0 / bias_correction(b1, count)
            scale_mu = 1.0 / bias_correction(b1, count + 1) if nesterov else scale_g
        updates, mu = trees.map_several(
            lambda g, m: _ema_leaf(
                g,
                m,
                b1=b1,
                nesterov=nesterov,
                scale_mu=trees.scalar_for(scale_mu, g),
                scale_g=trees.scalar_for(scale_g, g),
            ),
            2,
            updates,
            state.mu,
        )
        return updates, ScaleByEmaState(count, mu)

    return optax.GradientTransformation(init_fn, update_fn)
