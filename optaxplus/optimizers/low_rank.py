"""Optimizers whose state for weight matrices is of low rank: APOLLO."""

from collections.abc import Sequence

import optax

from optaxplus.custom_types import Axes, DTypeName, Mask, Scalar, ScalarOrSchedule
from optaxplus.optimizers.matrix import Fallback, matrices_and_others
from optaxplus.partition.rules import DEFAULT_RULES, Rule
from optaxplus.transforms.low_rank import scale_by_apollo

__all__ = ["apollo"]


def apollo(
    learning_rate: ScalarOrSchedule,
    *,
    clip_norm: Scalar | None = None,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    rank: int = 256,
    scale: Scalar = 1.0,
    scaling: str = "channel",
    update_interval: int = 200,
    max_norm_growth: Scalar | None = 1.01,
    seed: int = 0,
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
    fallback: Fallback = None,
) -> optax.GradientTransformationExtraArgs:
    """APOLLO: gradients as long as Adam's steps, which a random projection measures.

    Every channel of a weight matrix moves along its gradient, as far as Adam would go
    in a random space of low rank. Parameters that are no hidden matrices go to AdamW,
    as with `optaxplus.muon`. State: 8 bytes per entry of (rank, longer side) in hidden
    matrices, 8 per parameter elsewhere.

    As published (arXiv 2412.05270 and apollo-torch), beside learning_rate=0.01,
    weight_decay=0, adamw_b2=0.999, adamw_eps=1e-6:

        APOLLO         rank=256, scaling="channel", scale=1
        APOLLO-Mini    rank=1, scaling="tensor", scale=128

    A rank of 256 is meant for widths of 1000 and more, a quarter of the width below.
    The limit on the growth of norms replaces the clipping of gradients; warm up the
    learning rate all the same.

    Links: `clip_by_global_norm`, then for hidden matrices `scale_by_apollo`, `descend`;
    for the others `scale_by_adam`, `descend`.

    Args:
      learning_rate: See `optaxplus.custom_types`.
      clip_norm: Largest Euclidean norm of the gradients of all trainable parameters
        together, > 0, or None, see `optaxplus.muon`. Static if None.
      b1: Decay rate of the first moment of the projected gradient, in [0, 1).
      b2: Decay rate of its second moment, in [0, 1).
      eps: Added to the root of the second moment before its bias correction. >= 0.
      rank: Rows of the projection, >= 1; not more than the shorter side has. Static.
      scale: The update of matrices is multiplied by its root. > 0.
      scaling: "channel", a factor for each index of the longer side, or "tensor", one
        for each matrix. Static.
      update_interval: Steps between two projections, >= 1. Static.
      max_norm_growth: How many times longer than the one before it the update of a
        matrix may be, >= 1; None for no limit. Static if None.
      seed: Of the projections, >= 0. Static.
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
      mu_dtype: Dtype of all first moments, see `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of all second moments. Static.
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
      >>> mini = ox.apollo(0.01, rank=1, scaling="tensor", scale=128.0)
      >>> print(ox.memory_report(mini, {"dense": {"kernel": jnp.ones((64, 16))}}).state)
      524

    References:
      Zhu et al., APOLLO: SGD-like memory, AdamW-level performance, arXiv 2412.05270,
      Algorithm 1.
    """
    name = "apollo"

    def direction(axes: Axes) -> optax.GradientTransformation:
        return scale_by_apollo(
            b1,
            b2,
            eps=eps,
            rank=rank,
            scale=scale,
            scaling=scaling,
            update_interval=update_interval,
            max_norm_growth=max_norm_growth,
            seed=seed,
            axes=axes,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
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
