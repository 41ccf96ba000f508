"""Reads ``sophia_trajectories.npz``: recorded runs of Sophia for PyTorch.

`make_sophia_trajectories` wrote the file, says with which versions, and explains the
packages. One problem, 25 steps, two leaves. Initial values, gradients and estimates are
float32 numbers, so the float32 and the float64 run solve exactly the same problem.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.references.torch_trajectories import Floats

PATH = Path(__file__).with_name("sophia_trajectories.npz")


@dataclass(frozen=True)
class SophiaCase:
    """One run.

    Attributes:
        name: unique name.
        learning_rate: in our terms, as all that follows.
        arguments: of the reference, and of `optaxplus.sophia`.
        hessians: an estimate of the diagonal per step by leaf: that which the package
            had when it took the step, where it had one.
        trajectories: ``trajectories[dtype][leaf]``, parameters after every step, shape
            (25, *leaf); dtype is "float32" or "float64".
    """

    name: str
    learning_rate: float
    arguments: Mapping[str, Any]
    hessians: Mapping[str, Floats]
    trajectories: Mapping[str, Mapping[str, Floats]]


@dataclass(frozen=True)
class SophiaTrajectories:
    """The recorded problem and all runs on it.

    Attributes:
        versions: versions of Python, PyTorch, NumPy and the packages.
        params: initial float32 parameters by leaf: "vector" (8,), "matrix" (5, 12).
        grads: float32 gradients by leaf, shape (25, *leaf).
        cases: the runs by name.
    """

    versions: Mapping[str, str]
    params: Mapping[str, Floats]
    grads: Mapping[str, Floats]
    cases: Mapping[str, SophiaCase]


def load_sophia_trajectories() -> SophiaTrajectories:
    """Returns the contents of the recorded file."""
    with np.load(PATH) as file:
        arrays = {key: file[key] for key in file.files if key != "description"}
        description = json.loads(str(file["description"]))

    def below(prefix: str) -> dict[str, Floats]:
        return {
            key.removeprefix(prefix): value
            for key, value in arrays.items()
            if key.startswith(prefix)
        }

    def case_of(name: str, case: Mapping[str, Any]) -> SophiaCase:
        theirs, k = case["arguments"], case["update_interval"]
        is_g = case["optimizer"] == "SophiaG"
        b1, b2 = theirs.get("betas", (0.965 if is_g else 0.96, 0.99))
        ours = {"b1": b1, "b2": b2, "update_interval": k}
        if is_g:
            # What it sees after a step we see before the next one.
            hessians = {
                leaf: case["batch_size"]
                * np.square(np.roll(sampled.astype(np.float64), 1, axis=0))
                for leaf, sampled in below("sampled/").items()
            }
            ours |= {
                "gamma": theirs.get("rho", 0.04),
                "eps": 1e-15,
                "weight_decay": theirs.get("weight_decay", 0.1),
                "first_refresh": k,
            }
            learning_rate = theirs["lr"]
        else:
            hessians = below("hessians/")
            decay = theirs.get("weight_decay", 0.0)
            ours |= {
                "gamma": theirs["p"],
                "eps": 1e-12 * theirs["p"],
                "weight_decay": decay / theirs["p"],
            }
            learning_rate = theirs["lr"] * theirs["p"]
        trajectories = {d: below(f"{name}/{d}/") for d in ("float32", "float64")}
        return SophiaCase(name, learning_rate, ours, hessians, trajectories)

    return SophiaTrajectories(
        versions=description["versions"],
        params=below("params/"),
        grads=below("grads/"),
        cases={
            name: case_of(name, case) for name, case in description["cases"].items()
        },
    )
