"""Signs instead of magnitudes.

    sign:   u_t = sign(g_t)
    Lion:   u_t = sign(β₁·m_{t-1} + (1 - β₁)·g_t),  m_t = β₂·m_{t-1} + (1 - β₂)·g_t

Letters to arguments: β₁, β₂ are `b1`, `b2`; m is the state's `mu`. For complex numbers
sign(z) = z/|z|; sign(0) = 0.

Sources: Bernstein et al., signSGD, arXiv 1802.04434; Chen et al., Symbolic discovery
of optimization algorithms, arXiv 2302.06675, Algorithm 2.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxplus import trees, validation
from optaxplus.custom_types import DTypeName, PyTree, Scalar
from optaxplus.numerics.hyperparameters import as_decay_rate
from optaxplus.numerics.moving_averages import mix

__all__ = ["ScaleByLionState", "scale_by_lion", "scale_by_sign"]


def scale_by_sign() -> optax.GradientTransformation:
    """Replaces every coordinate by its sign.

    After `scale_by_ema` this is Signum.

    Returns:
      A transformation without state; emits float32. The sign of a complex number z is
      z/|z|, that of 0 is 0, that of NaN is NaN.

    Raises:
      TypeError: If a parameter is not floating point.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> grads = jnp.array([4.0, 0.0, -1e-9])
      >>> tx = ox.scale_by_sign()
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> print(updates)
      [ 1.  0. -1.]

    References:
      Bernstein et al., signSGD, arXiv 1802.04434, Algorithm 1.
    """

    def init_fn(params: PyTree) -> optax.EmptyState:
        trees.check_floating("scale_by_sign", params)
        return optax.EmptyState()

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, optax.EmptyState]:
        del params
        return jax.tree.map(lambda g: jnp.sign(trees.widen(g)), updates), state

    return optax.GradientTransformation(init_fn, update_fn)


class ScaleByLionState(NamedTuple):
    """State of `scale_by_lion`.

    Attributes:
      mu: Momentum m; like the parameters, in `mu_dtype`.
    """

    mu: PyTree


def _lion_leaf(
    g: jax.Array, mu: jax.Array, *, b1: Scalar, b2: Scalar
) -> tuple[jax.Array, jax.Array]:
    """One leaf: (u, m)."""
    wide = trees.widen(g)
    old = mu.astype(wide.dtype)
    new = mix(b2, old, wide)
    # β₁·m_{t-1} + (1 - β₁)·g_t is also (β₁/β₂)·m_t + (1 - β₁/β₂)·g_t. Computed so, it
    # does not need m_{t-1} once m_t has taken its memory, and XLA makes no copy of it.
    # Both weights have to be positive, or inf - inf would be NaN, and m_t unrounded.
    known = isinstance(b1, int | float) and isinstance(b2, int | float)
    if known and 0 < b1 < b2 and mu.dtype == wide.dtype:
        return jnp.sign(mix(b1 / b2, new, wide)), new
    return jnp.sign(mix(b1, old, wide)), new.astype(mu.dtype)


def scale_by_lion(
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    *,
    mu_dtype: DTypeName = "float32",
) -> optax.GradientTransformation:
    """Takes the sign of a mixture of the gradient and its momentum, a slow average.

    The momentum decays with b2, the mixture that is signed weighs the gradient more
    (b1 < b2). Every coordinate moves by exactly 1 or not at all.

    With Python numbers 0 < b1 < b2 and a float32 momentum the mixture is computed from
    the momentum after the step, which needs no memory: signs differ from the formula's
    only where its terms cancel to 2^-23 of their size, which float32 does not resolve
    either way. Otherwise the compiled step copies the momentum before the step.

    Args:
      b1: Weight of the momentum in the signed mixture, in [0, 1).
      b2: Decay rate of the momentum, in [0, 1).
      mu_dtype: Dtype of the momentum, see `optaxplus.custom_types`. Static.

    Returns:
      A transformation with state `ScaleByLionState`; emits float32.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If b1 or b2 is outside [0, 1).

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> grads = jnp.array([4.0, -1.0])
      >>> tx = ox.scale_by_lion()
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> print(updates, state.mu)
      [ 1. -1.] [ 0.04 -0.01]

    References:
      Chen et al., arXiv 2302.06675, Algorithm 2.
    """
    name = "scale_by_lion"
    validation.check_decay_rate(name, b1=b1, b2=b2)
    validation.check_floating_dtype(name, mu_dtype=mu_dtype)
    b1, b2 = as_decay_rate(b1), as_decay_rate(b2)

    def init_fn(params: PyTree) -> ScaleByLionState:
        return ScaleByLionState(trees.init_moment(name, params, mu_dtype))

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, ScaleByLionState]:
        del params
        updates, mu = trees.map_several(
            lambda g, m: _lion_leaf(g, m, b1=b1, b2=b2), 2, updates, state.mu
        )
        return updates, ScaleByLionState(mu)

    return optax.GradientTransformation(init_fn, update_fn)
