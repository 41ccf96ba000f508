"""What is specific to Adafactor."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from optaxplus import MatrixAxes
from tests.assertions import assert_trees_close
from tests.problems import gradients, normal_tree
from tests.references.factored import adafactor, relative_step
from tests.references.golden import GOLDEN_CASES, GoldenCase
from tests.trajectories import follow, follow_in_float64

SHAPES = {"w": (3, 4), "b": (4,)}
PARAMS = normal_tree(SHAPES, seed=0)
GRADS = jax.tree.map(lambda *g: jnp.stack(g), *gradients(SHAPES, steps=5))
STACK = MatrixAxes((-2,), (-1,))
GOLDEN = [case for case in GOLDEN_CASES if case.method == "adafactor"]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.name)
def test_golden_numbers(case: GoldenCase):
    tx = ox.adafactor(**case.arguments)
    trajectory = follow_in_float64(tx, case.params, case.grads)
    # Half a unit of the last decimal printed; float64 itself errs by 1e-15.
    atol = 0.505 * 10.0**-case.decimals
    np.testing.assert_allclose(trajectory[-1], case.expected, rtol=0, atol=atol)


def test_relative_step_of_the_paper():
    # The docstring's schedule; large enough here that both of its branches are taken.
    tx = ox.adafactor(
        lambda step: jnp.minimum(0.6, (step + 1) ** -0.5), min_dim_size_to_factor=1
    )
    expected = adafactor(
        PARAMS["w"],
        GRADS["w"],
        learning_rate=lambda step: relative_step(step, largest=0.6),
        min_dim_size_to_factor=1,
    )
    # Float64 roundings; the root of the step is taken by two libraries.
    np.testing.assert_allclose(
        follow_in_float64(tx, PARAMS["w"], GRADS["w"]), expected, rtol=1e-12
    )


# ours, optax's: the decay of optax is not multiplied by the learning rate.
OPTAX = {
    "default": ({}, {}),
    "factored": ({"min_dim_size_to_factor": 1},) * 2,
    "decay": ({"weight_decay": 0.3}, {"weight_decay_rate": 0.03}),
    "mask": (
        {"weight_decay": 0.3, "mask": {"w": True, "b": False}},
        {"weight_decay_rate": 0.03, "weight_decay_mask": {"w": True, "b": False}},
    ),
    "average": (
        {"b1": 0.9, "min_dim_size_to_factor": 1},
        {"momentum": 0.9, "min_dim_size_to_factor": 1},
    ),
    "absolute": (
        {"multiply_by_param_rms": False, "clip_threshold": 0.5},
        {"multiply_by_parameter_scale": False, "clipping_threshold": 0.5},
    ),
    "decay_rate": (
        {"decay_rate": 0.5, "eps": 1e-3},
        {"decay_rate": 0.5, "eps": 1e-3},
    ),
}


@pytest.mark.parametrize("name", OPTAX)
def test_optax(name: str):
    ours, theirs = OPTAX[name]
    # Float32 roundings; optax forms 1 - t**-0.8 by a subtraction.
    assert_trees_close(
        follow(ox.adafactor(0.1, **ours), PARAMS, GRADS)[0],
        follow(optax.adafactor(0.1, **theirs), PARAMS, GRADS)[0],
        rtol=1e-5,
    )


@pytest.mark.parametrize("power", [-20, 20])
def test_scale_of_the_gradient_does_not_matter(power: int):
    scaled = jax.tree.map(lambda g: g * 2.0**power, GRADS)
    tx = ox.adafactor(0.1, min_dim_size_to_factor=1)
    # Float32 roundings.
    assert_trees_close(
        follow(tx, PARAMS, scaled)[0], follow(tx, PARAMS, GRADS)[0], rtol=1e-5
    )


def test_experts_stay_apart():
    params = normal_tree((3, 2, 4), seed=2)
    grads = jnp.stack(gradients((3, 2, 4), steps=3))
    arguments = {"min_dim_size_to_factor": 1, "b1": 0.9, "weight_decay": 0.1}
    stack, _ = follow(ox.adafactor(0.1, axes=STACK, **arguments), params, grads)
    for index in range(3):
        one, _ = follow(ox.adafactor(0.1, **arguments), params[index], grads[:, index])
        # Float32 sums in another order.
        assert_trees_close(stack[:, index], one, rtol=2e-6)


def test_state_of_a_factored_matrix_is_its_sides():
    params = {"w": jnp.zeros((256, 128)), "small": jnp.zeros((256, 127))}
    state = jax.eval_shape(ox.adafactor(0.1).init, params)
    sizes = sorted(x.size for x in jax.tree.leaves(state) if x.size > 1)
    assert sizes == [128, 256, 256 * 127]


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"learning_rate": -1.0}, "adafactor: learning_rate=-1.0 is not"),
        (TypeError, {"learning_rate": {}}, "adafactor: learning_rate={} is not"),
        (ValueError, {"b1": 1.0}, r"b1=1.0 is not allowed; .* \[0, 1\)"),
        (ValueError, {"decay_rate": 0.0}, "decay_rate=0.0 is not allowed"),
        (ValueError, {"min_dim_size_to_factor": 0}, "min_dim_size_to_factor=0 is not"),
        (TypeError, {"min_dim_size_to_factor": 1.5}, "min_dim_size_to_factor=1.5 is"),
        (ValueError, {"eps": 0.0}, "eps=0.0 is not allowed"),
        (ValueError, {"clip_threshold": 0.0}, "=0.0 is not allowed; .* > 0"),
        (ValueError, {"weight_decay": -0.1}, "adafactor: weight_decay=-0.1 is not"),
        (
            TypeError,
            {"multiply_by_param_rms": 1},
            "adafactor: multiply_by_param_rms=1 is not allowed; .* True or False",
        ),
        (TypeError, {"b1": 0.9, "mu_dtype": "int8"}, "mu_dtype='int8' is not allowed"),
        (TypeError, {"nu_dtype": "int8"}, "nu_dtype='int8' is not allowed"),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message: str):
    with pytest.raises(error, match=message):
        ox.adafactor(**{"learning_rate": 0.1, **arguments})


def test_params_are_needed_and_real():
    tx = ox.adafactor(0.1)
    with pytest.raises(ValueError, match="params"):
        tx.update(PARAMS, tx.init(PARAMS))
    with pytest.raises(TypeError, match=r"'w' of dtype complex64 .* real floating"):
        tx.init({"w": jnp.ones((2, 3), jnp.complex64)})
    with pytest.raises(ValueError, match=r"parameter 'b': .* axis -2 is out of range"):
        ox.adafactor(0.1, axes=STACK).init(PARAMS)


@pytest.mark.parametrize("b1", [None, 0.9])
@pytest.mark.parametrize(
    ("decay", "removed"),
    [("decoupled", 0.02), ("independent", 0.1), ("cautious", 0.02)],
)
@pytest.mark.parametrize("scheduled", [False, True])
def test_decay_with_and_without_an_average(b1, decay: str, removed: float, scheduled):
    rate = (lambda step: 0.2) if scheduled else 0.2
    tx = ox.adafactor(rate, b1=b1, weight_decay=0.1, decay=decay)
    params = {"w": jnp.array([[1.0, -2.0, 3.0]])}
    zeros = {"w": jnp.zeros((1, 3))}
    updates, _ = tx.update(zeros, tx.init(params), params)
    # One product of float32 numbers.
    np.testing.assert_allclose(updates["w"], -removed * params["w"], rtol=3e-7)
