"""The benchmark of convergence tunes all alike, and reports what its runs say."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from rich.console import Console

from benchmarks import (
    convergence,
    convergence_report,
    convergence_tasks,
    convergence_times,
    guide,
    train_gpt_seeds,
)
from benchmarks.convergence import FIRST_EXPONENTS, TRIALS, Results, Run, Trainer
from benchmarks.convergence_optimizers import OPTIMIZERS
from examples.digits import all_digits

QUIET = Console(quiet=True)


def task(steps: int = 20) -> convergence_tasks.Task:
    """To tell the sign of the sum of four numbers."""

    def draw(seed: int, step: int) -> convergence_tasks.Batch:
        inputs = np.random.default_rng((seed, step)).normal(size=(16, 4))
        return inputs.astype(np.float32), (inputs.sum(1) > 0).astype(np.int32)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="head")(nn.tanh(nn.Dense(8)(x)))

    validation = tuple(x[None] for x in draw(99, 0))
    return convergence_tasks.Task("signs", Net(), steps, {}, draw, validation)


def run_all(folder, names, **counts):
    results = Results("signs", task(), folder)
    interruption = SimpleNamespace(requested=False)
    convergence.benchmark(
        "signs", task(), names, results, interruption, QUIET, **counts
    )
    return results


# Trials


@pytest.mark.parametrize("optimum", [-7, -5, -4, -1, 0, 0.4, 3, 5, 7])
def test_trials_surround_the_best_rate(optimum: float) -> None:
    losses: dict[int, float] = {}
    while (exponent := convergence.next_exponent(losses)) is not None:
        assert exponent not in losses
        losses[exponent] = abs(exponent - optimum)
    assert len(losses) == TRIALS
    assert set(FIRST_EXPONENTS) < losses.keys()
    best = min(losses, key=losses.__getitem__)
    # Half a step, and a whole one beyond the first trials.
    assert abs(best - optimum) <= (0.5 if abs(optimum) <= 3 else 1)


def test_runs_that_diverge_are_the_worst() -> None:
    found = {"validation": [[0, 2.0], [20, None]]}
    assert convergence.last_loss(found) == math.inf
    losses = dict.fromkeys(FIRST_EXPONENTS, math.inf) | {0: 1.0}
    assert convergence.next_exponent(losses) in (-1, 1)


def test_rates_are_a_quarter_of_a_decade_apart() -> None:
    rates = [convergence.rate_of("adamw", exponent) for exponent in (-4, -1, 0, 4)]
    assert rates == [2e-4, 1.125e-3, 2e-3, 2e-2]


# Runs


@pytest.mark.parametrize("name", ["adamw", "sophia", "kron"])
def test_an_optimizer_learns(name: str) -> None:
    trainer = Trainer(task(), name, adamw_rate=2e-2)
    found = trainer.train(Run(name, 4, 1), lambda step, loss: False)
    (first_step, first), *_, (last_step, last) = found["validation"]
    assert (first_step, last_step) == (0, 20)
    assert last < first
    assert found["state_bytes_per_param"] > 0


def test_learning_rates_share_a_program() -> None:
    trainer = Trainer(task(), "adamw", adamw_rate=None)
    losses = {
        convergence.last_loss(
            trainer.train(Run("adamw", exponent, seed), lambda step, loss: False)
        )
        for exponent in (0, 4)
        for seed in (0, 1)
    }
    assert len(losses) == 4
    assert trainer._step._cache_size() == 1


def test_every_optimizer_can_be_built() -> None:
    params = {"up": {"kernel": jnp.ones((4, 8))}, "norm": {"scale": jnp.ones(8)}}
    for name in OPTIMIZERS:
        Trainer(task(), name, adamw_rate=1e-3).optimizer(1e-3).init(params)


def test_finished_runs_are_not_repeated(tmp_path, monkeypatch) -> None:
    counts = {"trials": 2, "seeds": (1,)}
    first = run_all(tmp_path, ["adamw", "kron"], **counts)
    assert len(first.runs) == 6
    text = first.path.read_text("utf-8")
    monkeypatch.setattr(Trainer, "train", lambda *_: pytest.fail("a run was repeated"))
    second = run_all(tmp_path, ["adamw", "kron"], **counts)
    assert second.runs == first.runs
    assert second.path.read_text("utf-8") == text
    # A tuned optimizer is one whose other seeds have its best rate.
    best = first.best_exponent("kron")
    assert Run("kron", best, 1) in first.runs


def test_runs_of_another_job_are_refused(tmp_path) -> None:
    run_all(tmp_path, ["adamw"], trials=1, seeds=())
    with pytest.raises(SystemExit, match=r"signs\.json: these runs are of another job"):
        Results("signs", task(steps=40), tmp_path)


def test_runs_of_another_optimizer_are_refused(tmp_path, monkeypatch) -> None:
    run_all(tmp_path, ["adamw"], trials=1, seeds=())
    optimizers = convergence.OPTIMIZERS
    changed = replace(optimizers["adamw"], arguments={"b2": 0.9})
    monkeypatch.setitem(optimizers, "adamw", changed)
    with pytest.raises(SystemExit, match=r"signs\.json: .*another optimizer"):
        Results("signs", task(), tmp_path)


def test_an_interruption_keeps_what_is_finished(tmp_path, monkeypatch) -> None:
    results = Results("signs", task(), tmp_path)
    interruption = SimpleNamespace(requested=False)
    step, steps = Trainer.step, []

    def interrupted(*args):
        # In the middle of the second run.
        steps.append(args)
        interruption.requested = len(steps) >= task().steps + 5
        return step(*args)

    monkeypatch.setattr(Trainer, "step", interrupted)
    convergence.benchmark(
        "signs", task(), ["adamw", "kron"], results, interruption, QUIET
    )
    assert interruption.requested
    assert list(results.runs) == [Run("adamw", 0, 0)]
    assert len(json.loads(results.path.read_text("utf-8"))["runs"]) == 1


def test_other_lengths_are_written_elsewhere() -> None:
    options = convergence.parse_arguments(["--steps", "300"])
    assert options.steps == 300
    assert options.out == convergence.RESULTS.with_name("convergence_300")
    assert convergence.parse_arguments([]).out == convergence.RESULTS
    assert convergence.parse_arguments(["--small"]).steps == convergence.SMALL_STEPS


def test_runs_without_room_for_their_validations_are_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        convergence.parse_arguments(["--steps", "19"])
    assert "--steps 19: runs have at least 20 steps" in capsys.readouterr().err


def test_times_are_relative_to_adamw(tmp_path) -> None:
    results = run_all(tmp_path, ["adamw", "sgd"], trials=1, seeds=())
    names = ["adamw", "sgd"]
    go, stop = (SimpleNamespace(requested=requested) for requested in (False, True))
    assert convergence_times.measure_times(task(), names, results, 2, stop) is None
    found = convergence_times.measure_times(task(), names, results, 2, go)
    assert found["adamw"]["ratio_to_adamw"] == [1.0, 1.0, 1.0]
    low, middle, high = found["sgd"]["milliseconds"]
    assert 0 < low <= middle <= high


# Tasks


def test_digits_are_moved_by_a_pixel_at_most() -> None:
    digits = convergence_tasks.conv_net()
    images, labels = digits.draw(0, 0)
    assert images.shape == (64, 8, 8, 1)
    assert set(labels.tolist()) <= set(range(10))
    originals, _ = all_digits()
    originals = np.pad(originals[..., 0], [(0, 0), (1, 1), (1, 1)])
    moved = np.stack(
        [
            originals[:, row : row + 8, column : column + 8]
            for row in range(3)
            for column in range(3)
        ]
    )
    held_out = {image.tobytes() for image in digits.validation[0][0, ..., 0]}
    is_held_out = np.array([x[1:9, 1:9].tobytes() in held_out for x in originals])
    assert is_held_out.sum() >= 360
    for image in images[:8, ..., 0]:
        of_originals = (moved == image).all((-2, -1)).any(0)
        assert of_originals.any()
        assert not (of_originals & is_held_out).any()
    again, _ = digits.draw(0, 0)
    np.testing.assert_array_equal(images, again)
    other, _ = digits.draw(1, 0)
    assert (images != other).any()


@pytest.mark.parametrize("name", ["small_gpt", "recurrent_net"])
def test_bytes_are_predicted_from_those_before(name: str) -> None:
    small = convergence_tasks.TASKS[name]()
    inputs, labels = small.draw(0, 0)
    np.testing.assert_array_equal(inputs[:, 1:], labels[:, :-1])
    params = small.initial_params(0)
    changed = inputs[:2].copy()
    changed[:, -1] += 1
    before, after = (small.logits(params, x) for x in (inputs[:2], changed))
    np.testing.assert_array_equal(before[:, :-1], after[:, :-1])
    assert (before[:, -1] != after[:, -1]).any()


# Report


def document() -> dict:
    def run(name: str, exponent: int, seed: int, *losses: float | None) -> dict:
        return {
            "optimizer": name,
            "exponent": exponent,
            "seed": seed,
            "learning_rate": convergence.rate_of(name, exponent),
            "validation": [[10 * i, loss] for i, loss in enumerate(losses)],
            "state_bytes_per_param": 8.0,
            "device": "a CPU",
        }

    times = {"adamw": [1, 1, 1], "muon": [1.4, 1.5, 1.6]}
    return {
        "job": {"title": "signs", "steps": 20, "batch": 16},
        "times": {"optimizers": {k: {"ratio_to_adamw": v} for k, v in times.items()}},
        "runs": [
            *(run("adamw", k, 0, 3.0, 2.0, 1.0 + abs(k) / 4) for k in (-2, 0, 2)),
            *(run("adamw", 0, seed, 3.0, 2.0, 1.0 + seed / 10) for seed in (1, 2, 3)),
            *(run("muon", k, 0, 3.0, 2.0, 1.0 - k / 4) for k in (-2, 0, 2)),
            *(run("muon", 2, seed, 3.0, 1.25, 0.5) for seed in (1, 2, 3)),
            run("lion", 0, 0, 3.0, None, None),
            run("lion", 0, 1, 3.0, 2.0, None),
        ],
    }


def test_rows() -> None:
    muon, adamw, lion = convergence_report.rows(document())
    assert [muon.optimizer, adamw.optimizer, lion.optimizer] == [
        "muon",
        "adamw",
        "lion",
    ]
    assert adamw.losses == pytest.approx({1: 1.1, 2: 1.2, 3: 1.3})
    assert adamw.steps == [20, 20, 20]
    assert (adamw.below, adamw.above) == (0.5, 0.5)
    assert not adamw.is_at_end
    # AdamW's best is 1.1, 1.2 and 1.3.
    assert muon.steps == [20, 20, 10]
    assert muon.is_at_end
    assert (muon.below, muon.above) == (0.5, None)
    assert lion.loss == math.inf
    lines = [convergence_report.cells(row, 20) for row in (muon, adamw, lion)]
    assert lines[0][3:6] == ["20 of 20", "1.50", "+0.500"]
    assert lines[2][3:5] == ["never", "-"]


def test_short_runs_are_compared_with_all_steps_of_adamw() -> None:
    short = document()
    short["job"]["steps"] = 10
    for run in short["runs"]:
        if run["optimizer"] == "adamw" and run["seed"]:
            run["validation"][-1][1] += 1.0
    header, muon, adamw, _ = convergence_report.short_runs(
        {"signs": document()}, {"signs": short}
    )
    assert len(header) == len(muon)
    assert muon[:2] == ["muon", "10 of 20"]
    # 0.5 beside 1.1, 1.2 and 1.3; AdamW's own are each higher by 1.
    assert muon[-1] == "-58.3 % (-61.5 to -54.5)"
    assert adamw[-1] == "+83.3 % (+76.9 to +90.9)"


def test_figures_and_tables_are_written(tmp_path, capsys) -> None:
    (tmp_path / "conv_net.json").write_text(json.dumps(document()), "utf-8")
    assert convergence_report.main([str(tmp_path)]) == 0
    assert "muon" in capsys.readouterr().out
    for name in ("losses.png", "learning_rates.png"):
        assert (tmp_path / name).stat().st_size > 5000


def test_the_table_of_a_page_has_all_rows() -> None:
    text = convergence_report.markdown({"signs": document()})
    assert "signs, 20 steps in batches of 16:" in text
    # Lion has fewer of both than the others.
    assert "over 1 to 3 seeds, at the best of 1 to 3 learning rates" in text
    found = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0] for line in found[2:]] == [
        "| muon",
        "| adamw",
        "| lion",
    ]
    assert len({line.count("|") for line in found}) == 1


def test_the_guide_has_shares_of_the_steps_of_adamw() -> None:
    job = [
        {
            "optimizer": name,
            "learning_rate": 1.0,
            "arguments": {},
            "steps": train_gpt_seeds.STEPS,
            "seed": 1,
            "validation": [[0, 3.0], [train_gpt_seeds.STEPS // 4, middle], [1200, 1.0]],
        }
        for name, middle in {"adamw": 2.0, "muon": 1.0, "soap": 2.0}.items()
    ]
    text = guide.markdown({"signs": document()}, job)
    assert f"| {guide.MAIN_JOB} | signs |" in text
    # NorMuon was not trained; Lion never gets there, and was not in the main job.
    assert "| `muon`, `normuon` | 25 %, - | 100 %, - |" in text
    assert "| `adam_mini`, `lion` | -, - | -, never |" in text
    assert "| 25 % | 100 % |" in guide.claims({"signs": document()}, job)


def test_optimizers_as_good_as_adamw_everywhere_and_nowhere() -> None:
    text = guide.everywhere({"signs": document()})
    assert "Of 2 optimizers" in text
    assert "on all: `muon`. These on none: `lion`. " in text
    # All of AdamW's steps, of 1.5 times its time.
    assert text.endswith("no more steps: `muon` (signs).")
    quick = document()
    quick["times"]["optimizers"]["muon"]["ratio_to_adamw"] = [0.8, 0.9, 1.0]
    assert guide.everywhere({"signs": quick}).endswith("no more steps: none (signs).")


def test_advice_is_of_optimizers_that_were_tuned() -> None:
    names = {name for choice in guide.CHOICES for name in choice.names}
    assert names | {claim.name for claim in guide.CLAIMS} <= OPTIMIZERS.keys()
