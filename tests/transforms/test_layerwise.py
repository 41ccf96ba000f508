"""Trust ratios and parameter RMS, one for every matrix or vector."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from optaxplus import MatrixAxes
from tests.assertions import assert_trees_close, assert_trees_equal
from tests.problems import normal_tree
from tests.references.layerwise import lars
from tests.trajectories import follow_in_float64

SHAPES = {"w": (3, 4), "b": (4,), "s": ()}
PARAMS = normal_tree(SHAPES, seed=0)
UPDATES = normal_tree(SHAPES, seed=1, scale=10.0)
STACK = MatrixAxes((-2,), (-1,))


def apply(tx, updates, params):
    return tx.update(updates, tx.init(params), params)[0]


def by_hand(u, w, *, trust_coefficient=1.0, weight_decay=0.0, eps=0.0) -> np.ndarray:
    u, w = (np.asarray(x, np.float64) for x in (u, w))
    u_norm, w_norm = np.linalg.norm(u), np.linalg.norm(w)
    denominator = u_norm + weight_decay * w_norm + eps
    ratio = trust_coefficient * w_norm / denominator
    return ratio * (u + weight_decay * w)


# Agreement


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"trust_coefficient": 1e-3, "weight_decay": 0.1},
        {"weight_decay": 0.1, "eps": 0.5},
    ],
    ids=str,
)
def test_trust_ratio_by_hand(arguments):
    expected = jax.tree.map(lambda u, w: by_hand(u, w, **arguments), UPDATES, PARAMS)
    # Two norms of a dozen float32 roundings.
    assert_trees_close(
        apply(ox.trust_ratio(**arguments), UPDATES, PARAMS), expected, rtol=1e-6
    )


def test_trust_ratio_is_the_lars_of_the_paper():
    grads = np.random.default_rng(0).standard_normal((5, 3, 4))
    tx = optax.chain(
        ox.trust_ratio(trust_coefficient=0.1, weight_decay=0.2), optax.scale(-1.0)
    )
    expected = lars(
        PARAMS["w"],
        grads,
        learning_rate=1.0,
        momentum=0.0,
        trust_coefficient=0.1,
        weight_decay=0.2,
    )
    # Float64 roundings.
    np.testing.assert_allclose(
        follow_in_float64(tx, PARAMS["w"], grads), expected, rtol=1e-13
    )


def test_param_rms_by_hand():
    expected = jax.tree.map(
        lambda u, w: np.float64(u) * np.sqrt(np.mean(np.float64(w) ** 2)),
        UPDATES,
        PARAMS,
    )
    # Float32 roundings.
    assert_trees_close(
        apply(ox.scale_by_param_rms(), UPDATES, PARAMS), expected, rtol=1e-6
    )


# Reductions


@pytest.mark.parametrize("trust_coefficient", [1.0, 0.01])
def test_trust_ratio_is_optax(trust_coefficient: float):
    ours = ox.trust_ratio(trust_coefficient=trust_coefficient)
    theirs = optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient)
    # Float32 roundings.
    assert_trees_close(
        apply(ours, UPDATES, PARAMS), apply(theirs, UPDATES, PARAMS), rtol=1e-6
    )


@pytest.mark.parametrize("min_rms", [1e-3, 10.0])
def test_param_rms_is_optax(min_rms: float):
    theirs = optax.scale_by_param_block_rms(min_scale=min_rms)
    ours = ox.scale_by_param_rms(min_rms=min_rms)
    # Float32 roundings.
    assert_trees_close(
        apply(ours, UPDATES, PARAMS), apply(theirs, UPDATES, PARAMS), rtol=1e-6
    )


# Invariances


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40])
def test_trust_ratio_does_not_see_the_scale_of_the_update(scale: float):
    scaled = jax.tree.map(lambda u: u * scale, UPDATES)
    expected = apply(ox.trust_ratio(), UPDATES, PARAMS)
    assert_trees_close(  # Float32 roundings.
        apply(ox.trust_ratio(), scaled, PARAMS), expected, rtol=1e-6
    )
    for u, w in zip(jax.tree.leaves(expected), jax.tree.leaves(PARAMS), strict=True):
        np.testing.assert_allclose(
            np.linalg.norm(u), np.linalg.norm(w), rtol=1e-6, err_msg="a step is as long"
        )


@pytest.mark.parametrize(
    "tx",
    [
        lambda axes: ox.trust_ratio(weight_decay=0.1, axes=axes),
        lambda axes: ox.scale_by_param_rms(axes=axes),
    ],
    ids=["trust_ratio", "param_rms"],
)
class TestBlocks:
    def test_stack_is_its_slices(self, tx):
        scales = jnp.asarray([1e-3, 1.0, 1e3]).reshape(3, 1, 1)
        params = normal_tree((3, 2, 4), seed=2) * scales
        updates = normal_tree((3, 2, 4), seed=3) / scales
        slices = [apply(tx(STACK), u, p) for u, p in zip(updates, params, strict=True)]
        # Float32 sums in another order, slice by slice.
        for whole, one in zip(apply(tx(STACK), updates, params), slices, strict=True):
            assert_trees_close(whole, one, rtol=1e-6)

    def test_splits_are_matrices_of_their_own(self, tx):
        params = normal_tree((2, 5), seed=2) * jnp.asarray([1.0, 1, 9, 9, 9])
        updates = normal_tree((2, 5), seed=3)
        fused = MatrixAxes((0,), (1,), splits=(2, 3))
        parts = [
            apply(tx(STACK), updates[:, cut], params[:, cut])
            for cut in (slice(0, 2), slice(2, 5))
        ]
        # Float32 sums in another order.
        assert_trees_close(
            apply(tx(fused), updates, params), jnp.hstack(parts), rtol=1e-6
        )

    def test_axes_may_be_a_tree_or_a_function(self, tx):
        params = {"w": normal_tree((3, 2, 4), seed=2), "b": normal_tree((4,), seed=4)}
        updates = jax.tree.map(lambda p: p[::-1], params)
        tree = {"w": STACK, "b": MatrixAxes((), (0,))}
        expected = apply(tx(tree), updates, params)
        assert_trees_equal(apply(tx(lambda params: tree), updates, params), expected)
        for name in tree:
            assert_trees_equal(
                apply(tx(tree[name]), updates[name], params[name]), expected[name]
            )

    def test_reflections_and_permutations(self, tx):
        updates, params = UPDATES["w"], PARAMS["w"]
        flipped = apply(tx(None), -updates[::-1, ::-1], -params[::-1, ::-1])
        # Float32 sums in another order.
        assert_trees_close(
            flipped, -apply(tx(None), updates, params)[::-1, ::-1], rtol=1e-6
        )

    def test_low_precision_is_computed_in_float32(self, tx):
        narrow = [
            jax.tree.map(lambda x: x.astype("bfloat16"), tree)
            for tree in (UPDATES, PARAMS)
        ]
        wide = [jax.tree.map(lambda x: x.astype("float32"), tree) for tree in narrow]
        assert_trees_equal(apply(tx(None), *narrow), apply(tx(None), *wide))

    def test_empty_none_and_masked_leaves_pass(self, tx):
        params = {"n": None, "m": optax.MaskedNode(), "e": jnp.zeros((0, 3))}
        updates = apply(tx(STACK), params, params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)

    def test_missing_params_are_refused(self, tx):
        transformation = tx(None)
        with pytest.raises(ValueError, match=r"params=None .*update\(grads, state, p"):
            transformation.update(UPDATES, transformation.init(PARAMS))

    def test_axes_that_do_not_fit_are_refused(self, tx):
        message = r"parameter 'b': .* axis -2 is out of range"
        with pytest.raises(ValueError, match=message):
            tx(STACK).init(PARAMS)

    def test_integer_parameters_are_refused(self, tx):
        with pytest.raises(TypeError, match="parameter 'n' of dtype int32 is not"):
            tx(None).init({"n": jnp.ones(2, jnp.int32)})


# Limits


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_undefined_ratios_are_one(weight_decay: float):
    tx = ox.trust_ratio(trust_coefficient=0.5, weight_decay=weight_decay)
    zeros, u = jnp.zeros((2, 3)), jnp.full((2, 3), 7.0)
    np.testing.assert_array_equal(apply(tx, u, zeros), u)
    np.testing.assert_array_equal(apply(tx, zeros, zeros), zeros)
    # Without a gradient LARS still decays, by the whole trust coefficient.
    decayed = apply(tx, zeros, u)
    np.testing.assert_allclose(decayed, 0.5 * u if weight_decay else zeros, rtol=1e-6)


def test_bad_entries_stay_in_their_block():
    updates = {**UPDATES, "b": UPDATES["b"].at[1].set(jnp.nan)}
    result = apply(ox.trust_ratio(), updates, PARAMS)
    assert np.isnan(result["b"]).all()
    expected = apply(ox.trust_ratio(), UPDATES, PARAMS)
    np.testing.assert_array_equal(result["w"], expected["w"])


def test_complex_numbers():
    pairs = [normal_tree((2, 6), seed=seed) for seed in (5, 6)]
    numbers = [x[:, :3] + 1j * x[:, 3:] for x in pairs]
    # A norm does not tell complex numbers from pairs; a mean counts half as many.
    for tx, factor in ((ox.trust_ratio(), 1), (ox.scale_by_param_rms(), 2**0.5)):
        result, expected = apply(tx, *numbers), factor * apply(tx, *pairs)
        # Float32 sums in another order.
        assert_trees_close(jnp.hstack([result.real, result.imag]), expected, rtol=1e-6)


def test_zero_parameters_can_grow():
    result = apply(ox.scale_by_param_rms(min_rms=0.25), jnp.ones(3), jnp.zeros(3))
    np.testing.assert_array_equal(result, np.full(3, 0.25))


# Errors


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (
            ValueError,
            lambda: ox.trust_ratio(trust_coefficient=0.0),
            "trust_ratio: trust_coefficient=0.0 is not allowed; .* > 0",
        ),
        (
            ValueError,
            lambda: ox.trust_ratio(weight_decay=-0.1),
            "trust_ratio: weight_decay=-0.1 is not allowed; .* >= 0",
        ),
        (ValueError, lambda: ox.trust_ratio(eps=float("nan")), "trust_ratio: eps=nan"),
        (TypeError, lambda: ox.trust_ratio(eps=True), "trust_ratio: eps=True is not"),
        (
            TypeError,
            lambda: ox.trust_ratio(weight_decay="0.1"),
            "trust_ratio: weight_decay='0.1' is not allowed",
        ),
        (
            ValueError,
            lambda: ox.scale_by_param_rms(min_rms=0.0),
            "scale_by_param_rms: min_rms=0.0 is not allowed; .* > 0",
        ),
        (
            TypeError,
            lambda: ox.scale_by_param_rms(min_rms=None),
            "scale_by_param_rms: min_rms=None is not allowed",
        ),
    ],
)
def test_wrong_arguments_are_refused(error, call, message: str):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("axes", [(0, 1), "matrix", {"w": STACK, "b": None, "s": 3}])
def test_things_that_are_no_axes_are_refused(axes):
    with pytest.raises((TypeError, ValueError), match="trust_ratio: axes"):
        ox.trust_ratio(axes=axes).init(PARAMS)


def test_bounds_in_the_wrong_order_are_refused():
    message = "trust_ratio: min_param_norm=2.0 is not .* at most max_param_norm=1.0"
    with pytest.raises(ValueError, match=message):
        ox.trust_ratio(min_param_norm=2.0, max_param_norm=1.0)


def test_what_is_masked_passes_unchanged():
    tx = ox.trust_ratio(weight_decay=0.1, mask={"w": True, "b": False, "s": False})
    updates = apply(tx, UPDATES, PARAMS)
    everything = apply(ox.trust_ratio(weight_decay=0.1), UPDATES, PARAMS)
    assert_trees_equal(updates, UPDATES | {"w": everything["w"]})
