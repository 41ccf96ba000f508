"""Checks the references against golden numbers."""

import numpy as np
import pytest

from tests.references import matrix
from tests.references.by_name import REFERENCES
from tests.references.golden import (
    GOLDEN_CASES,
    GOLDEN_POLAR_CASES,
    POLAR_DECIMALS,
    POLAR_MATRIX,
    POLAR_SINGULAR_VALUES,
    GoldenCase,
    GoldenPolarCase,
)


@pytest.mark.parametrize("case", GOLDEN_CASES, ids=lambda case: case.name)
def test_golden_parameters(case: GoldenCase) -> None:
    result = REFERENCES[case.method](case.params, case.grads, **case.arguments)
    assert len(result) == len(case.grads)
    # The expected numbers are rounded to so many decimals. Float64 itself errs by 1e-15
    # here; the 1 % on top lets a number stand on the edge between two roundings.
    tolerance = 0.505 * 10.0**-case.decimals
    np.testing.assert_allclose(result[-1], case.expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", GOLDEN_POLAR_CASES, ids=lambda case: case.name)
def test_golden_polar_factors(case: GoldenPolarCase) -> None:
    if case.ns_coeffs is None:
        result = matrix.polar_factor(POLAR_MATRIX)
    else:
        result = matrix.newton_schulz(POLAR_MATRIX, case.ns_coeffs)
    # Rounded as above.
    tolerance = 0.505 * 10.0**-POLAR_DECIMALS
    np.testing.assert_allclose(result, case.expected, rtol=0, atol=tolerance)


def test_golden_matrix_has_the_stated_singular_values() -> None:
    s = np.linalg.svd(np.array(POLAR_MATRIX), compute_uv=False)
    # Printed with eight decimals.
    np.testing.assert_allclose(
        s / np.linalg.norm(s), POLAR_SINGULAR_VALUES, rtol=0, atol=0.505e-8
    )
