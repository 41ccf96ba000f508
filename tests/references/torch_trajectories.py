"""Reads ``torch_trajectories.npz``: recorded runs of optimizers for PyTorch.

`make_torch_trajectories` wrote the file and says with which versions. One problem, ten
steps, four leaves whose gradients differ in size by seven orders of magnitude; matrices
are (fan_in, fan_out) and a stack is a batch of matrices that the optimizer saw as
separate parameters. Initial values and gradients are float32 numbers, so the float32
and the float64 run solve exactly the same problem.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

PATH = Path(__file__).with_name("torch_trajectories.npz")

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class TorchCase:
    """One optimizer for PyTorch with its arguments and where it went.

    Attributes:
        name: unique name.
        optimizer: class in ``torch.optim``, or the dotted path of another one.
        arguments: its keyword arguments, without the learning rate.
        learning_rates: one per step.
        trajectories: ``trajectories[dtype][leaf]``, parameters after every step, shape
            (10, *leaf); dtype is "float32" or "float64".
    """

    name: str
    optimizer: str
    arguments: Mapping[str, Any]
    learning_rates: tuple[float, ...]
    trajectories: Mapping[str, Mapping[str, Floats]]

    def learning_rate(self, step: int) -> float:
        """The learning rate of the 0-based step, in the form of a schedule."""
        return self.learning_rates[step]


@dataclass(frozen=True)
class TorchTrajectories:
    """The recorded problem and all cases on it.

    Attributes:
        versions: versions of Python, of PyTorch, NumPy and the other packages that
            made the file.
        params: initial float32 parameters by leaf: "vector" (5,), "tall" (6, 4), "wide"
            (3, 8), "stack" (3, 4, 5).
        grads: float32 gradients by leaf, shape (10, *leaf).
        cases: the runs by name. Not every one has every leaf.
    """

    versions: Mapping[str, str]
    params: Mapping[str, Floats]
    grads: Mapping[str, Floats]
    cases: Mapping[str, TorchCase]


def load_torch_trajectories() -> TorchTrajectories:
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

    cases = {
        name: TorchCase(
            name=name,
            optimizer=case["optimizer"],
            arguments=case["arguments"],
            learning_rates=tuple(case["learning_rates"]),
            trajectories={
                dtype: below(f"{name}/{dtype}/") for dtype in ("float32", "float64")
            },
        )
        for name, case in description["cases"].items()
    }
    return TorchTrajectories(
        versions=description["versions"],
        params=below("params/"),
        grads=below("grads/"),
        cases=cases,
    )


def blocks(leaf: Floats, *, axis: int) -> Iterator[Floats]:
    """Yields the matrices of a stack, or the one vector or matrix that a leaf is.

    Args:
        leaf: parameters, or anything with a leading axis of steps.
        axis: where the axis of a stack is, if there is one: 0 for parameters, 1 behind
            the axis of steps.
    """
    is_stack = leaf.ndim - axis == 3
    yield from np.moveaxis(leaf, axis, 0) if is_stack else [leaf]
