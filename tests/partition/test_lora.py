"""LoRA: B to Muon, A to AdamW, the base neither moved nor remembered."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optaxplus as ox
from optaxplus import DEFAULT_RULES, LORA_RULES, MatrixAxes, Rule
from tests.assertions import assert_trees_equal
from tests.partition.model_zoo import MODELS
from tests.partition.routing_tables import abstract, routing
from tests.problems import normal_tree

SHAPES = {
    "embed": {"embedding": (31, 12)},
    "query": {"kernel": (12, 3, 4), "lora_a": (12, 2), "lora_b": (2, 3, 4)},
    "up": {"kernel": (12, 20), "bias": (20,), "lora_a": (12, 2), "lora_b": (2, 20)},
}
FACTORS = (12 * 2, 2 * 12, 12 * 2, 2 * 20)


def state_bytes(state) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.ndim)


def test_state_is_that_of_the_factors_alone():
    params = normal_tree(SHAPES, seed=0)
    state = ox.muon(0.1, rules=LORA_RULES).init(params)
    # Muon keeps one moment of each B, AdamW two of each A.
    expected = 4 * (FACTORS[1] + FACTORS[3]) + 8 * (FACTORS[0] + FACTORS[2])
    assert state_bytes(state) == expected
    report = ox.memory_report(ox.muon(0.1, rules=LORA_RULES), params)
    assert report.state - expected < 64  # step counts


def test_the_base_does_not_move_and_the_factors_do():
    params, grads = (normal_tree(SHAPES, seed=seed) for seed in (0, 1))
    tx = ox.muon(0.1, rules=LORA_RULES, clip_norm=1.0)
    state, moved = tx.init(params), params
    for _ in range(3):
        updates, state = tx.update(grads, state, moved)
        moved = optax.apply_updates(moved, updates)
    for path in (("embed", "embedding"), ("query", "kernel"), ("up", "bias")):
        before, after = (tree[path[0]][path[1]] for tree in (params, moved))
        np.testing.assert_array_equal(before, after)
    for module in ("query", "up"):
        for factor in ("lora_a", "lora_b"):
            assert np.all(moved[module][factor] != params[module][factor])


@pytest.mark.parametrize(
    "make",
    [
        lambda labels: optax.partition(
            {
                "adamw": ox.adamw(0.1),
                "muon": ox.lion(0.1),
                "frozen": optax.set_to_zero(),
            },
            labels,
        ),
        lambda labels: optax.multi_transform(
            {
                "adamw": optax.adamw(0.1),
                "muon": optax.sgd(0.1),
                "frozen": optax.set_to_zero(),
            },
            labels,
        ),
    ],
    ids=["partition", "multi_transform"],
)
def test_labels_freeze_the_base_for_any_optimizer(make):
    params = normal_tree(SHAPES, seed=0)
    labels = ox.label_params(params, LORA_RULES)
    tx = make(labels)
    state = tx.init(params)
    assert state_bytes(state) <= 8 * sum(FACTORS)
    updates, _ = tx.update(params, state, params)
    assert_trees_equal(updates["embed"], jax.tree.map(jnp.zeros_like, params["embed"]))


def test_a_model_without_factors_is_not_frozen_whole():
    message = "muon: no parameter is a factor A of a low-rank update"
    with pytest.raises(ValueError, match=message):
        ox.muon(0.1, rules=LORA_RULES).init({"w": jnp.ones((2, 3))})


@pytest.mark.parametrize(
    "module", ["LoRADense_0", "lora_layers/0", "up/lora/base_module", "LoraLinear_3"]
)
def test_the_base_beside_factors_is_frozen_whatever_its_module_is_called(module):
    tree = abstract(
        {f"{module}/kernel": (12, 20), "lora_a": (12, 2), "lora_b": (2, 20)}
    )
    roles = routing(tree, LORA_RULES)
    assert roles[f"{module}/kernel"][0] == "frozen"


def test_an_undecided_factor_is_not_frozen():
    # Neither (5, 12) -> 2 nor five times (12 -> 2) without its B beside it.
    tree = abstract({"lora_a": (5, 12, 2), "m/lora_b": (2, 3)})
    with pytest.raises(ValueError, match=r"no rule decides.*\n.*'lora_a'"):
        ox.infer_roles(tree, LORA_RULES)


def test_more_than_the_factors_may_train():
    norms = Rule(r"bias$", MatrixAxes((), (-1,)), "vector")
    labels = ox.label_params(normal_tree(SHAPES, seed=0), (norms, *LORA_RULES))
    assert labels["up"] == {
        "kernel": "frozen",
        "bias": "adamw",
        "lora_a": "adamw",
        "lora_b": "muon",
    }


NAMES = {
    "flax": {"up/lora_a": (12, 2), "up/lora_b": (2, 20)},
    "modules": {"up/lora_a/kernel": (12, 2), "up/lora_b/kernel": (2, 20)},
    "upper case": {"up/lora_A": (12, 2), "up/lora_B": (2, 20)},
    "gemma": {"up/lora/a": (12, 2), "up/lora/b": (2, 20)},
    "gemma's einsum": {"mlp/lora/a": (12, 2), "mlp/lora/b": (2, 3, 20)},
    "qwix": {"q_proj/w_lora_a": (12, 2), "q_proj/w_lora_b": (2, 3, 4)},
    "qwix, output": {"o_proj/w_lora_a": (3, 4, 2), "o_proj/w_lora_b": (2, 12)},
    "keras": {"up/lora_kernel_a": (12, 2), "up/lora_kernel_b": (2, 20)},
    "maxtext": {"query/lora_a.kernel": (12, 2), "query/lora_b.kernel": (2, 3, 4)},
    "copies": {"q_einsum/lora_a": (6, 12, 2), "q_einsum/lora_b": (6, 2, 4)},
    "a stack": {"up/lora_a": (5, 12, 2), "up/lora_b": (5, 2, 20)},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rules", [DEFAULT_RULES, LORA_RULES])
def test_names_of_factors(name: str, rules):
    (a_path, a), (b_path, b) = NAMES[name].items()
    table = routing(abstract(NAMES[name]), rules)
    copies = 1 if a[0] == b[0] else 0
    assert table[a_path] == ("other", tuple(range(copies, len(a) - 1)), (len(a) - 1,))
    assert table[b_path] == ("hidden", (copies,), tuple(range(copies + 1, len(b))))


def test_nnx_trains_the_factors_alone():
    model = nnx.Sequential(
        nnx.LoRALinear(12, 20, lora_rank=2, rngs=nnx.Rngs(0)),
        nnx.LoRALinear(20, 12, lora_rank=2, rngs=nnx.Rngs(1)),
    )
    tx = ox.muon(0.1, rules=LORA_RULES)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    kernels = [jnp.copy(layer.kernel[...]) for layer in model.layers]

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.sum((model(jnp.ones((3, 12))) - 1.0) ** 2)

        grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        value = loss(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(15)]
    assert losses[-1] < 0.5 * losses[0]
    for layer, kernel in zip(model.layers, kernels, strict=True):
        np.testing.assert_array_equal(layer.kernel[...], kernel)


@pytest.mark.parametrize("name", ["linen_lora", "nnx_lora"])
def test_rules_see_shapes_alone(name: str):
    state = jax.eval_shape(ox.muon(0.1, rules=LORA_RULES).init, MODELS[name]())
    sizes = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    rows = ox.explain_routing(MODELS[name](), LORA_RULES).rows
    counts = {"muon": 1, "adamw": 2, "frozen": 0}
    assert sizes == sum(counts[row.label] * row.size for row in rows)
