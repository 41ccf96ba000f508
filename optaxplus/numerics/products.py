"""Matrix products of full precision."""

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["product"]


def product(left: jax.Array, right: jax.Array) -> jax.Array:
    """left·right, of float32 operands that no accelerator rounds."""
    return jnp.matmul(left, right, precision=lax.Precision.HIGHEST)
