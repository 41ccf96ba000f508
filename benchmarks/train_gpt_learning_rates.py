"""Which learning rate is best for each optimizer of `examples/train_gpt.py`?

A comparison of optimizers is only worth as much as their tuning. Every optimizer is
tried on the job of the example, at its full length, with four learning rates, a factor
of two apart. For AdamW, Muon's family and the methods with curvature gradients are
clipped to norm 1, weights decay by 0.1, and Adam has b2 = 0.95. The winner has the
lowest last validation loss; it has to lie inside its grid, or the grid has to move.

    python benchmarks/train_gpt_learning_rates.py
    python benchmarks/train_gpt_learning_rates.py --optimizers adamw --steps 300

Each trial is written to `--out` when it ends, and trials that are there are skipped:
the script can be stopped and started again at any time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
from rich.console import Console
from rich.table import Table

import optaxplus as ox

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import train_gpt
from comparison import device, versions
from gpt import GPT, GPTConfig
from text import standard_library
from training_run import Interruption

RESULTS = Path(__file__).parent / "results" / "train_gpt_learning_rates.json"


@dataclass(frozen=True)
class Grid:
    """What is tried of an optimizer.

    Attributes:
        rates: Learning rates, neighbours a factor of two apart.
        arguments: Its other arguments. An "adamw_learning_rate" is the highest of the
            schedule for what is no hidden matrix.
        build: Makes the optimizer; None is the recipe of the example.
    """

    rates: Sequence[float]
    arguments: dict[str, float] = field(default_factory=dict)
    build: Callable[..., optax.GradientTransformation] | None = None


def sophia(
    learning_rate: optax.Schedule, *, clip_norm: float, **arguments: Any
) -> optax.GradientTransformation:
    """Sophia with the clipping of the others."""
    return optax.chain(
        ox.clip_by_global_norm(clip_norm), ox.sophia(learning_rate, **arguments)
    )


ADAM = {"b2": 0.95, "weight_decay": 0.1, "clip_norm": 1.0}
MUON = {"adamw_b2": 0.95, "weight_decay": 0.1, "clip_norm": 1.0}
# Their rates mean something else for matrices than AdamW's: the rest keeps its best.
ADAMW_APART = MUON | {"adamw_learning_rate": 2e-3}
# With the b1, gamma and eps of Sophia-G in its authors' training script.
SOPHIA = {
    "b1": 0.965,
    "gamma": 0.05,
    "eps": 1e-15,
    "weight_decay": 0.1,
    "clip_norm": 1.0,
}
GRIDS = {
    "adamw": Grid((1e-3, 2e-3, 4e-3, 8e-3), ADAM, train_gpt.adamw),
    "muon": Grid((2e-3, 4e-3, 8e-3, 1.6e-2), MUON, ox.muon),
    "normuon": Grid((2e-3, 4e-3, 8e-3, 1.6e-2), MUON, ox.normuon),
    "adamuon": Grid((2e-3, 4e-3, 8e-3, 1.6e-2), MUON, ox.adamuon),
    "scion": Grid((4.5e-5, 9e-5, 1.8e-4, 3.6e-4), {"clip_norm": 1.0}, ox.scion),
    "soap": Grid((1e-3, 2e-3, 4e-3, 8e-3), MUON, ox.soap),
    "shampoo": Grid((1e-3, 2e-3, 4e-3, 8e-3), MUON, ox.shampoo),
    "kron": Grid((2.5e-4, 5e-4, 1e-3, 2e-3), ADAMW_APART, ox.kron),
    # A quarter of the width, as in the paper.
    "apollo": Grid((4e-3, 8e-3, 1.6e-2, 3.2e-2), ADAMW_APART | {"rank": 32}, ox.apollo),
    "sophia": Grid((6.25e-5, 1.25e-4, 2.5e-4, 5e-4), SOPHIA, sophia),
    "sgd": Grid((0.1, 0.2, 0.4, 0.8)),
    "adam": Grid((1e-3, 2e-3, 4e-3, 8e-3)),
    "lion": Grid((1e-4, 2e-4, 4e-4, 8e-4)),
    "lars": Grid((0.5, 1.0, 2.0, 4.0)),
    "lamb": Grid((2.5e-3, 5e-3, 1e-2, 2e-2)),
    "adafactor": Grid((5e-3, 1e-2, 2e-2, 4e-2)),
}


def trials(names: Sequence[str], steps: int, seed: int) -> Iterator[dict[str, Any]]:
    """Lists everything that is to be tried, as far as it is known in advance."""
    for name in names:
        for rate in GRIDS[name].rates:
            yield {
                "optimizer": name,
                "learning_rate": rate,
                "arguments": GRIDS[name].arguments,
                "steps": steps,
                "seed": seed,
            }


def recipe_of(trial: dict[str, Any]) -> train_gpt.Recipe:
    """The optimizer of a trial."""
    name, rate = trial["optimizer"], trial["learning_rate"]
    build = GRIDS[name].build or train_gpt.RECIPES[name].build
    arguments = dict(trial["arguments"])
    of_others = arguments.pop("adamw_learning_rate", None)
    if of_others is None:
        return train_gpt.Recipe(rate, partial(build, **arguments))

    def with_two_rates(schedule: optax.Schedule) -> optax.GradientTransformation:
        return build(
            schedule,
            adamw_learning_rate=lambda step: of_others / rate * schedule(step),
            **arguments,
        )

    return train_gpt.Recipe(rate, with_two_rates)


class Trainer(train_gpt.Trainer):
    """Trains with any optimizer of `GRIDS`; Sophia gets its estimates."""

    def _train_step(self, state: Any, windows: jax.Array) -> tuple[Any, jax.Array]:
        """Takes one step; gives back the new state and the loss before it."""

        def hessian(params: Any) -> Any:
            # Of the same batch, with new labels every time.
            key = jax.random.fold_in(jax.random.key(self.task.seed), state.step)

            def logits_fn(params: Any) -> jax.Array:
                return self.task.model.apply({"params": params}, windows[:, :-1])

            return ox.gauss_newton_bartlett(logits_fn, params, key)

        loss, grads = jax.value_and_grad(self._loss)(state.params, windows)
        updates, opt_state = optax.with_extra_args_support(state.tx).update(
            grads, state.opt_state, state.params, hessian=hessian
        )
        params = optax.apply_updates(state.params, updates)
        new = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        return new, loss


def run_trial(trial: dict[str, Any], trainer: train_gpt.Trainer) -> dict[str, Any]:
    """Trains once; returns the trial with what it gave."""
    run = trainer.train(trial["optimizer"], recipe_of(trial))
    losses = [loss for _, loss in run.validation]
    return trial | {
        "final_validation_loss": losses[-1],
        "best_validation_loss": min(losses),
    }


def is_same(trial: dict[str, Any], done: dict[str, Any]) -> bool:
    """Whether a finished trial is the one that is wanted."""
    return all(done[key] == value for key, value in trial.items())


def model() -> GPT:
    """The model of the example."""
    return GPT(
        GPTConfig(
            width=train_gpt.WIDTH,
            depth=train_gpt.DEPTH,
            head_size=train_gpt.HEAD_SIZE,
            context=train_gpt.CONTEXT,
        )
    )


def job() -> dict[str, Any]:
    """What every trial has in common; trials of another job are not comparable."""
    return {
        "width": train_gpt.WIDTH,
        "depth": train_gpt.DEPTH,
        "head_size": train_gpt.HEAD_SIZE,
        "context": train_gpt.CONTEXT,
        "batch": train_gpt.BATCH,
        "warmup_share": train_gpt.WARMUP_SHARE,
    }


def load(path: Path) -> list[dict[str, Any]]:
    """Reads the trials that are there already."""
    if not path.exists():
        return []
    document = json.loads(path.read_text())
    if document["job"] != job():
        sys.exit(
            f"{path}: these trials are of another job ({document['job']}), which is "
            f"now {job()}. Move the file away, or pass another --out."
        )
    return document["trials"]


def save(done: list[dict[str, Any]], path: Path) -> None:
    """Writes all trials, with what they were measured on."""
    document = {
        "job": job(),
        "device": device(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "trials": done,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def print_table(done: list[dict[str, Any]], console: Console) -> None:
    """Prints every trial and marks the best of each optimizer."""
    table = Table("optimizer", "arguments", title="Last validation loss of each trial")
    for title in ("learning rate", "steps", "seed", "loss", ""):
        table.add_column(title, justify="right")
    best: dict[str, float] = {}
    for trial in done:
        loss = trial["final_validation_loss"]
        best[trial["optimizer"]] = min(loss, best.get(trial["optimizer"], loss))
    for trial in done:
        loss = trial["final_validation_loss"]
        table.add_row(
            trial["optimizer"],
            " ".join(f"{key}={value}" for key, value in trial["arguments"].items()),
            f"{trial['learning_rate']:g}",
            str(trial["steps"]),
            str(trial["seed"]),
            f"{loss:.4f}",
            "best" if loss == best[trial["optimizer"]] else "",
        )
    console.print(table)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--optimizers",
        nargs="+",
        choices=GRIDS,
        default=["adamw", "muon"],
        metavar="NAME",
        help=f"of {', '.join(GRIDS)} (default: adamw muon)",
    )
    parser.add_argument("--steps", type=int, default=train_gpt.STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> int:
    """Runs the trials that are missing; returns the exit status."""
    options = parse_arguments()
    console = Console()
    done = load(options.out)
    task = train_gpt.Task(model(), standard_library(), options.steps, options.seed)
    with Interruption() as interruption:
        trainer = Trainer(task, interruption, Console(quiet=True))
        for trial in trials(options.optimizers, options.steps, options.seed):
            if any(is_same(trial, other) for other in done):
                continue
            result = run_trial(trial, trainer)
            if interruption.requested:
                break
            done.append(result)
            save(done, options.out)
            console.print(result)
    print_table(done, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
