"""NAdam: Adam with Nesterov's momentum on a schedule.

    μ_t = β₁·(1 - ½·0.96^(t·ψ)),   M_t = μ_1·μ_2·…·μ_t
    m_t = β₁·m_{t-1} + (1 - β₁)·g_t,    v_t = β₂·v_{t-1} + (1 - β₂)·|g_t|²
    u_t = ((1 - μ_t)/(1 - M_t)·g_t + μ_{t+1}/(1 - M_t·μ_{t+1})·m_t)
          / (sqrt(v_t/(1 - β₂ᵗ)) + ε)

Letters to arguments: β₁, β₂ are `b1`, `b2`, ψ is `momentum_decay`, ε is `eps`; m, v, M
are the state's `mu`, `nu`, `mu_product`.

Source: Dozat, Incorporating Nesterov momentum into Adam (2016), Algorithm 8, in the
form of `torch.optim.NAdam`. Differs from `optax.nadam`, which has no schedule of the
momentum; that one is `scale_by_adam(nesterov=True)`.
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

__all__ = ["ScaleByNadamState", "scale_by_nadam"]


class ScaleByNadamState(NamedTuple):
    """State of `scale_by_nadam`.

    Attributes:
      count: Finished updates; shape (), int32.
      mu_product: Product M of all momenta; shape (), float32 (float64 where JAX has
        x64).
      mu: First moment m; like the parameters, in `mu_dtype`.
      nu: Second moment v; like the parameters, real, in `nu_dtype`.
    """

    count: jax.Array
    mu_product: jax.Array
    mu: PyTree
    nu: PyTree


def _nadam_leaf(
    g: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    *,
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    scales: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One leaf: (u, m, v). `scales` multiply g, m and v."""
    wide = trees.widen(g)
    scale_g, scale_mu, scale_nu = (trees.scalar_for(scale, g) for scale in scales)
    m = mix(b1, mu.astype(wide.dtype), wide)
    v = mix_square(b2, trees.widen(nu), wide)
    u = (scale_g * wide + scale_mu * m) / (jnp.sqrt(scale_nu * v) + eps)
    return u, m.astype(mu.dtype), v.astype(nu.dtype)


def scale_by_nadam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    *,
    eps: Scalar = 1e-8,
    momentum_decay: Scalar = 4e-3,
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformation:
    """Adam's direction with a look ahead, whose momentum warms up from b1/2 to b1.

    Args:
      b1: Decay rate of the first moment and final momentum, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added outside the square root, in units of the gradient. > 0.
      momentum_decay: ψ, how fast the momentum warms up: 0.96^(ψ·t) is the part still
        missing. >= 0; 0 keeps it at b1/2.
      mu_dtype: Dtype of the first moment, see `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of the second moment. Static.

    Returns:
      A transformation with state `ScaleByNadamState`; emits float32. Where (1 -
      b2)·|g|² overflows float32 (|g| > 1.8e19 / sqrt(1 - b2)) the update is 0 from then
      on.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> grads = jnp.array([4.0, -1.0])
      >>> tx = ox.scale_by_nadam()
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> print(updates.round(3))
      [ 1.056 -1.056]

    References:
      Dozat, Incorporating Nesterov momentum into Adam (2016), Algorithm 8;
      `torch.optim.NAdam`.
    """
    name = "scale_by_nadam"
    validation.check_decay_rate(name, b1=b1, b2=b2)
    validation.check_positive(name, eps=eps)
    validation.check_non_negative(name, momentum_decay=momentum_decay)
    validation.check_floating_dtype(name, mu_dtype=mu_dtype, nu_dtype=nu_dtype)
    b1, b2, eps = as_decay_rate(b1), as_decay_rate(b2), as_epsilon(eps)

    def momentum_at(step: jax.Array) -> jax.Array:
        exponent = step.astype(jnp.result_type(float)) * momentum_decay
        return b1 * (1.0 - 0.5 * 0.96**exponent)

    def init_fn(params: PyTree) -> ScaleByNadamState:
        return ScaleByNadamState(
            count=jnp.zeros([], jnp.int32),
            mu_product=jnp.ones([], jnp.result_type(float)),
            mu=trees.init_moment(name, params, mu_dtype),
            nu=trees.init_moment(name, params, nu_dtype, real=True),
        )

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, ScaleByNadamState]:
        del params
        count = trees.increment(state.count)
        now, ahead = momentum_at(count), momentum_at(count + 1)
        product = state.mu_product * now
        scales = (
            (1.0 - now) / (1.0 - product),
            ahead / (1.0 - product * ahead),
            1.0 / bias_correction(b2, count),
        )
        updates, mu, nu = trees.map_several(
            lambda g, m, v: _nadam_leaf(g, m, v, b1=b1, b2=b2, eps=eps, scales=scales),
            3,
            updates,
            state.mu,
            state.nu,
        )
        product = product.astype(state.mu_product.dtype)
        return updates, ScaleByNadamState(count, product, mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)
