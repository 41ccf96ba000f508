"""Which parameters of a test are run by default, and which only with `-m slow`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def mostly(default: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """Parameters of a test: those in `default` are run by default, the others slow."""
    return [
        value if value in default else pytest.param(value, marks=pytest.mark.slow)
        for value in values
    ]
