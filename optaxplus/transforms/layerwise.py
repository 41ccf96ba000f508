"""Steps in proportion to the size of the weights they change.

For one matrix or vector w with update u:

    LAMB               u <- u · φ(‖w‖)/(‖u‖ + ε)
    LARS, paper, apex  u <- (u + λ·w) · η·‖w‖/(‖u‖ + λ·‖w‖ + ε)
    LARS, optax        u <- (u + λ·w) · η·‖w‖/(‖u + λ·w‖ + ε)
    LARS, tensorflow   u <- u · η·‖w‖/(‖u‖ + λ·‖w‖ + ε)
    parameter RMS      u <- u · max(ε₂, RMS(w))

with φ(x) = min(max(x, φ_min), φ_max). Where w is zero, or the denominator is, the ratio
is 1; in the form of apex also where u is, and nothing decays there. LAMB's is any form
with η = 1 and λ = 0.

Letters to arguments: λ is `weight_decay`, η is `trust_coefficient`, ε is `eps`, φ_min
and φ_max are `min_param_norm`, `max_param_norm`, ε₂ is `min_rms`.

Sources: You et al., LARS, arXiv 1708.03888, Algorithm 1; You et al., LAMB, arXiv
1904.00962, Algorithm 2; `LARSOptimizer` of TensorFlow 1; `LARC` of NVIDIA's apex;
Shazeer and Stern, Adafactor, arXiv 1804.04235, section 8 (relative step size).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaxplus import trees, validation
from optaxplus.custom_types import Axes, Mask, PyTree, Scalar
from optaxplus.numerics.matrix_axes import MatrixAxes
from optaxplus.numerics.norms import block_norm, block_rms
from optaxplus.partition.inference import axes_of

__all__ = ["scale_by_param_rms", "trust_ratio"]

_FORMS = ("paper", "optax", "tensorflow", "apex")


def _trust_ratio_leaf(
    u: jax.Array,
    p: jax.Array,
    axes: MatrixAxes,
    *,
    trust_coefficient: Scalar,
    weight_decay: Scalar,
    form: str,
    eps: Scalar,
    min_param_norm: Scalar,
    max_param_norm: Scalar | None,
) -> jax.Array:
    wide, weights = trees.widen(u), trees.widen(p).astype(trees.compute_dtype(u.dtype))
    decayed = wide + weight_decay * weights
    param_norm = block_norm(weights, axes)
    update_norm = block_norm(decayed if form == "optax" else wide, axes)
    if form == "optax":
        denominator = update_norm + eps
    else:
        denominator = update_norm + weight_decay * param_norm + eps
    param_norm = jnp.maximum(param_norm, min_param_norm)
    if max_param_norm is not None:
        param_norm = jnp.minimum(param_norm, max_param_norm)
    undefined = (param_norm == 0.0) | (denominator == 0.0)
    update = decayed
    if form == "tensorflow":
        update = wide
    if form == "apex":
        undefined |= update_norm == 0.0
        update = jnp.where(undefined, wide, decayed)
    ratio = trust_coefficient * param_norm / jnp.where(undefined, 1.0, denominator)
    return update * jnp.where(undefined, 1.0, ratio)


def trust_ratio(
    *,
    trust_coefficient: Scalar = 1.0,
    weight_decay: Scalar = 0.0,
    form: str = "paper",
    eps: Scalar = 0.0,
    min_param_norm: Scalar = 0.0,
    max_param_norm: Scalar | None = None,
    mask: Mask = None,
    axes: Axes = None,
) -> optax.GradientTransformation:
    """Scales the update of every matrix or vector to the norm of its parameters.

    Each layer then moves by the same relative amount, which keeps very large batches
    stable. In a stack of layers each layer has its own ratio.

    Args:
      trust_coefficient: Relative length η of a step before the learning rate. > 0.
      weight_decay: LARS's λ, >= 0: decay that enters the update and, as a norm of its
        own, the denominator. Leave it 0 where decay was added before (LAMB).
      form: How λ enters: "paper", "optax", "tensorflow" or "apex", see the table of
        `optaxplus.lars`. Static.
      eps: Added to the denominator, in units of the update. >= 0.
      min_param_norm: Lower bound φ_min of the parameters' norm; other than 0 it lets
        zero parameters move by it. >= 0.
      max_param_norm: Upper bound φ_max of the parameters' norm, > 0, or None (10 in
        MXNet's LAMB). Static if None.
      mask: Which parameters are scaled and decayed, see `optaxplus.custom_types`; the
        update of the others passes unchanged. None is all; LARS's recipes leave out
        biases and norms, `mask=optaxplus.decay_mask`.
      axes: Matrix axes, see `optaxplus.custom_types`. Vectors are scaled too, as in
        optax.

    Returns:
      A transformation without state that needs `params`; emits float32.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range, axes or mask do not fit, or `update`
        is called without params.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> params = jnp.array([3.0, 4.0])
      >>> tx = ox.trust_ratio()
      >>> updates, _ = tx.update(jnp.array([0.0, -2.0]), tx.init(params), params)
      >>> print(updates)
      [ 0. -5.]

    References:
      You et al., arXiv 1708.03888, Algorithm 1 (LARS), and arXiv 1904.00962, Algorithm
      2 (LAMB). The module has the formulas of all forms.
    """
    name = "trust_ratio"
    validation.check_positive(name, trust_coefficient=trust_coefficient)
    validation.check_non_negative(
        name, weight_decay=weight_decay, eps=eps, min_param_norm=min_param_norm
    )
    if max_param_norm is not None:
        validation.check_positive(name, max_param_norm=max_param_norm)
        bounds = min_param_norm, max_param_norm
        if not any(isinstance(b, jax.Array) for b in bounds) and bounds[0] > bounds[1]:
            raise ValueError(
                f"{name}: min_param_norm={min_param_norm!r} is not allowed; it must be "
                f"at most max_param_norm={max_param_norm!r}."
            )
    validation.check_choice(name, "form", form, _FORMS)

    def init_fn(params: PyTree) -> optax.EmptyState:
        trees.check_floating(name, params)
        axes_of(name, axes, params)
        trees.resolve_mask(name, mask, params)
        return optax.EmptyState()

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, optax.EmptyState]:
        validation.check_params(name, params)

        def leaf(
            u: jax.Array, p: jax.Array, leaf_axes: MatrixAxes, is_scaled: bool
        ) -> jax.Array:
            if not is_scaled:
                return trees.widen(u)
            return _trust_ratio_leaf(
                u,
                p,
                leaf_axes,
                trust_coefficient=trust_coefficient,
                weight_decay=weight_decay,
                form=form,
                eps=eps,
                min_param_norm=min_param_norm,
                max_param_norm=max_param_norm,
            )

        leaf_axes = axes_of(name, axes, updates)
        scaled = trees.resolve_mask(name, mask, params)
        return jax.tree.map(leaf, updates, params, leaf_axes, scaled), state

    return optax.GradientTransformation(init_fn, update_fn)


def scale_by_param_rms(
    *, min_rms: Scalar = 1e-3, axes: Axes = None
) -> optax.GradientTransformation:
    """Multiplies the update of every matrix or vector by the RMS of its parameters.

    Args:
      min_rms: Lower bound of the factor, so that zeros can grow. > 0.
      axes: Matrix axes, see `optaxplus.custom_types`.

    Returns:
      A transformation without state that needs `params`; emits float32.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range, axes do not fit, or `update` is
        called without params.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> params = jnp.array([1.0, 7.0])
      >>> tx = ox.scale_by_param_rms()
      >>> updates, _ = tx.update(jnp.array([1.0, -1.0]), tx.init(params), params)
      >>> print(updates)
      [ 5. -5.]

    References:
      Shazeer and Stern, arXiv 1804.04235, section 8.
    """
    name = "scale_by_param_rms"
    validation.check_positive(name, min_rms=min_rms)

    def init_fn(params: PyTree) -> optax.EmptyState:
        trees.check_floating(name, params)
        axes_of(name, axes, params)
        return optax.EmptyState()

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, optax.EmptyState]:
        validation.check_params(name, params)

        def leaf(u: jax.Array, p: jax.Array, leaf_axes: MatrixAxes) -> jax.Array:
            weights = trees.widen(p).astype(trees.compute_dtype(u.dtype))
            scale = jnp.maximum(block_rms(weights, leaf_axes), min_rms)
            return trees.widen(u) * scale

        return jax.tree.map(leaf, updates, params, axes_of(name, axes, updates)), state

    return optax.GradientTransformation(init_fn, update_fn)
