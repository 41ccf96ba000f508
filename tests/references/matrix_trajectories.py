"""Reads ``matrix_trajectories.npz``: recorded runs of Muon and its successors.

`make_matrix_trajectories` wrote the file, says with which versions, and explains the
two arithmetics and where the packages differ. One problem, ten steps, one learning rate
per case. Everything is as PyTorch has it: matrices are (fan_out, fan_in), `as_kernel`
makes them (fan_in, fan_out). Initial values and gradients are float32 numbers, so runs
in float32 and in float64 solve exactly the same problem.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.references.torch_trajectories import Floats, blocks

PATH = Path(__file__).with_name("matrix_trajectories.npz")


@dataclass(frozen=True)
class MatrixCase:
    """One optimizer with its arguments and where it went.

    Attributes:
        name: unique name.
        optimizer: dotted path of the class.
        arguments: its keyword arguments, without the learning rate.
        group: options of the parameter group, for optimizers that want them there.
        learning_rate: the learning rate.
        trajectories: ``trajectories[arithmetic][leaf]``, parameters after every step,
            shape (10, *leaf); the arithmetic is "native" or "float64", and not every
            case has both.
    """

    name: str
    optimizer: str
    arguments: Mapping[str, Any]
    group: Mapping[str, Any]
    learning_rate: float
    trajectories: Mapping[str, Mapping[str, Floats]]


@dataclass(frozen=True)
class OrthogonalizationCase:
    """What one function makes of the gradients of the first step.

    Attributes:
        name: unique name.
        function: dotted path of the function, or of the class of a callable object.
        arguments: its keyword arguments, without the coefficients.
        results: ``results[arithmetic][leaf]``, shaped like the leaf.
    """

    name: str
    function: str
    arguments: Mapping[str, Any]
    results: Mapping[str, Mapping[str, Floats]]


@dataclass(frozen=True)
class MatrixTrajectories:
    """The recorded problem and everything that was run on it.

    Attributes:
        versions: versions of Python, PyTorch, NumPy and the packages.
        params: initial float32 parameters by leaf: "vector" (5,), "tall" (6, 4), "wide"
            (4, 7), "square" (5, 5), "stack" (3, 5, 4).
        grads: float32 gradients by leaf, shape (10, *leaf).
        max_logits: what the cases with QK-Clip were told of their two heads, shape
            (10, 2).
        cases: the optimizers by name.
        functions: the orthogonalizations by name.
        tables: Newton-Schulz coefficients that the packages have, shape (steps, 3).
    """

    versions: Mapping[str, str]
    params: Mapping[str, Floats]
    grads: Mapping[str, Floats]
    max_logits: Floats
    cases: Mapping[str, MatrixCase]
    functions: Mapping[str, OrthogonalizationCase]
    tables: Mapping[str, Floats]


def load_matrix_trajectories() -> MatrixTrajectories:
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

    def by_arithmetic(prefix: str) -> dict[str, dict[str, Floats]]:
        both = {name: below(f"{prefix}{name}/") for name in ("native", "float64")}
        return {name: leaves for name, leaves in both.items() if leaves}

    return MatrixTrajectories(
        versions=description["versions"],
        params=below("params/"),
        grads=below("grads/"),
        max_logits=arrays["max_logits"],
        cases={
            name: MatrixCase(
                name=name,
                optimizer=case["optimizer"],
                arguments=case["arguments"],
                group=case["group"],
                learning_rate=case["learning_rate"],
                trajectories=by_arithmetic(f"cases/{name}/"),
            )
            for name, case in description["cases"].items()
        },
        functions={
            name: OrthogonalizationCase(
                name=name,
                function=case["function"],
                arguments=case["arguments"],
                results=by_arithmetic(f"functions/{name}/"),
            )
            for name, case in description["functions"].items()
        },
        tables=below("tables/"),
    )


def as_kernel(x: Floats) -> Floats:
    """Returns matrices (..., fan_out, fan_in) as (..., fan_in, fan_out)."""
    return np.swapaxes(x, -1, -2)


def kernel_blocks(
    params: Floats, grads: Floats, trajectory: Floats
) -> Iterator[tuple[Floats, Floats, Floats]]:
    """Yields each block of a leaf: its parameters, gradients and recorded run.

    Args:
        params: parameters of a leaf. A stack has a block for each matrix.
        grads: its gradients, one per step.
        trajectory: its parameters after every step.

    Yields:
        The same for a vector, and for a matrix as a kernel, (fan_in, fan_out).
    """
    for block in zip(
        blocks(params, axis=0),
        blocks(grads, axis=1),
        blocks(trajectory, axis=1),
        strict=True,
    ):
        yield block if params.ndim == 1 else tuple(map(as_kernel, block))
