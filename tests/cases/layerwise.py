"""Rows of optimizers whose statistics belong to a matrix or vector."""

import jax.numpy as jnp
import optax

import optaxplus as ox
from tests.case import Case
from tests.cases.expectations import (
    decay_of,
    factored_branches,
    reference,
)
from tests.references import (
    adam_variants,
    factored,
    layerwise,
)


def _adam_mini(p, grads, learning_rate, is_matrix):
    """A second moment for each output of a matrix, one for a vector."""
    return adam_variants.adam_mini(
        p,
        grads,
        learning_rate=learning_rate,
        weight_decay=0.1,
        by_output=is_matrix,
    )


CASES = [
    Case(
        "lars",
        ox.lars,
        {"trust_coefficient": 0.02},
        learning_rate=1.0,
        needs_params=True,
        scope="block",
        oracle=reference(layerwise.lars, trust_coefficient=0.02),
        twin=lambda rate: optax.lars(rate, trust_coefficient=0.02),
    ),
    Case(
        "lars-weight_decay",
        ox.lars,
        {"weight_decay": 0.01, "nesterov": True},
        learning_rate=20.0,
        needs_params=True,
        scope="block",
        # λ·w · η·‖w‖ / (λ·‖w‖), and Nesterov's first step is 1 + μ times as long.
        zero_gradient=decay_of(1e-3 * 1.9),
        oracle=reference(layerwise.lars, weight_decay=0.01, nesterov=True),
    ),
    Case(
        "lamb",
        ox.lamb,
        {"weight_decay": 0.1},
        learning_rate=0.15,
        needs_params=True,
        scope="block",
        zero_gradient=decay_of(1.0),  # λ·w scaled to the norm of w
        oracle=reference(layerwise.lamb, weight_decay=0.1),
        torch={"lamb": None},
        twin=lambda rate: optax.lamb(rate, weight_decay=0.1),
    ),
    Case(
        "adafactor",
        ox.adafactor,
        {"min_dim_size_to_factor": 2},
        learning_rate=0.2,
        static_args=("min_dim_size_to_factor",),
        needs_params=True,
        complex_supported=False,
        scope="block",
        oracle=reference(factored.adafactor, min_dim_size_to_factor=2),
        torch={
            "adafactor": None,
            # Recorded as the largest learning rate; the paper's rule made it smaller.
            "adafactor_relative_step": lambda step: jnp.minimum(
                0.5, (step + 1.0) ** -0.5
            ),
        },
        twin=lambda rate: optax.adafactor(rate, min_dim_size_to_factor=2),
        branches=factored_branches,
    ),
    Case(
        "adafactor-weight_decay",
        ox.adafactor,
        {
            "min_dim_size_to_factor": 2,
            "b1": 0.9,
            "weight_decay": 0.01,
            "decay": "independent",
        },
        learning_rate=0.2,
        static_args=("min_dim_size_to_factor",),
        needs_params=True,
        complex_supported=False,
        scope="block",
        zero_gradient=lambda p, _, __: -0.01 * p,
        oracle=reference(
            factored.adafactor,
            min_dim_size_to_factor=2,
            momentum=0.9,
            weight_decay_rate=0.01,
        ),
        twin=lambda rate: optax.adafactor(
            rate, min_dim_size_to_factor=2, momentum=0.9, weight_decay_rate=0.01
        ),
        branches=factored_branches,
    ),
    Case(
        "adafactor-b1",
        ox.adafactor,
        {"min_dim_size_to_factor": 2, "b1": 0.9, "multiply_by_param_rms": False},
        learning_rate=0.1,
        static_args=("min_dim_size_to_factor",),
        needs_params=True,
        complex_supported=False,
        scope="block",
        oracle=reference(
            factored.adafactor,
            min_dim_size_to_factor=2,
            momentum=0.9,
            multiply_by_parameter_scale=False,
        ),
        twin=lambda rate: optax.adafactor(
            rate,
            min_dim_size_to_factor=2,
            momentum=0.9,
            multiply_by_parameter_scale=False,
        ),
        branches=factored_branches,
    ),
    Case(
        "adam_mini",
        ox.adam_mini,
        {"weight_decay": 0.1},
        learning_rate=0.1,
        needs_params=True,
        scope="block",
        zero_gradient=decay_of(0.1),
        oracle=_adam_mini,
        torch={"adam_mini": None},
    ),
    Case(
        "lars-torch",
        ox.lars,
        {"weight_decay": 0.1, "trust_coefficient": 0.02},
        learning_rate=1.0,
        needs_params=True,
        scope="block",
        zero_gradient=decay_of(0.02),  # λ·w · η·‖w‖ / (λ·‖w‖)
        oracle=reference(layerwise.lars, weight_decay=0.1, trust_coefficient=0.02),
        torch={"lars": None},
    ),
    Case(
        "lars-optax",
        ox.lars,
        {"weight_decay": 0.1, "trust_coefficient": 0.02, "form": "optax"},
        learning_rate=1.0,
        needs_params=True,
        scope="block",
        zero_gradient=decay_of(0.02),
        oracle=reference(
            layerwise.lars, weight_decay=0.1, trust_coefficient=0.02, form="optax"
        ),
        twin=lambda rate: optax.lars(rate, 0.1, trust_coefficient=0.02),
    ),
    Case(
        "lars-apex",
        ox.lars,
        {"weight_decay": 0.1, "trust_coefficient": 0.02, "eps": 1e-8, "form": "apex"},
        learning_rate=1.0,
        needs_params=True,
        scope="block",
        oracle=reference(
            layerwise.lars,
            weight_decay=0.1,
            trust_coefficient=0.02,
            eps=1e-8,
            form="apex",
        ),
        torch={"lars": None},
        # The recorded run has no eps; the smallest denominator is 0.02.
        torch_rtol=1e-6,
    ),
    Case(
        "lamb-bounded",
        ox.lamb,
        {"debias": False, "min_param_norm": 0.5, "max_param_norm": 2.0},
        learning_rate=0.15,
        needs_params=True,
        scope="block",
        oracle=reference(
            layerwise.lamb,
            bias_correction=False,
            param_norm_min=0.5,
            param_norm_max=2.0,
        ),
    ),
    Case(
        "lamb-clip_norm",
        ox.lamb,
        {"weight_decay": 0.01, "clip_norm": 5.0},
        learning_rate=0.15,
        needs_params=True,
        scope="tree",
        zero_gradient=decay_of(1.0),
        oracle=reference(layerwise.lamb, weight_decay=0.01),
    ),
    Case(
        "came",
        ox.came,
        learning_rate=0.04,
        static_args=("min_dim_size_to_factor",),
        complex_supported=False,
        scope="block",
        oracle=reference(factored.came),
        torch={"came_plain": None},
        branches=factored_branches,
    ),
    Case(
        "came-weight_decay",
        ox.came,
        {"weight_decay": 0.1},
        learning_rate=0.04,
        static_args=("min_dim_size_to_factor",),
        needs_params=True,
        complex_supported=False,
        scope="block",
        zero_gradient=decay_of(0.1),
        oracle=reference(factored.came, weight_decay=0.1),
        torch={"came": None},
        branches=factored_branches,
    ),
]
