"""The convolutional example, in this process, on a small network and few images."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

# A script's own folder.
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import train_cnn
from digits import Batch, Digits, split_digits
from train_cnn import ConvNet

import optaxplus as ox

STEPS = 40
WIDTH = 8


@pytest.fixture(scope="module")
def few() -> Digits:
    digits = split_digits(64)
    return Digits(digits.images[:256], digits.labels[:256], digits.validation)


@pytest.fixture(scope="module")
def tiny(few) -> Iterator[None]:
    """Gives the example a small network and few images, and compiles fast."""
    optimize = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_cnn, "WIDTH", WIDTH)
        patch.setattr(train_cnn, "BATCH", 16)
        patch.setattr(train_cnn, "split_digits", lambda held_out: few)
        yield
    jax.config.update("jax_disable_most_optimizations", optimize)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> tuple[Path, str]:
    """A complete run: its directory and what it printed."""
    out = tmp_path_factory.mktemp("finished")
    return out, run(out, "--steps", str(STEPS))


def run(out: Path, *arguments: str) -> str:
    """Runs the example; returns what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert train_cnn.main([*arguments, "--out", str(out)]) == 0
    return printed.getvalue()


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def test_everything_is_written(finished):
    out, printed = finished
    found = results(out)
    assert set(found) >= {"runs", "device", "versions", "seed", "date", "arguments"}
    assert list(found["runs"]) == ["adamw", "muon"]
    for name, measured in found["runs"].items():
        assert measured["learning_rate"] == train_cnn.RECIPES[name].learning_rate
        assert [step for step, _ in measured["train"]] == list(range(1, STEPS + 1))
        steps = [step for step, _ in measured["validation"]]
        assert (steps[0], steps[-1], len(steps)) == (0, STEPS, 6)
        assert [step for step, _ in measured["errors"]] == steps
        assert len(measured["validation_seconds"]) == len(steps)
        assert measured["seconds"] > 0
        assert measured["images_per_second"] > 0
        ratios = measured["update_to_param"]
        assert set(ratios) == {"head", "hidden", "other", "vector"}
        for measurements in ratios.values():
            assert [step for step, _ in measurements] == steps[1:]
            assert all(ratio > 0 for _, ratio in measurements)
    adamw, muon = found["runs"].values()
    assert adamw["steps_to_adamw_best"] is not None
    # Both start from the same parameters and see the same first batch.
    assert adamw["train"][0] == muon["train"][0]
    assert adamw["validation"][0] == muon["validation"][0]
    assert (out / "train_cnn.png").stat().st_size > 10_000
    for expected in (
        "blocks/1/conv/kernel",
        "memory of muon",
        "Length of a step",
        "AdamW's best",
    ):
        assert expected in printed


def test_losses_fall(finished):
    for measured in results(finished[0])["runs"].values():
        losses = [loss for _, loss in measured["train"]]
        # Each batch has other images, so the first and the last five are compared.
        assert np.mean(losses[-5:]) < np.mean(losses[:5])
        assert measured["validation"][-1][1] < measured["validation"][0][1]


@pytest.fixture(scope="module")
def batch(few) -> Batch:
    return few.draw(0, 0, 16)


def arrays(model: ConvNet, kind: type[nnx.Variable]) -> list[np.ndarray]:
    return [np.array(leaf) for leaf in jax.tree.leaves(nnx.state(model, kind))]


def is_each_changed(old: list[np.ndarray], new: list[np.ndarray]) -> list[bool]:
    return [bool((x != y).any()) for x, y in zip(old, new, strict=True)]


def test_statistics_belong_to_training_and_not_to_evaluation(tiny, batch):
    model = ConvNet(WIDTH, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, ox.sgd(0.1), wrt=nnx.Param)
    logits = nnx.jit(lambda model, images: model(images))
    statistics, params = arrays(model, nnx.BatchStat), arrays(model, nnx.Param)
    # A mean and a variance of every block.
    assert len(statistics) == 6
    train_cnn.train_step(model, optimizer, *batch)
    trained_statistics = arrays(model, nnx.BatchStat)
    trained_params = arrays(model, nnx.Param)
    assert all(is_each_changed(statistics, trained_statistics))
    assert all(is_each_changed(params, trained_params))
    model.eval()
    train_cnn.evaluate(model, *batch)
    assert not any(is_each_changed(trained_statistics, arrays(model, nnx.BatchStat)))
    assert not any(is_each_changed(trained_params, arrays(model, nnx.Param)))
    # An image is read in the same way whatever is beside it.
    images, _ = batch
    others = images.copy()
    others[1:] = 0
    np.testing.assert_array_equal(logits(model, images)[0], logits(model, others)[0])
    model.train()
    assert (logits(model, images)[0] != logits(model, others)[0]).any()


def test_validation_leaves_the_model_in_training(tiny, few):
    options = train_cnn.parse_arguments(["--steps", "1"])
    console = train_cnn.Console(quiet=True)
    trainer = train_cnn.Trainer(few, options, train_cnn.Interruption(), console)
    model = trainer.model()
    measured = train_cnn.ImageRun("adamw", {"batch": 1})
    before = arrays(model, nnx.BatchStat)
    trainer._validate(model, measured)
    assert not any(is_each_changed(before, arrays(model, nnx.BatchStat)))
    assert not any(block.norm.use_running_average for block in model.blocks)
    model.eval()
    loss, error = train_cnn.evaluate(model, *few.validation)
    assert measured.validation == [[0, float(loss)]]
    assert measured.errors == [[0, float(error)]]


def test_kernels_of_convolutions_go_to_muon():
    params = nnx.state(ConvNet(WIDTH, nnx.Rngs(0)), nnx.Param)
    labels = ox.label_params(params)
    axes = ox.infer_matrix_axes(params)
    # The first one has 9 inputs: too few to count as a hidden matrix.
    kernels = [labels["blocks"][i]["conv"]["kernel"] for i in range(3)]
    assert kernels == ["adamw", "muon", "muon"]
    for i in (1, 2):
        assert axes["blocks"][i]["conv"]["kernel"].fan_in == (0, 1, 2)
        assert axes["blocks"][i]["conv"]["kernel"].fan_out == (3,)
    assert labels["head"]["kernel"] == "adamw"
    others = [label for label in jax.tree.leaves(labels) if label != "muon"]
    # A scale and a bias of every block, the first kernel, the head and its bias.
    assert others == ["adamw"] * 9


def test_interrupted_keeps_what_was_measured(finished, tmp_path, monkeypatch):
    draw = Digits.draw

    def interrupting(digits: Digits, seed: int, step: int, batch: int) -> Batch:
        # A step after the first validation in training.
        if step == STEPS // 5:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(digits, seed, step, batch)

    monkeypatch.setattr(Digits, "draw", interrupting)
    arguments = ("--steps", str(STEPS), "--optimizers", "adamw", "muon")
    printed = run(tmp_path, *arguments)
    assert "Interrupted." in printed
    found = results(tmp_path)["runs"]
    assert list(found) == ["adamw"]
    # The same seed gives the same run, to the last bit.
    expected = results(finished[0])["runs"]["adamw"]
    assert found["adamw"]["train"] == expected["train"][: STEPS // 5 + 1]
    assert found["adamw"]["validation"] == expected["validation"][:2]
    # What AdamW would have reached is not known.
    assert found["adamw"]["steps_to_adamw_best"] is None


def test_learning_rates_are_tried_with_each_optimizer():
    arguments = ["--optimizers", "muon", "sgd", "muon", "--learning-rates", "0.5", "1"]
    options = train_cnn.parse_arguments(arguments)
    recipes = train_cnn.recipes_to_compare(options)
    assert list(recipes) == ["muon 0.5", "muon 1", "sgd 0.5", "sgd 1"]
    assert [r.learning_rate for r in recipes.values()] == [0.5, 1, 0.5, 1]
    assert recipes["sgd 1"].build is train_cnn.RECIPES["sgd"].build


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], "--seed must not be negative, got -1"),
        (["--steps", "0"], "must be a positive integer, got '0'"),
        (["--learning-rates", "0"], "must be positive and finite, got 0"),
        (["--learning-rates", "nan"], "must be positive and finite, got nan"),
        (["--optimizers", "lion"], "invalid choice: 'lion'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        train_cnn.parse_arguments(arguments)
    assert message in capsys.readouterr().err
