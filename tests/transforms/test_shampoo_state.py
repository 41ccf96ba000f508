"""Shampoo: its state, degenerate gradients, other transformations, refusals."""

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
)
from tests.transforms.kronecker_runs import follow as follow_any

PLAIN = {**QUICK, "grafting": None}
# What Algorithm 1 of the paper does in its first step, and in every step.
ONE_STEP = {"b1": 0.0, "update_interval": 1, "grafting": None, "eps": 0.0}
# What compiles another program of a kind that another test has compiled.
slow = pytest.mark.slow
follow = functools.partial(follow_any, ox.scale_by_shampoo)


# State


@pytest.mark.parametrize(
    ("shape", "axes", "arguments", "expected"),
    [
        ((6, 4), MATRIX, {}, ((1, 6, 6), (1, 4, 4))),
        ((6, 4), MATRIX, {"max_dim": 3}, ((4, 3, 3), (4, 2, 2))),
        (
            (6, 4),
            MATRIX,
            {"max_dim": 5, "large_dims": "diagonal"},
            ((1, 6, 1), (1, 4, 4)),
        ),
        ((4,), MatrixAxes((), (0,)), {}, (None, (1, 4, 4))),
        (
            (4,),
            MatrixAxes((), (0,)),
            {"max_dim": 3, "large_dims": "diagonal"},
            (None, (1, 4, 1)),
        ),
        ((3, 4), MatrixAxes((), (1,)), {}, (None, (3, 1, 4, 4))),
        ((2, 3, 4, 5), MatrixAxes((0, 2), (3,)), {}, ((3, 1, 8, 8), (3, 1, 5, 5))),
        ((4, 9), MatrixAxes((0,), (1,), (3, 3, 3)), {}, ((3, 4, 4), (3, 3, 3))),
        ((4, 9), MatrixAxes((0,), (1,), (7, 2)), {}, ((2, 4, 4), (2, 7, 7))),
        ((0, 4), MATRIX, {}, ((1, 0, 0), (1, 4, 4))),
    ],
)
def test_shapes_of_factors(shape, axes, arguments, expected):
    tx = ox.scale_by_shampoo(axes=axes, **arguments)
    state = jax.eval_shape(tx.init, jax.ShapeDtypeStruct(shape, "bfloat16"))
    for factor, root, wanted in zip(state[3:5], state[5:7], expected, strict=True):
        if wanted is None:
            assert isinstance(factor, optax.MaskedNode)
            assert isinstance(root, optax.MaskedNode)
        else:
            assert factor.shape == root.shape == wanted
            assert factor.dtype == root.dtype == jnp.dtype("float32")


def test_bytes_are_known_before_they_are_allocated():
    square = {"w": jax.ShapeDtypeStruct((3, 512, 512), "bfloat16")}
    # The mean, V, and 8·n² for each of two sides; the count.
    for grafting, wanted in (("adam", 24), ("adagrad", 24), ("sgd", 20), (None, 20)):
        tx = ox.scale_by_shampoo(axes=STACK, grafting=grafting)
        assert ox.memory_report(tx, square).state == wanted * 3 * 512**2 + 4
    large = {"w": jax.ShapeDtypeStruct((16384, 2048), "bfloat16")}
    tiles = ox.scale_by_shampoo(axes=STACK)
    assert ox.memory_report(tiles, large).state == 24 * 16384 * 2048 + 4
    diagonal = ox.scale_by_shampoo(
        axes=STACK, large_dims="diagonal", mu_dtype="bfloat16", nu_dtype="bfloat16"
    )
    wanted = 4 * 16384 * 2048 + 8 * (16384 + 2048) + 4
    assert ox.memory_report(diagonal, large).state == wanted


def test_low_precision():
    grads = [g.astype(jnp.bfloat16) for g in gradients(SHAPE, steps=4)]
    low = {"mu_dtype": "bfloat16", "nu_dtype": "bfloat16"}
    updates, states = follow(grads, **QUICK, **low)
    assert {x.dtype.name for x in (states[-1].mu, states[-1].nu)} == {"bfloat16"}
    assert {x.dtype.name for x in (updates[0], *states[-1][3:])} == {"float32"}
    exact, _ = follow([g.astype("float32") for g in grads], **QUICK)
    # Three stored means of 2^-9, which roots of a condition of about 10 amplify.
    assert_trees_close(updates, exact, rtol=10 * 3 * 2**-9)


# Limits


def test_zero_gradients_give_zero():
    g = np.zeros(SHAPE, np.float32)
    updates, states = follow([g] * 5, **QUICK)
    assert_trees_equal(updates, [g] * 5)
    assert_finite(states)
    grads = gradients(SHAPE, steps=6)
    updates, states = follow([g, *grads], **QUICK)
    assert_finite((updates, states))
    # The first gradients come before the first roots.
    assert not updates[2].any()
    assert np.all(updates[3] != 0)
    # Later, the mean goes on.
    updates, _ = follow([*grads, g], **QUICK)
    assert np.abs(updates[-1]).max() > 0.1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_entry_stays_in_its_matrix(bad: float):
    grads = gradients(SHAPE, steps=5)
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
    sizes = np.float32([1e-15, 1e13, 1e30]).reshape(3, 1, 1)
    grads = [np.tanh(100 * g) for g in gradients(SHAPE, steps=4)]
    expected, _ = follow(grads, **PLAIN)
    updates, _ = follow([sizes * g for g in grads], **PLAIN)
    assert_finite(updates)
    for ours, theirs in zip(updates, expected, strict=True):
        assert_trees_close(ours[:2], theirs[:2], rtol=RTOL)
    grafted, _ = follow([sizes * g for g in grads], **QUICK)
    assert_finite(grafted)
    # ε_D is far above the smallest.
    assert np.abs(grafted[-1][0]).max() < 1e-4
    assert np.abs(grafted[-1][1]).max() > 0.1


def test_one_huge_gradient_stays_in_its_matrix():
    grads = gradients(SHAPE, steps=5)
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
    grads = gradients(shapes, steps=3)
    updates, states = follow(grads, **ONE_STEP, axes=MATRIX)
    assert_finite((updates, states))
    for name in ("row", "column", "single"):
        g = grads[0][name]
        # What is 0 in a factor of rank 1 is raised to rounding, 1e-7, and its root is
        # 50 times the largest: it multiplies roundings.
        assert_trees_close(updates[0][name], g / np.linalg.norm(g), rtol=1e-4)


def test_rank_deficient_gradients():
    rng = np.random.default_rng(0)
    low = rng.standard_normal((5, 3, 4, 1)) @ rng.standard_normal((3, 1, 4))
    updates, states = follow(list(np.float32(low)), **PLAIN)
    assert_finite((updates, states))
    # Nothing in the directions of the roots of ε but roundings.
    for update in updates:
        values = np.linalg.svd(update, compute_uv=False)
        assert (values[:, 1] < 1e-4 * values[:, 0]).all()


def test_none_and_masked_leaves_pass():
    params = {"n": None, "m": optax.MaskedNode(), "w": jnp.zeros((3, 4, 4))}
    tx = ox.scale_by_shampoo(**QUICK)
    updates, state = jax.eval_shape(tx.update, params, tx.init(params))
    assert updates["n"] is None
    assert isinstance(updates["m"], optax.MaskedNode)
    assert jax.tree.structure(state.factor_in) == jax.tree.structure(params)


# In other transformations


@slow
@pytest.mark.parametrize(
    ("arguments", "static"),
    [
        ({}, ()),
        ({"root_order": 3}, ("root_order",)),
        ({"b2": 1.0}, ("b2",)),
        ({"root_method": "newton"}, ("eps",)),
    ],
    ids=str,
)
def test_hyperparameters_change_without_compiling(arguments, static):
    tx = optax.inject_hyperparams(
        ox.scale_by_shampoo,
        static_args=("update_interval", "max_dim", *static),
        hyperparam_dtype=jnp.float32,
    )(**QUICK, **arguments)
    grads = gradients(SHAPE, steps=4)
    update = jax.jit(tx.update, compiler_options=FAST)
    state = tx.init(grads[0])
    expected, _ = follow(grads, **QUICK, **arguments)
    for g, theirs in zip(grads, expected, strict=True):
        ours, state = update(g, state)
        # 1 - b2 is computed in float32 there.
        assert_trees_close(jax.device_get(ours), theirs, rtol=RTOL)
    results = []
    for b1 in (0.95, 0.5):
        state.hyperparams["b1"] = jnp.float32(b1)
        results.append(update(grads[0], state)[0])
    assert np.abs(results[0] - results[1]).max() > 1e-3
    assert update._cache_size() == 1
