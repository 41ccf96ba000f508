"""Rows of Sophia, which the contracts call without a Hessian.

The factories here are the library's, but their transformations are told the squares of
the gradients where the caller says nothing. What the argument `hessian` may be is
tested beside the link.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optaxplus as ox
from optaxplus import trees
from tests.case import Case
from tests.cases.expectations import decay_of, reference
from tests.references import curvature

_STATIC = ("update_interval", "first_refresh")

Factory = Callable[..., optax.GradientTransformationExtraArgs]


def with_squares(factory: Factory) -> Factory:
    """The factory, with g² for the diagonal of the Hessian unless one is given."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
        tx = factory(*args, **kwargs)

        def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any):
            squares = jax.tree.map(lambda g: jnp.square(trees.widen(g)), updates)
            extra_args = {"hessian": squares, **extra_args}
            return tx.update(updates, state, params, **extra_args)

        return optax.GradientTransformationExtraArgs(tx.init, update_fn)

    return make


_scale_by_sophia = with_squares(ox.scale_by_sophia)
_sophia = with_squares(ox.sophia)

# Refreshes and steps without one, denominators of all three kinds: eps, between clipped
# and not, and larger than the gradient.
_OFTEN = {"update_interval": 2, "first_refresh": 1}

LINKS = [
    Case(
        "scale_by_sophia",
        _scale_by_sophia,
        by_default=False,
        static_args=_STATIC,
        complex_supported=False,
    ),
    Case(
        "scale_by_sophia-debias",
        _scale_by_sophia,
        {"debias": True, "gamma": 2.0, **_OFTEN},
        static_args=_STATIC,
        complex_supported=False,
    ),
]
CASES = [
    Case(
        "sophia",
        _sophia,
        learning_rate=0.1,
        static_args=_STATIC,
        needs_params=True,
        complex_supported=False,
        zero_gradient=decay_of(0.1),
        oracle=reference(curvature.sophia, weight_decay=0.1),
    ),
    Case(
        "sophia-often",
        _sophia,
        {"b1": 0.9, "b2": 0.5, "gamma": 2.0, "weight_decay": 0.0, **_OFTEN},
        learning_rate=0.1,
        static_args=_STATIC,
        complex_supported=False,
        oracle=reference(curvature.sophia, b1=0.9, b2=0.5, gamma=2.0, **_OFTEN),
    ),
]
