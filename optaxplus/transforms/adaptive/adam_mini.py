"""Adam-mini: Adam with one second moment for a whole block of coordinates.

For one matrix or vector:

    m_t = β₁·m_{t-1} + (1 - β₁)·g_t
    v_t = β₂·v_{t-1} + (1 - β₂)·mean(|g_t|²)             one number a block
    u_t = m̂_t / (sqrt(v̂_t) + ε)                         hats: divided by 1 - βᵗ

Letters to arguments: β₁, β₂ are `b1`, `b2`, ε is `eps`; m, v are the state's `mu`,
`nu`.

Source: Zhang et al., Adam-mini, arXiv 2406.16793, Algorithm 1, and the authors' package
adam-mini 1.1.1.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxplus import trees, validation
from optaxplus.custom_types import Axes, DTypeName, PyTree, Scalar
from optaxplus.numerics.hyperparameters import as_decay_rate, as_epsilon
from optaxplus.numerics.matrix_axes import MatrixAxes, block_statistic, spread_statistic
from optaxplus.numerics.moving_averages import bias_correction, mix
from optaxplus.numerics.norms import mean_square
from optaxplus.partition.inference import axes_of

__all__ = ["ScaleByAdamMiniState", "scale_by_adam_mini"]


class ScaleByAdamMiniState(NamedTuple):
    """State of `scale_by_adam_mini`.

    Attributes:
      count: Finished updates; shape (), int32.
      mu: First moment m; like the parameters, in `mu_dtype`.
      nu: Second moment v; real, in `nu_dtype`, of the parameters' rank; the axes of a
        block have size 1. With splits the first axis of fan_out has one entry a split.
    """

    count: jax.Array
    mu: PyTree
    nu: PyTree


def _adam_mini_leaf(
    g: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    axes: MatrixAxes,
    *,
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    scales: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One leaf: (u, m, v)."""
    wide = trees.widen(g)
    scale_mu, scale_nu = (trees.scalar_for(scale, g) for scale in scales)
    m = mix(b1, mu.astype(wide.dtype), wide)
    v = mix(b2, trees.widen(nu), block_statistic(mean_square, wide, axes))
    factor = scale_mu / (jnp.sqrt(scale_nu * v) + eps)
    u = m * spread_statistic(factor, axes, g.shape)
    return u, m.astype(mu.dtype), v.astype(nu.dtype)


def scale_by_adam_mini(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    *,
    eps: Scalar = 1e-8,
    axes: Axes = None,
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
) -> optax.GradientTransformation:
    """Divides a running mean of the gradient by one root mean square a block.

    A block is a matrix or a vector of `axes`. With `MatrixAxes((), fan_in)` every
    output neuron is one, with the head axis left out or the heads as splits every head,
    with `MatrixAxes((), ())` every coordinate, which is Adam; `optaxplus.adam_mini`
    chooses as the authors do.

    Args:
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added outside the square root, in units of the gradient. > 0.
      axes: Matrix axes, see `optaxplus.custom_types`.
      mu_dtype: Dtype of the first moment, see `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of the second moment. Static.

    Returns:
      A transformation with state `ScaleByAdamMiniState`; emits float32. Where the
      squares of a block overflow float32 its update is 0 from then on.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range or axes do not fit.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> params = {"dense": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}}
      >>> tx = ox.scale_by_adam_mini()
      >>> {name: nu.shape for name, nu in tx.init(params).nu["dense"].items()}
      {'bias': (1,), 'kernel': (1, 1)}

    References:
      Zhang et al., arXiv 2406.16793, Algorithm 1; the authors' package adam-mini 1.1.1.
    """
    name = "scale_by_adam_mini"
    validation.check_decay_rate(name, b1=b1, b2=b2)
    validation.check_positive(name, eps=eps)
    validation.check_floating_dtype(name, mu_dtype=mu_dtype, nu_dtype=nu_dtype)
    b1, b2, eps = as_decay_rate(b1), as_decay_rate(b2), as_epsilon(eps)

    def init_fn(params: PyTree) -> ScaleByAdamMiniState:
        return ScaleByAdamMiniState(
            count=jnp.zeros([], jnp.int32),
            mu=trees.init_moment(name, params, mu_dtype),
            nu=jax.tree.map(
                lambda zeros, leaf_axes: block_statistic(mean_square, zeros, leaf_axes),
                trees.init_moment(name, params, nu_dtype, real=True),
                axes_of(name, axes, params),
            ),
        )

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, ScaleByAdamMiniState]:
        del params
        count = trees.increment(state.count)
        scales = 1.0 / bias_correction(b1, count), 1.0 / bias_correction(b2, count)
        updates, mu, nu = trees.map_several(
            lambda *leaves: _adam_mini_leaf(
                *leaves, b1=b1, b2=b2, eps=eps, scales=scales
            ),
            3,
            updates,
            state.mu,
            state.nu,
            axes_of(name, axes, updates),
        )
        return updates, ScaleByAdamMiniState(count, mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)
