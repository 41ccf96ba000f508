"""Matrices with known singular values, and what the tables make of them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaxplus import numerics
from optaxplus.numerics import COEFFICIENT_TABLES

STEPS = {name: len(table.rows) for name, table in COEFFICIENT_TABLES.items()}
SHAPES = [(4, 6), (6, 4), (5, 5), (1, 7), (7, 1)]

# Singular values that these tables leave of [1e-3, 1], in exact arithmetic.
BANDS = {
    "polar_express": (0.859, 1.141),
    "polar_express_paper": (0.852, 1.124),
    "gram_newton_schulz": (0.729, 1.124),
    "jordan": (0.471, 1.202),
    "you": (0.475, 1.145),
    "cans": (0.839, 1.113),
    "turbo": (0.120, 1.145),
    "aol": (0.147, 1.050),
    "cubic5": (0.110, 1.300),
    "cubic": (0.008, 1.000),
    "deepseek": (1.0000, 1.0005),
}
METHODS = ("standard", "gram")
DEFAULTS = {
    "ns_steps": 5,
    "ns_coeffs": "gram_newton_schulz",
    "method": "auto",
    "normalization": "schatten",
    "compute_dtype": "bfloat16",
    "eps": 1e-7,
}
NORMS = {
    "frobenius": lambda s: np.sqrt(np.sum(s**2)),
    "schatten": lambda s: np.sum(s**4) ** 0.25,
}


def polar_factor(x: jax.Array, **arguments: Any) -> jax.Array:
    """`numerics.polar_factor`, compiled in a hurry: it runs once."""
    if isinstance(x, jax.core.Tracer):
        return numerics.polar_factor(x, **arguments)
    function = functools.partial(numerics.polar_factor, **arguments)
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(function, compiler_options=options)(x)


def gaussian(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def with_two_singular_values(small: np.ndarray, seed: int = 0) -> np.ndarray:
    """(len(small), 2, 3): Frobenius norm 1, smaller singular values as given."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((len(small), 2, 2)))[0]
    right = np.linalg.qr(rng.standard_normal((len(small), 3, 3)))[0]
    values = np.stack([np.sqrt(1 - small**2), small], axis=-1)
    return np.einsum("bij,bj,bjk->bik", left, values, right[:, :2])


def singular_values(x: jax.Array) -> np.ndarray:
    return np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)


def in_float64(x: np.ndarray, **arguments) -> np.ndarray:
    with jax.enable_x64(True):
        arguments = {"compute_dtype": "float64", **arguments}
        return np.asarray(polar_factor(jnp.asarray(x, jnp.float64), **arguments))


# 64 matrices whose singular values cover [1e-3, 1].
SMALL = np.geomspace(1.001e-3, 0.7, 64)
