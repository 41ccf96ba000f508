"""What is specific to Adam-mini: which coordinates share a second moment."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from optaxplus import DEFAULT_RULES, MatrixAxes, Rule
from tests.assertions import assert_trees_close
from tests.problems import gradients, normal_tree
from tests.trajectories import follow, run

HEADS = {"kernel": (4, 2, 3), "bias": (2, 3)}
SHAPES = {
    "embed": {"embedding": (5, 4)},
    "attn": {
        "query": HEADS,
        "key": HEADS,
        "value": HEADS,
        "out": {"kernel": (2, 3, 4), "bias": (4,)},
    },
    "mlp": {"kernel": (4, 8), "bias": (8,)},
    "norm": {"scale": (4,)},
    "lm_head": {"kernel": (4, 5)},
}
# One number a head, a token, an output neuron; a whole norm; every bias.
NU = {
    "embed": {"embedding": (5, 1)},
    "attn": {
        "query": {"kernel": (1, 2, 1), "bias": (2, 3)},
        "key": {"kernel": (1, 2, 1), "bias": (2, 3)},
        "value": {"kernel": (1, 2, 3), "bias": (2, 3)},
        "out": {"kernel": (1, 1, 4), "bias": (4,)},
    },
    "mlp": {"kernel": (1, 8), "bias": (8,)},
    "norm": {"scale": (1,)},
    "lm_head": {"kernel": (1, 5)},
}
PARAMS = normal_tree(SHAPES, seed=0)
TREES = gradients(SHAPES, steps=2)


def nu_shapes(tx, params):
    nu = optax.tree.get(tx.init(params), "nu")
    return jax.tree.map(lambda v: v.shape, nu)


def is_shape(node) -> bool:
    return isinstance(node, tuple)


# The blocks


def test_blocks_of_a_transformer():
    assert nu_shapes(ox.adam_mini(0.1), PARAMS) == NU


def test_first_step_divides_by_the_root_mean_square_of_the_block():
    tx = ox.adam_mini(0.1, b1=0.0, eps=1e-30)
    (updates,), _ = run(tx, PARAMS, TREES[:1])

    def expected(shape, g):
        g = np.asarray(g, np.float64)
        over = tuple(axis for axis, size in enumerate(shape) if size < g.shape[axis])
        return -0.1 * g / np.sqrt((g**2).mean(axis=over, keepdims=True))

    # A mean of at most a dozen squares, a root and a quotient.
    assert_trees_close(
        updates, jax.tree.map(expected, NU, TREES[0], is_leaf=is_shape), rtol=1e-6
    )


def test_every_layer_of_a_stack_has_its_own_blocks():
    def stacked(shape):
        return (5, *shape)

    layers = {key: SHAPES[key] for key in ("attn", "mlp", "norm")}
    shapes = jax.tree.map(stacked, layers, is_leaf=is_shape)
    expected = jax.tree.map(stacked, {key: NU[key] for key in layers}, is_leaf=is_shape)
    params = {"layers": normal_tree(shapes, seed=1)}
    # A bias beside each kernel tells the stack.
    assert nu_shapes(ox.adam_mini(0.1), params) == {"layers": expected}


@pytest.mark.parametrize("name", ["wq", "k_proj/weight", "attn/key/kernel"])
def test_heads_stored_side_by_side_are_splits(name: str):
    params = {name: jnp.ones((4, 6))}
    # Without a rule heads do not show: one number an output.
    assert nu_shapes(ox.adam_mini(0.1), params) == {name: (1, 6)}
    heads = Rule("", MatrixAxes((0,), (1,), splits=(3, 3)), "hidden")
    tx = ox.adam_mini(0.1, rules=(heads, *DEFAULT_RULES))
    assert nu_shapes(tx, params) == {name: (1, 2)}


def test_other_matrices_ignore_splits():
    # A fused projection in which values count too: by outputs.
    rule = Rule("", MatrixAxes((0,), (1,), splits=(3, 3)), "hidden")
    tx = ox.adam_mini(0.1, rules=(rule,))
    assert nu_shapes(tx, {"qkv": jnp.ones((4, 6))}) == {"qkv": (1, 6)}


@pytest.mark.parametrize("name", ["queryable", "monkey", "key_norm"])
def test_names_that_merely_contain_a_head_are_none(name: str):
    rule = Rule("", MatrixAxes((0,), (1, 2)), "hidden")
    tx = ox.adam_mini(0.1, rules=(rule,))
    params = {name: {"kernel": jnp.ones((4, 2, 3))}}
    assert nu_shapes(tx, params) == {name: {"kernel": (1, 2, 3)}}


# Reductions


def test_biases_alone_are_adamw():
    params = {"a": {"bias": jnp.asarray([1.0, -2.0])}, "b": jnp.asarray([3.0])}
    grads = jax.tree.map(lambda p: jnp.stack([p, -2 * p, 3 * p]), params)
    # The same operations, but a factor is formed before it meets the mean.
    assert_trees_close(
        follow(ox.adam_mini(0.1, weight_decay=0.3), params, grads)[0],
        follow(ox.adamw(0.1, weight_decay=0.3), params, grads)[0],
        rtol=1e-6,
    )


def test_every_argument_reaches_its_link():
    params, grads = PARAMS["mlp"]["kernel"], [tree["mlp"]["kernel"] for tree in TREES]
    arguments = {"eps": 0.1, "mu_dtype": "bfloat16", "nu_dtype": "float16"}
    tx = ox.adam_mini(
        0.1, b1=0.8, b2=0.7, weight_decay=0.3, decay="proximal", **arguments
    )
    expected = optax.chain(
        ox.scale_by_adam_mini(0.8, 0.7, axes=MatrixAxes((), (0,)), **arguments),
        ox.descend(0.1, 0.3, decay="proximal"),
    )
    # The same operations.
    assert_trees_close(
        run(tx, params, grads)[0], run(expected, params, grads)[0], rtol=1e-7
    )


# Weight decay and what is frozen


@pytest.mark.parametrize(
    ("mask", "decays"),
    [
        (None, {"embed": 1, "attn": 1, "mlp": 1, "norm": 1, "lm_head": 1}),
        (
            {"embed": True, "attn": False, "mlp": True, "norm": False, "lm_head": True},
            {"embed": 1, "attn": 0, "mlp": 1, "norm": 0, "lm_head": 1},
        ),
    ],
)
def test_mask(mask, decays):
    tx = ox.adam_mini(0.1, weight_decay=0.5, mask=mask)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    (updates,), _ = run(tx, PARAMS, [zeros])
    for key, on in decays.items():
        expected = jax.tree.map(lambda p, on=on: -0.05 * on * p, PARAMS[key])
        # Two float32 roundings.
        assert_trees_close(updates[key], expected, rtol=3e-7)


def test_decay_mask_leaves_vectors_out():
    tx = ox.adam_mini(0.1, weight_decay=0.5, mask=ox.decay_mask)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    (updates,), _ = run(tx, PARAMS, [zeros])
    expected = jax.tree.map(
        lambda p, decays: -0.05 * decays * p, PARAMS, ox.decay_mask(PARAMS)
    )
    # Two float32 roundings.
    assert_trees_close(updates, expected, rtol=3e-7)


def test_frozen_parameters_do_not_change():
    frozen = Rule("^embed/", MatrixAxes((0,), (1,)), "frozen")
    for mask in (None, {"embed": True, "mlp": True}):
        tx = ox.adam_mini(
            0.1, weight_decay=0.5, mask=mask, rules=(frozen, *DEFAULT_RULES)
        )
        params = {key: PARAMS[key] for key in ("embed", "mlp")}
        grads = {
            "embed": {"embedding": jnp.full((5, 4), jnp.nan)},
            "mlp": TREES[0]["mlp"],
        }
        (updates,), state = run(tx, params, [grads])
        np.testing.assert_array_equal(updates["embed"]["embedding"], np.zeros((5, 4)))
        assert (np.asarray(updates["mlp"]["kernel"]) != 0).all()
        # Nor have they any state.
        assert not jax.tree.leaves(optax.tree.get(state, "mu")["embed"])


# Errors


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"learning_rate": -0.1}, "adam_mini: learning_rate=-0.1 is not"),
        (ValueError, {"weight_decay": -0.1}, "adam_mini: weight_decay=-0.1 .* >= 0"),
        (ValueError, {"b1": 1.0}, r"adam_mini: b1=1.0 is not allowed; .* \[0, 1\)"),
        (ValueError, {"b2": -0.1}, "adam_mini: b2=-0.1 is not allowed"),
        (ValueError, {"eps": 0.0}, "adam_mini: eps=0.0 is not allowed; .* > 0"),
        (ValueError, {"decay": "l2"}, "decay='l2' is not allowed; .* 'decoupled'"),
        (TypeError, {"rules": "muon"}, "rules='muon' is not allowed; .* sequence"),
        (TypeError, {"mu_dtype": "int8"}, "mu_dtype='int8' is not allowed"),
        (TypeError, {"nu_dtype": "int8"}, "nu_dtype='int8' is not allowed"),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message: str):
    with pytest.raises(error, match=message):
        ox.adam_mini(**{"learning_rate": 0.1, **arguments})


def test_wrong_parameters_are_refused():
    with pytest.raises(TypeError, match="parameter 'n' of dtype int32 is not allowed"):
        ox.adam_mini(0.1).init({"n": jnp.ones(2, jnp.int32)})
    with pytest.raises(ValueError, match=r"(?s)no rule decides .*'kernel'"):
        ox.adam_mini(0.1).init({"kernel": jnp.ones((2, 3, 4))})


def test_masks_that_do_not_fit_are_refused():
    tx = ox.adam_mini(0.1, weight_decay=0.1, mask={"embed": True})
    with pytest.raises(ValueError, match="adam_mini: mask is not a prefix"):
        tx.init(PARAMS)


def test_params_are_needed_for_decay_alone():
    tx = ox.adam_mini(0.1)
    tx.update(TREES[0], tx.init(PARAMS))
    tx = ox.adam_mini(0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match="adam_mini: params=None is not allowed"):
        tx.update(TREES[0], tx.init(PARAMS))
