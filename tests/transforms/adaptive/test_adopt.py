"""ADOPT's direction: its first two steps by hand, the cut-off, and recorded runs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from tests.assertions import assert_finite, assert_trees_close, assert_trees_equal
from tests.problems import gradients, normal_tree
from tests.references.torch_trajectories import load_torch_trajectories
from tests.trajectories import follow_in_float64, run, updates_at

SHAPES = {"w": (3, 4), "b": (4,), "s": ()}
STEPS = 6
PARAMS = normal_tree(SHAPES, seed=0)
TREES = gradients(SHAPES, steps=STEPS)
GRADS = jax.tree.map(lambda *g: jnp.stack(g), *TREES)


# By hand


@pytest.mark.parametrize("clip", [True, False])
def test_first_step_only_looks(clip: bool):
    tx = ox.scale_by_adopt(clip=clip)
    updates, state = tx.update(TREES[0], tx.init(PARAMS))
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    assert_trees_equal(updates, zeros)
    assert_trees_equal(state.mu, zeros)
    # The square and nothing else, whatever b2.
    assert_trees_equal(state.nu, jax.tree.map(jnp.square, TREES[0]))


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        # x = 6/2, -12/sqrt(20)
        (False, [0.0, 0.25 * 3, 0.75 * 0.75 - 0.25 * 12 / 20**0.5]),
        # x is cut off at 1 and at the fourth root of 2
        (True, [0.0, 0.25, 0.75 * 0.25 - 0.25 * 2**0.25]),
    ],
)
def test_three_steps_by_hand(clip: bool, expected):
    tx = ox.scale_by_adopt(0.75, 0.5, clip=clip)
    # v = 4, 20: each gradient is divided by the root of the one before.
    updates = updates_at(tx, jnp.ones(()), jnp.asarray([2.0, 6.0, -12.0]))
    # A few float32 roundings.
    np.testing.assert_allclose(updates, expected, rtol=1e-6)


@pytest.mark.parametrize(("count", "limit"), [(1, 1.0), (16, 2.0), (10_000, 10.0)])
def test_cut_off(count: int, limit: float):
    state = ox.ScaleByAdoptState(jnp.int32(count), jnp.zeros(3), jnp.ones(3))
    tx = ox.scale_by_adopt(0.75)
    updates, _ = tx.update(jnp.asarray([100.0, -100.0, 0.5]), state)
    # One power in float32.
    np.testing.assert_allclose(updates, [0.25 * limit, -0.25 * limit, 0.125], rtol=3e-7)


def test_least_divisor():
    # The first gradient was 0; without cut-off the second step is g / eps.
    grads = jnp.asarray([0.0, 3.0])
    tx = ox.scale_by_adopt(0.0, eps=0.5, clip=False)
    np.testing.assert_array_equal(updates_at(tx, grads[0], grads), [0.0, 6.0])


# Agreement and reductions


@pytest.mark.parametrize("leaf", ["vector", "tall", "wide", "stack"])
def test_recorded_run_without_cut_off(leaf: str):
    recorded = load_torch_trajectories()
    run = recorded.cases["adopt"]
    assert run.arguments == {"clip_lambda": None}
    start = recorded.params[leaf].astype(np.float64)
    tx = ox.adopt(run.learning_rates[0], clip=False)
    ours = follow_in_float64(tx, start, recorded.grads[leaf]) - start
    theirs = run.trajectories["float64"][leaf] - start
    # float64 less the start of the leaf: 1e-16 / 1e-2.
    assert_trees_close(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("clip", [True, False])
def test_optax(clip: bool):
    ours = ox.scale_by_adopt(0.8, 0.99, clip=clip)
    theirs = optax.contrib.scale_by_adopt(0.8, 0.99, use_clipping=clip)
    # A few float32 roundings.
    assert_trees_close(
        updates_at(ours, PARAMS, GRADS), updates_at(theirs, PARAMS, GRADS), rtol=2e-6
    )


def test_cut_off_matters_on_these_gradients():
    clipped, free = (
        updates_at(ox.scale_by_adopt(clip=clip), PARAMS["w"], GRADS["w"])
        for clip in (True, False)
    )
    assert np.abs(clipped - free).max() > 0.1


def test_constant_gradients_are_divided_by_themselves():
    updates, _ = run(ox.scale_by_adopt(eps=1e-30), PARAMS, [TREES[0]] * 4)
    for t, u in enumerate(updates):
        expected = jax.tree.map(
            lambda g, t=t: (1 - 0.9**t) * jnp.sign(g),
            TREES[0],
        )
        # A few float32 roundings.
        assert_trees_close(u, expected, rtol=1e-6)


# Invariances


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("power", [-30, 45])
def test_scale_does_not_matter(clip: bool, power: int):
    tx = ox.scale_by_adopt(eps=1e-30, clip=clip)
    scaled = jax.tree.map(lambda g: g * 2.0**power, GRADS)
    # A power of two scales every rounding; only fusion may differ.
    assert_trees_close(
        updates_at(tx, PARAMS, scaled), updates_at(tx, PARAMS, GRADS), rtol=1e-6
    )


def test_cut_off_of_complex_numbers_keeps_the_angle():
    grads = jnp.asarray([[1.0, 1j, 2.0], [3 + 4j, -20j, 0.6j]], jnp.complex64)
    tx = ox.scale_by_adopt(0.0)
    state = tx.init(grads[0])
    assert (state.mu.dtype, state.nu.dtype) == (jnp.complex64, jnp.float32)
    updates = updates_at(tx, grads[0], grads)
    # The second step is limited to 1; a few float32 roundings.
    np.testing.assert_allclose(updates[1], [0.6 + 0.8j, -1j, 0.3j], rtol=1e-6)


# Limits


def test_huge_gradients_count_as_zero_afterwards():
    tx = ox.scale_by_adopt()
    grads = jnp.stack([jnp.ones(2), jnp.asarray([1e30, 1.0]), *jnp.ones((2, 2))])
    updates = updates_at(tx, jnp.ones(2), grads)
    assert_finite(updates)
    # Cut off at 1 when it came; the mean then forgets it.
    np.testing.assert_allclose(updates[1:, 0], [0.1, 0.09, 0.081], rtol=1e-6)
    assert np.abs(updates[1:, 1]).min() > 0.09


def test_huge_first_gradients_are_no_step():
    updates = updates_at(ox.scale_by_adopt(), jnp.ones(()), jnp.asarray([1e38, 1.0]))
    np.testing.assert_array_equal(updates, [0.0, 0.0])


@pytest.mark.parametrize("clip", [True, False])
def test_zero_gradients_give_zero(clip: bool):
    zeros = jax.tree.map(jnp.zeros_like, GRADS)
    tx = ox.scale_by_adopt(clip=clip)
    assert_trees_equal(updates_at(tx, PARAMS, zeros), zeros)


# Errors


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"b1": 1.0}, r"b1=1.0 is not allowed; .* \[0, 1\)"),
        (ValueError, {"b2": -1}, r"b2=-1 is not allowed; .* \[0, 1\)"),
        (ValueError, {"eps": 0.0}, "eps=0.0 is not allowed; .* > 0"),
        (TypeError, {"eps": None}, "eps=None is not allowed"),
        (TypeError, {"clip": 1}, "clip=1 is not allowed; .* True or False"),
        (TypeError, {"mu_dtype": "int8"}, "mu_dtype='int8' .* floating-point"),
        (TypeError, {"nu_dtype": "x"}, "nu_dtype='x' is not allowed"),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message: str):
    with pytest.raises(error, match=f"scale_by_adopt: {message}"):
        ox.scale_by_adopt(**arguments)


def test_wrong_parameters_are_refused():
    message = "scale_by_adopt: parameter 'n' of dtype int32 is not allowed"
    with pytest.raises(TypeError, match=message):
        ox.scale_by_adopt().init({"n": jnp.ones(2, jnp.int32)})
