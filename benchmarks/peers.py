"""Every optimizer beside those of optax and PyTorch that do the same, or nearly so.

`amsgrad`, `nadam` and `adan` of optax, and `Adagrad` and `Adafactor` of PyTorch, are
other forms of the rule with the same arithmetic to do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import optax

import optaxplus as ox

LEARNING_RATE = 1e-3
_RATE = LEARNING_RATE


@dataclass(frozen=True)
class Torch:
    """A peer in `torch.optim`; `clip_norm` is what gradients are clipped to before."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    clip_norm: float | None = None


@dataclass(frozen=True)
class Row:
    """An optimizer with its peers; `target` is the largest share of optax's time."""

    name: str
    ours: optax.GradientTransformation
    optax: optax.GradientTransformation | None = None
    torch: Torch | None = None
    target: float | None = None


def _clipped(package: Any) -> optax.GradientTransformation:
    """AdamW on gradients clipped by their global norm."""
    return optax.chain(
        package.clip_by_global_norm(1.0), package.adamw(_RATE, weight_decay=0.01)
    )


ROWS = (
    Row("sgd", ox.sgd(_RATE), optax.sgd(_RATE), Torch("SGD"), target=1.05),
    Row(
        "momentum",
        ox.sgd(_RATE, momentum=0.9),
        optax.sgd(_RATE, momentum=0.9),
        Torch("SGD", {"momentum": 0.9}),
        target=1.05,
    ),
    Row(
        "nesterov",
        ox.sgd(_RATE, momentum=0.9, nesterov=True),
        optax.sgd(_RATE, momentum=0.9, nesterov=True),
        Torch("SGD", {"momentum": 0.9, "nesterov": True}),
        target=1.05,
    ),
    Row(
        "adagrad",
        ox.adagrad(_RATE, initial_accumulator=0.1, eps=0.0, eps_root=1e-7),
        optax.adagrad(_RATE),
        Torch("Adagrad"),
    ),
    Row(
        "rmsprop",
        ox.rmsprop(_RATE),
        optax.rmsprop(_RATE, decay=0.99, eps_in_sqrt=False),
        Torch("RMSprop"),
    ),
    Row("adam", ox.adam(_RATE), optax.adam(_RATE), Torch("Adam"), target=1.05),
    Row(
        "adamw",
        ox.adamw(_RATE, weight_decay=0.01),
        optax.adamw(_RATE, weight_decay=0.01),
        Torch("AdamW", {"weight_decay": 0.01}),
        target=1.05,
    ),
    Row(
        "clipped-adamw",
        _clipped(ox),
        _clipped(optax),
        Torch("AdamW", {"weight_decay": 0.01}, clip_norm=1.0),
        target=0.6,
    ),
    Row(
        "amsgrad",
        ox.amsgrad(_RATE),
        optax.amsgrad(_RATE),
        Torch("Adam", {"amsgrad": True}),
    ),
    Row("nadam", ox.nadam(_RATE), optax.nadam(_RATE), Torch("NAdam")),
    Row("radam", ox.radam(_RATE), optax.radam(_RATE), Torch("RAdam")),
    Row("ranger", ox.ranger(_RATE)),
    Row("stable_adamw", ox.stable_adamw(_RATE)),
    Row("adan", ox.adan(_RATE), optax.adan(_RATE)),
    Row("adopt", ox.adopt(_RATE), optax.contrib.adopt(_RATE)),
    Row("ademamix", ox.ademamix(_RATE, alpha=5.0), optax.contrib.ademamix(_RATE)),
    Row("adam_mini", ox.adam_mini(_RATE)),
    Row("mars", ox.mars(_RATE)),
    Row("lookahead(adamw)", ox.lookahead(ox.adamw(_RATE))),
    Row(
        "cautious(adamw)",
        optax.chain(ox.cautious(ox.scale_by_adam()), ox.descend(_RATE, 0.01)),
    ),
    Row(
        "accumulate(adamw)",
        ox.accumulate(ox.adamw(_RATE), every_k=4),
        optax.MultiSteps(optax.adamw(_RATE), every_k_schedule=4),
    ),
    Row("lion", ox.lion(_RATE), optax.lion(_RATE), target=0.5),
    Row("signum", ox.signum(_RATE)),
    Row("lars", ox.lars(_RATE), optax.lars(_RATE)),
    Row("lamb", ox.lamb(_RATE), optax.lamb(_RATE), target=0.65),
    Row(
        "adafactor",
        ox.adafactor(_RATE),
        optax.adafactor(_RATE),
        Torch("Adafactor"),
        target=0.7,
    ),
    Row("came", ox.came(_RATE)),
)
