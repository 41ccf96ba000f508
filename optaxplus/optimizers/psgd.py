"""PSGD-Kron: whitened updates for weight matrices."""

from collections.abc import Sequence

import optax

from optaxplus.custom_types import Axes, DTypeName, Mask, Scalar, ScalarOrSchedule
from optaxplus.optimizers.matrix import Fallback, matrices_and_others
from optaxplus.partition.rules import DEFAULT_RULES, Rule
from optaxplus.sharding.placement import Placement
from optaxplus.transforms.psgd import scale_by_kron

__all__ = ["kron"]


def kron(
    learning_rate: ScalarOrSchedule,
    *,
    clip_norm: Scalar | None = None,
    b1: Scalar = 0.9,
    preconditioner_learning_rate: Scalar = 0.1,
    init_scale: Scalar = 1.0,
    update_interval: int = 34,
    warmup_steps: int = 500,
    interval_growth: Scalar | None = 1e-3,
    max_dim: int = 8192,
    large_dims: str = "diagonal",
    max_update_rms: Scalar | None = 1.1,
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
    factor_dtype: DTypeName = "float32",
    placement: Placement | str | None = "auto",
    fallback: Fallback = None,
) -> optax.GradientTransformationExtraArgs:
    """PSGD-Kron: matrices whitened by Kronecker factors that are fitted to them.

    What Adam's second moment does for entries, two triangular factors do for the rows
    and columns of a matrix, mixtures included. Parameters that are no hidden matrices
    go to AdamW, as with `optaxplus.muon`. State: 4·(1 + m/n + n/m) bytes per parameter
    of an m×n matrix, 12 if it is square; 8 elsewhere. Cost: four products a step, eight
    more and two triangular solves on a refresh.

    Updates have a root mean square near 1, several times that of AdamW's late in a run:
    the authors of the ports start from a half to a third of Adam's learning rate, with
    3 to 10 times its weight decay. `adamw_learning_rate` is for the others. Settings
    that come near the ports, which give every parameter to Kron:

    psgd_jax 0.2.9      the defaults of the fit; learning_rate=1e-3, weight_decay=0.0
    kron_torch 0.3.3    the same; learning_rate=3e-4, weight_decay=0.0
    Levanter            psgd_jax's with clip_norm=1.0
    HeavyBall 3.2.1     warmup_steps=1000, max_dim=2048, learning_rate=1e-3,
                        weight_decay=0.0; starts from the scale of the first gradients
                        and limits updates in another way

    psgd_jax has a factor for every axis of a kernel of three or more.

    Links: `clip_by_global_norm`, then for hidden matrices `scale_by_kron`, `descend`;
    for the others `scale_by_adam`, `descend`.

    Args:
      learning_rate: See `optaxplus.custom_types`.
      clip_norm: Largest Euclidean norm of the gradients of all trainable parameters
        together, > 0, or None, see `optaxplus.muon`. Static if None.
      b1: Decay rate of the momentum, in [0, 1).
      preconditioner_learning_rate: Step of the fit, relative to the factors; in (0, 1).
      init_scale: Diagonal of the Kronecker product of the factors at first. > 0.
      update_interval: How many steps pass between refreshes of the factors in the end,
        >= 1. Static.
      warmup_steps: The factors are refreshed in every step up to this one. >= 0.
        Static.
      interval_growth: After these the interval is exp(interval_growth·steps), up to
        `update_interval`. >= 0; None: `update_interval` at once. Static if None.
      max_dim: Largest side that has a triangular factor, >= 1. Static.
      large_dims: What becomes of larger sides, "diagonal" or "tiles", see
        `optaxplus.scale_by_kron`. Static.
      max_update_rms: Largest root mean square of a matrix of the update, > 0, or None
        for no limit. Static if None.
      seed: Of the random numbers of the fit, >= 0. Static.
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
      mu_dtype: Dtype of the momentum of matrices and of AdamW's first moment, see
        `optaxplus.custom_types`. Static.
      nu_dtype: Dtype of AdamW's second moment. Static.
      factor_dtype: Dtype of the factors between steps. Static.
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
      >>> tx = ox.kron(5e-4, adamw_learning_rate=1e-3)
      >>> ox.memory_report(tx, params).by_label
      {'adamw': 132, 'frozen': 0, 'muon': 21512}

    References:
      Li, arXiv 1512.04202, arXiv 2402.11858.
    """
    name = "kron"

    def direction(axes: Axes) -> optax.GradientTransformation:
        return scale_by_kron(
            b1,
            preconditioner_learning_rate=preconditioner_learning_rate,
            init_scale=init_scale,
            update_interval=update_interval,
            warmup_steps=warmup_steps,
            interval_growth=interval_growth,
            max_dim=max_dim,
            large_dims=large_dims,
            max_update_rms=max_update_rms,
            seed=seed,
            axes=axes,
            mu_dtype=mu_dtype,
            factor_dtype=factor_dtype,
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
