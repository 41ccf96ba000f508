"""Tables and figures of what `convergence.py` found.

    python benchmarks/convergence_report.py              # of benchmarks/results
    python benchmarks/convergence_report.py runs/convergence

Prints a table for every task and writes two figures beside the results: `losses.png`,
the last validation losses with their spread over seeds, and `learning_rates.png`, what
a wrong learning rate costs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

# A script's own folder, also where the tests load it by its path.
sys.path.insert(0, str(Path(__file__).resolve().parent))
from convergence import BASELINE, RESULTS, last_loss
from convergence_tasks import TASKS

from optaxplus.report.tables import format_table

# Of these the loss is drawn for every learning rate; more lines are not readable.
SHOWN_RATES = ("adamw", "lion", "muon", "normuon", "soap", "nesterov")
# The trials on either side, a factor of 10^(1/2) away.
FACTOR = 2


@dataclass(frozen=True)
class Row:
    """What became of an optimizer on a task.

    Attributes:
        optimizer: Its name.
        learning_rate: The best one.
        is_at_end: Whether that is the lowest or the highest that was tried.
        losses: Last validation losses, by seed.
        steps: The first step at which the loss is no higher than the lowest of AdamW
            with the same seed, for every seed; infinite if there is none.
        time: That of a step, of AdamW's; None if it was not measured.
        below: How much higher the loss is with a third of the learning rate; None if
            that was not tried.
        above: The same for three times the learning rate.
        state: Bytes of state per parameter.
        trials: Losses by learning rate.
    """

    optimizer: str
    learning_rate: float
    is_at_end: bool
    losses: dict[int, float]
    steps: list[float]
    time: float | None
    below: float | None
    above: float | None
    state: float
    trials: dict[float, float]

    @property
    def loss(self) -> float:
        """The median over the seeds."""
        return median(self.losses.values())

    @property
    def rate_text(self) -> str:
        """The learning rate, marked where it is at an end."""
        return f"{self.learning_rate:.2g}{' (end)' if self.is_at_end else ''}"

    @property
    def loss_text(self) -> str:
        """Median (smallest to largest) over the seeds."""
        low, high = min(self.losses.values()), max(self.losses.values())
        return f"{self.loss:.3f} ({low:.3f} to {high:.3f})"


def best_of_adamw(document: dict[str, Any]) -> dict[int, float]:
    """The lowest validation loss of AdamW at its best learning rate, by seed."""
    return {
        run["seed"]: min(loss for _, loss in run["validation"] if loss is not None)
        for run in document["runs"]
        if run["optimizer"] == BASELINE and run["seed"]
    }


def rows(document: dict[str, Any]) -> list[Row]:
    """Of a task, the lowest loss first; optimizers without other seeds are left out."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for run in document["runs"]:
        by_name.setdefault(run["optimizer"], []).append(run)
    goals = best_of_adamw(document)
    found = []
    for name, runs in by_name.items():
        trials = {run["exponent"]: last_loss(run) for run in runs if not run["seed"]}
        best = min(trials, key=lambda exponent: trials[exponent])
        finals = [run for run in runs if run["seed"] and run["exponent"] == best]
        if not finals:
            continue
        times = document["times"].get("optimizers", {}).get(name)
        found.append(
            Row(
                optimizer=name,
                learning_rate=finals[0]["learning_rate"],
                is_at_end=best in (min(trials), max(trials)),
                losses={run["seed"]: last_loss(run) for run in finals},
                steps=[_first_step(run, goals[run["seed"]]) for run in finals],
                time=times and times[f"ratio_to_{BASELINE}"][1],
                below=_higher(trials, best, best - FACTOR),
                above=_higher(trials, best, best + FACTOR),
                state=finals[0]["state_bytes_per_param"],
                trials={
                    run["learning_rate"]: last_loss(run)
                    for run in sorted(runs, key=lambda run: run["exponent"])
                    if not run["seed"]
                },
            )
        )
    return sorted(found, key=lambda row: row.loss)


def _first_step(run: dict[str, Any], goal: float) -> float:
    return next(
        (s for s, loss in run["validation"] if loss is not None and loss <= goal),
        math.inf,
    )


def _higher(trials: dict[int, float], best: int, exponent: int) -> float | None:
    """How much higher the loss of an exponent is, between those that were tried."""
    if math.isinf(trials[best]):
        return None
    if exponent in trials:
        return trials[exponent] - trials[best]
    around = [e for e in (exponent - 1, exponent + 1) if e in trials]
    if len(around) < 2:
        return None
    return sum(trials[e] for e in around) / 2 - trials[best]


HEADER = (
    *("optimizer", "learning rate", "validation loss", "steps to AdamW's best"),
    *("time to it", "a third of the rate", "three times", "state"),
)


def cells(row: Row, steps: int) -> list[str]:
    """A line of the table."""
    middle = median(row.steps)
    reached = "never" if math.isinf(middle) else f"{middle:.0f} of {steps}"
    time = "-"
    if row.time is not None and math.isfinite(middle):
        time = f"{row.time * middle / steps:.2f}"
    return [
        row.optimizer,
        row.rate_text,
        row.loss_text,
        reached,
        time,
        *("-" if x is None else f"{x:+.3f}" for x in (row.below, row.above)),
        f"{row.state:.3g}",
    ]


def markdown(documents: dict[str, dict[str, Any]]) -> str:
    """The tables of all tasks, as they stand in benchmarks/README.md."""
    parts = []
    for document in documents.values():
        job = document["job"]
        found = rows(document)
        lines = [HEADER, *(cells(row, job["steps"]) for row in found)]
        parts += [
            f"{job['title']}, {job['steps']} steps in batches of {job['batch']}:",
            "\n".join(
                [
                    *(f"| {' | '.join(line)} |" for line in lines[:1]),
                    "|---" * 2 + "|---:" * (len(HEADER) - 2) + "|",
                    *(f"| {' | '.join(line)} |" for line in lines[1:]),
                ]
            ),
        ]
    devices = {run["device"] for x in documents.values() for run in x["runs"]}
    parts.append(
        "The last validation loss in nats, median (smallest to largest) over "
        f"{_counts(documents, lambda row: row.losses)} seeds, at the best of "
        f"{_counts(documents, lambda row: row.trials)} learning rates, which were "
        "chosen with another seed; (end) where that is the lowest or the highest that "
        "was tried. Steps: median over the seeds of the first validation at which a "
        "run is as good as AdamW with its seed ever was; time to it: of AdamW's whole "
        "run, by the times of a step that were measured in turns. A third of the rate, "
        "three times: how much higher the loss of the trial is there. State: bytes per "
        "parameter of the network. Kron's and APOLLO's rates are for hidden matrices, "
        "the rest keeps AdamW's best; `apollo` has rank 16, `apollo_mini` rank 1. "
        f"On {', '.join(sorted(devices))}; "
        "`python benchmarks/convergence.py` trains them, and "
        "`python benchmarks/convergence_times.py` measures the times."
    )
    return "\n\n".join(parts)


def _counts(documents: dict[str, dict[str, Any]], of: Callable[[Row], Sized]) -> str:
    """How many seeds or trials the rows have: a number, or from the fewest on."""
    found = {len(of(row)) for document in documents.values() for row in rows(document)}
    return str(found.pop()) if len(found) == 1 else f"{min(found)} to {max(found)}"


def short_runs(
    full: dict[str, dict[str, Any]], short: dict[str, dict[str, Any]]
) -> list[list[str]]:
    """Fewer steps beside AdamW's best over all of them with the same seed, as text."""
    lines = [["optimizer", "steps", "learning rate", "validation loss"]]
    lines[0].append("of AdamW's best, same seed")
    for name, document in short.items():
        goals = best_of_adamw(full[name])
        steps = f"{document['job']['steps']} of {full[name]['job']['steps']}"
        for row in rows(document):
            higher = [100 * (row.losses[seed] / goals[seed] - 1) for seed in row.losses]
            lines.append(
                [
                    row.optimizer,
                    steps,
                    row.rate_text,
                    row.loss_text,
                    f"{median(higher):+.1f} % "
                    f"({min(higher):+.1f} to {max(higher):+.1f})",
                ]
            )
    return lines


def load(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The results by task, in the order of `TASKS`."""
    paths = {name: folder / f"{name}.json" for name in TASKS}
    return {
        name: json.loads(path.read_text("utf-8"))
        for name, path in paths.items()
        if path.exists()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables and draws the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS)
    folder = parser.parse_args(arguments).folder
    documents = load(folder)
    if not documents:
        parser.error(f"there are no results in {folder}")
    for document in documents.values():
        job = document["job"]
        lines = [cells(row, job["steps"]) for row in rows(document)]
        print(f"\n{job['title']}\n")
        print(format_table(HEADER, lines, right=range(3, len(HEADER))))
    draw_losses(documents, folder / "losses.png")
    draw_rates(documents, folder / "learning_rates.png")
    return 0


def draw_losses(documents: dict[str, dict[str, Any]], path: Path) -> None:
    """A dot for the median of each optimizer, a line from the best to the worst."""
    from matplotlib.figure import Figure

    tables = {
        document["job"]["title"]: rows(document) for document in documents.values()
    }
    tallest = max(map(len, tables.values()))
    figure = Figure(
        figsize=(4 * len(tables), 1.2 + 0.2 * tallest), layout="constrained"
    )
    for axes, (title, table) in zip(
        figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True
    ):
        baseline = next(row.loss for row in table if row.optimizer == BASELINE)
        # Diverged and hopeless runs would press all others into a corner.
        worst = max((x.loss for x in table if x.loss < 2 * baseline), default=0.0)
        for place, row in enumerate(table):
            low, high = min(row.losses.values()), max(row.losses.values())
            if row.loss > worst:
                axes.annotate(
                    f"{row.loss:.2g} →", (worst, place), ha="right", va="center"
                )
                continue
            axes.plot([low, high], [place, place], color="0.6", linewidth=2, zorder=1)
            filled = "black" if row.optimizer == BASELINE else "tab:blue"
            axes.plot(row.loss, place, "o", color=filled, markersize=5, zorder=2)
        axes.axvline(baseline, color="black", linewidth=0.8, linestyle="--", zorder=0)
        axes.set_yticks(range(len(table)), [row.optimizer for row in table])
        axes.invert_yaxis()
        axes.set_title(title)
        axes.set_xlabel("validation loss, nats")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def draw_rates(documents: dict[str, dict[str, Any]], path: Path) -> None:
    """The last validation loss of the trials against the learning rate."""
    from matplotlib.figure import Figure

    styles = ("o-", "s--", "^-", "v--", "D:", "x-.")
    figure = Figure(figsize=(4 * len(documents), 3.4), layout="constrained")
    panels = figure.subplots(1, len(documents), squeeze=False)[0]
    for axes, document in zip(panels, documents.values(), strict=True):
        found = {row.optimizer: row for row in rows(document)}
        for name, style in zip(SHOWN_RATES, styles, strict=True):
            if name in found:
                row = found[name]
                relative = [rate / row.learning_rate for rate in row.trials]
                axes.plot(
                    relative, row.trials.values(), style, label=name, markersize=4
                )
        low = min(row.loss for row in found.values())
        axes.set_ylim(0.95 * low, 2 * found[BASELINE].loss)
        axes.set_xscale("log")
        axes.set_title(document["job"]["title"])
        axes.set_xlabel("learning rate, of its best")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("validation loss, nats")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    sys.exit(main())
