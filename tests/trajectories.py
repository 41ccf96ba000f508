"""Runs a transformation over recorded gradients, compiled for all steps or not."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

PyTree = Any

# Most of the time goes into compiling programs that run once.
_FAST_COMPILATION = {"xla_backend_optimization_level": 0}


def follow(
    tx: optax.GradientTransformation, params: PyTree, grads: PyTree
) -> tuple[PyTree, PyTree]:
    """Trains along given gradients.

    Args:
        tx: The transformation.
        params: The initial parameters.
        grads: One gradient per step, stacked along a new first axis of every leaf.

    Returns:
        The parameters after every step and the updates of every step, stacked alike.
    """

    def step(carry: tuple[PyTree, PyTree], g: PyTree):
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, updates)

    def train(params: PyTree, grads: PyTree):
        return jax.lax.scan(step, (params, tx.init(params)), grads)[1]

    return jax.jit(train, compiler_options=_FAST_COMPILATION)(params, grads)


def updates_at(
    tx: optax.GradientTransformation, params: PyTree, grads: PyTree
) -> PyTree:
    """The updates of every step while the parameters stay where they are.

    Arguments and result as in `follow`.
    """

    def step(state: PyTree, g: PyTree):
        updates, state = tx.update(g, state, params)
        return state, updates

    def updates_of(params: PyTree, grads: PyTree):
        return jax.lax.scan(step, tx.init(params), grads)[1]

    return jax.jit(updates_of, compiler_options=_FAST_COMPILATION)(params, grads)


def follow_in_float64(
    tx: optax.GradientTransformation, params: PyTree, grads: PyTree
) -> np.ndarray:
    """`follow`, in float64, on one array: the parameters after every step."""
    with jax.enable_x64(True):
        arrays = [jnp.asarray(np.asarray(x, np.float64)) for x in (params, grads)]
        return np.asarray(follow(tx, *arrays)[0])


def run(
    tx: optax.GradientTransformation,
    params: PyTree,
    grads: Sequence[PyTree],
    *,
    update: Callable[..., tuple[PyTree, PyTree]] | None = None,
) -> tuple[list[PyTree], PyTree]:
    """Updates of every step, the parameters unchanged, and the last state."""
    state = tx.init(params)
    updates = []
    for g in grads:
        u, state = (update or tx.update)(g, state, params)
        updates.append(u)
    return updates, state
