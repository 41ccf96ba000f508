"""Chains that compute in float32 and round once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from tests.assertions import assert_trees_equal
from tests.problems import normal_tree

PARAMS = normal_tree({"w": (3, 4), "b": (4,)}, seed=0)
GRADS = normal_tree({"w": (3, 4), "b": (4,)}, seed=1)


def links():
    return (
        ox.scale_by_ema(0.9),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(0.01),
    )


def test_float32_is_optax_chain():
    ours, theirs = ox.chain_in_float32(*links()), optax.chain(*links())
    state, expected_state = ours.init(PARAMS), theirs.init(PARAMS)
    assert_trees_equal(state, expected_state)
    for _ in range(3):
        updates, state = ours.update(GRADS, state, PARAMS)
        expected, expected_state = theirs.update(GRADS, expected_state, PARAMS)
        assert_trees_equal((updates, state), (expected, expected_state))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_rounded_once(dtype: str):
    params, grads = (
        jax.tree.map(lambda x: x.astype(dtype), tree) for tree in (PARAMS, GRADS)
    )
    wide_params, wide_grads = (
        jax.tree.map(lambda x: x.astype("float32"), tree) for tree in (params, grads)
    )
    tx, reference = ox.chain_in_float32(*links()), optax.chain(*links())
    updates, _ = tx.update(grads, tx.init(params), params)
    expected, _ = reference.update(wide_grads, reference.init(wide_params), wide_params)
    assert_trees_equal(updates, jax.tree.map(lambda u: u.astype(dtype), expected))
    # optax's own chain rounds at every link, which shows here.
    rounded, _ = reference.update(grads, reference.init(params), params)
    assert any(
        not np.array_equal(np.float32(x), np.float32(y))
        for x, y in zip(jax.tree.leaves(rounded), jax.tree.leaves(updates), strict=True)
    )


def test_gradients_decide_the_dtype_of_the_update():
    tx = ox.chain_in_float32(*links())
    grads = {"w": GRADS["w"].astype("bfloat16"), "b": GRADS["b"]}
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    assert [u.dtype for u in jax.tree.leaves(updates)] == [jnp.float32, jnp.bfloat16]


def test_wider_types_stay():
    tx = ox.chain_in_float32(optax.scale(0.5))
    z = jnp.asarray([1 + 2j], jnp.complex64)
    np.testing.assert_array_equal(tx.update(z, tx.init(z))[0], z / 2)
    with jax.enable_x64(True):
        x = jnp.asarray([1.0 + 1e-12])
        np.testing.assert_array_equal(tx.update(x, tx.init(x))[0], np.float64(x) / 2)


def test_extra_arguments_reach_the_links_that_take_them():
    def update(updates, state, params=None, *, value, **extra):
        del params, extra
        return jax.tree.map(lambda u: u * value, updates), state

    by_value = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )
    tx = ox.chain_in_float32(by_value, optax.scale(2.0))
    state = tx.init(PARAMS)
    updates, _ = tx.update(GRADS, state, PARAMS, value=3.0, unknown="ignored")
    assert_trees_equal(updates, jax.tree.map(lambda g: g * 3.0 * 2.0, GRADS))


def test_nodes_without_arrays_pass():
    tx = ox.chain_in_float32(optax.identity())
    grads = {"x": jnp.ones(2, jnp.bfloat16), "n": None, "m": optax.MaskedNode()}
    updates, _ = tx.update(grads, tx.init(grads))
    assert jax.tree.structure(updates) == jax.tree.structure(grads)
    assert_trees_equal(updates["x"], grads["x"])


def test_params_are_optional_where_no_link_reads_them():
    tx = ox.chain_in_float32(ox.scale_by_sign(), optax.scale(-0.1))
    updates, _ = tx.update(GRADS, tx.init(PARAMS))
    expected = jax.tree.map(lambda g: jnp.sign(g) * -0.1, GRADS)
    assert_trees_equal(updates, expected)


def test_state_of_optax_links_keeps_its_dtype():
    # optax.adamw stores its moments in the dtype of the parameters.
    params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    tx = ox.muon(1e-3, fallback=optax.adamw(1e-3))
    state = tx.init(params)
    _, after = jax.eval_shape(tx.update, params, state, params)
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(
        lambda x: x.dtype, state
    )


@pytest.mark.parametrize(
    ("name", "tx"),
    [
        ("sgd", ox.sgd(0.1, weight_decay=0.1)),
        ("adamw", ox.adamw(0.1)),
        ("lion", ox.lion(0.1)),
        ("lars", ox.lars(0.1)),
        ("lamb", ox.lamb(0.1)),
        ("adafactor", ox.adafactor(0.1)),
        ("muon", ox.muon(0.1)),
    ],
)
def test_missing_params_are_refused_under_the_name_of_the_optimizer(name, tx):
    params = {"kernel": jnp.ones((4, 3))}
    with pytest.raises(ValueError, match=rf"^{name}: params=None is not allowed"):
        tx.update(params, tx.init(params))


def test_python_numbers_are_parameters_too():
    tx = ox.adamw(0.1)
    updates, _ = tx.update({"a": 1.0}, tx.init({"a": 1.0}), {"a": 1.0})
    assert updates["a"].dtype == jnp.float32


def test_a_link_has_to_be_a_transformation():
    with pytest.raises(TypeError, match=r"^chain_in_float32: links\[1\]=0.1 is not"):
        ox.chain_in_float32(ox.scale_by_sign(), 0.1)
