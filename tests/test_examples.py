"""The examples, run as a user runs them, in settings of a few seconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRAIN_GPT = ROOT / "examples" / "train_gpt.py"
RUN_KEYS = {
    "learning_rate",
    "train",
    "validation",
    "seconds",
    "tokens_per_second",
    "steps_to_adamw_best",
}


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    """Starts the main example on a model of one width, writing to `out`."""
    # One device, whatever the suite has simulated for itself.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(TRAIN_GPT), "--width", "64", "--out", str(out)]
    return subprocess.Popen(
        [*command, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Waits for an example that is to succeed; returns what it printed."""
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return printed, errors


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Path, str]:
    """A complete small run: its directory and what it printed."""
    out = tmp_path_factory.mktemp("uninterrupted")
    printed, _ = finish(start(out, "--steps", "12"))
    return out, printed


def test_everything_is_written(uninterrupted):
    out, printed = uninterrupted
    found = results(out)
    assert set(found) >= {"runs", "device", "versions", "seed", "arguments"}
    assert list(found["runs"]) == ["adamw", "muon"]
    for run in found["runs"].values():
        assert set(run) >= RUN_KEYS
        assert [step for step, _ in run["train"]] == list(range(1, 13))
        assert run["validation"][0][0] == 0
        assert run["validation"][-1][0] == 12
        assert run["validation"][-1][1] < run["validation"][0][1]
        assert run["tokens_per_second"] > 0
    assert found["runs"]["adamw"]["steps_to_adamw_best"] is not None
    # Both start from the same parameters and see the same first batch.
    first = [run["train"][0] for run in found["runs"].values()]
    assert first[0] == first[1]
    assert (out / "train_gpt.png").stat().st_size > 10_000
    for expected in ("block_{0-3}/attention/query/kernel", "AdamW's best", "import os"):
        assert expected in printed


@pytest.mark.slow  # `test_train_low_memory` interrupts the same kind of run
def test_interrupted_and_resumed_equals_uninterrupted(uninterrupted, tmp_path):
    arguments = ("--steps", "12", "--optimizers", "muon")
    process = start(tmp_path, *arguments)
    for line in process.stdout:
        if "muon  step     2/" in line:
            process.send_signal(signal.SIGINT)
            break
    printed, _ = finish(process)
    assert "--resume" in printed
    stopped = results(tmp_path)["runs"]["muon"]
    assert 2 <= len(stopped["train"]) < 12
    assert (tmp_path / "train_gpt.png").exists()

    finish(start(tmp_path, *arguments, "--resume"))
    run = results(tmp_path)["runs"]["muon"]
    assert run["steps_to_adamw_best"] is None
    expected = results(uninterrupted[0])["runs"]["muon"]
    for key in ("train", "validation", "sample"):
        assert run[key] == expected[key]


def test_resuming_with_other_arguments_is_refused(uninterrupted):
    out, _ = uninterrupted
    before = (out / "results.json").read_bytes()
    process = start(out, "--steps", "13", "--resume")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "steps is 13" in errors
    assert "made with 12" in errors
    assert (out / "results.json").read_bytes() == before


def test_there_has_to_be_something_to_resume(tmp_path):
    process = start(tmp_path, "--resume")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "no checkpoints" in errors


@pytest.mark.slow
def test_small_learns(tmp_path):
    finish(start(tmp_path, "--steps", "small", "--width", "128"))
    for run in results(tmp_path)["runs"].values():
        # A byte drawn from the frequencies of bytes in the text costs 3.16 nats.
        assert run["validation"][-1][1] < 3.16
