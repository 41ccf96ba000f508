"""Adan: Nesterov momentum from the difference of successive gradients.

    d_t = g_t - g_{t-1}, and d_1 = 0
    m_t = β₁·m_{t-1} + (1 - β₁)·g_t
    k_t = β₂·k_{t-1} + (1 - β₂)·d_t
    n_t = β₃·n_{t-1} + (1 - β₃)·|g_t + β₂·d_t|²
    u_t = (m̂_t + β₂·k̂_t) / (sqrt(n̂_t) + ε)          hats: divided by 1 - βᵗ

Letters to arguments: β₁, β₂, β₃ are `b1`, `b2`, `b3`, ε is `eps`; m, k, n and the last
gradient are the state's `mu`, `mu_diff`, `nu`, `previous_grads`.

Source: Xie et al., Adan, arXiv 2208.06677, Algorithm 1, and the authors' code
(sail-sg/Adan); the paper writes the complements of the decay rates. Differs from
`optax.adan`, which multiplies the differences by 1 - β₂ (0.08) where the authors
multiply by β₂ (0.92).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxplus import trees, validation
from optaxplus.custom_types import DTypeName, PyTree, Scalar
from optaxplus.numerics.hyperparameters import as_decay_rate, as_epsilon
from optaxplus.numerics.moving_averages import bias_correction, mix
from optaxplus.numerics.norms import mix_square

__all__ = ["ScaleByAdanState", "scale_by_adan"]


class ScaleByAdanState(NamedTuple):
    """State of `scale_by_adan`.

    Attributes:
      count: Finished updates; shape (), int32.
      mu: Mean m of the gradient; like the parameters, in `mu_dtype`.
      mu_diff: Mean k of its change; as `mu`.
      nu: Second moment n; like the parameters, real, in `nu_dtype`.
      previous_grads: The last gradient; as `mu`.
    """

    count: jax.Array
    mu: PyTree
    mu_diff: PyTree
    nu: PyTree
    previous_grads: PyTree


def _adan_leaf(
    g: jax.Array,
    mu: jax.Array,
    mu_diff: jax.Array,
    nu: jax.Array,
    previous: jax.Array,
    *,
    b1: Scalar,
    b2: Scalar,
    b3: Scalar,
    eps: Scalar,
    is_first: jax.Array,
    scales: tuple[jax.Array, ...],
) -> tuple[jax.Array, ...]:
    """One leaf: (u, m, k, n, g). `scales` are the inverse bias corrections."""
    wide = trees.widen(g)
    scale_mu, scale_diff, scale_nu = (trees.scalar_for(scale, g) for scale in scales)
    d = jnp.where(is_first, jnp.zeros_like(wide), wide - previous.astype(wide.dtype))
    m = mix(b1, mu.astype(wide.dtype), wide)
    k = mix(b2, mu_diff.astype(wide.dtype), d)
    n = mix_square(b3, trees.widen(nu), wide + b2 * d)
    u = (scale_mu * m + b2 * scale_diff * k) / (jnp.sqrt(scale_nu * n) + eps)
    return (
        u,
        m.astype(mu.dtype),
        k.astype(mu_diff.dtype),
        n.astype(nu.dtype),
        wide.astype(previous.dtype),
    )


def scale_by_adan(
    b1: Scalar = 0.98,
    b2: Scalar = 0.92,
    b3: Scalar = 0.99,
    *,
    eps: Scalar = 1e-8,
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformation:
    """Adam's direction extrapolated along the change of the gradient.

    State: 16 bytes per parameter, since the last gradient is kept.

    Args:
      b1: Decay rate of the mean of the gradient, in [0, 1).
      b2: Decay rate of the mean of the difference and its weight, in [0, 1).
      b3: Decay rate of the second moment, in [0, 1).
      eps: Added outside the square root, in units of the gradient. > 0.
      mu_dtype: Dtype of the means and of the last gradient, see
        `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of the second moment. Static.

    Returns:
      A transformation with state `ScaleByAdanState`; emits float32. Where (1 - b3)·|g|²
      overflows float32 (|g| > 1.8e19 / sqrt(1 - b3)) the update is 0 from then on.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> grads = jnp.array([4.0, -1.0])
      >>> tx = ox.scale_by_adan()
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> print(updates.round(3))
      [ 1. -1.]

    References:
      Xie et al., arXiv 2208.06677, Algorithm 1; sail-sg/Adan.
    """
    name = "scale_by_adan"
    validation.check_decay_rate(name, b1=b1, b2=b2, b3=b3)
    validation.check_positive(name, eps=eps)
    validation.check_floating_dtype(name, mu_dtype=mu_dtype, nu_dtype=nu_dtype)
    b1, b2, b3 = as_decay_rate(b1), as_decay_rate(b2), as_decay_rate(b3)
    eps = as_epsilon(eps)

    def init_fn(params: PyTree) -> ScaleByAdanState:
        return ScaleByAdanState(
            count=jnp.zeros([], jnp.int32),
            mu=trees.init_moment(name, params, mu_dtype),
            mu_diff=trees.init_moment(name, params, mu_dtype),
            nu=trees.init_moment(name, params, nu_dtype, real=True),
            previous_grads=trees.init_moment(name, params, mu_dtype),
        )

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, ScaleByAdanState]:
        del params
        count = trees.increment(state.count)
        inverse = tuple(1.0 / bias_correction(decay, count) for decay in (b1, b2, b3))
        updates, *moments = trees.map_several(
            lambda *leaves: _adan_leaf(
                *leaves,
                b1=b1,
                b2=b2,
                b3=b3,
                eps=eps,
                is_first=count == 1,
                scales=inverse,
            ),
            5,
            updates,
            *state[1:],
        )
        return updates, ScaleByAdanState(count, *moments)

    return optax.GradientTransformation(init_fn, update_fn)
