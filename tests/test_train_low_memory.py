"""The example in low memory: its gradients, its bytes, its losses, and resuming it.

In this process, and on a model without attention, which compiles sooner; with `-m slow`
on the GPT, as a user runs it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console

# A script's own folder.
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import train_gpt
import train_low_memory
from gpt import MLP, GPTConfig
from text import standard_library
from training_run import Checkpoints, Interruption, ResumeError

ROOT = Path(__file__).parent.parent
LOW_MEMORY, _ = train_low_memory.RUNS["low-memory"]
STEPS = 12
WIDTH, CONTEXT, VOCABULARY = 64, 32, 256
EMBEDDING = VOCABULARY * WIDTH
MATRICES = 2 * 4 * WIDTH**2
NORM = 2 * WIDTH
HEAD = WIDTH * VOCABULARY
NUM_PARAMS = EMBEDDING + MATRICES + NORM + HEAD


class Bigrams(nn.Module):
    """Predicts a byte from the one before it, with the layers of the GPT."""

    config: GPTConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(VOCABULARY, WIDTH, name="token_embedding")(tokens)
        y = MLP(self.config, name="mlp")(nn.LayerNorm(name="mlp_norm")(x))
        return nn.Dense(VOCABULARY, use_bias=False, name="lm_head")(x + y)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Iterator[None]:
    """Gives the example a tiny model, and compiles fast and nothing twice."""
    text = standard_library()
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in settings}
    update_config(settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "CONTEXT", CONTEXT)
        patch.setattr(train_low_memory, "GPT", Bigrams)
        patch.setattr(train_low_memory, "standard_library", lambda: text)
        yield
    update_config(before)


def update_config(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    # JAX looks at them once.
    compilation_cache.reset_cache()


def run(out: Path, *arguments: str) -> str:
    """Runs the example; returns what it printed."""
    words = ["--steps", str(STEPS), "--width", str(WIDTH), "--out", str(out)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert train_low_memory.main([*words, *arguments]) == 0
    return printed.getvalue()


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory) -> tuple[Path, str]:
    """A complete run: its directory and what it printed."""
    out = tmp_path_factory.mktemp("uninterrupted")
    return out, run(out)


def trainer(micro_batches: int) -> train_low_memory.MeasuringTrainer:
    """A trainer of bfloat16 weights, as the example makes it."""
    config = GPTConfig(WIDTH, train_gpt.DEPTH, train_gpt.HEAD_SIZE, CONTEXT)
    model = train_low_memory.GPT(config)
    text = train_low_memory.standard_library()
    task = train_gpt.Task(model, text, STEPS, 0, param_dtype="bfloat16")
    return train_low_memory.MeasuringTrainer(
        task, Interruption(), Console(quiet=True), micro_batches=micro_batches
    )


def remember() -> optax.GradientTransformation:
    """Changes nothing, and has the newest gradients as its state."""
    return optax.GradientTransformation(
        lambda params: (), lambda updates, state, params=None: (params, updates)
    )


def test_the_gradient_is_that_of_the_batch(tiny):
    (loss, grads, memory), parts = (gradients(trainer(count)) for count in (1, 4))
    # Sums over the batch in another order, in float32: a few times 2^-24 of the size of
    # what is added, of which the gradient is what does not cancel.
    tolerance = 1e-5
    assert parts[0] == pytest.approx(loss, rel=tolerance)
    for a, b in zip(*map(jax.tree.leaves, (grads, parts[1])), strict=True):
        assert a.dtype == b.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(a).max())
    assert parts[2] < 0.6 * memory


def gradients(
    trainer: train_low_memory.MeasuringTrainer,
) -> tuple[float, dict[str, Any], int]:
    """The first loss, the gradients that the optimizer gets, and temporary bytes."""
    state = TrainState.create(
        apply_fn=None, params=trainer.task.initial_params(), tx=remember()
    )
    windows = trainer.task.batch(0)
    compiled = jax.jit(trainer._train_step).lower(state, windows).compile()
    state, loss = compiled(state, windows)
    return (
        float(loss),
        state.opt_state,
        compiled.memory_analysis().temp_size_in_bytes,
    )


def test_everything_is_written(uninterrupted):
    out, printed = uninterrupted
    found = results(out)
    fields = {"runs", "num_params", "bytes", "predicted", "difference_percent"}
    assert set(found) >= fields | {"device", "versions", "seed", "date", "arguments"}
    assert found["num_params"] == NUM_PARAMS
    assert found["arguments"]["micro_batches"] == 2
    assert list(found["runs"]) == ["float32", "low-memory"]
    for each in found["runs"].values():
        assert [step for step, _ in each["train"]] == list(range(1, STEPS + 1))
        losses = [loss for _, loss in each["validation"]]
        assert np.isfinite(losses).all()
        assert (np.diff(losses) < 0).all()
        assert each["tokens_per_second"] > 0
    assert (out / "train_low_memory.png").stat().st_size > 10_000
    for expected in ("state of muon", "8-bit correction of weights", "most after step"):
        assert expected in printed


def test_the_loss_is_that_of_float32(uninterrupted):
    found = results(uninterrupted[0])
    wide, low = (np.array(run["validation"]) for run in found["runs"].values())
    np.testing.assert_array_equal(wide[:, 0], low[:, 0])
    percent = 100 * (low[:, 1] / wide[:, 1] - 1)
    assert found["difference_percent"]["last"] == pytest.approx([STEPS, percent[-1]])
    worst = np.argmax(np.abs(percent))
    largest = [wide[worst, 0], percent[worst]]
    assert found["difference_percent"]["largest"] == pytest.approx(largest)
    # The first step moves the loss by 2 %.
    assert 0 < abs(largest[1]) < 0.5


def test_bytes_are_those_of_the_parts(uninterrupted):
    found = results(uninterrupted[0])
    wide, low = found["bytes"].values()
    for held, report in zip(
        found["bytes"].values(), found["predicted"].values(), strict=True
    ):
        assert held["total"] == report["params"] + report["state"]
    # Muon keeps one moment, Adam two; a matrix of 64 x 256 has a block for each of its
    # 64 rows or columns.
    assert low["weights"] == 2 * NUM_PARAMS
    assert low["8-bit correction of weights"] == NUM_PARAMS
    assert low["moments in codes"] == MATRICES + 2 * HEAD
    assert low["scales of the codes"] == 4 * (2 * 64 + 2 * 64)
    counters = low["float32 rest of the state"] - 8 * (EMBEDDING + NORM)
    assert 0 < counters < 50
    assert wide["weights"] == 4 * NUM_PARAMS
    rest = 4 * MATRICES + 8 * (EMBEDDING + NORM + HEAD)
    assert 0 < wide["float32 rest of the state"] - rest < 50
    # Activations are the most of it, and half of them are there at a time.
    temporary = [held["temporary, within a step"] for held in (wide, low)]
    assert 0 < temporary[1] < temporary[0]


def test_bytes_of_one_kernel():
    params = {"dense": {"kernel": jnp.zeros((512, 256), jnp.bfloat16)}}
    tx = train_low_memory.in_low_memory(optax.constant_schedule(1e-3))
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    held = train_low_memory.bytes_held(state)
    size = 512 * 256
    assert held["weights"] == 2 * size
    assert held["8-bit correction of weights"] == held["moments in codes"] == size
    assert held["scales of the codes"] == 4 * size // 256


def interrupted_at(dtype: str, step: int) -> Callable[..., np.ndarray]:
    """The batches of a task, and Ctrl-C before one of the run with such weights."""
    batch = train_gpt.Task.batch

    def interrupting(task: train_gpt.Task, number: int) -> np.ndarray:
        if (task.param_dtype, number) == (dtype, step):
            signal.raise_signal(signal.SIGINT)
        return batch(task, number)

    return interrupting


def test_interrupted_in_the_first_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt.Task, "batch", interrupted_at("float32", 1))
    assert "--resume" in run(tmp_path)
    found = results(tmp_path)
    assert list(found["runs"]) == list(found["bytes"]) == ["float32"]
    assert len(found["runs"]["float32"]["train"]) == 2
    assert found["difference_percent"] is None
    assert (tmp_path / "train_low_memory.png").exists()


def test_interrupted_and_resumed_equals_uninterrupted(
    uninterrupted, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt.Task, "batch", interrupted_at("bfloat16", 3))
        printed = run(tmp_path)
    assert "--micro-batches 2" in printed
    assert "--resume" in printed
    stopped, expected = results(tmp_path), results(uninterrupted[0])
    assert stopped["runs"]["float32"]["train"] == expected["runs"]["float32"]["train"]
    assert len(stopped["runs"]["low-memory"]["train"]) == 4
    assert stopped["difference_percent"]["last"][0] == 2
    assert stopped["bytes"] == expected["bytes"]
    assert (tmp_path / "train_low_memory.png").exists()

    # Codes and corrections come back as they were saved.
    resumed = trainer(2)
    found = resumed.train("low-memory", LOW_MEMORY, checkpoints(tmp_path))
    assert found.train == expected["runs"]["low-memory"]["train"]
    assert found.validation == expected["runs"]["low-memory"]["validation"]
    assert resumed.memory == expected["bytes"]["low-memory"]


def test_checkpoints_of_other_settings_are_refused(uninterrupted, capsys):
    out, _ = uninterrupted
    before = (out / "results.json").read_bytes()
    words = ["--steps", "13", "--width", str(WIDTH), "--out", str(out), "--resume"]
    assert train_low_memory.main(words) == 2
    assert "steps is 13" in capsys.readouterr().err
    assert (out / "results.json").read_bytes() == before
    with pytest.raises(ResumeError, match="micro_batches is 4"):
        trainer(4).train("low-memory", LOW_MEMORY, checkpoints(out))


def checkpoints(out: Path) -> Checkpoints:
    return Checkpoints(out / "checkpoints" / "low-memory")


@pytest.mark.slow
def test_a_finished_run_is_measured_again(uninterrupted):
    out, _ = uninterrupted
    expected = results(out)
    run(out, "--resume")
    found = results(out)
    for key in ("bytes", "difference_percent"):
        assert found[key] == expected[key]
    for name, each in found["runs"].items():
        assert each["train"] == expected["runs"][name]["train"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--micro-batches", "0"),
        ("--width", "100"),
        ("--seed", "-1"),
        ("--steps", "large"),
        ("--resume",),
    ],
)
def test_wrong_arguments_are_refused(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_low_memory.parse_arguments(["--out", str(tmp_path), *arguments])
    assert arguments[0] in capsys.readouterr().err


def test_parts_that_do_not_divide_the_batch_are_refused(tmp_path):
    """As a user meets it."""
    command = [
        sys.executable,
        str(ROOT / "examples" / "train_low_memory.py"),
        "--micro-batches",
        "3",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 2
    assert "choose from 1, 2, 4, 8" in finished.stderr


@pytest.mark.slow
def test_small_learns_as_well(tmp_path):
    """The GPT, as a user trains it."""
    command = [sys.executable, str(ROOT / "examples" / "train_low_memory.py")]
    command += ["--steps", "small", "--out", str(tmp_path)]
    # One device, whatever the suite has simulated for itself.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    environment["PYTHONPATH"] = str(ROOT)
    subprocess.run(command, env=environment, check=True, capture_output=True)
    found = results(tmp_path)
    # Other seeds change the loss of such a run by 1 % and more.
    assert abs(found["difference_percent"]["largest"][1]) < 0.5
    wide, low = found["bytes"].values()
    assert low["total"] < 0.55 * wide["total"]
    temporary = "temporary, within a step"
    assert low[temporary] < 0.75 * wide[temporary]
