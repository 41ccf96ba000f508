"""MARS's corrected gradient, before any rule with momentum."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from optaxplus import MatrixAxes
from tests.assertions import assert_finite, assert_trees_close, assert_trees_equal
from tests.problems import STACKED_MATRIX, gradients, normal_tree
from tests.references.adam_successors import mars_corrections
from tests.trajectories import run, updates_at

SHAPES = {"w": (3, 4), "b": (4,), "s": ()}
STEPS = 5
PARAMS = normal_tree(SHAPES, seed=0)
TREES = gradients(SHAPES, steps=STEPS)
GRADS = jax.tree.map(lambda *g: jnp.stack(g), *TREES)


# By hand and reference


def test_first_two_steps_by_hand():
    tx = ox.mars_correction(gamma=0.5, b1=0.75, max_norm=None)
    # A gain of 1.5 on the change, the first from 0.
    updates = updates_at(tx, jnp.ones(()), jnp.asarray([2.0, 1.0]))
    np.testing.assert_array_equal(updates, [2 + 1.5 * 2, 1 - 1.5])


def test_first_step_with_the_defaults():
    short = jax.tree.map(lambda g: g / (2 * optax.tree.norm(TREES[0])), TREES[0])
    updates, state = run(ox.mars_correction(), PARAMS, [short])
    # Two float32 roundings.
    assert_trees_close(updates[0], jax.tree.map(lambda g: 1.475 * g, short), rtol=3e-7)
    assert_trees_equal(state.previous_grads, short)


@pytest.mark.parametrize("max_norm", [0.1, 10.0])
def test_reference(max_norm: float):
    tx = ox.mars_correction(gamma=0.1, b1=0.9, max_norm=max_norm)
    expected = jax.tree.map(
        lambda g: np.stack(
            list(mars_corrections(g, gamma=0.1, b1=0.9, max_norm=max_norm))
        ),
        GRADS,
    )
    # A difference, and a float32 norm of a dozen entries.
    assert_trees_close(updates_at(tx, PARAMS, GRADS), expected, rtol=1e-6)


# Reductions


@pytest.mark.parametrize("arguments", [{"gamma": 0.0}, {"b1": 0.0}], ids=str)
def test_without_correction_and_clipping_it_is_the_identity(arguments):
    tx = ox.mars_correction(**arguments, max_norm=None)
    assert_trees_equal(updates_at(tx, PARAMS, GRADS), GRADS)


def test_without_correction_it_clips():
    clip = optax.clip_by_global_norm(1.0)
    tx = ox.mars_correction(gamma=0.0)
    for key in ("w", "b"):
        # Float32 roundings.
        assert_trees_close(
            updates_at(tx, PARAMS[key], GRADS[key]),
            updates_at(clip, PARAMS[key], GRADS[key]),
            rtol=5e-7,
        )


def test_constant_gradients_pass_from_the_second_step_on():
    updates, _ = run(ox.mars_correction(max_norm=None), PARAMS, [TREES[0]] * 4)
    assert_trees_equal(updates[1:], [TREES[0]] * 3)
    assert np.abs(updates[0]["w"]).max() > np.abs(TREES[0]["w"]).max()


# Clipping


def test_norm_is_bounded_in_every_block():
    sizes = jnp.asarray([1e-3, 1.0, 1e3]).reshape(3, 1, 1)
    stack = normal_tree((STEPS, 3, 2, 5), seed=2) * sizes
    tx = ox.mars_correction(max_norm=0.5, axes=STACKED_MATRIX)
    updates = updates_at(tx, stack[0], stack)
    norms = np.linalg.norm(updates, axis=(-2, -1))
    # Float32 sums of ten squares; the first slice is short and the last long.
    assert (norms <= 0.5 * (1 + 1e-6)).all()
    np.testing.assert_allclose(norms[:, 2], np.full(STEPS, 0.5), rtol=1e-6)
    assert norms[:, 0].max() < 0.1
    slices = [updates_at(tx, stack[0, i], stack[:, i]) for i in range(3)]
    # Float32 sums in another order.
    assert_trees_close(updates, jnp.stack(slices, axis=1), rtol=1e-6)


def test_splits_are_separate():
    g = jnp.asarray([[3.0, 0.3, 0.0], [4.0, 0.4, 0.0]])
    tx = ox.mars_correction(gamma=0.0, axes=MatrixAxes((0,), (1,), splits=(1, 2)))
    updates, _ = tx.update(g, tx.init(g))
    # The first is five times too long, the second short enough.
    np.testing.assert_allclose(updates, [[0.6, 0.3, 0], [0.8, 0.4, 0]], rtol=3e-7)


# In front of other rules


@pytest.mark.parametrize(
    "rule",
    [ox.scale_by_lion(0.95, 0.95), ox.scale_by_adam(0.95, 0.99), ox.scale_by_ema(0.95)],
    ids=["lion", "adam", "ema"],
)
def test_chain(rule):
    corrected = updates_at(ox.mars_correction(), PARAMS, GRADS)
    # The rule sees the corrected gradient and nothing else; fusion may round
    # differently, and no mean of these is as small as that.
    assert_trees_close(
        updates_at(optax.chain(ox.mars_correction(), rule), PARAMS, GRADS),
        updates_at(rule, PARAMS, corrected),
        rtol=2e-6,
    )


# Dtypes and limits


def test_dtypes():
    params = {"x": jnp.ones(2, jnp.bfloat16), "z": jnp.ones(2, jnp.complex64)}
    state = ox.mars_correction().init(params)
    assert {key: p.dtype.name for key, p in state.previous_grads.items()} == {
        "x": "float32",
        "z": "complex64",
    }
    tx = ox.mars_correction(max_norm=None, mu_dtype="bfloat16")
    updates, state = tx.update(params["x"] * 3, tx.init(params["x"]))
    assert (updates.dtype, state.previous_grads.dtype) == ("float32", "bfloat16")
    # Two float32 roundings.
    np.testing.assert_allclose(updates, [1.475 * 3] * 2, rtol=3e-7)


def test_complex_norm():
    g = jnp.asarray([3 + 4j, 12j], jnp.complex64)
    tx = ox.mars_correction(gamma=0.0)
    updates, _ = tx.update(g, tx.init(g))
    # Float32 roundings of g / 13.
    np.testing.assert_allclose(updates, np.asarray(g) / 13, rtol=5e-7)


def test_zeros_and_what_overflows():
    tx = ox.mars_correction(axes=MatrixAxes((), (-1,)))
    g = jnp.asarray([[0.0, 0.0], [3e30, 4e30], [0.3, 0.4]])
    updates, _ = tx.update(g, tx.init(g))
    assert_finite(updates)
    np.testing.assert_array_equal(updates[:2], np.zeros((2, 2)))
    # Two float32 roundings; a norm of 0.74.
    np.testing.assert_allclose(updates[2], [1.475 * 0.3, 1.475 * 0.4], rtol=3e-7)


# Errors


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"gamma": -0.1}, "gamma=-0.1 is not allowed; .* >= 0"),
        (TypeError, {"gamma": None}, "gamma=None is not allowed"),
        (ValueError, {"b1": 1.0}, r"b1=1.0 is not allowed; .* \[0, 1\)"),
        (ValueError, {"max_norm": 0.0}, "max_norm=0.0 is not allowed; .* > 0"),
        (TypeError, {"max_norm": "1"}, "max_norm='1' is not allowed"),
        (TypeError, {"mu_dtype": "int8"}, "mu_dtype='int8' .* floating-point"),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message: str):
    with pytest.raises(error, match=f"mars_correction: {message}"):
        ox.mars_correction(**arguments)


def test_wrong_parameters_and_axes_are_refused():
    message = "mars_correction: parameter 'n' of dtype int32 is not allowed"
    with pytest.raises(TypeError, match=message):
        ox.mars_correction().init({"n": jnp.ones(2, jnp.int32)})
    message = "mars_correction: parameter 'b': .* axis -2 is out of range"
    with pytest.raises(ValueError, match=message):
        ox.mars_correction(axes=STACKED_MATRIX).init(PARAMS)
