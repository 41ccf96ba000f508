"""The benchmarks of narrow state and weights run, and compare what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

from benchmarks import train_gpt_storage
from optaxplus.numerics.quantization import CODES
from tests.problems import normal_tree
from tests.selection import mostly

ROOT = Path(__file__).resolve().parent.parent


def written(script: str, tmp_path: Path, *arguments: str) -> dict:
    """What a script writes; it is run from another folder."""
    out = tmp_path / "out.json"
    command = [sys.executable, ROOT / "benchmarks" / script, *arguments, "--out", out]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(
        command, check=True, capture_output=True, env=environment, cwd=tmp_path
    )
    return json.loads(out.read_text("utf-8"))


def test_losses_are_compared_with_float32_of_the_same_seed():
    def trained(storage: str, seed: int, loss: float) -> dict:
        return {
            "storage": storage,
            "optimizer": "adamw",
            "seed": seed,
            "validation": [[0, 5.0], [9, loss]],
            "num_params": 10,
            "weight_bytes": 20,
            "state_bytes": 21,
        }

    runs = [
        trained("adamw, 8-bit state", 1, 2.02),
        trained("adamw", 2, 4.0),
        trained("adamw", 1, 2.0),
        trained("adamw, 8-bit state", 2, 3.96),
        trained("adamw, 4-bit state", 3, 2.0),  # of which float32 is not there yet
    ]
    wide, narrow, alone = train_gpt_storage.summary(runs)
    assert wide["change"] == [0, 0, 0]
    assert narrow["change"] == pytest.approx([-1.0, 0.0, 1.0])
    assert narrow["loss"] == [2.02, 2.99, 3.96]
    assert (narrow["weight_bytes"], narrow["state_bytes"]) == (2.0, 2.1)
    assert alone["change"] is None
    header, *lines = train_gpt_storage.table(runs)
    assert [line[0] for line in lines] == [
        "adamw",
        "adamw, 8-bit state",
        "adamw, 4-bit state",
    ]
    assert lines[1][2] == "+0.00 % (-1.00 to +1.00)"
    assert len(header) == len(lines[0])


BY_DEFAULT = {
    "adamw, 4-bit state",
    "lion, 8-bit state",
    "adamw, bfloat16, compensated",
    "muon, bfloat16, master 24, 8-bit state",
}


@pytest.mark.parametrize("label", mostly(BY_DEFAULT, train_gpt_storage.RUNS))
def test_every_kind_of_storage_takes_steps(label: str, monkeypatch):
    # Removed again: other tests count the codes.
    monkeypatch.setitem(CODES, train_gpt_storage.FOUR_BITS, CODES["root"])
    storage = train_gpt_storage.RUNS[label]
    recipe = train_gpt_storage.recipe_of(storage)
    tx = recipe.build(optax.constant_schedule(recipe.learning_rate))
    shapes = {
        "embed": {"embedding": (8, 64)},
        "dense": {"kernel": (64, 64), "bias": (64,)},
    }
    params = optax.tree.cast(normal_tree(shapes, seed=0), storage.param_dtype)
    grads = optax.tree.cast(normal_tree(shapes, seed=1), storage.param_dtype)
    before, state, update = params, tx.init(params), jax.jit(tx.update)
    for _ in range(2):
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    kernel = params["dense"]["kernel"]
    assert kernel.dtype == storage.param_dtype
    assert jnp.any(kernel != before["dense"]["kernel"])


@pytest.mark.slow
def test_storage_time_writes_what_it_measured(tmp_path):
    found = written(
        "storage_time.py", tmp_path, "--width=128", "--layers=2", "--rounds=2"
    )
    assert {"date", "device", "versions", "seed", "threads"} <= found.keys()
    for row in found["rows"]:
        low, median, high = row["ratio"]
        assert 0 < low <= median <= high
        assert row["kept"]["state_bytes_per_param"] >= 0
    by_name = {row["name"]: row for row in found["rows"]}
    lion = by_name["quantize_state(lion)"]
    kept, plain = (lion[key]["state_bytes_per_param"] for key in ("kept", "plain"))
    assert kept < plain / 2


@pytest.mark.slow
def test_slow_averages_writes_what_it_measured(tmp_path):
    found = written("slow_averages.py", tmp_path, "--columns=4", "--memories=2")
    update_change = {
        line["code"]: line["update_change"]
        for line in found["averages"]
        if (line["decay"], line["gradients"]) == (0.999, "half shrink")
    }
    assert update_change["root, in turn"] < update_change["root, nearest"] / 2
    assert update_change["root, in turn"] < update_change["dynamic"] / 2


@pytest.mark.slow
def test_state_codes_writes_what_it_measured(tmp_path):
    found = written("state_codes.py", tmp_path, "--steps=4", "--at", "2", "4")
    for moment, best in (("first", "x^1/2"), ("second", "x^1/4")):
        changes = {line["code"]: line["update_change"] for line in found[moment]}
        assert changes[best] < changes["dynamic"]
        assert changes[best] < 0.03
        assert all(line["moment_change"] >= 0 for line in found[moment])
