"""StableAdamW: AdamW that slows down where its second moment is out of date.

For one matrix or vector p, λ the weight decay:

    m_t = β₁·m_{t-1} + (1 - β₁)·g_t,    v_t = β₂·v_{t-1} + (1 - β₂)·|g_t|²
    R_t = RMS(g_t / max(sqrt(v̂_t), ε))
    u_t = (m̂_t / (sqrt(v̂_t) + ε) + λ·p) / max(1, R_t)      hats: divided by 1 - βᵗ

A gradient that is suddenly much larger than before has R > 1 and shortens its own step,
decay included, which replaces clipping.

Letters to arguments: β₁, β₂ are `b1`, `b2`, ε is `eps`, λ is `weight_decay`; m, v are
the state's `mu`, `nu`.

Source: Wortsman et al., Stable and low-precision training, arXiv 2304.13013, Algorithm
2, with the numerics of optimi's StableAdamW.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxplus import trees, validation
from optaxplus.custom_types import Axes, DTypeName, Mask, PyTree, Scalar
from optaxplus.numerics.hyperparameters import as_decay_rate, as_epsilon, is_zero
from optaxplus.numerics.matrix_axes import MatrixAxes
from optaxplus.numerics.moving_averages import bias_correction, mix
from optaxplus.numerics.norms import block_rms, mix_square
from optaxplus.partition.inference import axes_of

__all__ = ["ScaleByStableAdamState", "scale_by_stable_adam"]


class ScaleByStableAdamState(NamedTuple):
    """State of `scale_by_stable_adam`.

    Attributes:
      count: Finished updates; shape (), int32.
      mu: First moment m; like the parameters, in `mu_dtype`.
      nu: Second moment v; like the parameters, real, in `nu_dtype`.
    """

    count: jax.Array
    mu: PyTree
    nu: PyTree


def _stable_adam_leaf(
    g: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    axes: MatrixAxes,
    decay: jax.Array | float,
    *,
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    scales: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One leaf: (u, m, v). `decay` is λ·p."""
    wide = trees.widen(g)
    scale_mu, scale_nu = (trees.scalar_for(scale, g) for scale in scales)
    m = mix(b1, mu.astype(wide.dtype), wide)
    v = mix_square(b2, trees.widen(nu), wide)
    root = jnp.sqrt(scale_nu * v)
    rms = block_rms(wide / jnp.maximum(root, eps), axes)
    u = (scale_mu * m / (root + eps) + decay) / jnp.maximum(1.0, rms)
    return u, m.astype(mu.dtype), v.astype(nu.dtype)


def scale_by_stable_adam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    *,
    eps: Scalar = 1e-6,
    weight_decay: Scalar = 0.0,
    mask: Mask = None,
    axes: Axes = None,
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformation:
    """Adam's direction, shortened in every matrix or vector that took a shock.

    Args:
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added outside the square root, in units of the gradient. > 0.
      weight_decay: Coefficient of the parameters in the update, which is shortened
        with it. >= 0. Other than 0 it makes `update` need params. Static if 0.
      mask: Which parameters decay, see `optaxplus.custom_types`; None is all.
      axes: Matrix axes, see `optaxplus.custom_types`.
      mu_dtype: Dtype of the first moment, see `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of the second moment. Static.

    Returns:
      A transformation with state `ScaleByStableAdamState`; emits float32. Where (1 -
      b2)·|g|² overflows float32 (|g| > 1.8e19 / sqrt(1 - b2)) the update is 0 from then
      on.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range, axes or mask do not fit, or `update`
        is called without the params that it needs.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> grads = jnp.array([1.0, -1.0])
      >>> tx = ox.scale_by_stable_adam()
      >>> calm, state = tx.update(grads, tx.init(grads))
      >>> shock, state = tx.update(100 * grads, state)
      >>> print(calm.round(3), shock.round(3))
      [ 1. -1.] [ 0.531 -0.531]

    References:
      Wortsman et al., arXiv 2304.13013, Algorithm 2; optimi's `StableAdamW`.
    """
    name = "scale_by_stable_adam"
    validation.check_decay_rate(name, b1=b1, b2=b2)
    validation.check_positive(name, eps=eps)
    validation.check_non_negative(name, weight_decay=weight_decay)
    validation.check_floating_dtype(name, mu_dtype=mu_dtype, nu_dtype=nu_dtype)
    b1, b2, eps = as_decay_rate(b1), as_decay_rate(b2), as_epsilon(eps)

    def init_fn(params: PyTree) -> ScaleByStableAdamState:
        axes_of(name, axes, params)
        trees.resolve_mask(name, mask, params)
        return ScaleByStableAdamState(
            count=jnp.zeros([], jnp.int32),
            mu=trees.init_moment(name, params, mu_dtype),
            nu=trees.init_moment(name, params, nu_dtype, real=True),
        )

    def decays_of(updates: PyTree, params: PyTree | None) -> PyTree:
        """λ·p for every leaf; 0.0 where the mask says no."""
        if is_zero(weight_decay):
            return jax.tree.map(lambda _: 0.0, updates)
        validation.check_params(name, params)
        return jax.tree.map(
            lambda p, decays: weight_decay * trees.widen(p) if decays else 0.0,
            params,
            trees.resolve_mask(name, mask, params),
        )

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, ScaleByStableAdamState]:
        count = trees.increment(state.count)
        scales = 1.0 / bias_correction(b1, count), 1.0 / bias_correction(b2, count)
        updates, mu, nu = trees.map_several(
            lambda *leaves: _stable_adam_leaf(
                *leaves, b1=b1, b2=b2, eps=eps, scales=scales
            ),
            3,
            updates,
            state.mu,
            state.nu,
            axes_of(name, axes, updates),
            decays_of(updates, params),
        )
        return updates, ScaleByStableAdamState(count, mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)
