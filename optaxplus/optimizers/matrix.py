"""Muon: orthogonalized momentum for weight matrices, another rule for the rest."""

from collections.abc import Hashable, Mapping, Sequence

import jax
import optax

from optaxplus import trees, validation
from optaxplus.custom_types import Axes, DTypeName, PyTree, Scalar, ScalarOrSchedule
from optaxplus.partition.inference import label_of_role
from optaxplus.partition.routing import route
from optaxplus.partition.rules import DEFAULT_RULES, Rule, check_rules
from optaxplus.transforms.adaptive.adam import scale_by_adam
from optaxplus.transforms.chaining import chain_in_float32
from optaxplus.transforms.clipping import clip_by_global_norm
from optaxplus.transforms.momentum import scale_by_ema
from optaxplus.transforms.orthogonalized import (
    SHAPE_SCALES,
    orthogonalize_via_newton_schulz,
    scale_by_matrix_shape,
)
from optaxplus.transforms.weight_decay import descend

__all__ = ["muon"]


def muon(
    learning_rate: ScalarOrSchedule,
    *,
    clip_norm: Scalar | None = None,
    b1: Scalar = 0.95,
    nesterov: bool = True,
    weight_decay: Scalar = 0.1,
    ns_steps: int = 5,
    ns_coeffs: str | Sequence[Sequence[float]] = "polar_express",
    compute_dtype: str = "bfloat16",
    shape_scale: str = "match_adamw",
    rules: Sequence[Rule] = DEFAULT_RULES,
    adamw_learning_rate: ScalarOrSchedule | None = None,
    adamw_b1: Scalar = 0.9,
    adamw_b2: Scalar = 0.95,
    adamw_eps: Scalar = 1e-8,
    adamw_weight_decay: Scalar | None = None,
    mu_dtype: DTypeName = "float32",
    fallback: optax.GradientTransformation
    | Mapping[str, optax.GradientTransformation]
    | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon for hidden weight matrices, AdamW for everything else.

    Hidden matrices step along their orthogonalized momentum. Embeddings, output heads,
    biases and norms go to AdamW. An output head is known by its name alone (`lm_head`,
    `head`, `classifier`, `logits`, …), so print `ox.explain_routing(params)` once to
    see which parameter goes where. With the default `shape_scale` the updates of both
    groups have the RMS that AdamW's have, so one learning rate and one weight decay
    serve both, and those tuned for AdamW are a good start. State: 4 bytes per parameter
    in hidden matrices, 8 elsewhere.

    Settings that reproduce other implementations, for the matrices (all with
    ns_coeffs="jordan"):

    ==================  ================  =====================================
    implementation      shape_scale       and
    ==================  ================  =====================================
    KellerJordan/Muon   "keller"          learning_rate=0.02, weight_decay=0,
                                          adamw_eps=1e-10
    torch.optim.Muon    "keller"          learning_rate=1e-3
     match_rms_adamw    "match_adamw"     learning_rate=1e-3
    Moonlight           "match_adamw"     learning_rate=1e-3
    Dion's Muon         "spectral"        learning_rate=0.01, weight_decay=0.01,
                                          nesterov=False
    ==================  ================  =====================================

    `optax.contrib.muon` corrects the bias of its momentum, which changes the direction
    of Nesterov's step in the first steps: chain `scale_by_ema(nesterov=True,
    debias=True)` instead.

    Args:
      learning_rate: See `optaxplus.custom_types`.
      clip_norm: Largest Euclidean norm of the gradients of all trainable parameters
        together, clipped before they are split into groups; > 0, or None for no
        clipping. Static if None.
      b1: Decay rate of the momentum of matrices, in [0, 1).
      nesterov: Whether that momentum uses Nesterov's step. Static.
      weight_decay: Decay per step of the matrices, relative to the learning rate.
        >= 0.
      ns_steps: Newton-Schulz steps, >= 1. Static.
      ns_coeffs: Name of a coefficient table or rows (a, b, c), see
        `orthogonalize_via_newton_schulz`. Static.
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
      adamw_weight_decay: For the other parameters; None is `weight_decay`. Static if
        None.
      mu_dtype: Dtype of the momentum of matrices and of AdamW's first moment, see
        `optaxplus.custom_types`. Static.
      fallback: Replaces AdamW by another transformation, learning rate and sign
        included, or by a mapping from labels to transformations ("adamw" may be among
        them, "muon" and "frozen" may not). Static.

    Returns:
      A transformation whose update has the dtype of the gradient and needs params. Its
      state is that of `optax.partition` over the labels "muon", "adamw", "frozen" and
      those of `fallback`.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point.
      ValueError: If an argument is out of range; at `init`, if no rule decides a
        parameter or a label has no transformation.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> params = {"dense": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}}
      >>> tx = ox.muon(1e-3)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)

    References:
      Keller Jordan et al., Muon (2024), https://kellerjordan.github.io/posts/muon;
      Liu et al., Muon is scalable for LLM training, arXiv 2502.16982; Amsel et al.,
      Polar Express, arXiv 2505.16932.
    """
    name = "muon"
    adamw_learning_rate = (
        learning_rate if adamw_learning_rate is None else adamw_learning_rate
    )
    adamw_weight_decay = (
        weight_decay if adamw_weight_decay is None else adamw_weight_decay
    )
    validation.check_learning_rate(name, learning_rate)
    validation.check_learning_rate(name, adamw_learning_rate, "adamw_learning_rate")
    validation.check_decay_rate(name, b1=b1, adamw_b1=adamw_b1, adamw_b2=adamw_b2)
    validation.check_choice(name, "shape_scale", shape_scale, SHAPE_SCALES)
    if clip_norm is not None:
        validation.check_positive(name, clip_norm=clip_norm)
    validation.check_positive(name, adamw_eps=adamw_eps)
    validation.check_non_negative(
        name, weight_decay=weight_decay, adamw_weight_decay=adamw_weight_decay
    )
    others = _transformations_of(fallback, check_rules(name, rules))
    if "adamw" not in others:
        others["adamw"] = optax.chain(
            scale_by_adam(adamw_b1, adamw_b2, eps=adamw_eps, mu_dtype=mu_dtype),
            descend(adamw_learning_rate, adamw_weight_decay),
        )

    def matrices(axes: Axes) -> optax.GradientTransformation:
        return optax.chain(
            scale_by_ema(b1, nesterov=nesterov, mu_dtype=mu_dtype),
            orthogonalize_via_newton_schulz(
                ns_steps=ns_steps,
                ns_coeffs=ns_coeffs,
                compute_dtype=compute_dtype,
                axes=axes,
            ),
            scale_by_matrix_shape(shape_scale, axes=axes),
            descend(learning_rate, weight_decay),
        )

    clip = optax.identity() if clip_norm is None else clip_by_global_norm(clip_norm)
    matrices(None)  # Refuses bad arguments now rather than at init.

    def build(roles: PyTree, axes: PyTree) -> optax.GradientTransformation:
        labels = jax.tree.map(label_of_role, roles)
        _check_labels(labels, others)
        trainable = jax.tree.map(lambda label: label != "frozen", labels)
        groups: dict[Hashable, optax.GradientTransformation] = {
            "muon": matrices(axes),
            "frozen": optax.set_to_zero(),
            **others,
        }
        return optax.chain(
            optax.masked(clip, trainable), optax.partition(groups, lambda _: labels)
        )

    return chain_in_float32(route(build, rules, name=name), requires_params=name)


def _transformations_of(
    fallback: optax.GradientTransformation
    | Mapping[str, optax.GradientTransformation]
    | None,
    rules: Sequence[Rule],
) -> dict[str, optax.GradientTransformation]:
    if fallback is None:
        return {}
    if isinstance(fallback, optax.GradientTransformation):
        return {"adamw": fallback}
    transformations = dict(fallback) if isinstance(fallback, Mapping) else None
    if transformations is None or not all(
        isinstance(label, str) and isinstance(tx, optax.GradientTransformation)
        for label, tx in transformations.items()
    ):
        raise TypeError(
            f"muon: fallback={fallback!r} is not allowed; it must be a gradient "
            "transformation or a mapping from labels to gradient transformations."
        )
    for label in ("muon", "frozen"):
        if label in transformations:
            raise ValueError(
                f"muon: fallback[{label!r}] is not allowed; that group is muon's own. "
                "To give parameters another rule, give them another role."
            )
    known = {"adamw", *(label_of_role(rule.role) for rule in rules)}
    for label in transformations.keys() - known:
        raise ValueError(
            f"muon: fallback[{label!r}] is not allowed; it must be 'adamw' or a role "
            "of your own in `rules`."
        )
    return transformations


def _check_labels(
    labels: PyTree, others: Mapping[str, optax.GradientTransformation]
) -> None:
    for path, label in trees.leaves_with_paths(labels):
        if label not in ("muon", "frozen", *others):
            raise ValueError(
                f"muon: parameter {path!r} has the label {label!r}, which has no "
                f"transformation; pass fallback={{{label!r}: ...}}, or give the "
                "parameter another role in `rules`."
            )
