"""Muon with second moments: NorMuon by neuron, AdaMuon by entry."""

from collections.abc import Sequence

import optax

from optaxplus import validation
from optaxplus.custom_types import Axes, DTypeName, Mask, Scalar, ScalarOrSchedule
from optaxplus.optimizers.matrix import Fallback, matrices_and_others
from optaxplus.partition.rules import DEFAULT_RULES, Rule
from optaxplus.sharding.placement import Placement
from optaxplus.transforms.momentum import scale_by_ema
from optaxplus.transforms.normalized import normalize_neurons, scale_by_adamuon
from optaxplus.transforms.orthogonalized import (
    orthogonalize_via_newton_schulz,
    scale_by_matrix_shape,
)
from optaxplus.transforms.sign import scale_by_sign

__all__ = ["adamuon", "normuon"]


def normuon(
    learning_rate: ScalarOrSchedule,
    *,
    clip_norm: Scalar | None = None,
    b1: Scalar = 0.95,
    b2: Scalar = 0.95,
    eps: Scalar = 1e-10,
    nesterov: bool = True,
    weight_decay: ScalarOrSchedule = 0.1,
    decay: str = "decoupled",
    mask: Mask = None,
    ns_steps: int = 5,
    ns_coeffs: str | Sequence[Sequence[float]] = "gram_newton_schulz",
    method: str = "auto",
    normalization: str = "schatten",
    compute_dtype: str = "bfloat16",
    shape_scale: str = "match_adamw",
    rules: Sequence[Rule] = DEFAULT_RULES,
    adamw_learning_rate: ScalarOrSchedule | None = None,
    adamw_b1: Scalar = 0.9,
    adamw_b2: Scalar = 0.95,
    adamw_eps: Scalar = 1e-8,
    adamw_weight_decay: ScalarOrSchedule | None = None,
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
    placement: Placement | str | None = "auto",
    fallback: Fallback = None,
) -> optax.GradientTransformationExtraArgs:
    """NorMuon: Muon whose neurons all take steps of the same size.

    Orthogonalized updates have rows and columns of unequal norm, so some neurons of a
    layer learn much faster than others. NorMuon divides the update of each output
    neuron by the root of its mean square over time and keeps the norm of the whole.
    Parameters that are no hidden matrices go to AdamW, as with `optaxplus.muon`. State:
    4 bytes per parameter in hidden matrices and 4 per output neuron, 8 elsewhere.

    zichongli5/NorMuon is learning_rate=0.02, weight_decay=0, shape_scale="keller",
    ns_coeffs="jordan", normalization="frobenius".

    Links: `clip_by_global_norm`, then for hidden matrices `scale_by_ema`,
    `orthogonalize_via_newton_schulz`, `normalize_neurons`, `scale_by_matrix_shape`,
    `descend`; for the others `scale_by_adam`, `descend`.

    Args:
      learning_rate: See `optaxplus.custom_types`.
      clip_norm: Largest Euclidean norm of the gradients of all trainable parameters
        together, > 0, or None, see `optaxplus.muon`. Static if None.
      b1: Decay rate of the momentum of matrices, in [0, 1).
      b2: Decay rate of the mean squares of neurons, in [0, 1).
      eps: Added to the denominators of neurons. > 0.
      nesterov: Whether the momentum uses Nesterov's step. Static.
      weight_decay: Decay per step of the matrices, >= 0, or a schedule of it; relative
        to the learning rate unless `decay` is "independent". Static if 0.
      decay: Form of the weight decay, see `optaxplus.descend`. Static.
      mask: Which parameters decay, see `optaxplus.custom_types`. Static if a function.
      ns_steps: Newton-Schulz steps, >= 1. Static.
      ns_coeffs: Name of a coefficient table or rows (a, b, c), see
        `orthogonalize_via_newton_schulz`. Static.
      method: "standard", "gram" or "auto", see there. Static.
      normalization: "schatten", "frobenius" or "aol", see there. Static.
      compute_dtype: Dtype of the operands of the matrix products. Static.
      shape_scale: "match_adamw", "keller" or "spectral", see `optaxplus.muon`. Static.
      rules: What each parameter is, see `optaxplus.muon`. Static.
      adamw_learning_rate: For the other parameters; None is `learning_rate`. Static if
        None.
      adamw_b1: Decay rate of AdamW's first moment, in [0, 1).
      adamw_b2: Decay rate of AdamW's second moment, in [0, 1).
      adamw_eps: Added to AdamW's denominator. > 0.
      adamw_weight_decay: For the other parameters, >= 0, or a schedule of it; None is
        `weight_decay`. Static if None or 0.
      mu_dtype: Dtype of the momentum of matrices and of AdamW's first moment, see
        `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of all second moments. Static.
      placement: Which device orthogonalizes which matrices, see
        `optaxplus.custom_types`. Static.
      fallback: Replaces AdamW, see `optaxplus.muon`. Static.

    Returns:
      A transformation whose update has the dtype of the gradient and needs params
      where something decays. Its state holds that of `optax.partition`, as that of
      `optaxplus.muon`: hidden matrices have the label "muon" here, too.

    Raises:
      TypeError: If an argument has a wrong type, a parameter is not floating point, or
        a hidden matrix is complex.
      ValueError: If an argument is out of range; at `init`, if no rule decides a
        parameter, a label has no transformation, or the mask or specs do not fit; if
        `update` is called without the params that it needs.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> params = {"dense": {"kernel": jnp.ones((64, 16)), "bias": jnp.ones(16)}}
      >>> tx = ox.normuon(1e-3)
      >>> ox.memory_report(tx, params).by_label
      {'adamw': 132, 'frozen': 0, 'muon': 4164}

    References:
      Li et al., NorMuon, arXiv 2510.05491.
    """
    name = "normuon"
    validation.check_positive(name, eps=eps)

    def direction(axes: Axes) -> optax.GradientTransformation:
        return optax.chain(
            scale_by_ema(b1, nesterov=nesterov, mu_dtype=mu_dtype),
            orthogonalize_via_newton_schulz(
                ns_steps=ns_steps,
                ns_coeffs=ns_coeffs,
                method=method,
                normalization=normalization,
                compute_dtype=compute_dtype,
                axes=axes,
                placement=placement,
            ),
            normalize_neurons(b2, eps=eps, nu_dtype=nu_dtype, axes=axes),
            scale_by_matrix_shape(shape_scale, axes=axes),
        )

    return matrices_and_others(
        name,
        direction,
        learning_rate,
        clip_norm=clip_norm,
        weight_decay=weight_decay,
        decay=decay,
        mask=mask,
        rules=rules,
        adamw_learning_rate=adamw_learning_rate,
        adamw_b1=adamw_b1,
        adamw_b2=adamw_b2,
        adamw_eps=adamw_eps,
        adamw_weight_decay=adamw_weight_decay,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
        placement=placement,
        fallback=fallback,
    )


def adamuon(
    learning_rate: ScalarOrSchedule,
    *,
    clip_norm: Scalar | None = None,
    b1: Scalar = 0.95,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    nesterov: bool = True,
    use_sign: bool = False,
    weight_decay: ScalarOrSchedule = 0.1,
    decay: str = "decoupled",
    mask: Mask = None,
    ns_steps: int = 5,
    ns_coeffs: str | Sequence[Sequence[float]] = "gram_newton_schulz",
    method: str = "auto",
    normalization: str = "schatten",
    compute_dtype: str = "bfloat16",
    shape_scale: str = "match_adamw",
    rules: Sequence[Rule] = DEFAULT_RULES,
    adamw_learning_rate: ScalarOrSchedule | None = None,
    adamw_b1: Scalar = 0.9,
    adamw_b2: Scalar = 0.95,
    adamw_eps: Scalar = 1e-8,
    adamw_weight_decay: ScalarOrSchedule | None = None,
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
    placement: Placement | str | None = "auto",
    fallback: Fallback = None,
) -> optax.GradientTransformationExtraArgs:
    """AdaMuon: Muon whose entries take steps by their own second moment.

    The orthogonalized momentum is divided, entry by entry, by the root of its mean
    square over time, and brought back to the norm of an orthogonal matrix. Parameters
    that are no hidden matrices go to AdamW, as with `optaxplus.muon`. State: 8 bytes
    per parameter.

    Chongjie-Si/AdaMuon is learning_rate=0.02, weight_decay=0.01, ns_coeffs="jordan",
    normalization="frobenius"; the paper's later versions take the sign of the momentum
    first (use_sign=True).

    Links: `clip_by_global_norm`, then for hidden matrices `scale_by_ema`,
    `scale_by_sign` if `use_sign`, `orthogonalize_via_newton_schulz`,
    `scale_by_adamuon`, `scale_by_matrix_shape`, `descend`; for the others
    `scale_by_adam`, `descend`.

    Args:
      learning_rate: See `optaxplus.custom_types`.
      clip_norm: Largest Euclidean norm of the gradients of all trainable parameters
        together, > 0, or None, see `optaxplus.muon`. Static if None.
      b1: Decay rate of the momentum of matrices, in [0, 1).
      b2: Decay rate of the squares of the orthogonalized update, in [0, 1).
      eps: Added to the denominators of matrices. > 0.
      nesterov: Whether the momentum uses Nesterov's step. Static.
      use_sign: Whether the sign of the momentum is orthogonalized. Static.
      weight_decay: Decay per step of the matrices, >= 0, or a schedule of it; relative
        to the learning rate unless `decay` is "independent". Static if 0.
      decay: Form of the weight decay, see `optaxplus.descend`. Static.
      mask: Which parameters decay, see `optaxplus.custom_types`. Static if a function.
      ns_steps: Newton-Schulz steps, >= 1. Static.
      ns_coeffs: Name of a coefficient table or rows (a, b, c), see
        `orthogonalize_via_newton_schulz`. Static.
      method: "standard", "gram" or "auto", see there. Static.
      normalization: "schatten", "frobenius" or "aol", see there. Static.
      compute_dtype: Dtype of the operands of the matrix products. Static.
      shape_scale: "match_adamw", "keller" or "spectral", see `optaxplus.muon`. Static.
      rules: What each parameter is, see `optaxplus.muon`. Static.
      adamw_learning_rate: For the other parameters; None is `learning_rate`. Static if
        None.
      adamw_b1: Decay rate of AdamW's first moment, in [0, 1).
      adamw_b2: Decay rate of AdamW's second moment, in [0, 1).
      adamw_eps: Added to AdamW's denominator. > 0.
      adamw_weight_decay: For the other parameters, >= 0, or a schedule of it; None is
        `weight_decay`. Static if None or 0.
      mu_dtype: Dtype of the momentum of matrices and of AdamW's first moment, see
        `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of all second moments. Static.
      placement: Which device orthogonalizes which matrices, see
        `optaxplus.custom_types`. Static.
      fallback: Replaces AdamW, see `optaxplus.muon`. Static.

    Returns:
      A transformation whose update has the dtype of the gradient and needs params
      where something decays. Its state holds that of `optax.partition`, as that of
      `optaxplus.muon`: hidden matrices have the label "muon" here, too.

    Raises:
      TypeError: If an argument has a wrong type, a parameter is not floating point, or
        a hidden matrix is complex.
      ValueError: If an argument is out of range; at `init`, if no rule decides a
        parameter, a label has no transformation, or the mask or specs do not fit; if
        `update` is called without the params that it needs.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> params = {"dense": {"kernel": jnp.ones((64, 16)), "bias": jnp.ones(16)}}
      >>> tx = ox.adamuon(1e-3)
      >>> ox.memory_report(tx, params).by_label
      {'adamw': 132, 'frozen': 0, 'muon': 8196}

    References:
      Si et al., AdaMuon, arXiv 2507.11005.
    """
    name = "adamuon"
    validation.check_flag(name, use_sign=use_sign)
    validation.check_positive(name, eps=eps)

    def direction(axes: Axes) -> optax.GradientTransformation:
        return optax.chain(
            scale_by_ema(b1, nesterov=nesterov, mu_dtype=mu_dtype),
            scale_by_sign() if use_sign else optax.identity(),
            orthogonalize_via_newton_schulz(
                ns_steps=ns_steps,
                ns_coeffs=ns_coeffs,
                method=method,
                normalization=normalization,
                compute_dtype=compute_dtype,
                axes=axes,
                placement=placement,
            ),
            scale_by_adamuon(b2, eps=eps, nu_dtype=nu_dtype, axes=axes),
            scale_by_matrix_shape(shape_scale, axes=axes),
        )

    return matrices_and_others(
        name,
        direction,
        learning_rate,
        clip_norm=clip_norm,
        weight_decay=weight_decay,
        decay=decay,
        mask=mask,
        rules=rules,
        adamw_learning_rate=adamw_learning_rate,
        adamw_b1=adamw_b1,
        adamw_b2=adamw_b2,
        adamw_eps=adamw_eps,
        adamw_weight_decay=adamw_weight_decay,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
        placement=placement,
        fallback=fallback,
    )
