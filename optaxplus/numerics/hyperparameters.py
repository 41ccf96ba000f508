"""Hyper-parameters that arrive as arrays, made safe to compute with.

`optax.inject_hyperparams` turns every number into an array and, unless it is given
`hyperparam_dtype`, rounds it to the dtype of the parameters. In bfloat16 a decay rate
of 0.999 becomes 1, an average that never moves and whose bias correction divides by 0;
in float16 an eps of 1e-8 becomes 0. Python numbers are returned as they are.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

__all__ = ["Scalar", "as_decay_rate", "as_epsilon", "is_zero"]

Scalar = float | jax.Array

# The largest float32 below 1, and an eps whose share in a moving average is still a
# normal number.
_LARGEST_DECAY = 1.0 - 2.0**-24
_SMALLEST_EPSILON = 1e-30


def _as_wide_array(value: ArrayLike) -> jax.Array:
    array = jnp.asarray(value)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def as_decay_rate(decay: ArrayLike) -> Scalar:
    """A decay rate just below 1 where rounding made it 1.

    The bias-corrected average is then the plain mean of all gradients.
    """
    if isinstance(decay, int | float):
        return decay
    return jnp.minimum(_as_wide_array(decay), _LARGEST_DECAY)


def as_epsilon(eps: ArrayLike) -> Scalar:
    """An eps just above 0 where rounding made it 0, so that 0 / eps is 0."""
    if isinstance(eps, int | float):
        return eps
    return jnp.maximum(_as_wide_array(eps), _SMALLEST_EPSILON)


def is_zero(value: Any) -> bool:
    """Whether `value` is known to be 0 before the program runs: a Python number."""
    return isinstance(value, int | float) and value == 0
