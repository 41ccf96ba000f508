"""Adam-mini's direction: one denominator a block, whatever a block is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaxplus as ox
from optaxplus import MatrixAxes
from tests.assertions import assert_finite, assert_trees_close
from tests.problems import STACKED_MATRIX, gradients, normal_tree
from tests.references.torch_trajectories import load_torch_trajectories
from tests.trajectories import follow_in_float64, run, updates_at

SHAPES = {"w": (3, 4), "b": (4,), "s": ()}
STEPS = 6
PARAMS = normal_tree(SHAPES, seed=0)
TREES = gradients(SHAPES, steps=STEPS)
GRADS = jax.tree.map(lambda *g: jnp.stack(g), *TREES)
COORDINATES = MatrixAxes((), ())
MATRIX = MatrixAxes((0,), (1,))


# Agreement and reductions


@pytest.mark.parametrize("leaf", ["vector", "tall", "wide", "stack"])
def test_recorded_run_of_one_block(leaf: str):
    recorded = load_torch_trajectories()
    case = recorded.cases["adam_mini_block"]
    start = recorded.params[leaf].astype(np.float64)
    axes = MatrixAxes((), (0,)) if leaf == "vector" else STACKED_MATRIX
    tx = ox.chain_in_float32(
        ox.scale_by_adam_mini(axes=axes),
        ox.descend(case.learning_rates[0], case.arguments["weight_decay"]),
    )
    ours = follow_in_float64(tx, start, recorded.grads[leaf]) - start
    theirs = case.trajectories["float64"][leaf] - start
    # float64 less the start of the leaf: 1e-16 / 1e-2, and 1 - b2**t of the package
    # loses three digits.
    assert_trees_close(ours, theirs, rtol=1e-11)


@pytest.mark.parametrize("arguments", [{}, {"b1": 0.5, "b2": 0.8, "eps": 0.1}], ids=str)
def test_blocks_of_one_coordinate_are_adam(arguments):
    # The same operations, but a factor is formed before it meets the mean.
    assert_trees_close(
        updates_at(ox.scale_by_adam_mini(**arguments, axes=COORDINATES), PARAMS, GRADS),
        updates_at(ox.scale_by_adam(**arguments), PARAMS, GRADS),
        rtol=5e-7,
    )


def test_equal_sizes_are_adam():
    # Where all squares of a block are equal their mean is each of them.
    signs = jax.tree.map(jnp.sign, GRADS)
    # A mean of a dozen equal squares.
    assert_trees_close(
        updates_at(ox.scale_by_adam_mini(), PARAMS, signs),
        updates_at(ox.scale_by_adam(), PARAMS, signs),
        rtol=1e-6,
    )


def test_two_steps_by_hand():
    # m = (1.5, 2), (-0.75, 3); v = 12.5/4, 0.75·12.5/4 + 8/4; corrected by 3/4, 7/16.
    grads = jnp.asarray([[3.0, 4.0], [0.0, 4.0]])
    tx = ox.scale_by_adam_mini(0.5, 0.75, eps=1e-30)
    updates = updates_at(tx, grads[0], grads)
    first = np.array([3.0, 4.0]) / 12.5**0.5
    v_hat = (0.75 * 12.5 / 4 + 8 / 4) / (7 / 16)
    second = np.array([0.75, 3.0]) / 0.75 / v_hat**0.5
    # A few float32 roundings.
    np.testing.assert_allclose(updates, [first, second], rtol=1e-6)


# The block


def test_one_block_keeps_the_direction_of_the_mean():
    updates = updates_at(ox.scale_by_adam_mini(), PARAMS, GRADS)
    means = updates_at(ox.scale_by_ema(0.9, debias=True), PARAMS, GRADS)
    for u, m in zip(jax.tree.leaves(updates), jax.tree.leaves(means), strict=True):
        flat = [np.reshape(x, (STEPS, -1)) for x in (u, m)]
        ratios = flat[0] / flat[1]
        # One number times each mean: float32 roundings.
        np.testing.assert_allclose(
            ratios, ratios[:, :1].repeat(len(ratios[0]), 1), 2e-6
        )


SHAPES_OF_NU = {
    "matrix": (MATRIX, (3, 4), (1, 1)),
    "vector": (MatrixAxes((), (0,)), (5,), (1,)),
    "scalar": (COORDINATES, (), ()),
    "coordinates": (COORDINATES, (3, 4), (3, 4)),
    "outputs": (MatrixAxes((), (0,)), (3, 4), (1, 4)),
    "tokens": (MatrixAxes((), (1,)), (3, 4), (3, 1)),
    "stack": (STACKED_MATRIX, (2, 3, 4), (2, 1, 1)),
    "heads": (MatrixAxes((0,), (2,)), (4, 2, 3), (1, 2, 1)),
    "splits": (MatrixAxes((0,), (1,), splits=(2, 2, 3)), (4, 7), (1, 3)),
    "stacked_splits": (MatrixAxes((1,), (2,), splits=(2, 4)), (2, 3, 6), (2, 1, 2)),
    "splits_of_two_axes": (
        MatrixAxes((0,), (1, 2), splits=(4, 4)),
        (3, 4, 2),
        (1, 2, 1),
    ),
}


@pytest.mark.parametrize("name", SHAPES_OF_NU)
def test_state_has_one_number_a_block(name: str):
    axes, shape, reduced = SHAPES_OF_NU[name]
    tx = ox.scale_by_adam_mini(b2=0.75, axes=axes, mu_dtype="bfloat16")
    state = tx.init(jnp.ones(shape))
    assert (state.mu.shape, state.mu.dtype) == (shape, jnp.bfloat16)
    assert (state.nu.shape, state.nu.dtype) == (reduced, jnp.float32)
    _, state = tx.update(jnp.full(shape, 2.0), state)
    # A quarter of the mean of 4, exact in float32.
    np.testing.assert_array_equal(state.nu, np.ones(reduced))


def test_splits_are_separate():
    grads = normal_tree((STEPS, 4, 7), seed=1) * jnp.geomspace(1e-3, 1e3, 7)
    axes = MatrixAxes((0,), (1,), splits=(2, 2, 3))
    parts = [
        updates_at(ox.scale_by_adam_mini(axes=MATRIX), part[0], part)
        for part in (grads[..., :2], grads[..., 2:4], grads[..., 4:])
    ]
    # Float32 sums in another order.
    assert_trees_close(
        updates_at(ox.scale_by_adam_mini(axes=axes), grads[0], grads),
        jnp.concatenate(parts, axis=-1),
        rtol=1e-6,
    )


def test_stacks_are_their_slices():
    sizes = jnp.asarray([1e-4, 1.0, 1e4]).reshape(3, 1, 1)
    grads = normal_tree((STEPS, 3, 2, 5), seed=2) * sizes
    tx = ox.scale_by_adam_mini(axes=STACKED_MATRIX)
    slices = [updates_at(tx, grads[0, i], grads[:, i]) for i in range(3)]
    # Float32 sums in another order.
    assert_trees_close(
        updates_at(tx, grads[0], grads), jnp.stack(slices, axis=1), rtol=1e-6
    )


def test_complex_parameters():
    # A complex number of constant phase behaves like its magnitude.
    phase = np.exp(1j * np.linspace(0, 2, 4)).astype(np.complex64)
    params = PARAMS["b"].astype(jnp.complex64)
    assert ox.scale_by_adam_mini().init(params).nu.dtype == jnp.float32
    updates = updates_at(ox.scale_by_adam_mini(), params, GRADS["b"] * phase)
    expected = updates_at(ox.scale_by_adam_mini(), PARAMS["b"], GRADS["b"]) * phase
    # Float32 roundings, a few more than for real numbers.
    assert_trees_close(updates, expected, rtol=3e-6)


# Limits


def test_huge_gradients_stop_their_block():
    grads = jnp.ones((3, 2, 3)).at[1, 0, 0].set(1e30)
    tx = ox.scale_by_adam_mini(axes=MatrixAxes((), (1,)))
    updates, _ = run(tx, grads[0], list(grads))
    updates = np.stack(updates)
    assert_finite(updates)
    np.testing.assert_array_equal(updates[1:, 0], np.zeros((2, 3)))
    assert np.abs(updates[:, 1]).min() > 0.5


def test_empty_blocks_pass():
    params = {"rows": jnp.zeros((0, 3)), "columns": jnp.zeros((3, 0))}
    tx = ox.scale_by_adam_mini(axes=MATRIX)
    state = tx.init(params)
    updates, state = tx.update(params, state)
    assert {key: u.shape for key, u in updates.items()} == {
        "rows": (0, 3),
        "columns": (3, 0),
    }
    assert_finite(state.nu)


# Errors


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"b1": 1.0}, r"b1=1.0 is not allowed; .* \[0, 1\)"),
        (ValueError, {"b2": -0.1}, "b2=-0.1 is not allowed"),
        (ValueError, {"eps": 0.0}, "eps=0.0 is not allowed; .* > 0"),
        (TypeError, {"b2": None}, "b2=None is not allowed"),
        (TypeError, {"mu_dtype": "int8"}, "mu_dtype='int8' .* floating-point"),
        (TypeError, {"nu_dtype": None}, "nu_dtype=None is not allowed"),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message: str):
    with pytest.raises(error, match=f"scale_by_adam_mini: {message}"):
        ox.scale_by_adam_mini(**arguments)


def test_wrong_parameters_and_axes_are_refused():
    message = "scale_by_adam_mini: parameter 'n' of dtype int32 is not allowed"
    with pytest.raises(TypeError, match=message):
        ox.scale_by_adam_mini().init({"n": jnp.ones(2, jnp.int32)})
    message = "scale_by_adam_mini: parameter 'b': .* axis 1 is out of range"
    with pytest.raises(ValueError, match=message):
        ox.scale_by_adam_mini(axes=MATRIX).init(PARAMS)
