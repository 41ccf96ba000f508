"""THE table: every transformation of the library with arguments worth testing.

A row is all that a new optimizer needs to be held to every contract of
`test_contract` and its neighbours. `test_public_api` fails while a row is missing.
"""

from tests.case import Case
from tests.cases import adaptive, classical, layerwise, links, matrix, sign, wrapped
from tests.cases.expectations import BFLOAT16_RTOL, NEWTON_SCHULZ_RTOL

__all__ = [
    "BFLOAT16_RTOL",
    "CASES",
    "LINKS",
    "NAMED",
    "NEWTON_SCHULZ_RTOL",
    "Case",
]

LINKS = links.CASES
NAMED = [
    *classical.CASES,
    *adaptive.CASES,
    *sign.CASES,
    *layerwise.CASES,
    *wrapped.CASES,
    *matrix.CASES,
]
CASES = [*LINKS, *NAMED]
