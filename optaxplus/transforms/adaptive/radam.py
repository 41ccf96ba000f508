"""RAdam: Adam that waits until its second moment can be trusted.

    m_t = β₁·m_{t-1} + (1 - β₁)·g_t,    v_t = β₂·v_{t-1} + (1 - β₂)·|g_t|²
    ρ_∞ = 2/(1 - β₂) - 1,               ρ_t = ρ_∞ - 2·t·β₂ᵗ/(1 - β₂ᵗ)
    r_t = sqrt((ρ_t - 4)·(ρ_t - 2)·ρ_∞ / ((ρ_∞ - 4)·(ρ_∞ - 2)·ρ_t))

    u_t = r_t · m̂_t · sqrt(1 - β₂ᵗ)/(sqrt(v_t) + ε)     if ρ_t > ρ_min
    u_t = m̂_t                                           otherwise

ρ is the length of the simple average that the moving average of the squares amounts
to; m̂ = m/(1 - β₁ᵗ).

Letters to arguments: β₁, β₂ are `b1`, `b2`, ε is `eps`, ρ_min is `threshold`; m, v are
the state's `mu`, `nu`.

Source: Liu et al., On the variance of the adaptive learning rate, arXiv 1908.03265,
Algorithm 2, with the threshold of PyTorch (5; the paper's is 4). Differs from optax in
ε, which is added before the bias correction as in the authors' code; the authors' code
skips the steps below the threshold instead of taking them along m̂.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxplus import trees, validation
from optaxplus.custom_types import DTypeName, PyTree, Scalar
from optaxplus.numerics.hyperparameters import as_decay_rate, as_epsilon
from optaxplus.numerics.moving_averages import bias_correction, mix
from optaxplus.numerics.norms import mix_square

__all__ = ["ScaleByRadamState", "scale_by_radam"]


class ScaleByRadamState(NamedTuple):
    """State of `scale_by_radam`.

    Attributes:
      count: Finished updates; shape (), int32.
      mu: First moment m; like the parameters, in `mu_dtype`.
      nu: Second moment v; like the parameters, real, in `nu_dtype`.
    """

    count: jax.Array
    mu: PyTree
    nu: PyTree


def _average_length(b2: Scalar, count: jax.Array) -> jax.Array:
    """ρ_t without the difference of two large numbers that its definition is.

    With a = -ln β₂ and x = a·t it is (ρ_∞ - 2/a) + (2/a)·(1 - x/(eˣ - 1)). The second
    bracket is x/2 - x²/12 + … for small x, so ρ_t grows like t; the first is about
    (1 - β₂)/6. The definition itself has an error of 1e-4 in float32 for β₂ = 0.999.
    """
    if isinstance(b2, int | float):
        a = -math.log(max(b2, 1e-30))
        offset = 2.0 / (1.0 - b2) - 1.0 - 2.0 / a
    else:
        a = -jnp.log(jnp.maximum(b2, 1e-30))
        gap = 1.0 - b2
        series = gap / 6 + gap**2 / 12 + 19 * gap**3 / 360
        offset = jnp.where(gap < 0.1, series, 2.0 / gap - 1.0 - 2.0 / a)
    x = a * count.astype(jnp.result_type(float))
    small = x / 2 - x**2 / 12 + x**4 / 720 - x**6 / 30240 + x**8 / 1209600
    bracket = jnp.where(x < 0.5, small, 1.0 - x / jnp.expm1(x))
    return offset + 2.0 / a * bracket


def _rectification(rho: jax.Array, b2: Scalar) -> jax.Array:
    """r_t; 0 where ρ_t <= 4."""
    rho_inf = 2.0 / (1.0 - b2) - 1.0
    square = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    return jnp.sqrt(jnp.where(rho > 4, square, 0.0))


def _radam_leaf(
    g: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    *,
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    scale_mu: jax.Array,
    scale_u: jax.Array,
    is_rectified: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One leaf: (u, m, v). `scale_u` is r·sqrt(1 - β₂ᵗ)."""
    wide = trees.widen(g)
    m = mix(b1, mu.astype(wide.dtype), wide)
    v = mix_square(b2, trees.widen(nu), wide)
    m_hat = trees.scalar_for(scale_mu, g) * m
    rectified = trees.scalar_for(scale_u, g) * m_hat / (jnp.sqrt(v) + eps)
    u = jnp.where(is_rectified, rectified, m_hat)
    return u, m.astype(mu.dtype), v.astype(nu.dtype)


def scale_by_radam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    *,
    eps: Scalar = 1e-8,
    threshold: Scalar = 5.0,
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformation:
    """Adam's direction, rectified for the variance of its early denominators.

    The first steps (five with b2 = 0.999) go along the mean of the gradient without a
    denominator, so they have the gradient's scale and not Adam's.

    Args:
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1). ρ never exceeds 2/(1 - b2) - 1:
        with 2/3 or less nothing is rectified.
      eps: Added to the root of the second moment before its bias correction, in units
        of the gradient. > 0.
      threshold: Length ρ of the average above which the denominator is used. > 0;
        below 4 it acts as 4.
      mu_dtype: Dtype of the first moment, see `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of the second moment. Static.

    Returns:
      A transformation with state `ScaleByRadamState`; emits float32. Where (1 -
      b2)·|g|² overflows float32 (|g| > 1.8e19 / sqrt(1 - b2)) rectified updates are 0
      from then on.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> grads = jnp.array([4.0, -1.0])
      >>> tx = ox.scale_by_radam()
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> print(updates.round(3))
      [ 4. -1.]

    References:
      Liu et al., arXiv 1908.03265, Algorithm 2; `torch.optim.RAdam`.
    """
    name = "scale_by_radam"
    validation.check_decay_rate(name, b1=b1, b2=b2)
    validation.check_positive(name, eps=eps, threshold=threshold)
    validation.check_floating_dtype(name, mu_dtype=mu_dtype, nu_dtype=nu_dtype)
    b1, b2, eps = as_decay_rate(b1), as_decay_rate(b2), as_epsilon(eps)

    def init_fn(params: PyTree) -> ScaleByRadamState:
        return ScaleByRadamState(
            count=jnp.zeros([], jnp.int32),
            mu=trees.init_moment(name, params, mu_dtype),
            nu=trees.init_moment(name, params, nu_dtype, real=True),
        )

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, ScaleByRadamState]:
        del params
        count = trees.increment(state.count)
        rho = _average_length(b2, count)
        correction = bias_correction(b2, count)
        updates, mu, nu = trees.map_several(
            lambda g, m, v: _radam_leaf(
                g,
                m,
                v,
                b1=b1,
                b2=b2,
                eps=eps,
                scale_mu=1.0 / bias_correction(b1, count),
                scale_u=_rectification(rho, b2) * jnp.sqrt(correction),
                is_rectified=rho > jnp.maximum(threshold, 4.0),
            ),
            3,
            updates,
            state.mu,
            state.nu,
        )
        return updates, ScaleByRadamState(count, mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)
