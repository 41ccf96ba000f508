"""Which way do optimizers go, and how soon do they arrive?

From SGD to Kron on Rosenbrock's and Beale's functions, on an ill-conditioned quadratic,
and on the factorization of an ill-conditioned matrix, where methods for matrices show
what they are for. Gradients are exact, without noise, so nothing here says how any of
them trains a network.

Every optimizer is run with every learning rate of one grid, constant and falling
linearly to 0, without weight decay (which would move the minimum), with all else at its
defaults. Shown is its best run: that which is soonest below a millionth of the first
loss for good, or, if none is, that which ends lowest.

    python examples/trajectories.py                  # under two minutes on two cores
    python examples/trajectories.py --small          # some seconds, to try the script
    python examples/trajectories.py --problems rosenbrock --optimizers adamw lion
    python examples/trajectories.py --problems factorization --condition 100

Muon and its like are for matrices: a point is a vector, which they leave to AdamW, so
they are run on the factorization alone. There they reach the smallest singular values,
which the others hardly do in 500 steps. But Muon's steps do not shrink with the
gradient, so it arrives only as its learning rate falls: with `--condition 100` or
`--steps 2000` momentum and AdamW are there long before it.

Written to `--out`: `results.json` (every number), `trajectories.png` (the paths and the
losses), `factorization.png` (the losses, and how each optimizer learns the singular
values) and `trajectories.gif` (all of it, step after step).
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from descents import THRESHOLD, Build, Outcome, Problem, plain, tune
from landscapes import PLANES, Plane, factorization
from trajectory_figures import animate, draw_factorization, draw_planes

import optaxplus as ox
from optaxplus.report.tables import format_table

STEPS = 500
SMALL_STEPS = 30
FRAMES = 50
SMALL_FRAMES = 4
RATES = (
    *(digit * 10.0**power for power in range(-4, 1) for digit in (1, 2, 5)),
    10.0,
)
FACTORIZATION = "factorization"
PROBLEMS = (*PLANES, FACTORIZATION)
PACKAGES = ("jax", "jaxlib", "optax", "numpy", "matplotlib")

ELEMENTWISE: dict[str, Build] = {
    "sgd": ox.sgd,
    "momentum": partial(ox.sgd, momentum=0.9),
    "nesterov": partial(ox.sgd, momentum=0.9, nesterov=True),
    "rmsprop": ox.rmsprop,
    "adamw": partial(ox.adamw, weight_decay=0.0),
    "lion": partial(ox.lion, weight_decay=0.0),
}
# What they do with a vector is AdamW.
FOR_MATRICES: dict[str, Build] = {
    "muon": partial(ox.muon, weight_decay=0.0),
    "normuon": partial(ox.normuon, weight_decay=0.0),
    "adamuon": partial(ox.adamuon, weight_decay=0.0),
    "dion": partial(ox.dion, weight_decay=0.0),
    "shampoo": partial(ox.shampoo, weight_decay=0.0),
    "soap": partial(ox.soap, weight_decay=0.0),
    "kron": partial(ox.kron, weight_decay=0.0),
}
OPTIMIZERS = ELEMENTWISE | FOR_MATRICES


def applicable(problem: str, optimizers: Sequence[str]) -> list[str]:
    """Those that do with the problem's parameters what they are named for."""
    return [
        name
        for name in optimizers
        if problem == FACTORIZATION or name not in FOR_MATRICES
    ]


# What comes out


def entry(problem: Problem, outcome: Outcome) -> dict[str, Any]:
    """An outcome as plain data."""
    if isinstance(problem, Plane):
        path = {"points": plain(outcome.params)}
    else:
        path = {"singular_values": plain(problem.singular_values(outcome.params))}
    return {
        "learning_rate": outcome.learning_rate,
        "schedule": outcome.schedule,
        "steps_to_threshold": outcome.arrived,
        "note": outcome.note,
        "losses": plain(outcome.losses),
        "tried": outcome.tried,
        **path,
    }


def results(
    problems: dict[str, Problem],
    outcomes: dict[str, dict[str, Outcome]],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Collects everything measured, in the form of `results.json`."""
    table = {}
    for name, runs in outcomes.items():
        problem = problems[name]
        table[name] = {
            "threshold": THRESHOLD * float(problem.loss(problem.start)),
            "runs": {key: entry(problem, outcome) for key, outcome in runs.items()},
            "left_out": [key for key in options.optimizers if key not in runs],
        }
    devices = jax.devices()
    return {
        "problems": table,
        "device": f"{len(devices)} x {devices[0].device_kind}, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            "optaxplus": ox.__version__,
            **{package: metadata.version(package) for package in PACKAGES},
        },
        "seed": options.seed,
        "date": datetime.date.today().isoformat(),
        "arguments": vars(options) | {"out": str(options.out)},
    }


def rows(outcomes: dict[str, Outcome]) -> Iterator[tuple[str, ...]]:
    """The table of a problem."""
    for name, outcome in outcomes.items():
        steps = "never" if outcome.arrived is None else str(outcome.arrived)
        yield (
            name,
            f"{outcome.learning_rate:g}",
            outcome.schedule,
            steps,
            f"{outcome.losses[-1]:.2e}",
            outcome.note,
        )


def print_table(title: str, outcomes: dict[str, Outcome]) -> None:
    """Prints the table of a problem, with rich where it is installed."""
    print(f"\n{title}")
    header = ("optimizer", "learning rate", "schedule", "steps", "last loss", "note")
    right = (1, 3, 4)
    if importlib.util.find_spec("rich") is None:
        print(format_table(header, list(rows(outcomes)), right))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for index, column in enumerate(header):
        table.add_column(column, justify="right" if index in right else "left")
    for row in rows(outcomes):
        table.add_row(*row)
    Console().print(table)


def print_results(
    problems: dict[str, Problem],
    outcomes: dict[str, dict[str, Outcome]],
    options: argparse.Namespace,
) -> None:
    """Prints a table for every problem, and who is not in it, and why."""
    for name, runs in outcomes.items():
        problem = problems[name]
        first = float(problem.loss(problem.start))
        print_table(
            f"{problem.title}: steps, of {options.steps}, until the loss stays below "
            f"{THRESHOLD * first:.1e}",
            runs,
        )
    if left_out := sorted(set(FOR_MATRICES) & set(options.optimizers)):
        if set(outcomes) & set(PLANES):
            text = (
                f"Not on functions of a point: {', '.join(left_out)}. A point is a "
                "vector, no matrix, and these optimizers leave vectors to AdamW."
            )
            print(textwrap.fill(text, 80))
        if FACTORIZATION in outcomes:
            print("\nWhat they make of the two factors:")
            print(ox.explain_routing(problems[FACTORIZATION].start))


# The command line


def positive(text: str) -> int:
    """Reads a positive whole number from the command line."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def at_least_one(text: str) -> float:
    """Reads a finite number of 1 or more from the command line."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 1 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of 1 or more, got {text!r}")
    return number


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help=f"steps of each run (default: {STEPS}, with --small {SMALL_STEPS})",
    )
    for option, choices in (("optimizers", OPTIMIZERS), ("problems", PROBLEMS)):
        parser.add_argument(
            f"--{option}",
            nargs="+",
            choices=choices,
            default=list(choices),
            metavar="NAME",
            help=f"of {', '.join(choices)} (default: all)",
        )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the matrix and its first factors; the functions have nothing random "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--condition",
        type=at_least_one,
        default=1000.0,
        help="condition number of the matrix (default: %(default)g)",
    )
    parser.add_argument(
        "--small",
        action="store_true",
        help="to try the script: fewer steps, rates and frames, a smaller matrix",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/trajectories"),
        help="directory for everything that is written (default: %(default)s)",
    )
    parsed = parser.parse_args(arguments)
    # In the order of the tables, so that an optimizer looks alike in all figures.
    parsed.optimizers = [name for name in OPTIMIZERS if name in parsed.optimizers]
    parsed.problems = [name for name in PROBLEMS if name in parsed.problems]
    parsed.steps = parsed.steps or (SMALL_STEPS if parsed.small else STEPS)
    if parsed.seed < 0:
        parser.error(f"--seed must not be negative, got {parsed.seed}")
    for problem in parsed.problems:
        if not applicable(problem, parsed.optimizers):
            parser.error(
                f"--optimizers: none of {', '.join(parsed.optimizers)} is for "
                f"{problem}, whose parameters are a vector; add --problems "
                f"{FACTORIZATION}, or one of {', '.join(ELEMENTWISE)}"
            )
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs everything; returns the exit status."""
    options = parse_arguments(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    sizes = {"size": 8, "rank": 4} if options.small else {}
    matrix = factorization(options.seed, condition=options.condition, **sizes)
    problems: dict[str, Problem] = {**PLANES, FACTORIZATION: matrix}
    rates = RATES[::4] if options.small else RATES
    outcomes: dict[str, dict[str, Outcome]] = {}
    began, is_terminal = time.perf_counter(), sys.stderr.isatty()
    for problem in options.problems:
        outcomes[problem] = {}
        for name in applicable(problem, options.optimizers):
            if is_terminal:
                print(f"\r{problem}: {name:20}", end="", file=sys.stderr, flush=True)
            outcomes[problem][name] = tune(
                OPTIMIZERS[name], problems[problem], options.steps, rates
            )
    seconds = time.perf_counter() - began
    if is_terminal:
        print(f"\r{'':40}\r", end="", file=sys.stderr)
    print(f"{seconds:.0f} s for all runs of the grid")
    document = results(problems, outcomes, options)
    text = json.dumps(document, allow_nan=False)
    (options.out / "results.json").write_text(text + "\n", "utf-8")
    written = ["results.json"]
    planes = {name: runs for name, runs in outcomes.items() if name in PLANES}
    if planes:
        draw_planes(planes, options.out / "trajectories.png")
        written.append("trajectories.png")
    factorized = outcomes.get(FACTORIZATION, {})
    if factorized:
        draw_factorization(matrix, factorized, options.out / "factorization.png")
        written.append("factorization.png")
    frames = SMALL_FRAMES if options.small else FRAMES
    animate(planes, factorized, frames, options.out / "trajectories.gif")
    written.append("trajectories.gif")
    print_results(problems, outcomes, options)
    print(f"\nWritten to {options.out}: {', '.join(written)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
