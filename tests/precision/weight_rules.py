"""The rules of low-precision weights in NumPy, and what their tests share."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from tests.problems import cast, normal_tree

NARROW = ("bfloat16", "float16")
WRAPPERS = {
    "master32": ox.master_weights,
    "master24": partial(ox.master_weights, bits=24),
    "stochastic": ox.stochastic_rounding,
    "compensated": ox.compensated,
}
each_wrapper = pytest.mark.parametrize("name", WRAPPERS)
each_dtype = pytest.mark.parametrize("dtype", NARROW)

# Most of the time goes into compiling programs that run once.
FAST = {"xla_backend_optimization_level": 0}

# The hyper-parameters of the exact tests are powers of two: -lr·g is exact, so it does
# not matter whether a compiler fuses that product with the sum behind it.
SGD = ox.sgd(2.0**-8)


# The rules in NumPy, which rounds every operation on its own


def wide(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float32)


def rounded(x: Any, dtype: str) -> np.ndarray:
    """The nearest number of `dtype`, ties to even, by ml_dtypes."""
    return wide(np.asarray(x, np.float32).astype(jnp.dtype(dtype)))


def spacing(x: Any, dtype: str) -> np.ndarray:
    """The distance between the numbers of `dtype` around x."""
    info = jnp.finfo(dtype)
    size = np.maximum(np.abs(np.asarray(x, np.float64)), float(info.tiny))
    return np.ldexp(1.0, np.frexp(size)[1] - 1 - info.nmant)


def joined(p: Any, correction: Any) -> np.ndarray:
    """Weights of 24 bits: the bits of p, counted further in 1/256 of its last one."""
    info = jnp.finfo(p.dtype)
    unit = 1 << (15 - info.nmant)
    x = (wide(p).view(np.int32) + np.int32(correction) * unit).view(np.float32)
    # Denormal numbers are multiples of one, where bits count no further; 0 has no sign.
    rest = wide(correction) * np.float32(info.smallest_subnormal) / 256
    small = np.where(wide(p) == 0, rest, np.copysign(np.abs(wide(p)) + rest, wide(p)))
    return np.where(np.abs(small) < float(info.tiny), small, x)


def kahan(p: Any, correction: Any, u: Any) -> tuple[np.ndarray, np.ndarray]:
    dtype = p.dtype
    step = np.float32(u) + wide(correction)
    new = (wide(p) + step).astype(dtype)
    lost = (step - (wide(new) - wide(p))).astype(dtype)
    # Where the rounded rest would move the parameter by itself, the next smaller one.
    moves = (wide(new) + wide(lost)).astype(dtype) != new
    return new, np.where(moves, np.nextafter(lost, np.zeros_like(lost)), lost)


def kept_of(state: Any) -> Any:
    """What is kept beside the parameters."""
    (kept,) = state.kept.values()
    return kept


def weights_of(name: str, params: Any, state: Any) -> Any:
    """The float32 weights that parameters and state stand for."""
    if name == "master32":
        return kept_of(state)
    if name == "master24":
        return jax.tree.map(joined, params, kept_of(state))
    if name == "compensated":
        return jax.tree.map(lambda p, c: wide(p) + wide(c), params, kept_of(state))
    return jax.tree.map(wide, params)


def resolution(name: str, x: Any, dtype: str) -> np.ndarray:
    """By how much the weights may miss x after one step."""
    if name == "master32":
        return np.zeros(np.shape(x))
    # The other neighbour, exclusive; what a rest of up to half of the spacing is
    # rounded to in `dtype`: a unit in its last place, which is 2^-digits of it.
    parts = {
        "stochastic": 1.0,
        "master24": 2.0**-8,
        "compensated": 0.5 * 2.0 ** -(jnp.finfo(dtype).nmant + 1),
    }
    return parts[name] * spacing(x, dtype)


def record(tx: optax.GradientTransformation, params: Any, grads: Any):
    """Parameters and states before the first step and after every one, stacked.

    Compiled as users do, with everything that the compiler may simplify.
    """

    def step(carry: Any, g: Any):
        params, state = carry
        updates, state = tx.update(g, state, params)
        carry = optax.apply_updates(params, updates), state
        return carry, carry

    def train(params: Any, grads: Any):
        start = params, tx.init(params)
        _, rest = jax.lax.scan(step, start, grads)
        return jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), start, rest)

    return jax.device_get(jax.jit(train)(params, grads))


def train(tx: optax.GradientTransformation, params: Any, grads: Any):
    """Parameters and state after the last step, not compiled."""
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


SHAPES = {"kernel": (4, 3), "scale": ()}
PARAMS = cast(normal_tree(SHAPES, seed=0), "bfloat16")
GRADS = [cast(normal_tree(SHAPES, seed=seed), "bfloat16") for seed in (1, 2, 3)]
WIDE_GRADS = [jax.tree.map(jnp.float32, g) for g in GRADS]
