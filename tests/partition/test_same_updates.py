"""Where a matrix is stored does not change its update.

Layers apart or stacked by a scan, kernels of convolutions or flat, projections fused or
apart, heads in one kernel or in kernels of their own.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest

import optaxplus as ox
from optaxplus import DEFAULT_RULES, MatrixAxes, Rule
from tests.assertions import assert_trees_close
from tests.partition.model_zoo import LAYERS, llama
from tests.problems import normal_tree
from tests.selection import mostly

IN_OUT = MatrixAxes((0,), (1,))

# Every rule with a statistic of one matrix or vector. Products in float32: bfloat16
# rounds operands that differ in the last bit to different numbers.
OPTIMIZERS = {
    "muon": partial(ox.muon, compute_dtype="float32"),
    "lamb": partial(ox.lamb, weight_decay=0.1),
    "lars": ox.lars,
    "adafactor": partial(ox.adafactor, min_dim_size_to_factor=4),
    "came": ox.came,
    "adam_mini": ox.adam_mini,
    "stable_adamw": ox.stable_adamw,
    "mars": ox.mars,
}
_FAST = ("muon", "lamb", "adafactor")
NAMES = [
    pytest.param(name, marks=[] if name in _FAST else pytest.mark.slow)
    for name in OPTIMIZERS
]

# Sums over a slice of a stack and over a leaf of its own may be ordered differently.
# Newton-Schulz multiplies what is left of that at small singular values by up to 8 in
# each of five steps: 4.6e-6 of the largest element for kernels of 12 x 8 whose singular
# values span 40, and nothing at all for most others.
RTOL = dict.fromkeys(OPTIMIZERS, 1e-6) | {"muon": 1e-5}


def train(tx, params, gradients):
    """The updates of one step for each of the gradients."""
    update = jax.jit(tx.update)
    state, taken = tx.init(params), []
    for grads in gradients:
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        taken.append(updates)
    return taken


# Scans


def stack_layers(params, axis: int):
    """`layers_0`, `layers_1`, ... as one tree `layers` with an axis of layers."""
    layers = [params[f"layers_{index}"] for index in range(LAYERS)]
    rest = {name: tree for name, tree in params.items() if "layers_" not in name}
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *layers)
    return {**rest, "layers": stacked}


@pytest.fixture(scope="module")
def llama_run():
    """Parameters of the unstacked network and the gradients of three steps."""
    model, inputs = llama("none")
    params = model.init(jax.random.key(0), *inputs)["params"]

    @jax.jit
    @jax.grad
    def gradient(params):
        logits = model.apply({"params": params}, *inputs)
        targets = jnp.roll(inputs[0], -1, axis=1)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return losses.mean()

    gradients, moved = [], params
    for _ in range(3):
        gradients.append(gradient(moved))
        moved = jax.tree.map(lambda p, g: p - 0.1 * g, moved, gradients[-1])
    return params, gradients


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", mostly(["lamb", "adafactor"], OPTIMIZERS))
def test_scanned_layers_are_layers_apart(llama_run, name: str, axis: int):
    params, gradients = llama_run
    tx = OPTIMIZERS[name](0.01)
    model, inputs = llama(f"axis_{axis}")
    scanned = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    stack = partial(stack_layers, axis=axis)
    # The stack is the tree that Flax makes.
    shapes = jax.tree.map(jnp.shape, stack(params))
    assert shapes == jax.tree.map(lambda x: x.shape, scanned)
    ours = train(tx, stack(params), list(map(stack, gradients)))
    theirs = list(map(stack, train(tx, params, gradients)))
    assert_trees_close(ours, theirs, rtol=RTOL[name])


# Convolutions


@pytest.mark.parametrize(
    "window",
    [
        (3, 3),
        pytest.param((3,), marks=pytest.mark.slow),
        pytest.param((3, 3, 2), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_convolution_is_its_flat_matrix(name: str, window):
    shape, flat = (*window, 4, 20), (jnp.prod(jnp.array(window)) * 4, 20)
    convolution = {"conv": {"kernel": shape, "bias": (20,)}}
    params, *gradients = (normal_tree(convolution, seed=seed) for seed in range(4))

    def flatten(tree):
        kernel = tree["conv"]["kernel"].reshape(flat)
        return {"conv": {"kernel": kernel, "bias": tree["conv"]["bias"]}}

    tx = OPTIMIZERS[name](0.01)
    ours = list(map(flatten, train(tx, params, gradients)))
    theirs = train(tx, flatten(params), list(map(flatten, gradients)))
    assert_trees_close(ours, theirs, rtol=RTOL[name])


# Fused projections and heads


def apart(tree):
    """Query, key and value as kernels of their own."""
    kernels = jnp.split(tree["c_attn"]["kernel"], 3, axis=1)
    biases = jnp.split(tree["c_attn"]["bias"], 3)
    names = ("query", "key", "value")
    return {
        name: {"kernel": kernel, "bias": bias}
        for name, kernel, bias in zip(names, kernels, biases, strict=True)
    }


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name.values[0] not in ("adafactor", "came")]
)
def test_splits_are_separate_matrices(name: str):
    fused = {"c_attn": {"kernel": (12, 36), "bias": (36,)}}
    params, *gradients = (normal_tree(fused, seed=seed) for seed in range(4))
    tx = OPTIMIZERS[name](0.01)
    ours = list(map(apart, train(tx, params, gradients)))
    theirs = train(tx, apart(params), list(map(apart, gradients)))
    assert_trees_close(ours, theirs, rtol=RTOL[name])


def test_unequal_splits_of_grouped_queries():
    rule = Rule("qkv/kernel$", MatrixAxes((0,), (1,), (20, 8, 8)), "hidden")
    params, *gradients = (
        normal_tree({"qkv": {"kernel": (12, 36)}}, seed=seed) for seed in range(4)
    )

    def split(tree):
        kernels = jnp.split(tree["qkv"]["kernel"], (20, 28), axis=1)
        return {str(i): {"kernel": kernel} for i, kernel in enumerate(kernels)}

    muon = OPTIMIZERS["muon"]
    ours = train(muon(0.01, rules=(rule, *DEFAULT_RULES)), params, gradients)
    theirs = train(muon(0.01), split(params), list(map(split, gradients)))
    assert_trees_close(list(map(split, ours)), theirs, rtol=RTOL["muon"])


def test_muon_per_head():
    rules = (
        Rule("query/kernel$", MatrixAxes((0,), (2,)), "hidden"),
        Rule("out/kernel$", MatrixAxes((1,), (2,)), "hidden"),
        *DEFAULT_RULES,
    )
    shapes = {"query": {"kernel": (12, 3, 4)}, "out": {"kernel": (3, 4, 12)}}
    params, *gradients = (normal_tree(shapes, seed=seed) for seed in range(4))

    def heads(tree):
        return {
            f"head_{head}": {
                "query": {"kernel": tree["query"]["kernel"][:, head]},
                "out": {"kernel": tree["out"]["kernel"][head]},
            }
            for head in range(3)
        }

    muon = OPTIMIZERS["muon"]
    ours = list(map(heads, train(muon(0.01, rules=rules), params, gradients)))
    theirs = train(muon(0.01), heads(params), list(map(heads, gradients)))
    assert_trees_close(ours, theirs, rtol=RTOL["muon"])
    # Without the rules the heads are one matrix, which is another update.
    whole = list(map(heads, train(muon(0.01), params, gradients)))
    differences = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), whole, theirs)
    assert min(jax.tree.leaves(differences)) > 1e-3


def test_experts_are_matrices_of_their_own():
    stack = {"experts": {"wi": (7, 12, 20), "wo": (7, 20, 12)}}
    params, *gradients = (normal_tree(stack, seed=seed) for seed in range(4))

    def single(tree):
        return {
            f"{name}_{index}": {"w": tree["experts"][name][index]}
            for name in ("wi", "wo")
            for index in range(7)
        }

    for name in ("muon", "lamb", "adafactor"):
        tx = OPTIMIZERS[name](0.01)
        ours = list(map(single, train(tx, params, gradients)))
        theirs = train(tx, single(params), list(map(single, gradients)))
        assert_trees_close(ours, theirs, rtol=RTOL[name])


def test_gates_of_a_cell_are_matrices_of_their_own():
    cell = {"dense_i": {"kernel": (12, 20)}, "dense_h": {"kernel": (5, 20)}}
    params, *gradients = (normal_tree(cell, seed=seed) for seed in range(4))

    def gates(tree):
        return {
            f"{name}{gate}": {"kernel": kernel}
            for name in ("dense_i", "dense_h")
            for gate, kernel in enumerate(jnp.split(tree[name]["kernel"], 4, axis=1))
        }

    for name in ("muon", "lamb"):
        tx = OPTIMIZERS[name](0.01)
        ours = list(map(gates, train(tx, params, gradients)))
        theirs = train(tx, gates(params), list(map(gates, gradients)))
        assert_trees_close(ours, theirs, rtol=RTOL[name])
