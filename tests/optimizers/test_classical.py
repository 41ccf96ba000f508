"""What is specific to SGD."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from tests.assertions import assert_trees_close
from tests.problems import gradients, normal_tree
from tests.references.golden import GOLDEN_CASES, GoldenCase
from tests.trajectories import follow, follow_in_float64

SHAPES = {"w": (3, 4), "b": (4,)}
PARAMS = normal_tree(SHAPES, seed=0)
GRADS = jax.tree.map(lambda *g: jnp.stack(g), *gradients(SHAPES, steps=5))
GOLDEN = [case for case in GOLDEN_CASES if case.method == "sgd"]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.name)
def test_golden_numbers(case: GoldenCase):
    tx = ox.sgd(**case.arguments)
    trajectory = follow_in_float64(tx, case.params, case.grads)
    # Half a unit of the last decimal printed; float64 itself errs by 1e-15.
    atol = 0.505 * 10.0**-case.decimals
    np.testing.assert_allclose(trajectory[-1], case.expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "arguments", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str
)
def test_optax(arguments):
    ours, _ = follow(ox.sgd(0.1, **arguments), PARAMS, GRADS)
    theirs, _ = follow(optax.sgd(0.1, **arguments), PARAMS, GRADS)
    # Float32 roundings; optax multiplies by the learning rate with another sign.
    assert_trees_close(ours, theirs, rtol=1e-6)


def test_without_momentum_there_is_no_state_and_no_dampening():
    tx = ox.sgd(0.1, dampening=0.5)
    assert not jax.tree.leaves(tx.init(PARAMS))
    updates, _ = tx.update(PARAMS, tx.init(PARAMS))
    # One float32 rounding.
    assert_trees_close(updates, jax.tree.map(lambda p: -0.1 * p, PARAMS), rtol=1e-7)


def test_weight_decay_passes_through_the_momentum():
    decayed, _ = follow(ox.sgd(0.1, momentum=0.9, weight_decay=0.2), PARAMS, GRADS)
    # Decay is a gradient: that of 0.1·‖p‖² added to each.
    plain = ox.sgd(0.1, momentum=0.9)
    params, state = PARAMS, plain.init(PARAMS)
    for grads in gradients(SHAPES, steps=5):
        grads = jax.tree.map(lambda g, p: g + 0.2 * p, grads, params)
        updates, state = plain.update(grads, state)
        params = optax.apply_updates(params, updates)
    # Float32 roundings.
    assert_trees_close(jax.tree.map(lambda p: p[-1], decayed), params, rtol=1e-6)


def test_schedule_stays_outside_the_momentum():
    # PyTorch's form: a learning rate of zero stops at once.
    tx = ox.sgd(lambda step: jnp.where(step < 2, 0.1, 0.0), momentum=0.9)
    params, _ = follow(tx, PARAMS["w"], GRADS["w"])
    np.testing.assert_array_equal(params[2:], np.broadcast_to(params[1], (3, 3, 4)))
    assert not np.array_equal(params[0], params[1])


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"learning_rate": -0.1}, "sgd: learning_rate=-0.1 .* >= 0"),
        (ValueError, {"learning_rate": float("nan")}, "sgd: learning_rate=nan is not"),
        (ValueError, {"learning_rate": float("inf")}, "sgd: learning_rate=inf is not"),
        (TypeError, {"learning_rate": "0.1"}, "sgd: learning_rate='0.1' .* schedule"),
        (TypeError, {"learning_rate": True}, "sgd: learning_rate=True is not"),
        (TypeError, {"learning_rate": None}, "sgd: learning_rate=None is not"),
        (ValueError, {"momentum": 1.0}, r"momentum=1.0 is not allowed; .*\[0, 1\)"),
        (ValueError, {"dampening": -1.0}, "dampening=-1.0 is not allowed"),
        (ValueError, {"weight_decay": -0.1}, "sgd: weight_decay=-0.1 .* >= 0"),
        (TypeError, {"weight_decay": "no"}, "sgd: weight_decay='no' is not"),
        (ValueError, {"nesterov": True}, "nesterov=True is not allowed with momentum"),
        (TypeError, {"nesterov": "yes"}, "nesterov='yes' is not allowed"),
        (TypeError, {"mu_dtype": "int8"}, "mu_dtype='int8' is not allowed"),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message: str):
    with pytest.raises(error, match=message):
        ox.sgd(**{"learning_rate": 0.1, **arguments})


def test_decay_needs_params():
    tx = ox.sgd(0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match="params"):
        tx.update(PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_integer_parameters_are_refused(momentum: float):
    with pytest.raises(TypeError, match="parameter 'n' of dtype int32 is not allowed"):
        ox.sgd(0.1, momentum=momentum).init({"n": jnp.ones(2, jnp.int32)})
