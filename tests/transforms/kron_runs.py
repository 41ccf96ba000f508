"""Runs of PSGD-Kron, compiled, on NumPy arrays, and the random numbers in them."""

import functools

import jax
import numpy as np

import optaxplus as ox
from tests import problems

__all__ = ["STACK", "follow", "gradients", "kron_noise", "normal", "start"]

STACK = ox.MatrixAxes((-2,), (-1,))
# Compiling takes longer than running.
_FAST = {"xla_backend_optimization_level": 0}


def kron_noise(shape: tuple[int, int], steps: int, *, seed: int = 0):
    """V of the first steps."""
    keys = [
        jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), count)
        for count in range(1, steps + 1)
    ]
    for side in shape:
        keys = [jax.random.fold_in(key, side) for key in keys]
    return [np.float64(jax.random.normal(key, shape, "float32")) for key in keys]


def normal(shape, *, seed: int) -> np.ndarray:
    """Standard normal numbers."""
    return np.asarray(problems.normal_tree(shape, seed=seed))


def gradients(shapes, *, steps: int):
    """One tree a step."""
    return jax.device_get(problems.gradients(shapes, steps=steps))


@functools.cache
def _compiled(**arguments):
    """The compiled init and update of one choice of arguments."""
    tx = ox.scale_by_kron(**arguments)
    return tuple(jax.jit(function, compiler_options=_FAST) for function in tx)


def start(g, **arguments):
    """The initial state."""
    init, _ = _compiled(**arguments)
    return jax.device_get(init(g))


def follow(grads, *, state=None, **arguments):
    """Updates and states of every step."""
    _, update = _compiled(**arguments)
    state = start(grads[0], **arguments) if state is None else state
    updates, states = [], []
    for g in grads:
        u, state = update(g, state)
        updates.append(jax.device_get(u))
        states.append(jax.device_get(state))
    return updates, states
