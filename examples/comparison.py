"""Compares training runs: as JSON, as a figure and as a table.

The question is always the same: how soon is a run as good as AdamW ever was?
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from training_run import Run

import optaxplus as ox
from optaxplus.report.plots import loss_curves

LOSS_LABEL = "validation loss (nats per byte)"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def adamw_best(runs: dict[str, Run]) -> float | None:
    """AdamW's best validation loss, or None without a finished run of it."""
    run = runs.get("adamw")
    if run is None or run.step < run.settings["steps"]:
        return None
    return min(loss for _, loss in run.validation)


def steps_to_adamw_best(
    run: Run, runs: dict[str, Run]
) -> tuple[int | None, float | None]:
    """When a run is first as good as AdamW ever was: in steps and in seconds.

    Both are None if it never is, and if AdamW was not asked for or not finished.
    """
    best = adamw_best(runs)
    if best is None:
        return None, None
    for (step, loss), seconds in zip(
        run.validation, run.validation_seconds, strict=True
    ):
        if loss <= best:
            return step, seconds
    return None, None


def results(runs: dict[str, Run], arguments: argparse.Namespace) -> dict[str, Any]:
    """Collects everything measured, in the form of `results.json`.

    `seconds` is the time spent in training steps alone, without compilation
    (`compile_seconds`), validation and checkpoints; the speed is over the same time.
    """
    table = {}
    for name, run in runs.items():
        reached_step, reached_seconds = steps_to_adamw_best(run, runs)
        table[name] = {
            "learning_rate": run.settings["learning_rate"],
            "train": run.train,
            "validation": run.validation,
            "validation_seconds": run.validation_seconds,
            "seconds": run.seconds,
            "compile_seconds": run.compile_seconds,
            "tokens_per_second": run.tokens_per_second,
            "steps_to_adamw_best": reached_step,
            "seconds_to_adamw_best": reached_seconds,
            "sample": run.sample,
        }
    return {
        "runs": table,
        "device": device(),
        "versions": versions(),
        "seed": arguments.seed,
        "date": datetime.date.today().isoformat(),
        "arguments": vars(arguments) | {"out": str(arguments.out)},
    }


def device() -> str:
    """What the numbers were measured on."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}, {os.cpu_count()} CPU cores"


def versions() -> dict[str, str]:
    """The versions of everything that could change the numbers."""
    return {
        "python": platform.python_version(),
        "optaxplus": ox.__version__,
        **{package: metadata.version(package) for package in PACKAGES},
    }


def headline(runs: dict[str, Run]) -> str:
    """Says in one line how the runs compare with AdamW."""
    parts = []
    for name, run in runs.items():
        reached, _ = steps_to_adamw_best(run, runs)
        if name != "adamw" and reached is not None:
            total = runs["adamw"].settings["steps"]
            parts.append(
                f"{name} reaches AdamW's best after {reached} of {total} steps"
            )
    return "; ".join(parts) or "Validation loss"


def plot(
    runs: dict[str, Run], path: Path, *, ylabel: str = LOSS_LABEL, log: bool = False
) -> None:
    """Draws the validation losses over steps and over seconds."""
    losses, steps, seconds = {}, {}, {}
    for name, run in runs.items():
        label = f"{name}, learning rate {run.settings['learning_rate']:g}"
        steps[label], losses[label] = zip(*run.validation, strict=True)
        seconds[label] = run.validation_seconds
    best = adamw_best(runs)
    common = {
        "reference": None if best is None else {"AdamW's best": best},
        # The first steps would squeeze the part that matters.
        "crop_start": 0.2,
        "log": log,
    }
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    figure.suptitle(headline(runs))
    left, right = figure.subplots(1, 2, sharey=True)
    loss_curves(losses, steps, ylabel=ylabel, ax=left, **common)
    common |= {"xlabel": "seconds of training", "ylabel": "", "legend": False}
    loss_curves(losses, seconds, ax=right, path=path, **common)


def empty_table(title: str, first: str, *numbers: str) -> Table:
    """A table of results: a column of names, and columns of numbers."""
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 0))
    table.add_column(first, no_wrap=True)
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def print_best_sample(runs: Iterable[Run], kind: str, console: Console) -> None:
    """Prints what the best of the models that wrote a sample has written."""
    written = [run for run in runs if run.sample]
    if written:
        best = min(written, key=lambda run: run.validation[-1][1])
        console.rule(f"{kind} by the model of {best.optimizer}", align="left")
        print(best.sample)


def print_results(runs: dict[str, Run], console: Console) -> None:
    """Prints the table of results and a sample from the best model."""
    table = empty_table(
        "Results; losses in nats per byte of the validation text",
        "optimizer",
        "learning\nrate",
        "steps",
        "final\nloss",
        "best\nloss",
        "AdamW's best\nat step",
        "\nat second",
        "\ntokens/s",
        "\nseconds",
    )
    for name, run in runs.items():
        losses = [loss for _, loss in run.validation]
        steps, seconds = steps_to_adamw_best(run, runs)
        table.add_row(
            name,
            f"{run.settings['learning_rate']:g}",
            str(run.step),
            f"{losses[-1]:.4f}",
            f"{min(losses):.4f}",
            "-" if steps is None else str(steps),
            "-" if seconds is None else f"{seconds:.0f}",
            f"{run.tokens_per_second:,.0f}",
            f"{run.seconds:.0f}",
        )
    console.print(table)
    print_best_sample(runs.values(), "code written", console)
