"""Steps downhill: four forms of weight decay, schedules, masks, and no rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from optaxplus import MatrixAxes
from tests.assertions import assert_trees_close, assert_trees_equal
from tests.problems import gradients, normal_tree
from tests.references import weight_decay as reference
from tests.trajectories import run, updates_at

SHAPES = {"w": (3, 4), "b": (4,)}
PARAMS = normal_tree(SHAPES, seed=0)
UPDATES = normal_tree(SHAPES, seed=1)
FORMS = ("decoupled", "independent", "cautious", "proximal")


def apply(tx, updates, params=None):
    return tx.update(updates, tx.init(updates), params)[0]


# The forms


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("decoupled", [-0.1 * (3 + 1), -0.1 * (-3 + 1)]),
        ("independent", [-0.3 - 1, 0.3 - 1]),
        ("cautious", [-0.1 * (3 + 1), 0.3]),
        ("proximal", [(2 - 0.3) / 1.05 - 2, (2 + 0.3) / 1.05 - 2]),
    ],
)
def test_forms_by_hand(decay: str, expected):
    tx = ox.descend(0.1, 0.5, decay=decay)
    updates = apply(tx, jnp.asarray([3.0, -3.0]), jnp.asarray([2.0, 2.0]))
    # A few float32 roundings.
    np.testing.assert_allclose(updates, expected, rtol=5e-7)


@pytest.mark.parametrize("decay", FORMS)
def test_reference_in_float64(decay: str):
    p, u = (np.asarray(tree["w"], np.float64) for tree in (PARAMS, UPDATES))
    with jax.enable_x64(True):
        tx = ox.descend(0.3, 0.7, decay=decay)
        updates = apply(tx, jnp.asarray(u), jnp.asarray(p))
        assert updates.dtype == jnp.float64
    expected = reference.descend(p, u, 0.3, 0.7, decay) - p
    # Float64 roundings of numbers of about 1.
    np.testing.assert_allclose(updates, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("decay", FORMS)
def test_without_decay_every_form_is_a_learning_rate(decay: str):
    expected = apply(optax.scale_by_learning_rate(0.1), UPDATES)
    assert_trees_equal(apply(ox.descend(0.1, decay=decay), UPDATES), expected)
    # A decay that is 0 only when the program runs.
    traced = ox.descend(0.1, jnp.zeros(()), decay=decay)
    assert_trees_equal(apply(traced, UPDATES, PARAMS), expected)


def test_decoupled_is_optax():
    theirs = optax.chain(
        optax.add_decayed_weights(0.7), optax.scale_by_learning_rate(0.3)
    )
    # Float32 roundings.
    assert_trees_close(
        apply(ox.descend(0.3, 0.7), UPDATES, PARAMS),
        theirs.update(UPDATES, theirs.init(PARAMS), PARAMS)[0],
        rtol=3e-7,
    )


def test_cautious_decay_where_something_is_zero():
    # Nothing to disagree with: a step of 0 decays, whatever its sign; a parameter of 0
    # has nothing to lose.
    u = jnp.asarray([0.0, -0.0, 0.0, 1.0, -1.0])
    p = jnp.asarray([2.0, 2.0, -2.0, 0.0, 0.0])
    updates = apply(ox.descend(0.5, 0.5, decay="cautious"), u, p)
    np.testing.assert_array_equal(updates, [-0.5, -0.5, 0.5, -0.5, 0.5])


def test_cautious_decay_of_complex_parameters():
    # The real part of u·conj(p): the angle between them is below 90 degrees or not.
    p = jnp.asarray([2j, 2j, 1 + 1j, 1 + 1j], jnp.complex64)
    u = jnp.asarray([1 + 1j, 1 - 1j, 2.0, -2.0], jnp.complex64)
    updates = apply(ox.descend(0.5, 0.5, decay="cautious"), u, p)
    expected = -0.5 * (np.asarray(u) + 0.5 * np.asarray(p) * [1, 0, 1, 0])
    # Powers of two are exact.
    np.testing.assert_array_equal(updates, expected.astype(np.complex64))


def test_proximal_decay_never_crosses_zero():
    p = jnp.asarray([1.0, -1.0])
    updates = apply(ox.descend(1.0, 1e6, decay="proximal"), jnp.zeros(2), p)
    # A quotient and a sum: 1 less a millionth.
    np.testing.assert_allclose(p + updates, p / (1 + 1e6), atol=1.2e-7)
    assert (np.asarray(p + updates) * p >= 0).all()


def test_independent_decay_ignores_the_learning_rate():
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    for rate in (0.0, 1e-3, 10.0):
        updates = apply(ox.descend(rate, 0.25, decay="independent"), zeros, PARAMS)
        assert_trees_equal(updates, jax.tree.map(lambda p: -0.25 * p, PARAMS))


# Schedules


def test_schedules_of_both():
    tx = ox.descend(lambda step: 1.0 / (step + 1), lambda step: 0.5 * step)
    p, u = jnp.asarray([2.0]), jnp.asarray([4.0])
    state = tx.init(p)
    assert isinstance(state, ox.DescendState)
    assert (state.count.dtype, state.count.weak_type) == (jnp.int32, False)
    expected = [-4.0, -(4 + 1) / 2, -(4 + 2) / 3]
    for step, value in enumerate(expected):
        assert state.count == step
        updates, state = tx.update(u, state, p)
        # A few float32 roundings.
        np.testing.assert_allclose(updates, [value], rtol=3e-7)


@pytest.mark.parametrize(
    "arguments",
    [
        (optax.linear_schedule(0.1, 0.0, 4), 0.3),
        (0.1, optax.linear_schedule(0.3, 0.0, 4)),
    ],
)
def test_one_schedule(arguments):
    grads = [UPDATES] * 4
    updates, state = run(ox.descend(*arguments), PARAMS, grads)
    assert state.count == 4
    for step, u in enumerate(updates):
        fixed = [x(step) if callable(x) else x for x in arguments]
        # Float32 roundings of a traced and a Python number.
        expected = apply(ox.descend(*fixed), UPDATES, PARAMS)
        assert_trees_close(u, expected, rtol=3e-7)


def test_state_is_empty_without_schedules():
    for arguments in ((0.1,), (0.1, 0.5), (jnp.float32(0.1), jnp.float32(0.5))):
        assert ox.descend(*arguments).init(PARAMS) == optax.EmptyState()


def test_a_schedule_of_decay_needs_params():
    # Even one that returns 0.
    tx = ox.descend(0.1, lambda step: 0.0)
    with pytest.raises(ValueError, match="descend: params=None is not allowed"):
        apply(tx, UPDATES)


# Masks

MASKS = {
    "tree": {"w": True, "b": False},
    "function": lambda params: jax.tree.map(lambda p: p.ndim == 2, params),
    "decay_mask": ox.decay_mask,
    "numpy": {"w": np.True_, "b": np.False_},
}


@pytest.mark.parametrize("decay", FORMS)
@pytest.mark.parametrize("mask", MASKS)
def test_mask(decay: str, mask: str):
    tx = ox.descend(0.1, 0.5, mask=MASKS[mask], decay=decay)
    expected = {
        "w": apply(ox.descend(0.1, 0.5, decay=decay), UPDATES, PARAMS)["w"],
        "b": apply(ox.descend(0.1), UPDATES)["b"],
    }
    assert_trees_equal(apply(tx, UPDATES, PARAMS), expected)


def test_a_prefix_is_enough():
    params, updates = ({"x": tree, "y": [tree]} for tree in (PARAMS, UPDATES))
    tx = ox.descend(0.1, 0.5, mask={"x": True, "y": False})
    result = apply(tx, updates, params)
    assert_trees_equal(result["x"], apply(ox.descend(0.1, 0.5), UPDATES, PARAMS))
    assert_trees_equal(result["y"], [apply(ox.descend(0.1), UPDATES)])


def test_decay_mask():
    params = {
        "embed": {"embedding": jnp.ones((5, 4))},
        "layers": {"kernel": jnp.ones((2, 4, 3)), "bias": jnp.ones((2, 3))},
        "norm": {"scale": jnp.ones((2, 4))},
        "temperature": jnp.ones(()),
    }
    expected = {
        "embed": {"embedding": True},
        "layers": {"kernel": True, "bias": False},
        "norm": {"scale": False},
        "temperature": False,
    }
    assert ox.decay_mask(params) == expected
    abstract = jax.eval_shape(lambda: params)
    assert ox.decay_mask(abstract) == expected
    mine = ox.Rule("^embed/", MatrixAxes((), (0, 1)), "vector")
    changed = {**expected, "embed": {"embedding": False}}
    assert ox.decay_mask(params, (mine, *ox.DEFAULT_RULES)) == changed
    with pytest.raises(ValueError, match="'x/kernel'"):
        ox.decay_mask({"x": {"kernel": jnp.ones((2, 3, 4))}})


# Precision


@pytest.mark.parametrize("decay", FORMS)
@pytest.mark.parametrize("make", [float, jnp.float32], ids=["python", "array"])
def test_rate_and_decay_are_not_rounded(decay: str, make):
    # bfloat16 would make 1.001 of 1 and lose a decay of 1e-3 beside a step of 1.
    narrow = jnp.asarray([1.0, -1.0], jnp.bfloat16), jnp.asarray([3.0], jnp.bfloat16)
    u, p = narrow
    tx = ox.descend(make(1.001), make(1e-3), decay=decay)
    updates = apply(tx, u, jnp.broadcast_to(p, 2))
    assert updates.dtype == jnp.float32
    wide = np.asarray([1.0, -1.0]), np.asarray([3.0, 3.0])
    expected = reference.descend(wide[1], wide[0], 1.001, 1e-3, decay) - wide[1]
    # A few float32 roundings.
    np.testing.assert_allclose(updates, expected, rtol=3e-7)


def test_rates_of_64_bits_leave_float32_alone():
    with jax.enable_x64(True):
        rate, decay = jnp.float64(0.1), jnp.float64(0.5)
        assert not rate.weak_type
        tx = ox.descend(rate, lambda step: decay)
        assert (
            apply(tx, jnp.ones(2, "float32"), jnp.ones(2, "float32")).dtype == "float32"
        )


def test_injected_hyper_parameters():
    tx = optax.inject_hyperparams(ox.descend)(0.1, 0.5)
    static = ox.descend(0.1, 0.5)
    grads = jax.tree.map(lambda *g: jnp.stack(g), *gradients(SHAPES, steps=2))
    # Float32 roundings.
    assert_trees_close(
        updates_at(tx, PARAMS, grads), updates_at(static, PARAMS, grads), rtol=3e-7
    )


# Errors


def test_params_are_needed_for_decay_alone():
    apply(ox.descend(0.1), UPDATES)
    with pytest.raises(ValueError, match="descend: params=None is not allowed"):
        apply(ox.descend(0.1, 0.5), UPDATES)


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"learning_rate": -0.1}, "learning_rate=-0.1 .* >= 0"),
        (TypeError, {"learning_rate": None}, "learning_rate=None is not allowed"),
        (ValueError, {"weight_decay": -1}, "weight_decay=-1 is not allowed; .* >= 0"),
        (ValueError, {"weight_decay": float("nan")}, "weight_decay=nan is not"),
        (TypeError, {"weight_decay": "0"}, "weight_decay='0' is not .* schedule"),
        (
            ValueError,
            {"decay": "l2"},
            "decay='l2' is not allowed; it must be one of 'decoupled', 'independent', "
            "'cautious', 'proximal'",
        ),
        (ValueError, {"decay": None}, "decay=None is not allowed"),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message: str):
    with pytest.raises(error, match=f"descend: {message}"):
        ox.descend(**{"learning_rate": 0.1, **arguments})


@pytest.mark.parametrize(
    ("error", "mask", "message"),
    [
        (TypeError, {"w": 1, "b": True}, "descend: mask=1 at 'w' is not allowed"),
        (TypeError, lambda params: "all", "descend: mask='all' is not allowed"),
        (ValueError, {"w": True}, "descend: mask is not a prefix"),
    ],
)
def test_wrong_masks_are_refused_at_init(error, mask, message: str):
    with pytest.raises(error, match=message):
        ox.descend(0.1, 0.5, mask=mask).init(PARAMS)


def test_wrong_parameters_are_refused():
    message = "descend: parameter 'n' of dtype int32 is not allowed"
    with pytest.raises(TypeError, match=message):
        ox.descend(0.1).init({"n": jnp.ones(2, jnp.int32)})


def test_a_mask_taken_for_a_schedule_says_so():
    # optax.inject_hyperparams calls a function among the arguments with the step.
    params = {"w": jnp.ones((2, 3))}
    tx = optax.inject_hyperparams(ox.adamw)(learning_rate=0.1, mask=ox.decay_mask)
    with pytest.raises(TypeError, match=r"decay_mask: .*static_args=\('mask',\)"):
        tx.init(params)


def test_undecided_parameters_of_a_mask_name_the_remedy():
    with pytest.raises(ValueError, match=r"functools\.partial\(ox\.decay_mask"):
        ox.adamw(0.1, mask=ox.decay_mask).init({"w": jnp.ones((2, 3, 4))})


def test_a_mask_is_checked_although_nothing_decays():
    with pytest.raises(TypeError, match="mask=3 at 'w' is not allowed"):
        ox.descend(0.1, mask={"w": 3}).init({"w": jnp.ones(2)})


@pytest.mark.parametrize("argument", ["learning_rate", "weight_decay"])
def test_schedules_of_vectors_are_refused(argument: str):
    # They would broadcast over the columns of some parameters.
    arguments = {"learning_rate": 0.1, argument: lambda step: jnp.ones(3)}
    tx, params = ox.descend(**arguments), jnp.ones((2, 3))
    with pytest.raises(
        ValueError, match=rf"descend: {argument}\(step\) of shape \(3,\)"
    ):
        tx.update(params, tx.init(params), params)
