"""What is specific to Signum and Lion."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from tests.assertions import assert_trees_close, assert_trees_equal
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


@pytest.mark.parametrize("make", [ox.lion, ox.signum])
def test_every_coordinate_moves_by_the_learning_rate(make):
    _, updates = follow(make(0.25, weight_decay=0.0), PARAMS, GRADS)
    for u in jax.tree.leaves(updates):
        np.testing.assert_array_equal(np.abs(u), np.full(u.shape, 0.25))


def test_signum_without_momentum_is_the_sign():
    _, updates = follow(ox.signum(0.25, b1=0.0), PARAMS, GRADS)
    assert_trees_equal(updates, jax.tree.map(lambda g: -0.25 * jnp.sign(g), GRADS))


def test_signum_is_lion_of_equal_rates():
    # Signs of the same averages; steps of float32.
    assert_trees_close(
        follow(ox.signum(0.1, b1=0.8, weight_decay=0.3), PARAMS, GRADS)[0],
        follow(ox.lion(0.1, b1=0.8, b2=0.8, weight_decay=0.3), PARAMS, GRADS)[0],
        rtol=3e-7,
    )


def test_signum_is_the_sign_of_the_average():
    tx = ox.signum(0.5, b1=0.75)
    grads = jnp.asarray([[1.0], [-0.5], [-0.5]])
    # m = 0.25, 0.0625, -0.078125
    _, updates = follow(tx, jnp.zeros(1), grads)
    np.testing.assert_array_equal(updates, [[-0.5], [-0.5], [0.5]])


@pytest.mark.parametrize("make", [ox.lion, ox.signum])
@pytest.mark.parametrize(
    ("decay", "factor"),
    [
        ("decoupled", 0.95),
        ("independent", 0.5),
        # A step of 0 does not disagree.
        ("cautious", 0.95),
        ("proximal", 1 / 1.05),
    ],
)
def test_forms_of_decay(make, decay: str, factor: float):
    zeros = jax.tree.map(jnp.zeros_like, GRADS)
    params, _ = follow(make(0.1, weight_decay=0.5, decay=decay), PARAMS, zeros)
    # Five steps of decay; float32 roundings.
    assert_trees_close(
        jax.tree.map(lambda p: p[-1], params),
        jax.tree.map(lambda p: factor**5 * p, PARAMS),
        rtol=1e-6,
    )


@pytest.mark.parametrize("make", [ox.lion, ox.signum])
def test_schedule_and_mask_of_decay(make):
    zeros = jax.tree.map(jnp.zeros_like, GRADS)
    mask = {"w": True, "b": False}
    tx = make(0.5, weight_decay=lambda step: jnp.where(step == 1, 0.5, 0), mask=mask)
    params, _ = follow(tx, PARAMS, zeros)
    # Powers of two, but for a rounding of 3/4·p.
    assert_trees_close(params["w"][-1], 0.75 * PARAMS["w"], rtol=1e-7)
    assert_trees_equal(params["b"][-1], PARAMS["b"])


@pytest.mark.parametrize("make", [ox.lion, ox.signum])
@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"learning_rate": -1.0}, "{}: learning_rate=-1.0 is not"),
        (TypeError, {"learning_rate": "1"}, "{}: learning_rate='1' is not allowed"),
        (ValueError, {"b1": 1.0}, r"b1=1.0 is not allowed; .* \[0, 1\)"),
        (ValueError, {"weight_decay": -1}, "{}: weight_decay=-1 is not allowed"),
        (TypeError, {"weight_decay": None}, "{}: weight_decay=None is not allowed"),
        (ValueError, {"decay": "l2"}, "decay='l2' is not allowed; .* 'decoupled'"),
        (TypeError, {"mu_dtype": "uint4"}, "mu_dtype='uint4' is not allowed"),
    ],
)
def test_wrong_arguments_are_refused(make, error, arguments, message: str):
    with pytest.raises(error, match=message.format(make.__name__)):
        make(**{"learning_rate": 0.1, **arguments})


def test_wrong_second_rate_of_lion_is_refused():
    with pytest.raises(ValueError, match="scale_by_lion: b2=2 is not allowed"):
        ox.lion(0.1, b2=2)


@pytest.mark.parametrize("make", [ox.lion, ox.signum])
def test_params_are_needed_for_decay_alone(make):
    tx = make(0.1, weight_decay=0.0)
    tx.update(PARAMS, tx.init(PARAMS))
    tx = make(0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match=f"{make.__name__}: params=None is not"):
        tx.update(PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize("make", [ox.lion, ox.signum])
def test_masks_that_do_not_fit_are_refused(make):
    with pytest.raises(ValueError, match="descend: mask is not a prefix"):
        make(0.1, weight_decay=0.1, mask={"w": True}).init(PARAMS)
