"""SOAP: its state, degenerate gradients, other transformations, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from optaxplus import MatrixAxes
from tests.assertions import assert_finite, assert_trees_close, assert_trees_equal
from tests.transforms.kron_runs import STACK, gradients
from tests.transforms.kronecker_runs import (
    FAST,
    MATRIX,
    QUICK,
    RTOL,
    SHAPE,
    adam_without_bases,
    assert_orthonormal,
)
from tests.transforms.kronecker_runs import follow as follow_any

# What compiles another program of a kind that another test has compiled.
slow = pytest.mark.slow
follow = functools.partial(follow_any, ox.scale_by_soap)


# State


@pytest.mark.parametrize(
    ("shape", "axes", "arguments", "expected"),
    [
        ((6, 4), MATRIX, {}, ((1, 6, 6), (1, 4, 4))),
        ((6, 4), MATRIX, {"max_dim": 5}, (None, (1, 4, 4))),
        ((6, 4), MATRIX, {"max_dim": 3}, (None, None)),
        (
            (6, 4),
            MATRIX,
            {"max_dim": 3, "large_dims": "tiles"},
            ((4, 3, 3), (4, 2, 2)),
        ),
        ((4,), MatrixAxes((), (0,)), {}, (None, None)),
        ((3, 4), MatrixAxes((), (1,)), {}, (None, None)),
        ((2, 3, 4, 5), MatrixAxes((0, 2), (3,)), {}, ((3, 1, 8, 8), (3, 1, 5, 5))),
        ((4, 9), MatrixAxes((0,), (1,), (3, 3, 3)), {}, ((3, 4, 4), (3, 3, 3))),
        ((4, 9), MatrixAxes((0,), (1,), (7, 2)), {}, ((2, 4, 4), (2, 7, 7))),
        ((0, 4), MATRIX, {}, ((1, 0, 0), (1, 4, 4))),
    ],
)
def test_shapes_of_factors(shape, axes, arguments, expected):
    tx = ox.scale_by_soap(axes=axes, **arguments)
    state = jax.eval_shape(tx.init, jax.ShapeDtypeStruct(shape, "bfloat16"))
    for factor, basis, wanted in zip(state[3:5], state[5:7], expected, strict=True):
        if wanted is None:
            assert isinstance(factor, optax.MaskedNode)
            assert isinstance(basis, optax.MaskedNode)
        else:
            assert factor.shape == basis.shape == wanted
            assert factor.dtype == basis.dtype == jnp.dtype("float32")


def test_bytes_are_known_before_they_are_allocated():
    square = {"w": jax.ShapeDtypeStruct((3, 512, 512), "bfloat16")}
    tx = ox.scale_by_soap(axes=STACK)
    # The two moments and 8·n² for each of two sides; the count.
    assert ox.memory_report(tx, square).state == 24 * 3 * 512**2 + 4
    tall = {"w": jax.ShapeDtypeStruct((2048, 512), "bfloat16")}
    assert ox.memory_report(tx, tall).state == (8 + 34) * 2048 * 512 + 4
    narrow = ox.scale_by_soap(axes=STACK, max_dim=1024, mu_dtype="bfloat16")
    assert ox.memory_report(narrow, tall).state == (6 + 2) * 2048 * 512 + 4
    large = {"w": jax.ShapeDtypeStruct((16384, 512), "bfloat16")}
    tiles = ox.scale_by_soap(axes=STACK, max_dim=512, large_dims="tiles")
    assert ox.memory_report(tiles, large).state == 24 * 16384 * 512 + 4


def test_low_precision():
    grads = [g.astype(jnp.bfloat16) for g in gradients(SHAPE, steps=5)]
    updates, states = follow(grads, **QUICK, mu_dtype="bfloat16")
    assert states[-1].mu.dtype == "bfloat16"
    assert {x.dtype.name for x in (updates[0], *states[-1][2:])} == {"float32"}
    exact, _ = follow([g.astype("float32") for g in grads], **QUICK)
    # Four stored means of 2^-9, and one more where it is turned.
    assert_trees_close(updates, exact, rtol=5 * 2**-9)


# Limits


def test_zero_gradients_give_zero():
    g = np.zeros(SHAPE, np.float32)
    updates, states = follow([g] * 5, **QUICK)
    assert_trees_equal(updates, [g] * 5)
    assert_finite(states)
    # The first gradient that is none makes no bases.
    grads = gradients(SHAPE, steps=6)
    updates, states = follow([g, *grads], **QUICK)
    assert_finite((updates, states))
    for state in states[1:]:
        for basis in (state.basis_in, state.basis_out):
            assert_orthonormal(basis)
    assert np.all(updates[-1] != 0)
    # Later, the mean goes on.
    updates, _ = follow([*grads, g], **QUICK)
    assert np.abs(updates[-1]).max() > 0.1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_entry_stays_in_its_matrix(bad: float):
    grads = gradients(SHAPE, steps=6)
    poisoned = [g.copy() for g in grads]
    poisoned[1][0, 1, 1] = bad
    updates, states = follow(poisoned, **QUICK)
    clean, clean_states = follow(grads, **QUICK)
    for t, (update, expected) in enumerate(zip(updates, clean, strict=True)):
        assert_trees_equal(update[1:], expected[1:])
        assert np.isnan(update[0]).all() == (t >= 1)
    for ours, theirs in zip(states[-1][1:], clean_states[-1][1:], strict=True):
        assert_trees_equal(ours[1:], theirs[1:])


def test_tiny_and_huge_gradients_are_finite():
    sizes = np.float32([1e-25, 1e17, 1e30]).reshape(3, 1, 1)
    grads = [sizes * np.tanh(100 * g) for g in gradients(SHAPE, steps=6)]
    updates, states = follow(grads, **QUICK)
    assert_finite(updates)
    # An ε of 1e-8 is far above the smallest.
    assert np.abs(updates[-1][0]).max() < 1e-15
    assert 0.1 < np.abs(updates[-1][1]).max() < 10
    # The squares of the largest are infinite, but its directions are known.
    assert_orthonormal(states[-1].basis_in)
    assert_orthonormal(states[-1].basis_out)
    ordinary, expected = follow([g / sizes for g in grads], **QUICK)
    first, wanted = states[0].basis_in[2], expected[0].basis_in[2]
    assert_trees_close(np.abs(first), np.abs(wanted), rtol=RTOL)
    assert_finite(ordinary)


def test_one_huge_gradient_stays_in_its_matrix():
    grads = gradients(SHAPE, steps=6)
    clean, _ = follow(grads, **QUICK)
    grads[2] = grads[2] * np.float32([1, 1e30, 1]).reshape(3, 1, 1)
    updates, _ = follow(grads, **QUICK)
    assert_finite(updates)
    for update, expected in zip(updates, clean, strict=True):
        assert_trees_equal(update[::2], expected[::2])


def test_matrices_of_one_row_and_of_none():
    shapes = {
        "row": (1, 4),
        "column": (4, 1),
        "single": (1, 1),
        "no_rows": (0, 4),
        "no_columns": (4, 0),
    }
    grads = gradients(shapes, steps=5)
    updates, states = follow(grads, axes=MATRIX, update_interval=2)
    assert_finite((updates, states))
    for name in ("row", "column", "single"):
        assert np.abs(updates[-1][name]).max() > 1e-3
        for basis in (states[-1].basis_in[name], states[-1].basis_out[name]):
            assert_orthonormal(basis)
    # One number has no direction but its own.
    expected = adam_without_bases([g["single"] for g in grads])
    for ours, theirs in zip(updates, expected, strict=True):
        assert_trees_close(ours["single"], np.float32(theirs), rtol=2e-6)


def test_none_and_masked_leaves_pass():
    params = {"n": None, "m": optax.MaskedNode(), "w": jnp.zeros((3, 4, 4))}
    tx = ox.scale_by_soap(**QUICK)
    updates, state = jax.eval_shape(tx.update, params, tx.init(params))
    assert updates["n"] is None
    assert isinstance(updates["m"], optax.MaskedNode)
    assert jax.tree.structure(state.factor_in) == jax.tree.structure(params)


# In other transformations


@slow
@pytest.mark.parametrize("b3", [None, 0.9])
def test_hyperparameters_change_without_compiling(b3):
    names = ("update_interval", "max_dim", "b3")
    tx = optax.inject_hyperparams(
        ox.scale_by_soap,
        static_args=names if b3 is None else names[:2],
        hyperparam_dtype=jnp.float32,
    )(**QUICK, b3=b3)
    grads = gradients(SHAPE, steps=4)
    update = jax.jit(tx.update, compiler_options=FAST)
    state = tx.init(grads[0])
    expected, _ = follow(grads, **QUICK, b3=b3)
    for g, theirs in zip(grads, expected, strict=True):
        ours, state = update(g, state)
        # 1 - b2 is computed in float32 there.
        assert_trees_close(jax.device_get(ours), theirs, rtol=RTOL)
    before = state
    for b1 in (0.95, 0.5):
        before.hyperparams["b1"] = jnp.float32(b1)
        updates, state = update(grads[0], before)
    assert np.abs(updates - update(grads[0], state)[0]).max() > 1e-3
    assert update._cache_size() == 1
