"""Dion: orthonormal updates of low rank for weight matrices."""

from collections.abc import Sequence

import optax

from optaxplus.custom_types import Axes, DTypeName, Mask, Scalar, ScalarOrSchedule
from optaxplus.optimizers.matrix import Fallback, matrices_and_others
from optaxplus.partition.rules import DEFAULT_RULES, Rule
from optaxplus.transforms.dion import scale_by_dion
from optaxplus.transforms.orthogonalized import scale_by_matrix_shape

__all__ = ["dion"]


def dion(
    learning_rate: ScalarOrSchedule,
    *,
    clip_norm: Scalar | None = None,
    b1: Scalar = 0.95,
    rank_fraction: float = 1.0,
    rank_multiple: int = 1,
    power_iterations: int = 1,
    eps: Scalar = 1e-8,
    seed: int = 0,
    weight_decay: ScalarOrSchedule = 0.1,
    decay: str = "decoupled",
    mask: Mask = None,
    shape_scale: str = "spectral",
    rules: Sequence[Rule] = DEFAULT_RULES,
    adamw_learning_rate: ScalarOrSchedule | None = None,
    adamw_b1: Scalar = 0.9,
    adamw_b2: Scalar = 0.95,
    adamw_eps: Scalar = 1e-8,
    adamw_weight_decay: ScalarOrSchedule | None = None,
    mu_dtype: DTypeName = "float32",
    nu_dtype: DTypeName = "float32",
    fallback: Fallback = None,
) -> optax.GradientTransformationExtraArgs:
    """Dion: Muon along the leading directions of the momentum, the rest kept for later.

    One power iteration a step, started where the last one ended, and a QR decomposition
    take the place of Newton-Schulz; what a basis of low rank does not capture stays in
    the momentum. Parameters that are no hidden matrices go to AdamW, as with
    `optaxplus.muon`. State: 4 bytes per parameter in hidden matrices and 4 per entry of
    the bases, shorter side times rank; 8 elsewhere.

    microsoft/dion is learning_rate=0.01, weight_decay=0.01. On CPUs an update takes
    several times as long as Muon's: QR decompositions do not run on matrix units. On
    accelerators it was not measured. AdamW's learning rate does not suit
    `shape_scale="spectral"`; set `adamw_learning_rate`.

    Links: `clip_by_global_norm`, then for hidden matrices `scale_by_dion`,
    `scale_by_matrix_shape`, `descend`; for the others `scale_by_adam`, `descend`.

    Args:
      learning_rate: See `optaxplus.custom_types`.
      clip_norm: Largest Euclidean norm of the gradients of all trainable parameters
        together, > 0, or None, see `optaxplus.muon`. Static if None.
      b1: Share of the captured part of the momentum that stays, in [0, 1).
      rank_fraction: Rank of the basis relative to the shorter side, in (0, 1]. Static.
      rank_multiple: The rank is rounded up to a multiple of it, >= 1. Static.
      power_iterations: Power iterations a step, >= 1. Static.
      eps: Added to the lengths of the basis' columns, relative to the matrix. >= 0.
      seed: Of the first bases, >= 0. Static.
      weight_decay: Decay per step of the matrices, >= 0, or a schedule of it; relative
        to the learning rate unless `decay` is "independent". Static if 0.
      decay: Form of the weight decay, see `optaxplus.descend`. Static.
      mask: Which parameters decay, see `optaxplus.custom_types`. Static if a function.
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
      nu_dtype: Dtype of AdamW's second moment. Static.
      fallback: Replaces AdamW, see `optaxplus.muon`. Static.

    Returns:
      A transformation whose update has the dtype of the gradient and needs params
      where something decays. Its state holds that of `optax.partition`, as that of
      `optaxplus.muon`: hidden matrices have the label "muon" here, too.

    Raises:
      TypeError: If an argument has a wrong type, a parameter is not floating point, or
        a hidden matrix is complex.
      ValueError: If an argument is out of range; at `init`, if no rule decides a
        parameter, a label has no transformation, or the mask does not fit; if `update`
        is called without the params that it needs.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> params = {"dense": {"kernel": jnp.ones((64, 16)), "bias": jnp.ones(16)}}
      >>> tx = ox.dion(0.01, rank_fraction=0.25, adamw_learning_rate=1e-3)
      >>> ox.memory_report(tx, params).by_label
      {'adamw': 132, 'frozen': 0, 'muon': 4352}

    References:
      Ahn et al., Dion, arXiv 2504.05295, Algorithm 1.
    """
    name = "dion"

    def direction(axes: Axes) -> optax.GradientTransformation:
        return optax.chain(
            scale_by_dion(
                b1,
                rank_fraction=rank_fraction,
                rank_multiple=rank_multiple,
                power_iterations=power_iterations,
                eps=eps,
                seed=seed,
                mu_dtype=mu_dtype,
                axes=axes,
            ),
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
        placement=None,
        fallback=fallback,
    )
