"""AdaGrad's direction: sums by hand, what it reduces to, and where it stops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from tests.assertions import assert_finite, assert_trees_close, assert_trees_equal
from tests.problems import gradients, normal_tree
from tests.trajectories import run, updates_at

SHAPES = {"w": (3, 4), "b": (4,), "s": ()}
STEPS = 6
PARAMS = normal_tree(SHAPES, seed=0)
GRADS = jax.tree.map(lambda *g: jnp.stack(g), *gradients(SHAPES, steps=STEPS))


# By hand


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # s = 9, 25
        ({}, [1.0, 4 / 5]),
        # s = 16 + 9, 16 + 25
        ({"initial_accumulator": 16.0}, [3 / 5, 4 / 41**0.5]),
        ({"eps": 2.0}, [3 / 5, 4 / 7]),
        ({"eps": 0.0, "eps_root": 7.0}, [3 / 4, 4 / 32**0.5]),
    ],
    ids=str,
)
def test_two_steps_by_hand(arguments, expected):
    grads = jnp.asarray([[3.0], [4.0]])
    updates = updates_at(ox.scale_by_adagrad(**arguments), jnp.ones(1), grads)
    # A root and a quotient in float32.
    np.testing.assert_allclose(np.ravel(updates), expected, rtol=3e-7)


def test_constant_gradients_slow_down_like_the_root_of_the_steps():
    constant = jax.tree.map(lambda g: jnp.broadcast_to(g[:1], g.shape), GRADS)
    first = jax.tree.map(lambda g: g[0], constant)
    updates, state = run(ox.scale_by_adagrad(eps=1e-30), PARAMS, [first] * STEPS)
    for t, u in enumerate(updates, start=1):
        expected = jax.tree.map(lambda g, t=t: jnp.sign(g) / t**0.5, first)
        # Sums of six squares, a root and a quotient.
        assert_trees_close(u, expected, rtol=1e-6)
    assert_trees_close(
        state.sum_of_squares, jax.tree.map(lambda g: STEPS * g**2, first), rtol=1e-6
    )


def test_step_lengths_never_grow():
    updates = updates_at(ox.scale_by_adagrad(), PARAMS, GRADS)
    # Steps per gradient; a quotient of equal sums may differ in the last place.
    lengths = jax.tree.map(lambda u, g: np.asarray(u / g, np.float64), updates, GRADS)
    for length in jax.tree.leaves(lengths):
        assert (length > 0).all()
        assert (length[1:] <= length[:-1] * (1 + 3e-7)).all()


# Reductions and invariances


@pytest.mark.parametrize("start", [0.1, 3.0])
def test_optax_form(start: float):
    ours = ox.scale_by_adagrad(initial_accumulator=start, eps=0.0, eps_root=1e-7)
    theirs = optax.scale_by_rss(start, 1e-7)
    # Float32 roundings; optax multiplies by an inverse root.
    assert_trees_close(
        updates_at(ours, PARAMS, GRADS), updates_at(theirs, PARAMS, GRADS), rtol=1e-6
    )


@pytest.mark.parametrize("power", [-35, 50])
def test_scale_does_not_matter(power: int):
    tx = ox.scale_by_adagrad(eps=1e-30)
    scaled = jax.tree.map(lambda g: g * 2.0**power, GRADS)
    # A power of two scales every rounding; only fusion may differ.
    assert_trees_close(
        updates_at(tx, PARAMS, scaled), updates_at(tx, PARAMS, GRADS), rtol=1e-6
    )


def test_complex_parameters_share_one_sum():
    # A complex number of constant phase behaves like its magnitude.
    phase = np.exp(1j * np.linspace(0, 2, 4)).astype(np.complex64)
    params = PARAMS["b"].astype(jnp.complex64)
    state = ox.scale_by_adagrad(initial_accumulator=2.0).init(params)
    assert_trees_equal(state.sum_of_squares, jnp.full(4, 2.0))
    updates = updates_at(ox.scale_by_adagrad(), params, GRADS["b"] * phase)
    expected = updates_at(ox.scale_by_adagrad(), PARAMS["b"], GRADS["b"]) * phase
    # Float32 roundings, a few more than for real numbers.
    assert_trees_close(updates, expected, rtol=2e-6)


def test_low_precision_gradients_are_not_rounded_again():
    narrow = jax.tree.map(lambda g: g.astype(jnp.bfloat16), GRADS)
    wide = jax.tree.map(lambda g: g.astype(jnp.float32), narrow)
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    # Float32 roundings that fusion may order differently.
    assert_trees_close(
        updates_at(ox.scale_by_adagrad(), low, narrow),
        updates_at(ox.scale_by_adagrad(), PARAMS, wide),
        rtol=1e-6,
    )


# The state


def test_bfloat16_sum_stops_growing():
    tx = ox.scale_by_adagrad(initial_accumulator=1.0, nu_dtype="bfloat16")
    state = tx.init(jnp.ones(2))
    assert state.sum_of_squares.dtype == jnp.bfloat16
    # Squares of 1/64 and of 1/300, the second below half a unit in the last place.
    grads = jnp.asarray([1 / 8, (1 / 300) ** 0.5])
    updates, state = tx.update(grads, state)
    np.testing.assert_array_equal(
        state.sum_of_squares.astype(jnp.float32), [1 + 1 / 64, 1.0]
    )
    # The update itself divides by the unrounded sum.
    np.testing.assert_allclose(
        updates, grads / np.sqrt([1 + 1 / 64, 1 + 1 / 300]), rtol=3e-7
    )


# Limits


@pytest.mark.parametrize("arguments", [{}, {"eps": 0.0, "eps_root": 1e-7}], ids=str)
def test_zero_gradients_give_zero(arguments):
    zeros = jax.tree.map(jnp.zeros_like, GRADS)
    tx = ox.scale_by_adagrad(**arguments)
    assert_trees_equal(updates_at(tx, PARAMS, zeros), zeros)


def test_huge_gradients_stop_for_good():
    grads = jnp.stack([jnp.ones(2), jnp.asarray([1e20, 1.0]), jnp.ones(2)])
    updates = updates_at(ox.scale_by_adagrad(), jnp.ones(2), grads)
    np.testing.assert_array_equal(updates[1:, 0], [0.0, 0.0])
    assert_finite(updates)
    assert np.abs(updates[:, 1]).min() > 0.5


# Errors


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"initial_accumulator": -0.1}, "initial_accumulator=-0.1 .* >= 0"),
        (TypeError, {"initial_accumulator": None}, "initial_accumulator=None is not"),
        (ValueError, {"eps": 0.0}, "eps=0.0 is not allowed; eps or eps_root must be"),
        (ValueError, {"eps": -1.0}, "eps=-1.0 is not allowed; .* >= 0"),
        (ValueError, {"eps_root": float("nan")}, "eps_root=nan is not allowed"),
        (TypeError, {"eps": "0"}, "eps='0' is not allowed"),
        (TypeError, {"nu_dtype": "int8"}, "nu_dtype='int8' .* floating-point"),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message: str):
    with pytest.raises(error, match=f"scale_by_adagrad: {message}"):
        ox.scale_by_adagrad(**arguments)


def test_wrong_parameters_are_refused():
    message = "scale_by_adagrad: parameter 'n' of dtype int32 is not allowed"
    with pytest.raises(TypeError, match=message):
        ox.scale_by_adagrad().init({"n": jnp.ones(2, jnp.int32)})
