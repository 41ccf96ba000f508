"""Exponential moving averages and their bias correction."""

import math

import jax
import jax.numpy as jnp

from optaxplus.numerics.hyperparameters import Scalar

__all__ = ["bias_correction", "mix"]


def mix(decay: Scalar, average: jax.Array, x: jax.Array) -> jax.Array:
    """decay·average + (1 - decay)·x, elementwise."""
    return decay * average + (1 - decay) * x


def bias_correction(decay: Scalar, count: jax.Array) -> jax.Array:
    """1 - decay**count, which divides an average that started from zero.

    Computed as -expm1(count·log(decay)): subtracting a float32 power from 1 would
    lose four digits in the first steps of decay = 0.999.

    Args:
      decay: Decay rate in [0, 1).
      count: Number of values averaged, integer scalar >= 1.

    Returns:
      A scalar in (0, 1], float32 (float64 where JAX has 64-bit types enabled).
    """
    count = count.astype(jnp.result_type(float))
    if isinstance(decay, int | float):
        log_decay = math.log(decay) if decay > 0 else -math.inf
    else:
        log_decay = jnp.log(decay)
    return -jnp.expm1(count * log_decay)
