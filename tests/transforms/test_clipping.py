"""Clipping by the global norm and by the RMS of one update."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from optaxplus import MatrixAxes
from tests.assertions import assert_trees_close, assert_trees_equal
from tests.problems import normal_tree
from tests.references import clipping

SHAPES = {"w": (3, 4), "b": (4,), "s": ()}
UPDATES = normal_tree(SHAPES, seed=1, scale=10.0)
STACK = MatrixAxes((-2,), (-1,))


def apply(tx, updates):
    return tx.update(updates, tx.init(updates))[0]


# The global norm


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 30.0, 1e6])
def test_global_norm_reference(max_norm: float):
    leaves, treedef = jax.tree.flatten(UPDATES)
    expected = jax.tree.unflatten(
        treedef, clipping.clip_by_global_norm(leaves, max_norm)
    )
    # One float32 norm of seventeen entries.
    assert_trees_close(
        apply(ox.clip_by_global_norm(max_norm), UPDATES), expected, rtol=1e-6
    )


@pytest.mark.parametrize("max_norm", [1.0, 1e6])
def test_global_norm_is_optax(max_norm: float):
    # Float32 roundings.
    assert_trees_close(
        apply(ox.clip_by_global_norm(max_norm), UPDATES),
        apply(optax.clip_by_global_norm(max_norm), UPDATES),
        rtol=1e-6,
    )


def test_short_gradients_pass_unchanged():
    assert_trees_equal(apply(ox.clip_by_global_norm(1e3), UPDATES), UPDATES)


def test_long_gradients_keep_their_direction():
    clipped = apply(ox.clip_by_global_norm(2.0), UPDATES)
    # Float32 roundings.
    np.testing.assert_allclose(optax.tree.norm(clipped), 2.0, rtol=1e-6)
    ratios = jax.tree.map(lambda u, g: (u / g).ravel(), clipped, UPDATES)
    ratios = np.concatenate(jax.tree.leaves(ratios))
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-6)


def test_global_norm_ignores_how_leaves_are_grouped():
    flat = jnp.concatenate([u.ravel() for u in jax.tree.leaves(UPDATES)])
    clipped = apply(ox.clip_by_global_norm(2.0), UPDATES)
    expected = apply(ox.clip_by_global_norm(2.0), flat)
    # Float32 sums in another order.
    assert_trees_close(
        jnp.concatenate([u.ravel() for u in jax.tree.leaves(clipped)]),
        expected,
        rtol=1e-6,
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_norm_of_low_precision_gradients_is_float32(dtype: str):
    # 300 squared, ten times over, is infinity in float16.
    narrow = jax.tree.map(lambda u: (u * 30).astype(dtype), UPDATES)
    wide = jax.tree.map(lambda u: u.astype(jnp.float32), narrow)
    clipped = apply(ox.clip_by_global_norm(2.0), narrow)
    assert_trees_equal(clipped, apply(ox.clip_by_global_norm(2.0), wide))
    np.testing.assert_allclose(optax.tree.norm(clipped), 2.0, rtol=1e-6)


def test_norm_of_complex_gradients():
    z = jnp.asarray([3.0 + 4.0j, 12.0j], jnp.complex64)
    clipped = apply(ox.clip_by_global_norm(1.3), z)
    assert clipped.dtype == jnp.complex64
    # Float32 roundings of z / 10.
    np.testing.assert_allclose(clipped, [0.3 + 0.4j, 1.2j], rtol=1e-6)


def test_global_norm_of_zeros_and_of_what_overflows():
    tx = ox.clip_by_global_norm(1.0)
    zeros = jax.tree.map(jnp.zeros_like, UPDATES)
    assert_trees_equal(apply(tx, zeros), zeros)
    huge = {**UPDATES, "b": jnp.full(4, 1e25)}
    assert_trees_equal(apply(tx, huge), zeros)
    bad = {**UPDATES, "s": jnp.float32(jnp.nan)}
    assert all(np.isnan(u).all() for u in jax.tree.leaves(apply(tx, bad)))


def test_infinite_gradients_make_nan_where_they_are():
    updates = apply(ox.clip_by_global_norm(1.0), jnp.asarray([jnp.inf, 1.0]))
    np.testing.assert_array_equal(updates, [np.nan, 0.0])


def test_empty_trees_and_leaves_pass():
    tx = ox.clip_by_global_norm(1.0)
    params = {"n": None, "m": optax.MaskedNode(), "e": jnp.zeros((0, 3))}
    assert jax.tree.structure(apply(tx, params)) == jax.tree.structure(params)
    assert apply(tx, {}) == {}


# The RMS of one update


@pytest.mark.parametrize("threshold", [0.1, 1.0, 1e4])
def test_update_rms_reference(threshold: float):
    expected = jax.tree.map(lambda u: clipping.clip_update_rms(u, threshold), UPDATES)
    # One float32 mean of a dozen squares.
    assert_trees_close(
        apply(ox.clip_update_rms(threshold), UPDATES), expected, rtol=1e-6
    )


def test_update_rms_is_optax():
    # Float32 roundings.
    assert_trees_close(
        apply(ox.clip_update_rms(0.5), UPDATES),
        apply(optax.clip_by_block_rms(0.5), UPDATES),
        rtol=1e-6,
    )


def test_stack_is_its_slices_and_splits_are_separate():
    stack = normal_tree((3, 2, 5), seed=2) * jnp.asarray([0.1, 1, 9]).reshape(3, 1, 1)
    expected = jnp.stack([apply(ox.clip_update_rms(axes=STACK), one) for one in stack])
    # Float32 sums in another order.
    assert_trees_close(
        apply(ox.clip_update_rms(axes=STACK), stack), expected, rtol=1e-6
    )
    fused = MatrixAxes((1,), (2,), splits=(2, 3))
    parts = [apply(ox.clip_update_rms(axes=STACK), stack[..., :2])]
    parts += [apply(ox.clip_update_rms(axes=STACK), stack[..., 2:])]
    assert_trees_close(
        apply(ox.clip_update_rms(axes=fused), stack),
        jnp.concatenate(parts, axis=-1),
        rtol=1e-6,
    )


def test_update_rms_limits():
    tx = ox.clip_update_rms(axes=MatrixAxes((), (-1,)))
    updates = jnp.asarray([[0.0, 0.0], [3e30, 4e30], [jnp.nan, 1.0], [3.0, 4.0]])
    result = apply(tx, updates)
    # Squares of 1e30 overflow, so that row is cut to nothing.
    expected = np.array([[0, 0], [0, 0], [np.nan, np.nan], [3, 4]])
    expected[3] /= 12.5**0.5
    np.testing.assert_allclose(result, expected, rtol=1e-6)
    params = {"n": None, "m": optax.MaskedNode(), "e": jnp.zeros((0, 3))}
    assert jax.tree.structure(apply(tx, params)) == jax.tree.structure(params)


# Errors


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (
            ValueError,
            lambda: ox.clip_by_global_norm(0.0),
            "clip_by_global_norm: max_norm=0.0 is not allowed; .* finite number > 0",
        ),
        (
            ValueError,
            lambda: ox.clip_by_global_norm(float("inf")),
            "max_norm=inf",
        ),
        (ValueError, lambda: ox.clip_by_global_norm(-1), "max_norm=-1 is not allowed"),
        (TypeError, lambda: ox.clip_by_global_norm("1"), "max_norm='1' is not allowed"),
        (
            TypeError,
            lambda: ox.clip_by_global_norm(True),
            "max_norm=True is not allowed",
        ),
        (
            ValueError,
            lambda: ox.clip_update_rms(0.0),
            "clip_update_rms: threshold=0.0 is not allowed; .* > 0",
        ),
        (ValueError, lambda: ox.clip_update_rms(float("nan")), "threshold=nan is not"),
        (TypeError, lambda: ox.clip_update_rms(None), "threshold=None is not allowed"),
        (
            ValueError,
            lambda: ox.clip_update_rms(axes=STACK).init(UPDATES),
            "clip_update_rms: parameter 'b': .* axis -2 is out of range",
        ),
        (
            TypeError,
            lambda: ox.clip_update_rms().init({"n": jnp.ones(2, jnp.int8)}),
            "clip_update_rms: parameter 'n' of dtype int8 is not allowed",
        ),
        (
            TypeError,
            lambda: ox.clip_by_global_norm(1.0).init({"n": jnp.ones(2, jnp.int8)}),
            "clip_by_global_norm: parameter 'n' of dtype int8 is not allowed",
        ),
    ],
)
def test_wrong_arguments_are_refused(error, call, message: str):
    with pytest.raises(error, match=message):
        call()
