"""The benchmark of the optimizers with curvature runs, and knows what refreshes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import curvature_cost, curvature_methods
from benchmarks.curvature_methods import METHODS, MethodStep, before
from tests.assertions import assert_trees_close
from tests.problems import normal_tree

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 8
SHAPES = {"layer_0": {"up": (WIDTH, 2 * WIDTH)}}


def step_of(name: str) -> MethodStep:
    params, *gradients = (normal_tree(SHAPES, seed=seed) for seed in range(4))
    return MethodStep(name, WIDTH, params, gradients)


@pytest.mark.parametrize("name", ["kron", "shampoo", "soap", "sophia"])
def test_only_refreshes_change_what_is_slow(name):
    step = step_of(name)
    step.check()
    for kind in ("plain", "refresh", "plain"):
        step.prepare(kind)
        old = step.slow()
        step()
        same = {np.array_equal(value, old[key]) for key, value in step.slow().items()}
        assert same == {kind == "plain"}
    if name == "soap":  # Its first step is taken back.
        old = jax.tree.map(np.asarray, (step.params, step.state))
        step.prepare("first")
        step()
        step.reset()
        assert_trees_close((step.params, step.state), old, rtol=0)


def test_a_step_of_the_wrong_kind_is_an_error(monkeypatch):
    monkeypatch.setitem(curvature_methods.COUNTS, "plain", 0)
    with pytest.raises(AssertionError, match="plain step: slow fields changed"):
        step_of("sophia").check()


def test_a_known_kind_of_step_has_no_conditional():
    """What is compiled for TPUs, compiled here."""
    step = step_of('shampoo(root_method="newton")')

    def text(kind: str | None) -> str:
        def update(state, grads):
            state = state if kind is None else before(kind, state)
            return step.tx.update(grads, state, step.params)

        return jax.jit(update).lower(step.state, step.grads).compile().as_text()

    assert " conditional(" in text(None)
    plain, refresh = text("plain"), text("refresh")
    assert " conditional(" not in plain + refresh
    # Newton's iteration.
    assert " while(" in refresh and " while(" not in plain


def test_mean_step_of_an_interval():
    found = {"plain": np.array([1.0, 2.0]), "refresh": np.array([11.0, 22.0])}
    np.testing.assert_allclose(curvature_cost.mean_step(found, 10), [2.0, 4.0])
    assert curvature_cost.mean_step({"plain": 3.0}, 10) == 3.0


def test_estimate_of_a_program():
    program = jax.jit(lambda x: jnp.dot(x, x, precision="highest"))
    x = jnp.ones((64, 64))
    text = program.lower(x).compile().as_text()
    found = curvature_cost.estimate(text)
    assert (found["flops_float32"], found["flops_bfloat16"]) == (2 * 64**3, 0)
    matrix = 1e3 * 6 * 2 * 64**3 / 197e12
    assert found["matrix_unit_milliseconds"] == pytest.approx(matrix)
    assert found["least_milliseconds"] >= matrix


@pytest.mark.parametrize(
    "methods", [["sophia"], pytest.param(list(METHODS), marks=pytest.mark.slow)]
)
def test_it_writes_what_it_measured(methods, tmp_path):
    out = tmp_path / "curvature_cost.json"
    kept = {"cpu": {}, "tpu": {"row": {}}}
    out.write_text(json.dumps(kept), "utf-8")
    command = [sys.executable, ROOT / "benchmarks" / "curvature_cost.py"]
    command += ["--width", "16", "--layers", "1", "--rounds", "2", "--out", out]
    # Threads of LAPACK wait long for each other beside other tests.
    environment = {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    printed = subprocess.run(
        [*command, "--methods", *methods],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    ).stdout
    document = json.loads(out.read_text("utf-8"))
    assert document["tpu"] == kept["tpu"]
    model = document["cpu"]["16"]
    assert {"date", "device", "versions", "seed", "arguments"} <= model.keys()
    assert model["environment"]["OPENBLAS_NUM_THREADS"] == "1"
    assert model["methods"].keys() == {"adamw", "muon", *methods}
    for name, entry in model["methods"].items():
        assert name in printed
        assert entry["milliseconds"].keys() == set(METHODS[name].kinds)
        for key in ("mean_milliseconds", "ratio_to_adamw", "ratio_to_muon"):
            assert entry[key].keys() == {"1", "10", "100"}
            for low, median, high in entry[key].values():
                assert 0 < low <= median <= high
    adamw = model["methods"]["adamw"]
    assert adamw["ratio_to_adamw"]["1"] == [1.0, 1.0, 1.0]
    assert adamw["state_bytes_per_param"] == pytest.approx(8, rel=0.01)


def test_the_table_has_estimates_where_all_steps_compiled():
    def row(case: curvature_cost.Case) -> dict:
        milliseconds = {"plain": 2.0, "refresh": 12.0, "first": 100.0}[case.kind]
        fails = case.method == "kron" and case.kind == "refresh"
        return {
            "found": {"error": "crash of the compiler"}
            if fails
            else {"least_milliseconds": milliseconds}
        }

    rows = {case.key: row(case) for case in curvature_cost.cases(512, 1)}
    found = curvature_cost.tpu_milliseconds(rows, 512, 1)
    assert "kron" not in found and "shampoo" not in found
    assert found["muon"] == {"plain": 2.0}
    assert curvature_cost.mean_step(found["soap"], 10) == 3.0
