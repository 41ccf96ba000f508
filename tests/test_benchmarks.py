"""The benchmark scripts run, and compare what they say they compare."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import orthogonality, train_gpt_seeds
from benchmarks.peers import ROWS
from optaxplus.numerics import COEFFICIENT_TABLES
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_orthogonality_writes_what_it_measured(tmp_path):
    script = ROOT / "benchmarks" / "orthogonality.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, script, "--small", "--out", tmp_path],
        check=True,
        capture_output=True,
        env=environment,
    )
    results = json.loads((tmp_path / "orthogonality.json").read_text("utf-8"))
    assert {"date", "device", "versions", "seed"} <= results.keys()
    tables = {row["ns_coeffs"] for row in results["rows"]}
    assert tables == set(COEFFICIENT_TABLES)
    assert (tmp_path / "orthogonality.png").stat().st_size > 10_000


def test_orthogonality_of_a_set_of_matrices():
    tall = np.random.default_rng(0).standard_normal((512, 128))
    sets = {"one": [tall, tall[:128]], "other": [3 * tall.T, tall[128:256].T]}
    shapes = orthogonality.by_shape(sets)
    for kind, shape in orthogonality.SHAPES.items():
        assert {stack.shape for stack in shapes[kind].values()} == {(1, *shape)}
    exact = {
        name: orthogonality.exact_factors(stack)
        for name, stack in shapes["long"].items()
    }
    setting = orthogonality.Setting("deepseek", 10, "gram", "schatten", "float32")
    found = orthogonality.measure(setting, shapes["long"], exact)
    # The matrix and a multiple of its transpose, four digits of each error; the table
    # ends within 5e-4 of 1.
    assert found["errors"]["one"] == pytest.approx(found["errors"]["other"], rel=0.01)
    assert 0 < found["errors"]["one"] < 1e-3
    assert found["largest_singular_value"]["one"] == pytest.approx(1, abs=1e-3)
    # A step of the first block and of each pair: X·Xᵀ and Q·X; the rest is on the
    # 128 x 128 Gram matrix, a quarter of such a product.
    assert orthogonality.work(setting, (128, 512)) == 2 * 6 + (10 + 3 * 4) / 4


def test_seeds_are_compared_with_adamw_of_their_own():
    def run(optimizer: str, seed: int, *losses: float, rate: float = 1.0):
        validation = [[10 * i, loss] for i, loss in enumerate(losses)]
        same = {"learning_rate": rate, "arguments": {}, "steps": 20}
        return {
            "optimizer": optimizer,
            "seed": seed,
            "validation": validation,
            **same,
        }

    runs = [
        run("adamw", 1, 3.0, 2.0, 2.5),
        run("adamw", 2, 3.0, 1.8, 1.5),
        run("muon", 1, 9.0, 9.0, 9.0, rate=7.0),  # Of an older sweep.
        run("muon", 1, 3.0, 1.9, 1.0),
        run("muon", 2, 3.0, 1.7, 1.6),
    ]
    adamw, muon = train_gpt_seeds.summary(runs)
    assert adamw["steps_to_adamw_best"] == [10, 15, 20]
    assert muon["loss"] == [1.0, 1.3, 1.6]
    assert muon["steps_to_adamw_best"] == [10, np.inf, np.inf]
    assert train_gpt_seeds.table(runs)[2][-1] == "never (10 to never)"


def test_short_runs_are_compared_with_all_steps_of_adamw():
    def run(optimizer: str, seed: int, steps: int, last: float):
        return {
            "optimizer": optimizer,
            "seed": seed,
            "steps": steps,
            "learning_rate": 1.0,
            "arguments": {},
            "validation": [[0, 9.0], [steps, last]],
        }

    runs = [
        run("adamw", 1, 20, 2.0),
        run("adamw", 2, 20, 4.0),
        run("muon", 1, 20, 1.0),
        run("muon", 1, 10, 2.1),
        run("muon", 2, 10, 3.0),
    ]
    header, line = train_gpt_seeds.short_runs(runs, full=20)
    assert len(header) == len(line)
    assert line[:2] == ["muon", "10 of 20"]
    # 2.1 of 2.0, and 3.0 of 4.0: neither AdamW's short runs nor Muon's long ones.
    assert line[-1] == "-10.0 % (-25.0 to +5.0)"


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
