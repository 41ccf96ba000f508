"""How long does a training step of every optimizer of `convergence.py` take?

All optimizers of a task train in turns, some steps each, so that what else the machine
does slows all of them alike. Times are written beside the runs of the task, in place of
those of another day, whose machine was another one.

    python benchmarks/convergence_times.py               # minutes, on an idle machine
    python benchmarks/convergence_times.py --small       # after convergence.py --small

Of every optimizer with trials there, at its best learning rate.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

# A script's own folder, also where the tests load it by its path.
sys.path.insert(0, str(Path(__file__).resolve().parent))
from convergence import (
    BASELINE,
    RESULTS,
    SMALL_RESULTS,
    SMALL_STEPS,
    Interruption,
    Results,
    Run,
    Trainer,
    adamw_rate,
    circumstances,
)
from convergence_tasks import TASKS, Task

# Steps of an optimizer before it is the turn of the next: two refreshes of SOAP.
STEPS_IN_TURN = 20
ROUNDS = 7


def measure_times(
    task: Task,
    optimizers: Iterable[str],
    results: Results,
    rounds: int,
    interruption: Interruption,
) -> dict[str, Any] | None:
    """Milliseconds of a training step, by optimizer: [quartile, median, quartile].

    Those of `BASELINE` are the first; the others come as ratios to it, too. None if it
    is interrupted.
    """
    runs = {name: Run(name, results.best_exponent(name), 0) for name in optimizers}
    trainers = {name: Trainer(task, name, adamw_rate(name, results)) for name in runs}
    milliseconds: dict[str, list[float]] = {name: [] for name in runs}
    generator = np.random.default_rng(0)
    states = {name: [*trainers[name].start(run)] for name, run in runs.items()}
    # The first round compiles, and has the first steps, which may be like no others.
    for index in range(rounds + 1):
        for at in generator.permutation(len(runs)):
            if interruption.requested:
                return None
            name = [*runs][at]
            seconds = 0.0
            for step in range(index * STEPS_IN_TURN, (index + 1) * STEPS_IN_TURN):
                *states[name], _, duration = trainers[name].step(
                    runs[name], step, *states[name]
                )
                seconds += duration
            if index:
                milliseconds[name].append(1e3 * seconds / STEPS_IN_TURN)
    baseline = np.array(milliseconds[BASELINE])
    return {
        name: {
            "milliseconds": _quartiles(np.array(found)),
            f"ratio_to_{BASELINE}": _quartiles(np.array(found) / baseline),
        }
        for name, found in milliseconds.items()
    }


def _quartiles(values: np.ndarray) -> list[float]:
    return [round(float(x), 4) for x in np.quantile(values, (0.25, 0.5, 0.75))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures the tasks that have results; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--small", action="store_true", help="one round of what --small has trained"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help=f"folder of the results (default: {RESULTS.name} beside the other "
        f"results; with --small {SMALL_RESULTS})",
    )
    options = parser.parse_args(arguments)
    folder = options.out or (SMALL_RESULTS if options.small else RESULTS)
    names = [name for name in TASKS if (folder / f"{name}.json").exists()]
    if not names:
        parser.error(f"there are no results in {folder}: run convergence.py first")
    rounds = 1 if options.small else ROUNDS
    with Interruption() as interruption:
        for name in names:
            task = TASKS[name]()
            if options.small:
                task = replace(task, steps=SMALL_STEPS)
            results = Results(name, task, folder)
            tried = dict.fromkeys(run.optimizer for run in results.runs)
            found = measure_times(task, tried, results, rounds, interruption)
            if found is None:
                return 1
            results.times = {"optimizers": found, "rounds": rounds} | circumstances()
            results.write()
            print(f"{name}: {len(found)} optimizers, written to {results.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
