"""Row and column statistics: references, reductions, blocks, and their state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from optaxplus import MatrixAxes
from tests.assertions import assert_finite, assert_trees_close
from tests.problems import gradients, normal_tree
from tests.references.factored import adafactor
from tests.trajectories import follow_in_float64, updates_at

STEPS = 5
STACK = MatrixAxes((-2,), (-1,))


def grads_of(shape, steps: int = STEPS) -> jax.Array:
    return jnp.stack(gradients(shape, steps=steps))


def factored(**arguments) -> optax.GradientTransformation:
    return ox.factored_rms(min_dim_size_to_factor=1, **arguments)


def run(tx, grads: jax.Array) -> jax.Array:
    return updates_at(tx, grads[0], grads)


# Agreement


@pytest.mark.parametrize("decay_rate", [0.8, 0.5])
@pytest.mark.parametrize(
    ("shape", "threshold"),
    [((3, 4), 1), ((3, 4), 3), ((3, 4), 4), ((4, 3), 4), ((1, 4), 1), ((5,), 1)],
)
def test_reference(shape, threshold: int, decay_rate: float):
    params, grads = normal_tree(shape, seed=0), grads_of(shape)
    arguments = {"min_dim_size_to_factor": threshold, "decay_rate": decay_rate}
    tx = optax.chain(ox.factored_rms(**arguments), optax.scale(-0.1))
    expected = adafactor(
        params,
        grads,
        learning_rate=0.1,
        clipping_threshold=None,
        multiply_by_parameter_scale=False,
        **arguments,
    )
    # Float64 roundings.
    np.testing.assert_allclose(
        follow_in_float64(tx, params, grads), expected, rtol=1e-13, atol=1e-13
    )
    in_float32 = -np.diff(np.stack([np.float64(params), *expected]), axis=0) / 0.1
    # Two means and two roots of float32 roundings.
    assert_trees_close(run(ox.factored_rms(**arguments), grads), in_float32, rtol=2e-6)


# Reductions


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (5,), ()])
@pytest.mark.parametrize("threshold", [1, 4])
def test_matrices_and_vectors_are_optax(shape, threshold: int):
    grads = grads_of(shape)
    ours = ox.factored_rms(min_dim_size_to_factor=threshold)
    theirs = optax.scale_by_factored_rms(min_dim_size_to_factor=threshold)
    # Float32 roundings; optax forms 1 - t**-0.8 by a subtraction.
    assert_trees_close(run(ours, grads), run(theirs, grads), rtol=3e-6)


def test_first_step_of_rank_one_squares_is_the_sign():
    g = jnp.outer(jnp.asarray([1.0, -2.0, 3.0]), jnp.asarray([4.0, -0.1, 2.0, 7.0]))
    # g² = R·Cᵀ / mean exactly, so U = g / |g|; float32 roundings.
    np.testing.assert_allclose(run(factored(), g[None])[0], jnp.sign(g), rtol=1e-6)


def test_unfactored_first_step_is_the_sign():
    grads = grads_of((3, 4))
    # Below the threshold everything is kept; float32 roundings.
    np.testing.assert_allclose(
        run(ox.factored_rms(), grads)[0], jnp.sign(grads[0]), rtol=1e-6
    )


CLIPPED = {
    "matrix": ((3, 4), MatrixAxes((0,), (1,))),
    "vector": ((5,), MatrixAxes((), (0,))),
    "stack": ((2, 3, 4), STACK),
    "splits": ((2, 4, 5), MatrixAxes((1,), (2,), splits=(2, 3))),
}


@pytest.mark.parametrize("threshold", [1, 128])
@pytest.mark.parametrize("name", CLIPPED)
def test_clipping_from_the_statistics_is_clipping_the_update(name: str, threshold: int):
    shape, axes = CLIPPED[name]
    grads = grads_of(shape) * jnp.asarray([1.0, 9.0, 0.1, 30.0, 1.0]).reshape(
        STEPS, *[1] * len(shape)
    )
    arguments = {"min_dim_size_to_factor": threshold, "axes": axes}
    expected = run(
        optax.chain(ox.factored_rms(**arguments), ox.clip_update_rms(0.8, axes=axes)),
        grads,
    )
    clipped = run(ox.factored_rms(**arguments, clip_threshold=0.8), grads)
    # Float32 roundings of two ways to sum squares.
    assert_trees_close(clipped, expected, rtol=1e-6)


# Invariances


def test_stack_is_its_slices():
    scales = jnp.asarray([1e-4, 1.0, 1e4]).reshape(3, 1, 1)
    grads = grads_of((3, 4, 5)) * scales
    tx = factored(axes=STACK)
    expected = jnp.stack([run(factored(), grads[:, i]) for i in range(3)], axis=1)
    # Float32 sums in another order.
    assert_trees_close(run(tx, grads), expected, rtol=1e-6)
    # Where the batch axis stands does not matter.
    moved = run(factored(axes=MatrixAxes((0,), (2,))), jnp.moveaxis(grads, 1, 2))
    assert_trees_close(jnp.moveaxis(moved, 2, 1), expected, rtol=1e-6)


def test_transpose():
    grads = grads_of((3, 4))
    expected = run(factored(), grads).mT
    for axes in (None, MatrixAxes((1,), (0,))):
        # Which side is called rows does not matter; float32 sums in another order.
        assert_trees_close(run(factored(axes=axes), grads.mT), expected, rtol=1e-6)


def test_heads_are_flattened():
    grads = grads_of((4, 2, 3))
    heads = run(factored(axes=MatrixAxes((0,), (1, 2))), grads)
    flat = run(factored(), grads.reshape(STEPS, 4, 6))
    # Float32 sums in another order.
    assert_trees_close(heads.reshape(STEPS, 4, 6), flat, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((4, 5), MatrixAxes((0,), (1,), splits=(2, 3))),
        ((2, 4, 5), MatrixAxes((1,), (2,), splits=(2, 3))),
        ((5, 4), MatrixAxes((1,), (0,), splits=(2, 3))),
        ((4, 5, 1), MatrixAxes((0,), (1, 2), splits=(2, 3))),
    ],
)
def test_splits_are_matrices_of_their_own(shape, axes: MatrixAxes):
    grads = grads_of(shape)
    axis = axes.fan_out[0]
    whole = run(factored(axes=axes), grads)
    parts = [
        run(
            factored(axes=MatrixAxes(axes.fan_in, axes.fan_out)),
            jax.lax.slice_in_dim(grads, start, end, axis=axis + 1),
        )
        for start, end in ((0, 2), (2, 5))
    ]
    # Float32 sums in another order.
    assert_trees_close(whole, jnp.concatenate(parts, axis=axis + 1), rtol=1e-6)


def test_narrowest_split_decides_whether_to_factor():
    axes = MatrixAxes((0,), (1,), splits=(2, 6))
    state = ox.factored_rms(min_dim_size_to_factor=3, axes=axes).init(jnp.ones((8, 8)))
    assert state.nu.shape == (8, 8)
    state = ox.factored_rms(min_dim_size_to_factor=2, axes=axes).init(jnp.ones((8, 8)))
    assert state.nu.shape == (1, 1)


@pytest.mark.parametrize("power", [-30, 30])
@pytest.mark.parametrize("threshold", [1, 128])
def test_scale_does_not_matter(power: int, threshold: int):
    # 1e-30 is nothing beside squares of 2^-30.
    grads = grads_of((3, 4)) * 100
    tx = ox.factored_rms(min_dim_size_to_factor=threshold)
    # Float32 roundings.
    assert_trees_close(run(tx, grads * 2.0**power), run(tx, grads), rtol=1e-6)


def test_permutations_and_signs():
    grads = grads_of((3, 4))
    flipped = -grads[:, ::-1, ::-1]
    # Float32 sums in another order.
    assert_trees_close(
        run(factored(), flipped), -run(factored(), grads)[:, ::-1, ::-1], rtol=1e-6
    )


@pytest.mark.parametrize("threshold", [1, 128])
def test_low_precision_gradients_are_not_rounded_again(threshold: int):
    tx = ox.factored_rms(min_dim_size_to_factor=threshold)
    narrow = grads_of((3, 4)).astype("bfloat16")
    # Float32 roundings that fusion may order differently.
    assert_trees_close(run(tx, narrow), run(tx, narrow.astype("float32")), rtol=1e-6)


# State


def test_state_has_the_rank_of_the_parameter():
    params = {
        "w": jnp.ones((2, 4, 5)),
        "fused": jnp.ones((4, 5)),
        "small": jnp.ones((2, 2)),
        "b": jnp.ones((2, 3)),
    }
    axes = {
        "w": STACK,
        "fused": MatrixAxes((0,), (1,), splits=(4, 1)),
        "small": STACK,
        "b": MatrixAxes((), (1,)),
    }
    tx = ox.factored_rms(min_dim_size_to_factor=3, axes=axes)
    state = tx.init(params)
    shapes = {name: tuple(x[name].shape for x in state[1:]) for name in params}
    assert shapes == {
        "w": ((2, 4, 1), (2, 1, 5), (1, 1, 1)),
        "fused": ((1, 1), (1, 1), (4, 5)),
        "small": ((1, 1), (1, 1), (2, 2)),
        "b": ((1, 1), (1, 1), (2, 3)),
    }
    state = factored(axes=axes).init(params)
    assert state.nu_row["fused"].shape == (4, 2)
    assert state.nu_col["fused"].shape == (1, 5)


@pytest.mark.parametrize("threshold", [1, 128])
def test_bfloat16_statistics(threshold: int):
    tx = ox.factored_rms(min_dim_size_to_factor=threshold, nu_dtype="bfloat16")
    state = tx.init(jnp.ones((3, 4)))
    assert {x.dtype for x in state[1:]} == {jnp.dtype("bfloat16")}
    grads = grads_of((3, 4))
    exact = run(ox.factored_rms(min_dim_size_to_factor=threshold), grads)
    # Rows, columns and their mean rounded by 2^-9 a step, of which a root takes half.
    assert_trees_close(run(tx, grads), exact, rtol=6 * 2**-9)


# Limits


@pytest.mark.parametrize("shape", [(3, 4), (1, 4), (4, 1), (5,), ()])
def test_zero_gradients_give_zero(shape):
    zeros = jnp.zeros((STEPS, *shape))
    np.testing.assert_array_equal(run(factored(), zeros), zeros)


def test_zero_rows_and_columns_stay_zero_and_touch_nothing():
    grads = grads_of((3, 4)).at[:, 1].set(0.0).at[:, :, 2].set(0.0)
    updates = run(factored(), grads)
    assert_finite(updates)
    np.testing.assert_array_equal(updates[:, 1], np.zeros((STEPS, 4)))
    # R, C and mean(R) are means over zeros too, which cancel in R·C / mean(R); float32
    # roundings.
    dense = run(factored(), grads[:, [0, 2]][:, :, [0, 1, 3]])
    assert_trees_close(updates[:, [0, 2]][:, :, [0, 1, 3]], dense, rtol=1e-6)


@pytest.mark.parametrize("clip_threshold", [None, 1.0])
@pytest.mark.parametrize("threshold", [1, 128])
def test_tiny_and_huge_gradients_stay_finite(threshold: int, clip_threshold):
    tx = ox.factored_rms(
        min_dim_size_to_factor=threshold, clip_threshold=clip_threshold
    )
    for scale in (1e-30, 1e-20, 1e18):
        grads = grads_of((3, 4)) * scale
        assert_finite(run(tx, grads))
        # Its share of a mean of 1e8 and more underflows.
        updates = run(tx, grads.at[:, 1].set(0.0))
        assert_finite(updates)
        np.testing.assert_array_equal(updates[:, 1], np.zeros((STEPS, 4)))


def test_bad_entries_stay_in_their_matrix():
    grads = grads_of((2, 3, 4)).at[1, 0, 1, 1].set(jnp.nan)
    updates = np.asarray(run(factored(axes=STACK), grads))
    assert np.isnan(updates[1:, 0]).all()
    assert np.isfinite(updates[:, 1]).all()


def test_empty_none_and_masked_leaves_pass():
    params = {"n": None, "m": optax.MaskedNode(), "e": jnp.zeros((0, 3))}
    updates, _ = (tx := factored(axes=STACK)).update(params, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert updates["e"].shape == (0, 3)


def test_experts_are_never_mixed():
    # optax factors the two largest axes, here experts and features.
    grads = grads_of((8, 2, 9))
    with pytest.raises(ValueError, match="no rule decides"):
        factored().init({"mixers": grads[0]})
    state = factored().init({"experts": grads[0]})
    assert [x.shape for x in jax.tree.leaves(state) if x.size > 1] == [
        (8, 2, 1),
        (8, 1, 9),
    ]
    updates = run(factored(axes=STACK), grads)
    changed = run(factored(axes=STACK), grads.at[:, 0].multiply(1e6))
    np.testing.assert_array_equal(updates[:, 1:], changed[:, 1:])


# Errors


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"decay_rate": 0.0}, "factored_rms: decay_rate=0.0 .* > 0"),
        (ValueError, {"decay_rate": float("nan")}, "factored_rms: decay_rate=nan"),
        (ValueError, {"eps": 0.0}, "factored_rms: eps=0.0 is not allowed; .* > 0"),
        (
            ValueError,
            {"min_dim_size_to_factor": 0},
            "factored_rms: min_dim_size_to_factor=0 is not allowed; .* integer >= 1",
        ),
        (TypeError, {"min_dim_size_to_factor": 2.0}, "min_dim_size_to_factor=2.0 is"),
        (
            TypeError,
            {"min_dim_size_to_factor": jnp.asarray(2)},
            r"min_dim_size_to_factor shapes .* static_args=\('min_dim_size_to_factor',",
        ),
        (TypeError, {"decay_rate": "0.8"}, "factored_rms: decay_rate='0.8' is not"),
        (TypeError, {"eps": True}, "factored_rms: eps=True is not allowed"),
        (TypeError, {"nu_dtype": "uint8"}, "factored_rms: nu_dtype='uint8' is not"),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message: str):
    with pytest.raises(error, match=message):
        ox.factored_rms(**arguments)


@pytest.mark.parametrize("dtype", ["int32", "complex64"])
def test_wrong_parameters_are_refused(dtype: str):
    message = f"factored_rms: parameter 'w' of dtype {dtype} .* real floating point"
    with pytest.raises(TypeError, match=message):
        factored().init({"w": jnp.ones((2, 3), dtype)})


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (MatrixAxes((0,), (2,)), "factored_rms: parameter 'w': .* axis 2 is out of"),
        (MatrixAxes((0,), (-2,)), "factored_rms: parameter 'w': .* an axis twice"),
        (
            MatrixAxes((0,), (1,), (1, 1)),
            "parameter 'w': .* splits add up to 2",
        ),
    ],
)
def test_axes_that_do_not_fit_are_refused(axes, message: str):
    with pytest.raises(ValueError, match=message):
        factored(axes=axes).init({"w": jnp.ones((2, 3))})
