"""Runs of Shampoo and SOAP, compiled, on NumPy arrays, and what tests both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxplus as ox
from optaxplus import MatrixAxes
from tests.transforms.kron_runs import STACK, normal

__all__ = [
    "FAST",
    "MATRIX",
    "QUICK",
    "RTOL",
    "SHAPE",
    "adam_without_bases",
    "assert_orthonormal",
    "best_descent",
    "follow",
    "primitives",
    "tiles_of",
]

MATRIX = MatrixAxes((0,), (1,))
# Square: the first factors have full rank, and so determined eigenvectors.
SHAPE = (3, 4, 4)
QUICK = {"axes": STACK, "update_interval": 3}
# Float32 roundings over the distances of eigenvalues, over small entries of V, or over
# small eigenvalues; measured 2e-6 to 7e-5, which is where micro-batches are added in
# another order.
RTOL = 1e-4
# Compiling takes longer than running.
FAST = {"xla_backend_optimization_level": 0}


@functools.cache
def _compiled(factory, **arguments):
    return tuple(
        jax.jit(function, compiler_options=FAST) for function in factory(**arguments)
    )


def follow(factory, grads, **arguments):
    """Updates and states of every step."""
    init, update = _compiled(factory, **arguments)
    state = init(grads[0])
    updates, states = [], []
    for g in grads:
        u, state = update(g, state)
        updates.append(jax.device_get(u))
        states.append(jax.device_get(state))
    return updates, states


def adam_without_bases(grads, *, b1=0.95, b2=0.95, eps=1e-8):
    """Updates; ε before the bias correction, and the first gradient for nothing."""
    m = v = np.zeros(np.shape(grads[0]))
    updates = [m]
    for t, g in enumerate(np.float64(grads[1:]), 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        scale = np.sqrt(1 - b2**t) / (1 - b1**t)
        updates.append(scale * m / (np.sqrt(v) + eps))
    return updates


def assert_orthonormal(basis: np.ndarray) -> None:
    """Orthonormal columns, in float32."""
    identity = np.broadcast_to(np.eye(basis.shape[-1]), basis.shape)
    # Four roundings of products of at most 1.
    np.testing.assert_allclose(basis.mT @ basis, identity, rtol=0, atol=2e-6)


def primitives(jaxpr, inside=False):
    """(name, whether in a branch) of every operation."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        yield name, inside
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from primitives(inner, inside or name == "cond")


def tiles_of(x: np.ndarray) -> np.ndarray:
    """The quarters of a matrix as a stack, row by row."""
    return np.stack([t for row in np.split(x, 2) for t in np.split(row, 2, axis=1)])


def best_descent(link, rates, *, steps: int = 300) -> float:
    """What is left of ½‖A·X·B‖² of condition 1e6 at the best of some learning rates.

    A and B mix rows and columns, so that no direction of an entry is special.
    """
    rng = np.random.default_rng(0)

    def mixing(side: int) -> np.ndarray:
        left, right = (
            np.linalg.qr(rng.standard_normal((side, side)))[0] for _ in range(2)
        )
        return np.float32(left * np.geomspace(1.0, 10**1.5, side) @ right)

    a, b = mixing(6), mixing(5)
    begin = normal((6, 5), seed=1)

    def loss(x):
        return 0.5 * jnp.sum(jnp.square(a @ x @ b))

    def final(rate):
        tx = optax.chain(link, ox.descend(lambda t: rate * (1 - t / steps)))

        def step(carry, _):
            x, state = carry
            updates, state = tx.update(jax.grad(loss)(x), state, x)
            return (optax.apply_updates(x, updates), state), None

        (x, _), _ = jax.lax.scan(step, (begin, tx.init(begin)), length=steps)
        return loss(x) / loss(begin)

    return float(np.nanmin(jax.jit(jax.vmap(final))(jnp.asarray(rates))))
