"""Checks the reference of Sophia against the recorded runs of the authors' code."""

import numpy as np
import pytest

from tests.references import curvature
from tests.references.sophia_trajectories import load_sophia_trajectories

RECORDED = load_sophia_trajectories()

# Relative to the largest parameter, 25 steps of some roundings each.
TOLERANCES = {"float64": 5e-15, "float32": 3e-6}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", RECORDED.cases)
def test_recorded(name: str, dtype: str) -> None:
    case = RECORDED.cases[name]
    for leaf, expected in case.trajectories[dtype].items():
        result = curvature.sophia(
            RECORDED.params[leaf],
            RECORDED.grads[leaf],
            hessians=case.hessians[leaf],
            learning_rate=case.learning_rate,
            **case.arguments,
        )
        tolerance = TOLERANCES[dtype] * np.abs(expected).max()
        np.testing.assert_allclose(result, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", RECORDED.cases)
def test_recorded_problem_reaches_both_sides_of_the_clipping(name: str) -> None:
    case = RECORDED.cases[name]
    arguments = {k: v for k, v in case.arguments.items() if k != "weight_decay"}
    directions = list(
        curvature.sophia_directions(
            RECORDED.grads["matrix"], case.hessians["matrix"], **arguments
        )
    )
    last = np.abs(directions[-5:])
    assert 0.1 < np.mean(last < 1.0) < 0.9


def test_recorded_estimates_of_hutchinson_are_of_both_signs() -> None:
    estimates = RECORDED.cases["sophia_h"].hessians["matrix"]
    assert 0.1 < np.mean(estimates < 0) < 0.5
