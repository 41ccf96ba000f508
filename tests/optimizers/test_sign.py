"""What is specific to Lion."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from tests.assertions import assert_trees_close
from tests.problems import gradients, normal_tree
from tests.references.golden import GOLDEN_CASES
from tests.trajectories import follow, follow_in_float64

SHAPES = {"w": (3, 4), "b": (4,)}
PARAMS = normal_tree(SHAPES, seed=0)
GRADS = jax.tree.map(lambda *g: jnp.stack(g), *gradients(SHAPES, steps=5))


def test_golden_numbers():
    (case,) = [case for case in GOLDEN_CASES if case.method == "lion"]
    trajectory = follow_in_float64(ox.lion(**case.arguments), case.params, case.grads)
    # Half a unit of the last decimal printed; float64 itself errs by 1e-15.
    atol = 0.505 * 10.0**-case.decimals
    np.testing.assert_allclose(trajectory[-1], case.expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"b1": 0.95, "b2": 0.5, "weight_decay": 0.3, "mask": {"w": True, "b": False}}],
    ids=str,
)
def test_optax(arguments):
    ours, _ = follow(ox.lion(0.01, **arguments), PARAMS, GRADS)
    theirs, _ = follow(optax.lion(0.01, **arguments), PARAMS, GRADS)
    # Float32 roundings.
    assert_trees_close(ours, theirs, rtol=1e-6)


def test_every_coordinate_moves_by_the_learning_rate():
    _, updates = follow(ox.lion(0.25, weight_decay=0.0), PARAMS, GRADS)
    for u in jax.tree.leaves(updates):
        np.testing.assert_array_equal(np.abs(u), np.full(u.shape, 0.25))


def test_decay_is_decoupled():
    zeros = jax.tree.map(jnp.zeros_like, GRADS)
    params, _ = follow(ox.lion(0.1, weight_decay=0.5), PARAMS, zeros)
    # Decay by 1 - 0.1·0.5 a step; float32 roundings.
    assert_trees_close(
        jax.tree.map(lambda p: p[-1], params),
        jax.tree.map(lambda p: 0.95**5 * p, PARAMS),
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (
            ValueError,
            {"learning_rate": -1.0},
            "lion: learning_rate=-1.0 is not",
        ),
        (TypeError, {"learning_rate": "1"}, "lion: learning_rate='1' is not allowed"),
        (ValueError, {"b1": 1.0}, r"b1=1.0 is not allowed; .* \[0, 1\)"),
        (ValueError, {"b2": 2}, "b2=2 is not allowed"),
        (ValueError, {"weight_decay": -1}, "lion: weight_decay=-1 is not allowed"),
        (TypeError, {"weight_decay": None}, "lion: weight_decay=None is not allowed"),
        (TypeError, {"mu_dtype": "uint4"}, "mu_dtype='uint4' is not allowed"),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message: str):
    with pytest.raises(error, match=message):
        ox.lion(**{"learning_rate": 0.1, **arguments})


def test_decay_needs_params():
    tx = ox.lion(0.1)
    with pytest.raises(ValueError, match="params"):
        tx.update(PARAMS, tx.init(PARAMS))
