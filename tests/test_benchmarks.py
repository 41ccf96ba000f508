"""The benchmark scripts run, and compare what they say they compare."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks.peers import ROWS
from tests.assertions import assert_trees_close
from tests.problems import normal_tree
from tests.trajectories import run

ROOT = Path(__file__).resolve().parent.parent

# Rules that optax has in another form, of the same cost: see the docstrings of ours.
OTHER_FORMS = {"adan", "amsgrad", "nadam"}
SHAPES = {"layer": {"kernel": (6, 4)}, "norm": {"scale": (4,)}}


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.optax], ids=lambda r: r.name
)
def test_peers_do_the_same(row):
    params = normal_tree(SHAPES, seed=0)
    grads = [normal_tree(SHAPES, seed=seed) for seed in range(1, 5)]
    ours, theirs = (run(tx, params, grads)[0] for tx in (row.ours, row.optax))
    if row.name in OTHER_FORMS:
        differences = jax.tree.map(lambda a, b: abs(a - b).max(), ours, theirs)
        assert max(jax.tree.leaves(differences)) > 0
        return
    for a, b in zip(ours, theirs, strict=True):
        # optax forms 1 - 0.999**t in float32, an error of 3e-5 of the first steps.
        assert_trees_close(a, b, rtol=1e-4)


def test_update_time_writes_what_it_measured(tmp_path):
    out = tmp_path / "update_time.json"
    command = [sys.executable, ROOT / "benchmarks" / "update_time.py", "--small"]
    command += ["--only", "sgd", "lamb", "--rounds", "2", "--out", out]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    printed = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout
    results = json.loads(out.read_text("utf-8"))
    assert [row["name"] for row in results["rows"]] == ["sgd", "lamb"]
    assert {"date", "device", "versions", "seed", "threads"} <= results.keys()
    for row in results["rows"]:
        assert row["name"] in printed
        low, median, high = row["ratio_to_optax"]
        assert 0 < low <= median <= high
        assert row["candidates"]["optaxplus"]["state_bytes_per_param"] >= 0


def test_muon_time_writes_what_it_measured(tmp_path):
    out = tmp_path / "muon_time.json"
    command = [sys.executable, ROOT / "benchmarks" / "muon_time.py", "--small"]
    command += ["--rounds", "2", "--out", out]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    (model,) = json.loads(out.read_text("utf-8"))["models"]
    found = model["candidates"]
    assert {"ox.muon", "ox.muon, float32", "optax.contrib.muon"} <= found.keys()
    for row in model["ratios"]:
        low, median, high = row["ratio"]
        assert 0 < low <= median <= high
    # The errors that the time is bought with: never above optax's.
    for key in ("query", "up", "down"):
        error = found["optax.contrib.muon"]["polar_error"][key]
        for name, entry in found.items():
            assert 0 < entry["polar_error"][key] <= 1.01 * error, (name, key)


@pytest.mark.tpu
def test_muon_compile_time_does_not_grow_with_depth(tmp_path):
    products = []
    for layers in ("2", "4"):
        out = tmp_path / f"{layers}.json"
        script = ROOT / "benchmarks" / "muon_compile_time.py"
        command = [sys.executable, script, "--layers", layers, "--rounds", "1"]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])
        }
        subprocess.run(
            [*command, "--width", "128", "--out", out],
            check=True,
            capture_output=True,
            env=environment,
        )
        found = json.loads(out.read_text("utf-8"))["found"]
        products.append(found["ox.muon"][0]["products"])
    # One iteration for each of two shapes, however many layers.
    assert products[0] == products[1]
