"""What is specific to Ranger."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from optaxplus import MatrixAxes
from tests.assertions import assert_trees_close, assert_trees_equal
from tests.problems import gradients, normal_tree
from tests.references.lookahead import ranger as reference
from tests.trajectories import follow, follow_in_float64

SHAPES = {"w": (3, 4), "b": (4,)}
STEPS = 8
PARAMS = normal_tree(SHAPES, seed=0)
TREES = gradients(SHAPES, steps=STEPS)
GRADS = jax.tree.map(lambda *g: jnp.stack(g), *TREES)


def test_reference():
    arguments = {"every_k": 3, "alpha": 0.3, "weight_decay": 0.2, "threshold": 4.0}
    tx = ox.ranger(0.1, **arguments)
    expected = reference(PARAMS["w"], GRADS["w"], learning_rate=0.1, **arguments)
    # Float64 roundings of eight steps of about 0.1; ρ - 4 is as small as 0.01 in the
    # first step that is rectified.
    np.testing.assert_allclose(
        follow_in_float64(tx, PARAMS["w"], GRADS["w"]), expected, rtol=0, atol=1e-11
    )


def test_links_switched_off_leave_radam():
    tx = ox.ranger(0.1, alpha=1.0, gradient_centralization=False, weight_decay=0.3)
    radam = ox.radam(0.1, b1=0.95, eps=1e-5, weight_decay=0.3)
    # p + ((p + u) - p) rounds three times.
    assert_trees_close(
        follow(tx, PARAMS, GRADS)[0], follow(radam, PARAMS, GRADS)[0], rtol=1e-6
    )


@pytest.mark.parametrize("centralization", [True, False])
def test_every_argument_reaches_its_link(centralization: bool):
    mask = {"w": True, "b": False}
    axes = {"w": MatrixAxes((1,), (0,)), "b": MatrixAxes((), (0,))}
    tx = ox.ranger(
        0.1,
        b1=0.8,
        b2=0.9,
        eps=1e-3,
        threshold=6.0,
        every_k=2,
        alpha=0.3,
        gradient_centralization=centralization,
        weight_decay=0.3,
        mask=mask,
        decay="cautious",
        axes=axes,
    )
    expected = ox.lookahead(
        optax.chain(
            ox.centralize(axes=axes) if centralization else optax.identity(),
            ox.scale_by_radam(0.8, 0.9, eps=1e-3, threshold=6.0),
            ox.descend(0.1, 0.3, mask=mask, decay="cautious"),
        ),
        every_k=2,
        alpha=0.3,
    )
    # The same operations; fusion may order them differently.
    assert_trees_close(
        follow(tx, PARAMS, GRADS)[0], follow(expected, PARAMS, GRADS)[0], rtol=1e-6
    )


def test_slow_parameters_are_found_by_name():
    tx = ox.ranger(0.1, every_k=2)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    state = tx.init(params)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    assert_trees_equal(optax.tree.get(state, "slow"), wide)
    updates, state = tx.update(params, state, params)
    assert {u.dtype.name for u in jax.tree.leaves(updates)} == {"bfloat16"}
    assert_trees_equal(optax.tree.get(state, "slow"), wide)


def test_columns_keep_their_sums():
    # Of matrices without decay: every step is centralized, and so are their averages.
    # Not so once steps are divided entry by entry, so the first five alone.
    params, _ = follow(ox.ranger(1e-3), PARAMS, jax.tree.map(lambda g: g[:5], GRADS))
    sums = params["w"].sum(axis=1)
    start = np.broadcast_to(PARAMS["w"].sum(axis=0), sums.shape)
    # Float32 sums of three numbers of about 1.
    np.testing.assert_allclose(sums, start, rtol=0, atol=2e-6)
    assert np.abs(params["w"][-1] - PARAMS["w"]).max() > 0.1


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"learning_rate": -0.1}, "ranger: learning_rate=-0.1 is not"),
        (ValueError, {"weight_decay": -0.1}, "ranger: weight_decay=-0.1 .* >= 0"),
        (
            TypeError,
            {"gradient_centralization": 1},
            "ranger: gradient_centr.*=1 is not",
        ),
        (ValueError, {"b1": 1.0}, r"b1=1.0 is not allowed; .* \[0, 1\)"),
        (ValueError, {"b2": -0.1}, "b2=-0.1 is not allowed"),
        (ValueError, {"eps": 0.0}, "eps=0.0 is not allowed; .* > 0"),
        (ValueError, {"threshold": 0.0}, "threshold=0.0 is not allowed; .* > 0"),
        (ValueError, {"every_k": 0}, "every_k=0 is not allowed; .* >= 1"),
        (ValueError, {"alpha": 1.1}, "alpha=1.1 is not allowed; .* at most 1"),
        (ValueError, {"decay": "l2"}, "decay='l2' is not allowed; .* one of"),
        (TypeError, {"mu_dtype": "int8"}, "mu_dtype='int8' is not allowed"),
        (TypeError, {"nu_dtype": "int8"}, "nu_dtype='int8' is not allowed"),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message: str):
    with pytest.raises(error, match=message):
        ox.ranger(**{"learning_rate": 0.1, **arguments})


def test_params_are_needed_with_and_without_decay():
    for weight_decay in (0.0, 0.1):
        tx = ox.ranger(0.1, weight_decay=weight_decay)
        with pytest.raises(ValueError, match="ranger: params=None is not allowed"):
            tx.update(TREES[0], tx.init(PARAMS))


def test_axes_and_masks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"centralize: parameter 'b': .* out of range"):
        ox.ranger(0.1, axes=MatrixAxes((-2,), (-1,))).init(PARAMS)
    with pytest.raises(ValueError, match="descend: mask is not a prefix"):
        ox.ranger(0.1, weight_decay=0.1, mask={"w": True}).init(PARAMS)
