"""Signs, and Lion's sign of a mixture."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from tests.assertions import assert_trees_equal
from tests.problems import gradients, normal_tree
from tests.references.sign import lion
from tests.trajectories import follow_in_float64, updates_at

SHAPES = {"w": (3, 4), "b": (4,), "s": ()}
STEPS = 6
PARAMS = normal_tree(SHAPES, seed=0)
GRADS = jax.tree.map(lambda *g: jnp.stack(g), *gradients(SHAPES, steps=STEPS))


# Agreement


@pytest.mark.parametrize(
    "arguments", [{}, {"b1": 0.0}, {"b1": 0.95, "b2": 0.5}], ids=str
)
def test_lion_reference(arguments):
    tx = optax.chain(ox.scale_by_lion(**arguments), optax.scale(-0.1))
    expected = lion(PARAMS["w"], GRADS["w"], learning_rate=0.1, **arguments)
    # Float64 roundings of sums of six steps.
    np.testing.assert_allclose(
        follow_in_float64(tx, PARAMS["w"], GRADS["w"]), expected, atol=1e-14
    )
    # Signs are exact; no mixture of these gradients is as small as a rounding.
    updates = updates_at(ox.scale_by_lion(**arguments), PARAMS["w"], GRADS["w"])
    steps = np.diff(np.stack([np.asarray(PARAMS["w"], np.float64), *expected]), axis=0)
    np.testing.assert_array_equal(updates, np.round(-steps / 0.1))


# Reductions


@pytest.mark.parametrize("arguments", [{}, {"b1": 0.5, "b2": 0.8}], ids=str)
def test_lion_is_optax(arguments):
    assert_trees_equal(
        updates_at(ox.scale_by_lion(**arguments), PARAMS, GRADS),
        updates_at(optax.scale_by_lion(**arguments), PARAMS, GRADS),
    )


@pytest.mark.parametrize(
    ("b1", "b2"), [(0.9, 0.99), (0.5, 0.5001), (0.9, 0.1), (0.9, 0.0)]
)
def test_lion_resolves_what_float32_resolves(b1: float, b2: float):
    average = normal_tree((10_000,), seed=2)
    tail = 1 + 1e-6 * normal_tree((10_000,), seed=3)
    grads = -b1 / (1 - b1) * average * tail
    tx = ox.scale_by_lion(b1, b2)
    state = tx.init(average)._replace(mu=average)
    terms = b1 * np.float64(average), (1 - b1) * np.float64(grads)
    for update in (tx.update, jax.jit(tx.update)):
        signs, _ = update(grads, state)
        wrong = np.asarray(signs) != np.sign(sum(terms))
        # Each term is rounded by up to 2^-24 of itself, and their sum once more.
        assert np.all((np.abs(sum(terms)) <= 2.0**-23 * np.abs(terms[0]) * 2)[wrong])


def test_traced_rates_are_the_same_lion():
    traced = optax.inject_hyperparams(ox.scale_by_lion)(b1=0.9, b2=0.99)
    assert_trees_equal(
        updates_at(traced, PARAMS, GRADS),
        updates_at(ox.scale_by_lion(0.9, 0.99), PARAMS, GRADS),
    )


def test_lion_without_averages_is_the_sign():
    assert_trees_equal(
        updates_at(ox.scale_by_lion(0.0, 0.0), PARAMS, GRADS),
        updates_at(ox.scale_by_sign(), PARAMS, GRADS),
    )


def test_lion_of_equal_rates_is_signum():
    signum = optax.chain(ox.scale_by_ema(0.9), ox.scale_by_sign())
    assert_trees_equal(
        updates_at(ox.scale_by_lion(0.9, 0.9), PARAMS, GRADS),
        updates_at(signum, PARAMS, GRADS),
    )


def test_sign_is_numpy_sign():
    expected = jax.tree.map(lambda g: np.sign(np.asarray(g)), GRADS)
    assert_trees_equal(updates_at(ox.scale_by_sign(), PARAMS, GRADS), expected)


# Invariances


@pytest.mark.parametrize("tx", [ox.scale_by_sign(), ox.scale_by_lion()])
@pytest.mark.parametrize("power", [-70, 70])
def test_scale_does_not_matter(tx, power: int):
    scaled = jax.tree.map(lambda g: g * 2.0**power, GRADS)
    expected = updates_at(tx, PARAMS, GRADS)
    assert_trees_equal(updates_at(tx, PARAMS, scaled), expected)
    assert all(np.isin(u, (-1.0, 1.0)).all() for u in jax.tree.leaves(expected))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("tx", [ox.scale_by_sign(), ox.scale_by_lion()])
def test_low_precision_gradients_are_not_rounded_again(tx, dtype: str):
    narrow = jax.tree.map(lambda g: g.astype(dtype), GRADS)
    wide = jax.tree.map(lambda g: g.astype(jnp.float32), narrow)
    low = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    assert_trees_equal(updates_at(tx, low, narrow), updates_at(tx, PARAMS, wide))


def test_bfloat16_average():
    tx = ox.scale_by_lion(mu_dtype="bfloat16")
    grads = jnp.asarray([[1.0], [1.0], [1.0]])
    state = tx.init(grads[0])
    for g, expected in zip(grads, (0.01, 0.0199, 0.029701), strict=True):
        _, state = tx.update(g, state)
        assert state.mu.dtype == jnp.bfloat16
        # One rounding of 2^-9 a step.
        np.testing.assert_allclose(np.float64(state.mu), expected, rtol=3 * 2**-9)


@pytest.mark.parametrize("tx", [ox.scale_by_sign(), ox.scale_by_lion(0.0, 0.0)])
def test_complex_sign_is_the_phase(tx):
    grads = jnp.asarray([[3.0 + 4.0j, -2.0j, 0.0, 5.0]], jnp.complex64)
    updates = updates_at(tx, grads[0], grads)
    # Float32 roundings.
    np.testing.assert_allclose(updates, [[0.6 + 0.8j, -1j, 0, 1]], atol=1e-6)


# Limits


@pytest.mark.parametrize("tx", [ox.scale_by_sign(), ox.scale_by_lion()])
def test_zero_gradients_give_zero(tx):
    zeros = jax.tree.map(jnp.zeros_like, GRADS)
    assert_trees_equal(updates_at(tx, PARAMS, zeros), zeros)


@pytest.mark.parametrize("tx", [ox.scale_by_sign(), ox.scale_by_lion()])
def test_infinities_have_a_sign_and_nan_has_none(tx):
    updates = updates_at(tx, jnp.ones(3), jnp.asarray([[jnp.inf, -jnp.inf, jnp.nan]]))
    np.testing.assert_array_equal(updates, [[1.0, -1.0, np.nan]])


@pytest.mark.parametrize("tx", [ox.scale_by_sign(), ox.scale_by_lion()])
def test_empty_none_and_masked_leaves_pass(tx):
    params = {"none": None, "masked": optax.MaskedNode(), "empty": jnp.zeros((0, 3))}
    updates, _ = tx.update(params, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert updates["empty"].shape == (0, 3)


def test_the_average_is_mixed_after_the_step():
    # The sign reads b1 = 0.9 of the average, the average keeps b2 = 0.99 of itself.
    tx = ox.scale_by_lion()
    _, state = tx.update(jnp.asarray([1.0]), tx.init(jnp.ones(1)))
    # One float32 rounding; 0.1 if b1 were used.
    np.testing.assert_allclose(state.mu, [0.01], rtol=1e-6)
    # 0.9·0.01 - 0.1·0.085 > 0, whereas the updated average is 0.99·0.01 - 0.00085 and
    # its mixture with b2 for b1 would be positive for gradients down to -0.99.
    up, _ = tx.update(jnp.asarray([-0.085]), state)
    down, _ = tx.update(jnp.asarray([-0.095]), state)
    np.testing.assert_array_equal(jnp.stack([up, down]), [[1.0], [-1.0]])


# Errors


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"b1": 1.0}, r"scale_by_lion: b1=1.0 is not allowed; .* \[0, 1\)"),
        (ValueError, {"b2": -0.5}, "scale_by_lion: b2=-0.5 is not allowed"),
        (ValueError, {"b2": float("nan")}, "scale_by_lion: b2=nan is not allowed"),
        (TypeError, {"b1": "0.9"}, "scale_by_lion: b1='0.9' is not allowed"),
        (TypeError, {"b2": False}, "scale_by_lion: b2=False is not allowed"),
        (TypeError, {"mu_dtype": int}, "scale_by_lion: mu_dtype=.* floating-point"),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message: str):
    with pytest.raises(error, match=message):
        ox.scale_by_lion(**arguments)


@pytest.mark.parametrize("function", [ox.scale_by_sign, ox.scale_by_lion])
def test_wrong_parameters_are_refused(function):
    message = f"{function.__name__}: parameter 'n' of dtype bool is not allowed"
    with pytest.raises(TypeError, match=message):
        function().init({"n": jnp.ones(2, bool)})


def test_complex_average_has_no_narrow_dtype():
    with pytest.raises(TypeError, match="scale_by_lion: a moment dtype of bfloat16"):
        ox.scale_by_lion(mu_dtype="bfloat16").init(jnp.ones(2, jnp.complex64))
