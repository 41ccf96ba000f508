"""All references by name, for the tables of the tests."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy.typing as npt

from tests.references import (
    adam_successors,
    adam_variants,
    adaptive,
    classical,
    curvature,
    factored,
    layerwise,
    lookahead,
    matrix,
    sign,
)
from tests.references.conventions import Array, Grads


def lookahead_of_adam(
    params: npt.ArrayLike, grads: Grads, **arguments: Any
) -> list[Array]:
    """Runs Lookahead around Adam; returns the fast parameters after every step.

    Args:
        params: the initial parameters.
        grads: one gradient per step.
        **arguments: of `lookahead.lookahead`.
    """
    return lookahead.lookahead(params, adaptive.adam_directions(grads), **arguments)


REFERENCES: Mapping[str, Callable[..., list[Array]]] = {
    "sgd": classical.sgd,
    "adagrad": classical.adagrad,
    "rmsprop": classical.rmsprop,
    "adam": adaptive.adam,
    "adamw": adaptive.adamw,
    "nadam": adam_variants.nadam,
    "radam": adam_variants.radam,
    "stable_adamw": adam_variants.stable_adamw,
    "adam_mini": adam_variants.adam_mini,
    "adan": adam_successors.adan,
    "adopt": adam_successors.adopt,
    "ademamix": adam_successors.ademamix,
    "mars": adam_successors.mars,
    "signum": sign.signum,
    "lion": sign.lion,
    "lars": layerwise.lars,
    "lamb": layerwise.lamb,
    "adafactor": factored.adafactor,
    "came": factored.came,
    "lookahead": lookahead_of_adam,
    "ranger": lookahead.ranger,
    "muon": matrix.muon,
    "sophia": curvature.sophia,
}
