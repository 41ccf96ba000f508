"""AdEMAMix: Adam with a second, very slow momentum beside the fast one.

    m1_t = β₁·m1_{t-1} + (1 - β₁)·g_t                   fast
    m2_t = β₃·m2_{t-1} + (1 - β₃)·g_t                   slow, no bias correction
    v_t  = β₂·v_{t-1} + (1 - β₂)·|g_t|²
    u_t  = (m̂1_t + α·m2_t) / (sqrt(v̂_t) + ε)            hats: divided by 1 - βᵗ

Warm-up: α grows linearly over T_α steps, and the half-life of the slow average, in
steps, grows linearly from that of the fast one over T_β steps.

Letters to arguments: β₁, β₂, β₃ are `b1`, `b2`, `b3`, α is `alpha`, ε is `eps`, T_α and
T_β are `alpha_warmup`, `b3_warmup`; m1, m2, v are the state's `mu`, `mu_slow`, `nu`.

Source: Pagliardini, Ablin, Grangier, AdEMAMix, arXiv 2409.03137, Algorithm 1 and
appendix A.1, and the authors' code (apple/ml-ademamix). Differs from
`optax.contrib.ademamix` in the default of α (5 there) and has the warm-ups built in.
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

__all__ = ["ScaleByAdemamixState", "scale_by_ademamix"]


class ScaleByAdemamixState(NamedTuple):
    """State of `scale_by_ademamix`.

    Attributes:
      count: Finished updates; shape (), int32.
      mu: Fast mean m1; like the parameters, in `mu_dtype`.
      mu_slow: Slow mean m2; as `mu`.
      nu: Second moment v; like the parameters, real, in `nu_dtype`.
    """

    count: jax.Array
    mu: PyTree
    mu_slow: PyTree
    nu: PyTree


def _log_decay(decay: Scalar) -> Scalar:
    """Negative, and inverse to the half-life."""
    # The authors' shift, which also keeps the logarithm of 0 away.
    if isinstance(decay, int | float):
        return math.log(decay + 1e-8)
    return jnp.log(decay + 1e-8)


def _slow_weight(b1: Scalar, b3: Scalar, progress: jax.Array) -> jax.Array:
    """1 - β₃ while β₃ warms up, without the cancellation of that difference."""
    half_life = (1 - progress) / _log_decay(b1) + progress / _log_decay(b3)
    return jnp.where(progress < 1, -jnp.expm1(1 / half_life), 1 - b3)


def _ademamix_leaf(
    g: jax.Array,
    mu: jax.Array,
    mu_slow: jax.Array,
    nu: jax.Array,
    *,
    b1: Scalar,
    b2: Scalar,
    weight: Scalar,
    alpha: Scalar,
    eps: Scalar,
    scales: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, ...]:
    """One leaf: (u, m1, m2, v). `weight` is 1 - β₃."""
    wide = trees.widen(g)
    scale_mu, scale_nu = (trees.scalar_for(scale, g) for scale in scales)
    fast = mix(b1, mu.astype(wide.dtype), wide)
    slow = (1 - weight) * mu_slow.astype(wide.dtype) + weight * wide
    v = mix_square(b2, trees.widen(nu), wide)
    u = (scale_mu * fast + alpha * slow) / (jnp.sqrt(scale_nu * v) + eps)
    return u, fast.astype(mu.dtype), slow.astype(mu_slow.dtype), v.astype(nu.dtype)


def scale_by_ademamix(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    b3: Scalar = 0.9999,
    *,
    alpha: Scalar = 2.0,
    eps: Scalar = 1e-8,
    alpha_warmup: Scalar | None = None,
    b3_warmup: Scalar | None = None,
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformation:
    """Adds a slow average of thousands of gradients to Adam's numerator.

    With alpha = 0 it is Adam.

    Args:
      b1: Decay rate of the fast mean, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      b3: Decay rate of the slow mean, in [0, 1).
      alpha: Weight of the slow mean. >= 0.
      eps: Added outside the square root, in units of the gradient. > 0.
      alpha_warmup: Steps over which alpha grows from 0; the paper uses the whole run.
        > 0, or None for none.
      b3_warmup: Steps over which b3 grows from b1. > 0, or None for none.
      mu_dtype: Dtype of the means, see `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of the second moment. Static.

    Returns:
      A transformation with state `ScaleByAdemamixState`; emits float32. Where (1 -
      b2)·|g|² overflows float32 (|g| > 1.8e19 / sqrt(1 - b2)) the update is 0 from then
      on.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range.

    Example:
      >>> import optax, optaxplus as ox
      >>> steps = 10_000
      >>> rule = ox.scale_by_ademamix(alpha=8.0, alpha_warmup=steps, b3_warmup=steps)
      >>> tx = optax.chain(rule, ox.descend(1e-3, 0.1))

    References:
      Pagliardini, Ablin, Grangier, arXiv 2409.03137, Algorithm 1 and appendix A.1;
      apple/ml-ademamix.
    """
    name = "scale_by_ademamix"
    validation.check_decay_rate(name, b1=b1, b2=b2, b3=b3)
    validation.check_non_negative(name, alpha=alpha)
    validation.check_positive(name, eps=eps)
    warmups = {"alpha_warmup": alpha_warmup, "b3_warmup": b3_warmup}
    validation.check_positive(
        name, **{key: steps for key, steps in warmups.items() if steps is not None}
    )
    validation.check_floating_dtype(name, mu_dtype=mu_dtype, nu_dtype=nu_dtype)
    b1, b2, b3 = as_decay_rate(b1), as_decay_rate(b2), as_decay_rate(b3)
    eps = as_epsilon(eps)

    def init_fn(params: PyTree) -> ScaleByAdemamixState:
        return ScaleByAdemamixState(
            count=jnp.zeros([], jnp.int32),
            mu=trees.init_moment(name, params, mu_dtype),
            mu_slow=trees.init_moment(name, params, mu_dtype),
            nu=trees.init_moment(name, params, nu_dtype, real=True),
        )

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, ScaleByAdemamixState]:
        del params
        count = trees.increment(state.count)
        step = count.astype(jnp.result_type(float))
        alpha_now, weight = alpha, 1 - b3
        if alpha_warmup is not None:
            alpha_now = alpha * jnp.minimum(step / alpha_warmup, 1.0)
        if b3_warmup is not None:
            weight = _slow_weight(b1, b3, jnp.minimum(step / b3_warmup, 1.0))
        updates, *moments = trees.map_several(
            lambda g, *moments: _ademamix_leaf(
                g,
                *moments,
                b1=b1,
                b2=b2,
                weight=trees.scalar_for(weight, g),
                alpha=trees.scalar_for(alpha_now, g),
                eps=eps,
                scales=(
                    1.0 / bias_correction(b1, count),
                    1.0 / bias_correction(b2, count),
                ),
            ),
            4,
            updates,
            *state[1:],
        )
        return updates, ScaleByAdemamixState(count, *moments)

    return optax.GradientTransformation(init_fn, update_fn)
