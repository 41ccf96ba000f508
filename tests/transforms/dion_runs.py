"""Runs of Dion, compiled, on NumPy arrays.

Every operation of JAX on a new shape is compiled, so nothing around the runs is one.
"""

import functools

import jax
import numpy as np

import optaxplus as ox
from optaxplus import MatrixAxes
from tests import problems

__all__ = [
    "LOW_RANK",
    "STACK",
    "first",
    "follow",
    "gradients",
    "normal",
    "orthonormal",
    "start",
]

STACK = MatrixAxes((-2,), (-1,))
LOW_RANK = {"rank_fraction": 0.25}
# Compiling takes longer than running.
_FAST = {"xla_backend_optimization_level": 0}


def normal(shape, *, seed: int) -> np.ndarray:
    """Standard normal numbers."""
    return np.asarray(problems.normal_tree(shape, seed=seed))


def gradients(shapes, *, steps: int):
    """One tree a step."""
    return jax.device_get(problems.gradients(shapes, steps=steps))


@functools.cache
def _compiled(**arguments):
    """The compiled init and update of one choice of arguments."""
    tx = ox.scale_by_dion(**arguments)
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


def first(g, **arguments):
    """The first update and the state after it."""
    (update,), (state,) = follow([g], **arguments)
    return update, state


def orthonormal(shape, *, seed: int) -> np.ndarray:
    """Matrices with orthonormal columns."""
    return np.linalg.qr(normal(shape, seed=seed))[0]
