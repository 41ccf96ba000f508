"""Shampoo and SOAP: weight matrices preconditioned from both sides."""

from collections.abc import Sequence

import optax

from optaxplus.custom_types import Axes, DTypeName, Mask, Scalar, ScalarOrSchedule
from optaxplus.optimizers.matrix import Fallback, matrices_and_others
from optaxplus.partition.rules import DEFAULT_RULES, Rule
from optaxplus.sharding.placement import Placement
from optaxplus.transforms.shampoo import scale_by_shampoo
from optaxplus.transforms.soap import scale_by_soap

__all__ = ["shampoo", "soap"]


def shampoo(
    learning_rate: ScalarOrSchedule,
    *,
    clip_norm: Scalar | None = None,
    b1: Scalar = 0.95,
    b2: Scalar = 0.95,
    b3: Scalar = 0.95,
    eps: Scalar = 1e-6,
    update_interval: int = 10,
    max_dim: int = 1024,
    large_dims: str = "tiles",
    grafting: str | None = "adam",
    grafting_eps: Scalar = 1e-8,
    root_order: int | None = None,
    root_method: str = "eigh",
    weight_decay: ScalarOrSchedule = 0.1,
    decay: str = "decoupled",
    mask: Mask = None,
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
    """Shampoo: matrices between inverse roots of their rows' and columns' moments.

    With grafting "adam", the default, every step has the size of Adam's, and AdamW's
    learning rate and weight decay fit. Parameters that are no hidden matrices go to
    AdamW, as with `optaxplus.muon`. State of an m×n matrix below `max_dim`:
    8 + 8·(m/n + n/m) bytes per parameter, 24 if it is square; ask
    `optaxplus.memory_report` before you allocate it. 8 elsewhere.

        Gupta et al.           b1=0.0, b2=1.0, update_interval=1, grafting=None
        Distributed Shampoo    b1=0.9, b2=1.0, update_interval=1, grafting=None
        modded-nanogpt's run   update_interval=10, max_dim=8192: the defaults otherwise

    Their eps is absolute, 1e-12; here it is relative to the factors.

    Links: `clip_by_global_norm`, then for hidden matrices `scale_by_shampoo`,
    `descend`; for the others `scale_by_adam`, `descend`.

    Args:
      learning_rate: See `optaxplus.custom_types`.
      clip_norm: Largest Euclidean norm of the gradients of all trainable parameters
        together, > 0, or None, see `optaxplus.muon`. Static if None.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the factors, in [0, 1), or 1 for sums. Static if 1.
      b3: Decay rate of the second moment of grafting "adam", in [0, 1).
      eps: Smallest eigenvalue of a factor, relative to its Frobenius norm. >= 0. Static
        for `root_method="newton"`.
      update_interval: Steps from one refresh of the roots to the next, >= 1. Static.
      max_dim: Largest side that has a full factor, >= 1. Static.
      large_dims: What becomes of larger sides, "tiles" or "diagonal", see
        `optaxplus.scale_by_shampoo`. Static.
      grafting: Whose size a step has: "sgd", "adagrad", "adam", or None. Static.
      grafting_eps: Added to the root of its second moment. > 0.
      root_order: Order of the inverse roots, >= 1; None is 4. Static.
      root_method: "eigh", or "newton" for TPUs, see `optaxplus.scale_by_shampoo`.
        Static.
      weight_decay: Decay per step of the matrices, >= 0, or a schedule of it; relative
        to the learning rate unless `decay` is "independent". Static if 0.
      decay: Form of the weight decay, see `optaxplus.descend`. Static.
      mask: Which parameters decay, see `optaxplus.custom_types`. Static if a function.
      rules: What each parameter is, see `optaxplus.muon`. Static.
      adamw_learning_rate: For the other parameters; None is `learning_rate`. Static if
        None.
      adamw_b1: Decay rate of AdamW's first moment, in [0, 1).
      adamw_b2: Decay rate of AdamW's second moment, in [0, 1).
      adamw_eps: Added to AdamW's denominator. > 0.
      adamw_weight_decay: For the other parameters, >= 0, or a schedule of it; None is
        `weight_decay`. Static if None or 0.
      mu_dtype: Dtype of first moments, see `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of second moments. Static.
      placement: Which device does the work, see `optaxplus.custom_types`. Static.
      fallback: Replaces AdamW, see `optaxplus.muon`. Static.

    Returns:
      A transformation whose update has the dtype of the gradient and needs params
      where something decays. Its state holds that of `optax.partition`, as that of
      `optaxplus.muon`: hidden matrices have the label "muon" here, too.

    Raises:
      TypeError: If an argument has a wrong type, a parameter is not floating point, or
        a hidden matrix is complex.
      ValueError: If an argument is out of range; at `init`, if no rule decides a
        parameter, a label has no transformation, the mask or specs do not fit, or a
        side has no equal tiles; if `update` is called without the params that it needs.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> params = {"dense": {"kernel": jnp.ones((64, 16)), "bias": jnp.ones(16)}}
      >>> tx = ox.shampoo(1e-3)
      >>> ox.memory_report(tx, params).by_label
      {'adamw': 132, 'frozen': 0, 'muon': 43012}

    References:
      Gupta et al., arXiv 1802.09568, Algorithm 1; Shi et al., arXiv 2309.06497.
    """
    name = "shampoo"

    def direction(axes: Axes) -> optax.GradientTransformation:
        return scale_by_shampoo(
            b1,
            b2,
            b3=b3,
            eps=eps,
            update_interval=update_interval,
            max_dim=max_dim,
            large_dims=large_dims,
            grafting=grafting,
            grafting_eps=grafting_eps,
            root_order=root_order,
            root_method=root_method,
            axes=axes,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
            placement=placement,
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


def soap(
    learning_rate: ScalarOrSchedule,
    *,
    clip_norm: Scalar | None = None,
    b1: Scalar = 0.95,
    b2: Scalar = 0.95,
    b3: Scalar | None = None,
    eps: Scalar = 1e-8,
    update_interval: int = 10,
    max_dim: int = 10000,
    large_dims: str = "diagonal",
    weight_decay: ScalarOrSchedule = 0.1,
    decay: str = "decoupled",
    mask: Mask = None,
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
    """SOAP: Adam for matrices, in the eigenbasis of Shampoo's factors.

    The coordinates that Adam divides by their mean squares are those in which rows and
    columns of the gradients are uncorrelated. Steps have the size of Adam's, and its
    learning rates fit. The first gradient makes the bases of the matrices, which do not
    move in that step. Parameters that are no hidden matrices go to AdamW, as with
    `optaxplus.muon`. State of an m×n matrix: 8 + 8·(m/n + n/m) bytes per parameter, 24
    if it is square; ask `optaxplus.memory_report` before you allocate it. 8 elsewhere.

    nikhilvyas/SOAP is learning_rate=3e-3, weight_decay=0.01, with every parameter of
    two axes in its rules and decay after the step. Theirs gives vectors to Adam too,
    with SOAP's b1 and b2.

    Links: `clip_by_global_norm`, then for hidden matrices `scale_by_soap`, `descend`;
    for the others `scale_by_adam`, `descend`.

    Args:
      learning_rate: See `optaxplus.custom_types`.
      clip_norm: Largest Euclidean norm of the gradients of all trainable parameters
        together, > 0, or None, see `optaxplus.muon`. Static if None.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      b3: Decay rate of the factors, in [0, 1); None is `b2`. Static if None.
      eps: Added to the root of the second moment. > 0.
      update_interval: Steps from one refresh of the bases to the next, >= 1. Static.
      max_dim: Largest side that has a basis, >= 1. Static.
      large_dims: What becomes of larger sides, "diagonal" or "tiles", see
        `optaxplus.scale_by_soap`. Static.
      weight_decay: Decay per step of the matrices, >= 0, or a schedule of it; relative
        to the learning rate unless `decay` is "independent". Static if 0.
      decay: Form of the weight decay, see `optaxplus.descend`. Static.
      mask: Which parameters decay, see `optaxplus.custom_types`. Static if a function.
      rules: What each parameter is, see `optaxplus.muon`. Static.
      adamw_learning_rate: For the other parameters; None is `learning_rate`. Static if
        None.
      adamw_b1: Decay rate of AdamW's first moment, in [0, 1).
      adamw_b2: Decay rate of AdamW's second moment, in [0, 1).
      adamw_eps: Added to AdamW's denominator. > 0.
      adamw_weight_decay: For the other parameters, >= 0, or a schedule of it; None is
        `weight_decay`. Static if None or 0.
      mu_dtype: Dtype of first moments, see `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of second moments. Static.
      placement: Which device does the work, see `optaxplus.custom_types`. Static.
      fallback: Replaces AdamW, see `optaxplus.muon`. Static.

    Returns:
      A transformation whose update has the dtype of the gradient and needs params
      where something decays. Its state holds that of `optax.partition`, as that of
      `optaxplus.muon`: hidden matrices have the label "muon" here, too.

    Raises:
      TypeError: If an argument has a wrong type, a parameter is not floating point, or
        a hidden matrix is complex.
      ValueError: If an argument is out of range; at `init`, if no rule decides a
        parameter, a label has no transformation, the mask or specs do not fit, or a
        side has no equal tiles; if `update` is called without the params that it needs.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> params = {"dense": {"kernel": jnp.ones((64, 16)), "bias": jnp.ones(16)}}
      >>> tx = ox.soap(3e-3, weight_decay=0.01)
      >>> ox.memory_report(tx, params).by_label
      {'adamw': 132, 'frozen': 0, 'muon': 43012}

    References:
      Vyas et al., SOAP, arXiv 2409.11321, Algorithm 3.
    """
    name = "soap"

    def direction(axes: Axes) -> optax.GradientTransformation:
        return scale_by_soap(
            b1,
            b2,
            b3=b3,
            eps=eps,
            update_interval=update_interval,
            max_dim=max_dim,
            large_dims=large_dims,
            axes=axes,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
            placement=placement,
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
