"""What the tests of loss scaling share."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import optaxplus as ox
from tests.problems import cast, normal_tree

SHAPES = {"dense": {"kernel": (4, 3), "bias": (3,)}}
PARAMS = cast(normal_tree(SHAPES, seed=0), "float16")
GRADS = [normal_tree(SHAPES, seed=seed) for seed in (1, 2, 3)]
NONFINITE = (jnp.nan, jnp.inf, -jnp.inf)

# Most of the time goes into compiling programs that run once.
FAST = {"xla_backend_optimization_level": 0}


def compiled(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Not compiled, the branches of `update` would be compiled in every call."""
    return tx._replace(update=jax.jit(tx.update, compiler_options=FAST))


def scaled(grads: Any, state: Any) -> Any:
    """What differentiating the scaled loss gives."""
    return jax.tree.map(lambda g: g * ox.loss_scale(state), grads)


def spoiled(grads: Any, value: float = jnp.nan) -> Any:
    """The gradients with one number that is not finite, in one leaf."""
    bias = grads["dense"]["bias"].at[1].set(value)
    return {**grads, "dense": {**grads["dense"], "bias": bias}}


PLAIN = compiled(ox.dynamic_loss_scale(ox.sgd(1.0)))

INNERS = {
    "adamw": ox.adamw(optax.linear_schedule(0.1, 0.0, 9), weight_decay=0.3),
    "lookahead": ox.lookahead(ox.lion(0.01), every_k=2),
    "quantized": ox.quantize_state(ox.adamw(0.1), min_size=4),
    "optax": optax.adamw(0.1),
}
