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
