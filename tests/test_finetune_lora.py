"""Low-rank factors beside the parameters of a Flax model, and the example with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import unflatten_dict

import optaxplus as ox
from examples.gpt import GPT, GPTConfig, next_token_loss
from examples.lora import (
    base_params,
    factor_params,
    init_lora,
    is_identical,
    leaves_by_path,
    merge_lora,
)
from examples.text import python_manual
from tests.problems import normal_tree

ROOT = Path(__file__).parent.parent
RANK, ALPHA = 2, 4.0
MODEL = GPT(GPTConfig(width=16, depth=1, head_size=8, context=8, vocabulary=16))


@pytest.fixture(scope="module")
def params():
    tokens = jnp.zeros((1, MODEL.config.context), jnp.int32)
    return jax.jit(MODEL.init)(jax.random.key(0), tokens)["params"]


@pytest.fixture(scope="module")
def tree(params):
    return init_lora(params, RANK, jax.random.key(1))


def toy_windows() -> jax.Array:
    """A text that repeats itself."""
    return jnp.arange(4 * 9).reshape(4, 9) % 5


def loss(tree) -> jax.Array:
    return next_token_loss(MODEL, merge_lora(tree, ALPHA), toy_windows())


def take_step(tx, tree, state):
    value, grads = jax.value_and_grad(loss)(tree)
    updates, state = tx.update(grads, state, tree)
    return optax.apply_updates(tree, updates), state, value


def test_nothing_changes_at_first(params, tree):
    assert is_identical(merge_lora(tree, ALPHA), params)
    assert is_identical(base_params(tree), params)
    adapted = {path[:-1] for path in leaves_by_path(factor_params(tree))}
    assert adapted == {
        *(("block_0", "attention", name) for name in ("query", "key", "value", "out")),
        *(("block_0", "mlp", name) for name in ("up", "down")),
    }


@pytest.mark.parametrize(
    ("module", "shape", "fan_in", "fan_out"),
    [
        (("mlp", "up"), (16, 64), 16, 64),
        (("attention", "query"), (16, 2, 8), 16, 16),
        (("attention", "out"), (2, 8, 16), 16, 16),
    ],
)
def test_merging_multiplies_matrices(tree, module, shape, fan_in, fan_out):
    random = normal_tree(jax.tree.map(lambda leaf: leaf.shape, tree), seed=0)
    path = ("block_0", *module)
    leaves = leaves_by_path(random)
    kernel, a, b = (
        np.asarray(leaves[*path, name]) for name in ("kernel", "lora_a", "lora_b")
    )
    product = a.reshape(fan_in, RANK) @ b.reshape(RANK, fan_out)
    merged = leaves_by_path(merge_lora(random, ALPHA))[*path, "kernel"]
    assert merged.shape == kernel.shape == shape
    expected = kernel + ALPHA / RANK * product.reshape(shape)
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-5)


def test_copies_lead_and_other_names_are_kept():
    experts = ox.Rule("w_in$", ox.MatrixAxes((1,), (2,)), "hidden")
    rules = (experts, *ox.DEFAULT_RULES)
    params = {"experts": {"w_in": jnp.ones((3, 4, 5))}}
    tree = init_lora(params, RANK, jax.random.key(0), rules)
    a, b = (tree["experts"][f"w_in_lora_{name}"] for name in "ab")
    assert (a.shape, b.shape) == ((3, 4, RANK), (3, RANK, 5))
    tree["experts"]["w_in_lora_b"] = b + 1
    merged = merge_lora(tree, ALPHA, rules)["experts"]["w_in"]
    expected = 1 + ALPHA / RANK * jnp.sum(a, axis=2, keepdims=True) * jnp.ones(5)
    np.testing.assert_allclose(merged, expected, rtol=1e-5)
    roles = ox.infer_roles(tree, ox.LORA_RULES)["experts"]
    assert roles == {
        "w_in": "frozen",
        "w_in_lora_a": "other",
        "w_in_lora_b": "hidden",
    }


def test_state_is_that_of_the_factors_alone(tree):
    tx = ox.muon(1e-2, rules=ox.LORA_RULES)
    report = ox.memory_report(tx, tree)
    assert report.state == ox.memory_report(tx, factor_params(tree)).state
    sizes = {"lora_a": 0, "lora_b": 0}
    for path, leaf in leaves_by_path(factor_params(tree)).items():
        sizes[path[-1]] += leaf.size
    counts = [leaf for leaf in jax.tree.leaves(tx.init(tree)) if leaf.ndim == 0]
    scalars = sum(leaf.nbytes for leaf in counts)
    assert report.state == 8 * sizes["lora_a"] + 4 * sizes["lora_b"] + scalars
    assert report.by_label["frozen"] == 0


def test_the_base_stays_and_the_loss_falls(params, tree):
    tx = ox.muon(0.1, rules=ox.LORA_RULES, ns_steps=2, weight_decay=0.1)
    step = jax.jit(partial(take_step, tx))
    trained, state, losses = tree, tx.init(tree), []
    for _ in range(20):
        trained, state, value = step(trained, state)
        losses.append(float(value))
    assert is_identical(base_params(trained), params)
    assert not is_identical(factor_params(trained), factor_params(tree))
    # The head is frozen as it was drawn, so the loss cannot fall far.
    assert losses[-1] < losses[0] - 0.1


def test_gradients_of_the_base_are_not_computed(tree):
    """Differentiating the whole tree costs what differentiating the factors costs."""
    tx = ox.muon(1e-2, rules=ox.LORA_RULES, clip_norm=1.0, ns_steps=1)
    base, factors = base_params(tree), factor_params(tree)

    def take_step_of_factors(base, factors, state):
        def loss_of_factors(factors):
            leaves = leaves_by_path(base) | leaves_by_path(factors)
            return loss(unflatten_dict(leaves))

        value, grads = jax.value_and_grad(loss_of_factors)(factors)
        updates, state = tx.update(grads, state, factors)
        return optax.apply_updates(factors, updates), state, value

    whole = flops(partial(take_step, tx), tree, tx.init(tree))
    assert whole == flops(take_step_of_factors, base, factors, tx.init(factors))


def flops(function, *arguments) -> float:
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def test_the_manual_is_split_into_different_topics():
    manual = python_manual()
    train, validation = (
        {line for line in bytes(part).decode().splitlines() if len(line) > 40}
        for part in (manual.train, manual.validation)
    )
    assert len(train) > len(validation) > 500
    assert len(train & validation) < 5


@pytest.mark.slow
def test_everything_is_written(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "finetune_lora.py")]
    command += ["--steps", "3", "--width", "64", "--out", str(tmp_path)]
    command += ["--methods", "lora-muon", "full-adamw"]
    # One device, whatever the suite has simulated for itself.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    environment["PYTHONPATH"] = str(ROOT)
    printed = subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True
    ).stdout
    found = json.loads((tmp_path / "results.json").read_text())
    assert set(found) >= {"base", "device", "versions", "seed", "arguments"}
    assert list(found["runs"]) == ["lora-muon", "full-adamw"]
    base = found["base"]
    for name, run in found["runs"].items():
        assert [step for step, _ in run["train"]] == [1, 2, 3]
        for curve, of_base in (
            (run["validation"], base["other_validation"]),
            (run["other_validation"], base["validation"]),
        ):
            assert [step for step, _ in curve] == [0, 1, 2, 3]
            # Factors whose product is zero change nothing.
            assert curve[0][1] == pytest.approx(of_base[-1][1], rel=1e-5)
        assert run["validation"][-1][1] < run["validation"][0][1]
        assert run["is_base_unchanged"] is (None if "full" in name else True)
        assert run["seconds"] > 0
    lora, full = found["runs"].values()
    # AdamW has two numbers for every parameter; Muon, for B, one.
    assert 0 <= full["state_bytes"] - 8 * full["trained_parameters"] < 64
    assert lora["state_bytes"] < 8 * lora["trained_parameters"]
    assert (tmp_path / "finetune_lora.png").stat().st_size > 10_000
    for expected in ("block_{0-3}/attention/query/lora_a", "frozen 0", 'The "match"'):
        assert expected in printed
