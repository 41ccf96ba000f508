"""What is specific to Adam, AdamW, AMSGrad, NAdam and RAdam."""

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
GOLDEN = [
    case for case in GOLDEN_CASES if case.method in ("adam", "adamw", "nadam", "radam")
]


def make_golden(case: GoldenCase) -> optax.GradientTransformation:
    """AMSGrad is an argument of the reference and an optimizer here."""
    arguments = dict(case.arguments)
    name = "amsgrad" if arguments.pop("amsgrad", False) else case.method
    return getattr(ox, name)(**arguments)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.name)
def test_golden_numbers(case: GoldenCase):
    trajectory = follow_in_float64(make_golden(case), case.params, case.grads)
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


MASK = {"w": True, "b": False}
CHAINS = {
    "amsgrad": (
        ox.amsgrad(0.1, b1=0.8, b2=0.5, eps=0.01, eps_root=0.1),
        ox.scale_by_adam(0.8, 0.5, eps=0.01, eps_root=0.1, amsgrad=True),
        ox.descend(0.1),
    ),
    "adamw": (
        ox.adamw(
            0.1,
            b2=0.5,
            weight_decay=0.3,
            mask=MASK,
            decay="cautious",
            amsgrad=True,
            nesterov=True,
        ),
        ox.scale_by_adam(b2=0.5, amsgrad=True, nesterov=True),
        ox.descend(0.1, 0.3, mask=MASK, decay="cautious"),
    ),
    "nadam": (
        ox.nadam(
            0.1,
            b1=0.8,
            b2=0.7,
            eps=0.01,
            momentum_decay=0.5,
            weight_decay=0.3,
            mask=MASK,
            decay="independent",
        ),
        ox.scale_by_nadam(0.8, 0.7, eps=0.01, momentum_decay=0.5),
        ox.descend(0.1, 0.3, mask=MASK, decay="independent"),
    ),
    "radam": (
        ox.radam(
            0.1,
            b1=0.8,
            b2=0.95,
            eps=0.01,
            threshold=4.0,
            weight_decay=0.3,
            mask=MASK,
            decay="proximal",
        ),
        ox.scale_by_radam(0.8, 0.95, eps=0.01, threshold=4.0),
        ox.descend(0.1, 0.3, mask=MASK, decay="proximal"),
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_every_argument_reaches_its_link(name: str):
    tx, *links = CHAINS[name]
    ours, theirs = (follow(t, PARAMS, GRADS)[0] for t in (tx, optax.chain(*links)))
    # The same operations; fusion may order them differently.
    assert_trees_close(ours, theirs, rtol=1e-6)


def test_amsgrad_is_adamw_with_a_flag():
    # The same operations.
    assert_trees_close(
        follow(ox.amsgrad(0.1, b2=0.5), PARAMS, GRADS)[0],
        follow(ox.adamw(0.1, b2=0.5, amsgrad=True, weight_decay=0.0), PARAMS, GRADS)[0],
        rtol=3e-7,
    )


def test_optax_nadam_is_adam_with_nesterov():
    # Once the momentum has warmed up; Float32 roundings of optax as above.
    assert_trees_close(
        follow(ox.nadam(0.1, momentum_decay=1e4), PARAMS, GRADS)[0],
        follow(optax.nadam(0.1), PARAMS, GRADS)[0],
        rtol=1e-5,
    )


@pytest.mark.parametrize("make", [ox.adam, ox.amsgrad])
def test_optimizers_without_decay_need_no_params(make):
    grads = jax.tree.map(lambda g: g[0], GRADS)
    tx = make(0.1)
    updates, _ = tx.update(grads, tx.init(PARAMS))
    assert_trees_equal(updates, tx.update(grads, tx.init(PARAMS), PARAMS)[0])


@pytest.mark.parametrize("make", [ox.adamw, ox.nadam, ox.radam])
def test_params_are_needed_for_decay_alone(make):
    grads = jax.tree.map(lambda g: g[0], GRADS)
    tx = make(0.1, weight_decay=0.0)
    tx.update(grads, tx.init(PARAMS))
    for weight_decay in (1e-4, lambda step: 0.0, jnp.zeros(())):
        tx = make(0.1, weight_decay=weight_decay)
        with pytest.raises(ValueError, match=f"{make.__name__}: params=None is not"):
            tx.update(grads, tx.init(PARAMS))


@pytest.mark.parametrize("make", [ox.adamw, ox.nadam, ox.radam])
def test_forms_of_decay(make):
    zeros = jax.tree.map(lambda g: jnp.zeros_like(g[0]), GRADS)
    for decay, factor in (("decoupled", -0.02), ("independent", -0.2)):
        tx = make(0.1, weight_decay=lambda step: 0.2, decay=decay)
        updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS)
        expected = jax.tree.map(lambda p, factor=factor: factor * p, PARAMS)
        # Two float32 roundings.
        assert_trees_close(updates, expected, rtol=3e-7)


COMMON_ERRORS = [
    (ValueError, {"learning_rate": -0.1}, "{}: learning_rate=-0.1 is not allowed"),
    (ValueError, {"learning_rate": float("nan")}, "{}: learning_rate=nan is not"),
    (TypeError, {"learning_rate": [0.1]}, r"{}: learning_rate=\[0.1\] is not"),
    (ValueError, {"b1": 1.0}, r"b1=1.0 is not allowed; .* \[0, 1\)"),
    (ValueError, {"b2": -0.1}, r"b2=-0.1 is not allowed; .* \[0, 1\)"),
    (ValueError, {"eps": 0.0}, "eps=0.0 is not allowed; .* > 0"),
    (TypeError, {"mu_dtype": "f3"}, "mu_dtype='f3' is not allowed"),
    (TypeError, {"nu_dtype": "int32"}, "nu_dtype='int32' is not allowed"),
]


@pytest.mark.parametrize("make", [ox.adam, ox.adamw, ox.amsgrad, ox.nadam, ox.radam])
@pytest.mark.parametrize(("error", "arguments", "message"), COMMON_ERRORS)
def test_wrong_arguments_are_refused(make, error, arguments, message: str):
    with pytest.raises(error, match=message.format(make.__name__)):
        make(**{"learning_rate": 0.1, **arguments})


@pytest.mark.parametrize(
    ("make", "error", "arguments", "message"),
    [
        (ox.adam, ValueError, {"eps_root": -1.0}, "eps_root=-1.0 is not allowed"),
        (ox.amsgrad, ValueError, {"eps_root": -1.0}, "eps_root=-1.0 is not allowed"),
        (ox.adam, TypeError, {"nesterov": None}, "nesterov=None is not allowed"),
        (ox.adamw, TypeError, {"amsgrad": 1}, "amsgrad=1 is not allowed"),
        (ox.nadam, ValueError, {"momentum_decay": -1}, "momentum_decay=-1 is not"),
        (ox.radam, ValueError, {"threshold": 0.0}, "threshold=0.0 is not allowed"),
    ],
)
def test_wrong_arguments_of_one_are_refused(make, error, arguments, message: str):
    with pytest.raises(error, match=message):
        make(0.1, **arguments)


@pytest.mark.parametrize("make", [ox.adamw, ox.nadam, ox.radam])
@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"weight_decay": -1e-4}, "{}: weight_decay=-0.0001 .* >= 0"),
        (ValueError, {"weight_decay": float("nan")}, "{}: weight_decay=nan is not"),
        (TypeError, {"weight_decay": True}, "{}: weight_decay=True is not allowed"),
        (ValueError, {"decay": "l2"}, "decay='l2' is not allowed; .* 'decoupled'"),
    ],
)
def test_wrong_decay_is_refused(make, error, arguments, message: str):
    with pytest.raises(error, match=message.format(make.__name__)):
        make(0.1, **arguments)


@pytest.mark.parametrize("make", [ox.adamw, ox.nadam, ox.radam])
def test_masks_that_do_not_fit_are_refused(make):
    with pytest.raises(ValueError, match="descend: mask is not a prefix"):
        make(0.1, weight_decay=0.1, mask={"w": True}).init(PARAMS)
