"""Adam and its relatives: gradients divided by the root of their mean square.

    m_t = β₁·m_{t-1} + (1 - β₁)·g_t                     first moment
    v_t = β₂·v_{t-1} + (1 - β₂)·|g_t|²                  second moment
    u_t = m̂_t / (sqrt(v̂_t + ε_root) + ε)                m̂ = m/(1 - β₁ᵗ), v̂ = v/(1 - β₂ᵗ)

    AMSGrad:   v̂ = max(v_1, …, v_t) / (1 - β₂ᵗ)
    Nesterov:  m̂ = β₁·m_t/(1 - β₁ᵗ⁺¹) + (1 - β₁)·g_t/(1 - β₁ᵗ)

Letters to arguments: β₁, β₂ are `b1`, `b2`; ε, ε_root are `eps`, `eps_root`; m, v are
the state's `mu`, `nu`.

Sources: Kingma and Ba, Adam, arXiv 1412.6980, Algorithm 1; Reddi et al., On the
convergence of Adam and beyond, arXiv 1904.09237, with bias correction as in PyTorch;
Dozat, Incorporating Nesterov momentum into Adam (2016), without its momentum schedule.
Differs from optax in AMSGrad, which takes the maximum after the bias correction there.
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

__all__ = ["ScaleByAdamState", "scale_by_adam"]


class ScaleByAdamState(NamedTuple):
    """State of `scale_by_adam`.

    Attributes:
      count: Finished updates; shape (), int32.
      mu: First moment m; like the parameters, in `mu_dtype`.
      nu: Second moment v; like the parameters, real, in `nu_dtype`.
      nu_max: Largest v so far, as `nu`, with amsgrad; else None.
    """

    count: jax.Array
    mu: PyTree
    nu: PyTree
    nu_max: Any


def _adam_leaf(
    g: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    nu_max: jax.Array | None,
    *,
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    eps_root: Scalar,
    scales: tuple[Scalar, Scalar, Scalar],
    nesterov: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """One leaf: (u, m, v, v_max). `scales` are 1/(1-β₁ᵗ) for m and g, 1/(1-β₂ᵗ)."""
    wide = trees.widen(g)
    scale_mu, scale_g, scale_nu = (trees.scalar_for(scale, g) for scale in scales)
    m = mix(b1, mu.astype(wide.dtype), wide)
    v = mix_square(b2, trees.widen(nu), wide)
    largest = v if nu_max is None else jnp.maximum(trees.widen(nu_max), v)
    numerator = scale_mu * m
    if nesterov:
        numerator = b1 * numerator + (1 - b1) * scale_g * wide
    u = numerator / (jnp.sqrt(scale_nu * largest + eps_root) + eps)
    stored_max = None if nu_max is None else largest.astype(nu_max.dtype)
    return u, m.astype(mu.dtype), v.astype(nu.dtype), stored_max


def scale_by_adam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    *,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    amsgrad: bool = False,
    nesterov: bool = False,
    debias: bool = True,
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformation:
    """Divides a running mean of the gradient by its running root mean square.

    Every coordinate moves by about 1 whatever the scale of its gradient; in the first
    step the update is sign(g), up to `eps`.

    Args:
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added outside the square root, in units of the gradient. >= 0; eps and
        eps_root may not both be 0.
      eps_root: Added inside the square root, in units of the squared gradient; makes
        the update differentiable at 0. >= 0.
      amsgrad: Whether the denominator uses the largest second moment so far. Static.
      nesterov: Whether the numerator looks one step ahead. Static.
      debias: Whether both moments are divided by 1 - decayᵗ, which makes them weighted
        means of the gradients seen. Static.
      mu_dtype: Dtype of the first moment, see `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of the second moment. In bfloat16 it stalls once a step changes it
        by less than 1/256. Static.

    Returns:
      A transformation with state `ScaleByAdamState`; emits float32. Where (1 - b2)·|g|²
      overflows float32 (|g| > 1.8e19 / sqrt(1 - b2)) the update is 0 from then on.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = optax.chain(ox.scale_by_adam(b2=0.95), ox.descend(1e-3))
      >>> params = jnp.array([4.0, -1.0])
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(updates)
      [-0.001  0.001]

    References:
      Kingma and Ba, arXiv 1412.6980, Algorithm 1; Reddi et al., arXiv 1904.09237
      (AMSGrad); Dozat (2016, Nesterov). The module has the formulas and what differs.
    """
    name = "scale_by_adam"
    validation.check_decay_rate(name, b1=b1, b2=b2)
    validation.check_epsilon(name, eps=eps, eps_root=eps_root)
    validation.check_flag(name, amsgrad=amsgrad, nesterov=nesterov, debias=debias)
    validation.check_floating_dtype(name, mu_dtype=mu_dtype, nu_dtype=nu_dtype)
    b1, b2, eps = as_decay_rate(b1), as_decay_rate(b2), as_epsilon(eps)

    def init_fn(params: PyTree) -> ScaleByAdamState:
        nu = trees.init_moment(name, params, nu_dtype, real=True)
        return ScaleByAdamState(
            count=jnp.zeros([], jnp.int32),
            mu=trees.init_moment(name, params, mu_dtype),
            nu=nu,
            nu_max=jax.tree.map(jnp.zeros_like, nu) if amsgrad else None,
        )

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, ScaleByAdamState]:
        del params
        count = trees.increment(state.count)
        scales = 1.0, 1.0, 1.0
        if debias:
            scale_g = 1.0 / bias_correction(b1, count)
            scale_mu = 1.0 / bias_correction(b1, count + 1) if nesterov else scale_g
            scales = scale_mu, scale_g, 1.0 / bias_correction(b2, count)

        def leaf(
            g: jax.Array,
            mu: jax.Array,
            nu: jax.Array,
            nu_max: jax.Array | None = None,
        ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
            return _adam_leaf(
                g,
                mu,
                nu,
                nu_max,
                b1=b1,
                b2=b2,
                eps=eps,
                eps_root=eps_root,
                scales=scales,
                nesterov=nesterov,
            )

        moments = (state.mu, state.nu) + ((state.nu_max,) if amsgrad else ())
        updates, mu, nu, nu_max = trees.map_several(leaf, 4, updates, *moments)
        return updates, ScaleByAdamState(count, mu, nu, nu_max if amsgrad else None)

    return optax.GradientTransformation(init_fn, update_fn)
