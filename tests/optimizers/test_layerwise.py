"""What is specific to LARS and LAMB."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from optaxplus import MatrixAxes
from tests.assertions import assert_trees_close
from tests.problems import gradients, normal_tree
from tests.references.golden import GOLDEN_CASES
from tests.references.layerwise import lars
from tests.trajectories import follow, follow_in_float64

SHAPES = {"w": (3, 4), "b": (4,)}
PARAMS = normal_tree(SHAPES, seed=0)
GRADS = jax.tree.map(lambda *g: jnp.stack(g), *gradients(SHAPES, steps=5))
STACK = MatrixAxes((-2,), (-1,))


def golden(name: str):
    (case,) = [case for case in GOLDEN_CASES if case.name == name]
    return case


def test_golden_numbers_of_lamb():
    case = golden("lamb")
    trajectory = follow_in_float64(ox.lamb(**case.arguments), case.params, case.grads)
    # Half a unit of the last decimal printed; float64 itself errs by 1e-15.
    atol = 0.505 * 10.0**-case.decimals
    np.testing.assert_allclose(trajectory[-1], case.expected, rtol=0, atol=atol)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_lars_is_that_of_the_paper(weight_decay: float, nesterov: bool):
    arguments = {
        "momentum": 0.8,
        "nesterov": nesterov,
        "weight_decay": weight_decay,
        "trust_coefficient": 0.05,
        "eps": 0.1,
    }

    def schedule(step):
        return 0.5 / (1 + step)

    tx = ox.lars(schedule, **arguments)
    for name in SHAPES:
        params, grads = PARAMS[name], GRADS[name]
        expected = lars(params, grads, learning_rate=schedule, **arguments)
        # Float64 roundings. The schedule acts on each gradient when it arrives.
        np.testing.assert_allclose(
            follow_in_float64(tx, params, grads), expected, rtol=1e-12
        )


def test_lars_without_decay_is_optax():
    arguments = {"momentum": 0.8, "trust_coefficient": 0.05}
    ours, _ = follow(ox.lars(0.5, **arguments), PARAMS, GRADS)
    theirs, _ = follow(optax.lars(0.5, **arguments), PARAMS, GRADS)
    # Float32 roundings.
    assert_trees_close(ours, theirs, rtol=1e-6)


def test_lars_with_decay_is_not_optax():
    # optax takes the norm of g + λ·w, the paper ‖g‖ + λ·‖w‖; both are right where g and
    # w point the same way.
    case = golden("lars_optax")
    arguments = {"learning_rate": 1.0, "weight_decay": 0.1}
    trajectory = follow_in_float64(ox.lars(**arguments), case.params, case.grads)
    assert np.abs(trajectory[-1] - case.expected).max() > 1e-4
    parallel = jax.tree.map(lambda p: jnp.stack([3.0 * p]), PARAMS)
    ours, _ = follow(ox.lars(**arguments), PARAMS, parallel)
    theirs, _ = follow(optax.lars(**arguments), PARAMS, parallel)
    # Float32 roundings.
    assert_trees_close(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"b1": 0.8, "b2": 0.9, "eps": 0.1, "weight_decay": 0.3},
        {"weight_decay": 0.3, "mask": {"w": True, "b": False}},
    ],
    ids=str,
)
def test_lamb_is_optax(arguments):
    ours, _ = follow(ox.lamb(0.1, **arguments), PARAMS, GRADS)
    theirs, _ = follow(optax.lamb(0.1, **arguments), PARAMS, GRADS)
    # Float32 roundings; optax's 1 - 0.999**t is a common factor that the ratio cancels.
    assert_trees_close(ours, theirs, rtol=1e-5)


def test_a_step_of_lamb_has_the_relative_length_of_the_learning_rate():
    params, updates = follow(ox.lamb(0.1, weight_decay=0.3), PARAMS, GRADS)
    for name in SHAPES:
        before = np.concatenate([PARAMS[name][None], params[name][:-1]]).reshape(5, -1)
        steps = np.asarray(updates[name]).reshape(5, -1)
        ratio = np.linalg.norm(steps, axis=1) / np.linalg.norm(before, axis=1)
        # Float32 roundings.
        np.testing.assert_allclose(ratio, np.full(5, 0.1), rtol=1e-5)


@pytest.mark.parametrize("make", [ox.lars, ox.lamb])
@pytest.mark.parametrize("power", [-20, 20])
def test_scale_of_the_gradient_does_not_matter(make, power: int):
    scaled = jax.tree.map(lambda g: g * 2.0**power, GRADS)
    # lamb's eps is no longer nothing beside gradients of 1e-6: it gets a smaller one.
    tx = make(0.1, **({"eps": 1e-20} if make is ox.lamb else {}))
    # Float32 roundings.
    assert_trees_close(
        follow(tx, PARAMS, scaled)[0], follow(tx, PARAMS, GRADS)[0], rtol=1e-5
    )


@pytest.mark.parametrize("make", [ox.lars, ox.lamb])
def test_every_layer_of_a_stack_has_its_own_ratio(make):
    scales = jnp.asarray([1e-2, 1.0, 1e2]).reshape(3, 1, 1)
    params = normal_tree((3, 2, 4), seed=2) * scales
    grads = jnp.stack(gradients((3, 2, 4), steps=3)) / scales
    stack, _ = follow(make(0.1, weight_decay=0.1, axes=STACK), params, grads)
    slices = [
        follow(make(0.1, weight_decay=0.1), params[i], grads[:, i])[0] for i in range(3)
    ]
    for index, one in enumerate(slices):
        # Float32 sums in another order.
        assert_trees_close(stack[:, index], one, rtol=2e-6)


ERRORS = [
    (ValueError, {"learning_rate": -0.1}, "{}: learning_rate=-0.1 is not allowed"),
    (TypeError, {"learning_rate": False}, "{}: learning_rate=False is not allowed"),
    (ValueError, {"weight_decay": -1.0}, "weight_decay=-1.0 is not allowed; .* >= 0"),
    (ValueError, {"eps": -1.0}, "eps=-1.0 is not allowed; .* >= 0"),
    (TypeError, {"mu_dtype": "int8"}, "mu_dtype='int8' is not allowed"),
]
LARS_ERRORS = [
    (ValueError, {"momentum": 1.0}, r"momentum=1.0 is not allowed; .* \[0, 1\)"),
    (ValueError, {"trust_coefficient": 0.0}, "trust_coefficient=0.0 is not allowed"),
    (TypeError, {"nesterov": 1}, "nesterov=1 is not allowed"),
    (ValueError, {"momentum": 0.0, "nesterov": True}, "nesterov=True is not allowed"),
]
LAMB_ERRORS = [
    (ValueError, {"b1": 1.0}, "b1=1.0 is not allowed"),
    (ValueError, {"b2": float("nan")}, "b2=nan is not allowed"),
    (ValueError, {"eps": 0.0}, "eps or eps_root must be > 0"),
    (ValueError, {"eps_root": -1.0}, "eps_root=-1.0 is not allowed"),
    (TypeError, {"nu_dtype": None}, "nu_dtype=None is not allowed"),
]


@pytest.mark.parametrize(
    ("make", "error", "arguments", "message"),
    [(ox.lars, *row) for row in ERRORS + LARS_ERRORS]
    + [(ox.lamb, *row) for row in ERRORS + LAMB_ERRORS],
)
def test_wrong_arguments_are_refused(make, error, arguments, message: str):
    with pytest.raises(error, match=message.format(make.__name__)):
        make(**{"learning_rate": 0.1, **arguments})


@pytest.mark.parametrize("make", [ox.lars, ox.lamb])
def test_params_are_needed(make):
    tx = make(0.1)
    with pytest.raises(ValueError, match=r"params"):
        tx.update(PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize("make", [ox.lars, ox.lamb])
def test_axes_that_do_not_fit_are_refused(make):
    message = r"trust_ratio: parameter 'b': .* axis -2 is out of range"
    with pytest.raises(ValueError, match=message):
        make(0.1, axes=STACK).init(PARAMS)


def test_masks_of_lamb_are_checked():
    params = {"w": jnp.ones((2, 3))}
    for name in ("mask", "trust_mask"):
        with pytest.raises(TypeError, match="mask='yes' at 'w' is not allowed"):
            ox.lamb(0.1, weight_decay=0.1, **{name: {"w": "yes"}}).init(params)
    with pytest.raises(ValueError, match="lamb: clip_norm=0 is not allowed"):
        ox.lamb(0.1, clip_norm=0)
