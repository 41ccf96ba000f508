"""Rows of wrappers, each around a rule whose result is known."""

from typing import Any

import optax

import optaxplus as ox
from tests.case import Case
from tests.cases.expectations import decay_of, reference
from tests.references import adaptive, lookahead, sign


def _lookahead_of_adam(p, grads, learning_rate, is_matrix):
    return lookahead.lookahead(
        p,
        adaptive.adam_directions(grads),
        learning_rate=learning_rate,
        every_k=3,
        alpha=0.6,
    )


def lookahead_of_adam(
    learning_rate: Any, *, every_k: int = 3, alpha: Any = 0.6
) -> optax.GradientTransformation:
    """Lookahead around Adam."""
    adam = optax.chain(ox.scale_by_adam(), ox.descend(learning_rate))
    return ox.chain_in_float32(
        ox.lookahead(adam, every_k=every_k, alpha=alpha), requires_params="lookahead"
    )


def cautious_adamw(
    learning_rate: Any, *, weight_decay: Any = 0.1, axes: Any = None
) -> optax.GradientTransformation:
    """AdamW that drops what points against the gradient."""
    return ox.chain_in_float32(
        ox.cautious(ox.scale_by_adam(), axes=axes),
        ox.descend(learning_rate, weight_decay),
        requires_params="cautious",
    )


def cautious_lion(
    learning_rate: Any, *, weight_decay: Any = 0.1, axes: Any = None
) -> optax.GradientTransformation:
    """Lion that drops what points against the gradient."""
    return ox.chain_in_float32(
        ox.cautious(ox.scale_by_lion(), axes=axes),
        ox.descend(learning_rate, weight_decay),
        requires_params="cautious",
    )


def adamw_with_metrics(
    learning_rate: Any, *, weight_decay: Any = 0.1
) -> optax.GradientTransformation:
    """AdamW, measured before its update is rounded."""
    adamw = optax.chain(ox.scale_by_adam(), ox.descend(learning_rate, weight_decay))
    return ox.chain_in_float32(ox.with_metrics(adamw), requires_params="with_metrics")


# The way back to the slow parameters undoes the roundings of the fast ones, so that
# those are in the updates: 2^-9 of parameters, not of updates.
_LOOKAHEAD_RTOL = 0.1

CASES = [
    Case(
        "lookahead-adam",
        lookahead_of_adam,
        learning_rate=0.1,
        static_args=("every_k",),
        needs_params=True,
        oracle=_lookahead_of_adam,
        torch={"lookahead": None},
        bfloat16_rtol=_LOOKAHEAD_RTOL,
    ),
    Case(
        "ranger",
        ox.ranger,
        {"every_k": 3, "weight_decay": 0.1},
        learning_rate=0.5,
        # A matrix with two inputs keeps half of its coordinates as they were.
        remaining_loss=0.8,
        static_args=("every_k",),
        needs_params=True,
        scope="block",
        zero_gradient=decay_of(0.1),
        oracle=reference(lookahead.ranger, every_k=3, weight_decay=0.1),
        bfloat16_rtol=_LOOKAHEAD_RTOL,
        torch={"ranger": None},
    ),
    Case(
        "ranger-uncentralized",
        ox.ranger,
        {"every_k": 3, "weight_decay": 0.1, "gradient_centralization": False},
        learning_rate=0.5,
        static_args=("every_k",),
        needs_params=True,
        zero_gradient=decay_of(0.1),
        oracle=reference(
            lookahead.ranger, every_k=3, weight_decay=0.1, centralize=False
        ),
        bfloat16_rtol=_LOOKAHEAD_RTOL,
        torch={"ranger_no_gc": None},
    ),
    Case(
        "cautious-adamw",
        cautious_adamw,
        learning_rate=0.1,
        needs_params=True,
        scope="block",
        zero_gradient=decay_of(0.1),
        oracle=reference(adaptive.adamw, weight_decay=0.1, cautious=True),
        torch={"cautious_adamw": None},
    ),
    Case(
        "cautious-lion",
        cautious_lion,
        learning_rate=0.1,
        needs_params=True,
        scope="block",
        zero_gradient=decay_of(0.1),
        oracle=reference(sign.lion, weight_decay=0.1, cautious=True),
        torch={"cautious_lion": None},
    ),
    Case(
        "with_metrics-adamw",
        adamw_with_metrics,
        learning_rate=0.1,
        needs_params=True,
        zero_gradient=decay_of(0.1),
        oracle=reference(adaptive.adamw, weight_decay=0.1),
        torch={"adamw": None},
        twin=lambda rate: optax.adamw(rate, weight_decay=0.1),
    ),
]
