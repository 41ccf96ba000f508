"""What is specific to Adam and AdamW."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from tests.assertions import assert_trees_close, assert_trees_equal
from tests.problems import gradients, normal_tree
from tests.references.golden import GOLDEN_CASES, GoldenCase
from tests.trajectories import follow, follow_in_float64

SHAPES = {"w": (3, 4), "b": (4,)}
PARAMS = normal_tree(SHAPES, seed=0)
GRADS = jax.tree.map(lambda *g: jnp.stack(g), *gradients(SHAPES, steps=5))
GOLDEN = [case for case in GOLDEN_CASES if case.method in ("adam", "adamw")]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.name)
def test_golden_numbers(case: GoldenCase):
    arguments = dict(case.arguments)
    method = "amsgrad" if arguments.pop("amsgrad", False) else case.method
    tx = getattr(ox, method)(**arguments)
    trajectory = follow_in_float64(tx, case.params, case.grads)
    # Half a unit of the last decimal printed; float64 itself errs by 1e-15.
    atol = 0.505 * 10.0**-case.decimals
    np.testing.assert_allclose(trajectory[-1], case.expected, rtol=0, atol=atol)


OPTAX = {
    "adam": (ox.adam(0.1), optax.adam(0.1)),
    "adam_nesterov": (ox.adam(0.1, nesterov=True), optax.nadam(0.1)),
    "adam_eps": (
        ox.adam(0.1, b1=0.8, b2=0.9, eps=0.1, eps_root=0.01),
        optax.adam(0.1, b1=0.8, b2=0.9, eps=0.1, eps_root=0.01),
    ),
    "adamw": (ox.adamw(0.1), optax.adamw(0.1)),
    "adamw_decay": (
        ox.adamw(0.1, weight_decay=0.3, nesterov=True),
        optax.nadamw(0.1, weight_decay=0.3),
    ),
    "adamw_mask": (
        ox.adamw(0.1, weight_decay=0.3, mask={"w": True, "b": False}),
        optax.adamw(0.1, weight_decay=0.3, mask={"w": True, "b": False}),
    ),
    "adamw_mask_function": (
        ox.adamw(0.1, weight_decay=0.3, mask=lambda p: {"w": True, "b": False}),
        optax.adamw(0.1, weight_decay=0.3, mask={"w": True, "b": False}),
    ),
    "no_decay": (ox.adamw(0.1, weight_decay=0.0), optax.adam(0.1)),
    "schedule": (
        ox.adamw(optax.linear_schedule(0.1, 0.0, 4), weight_decay=0.3),
        optax.adamw(optax.linear_schedule(0.1, 0.0, 4), weight_decay=0.3),
    ),
}


@pytest.mark.parametrize("name", OPTAX)
def test_optax(name: str):
    ours, theirs = (follow(tx, PARAMS, GRADS)[0] for tx in OPTAX[name])
    # optax forms 1 - 0.999**t in float32, an error of 3e-5 of the first steps of 0.1.
    assert_trees_close(ours, theirs, rtol=1e-5)


def test_first_step_is_the_learning_rate():
    _, updates = follow(ox.adam(0.1, eps=1e-30), PARAMS, GRADS)
    first = jax.tree.map(lambda u: u[0], updates)
    # Float32 roundings.
    assert_trees_close(
        first, jax.tree.map(lambda g: -0.1 * jnp.sign(g[0]), GRADS), rtol=1e-6
    )


def test_decay_is_decoupled():
    zeros = jax.tree.map(jnp.zeros_like, GRADS)
    params, _ = follow(ox.adamw(0.1, weight_decay=0.5), PARAMS, zeros)
    # Nothing but decay, by 1 - 0.1·0.5 a step whatever the moments; float32 roundings.
    assert_trees_close(
        jax.tree.map(lambda p: p[-1], params),
        jax.tree.map(lambda p: 0.95**5 * p, PARAMS),
        rtol=1e-6,
    )


@pytest.mark.parametrize("make", [ox.adam, ox.adamw])
def test_moments_are_those_of_the_transformation(make):
    tx = make(0.1, b1=0.8, b2=0.7, nesterov=True, mu_dtype="bfloat16")
    inner = ox.scale_by_adam(0.8, 0.7, nesterov=True, mu_dtype="bfloat16")
    grads = jax.tree.map(lambda g: g[0], GRADS)
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    _, expected = inner.update(grads, inner.init(PARAMS))
    assert_trees_equal(state[0], expected)


def test_adam_needs_no_params():
    grads = jax.tree.map(lambda g: g[0], GRADS)
    tx = ox.adam(0.1)
    updates, _ = tx.update(grads, tx.init(PARAMS))
    assert_trees_equal(updates, tx.update(grads, tx.init(PARAMS), PARAMS)[0])
    tx = ox.adamw(0.1)
    with pytest.raises(ValueError, match="params"):
        tx.update(grads, tx.init(PARAMS))


ERRORS = [
    (ValueError, {"learning_rate": -0.1}, "{}: learning_rate=-0.1 is not allowed"),
    (ValueError, {"learning_rate": float("nan")}, "{}: learning_rate=nan is not"),
    (TypeError, {"learning_rate": [0.1]}, r"{}: learning_rate=\[0.1\] is not"),
    (ValueError, {"b1": 1.0}, r"b1=1.0 is not allowed; .* \[0, 1\)"),
    (ValueError, {"b2": -0.1}, r"b2=-0.1 is not allowed; .* \[0, 1\)"),
    (ValueError, {"eps": 0.0}, "eps=0.0 is not allowed; eps or eps_root must be > 0"),
    (ValueError, {"eps_root": -1.0}, "eps_root=-1.0 is not allowed"),
    (TypeError, {"nesterov": None}, "nesterov=None is not allowed"),
    (TypeError, {"mu_dtype": "f3"}, "mu_dtype='f3' is not allowed"),
    (TypeError, {"nu_dtype": "int32"}, "nu_dtype='int32' is not allowed"),
]


@pytest.mark.parametrize("make", [ox.adam, ox.adamw])
@pytest.mark.parametrize(("error", "arguments", "message"), ERRORS)
def test_wrong_arguments_are_refused(make, error, arguments, message: str):
    with pytest.raises(error, match=message.format(make.__name__)):
        make(**{"learning_rate": 0.1, **arguments})


@pytest.mark.parametrize(
    ("error", "weight_decay", "message"),
    [
        (ValueError, -1e-4, "adamw: weight_decay=-0.0001 is not allowed; .* >= 0"),
        (ValueError, float("nan"), "adamw: weight_decay=nan is not allowed"),
        (TypeError, True, "adamw: weight_decay=True is not allowed"),
    ],
)
def test_wrong_decay_is_refused(error, weight_decay, message: str):
    with pytest.raises(error, match=message):
        ox.adamw(0.1, weight_decay=weight_decay)
