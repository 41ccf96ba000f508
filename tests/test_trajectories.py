"""The example of trajectories: its functions, its choice of runs, what it writes."""

from __future__ import annotations

import importlib.util
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
from PIL import Image

import optaxplus as ox

# A script's own folder.
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import descents
import trajectories
from landscapes import PLANES, factorization

ROOT = Path(__file__).parent.parent
POINTS = np.random.default_rng(0).uniform(-2, 2, (20, 2))
SMALL = {"size": 6, "rank": 3}

# As they stand in the literature.
FORMULAS = {
    "rosenbrock": lambda x, y: (1 - x) ** 2 + 100 * (y - x**2) ** 2,
    "beale": lambda x, y: (
        (1.5 - x + x * y) ** 2
        + (2.25 - x + x * y**2) ** 2
        + (2.625 - x + x * y**3) ** 2
    ),
    # Half of pᵀ·H·p with the eigenvalues 1 and 100, the first at 30 degrees.
    "quadratic": lambda x, y: (
        0.5 * (25.75 * x**2 + 75.25 * y**2 - 2 * 99 * np.sqrt(3) / 4 * x * y)
    ),
}
# Of the second derivatives in the minimum.
CONDITIONS = {"rosenbrock": 2508.0, "beale": 162.5, "quadratic": 100.0}

each_plane = pytest.mark.parametrize("name", PLANES)


def assert_gradient_is_that_of(loss, params, rtol):
    """Compares with central differences along random directions."""
    generator = np.random.default_rng(1)
    grads = jax.grad(loss)(params)
    for _ in range(3):
        direction = jax.tree.map(
            lambda leaf: jnp.asarray(generator.standard_normal(leaf.shape)), params
        )
        ahead, behind = (
            loss(jax.tree.map(lambda p, d: p + step * d, params, direction))  # noqa: B023
            for step in (1e-5, -1e-5)
        )
        expected = (ahead - behind) / 2e-5
        np.testing.assert_allclose(optax.tree.vdot(grads, direction), expected, rtol)


# The functions


@each_plane
def test_functions_are_those_of_the_literature(name, x64):
    expected = FORMULAS[name](*POINTS.T)
    # Both are rounded to float64, and cancel a few digits.
    np.testing.assert_allclose(PLANES[name].loss(jnp.array(POINTS)), expected, 1e-10)


@each_plane
def test_minima_are_where_they_are_said_to_be(name, x64):
    plane = PLANES[name]
    minimum = jnp.array(plane.minimum)
    assert plane.loss(minimum) == 0
    np.testing.assert_array_equal(jax.grad(plane.loss)(minimum), [0, 0])
    low, high = np.linalg.eigvalsh(jax.hessian(plane.loss)(minimum))
    assert low > 0
    assert high / low == pytest.approx(CONDITIONS[name], rel=1e-3)
    left, right, bottom, top = plane.frame
    for x, y in (plane.minimum, plane.start):
        assert left < x < right
        assert bottom < y < top


@each_plane
def test_gradients_on_the_plane(name, x64):
    for point in POINTS[:5]:
        # Central differences are right to about (1e-5)², relative to third derivatives.
        assert_gradient_is_that_of(PLANES[name].loss, jnp.array(point), 1e-6)


def test_starts():
    first = {name: float(plane.loss(plane.start)) for name, plane in PLANES.items()}
    assert first == pytest.approx(
        {"rosenbrock": 24.2, "beale": 14.203125, "quadratic": 1059.044}, rel=1e-6
    )


def test_the_surface_has_a_row_for_every_y():
    x, y, values = PLANES["beale"].surface(points=5)
    assert values.shape == (5, 5)
    assert values[1, 4] == pytest.approx(FORMULAS["beale"](x[4], y[1]), rel=1e-5)


def test_the_factorization_has_the_singular_values_it_should():
    problem = factorization(0, size=6, rank=3, condition=100.0)
    values = np.linalg.svd(problem.target, compute_uv=False)
    np.testing.assert_allclose(values, [1, 0.1, 0.01, 0, 0, 0], atol=1e-14)
    left, values, right = np.linalg.svd(problem.target)
    factors = {"left": left[:, :3] * values[:3], "right": right[:3]}
    np.testing.assert_allclose(problem.singular_values(factors), [1, 0.1, 0.01])
    assert problem.loss(jax.tree.map(jnp.float32, factors)) < 1e-12
    # Small factors are next to nothing of it.
    assert float(problem.loss(problem.start)) == pytest.approx(1, abs=0.02)
    other = factorization(1, **SMALL)
    assert not np.array_equal(other.target, problem.target)
    assert not np.array_equal(other.start["left"], problem.start["left"])


def test_gradients_of_the_factorization(x64):
    problem = factorization(0, **SMALL)
    params = jax.tree.map(lambda leaf: 10 * leaf.astype(float), problem.start)
    assert_gradient_is_that_of(problem.loss, params, 1e-6)


# The runs


@pytest.mark.parametrize("fall", [0.0, 1.0])
def test_a_run_is_gradient_descent(fall):
    plane, steps, rate = PLANES["quadratic"], 6, 0.01
    points, losses = jax.jit(partial(descents.descend, ox.sgd, plane, steps))(
        jnp.float32(rate), jnp.float32(fall)
    )
    hessian = np.array([[25.75, -42.868], [-42.868, 75.25]])
    expected = [np.array(plane.start)]
    for step in range(steps):
        falling = rate * (1 - fall * step / steps)
        expected.append(expected[-1] - falling * hessian @ expected[-1])
    # Five digits of the Hessian.
    np.testing.assert_allclose(points, expected, atol=1e-4)
    np.testing.assert_allclose(losses, plane.loss(points), rtol=1e-5)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([1, 1e-7, 1e-7], 1),
        ([1, 1e-7, 1e-3, 1e-7], 3),
        ([1, 1e-7, 1e-3], None),
        ([1, np.nan, 1e-7], 2),
        ([1, 1e-7, np.nan], None),
        ([1, 1, 0], 2),
    ],
)
def test_arrival_is_for_good(losses, expected):
    assert descents.arrival(np.array(losses)) == expected


def test_the_best_run_is_kept():
    plane, rates = PLANES["quadratic"], (0.001, 0.01, 0.015, 0.1)
    best = descents.tune(ox.sgd, plane, 700, rates)
    assert [entry["learning_rate"] for entry in best.tried] == [*rates, *rates]
    arrived = [entry["arrived"] for entry in best.tried]
    # Too slow, right, faster, diverging: 2 / 100 is the largest that does not.
    assert arrived[0] is None
    assert arrived[3] is None
    assert arrived[2] < arrived[1]
    assert (best.learning_rate, best.schedule) == (0.015, "constant")
    assert best.arrived == arrived[2] == descents.arrival(best.losses)
    assert best.note == ""
    assert best.settings == "rate 0.015"
    assert best.params.shape == (701, 2)
    np.testing.assert_allclose(plane.loss(best.params), best.losses, rtol=1e-5)


def test_notes_on_the_grid():
    plane = PLANES["quadratic"]
    assert descents.tune(ox.sgd, plane, 50, (1e-4, 1e-3)).note == "edge of grid"
    assert descents.tune(ox.sgd, plane, 50, (5.0, 9.0)).note == "diverges"
    # None arrives: the lowest at the end.
    best = descents.tune(ox.sgd, plane, 5, (1e-4, 1e-3, 1.0))
    assert best.arrived is None
    assert best.learning_rate == 1e-3


@pytest.mark.parametrize("name", trajectories.FOR_MATRICES)
def test_methods_for_matrices_leave_points_to_adamw(name):
    start = PLANES["beale"].start
    run = partial(descents.descend, problem=PLANES["beale"], steps=3)
    rate, fall = jnp.float32(0.1), jnp.float32(0)
    points, _ = run(trajectories.FOR_MATRICES[name], learning_rate=rate, fall=fall)
    adamw = partial(ox.adamw, b2=0.95, weight_decay=0.0)
    expected, _ = run(adamw, learning_rate=rate, fall=fall)
    np.testing.assert_array_equal(points, expected)
    assert ox.label_params(start) == "adamw"
    labels = ox.label_params(factorization(0, **SMALL).start)
    assert set(labels.values()) == {"muon"}


# The script


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("trajectories")
    arguments = ["--small", "--steps", "8", "--optimizers", "muon", "sgd", "lion"]
    assert trajectories.main([*arguments, "--out", str(out)]) == 0
    return out


def test_everything_is_written(written):
    found = json.loads((written / "results.json").read_text())
    assert {"device", "versions", "seed", "date", "arguments"} <= found.keys()
    assert found["arguments"]["optimizers"] == ["sgd", "lion", "muon"]
    problems = found["problems"]
    assert list(problems) == list(trajectories.PROBLEMS)
    for name, problem in problems.items():
        is_plane = name in PLANES
        assert problem["left_out"] == (["muon"] if is_plane else [])
        assert len(problem["runs"]) == (2 if is_plane else 3)
        for run in problem["runs"].values():
            assert len(run["losses"]) == 9
            assert problem["threshold"] == pytest.approx(1e-6 * run["losses"][0], 1e-3)
            path = np.array(run["points" if is_plane else "singular_values"])
            assert path.shape == ((9, 2) if is_plane else (9, 4))
            assert np.isfinite(path).all()
    for name in ("trajectories.png", "factorization.png"):
        assert (written / name).stat().st_size > 10_000
    with Image.open(written / "trajectories.gif") as gif:
        assert gif.n_frames == trajectories.SMALL_FRAMES


def test_a_run_that_diverges_is_drawn_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trajectories, "RATES", (1e4,) * 5)
    arguments = ["--small", "--steps", "40", "--optimizers", "sgd", "--problems"]
    problems = ["quadratic", "factorization"]
    assert trajectories.main([*arguments, *problems, "--out", str(tmp_path)]) == 0
    for name, problem in json.loads((tmp_path / "results.json").read_text())[
        "problems"
    ].items():
        run = problem["runs"]["sgd"]
        assert (run["note"], run["steps_to_threshold"]) == ("diverges", None), name
        assert run["losses"][-1] is run["tried"][0]["last_loss"] is None
    assert capsys.readouterr().out.count(" diverges") == 2


@pytest.mark.parametrize("has_rich", [True, False])
def test_tables(has_rich, monkeypatch, capsys):
    spec = importlib.util.find_spec

    def find_spec(name):
        return spec(name) if has_rich or name != "rich" else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    losses = np.array([1.0, 1e-3, 1e-7])
    tried = [{"learning_rate": rate} for rate in (0.1, 0.2, 0.5)]
    outcomes = {
        "sgd": descents.Outcome(0.2, "constant", 2, losses, None, tried),
        "lion": descents.Outcome(0.5, "linear to 0", None, losses[:2], None, tried),
    }
    options = trajectories.parse_arguments(["--steps", "2"])
    problems = {"beale": PLANES["beale"]}
    trajectories.print_results(problems, {"beale": outcomes}, options)
    printed = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert "Beale: steps, of 2, until the loss stays below 1.4e-05" in lines
    assert "sgd 0.2 constant 2 1.00e-07" in lines
    assert "lion 0.5 linear to 0 never 1.00e-03 edge of grid" in lines
    assert ("─" in printed) == has_rich
    assert "vectors to AdamW" in printed


def test_the_split_is_shown(capsys):
    problem = factorization(0, **SMALL)
    losses = np.array([1.0, 0.5])
    run = descents.Outcome(0.1, "constant", None, losses, None, [{"learning_rate": 0}])
    options = trajectories.parse_arguments(["--problems", "factorization"])
    trajectories.print_results(
        {"factorization": problem}, {"factorization": {"muon": run}}, options
    )
    printed = capsys.readouterr().out
    assert "muon: 36 parameters" in printed
    assert "Not on functions" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--problems", "beale", "--optimizers", "muon", "soap"], "none of muon, soap"),
        (["--steps", "0"], "--steps"),
        (["--seed", "-1"], "--seed must not be negative"),
        (["--condition", "0.5"], "must be a number of 1 or more"),
        (["--condition", "nan"], "must be a number of 1 or more"),
        (["--optimizers", "adam"], "invalid choice"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        trajectories.parse_arguments(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("problems", [["beale"], ["factorization", "quadratic"]])
def test_as_a_user_runs_it(problems, tmp_path):
    script = ROOT / "examples" / "trajectories.py"
    command = [sys.executable, str(script), "--small", "--problems", *problems]
    # One device, whatever the suite has simulated for itself.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    environment["PYTHONPATH"] = str(ROOT)
    finished = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    out = tmp_path / "runs" / "trajectories"
    found = json.loads((out / "results.json").read_text())["problems"]
    assert sorted(found) == sorted(problems)
    written = {path.name for path in out.iterdir()}
    assert ("factorization.png" in written) == ("factorization" in problems)
    for name, problem in found.items():
        assert len(problem["runs"]) == (13 if name == "factorization" else 6)
        for optimizer, run in problem["runs"].items():
            assert run["losses"][-1] < run["losses"][0], optimizer
