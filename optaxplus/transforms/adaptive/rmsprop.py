"""RMSProp: gradients divided by their running root mean square.

    v_t = β₂·v_{t-1} + (1 - β₂)·|g_t|²,     u_t = g_t / (sqrt(v_t + ε_root) + ε)

    centered:  a_t = β₂·a_{t-1} + (1 - β₂)·g_t,  v_t - |a_t|² in place of v_t

Letters to arguments: β₂ is `b2`; ε, ε_root are `eps`, `eps_root`; v, a are the state's
`nu`, `mu`.

Source: Tieleman and Hinton, lecture 6.5 of Neural Networks for Machine Learning (2012);
Graves, arXiv 1308.0850, equation 38, for the centered form; defaults of PyTorch. There
is no bias correction: the first steps are 1 / sqrt(1 - β₂) times as long. Differs from
optax in the defaults (β₂ = 0.9 and ε under the root there).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxplus import trees, validation
from optaxplus.custom_types import DTypeName, PyTree, Scalar
from optaxplus.numerics.hyperparameters import as_decay_rate, as_epsilon
from optaxplus.numerics.moving_averages import mix
from optaxplus.numerics.norms import abs_square, mix_square

__all__ = ["ScaleByRmspropState", "scale_by_rmsprop"]


class ScaleByRmspropState(NamedTuple):
    """State of `scale_by_rmsprop`.

    Attributes:
      mu: Mean a; like the parameters, in `mu_dtype`, if centered; else None.
      nu: Mean square v; like the parameters, real, in `nu_dtype`.
    """

    mu: Any
    nu: PyTree


def _rmsprop_leaf(
    g: jax.Array,
    nu: jax.Array,
    mu: jax.Array | None = None,
    *,
    b2: Scalar,
    eps: Scalar,
    eps_root: Scalar,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """One leaf: (u, v, a)."""
    wide = trees.widen(g)
    v = mix_square(b2, trees.widen(nu), wide)
    stored, variance = None, v
    if mu is not None:
        a = mix(b2, mu.astype(wide.dtype), wide)
        stored = a.astype(mu.dtype)
        # Rounding may leave a little less than 0, an overflow inf - inf.
        variance = jnp.where(jnp.isinf(v), v, jnp.maximum(v - abs_square(a), 0.0))
    u = wide / (jnp.sqrt(variance + eps_root) + eps)
    return u, v.astype(nu.dtype), stored


def scale_by_rmsprop(
    b2: Scalar = 0.99,
    *,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    centered: bool = False,
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformation:
    """Divides the gradient by its running root mean square, or standard deviation.

    Args:
      b2: Decay rate of the averages, in [0, 1).
      eps: Added outside the square root, in units of the gradient. >= 0; eps and
        eps_root may not both be 0.
      eps_root: Added inside the square root, in units of the squared gradient. >= 0.
      centered: Whether the square of the mean is subtracted, so that the divisor is a
        standard deviation. A steady gradient then has very long steps, bounded by eps
        alone. Static.
      mu_dtype: Dtype of the mean, see `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of the mean square. Static.

    Returns:
      A transformation with state `ScaleByRmspropState`; emits float32. Where (1 -
      b2)·|g|² overflows float32 (|g| > 1.8e19 / sqrt(1 - b2)) the update is 0 from then
      on.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> grads = jnp.array([4.0, -1.0])
      >>> tx = ox.scale_by_rmsprop(b2=0.75)
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> print(updates)
      [ 2. -2.]

    References:
      Tieleman and Hinton, lecture 6.5 (2012); Graves, arXiv 1308.0850, equation 38
      (centered); `torch.optim.RMSprop`.
    """
    name = "scale_by_rmsprop"
    validation.check_decay_rate(name, b2=b2)
    validation.check_epsilon(name, eps=eps, eps_root=eps_root)
    validation.check_flag(name, centered=centered)
    validation.check_floating_dtype(name, mu_dtype=mu_dtype, nu_dtype=nu_dtype)
    b2, eps = as_decay_rate(b2), as_epsilon(eps)

    def init_fn(params: PyTree) -> ScaleByRmspropState:
        return ScaleByRmspropState(
            mu=trees.init_moment(name, params, mu_dtype) if centered else None,
            nu=trees.init_moment(name, params, nu_dtype, real=True),
        )

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, ScaleByRmspropState]:
        del params
        updates, nu, mu = trees.map_several(
            lambda *leaves: _rmsprop_leaf(*leaves, b2=b2, eps=eps, eps_root=eps_root),
            3,
            updates,
            state.nu,
            *((state.mu,) if centered else ()),
        )
        return updates, ScaleByRmspropState(mu if centered else None, nu)

    return optax.GradientTransformation(init_fn, update_fn)
