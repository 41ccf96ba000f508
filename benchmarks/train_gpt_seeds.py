"""Does an optimizer that won its sweep also win with other seeds?

Every optimizer trains the job of `examples/train_gpt.py` with its best trial of
`train_gpt_learning_rates.py`, from other initial parameters and on other batches than
the sweep. Reported is the last validation loss, and the step at which the run is first
as good as AdamW with the same seed ever was.

    python benchmarks/train_gpt_seeds.py
    python benchmarks/train_gpt_seeds.py --optimizers adamw muon --seeds 1 2
    python benchmarks/train_gpt_seeds.py --steps 600 --optimizers muon normuon soap

The last one asks whether a schedule of half the length, tuned by itself, is enough.

Each run is written to `--out` when it ends, and runs that are there are skipped: the
script can be stopped and started again at any time. A figure of the losses is drawn
beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

# A script's own folder, also where the tests load it by its path.
sys.path.insert(0, str(Path(__file__).resolve().parent))
import train_gpt_learning_rates as sweep
from train_gpt_learning_rates import train_gpt

from optaxplus.report.plots import loss_curves

RESULTS = Path(__file__).parent / "results" / "train_gpt_seeds.json"
BASELINE = "adamw"
STEPS = train_gpt.STEPS
# Tuned under another name, with arguments added: label -> (optimizer, arguments).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "muon, standard form": ("muon", {"method": "standard"}),
    "muon, ns_steps=4": ("muon", {"ns_steps": 4}),
}
DEFAULT = (
    *("adamw", "muon", "normuon", "adamuon", "scion", *VARIANTS),
    *("soap", "shampoo", "kron", "apollo", "sophia"),
)
# Those of the figure; more curves would not be readable.
DRAWN = (BASELINE, "muon", "normuon", "soap")


def best_trials(path: Path, steps: int) -> dict[str, dict[str, Any]]:
    """The trial of the sweep with the lowest last validation loss, by label.

    Of those optimizers that have been tried with all of their learning rates.
    """
    best: dict[str, dict[str, Any]] = {}
    done = sweep.load(path)
    for name in sweep.GRIDS:
        wanted = sweep.trials([name], steps, seed=0)
        found = [[d for d in done if sweep.is_same(trial, d)] for trial in wanted]
        if all(found):
            mine = [trial for same in found for trial in same]
            best[name] = min(mine, key=lambda trial: trial["final_validation_loss"])
    for label, (name, arguments) in VARIANTS.items():
        if name in best:
            best[label] = best[name] | {
                "arguments": best[name]["arguments"] | arguments
            }
    return best


def train(
    label: str, trial: dict[str, Any], trainer: train_gpt.Trainer
) -> dict[str, Any]:
    """Trains once."""
    run = trainer.train(label, sweep.recipe_of(trial))
    return {
        "optimizer": label,
        "learning_rate": trial["learning_rate"],
        "arguments": trial["arguments"],
        "steps": trainer.task.steps,
        "seed": trainer.task.seed,
        "validation": run.validation,
        "seconds": run.seconds,
    }


def settings(run: dict[str, Any]) -> tuple[Any, ...]:
    """What runs that differ in nothing but the seed have in common."""
    return run["optimizer"], run["learning_rate"], run["arguments"], run["steps"]


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Losses and steps to AdamW's best of each optimizer, over the seeds."""
    goals = {
        run["seed"]: min(loss for _, loss in run["validation"])
        for run in runs
        if run["optimizer"] == BASELINE
    }
    lines = []
    # The latest learning rate and arguments of each; older runs are of other sweeps.
    latest = {run["optimizer"]: settings(run) for run in runs}
    for name, wanted in latest.items():
        mine = [run for run in runs if settings(run) == wanted]
        # A run that never gets there counts as longer than any.
        reached = [
            min(
                (
                    step
                    for step, loss in run["validation"]
                    if loss <= goals[run["seed"]]
                ),
                default=np.inf,
            )
            for run in mine
            if run["seed"] in goals
        ]
        losses = [run["validation"][-1][1] for run in mine]
        lines.append(
            {
                "optimizer": name,
                "learning_rate": mine[0]["learning_rate"],
                "seeds": len(mine),
                "loss": [min(losses), float(np.median(losses)), max(losses)],
                "steps_to_adamw_best": [min(reached), np.median(reached), max(reached)]
                if reached
                else None,
            }
        )
    return lines


def table(runs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The summary as text, the header first."""
    rows = [["optimizer", "learning rate", "validation loss", "steps to AdamW's best"]]
    for line in summary(runs):
        low, middle, high = line["loss"]
        steps = line["steps_to_adamw_best"]
        rows.append(
            [
                line["optimizer"],
                f"{line['learning_rate']:g}",
                f"{middle:.3f} ({low:.3f} to {high:.3f})",
                "-" if steps is None else _steps(*steps),
            ]
        )
    return rows


def short_runs(runs: Sequence[dict[str, Any]], full: int = STEPS) -> list[list[str]]:
    """Runs over fewer than the `full` steps beside AdamW's over all, as text."""
    goals = {
        run["seed"]: min(loss for _, loss in run["validation"])
        for run in runs
        if run["optimizer"] == BASELINE and run["steps"] == full
    }
    rows = [["optimizer", "steps", "learning rate", "validation loss"]]
    rows[0].append("of AdamW's best, same seed")
    for steps in sorted({run["steps"] for run in runs} - {full}):
        short = [run for run in runs if run["steps"] == steps]
        latest = {run["optimizer"]: settings(run) for run in short}
        for line in summary(short):
            higher = [
                100 * (run["validation"][-1][1] / goals[run["seed"]] - 1)
                for run in short
                if settings(run) == latest[line["optimizer"]]
            ]
            low, middle, high = line["loss"]
            rows.append(
                [
                    line["optimizer"],
                    f"{steps} of {full}",
                    f"{line['learning_rate']:g}",
                    f"{middle:.3f} ({low:.3f} to {high:.3f})",
                    f"{np.median(higher):+.1f} % "
                    f"({min(higher):+.1f} to {max(higher):+.1f})",
                ]
            )
    return rows


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the validation losses of `DRAWN` over all steps, with their spread."""
    full = [run for run in runs if run["steps"] == STEPS]
    settled = {run["optimizer"]: settings(run) for run in full}
    curves: dict[str, list[Any]] = {name: [] for name in DRAWN if name in settled}
    for run in full:
        if run["optimizer"] in curves and settings(run) == settled[run["optimizer"]]:
            curves[run["optimizer"]].append(run["validation"])
    validations = {name: np.array(found) for name, found in curves.items()}
    loss_curves(
        {name: found[..., 1] for name, found in validations.items()},
        {name: found[0, :, 0] for name, found in validations.items()},
        crop_start=0.15,
        ylabel="validation loss, nats per byte",
        path=path,
    )


def _steps(low: float, middle: float, high: float) -> str:
    texts = ["never" if value == np.inf else f"{value:.0f}" for value in (low, high)]
    return f"{'never' if middle == np.inf else f'{middle:.0f}'} ({' to '.join(texts)})"


def main() -> int:
    """Trains what is missing, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--optimizers",
        nargs="+",
        choices=[*sweep.GRIDS, *VARIANTS],
        default=DEFAULT,
        metavar="NAME",
        help="those of train_gpt_learning_rates.py and "
        f"{', '.join(map(repr, VARIANTS))} (default: {', '.join(DEFAULT)})",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--sweep", type=Path, default=sweep.RESULTS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    best = best_trials(options.sweep, options.steps)
    missing = [name for name in options.optimizers if name not in best]
    if missing:
        parser.error(
            f"{options.sweep} has no trial of {', '.join(missing)} with "
            f"{options.steps} steps; run train_gpt_learning_rates.py --optimizers "
            f"{' '.join(missing)} --steps {options.steps} first."
        )
    runs = sweep.load(options.out)
    console = Console()
    text = sweep.standard_library()
    with sweep.Interruption() as interruption:
        for seed in options.seeds:
            task = train_gpt.Task(sweep.model(), text, options.steps, seed)
            trainer = sweep.Trainer(task, interruption, Console(quiet=True))
            for name in options.optimizers:
                trial = best[name] | {"optimizer": name, "seed": seed}
                keys = ("optimizer", "learning_rate", "arguments", "steps", "seed")
                if any(all(trial[key] == run[key] for key in keys) for run in runs):
                    continue
                run = train(name, best[name], trainer)
                if interruption.requested:
                    return 1
                runs.append(run)
                sweep.save(runs, options.out)
                console.print(f"{name}, seed {seed}: {run['validation'][-1][1]:.4f}")
    header, *lines = table([run for run in runs if run["steps"] == options.steps])
    printed = Table(*header)
    for line in lines:
        printed.add_row(*line)
    console.print(printed)
    draw(runs, options.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
