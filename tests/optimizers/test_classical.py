"""What is specific to SGD, AdaGrad and RMSProp."""

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
GOLDEN = [case for case in GOLDEN_CASES if case.method in ("sgd", "adagrad", "rmsprop")]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.name)
def test_golden_numbers(case: GoldenCase):
    tx = getattr(ox, case.method)(**case.arguments)
    trajectory = follow_in_float64(tx, case.params, case.grads)
    # Half a unit of the last decimal printed; float64 itself errs by 1e-15.
    atol = 0.505 * 10.0**-case.decimals
    np.testing.assert_allclose(trajectory[-1], case.expected, rtol=0, atol=atol)


OPTAX = {
    "sgd": (ox.sgd(0.1), optax.sgd(0.1)),
    "momentum": (ox.sgd(0.1, momentum=0.9), optax.sgd(0.1, momentum=0.9)),
    "nesterov": (
        ox.sgd(0.1, momentum=0.9, nesterov=True),
        optax.sgd(0.1, momentum=0.9, nesterov=True),
    ),
    "adagrad": (
        ox.adagrad(0.1, initial_accumulator=0.1, eps=0.0, eps_root=1e-7),
        optax.adagrad(0.1),
    ),
    "rmsprop": (ox.rmsprop(0.1, b2=0.9, eps=0.0, eps_root=1e-8), optax.rmsprop(0.1)),
    "rmsprop_centered": (
        ox.rmsprop(0.1, b2=0.9, eps=0.0, eps_root=1e-8, centered=True),
        optax.rmsprop(0.1, centered=True),
    ),
    # At a constant learning rate it does not matter on which side of the momentum.
    "rmsprop_momentum": (
        ox.rmsprop(0.1, b2=0.9, eps=0.0, eps_root=1e-8, momentum=0.9),
        optax.rmsprop(0.1, momentum=0.9),
    ),
}


@pytest.mark.parametrize("name", OPTAX)
def test_optax(name: str):
    ours, theirs = (follow(tx, PARAMS, GRADS)[0] for tx in OPTAX[name])
    # Float32 roundings; optax multiplies by the learning rate with another sign.
    assert_trees_close(ours, theirs, rtol=2e-6)


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


@pytest.mark.parametrize("make", [ox.sgd, ox.adagrad, ox.rmsprop])
def test_decay_needs_params(make):
    tx = make(0.1)
    tx.update(PARAMS, tx.init(PARAMS))
    tx = make(0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match=f"{make.__name__}: params=None is not"):
        tx.update(PARAMS, tx.init(PARAMS))


# AdaGrad and RMSProp


@pytest.mark.parametrize(
    ("make", "link"),
    [
        (
            lambda **decay: ox.adagrad(
                0.1, initial_accumulator=0.5, eps=0.1, eps_root=0.2, **decay
            ),
            ox.scale_by_adagrad(initial_accumulator=0.5, eps=0.1, eps_root=0.2),
        ),
        (
            lambda **decay: ox.rmsprop(
                0.1,
                b2=0.8,
                eps=0.1,
                eps_root=0.2,
                centered=True,
                momentum=0.7,
                **decay,
            ),
            optax.chain(
                ox.scale_by_rmsprop(0.8, eps=0.1, eps_root=0.2, centered=True),
                ox.scale_by_momentum(0.7),
            ),
        ),
    ],
    ids=["adagrad", "rmsprop"],
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_every_argument_reaches_its_link(make, link, weight_decay: float):
    # Decay is a gradient: it passes through all links.
    chain = optax.chain(optax.add_decayed_weights(weight_decay), link, ox.descend(0.1))
    # The same operations; fusion may order them differently.
    assert_trees_close(
        follow(make(weight_decay=weight_decay), PARAMS, GRADS)[0],
        follow(chain, PARAMS, GRADS)[0],
        rtol=2e-6,
    )


def test_schedule_of_adagrad_is_the_decay_of_pytorch():
    # lr / (1 + step·lr_decay), with a sign of constant gradients over sqrt(t).
    tx = ox.adagrad(lambda step: 0.1 / (1 + step * 0.5), eps=1e-30)
    _, updates = follow(tx, jnp.zeros(1), jnp.full((4, 1), 3.0))
    expected = [-0.1 / (1 + 0.5 * step) / (step + 1) ** 0.5 for step in range(4)]
    # Float32 roundings.
    np.testing.assert_allclose(np.ravel(updates), expected, rtol=5e-7)


def test_schedule_of_rmsprop_stays_outside_the_momentum():
    def rate(step):
        return jnp.where(step < 2, 0.1, 0.0)

    params, _ = follow(ox.rmsprop(rate, momentum=0.9), PARAMS["w"], GRADS["w"])
    np.testing.assert_array_equal(params[2:], np.broadcast_to(params[1], (3, 3, 4)))
    # optax's momentum goes on.
    theirs, _ = follow(optax.rmsprop(rate, momentum=0.9), PARAMS["w"], GRADS["w"])
    assert np.abs(theirs[2] - theirs[1]).max() > 0.01


def test_state_of_rmsprop():
    def sizes(**arguments):
        return len(jax.tree.leaves(ox.rmsprop(0.1, **arguments).init(PARAMS["w"])))

    # The momentum counts its steps.
    assert [sizes(), sizes(centered=True), sizes(momentum=0.9)] == [1, 2, 3]
    state = ox.rmsprop(
        0.1, centered=True, momentum=0.9, mu_dtype="bfloat16", nu_dtype="float16"
    ).init(PARAMS["w"])
    dtypes = {name: optax.tree.get(state, name).dtype for name in ("mu", "nu", "trace")}
    assert dtypes == {"mu": "bfloat16", "nu": "float16", "trace": "bfloat16"}


@pytest.mark.parametrize("make", [ox.adagrad, ox.rmsprop])
@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"learning_rate": -0.1}, "{}: learning_rate=-0.1 .* >= 0"),
        (TypeError, {"learning_rate": None}, "{}: learning_rate=None is not"),
        (ValueError, {"weight_decay": -0.1}, "{}: weight_decay=-0.1 .* >= 0"),
        (TypeError, {"weight_decay": lambda step: 0.1}, "{}: weight_decay=<function"),
        (ValueError, {"eps": 0.0}, "eps=0.0 is not allowed; eps or eps_root must be"),
        (ValueError, {"eps_root": -1.0}, "eps_root=-1.0 is not allowed"),
        (TypeError, {"nu_dtype": "int8"}, "nu_dtype='int8' is not allowed"),
    ],
)
def test_wrong_arguments_of_both_are_refused(make, error, arguments, message: str):
    with pytest.raises(error, match=message.format(make.__name__)):
        make(**{"learning_rate": 0.1, **arguments})


@pytest.mark.parametrize(
    ("make", "error", "arguments", "message"),
    [
        (
            ox.adagrad,
            ValueError,
            {"initial_accumulator": -1},
            "initial_acc.*=-1 is not",
        ),
        (ox.rmsprop, ValueError, {"b2": 1.0}, r"b2=1.0 is not allowed; .*\[0, 1\)"),
        (ox.rmsprop, ValueError, {"momentum": 1.0}, "momentum=1.0 is not allowed"),
        (ox.rmsprop, TypeError, {"centered": 1}, "centered=1 is not allowed"),
        (ox.rmsprop, TypeError, {"mu_dtype": "int8"}, "mu_dtype='int8' is not"),
    ],
)
def test_wrong_arguments_of_one_are_refused(make, error, arguments, message: str):
    with pytest.raises(error, match=message):
        make(0.1, **arguments)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_integer_parameters_are_refused(momentum: float):
    with pytest.raises(TypeError, match="parameter 'n' of dtype int32 is not allowed"):
        ox.sgd(0.1, momentum=momentum).init({"n": jnp.ones(2, jnp.int32)})
