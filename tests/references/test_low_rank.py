"""Checks the reference of APOLLO against the authors' package."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.references.low_rank import apollo

PATH = Path(__file__).with_name("low_rank_trajectories.npz")
# As the package adds them, and decays.
PACKAGE = {"margin": 1e-8, "decays_last": True}
CASES = {
    "channel": {},
    "channel_decay": {
        "b1": 0.8,
        "b2": 0.95,
        "eps": 1e-3,
        "scale": 3.0,
        "weight_decay": 0.1,
    },
    "channel_unlimited": {"max_norm_growth": None},
    "mini": {"scaling": "tensor", "scale": 128.0},
    # Where the limiter stands beside the scale does not matter, but for the margin.
    "mini_front": {"scaling": "tensor", "scale": 128.0},
}


@pytest.mark.parametrize("leaf", ["tall", "wide", "square"])
@pytest.mark.parametrize("name", CASES)
def test_recorded(name: str, leaf: str) -> None:
    with np.load(PATH) as file:
        recorded = {key: file[key] for key in file.files}
    description = json.loads(str(recorded["description"]))
    assert description["cases"].keys() == CASES.keys()
    projections = recorded[f"{name}/{leaf}/projections"]
    # The package draws a new one every four steps.
    new = [not np.array_equal(*projections[i : i + 2]) for i in range(9)]
    assert new == [i % 4 == 3 for i in range(9)]
    start = recorded[f"params/{leaf}"].T
    trajectory = apollo(
        start,
        [g.T for g in recorded[f"grads/{leaf}"]],
        projections.__getitem__,
        learning_rate=description["learning_rate"],
        **PACKAGE,
        **CASES[name],
    )
    moved = np.swapaxes(recorded[f"{name}/{leaf}"], 1, 2) - start
    # Float64 roundings; the margin of 1e-8 beside norms of 0.1 and more, where the
    # factor of 11 is in front of it.
    rtol = 1e-7 if name == "mini_front" else 1e-12
    np.testing.assert_allclose(
        trajectory - start, moved, rtol=0, atol=rtol * np.abs(moved).max()
    )


def test_the_limiter_acts_in_some_steps_only() -> None:
    with np.load(PATH) as file:
        steps = {
            name: np.linalg.norm(
                np.diff(
                    file[f"{name}/wide"], axis=0, prepend=file["params/wide"][None]
                ),
                axis=(1, 2),
            )
            for name in ("channel", "channel_unlimited")
        }
    ratios = steps["channel"] / steps["channel_unlimited"]
    is_limited = ratios < 1 - 1e-6
    assert is_limited.any()
    assert not is_limited.all()
    # The first one never is.
    assert not is_limited[0]
