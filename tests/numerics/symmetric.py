"""Symmetric matrices with known eigenvalues, and what programs of them are made of."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

N = 8


def compiled(function: Callable, *arrays: Any) -> Any:
    """function(*arrays), compiled in a hurry: it runs once."""
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(function, compiler_options=options)(*arrays)


def with_spectrum(values: Any, seed: int = 0) -> np.ndarray:
    """A symmetric matrix with these eigenvalues, in float64."""
    values = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((len(values), len(values))))[0]
    x = (basis * values) @ basis.T
    return (x + x.T) / 2


def with_condition(condition: float, n: int = N, seed: int = 0) -> np.ndarray:
    return with_spectrum(np.geomspace(1.0, 1 / condition, n), seed)


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a program, with those of all that is called."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def primitives(jaxpr: Any) -> Counter[str]:
    """How often each primitive occurs."""
    return Counter(equation.primitive.name for equation in equations(jaxpr))
