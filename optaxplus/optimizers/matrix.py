"""What the optimizers for weight matrices share: the others' rule, and the split.

hidden matrices      direction of the method -> learning rate, weight decay
everything else      AdamW, or what `fallback` says
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import optax

from optaxplus import trees, validation
from optaxplus.custom_types import (
    Axes,
    DTypeName,
    Mask,
    PyTree,
    Scalar,
    ScalarOrSchedule,
)
from optaxplus.numerics.hyperparameters import is_zero
from optaxplus.partition.inference import label_of_role
from optaxplus.partition.routing import route
from optaxplus.partition.rules import Rule, check_rules
from optaxplus.sharding.placement import Placement, check_placement, check_specs
from optaxplus.transforms.adaptive.adam import scale_by_adam
from optaxplus.transforms.chaining import chain_in_float32
from optaxplus.transforms.clipping import clip_by_global_norm
from optaxplus.transforms.weight_decay import descend

__all__ = ["Fallback", "matrices_and_others"]

Fallback = (
    optax.GradientTransformation | Mapping[str, optax.GradientTransformation] | None
)


def matrices_and_others(
    name: str,
    direction: Callable[[Axes], optax.GradientTransformation],
    learning_rate: ScalarOrSchedule,
    *,
    clip_norm: Scalar | None,
    weight_decay: ScalarOrSchedule,
    decay: str,
    mask: Mask,
    rules: Sequence[Rule],
    adamw_learning_rate: ScalarOrSchedule | None,
    adamw_b1: Scalar,
    adamw_b2: Scalar,
    adamw_eps: Scalar,
    adamw_weight_decay: ScalarOrSchedule | None,
    mu_dtype: DTypeName,
    nu_dtype: DTypeName,
    placement: Placement | str | None,
    fallback: Fallback,
) -> optax.GradientTransformationExtraArgs:
    """Builds the optimizer `name` from the direction of its hidden matrices.

    `direction` maps the axes of the parameters to the links that come before the
    learning rate; the other arguments are those of `optaxplus.muon`.
    """
    if adamw_learning_rate is None:
        adamw_learning_rate = learning_rate
    if adamw_weight_decay is None:
        adamw_weight_decay = weight_decay
    validation.check_learning_rate(name, learning_rate)
    validation.check_learning_rate(name, adamw_learning_rate, "adamw_learning_rate")
    validation.check_weight_decay(name, weight_decay)
    validation.check_weight_decay(name, adamw_weight_decay, "adamw_weight_decay")
    validation.check_decay_rate(name, adamw_b1=adamw_b1, adamw_b2=adamw_b2)
    validation.check_positive(name, adamw_eps=adamw_eps)
    if clip_norm is not None:
        validation.check_positive(name, clip_norm=clip_norm)
    clip = optax.identity() if clip_norm is None else clip_by_global_norm(clip_norm)
    check_placement(name, placement)
    others = _transformations_of(name, fallback, check_rules(name, rules))
    adam = scale_by_adam(
        adamw_b1, adamw_b2, eps=adamw_eps, mu_dtype=mu_dtype, nu_dtype=nu_dtype
    )
    # Refuse bad arguments now rather than at init.
    direction(None)
    descend(learning_rate, weight_decay, decay=decay)

    def build(
        roles: PyTree, axes: PyTree, decayed: PyTree
    ) -> optax.GradientTransformation:
        labels = jax.tree.map(label_of_role, roles)
        step = descend(learning_rate, weight_decay, mask=decayed, decay=decay)
        adamw_step = descend(
            adamw_learning_rate, adamw_weight_decay, mask=decayed, decay=decay
        )
        groups: dict[Hashable, optax.GradientTransformation] = {
            "muon": optax.chain(direction(axes), step),
            "adamw": optax.chain(adam, adamw_step),
            "frozen": optax.set_to_zero(),
            **others,
        }
        _check_labels(name, labels, groups)
        trainable = jax.tree.map(lambda label: label != "frozen", labels)
        return optax.chain(
            optax.masked(clip, trainable), optax.partition(groups, lambda _: labels)
        )

    def routed(tree: PyTree) -> optax.GradientTransformationExtraArgs:
        # A mask may be a function of all parameters; a group sees only its own.
        arrays = [array for _, array in trees.leaves_with_paths(tree)]
        decayed = trees.resolve_mask(name, mask, trees.unflatten_like(tree, arrays))
        return route(lambda roles, axes: build(roles, axes, decayed), rules, name=name)

    def init_fn(params: PyTree) -> Any:
        check_specs(name, placement, params, is_whole=True)
        return routed(params).init(params)

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        return routed(updates).update(updates, state, params, **extra_args)

    decays = not (is_zero(weight_decay) and is_zero(adamw_weight_decay))
    return chain_in_float32(
        optax.GradientTransformationExtraArgs(init_fn, update_fn),
        requires_params=name if decays else None,
    )


def _transformations_of(
    name: str, fallback: Fallback, rules: Sequence[Rule]
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
            f"{name}: fallback={fallback!r} is not allowed; it must be a gradient "
            "transformation or a mapping from labels to gradient transformations."
        )
    for label in ("muon", "frozen"):
        if label in transformations:
            raise ValueError(
                f"{name}: fallback[{label!r}] is not allowed; that group is {name}'s "
                "own. To give parameters another rule, give them another role."
            )
    known = {"adamw", *(label_of_role(rule.role) for rule in rules)}
    for label in transformations.keys() - known:
        raise ValueError(
            f"{name}: fallback[{label!r}] is not allowed; it must be 'adamw' or a role "
            "of your own in `rules`."
        )
    return transformations


def _check_labels(name: str, labels: PyTree, groups: Mapping[Hashable, Any]) -> None:
    for path, label in trees.leaves_with_paths(labels):
        if label not in groups:
            raise ValueError(
                f"{name}: parameter {path!r} has the label {label!r}, which has no "
                f"transformation; pass fallback={{{label!r}: ...}}, or give the "
                "parameter another role in `rules`."
            )
