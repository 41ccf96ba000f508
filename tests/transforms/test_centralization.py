"""Gradients without their mean over the inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from optaxplus import MatrixAxes
from tests.assertions import assert_trees_close, assert_trees_equal
from tests.problems import STACKED_MATRIX, normal_tree

MATRIX = normal_tree((5, 3), seed=1) + 2.0


def apply(g, axes=None):
    tx = ox.centralize(axes=axes)
    return tx.update(g, tx.init(g))[0]


def test_by_hand():
    g = jnp.asarray([[1.0, 10.0], [3.0, 20.0]])
    np.testing.assert_array_equal(apply(g), [[-1.0, -5.0], [1.0, 5.0]])


def test_means_over_the_inputs_are_zero():
    centralized = apply(MATRIX)
    # Sums of five float32 numbers of about 3.
    np.testing.assert_allclose(centralized.sum(axis=0), np.zeros(3), atol=3e-6)
    # Rows are another matter.
    assert np.abs(centralized.sum(axis=1)).min() > 0.1
    assert_trees_close(apply(centralized), centralized, rtol=3e-7)


def test_inputs_in_the_second_axis():
    # The layout of PyTorch: (fan_out, fan_in).
    assert_trees_close(
        apply(MATRIX.T, MatrixAxes((1,), (0,))), apply(MATRIX).T, rtol=3e-7
    )


def test_optax_keeps_the_first_axis():
    theirs = optax.centralize()
    expected, _ = theirs.update(MATRIX.T, theirs.init(MATRIX.T))
    # Float32 sums in another order.
    assert_trees_close(apply(MATRIX), expected.T, rtol=3e-7)


def test_stacks_are_their_slices():
    stack = jnp.stack([MATRIX, 10 * MATRIX])
    # Float32 sums in another order.
    assert_trees_close(
        apply(stack, STACKED_MATRIX),
        jnp.stack([apply(MATRIX), apply(10 * MATRIX)]),
        rtol=3e-7,
    )


def test_splits_change_nothing():
    fused = MatrixAxes((0,), (1,), splits=(1, 2))
    assert_trees_equal(apply(MATRIX, fused), apply(MATRIX))


def test_convolutions_lose_their_mean_over_window_and_channels():
    kernel = normal_tree((3, 3, 2, 4), seed=2) + 1.0
    axes = MatrixAxes((0, 1, 2), (3,))
    expected = apply(kernel.reshape(18, 4)).reshape(kernel.shape)
    # Float32 sums in another order.
    assert_trees_close(apply(kernel, axes), expected, rtol=5e-7)
    assert_trees_close(
        apply({"conv": {"kernel": kernel}}), {"conv": {"kernel": expected}}, rtol=5e-7
    )


def test_attention_heads_are_outputs():
    query = normal_tree((5, 2, 3), seed=3) + 1.0
    expected = query - query.mean(axis=0)
    # Float32 sums in another order.
    assert_trees_close(apply(query, MatrixAxes((0,), (1, 2))), expected, rtol=5e-7)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((4,), None),
        ((), None),
        ((3, 4), MatrixAxes((), (1,))),
        ((1, 4), None),
        ((2, 1, 4), STACKED_MATRIX),
        ((0, 3), None),
        ((3, 0), None),
    ],
)
def test_vectors_and_single_inputs_pass_unchanged(shape, axes):
    g = normal_tree(shape, seed=4) + 1.0
    assert_trees_equal(apply(g, axes), g)


def test_names_tell_the_axes():
    tree = {
        "dense": {"kernel": MATRIX, "bias": jnp.ones(3)},
        "layers": {"kernel": jnp.stack([MATRIX, MATRIX]), "bias": jnp.ones((2, 3))},
    }
    centralized = apply(tree)
    one = apply(MATRIX)
    assert_trees_equal(centralized["dense"], {"kernel": one, "bias": jnp.ones(3)})
    # Float32 sums in another order.
    assert_trees_close(
        centralized["layers"]["kernel"], jnp.stack([one, one]), rtol=3e-7
    )
    assert_trees_equal(centralized["layers"]["bias"], jnp.ones((2, 3)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_gradients_are_centralized_in_float32(dtype: str):
    narrow = (100 * MATRIX).astype(dtype)
    assert_trees_equal(apply(narrow), apply(narrow.astype(jnp.float32)))


def test_complex_gradients():
    z = MATRIX + 1j * MATRIX[::-1]
    expected = apply(MATRIX) + 1j * apply(MATRIX[::-1])
    # Float32 sums in another order.
    assert_trees_close(apply(z), expected, rtol=5e-7)


def test_the_sum_of_every_column_stays():
    tx = ox.chain_in_float32(ox.centralize(), ox.sgd(0.1))
    updates, _ = tx.update(MATRIX, tx.init(MATRIX))
    # Sums of five float32 numbers of about 0.3.
    np.testing.assert_allclose(updates.sum(axis=0), np.zeros(3), atol=3e-7)
    assert not jax.tree.leaves(ox.centralize().init(MATRIX))


def test_wrong_parameters_and_axes_are_refused():
    message = "centralize: parameter 'n' of dtype int32 is not allowed"
    with pytest.raises(TypeError, match=message):
        ox.centralize().init({"n": jnp.ones(2, jnp.int32)})
    message = "centralize: parameter 'b': .* axis -2 is out of range"
    with pytest.raises(ValueError, match=message):
        ox.centralize(axes=STACKED_MATRIX).init({"b": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"(?s)centralize: no rule .*'kernel'"):
        ox.centralize().init({"kernel": jnp.ones((2, 3, 4))})


def test_rows_of_absent_tokens_stay():
    # The mean of an embedding is that of a token's features: over the tokens it would
    # move all of them.
    params = {"embedding": jnp.ones((6, 4)), "dense": {"kernel": jnp.ones((6, 4))}}
    grads = jax.tree.map(lambda p: jnp.zeros_like(p).at[0, :2].set(1.0), params)
    tx = ox.centralize()
    updates, _ = tx.update(grads, tx.init(params))
    np.testing.assert_array_equal(updates["embedding"][0], [0.5, 0.5, -0.5, -0.5])
    np.testing.assert_array_equal(updates["embedding"][1:], 0.0)
    assert np.all(updates["dense"]["kernel"][1:, :2] < 0)


def test_axes_that_are_given_are_taken_as_they_are():
    params = {"embedding": jnp.ones((6, 4))}
    grads = {"embedding": jnp.zeros((6, 4)).at[0].set(6.0)}
    tx = ox.centralize(axes=ox.MatrixAxes((0,), (1,)))
    updates, _ = tx.update(grads, tx.init(params))
    np.testing.assert_array_equal(updates["embedding"][:2], [[5.0] * 4, [-1.0] * 4])
