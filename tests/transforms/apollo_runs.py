"""Runs of APOLLO, compiled, on NumPy arrays."""

import functools

import jax

import optaxplus as ox
from tests import problems

__all__ = ["MINI", "STACK", "follow", "gradients", "start"]

STACK = ox.MatrixAxes((-2,), (-1,))
MINI = {"rank": 1, "scaling": "tensor", "scale": 128.0}
# Compiling takes longer than running.
_FAST = {"xla_backend_optimization_level": 0}


def gradients(shapes, *, steps: int, seed: int = 7):
    """One tree a step."""
    return jax.device_get(problems.gradients(shapes, steps=steps, seed=seed))


@functools.cache
def _compiled(**arguments):
    """The compiled init and update of one choice of arguments."""
    tx = ox.scale_by_apollo(**arguments)
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
