"""Muon: orthogonalized momentum for weight matrices, another rule for the rest."""

from collections.abc import Sequence

import optax

from optaxplus.custom_types import (
    Axes,
    DTypeName,
    Mask,
    Scalar,
    ScalarOrSchedule,
)
from optaxplus.optimizers.matrix import Fallback, matrices_and_others
from optaxplus.partition.rules import DEFAULT_RULES, Rule
from optaxplus.sharding.placement import Placement
from optaxplus.transforms.momentum import scale_by_ema
from optaxplus.transforms.orthogonalized import (
    orthogonalize_via_newton_schulz,
    scale_by_matrix_shape,
)

__all__ = ["muon"]


def muon(
    learning_rate: ScalarOrSchedule,
    *,
    clip_norm: Scalar | None = None,
    b1: Scalar = 0.95,
    nesterov: bool = True,
    debias: bool = False,
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
    """Muon for hidden weight matrices, AdamW for everything else.

    Hidden matrices step along their orthogonalized momentum. Embeddings, output heads,
    biases and norms go to AdamW. An output head is known by its name alone (`lm_head`,
    `head`, `classifier`, `logits`, …), so print `ox.explain_routing(params)` once to
    see which parameter goes where. With the default `shape_scale` the updates of both
    groups have the RMS that AdamW's have, so one learning rate and one weight decay
    serve both, and those tuned for AdamW are a good start. State: 4 bytes per parameter
    in hidden matrices, 8 elsewhere.

    Settings that reproduce other implementations, for the matrices. All have
    ns_steps=5 and normalization="frobenius", all but the last ns_coeffs="jordan":

    ====================  ==============  =========================================
    implementation        shape_scale     and
    ====================  ==============  =========================================
    KellerJordan/Muon     "keller"        learning_rate=0.02, weight_decay=0,
                                          adamw_eps=1e-10
    torch.optim.Muon      "keller"        learning_rate=1e-3
     match_rms_adamw      "match_adamw"   learning_rate=1e-3
    Moonlight             "match_adamw"   learning_rate=1e-3
    optax.contrib.muon    "keller"        debias=True, weight_decay=0,
                                          compute_dtype="float32", adamw_b2=0.999
     consistent_rms=0.2   "match_adamw"   the same
    microsoft/dion Muon   "spectral"      learning_rate=0.01, weight_decay=0.01,
                                          nesterov=False, ns_coeffs="polar_express"
    ====================  ==============  =========================================

    They send other parameters to Muon: optax every parameter of two axes, embeddings
    and output heads among them. microsoft/dion divides by 1.02 times the norm, which
    no argument here does.

    Links: `clip_by_global_norm`, then for hidden matrices `scale_by_ema`,
    `orthogonalize_via_newton_schulz`, `scale_by_matrix_shape`, `descend`; for the
    others `scale_by_adam`, `descend`.

    Args:
      learning_rate: See `optaxplus.custom_types`.
      clip_norm: Largest Euclidean norm of the gradients of all trainable parameters
        together, clipped before they are split into groups; > 0, or None for no
        clipping. Static if None.
      b1: Decay rate of the momentum of matrices, in [0, 1).
      nesterov: Whether that momentum uses Nesterov's step. Static.
      debias: Whether the bias of that momentum is corrected, which changes the
        direction of Nesterov's step in the first steps. Static.
      weight_decay: Decay per step of the matrices, >= 0, or a schedule of it; relative
        to the learning rate unless `decay` is "independent". Static if 0.
      decay: Form of the weight decay, see `optaxplus.descend`. Static.
      mask: Which parameters decay, see `optaxplus.custom_types`; None is all,
        `decay_mask` all but vectors. Static if a function.
      ns_steps: Newton-Schulz steps, >= 1. Static.
      ns_coeffs: Name of a coefficient table or rows (a, b, c), see
        `orthogonalize_via_newton_schulz`. Static.
      method: "standard", "gram" or "auto", whichever multiplies less, see
        `optaxplus.numerics.polar_factor`. Static.
      normalization: "schatten", "frobenius" or "aol", see there. Static.
      compute_dtype: Dtype of the operands of the matrix products. Static.
      shape_scale: "match_adamw": 0.2·sqrt(max(fan_in, fan_out)); "keller":
        sqrt(max(1, fan_out / fan_in)); "spectral": sqrt(fan_out / fan_in). Static.
      rules: What each parameter is, see `optaxplus.infer_matrix_axes`. A role of your
        own is its own label and needs an entry in `fallback`; "frozen" parameters have
        no state and do not move, as all but the factors with `optaxplus.LORA_RULES`.
        Static.
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
      placement: Which device orthogonalizes which matrices, see
        `optaxplus.custom_types`. Static.
      fallback: Replaces AdamW by another transformation, learning rate and sign
        included, or by a mapping from labels to transformations ("adamw" may be among
        them, "muon" and "frozen" may not). Static.

    Returns:
      A transformation whose update has the dtype of the gradient and needs params
      where something decays. Its state holds that of `optax.partition` over the labels
      "muon", "adamw", "frozen" and those of `fallback`.

    Raises:
      TypeError: If an argument has a wrong type, a parameter is not floating point, or
        a hidden matrix is complex.
      ValueError: If an argument is out of range; at `init`, if no rule decides a
        parameter, a label has no transformation, or the mask or specs do not fit; if
        `update` is called without the params that it needs.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> params = {"dense": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}}
      >>> tx = ox.muon(1e-3)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)

    References:
      Keller Jordan et al., Muon (2024), https://kellerjordan.github.io/posts/muon;
      Liu et al., Muon is scalable for LLM training, arXiv 2502.16982; Amsel et al.,
      Polar Express, arXiv 2505.16932; Dao-AILab/gram-newton-schulz (2026).
    """
    name = "muon"

    def direction(axes: Axes) -> optax.GradientTransformation:
        return optax.chain(
            scale_by_ema(b1, nesterov=nesterov, debias=debias, mu_dtype=mu_dtype),
            orthogonalize_via_newton_schulz(
                ns_steps=ns_steps,
                ns_coeffs=ns_coeffs,
                method=method,
                normalization=normalization,
                compute_dtype=compute_dtype,
                axes=axes,
                placement=placement,
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
        placement=placement,
        fallback=fallback,
    )
