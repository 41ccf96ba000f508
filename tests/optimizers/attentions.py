"""Attentions in miniature, and QK-Clip with a threshold that some heads exceed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import optaxplus as ox

WIDTH, SIZE = 7, 4
RANK, NOPE, ROPE, VALUE = 6, 3, 2, 5  # of latent attention
TAU = 2.0
# Two heads of the first group are above the threshold, one of the second is, and the
# third group is below it.
SIX = np.array([8.0, 1.0, 3.0, -1.0, 2.5, 2.0])


def clip(params, max_logits, **arguments):
    return ox.qk_clip(params, max_logits, **{"threshold": TAU, **arguments})


def gamma(largest: Any) -> np.ndarray:
    """The rule: 1, or what takes a logit down to the threshold."""
    return np.array([min(1.0, TAU / s) if s > 0 else 1.0 for s in largest])


def normal(shapes: Any, seed: int = 1) -> Any:
    """Parameters in float64 under the fixture `x64`, otherwise in float32."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape)),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
