"""Checks of what the plots are given, with messages that name it.

Everything becomes a float64 array: of NumPy, JAX, lists, any real dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from optaxplus import validation
from optaxplus.report.figures import METADATA
from optaxplus.report.memory import MemoryReport

__all__ = [
    "byte_counts",
    "check_finite",
    "check_names",
    "check_path",
    "grid_and_values",
    "numbers",
    "points_in_plane",
    "positions_of",
    "spectrum",
]


def check_path(function: str, path: Any) -> None:
    """Refuses names of files but of the formats that can be written without dates."""
    if path is None:
        return
    if not isinstance(path, str | Path) or Path(path).suffix.lower() not in METADATA:
        raise ValueError(
            f"{function}: path={path!r} is not allowed; it must be the name of a file "
            f"that ends in one of {', '.join(METADATA)}."
        )


def check_names(function: str, argument: str, data: Any) -> None:
    """Refuses anything but a mapping from names to data, with one at least."""
    if not isinstance(data, Mapping):
        raise TypeError(
            f"{function}: {argument} has the type {type(data).__name__}, which is not "
            "allowed; it must be a mapping from names to data."
        )
    if not data:
        raise ValueError(
            f"{function}: {argument}={data!r} is not allowed; there is nothing to draw."
        )
    for name in data:
        if str(name).startswith("_"):
            raise ValueError(
                f"{function}: {argument}[{name!r}] is not allowed; matplotlib leaves "
                "names that start with '_' out of legends."
            )


def numbers(
    function: str, argument: str, value: Any, shapes: Mapping[int, str]
) -> np.ndarray:
    """An argument as a float64 array.

    Args:
      function: Who asks.
      argument: The argument, for the message.
      value: Anything that NumPy makes an array of.
      shapes: What is allowed: number of axes -> the shape in words.

    Raises:
      TypeError: If it is no real numbers.
      ValueError: If it is empty, ragged, or of another number of axes.
    """
    allowed = f"it must be {' or '.join(shapes.values())}, and not empty"
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(
            f"{function}: {argument} is ragged, which is not allowed; {allowed}."
        ) from error
    # NumPy does not know that bfloat16 is a number.
    if not any(
        jnp.issubdtype(array.dtype, kind) for kind in (jnp.floating, jnp.integer)
    ):
        raise TypeError(
            f"{function}: {argument} has the dtype {array.dtype}, which is not "
            "allowed; it must be real numbers."
        )
    if array.ndim not in shapes or array.size == 0:
        raise ValueError(
            f"{function}: {argument} has shape {array.shape}, which is not allowed; "
            f"{allowed}."
        )
    return array.astype(np.float64)


def positions_of(
    function: str, steps: Any, lengths: Mapping[Any, int]
) -> dict[Any, np.ndarray]:
    """Where the points of every curve are.

    Args:
      function: Who asks.
      steps: Positions for all curves alike, or by the name of the curve, or None.
      lengths: How many points each curve has.
    """
    if steps is None:
        return {name: np.arange(length) for name, length in lengths.items()}
    by_name = isinstance(steps, Mapping)
    given = steps if by_name else dict.fromkeys(lengths, steps)
    if given.keys() != lengths.keys():
        raise ValueError(
            f"{function}: steps has the names {list(given)}, which is not allowed; "
            f"they must be those of losses, {list(lengths)}."
        )
    positions = {}
    for name, length in lengths.items():
        argument = f"steps[{name!r}]" if by_name else "steps"
        found = numbers(function, argument, given[name], {1: "(points,)"})
        if len(found) != length:
            raise ValueError(
                f"{function}: {argument} has shape {found.shape}, which is not "
                f"allowed; losses[{name!r}] has {length} points."
            )
        check_finite(function, argument, found)
        positions[name] = found
    return positions


def grid_and_values(
    function: str, surface: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A grid and the function on it, nan where that is not finite."""
    if not isinstance(surface, Sequence) or len(surface) != 3:
        raise TypeError(
            f"{function}: surface is not allowed; it must be three arrays, "
            "(x, y, values)."
        )
    x, y = (
        numbers(function, f"surface[{index}]", surface[index], {1: "(count,)"})
        for index in range(2)
    )
    for index, grid in enumerate((x, y)):
        if len(grid) < 2 or not np.isfinite(grid).all() or (np.diff(grid) <= 0).any():
            raise ValueError(
                f"{function}: surface[{index}] is not allowed; it must be two or more "
                "finite numbers, each larger than the one before it."
            )
    values = numbers(function, "surface[2]", surface[2], {2: "(rows, columns)"})
    if values.shape != (len(y), len(x)):
        raise ValueError(
            f"{function}: surface[2] has shape {values.shape}, which is not allowed; "
            f"it must be {(len(y), len(x))}, a row for every y and a column for every "
            "x."
        )
    finite = values[np.isfinite(values)]
    if len(np.unique(finite)) < 2:
        raise ValueError(
            f"{function}: surface[2] is not allowed; it has no two finite values that "
            "differ, so there are no contours."
        )
    return x, y, np.where(np.isfinite(values), values, np.nan)


def points_in_plane(function: str, argument: str, value: Any) -> np.ndarray:
    """Points of two parameters, (points, 2)."""
    points = numbers(function, argument, value, {2: "(points, 2)"})
    if points.shape[1] != 2:
        raise ValueError(
            f"{function}: {argument} has shape {points.shape}, which is not allowed; "
            "it must be (points, 2)."
        )
    return points


def spectrum(function: str, argument: str, value: Any) -> np.ndarray:
    """Singular values, of a matrix or as they are given, the largest first."""
    shapes = {1: "(count,)", 2: "(rows, columns)"}
    found = numbers(function, argument, value, shapes)
    check_finite(function, argument, found)
    if found.ndim == 2:
        return np.linalg.svd(found, compute_uv=False)
    if found.min() < 0:
        raise ValueError(
            f"{function}: {argument} has {found.min():g} in it, which is not allowed; "
            "singular values are not negative."
        )
    return np.sort(found)[::-1]


def byte_counts(function: str, argument: str, value: Any) -> dict[Any, float]:
    """Bytes by what they are for."""
    if isinstance(value, MemoryReport):
        return {
            "parameters": value.params,
            "gradients": value.grads,
            "optimizer state": value.state,
        }
    check_names(function, argument, value)
    for part, count in value.items():
        validation.check_non_negative(function, **{f"{argument}[{part!r}]": count})
    return {part: float(count) for part, count in value.items()}


def check_finite(function: str, argument: str, array: np.ndarray) -> None:
    """Refuses infinities and NaN, and says how many there are."""
    finite = np.isfinite(array)
    if not finite.all():
        raise ValueError(
            f"{function}: {argument} is not allowed; {np.sum(~finite)} of its "
            f"{finite.size} numbers are not finite."
        )
