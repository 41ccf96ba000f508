"""THE table: every transformation of the library with arguments worth testing.

A row is all that a new optimizer needs to be held to every contract of
`test_contract` and its neighbours. `test_public_api` fails while a row is missing.
"""

from collections.abc import Sequence
from typing import Any

import pytest

from tests.case import Case
from tests.cases import (
    adaptive,
    classical,
    curvature,
    layerwise,
    links,
    matrix,
    scion,
    sign,
    storage,
    wrapped,
)
from tests.cases.expectations import BFLOAT16_RTOL, NEWTON_SCHULZ_RTOL

__all__ = [
    "BFLOAT16_RTOL",
    "CASES",
    "FAMILIES",
    "LINKS",
    "NAMED",
    "NEWTON_SCHULZ_RTOL",
    "Case",
    "one_of_each_family",
    "variants_are_slow",
]

LINKS = [*links.CASES, *scion.LINKS, *curvature.LINKS]
NAMED = [
    *classical.CASES,
    *adaptive.CASES,
    *sign.CASES,
    *layerwise.CASES,
    *wrapped.CASES,
    *matrix.CASES,
    *scion.CASES,
    *curvature.CASES,
    *storage.CASES,
]
CASES = [*LINKS, *NAMED]


def variants_are_slow(cases: Sequence[Case]) -> list[Any]:
    """Parameters of a test that compiles whole updates, which takes a second a row.

    The first row of every factory is run by default, unless it says that it is not or
    is the link `scale_by_x` of a named optimizer x; the others with `-m slow`.
    """
    factories = [case.factory for case in cases]
    covered = {f"scale_by_{case.factory.__name__}" for case in NAMED}

    def is_default(index: int, case: Case) -> bool:
        is_first = case.factory not in factories[:index]
        return case.by_default and is_first and case.factory.__name__ not in covered

    return [
        pytest.param(
            case,
            id=case.name,
            marks=[] if is_default(index, case) else [pytest.mark.slow],
        )
        for index, case in enumerate(cases)
    ]


# One row of each kind of state and of each way to an update.
FAMILIES = (
    "scale_by_adopt",
    "lookahead",
    "sgd",
    "adamw",
    "adan",
    "lion",
    "lamb",
    "adafactor",
    "ranger",
    "cautious-adamw",
    "muon",
    "normuon",
    "dion",
    "scion",
    "adamw8bit",
)


def one_of_each_family(cases: Sequence[Case]) -> list[Any]:
    """Parameters of a test that compiles something large for every row.

    One row of each family of states is run by default, the others with `-m slow`.
    """
    return [
        pytest.param(
            case,
            id=case.name,
            marks=[] if case.name in FAMILIES else [pytest.mark.slow],
        )
        for case in cases
    ]
