"""The example of QK-Clip, run as a user runs it, in a few steps."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "qk_clip.py"


def start(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # One device, whatever the suite has simulated for itself.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(SCRIPT), "--out", str(out), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_everything_is_written(tmp_path):
    arguments = ["--steps", "5", "--width", "64", "--threshold", "2"]
    finished = start(tmp_path, *arguments)
    assert finished.returncode == 0, finished.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert set(found) >= {"runs", "threshold", "device", "versions", "seed"}
    assert list(found["runs"]) == ["muon", "muon-clip"]
    logits = {}
    for name, run in found["runs"].items():
        assert [step for step, _ in run["train"]] == [1, 2, 3, 4, 5]
        assert [step for step, _ in run["validation"]] == [0, 1, 2, 3, 4, 5]
        assert run["validation"][-1][1] < run["validation"][0][1]
        assert run["seconds"] > 0
        logits[name] = np.array(run["max_logits"])
        assert logits[name].shape == (5, 4, 1)
        assert run["largest_logit"] == pytest.approx(logits[name].max(), abs=1e-3)
    plain, clipped = logits.values()
    # The first step knows nothing of the clipping that follows it.
    np.testing.assert_array_equal(plain[0], clipped[0])
    assert plain[0].max() > 2
    # The second sees weights that were clipped, one step of warming up later.
    assert clipped[1].max() < 1.5 * 2 < plain[1].max()
    for expected in ("block_3 0", "muon-clip", "of the", "qk_clip.png"):
        assert expected in finished.stdout
    assert (tmp_path / "qk_clip.png").stat().st_size > 10_000


def test_wrong_arguments_are_refused(tmp_path):
    for arguments in (["--threshold", "0"], ["--width", "100"], ["--seed", "-1"]):
        finished = start(tmp_path, *arguments)
        assert finished.returncode == 2
        assert arguments[0] in finished.stderr


def test_the_snippet_for_nnx_runs_as_it_stands():
    source = ast.get_docstring(ast.parse(SCRIPT.read_text()), clean=False)
    (snippet,) = re.findall(r"```python\n(.*?)```", source, re.DOTALL)
    names: dict = {"__name__": "snippet"}
    exec(compile(snippet, "snippet", "exec"), names)
    assert np.isfinite(names["loss"])


@pytest.mark.slow
def test_the_logits_stay_near_the_threshold(tmp_path):
    finished = start(tmp_path, "--steps", "60")
    assert finished.returncode == 0, finished.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    plain, clipped = found["runs"].values()
    # What a step adds to a logit that was clipped before it is a fraction of it.
    assert clipped["largest_over_threshold"] < 1.7
    assert plain["largest_over_threshold"] > 2.5
    assert clipped["validation"][-1][1] < plain["validation"][-1][1] + 0.02
