"""ADOPT: Adam whose denominator does not know the gradient it divides.

    x_t = g_t / max(sqrt(v_{t-1}), ε), cut off at ± (t - 1)^¼        x_1 = 0
    m_t = β₁·m_{t-1} + (1 - β₁)·x_t,   u_t = m_t
    v_t = β₂·v_{t-1} + (1 - β₂)·|g_t|²                               v_1 = |g_1|²

Letters to arguments: β₁, β₂ are `b1`, `b2`, ε is `eps`; m, v are the state's `mu`,
`nu`.

Source: Taniguchi et al., ADOPT, arXiv 2411.02853, Algorithm 2 of version 3, and the
authors' package torch-adopt 0.1.0; the same as `optax.contrib.adopt`. Without the
cut-off it is that package with `clip_lambda=None`, which the authors no longer
recommend: where the first gradient was nearly 0, the second step is as long as the
learning rate divided by ε. An earlier file of theirs, whose average starts from the
first normalised gradient and whose ε falls from 1, is left out.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxplus import trees, validation
from optaxplus.custom_types import DTypeName, PyTree, Scalar
from optaxplus.numerics.hyperparameters import as_decay_rate, as_epsilon
from optaxplus.numerics.moving_averages import mix
from optaxplus.numerics.norms import mix_square

__all__ = ["ScaleByAdoptState", "scale_by_adopt"]


class ScaleByAdoptState(NamedTuple):
    """State of `scale_by_adopt`.

    Attributes:
      count: Finished updates; shape (), int32.
      mu: First moment m, of the normalised gradients; like the parameters, in
        `mu_dtype`.
      nu: Second moment v; like the parameters, real, in `nu_dtype`.
    """

    count: jax.Array
    mu: PyTree
    nu: PyTree


def _clipped(x: jax.Array, limit: Scalar) -> jax.Array:
    """|x| cut off at `limit`, real and imaginary parts in proportion."""
    if not jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.clip(x, -limit, limit)
    size = jnp.abs(x)
    return jnp.where(size > limit, x * (limit / jnp.maximum(size, limit)), x)


def _adopt_leaf(
    g: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    *,
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    limit: jax.Array | None,
    is_first: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One leaf: (u, m, v)."""
    wide = trees.widen(g)
    before = trees.widen(nu)
    x = wide / jnp.maximum(jnp.sqrt(before), eps)
    if limit is not None:
        x = _clipped(x, trees.scalar_for(limit, g))
    m = mix(b1, mu.astype(wide.dtype), jnp.where(is_first, jnp.zeros_like(x), x))
    v = mix_square(b2, before, wide)
    return m, m.astype(mu.dtype), v.astype(nu.dtype)


def scale_by_adopt(
    b1: Scalar = 0.9,
    b2: Scalar = 0.9999,
    *,
    eps: Scalar = 1e-6,
    clip: bool = True,
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformation:
    """Averages gradients that were divided by the root mean square before them.

    Converges for every b2, where Adam needs it close to 1. The first update is 0.

    Args:
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Lower bound of the denominator, in units of the gradient. > 0.
      clip: Whether normalised gradients are cut off at (t - 1)^(1/4), 1 in the second
        step and 10 after ten thousand. Static.
      mu_dtype: Dtype of the first moment, see `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of the second moment. Static.

    Returns:
      A transformation with state `ScaleByAdoptState`; emits float32. Where (1 -
      b2)·|g|² overflows float32 (|g| > 1.8e19 / sqrt(1 - b2)) they count as 0 from then
      on.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> grads = jnp.array([4.0, -1.0])
      >>> tx = ox.scale_by_adopt()
      >>> first, state = tx.update(grads, tx.init(grads))
      >>> second, state = tx.update(grads, state)
      >>> print(first, second.round(3))
      [0. 0.] [ 0.1 -0.1]

    References:
      Taniguchi et al., arXiv 2411.02853v3, Algorithm 2; torch-adopt 0.1.0.
    """
    name = "scale_by_adopt"
    validation.check_decay_rate(name, b1=b1, b2=b2)
    validation.check_positive(name, eps=eps)
    validation.check_flag(name, clip=clip)
    validation.check_floating_dtype(name, mu_dtype=mu_dtype, nu_dtype=nu_dtype)
    b1, b2, eps = as_decay_rate(b1), as_decay_rate(b2), as_epsilon(eps)

    def init_fn(params: PyTree) -> ScaleByAdoptState:
        return ScaleByAdoptState(
            count=jnp.zeros([], jnp.int32),
            mu=trees.init_moment(name, params, mu_dtype),
            nu=trees.init_moment(name, params, nu_dtype, real=True),
        )

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, ScaleByAdoptState]:
        del params
        count = trees.increment(state.count)
        is_first = count == 1
        limit = (count - 1).astype(jnp.result_type(float)) ** 0.25 if clip else None
        updates, mu, nu = trees.map_several(
            lambda g, m, v: _adopt_leaf(
                g,
                m,
                v,
                b1=b1,
                b2=trees.scalar_for(jnp.where(is_first, 0.0, b2), g),
                eps=eps,
                limit=limit,
                is_first=is_first,
            ),
            3,
            updates,
            state.mu,
            state.nu,
        )
        return updates, ScaleByAdoptState(count, mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)
