"""Which optimizer learns fastest, if every one of them is tuned alike?

Every optimizer gets the same model, data in the same order, number of steps, schedule
(5 % of warm-up, then a cosine to zero), clipping and number of trials: seven learning
rates with one seed, the first five a factor of 10^(1/2) apart, the last two where the
losses before them say. The best one then trains with three other seeds, which are what
is reported: the last validation loss, the steps to the best loss of AdamW with the same
seed, their time beside AdamW's, and how much a wrong learning rate costs.

    python benchmarks/convergence.py                     # hours
    python benchmarks/convergence.py --tasks conv_net --optimizers adamw muon
    python benchmarks/convergence.py --steps 300 --optimizers muon normuon adamuon soap
    python benchmarks/convergence.py --small             # under two minutes

`--steps 300` asks whether half of the steps, with a schedule and learning rates of
their own, are enough.

The runs are hours apart and not compared by their seconds; `convergence_times.py`
measures those of a step.

Each run is written to `--out`, a folder, when it ends, and runs that are there are
skipped: the script can be stopped and started again at any time, also with other
optimizers. `convergence_report.py` makes tables and figures of them.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import optax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import optaxplus as ox

# A script's own folder, also where the tests load it by its path.
sys.path.insert(0, str(Path(__file__).resolve().parent))
from convergence_optimizers import OPTIMIZERS
from convergence_tasks import TASKS, Task

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from comparison import device, versions
from training_run import Interruption

RESULTS = Path(__file__).parent / "results" / "convergence"
BASELINE = "adamw"
# Learning rates are 10^(k/4) times the one in the middle.
FIRST_EXPONENTS = (0, -2, 2, -4, 4)
TRIALS = 7
SEEDS = (1, 2, 3)
WARMUP_SHARE = 0.05
VALIDATIONS = 20
SMALL_RESULTS = Path("runs/convergence")
SMALL_STEPS = 20
SMALL_TASKS = ("small_gpt", "conv_net", "recurrent_net")
SMALL_OPTIMIZERS = ("adamw", "muon", "kron")


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        optimizer: Name in `OPTIMIZERS`.
        exponent: Four times the decimal logarithm of the learning rate relative to the
            one in the middle.
        seed: Of the initial parameters and of the data; 0 for the trials.
    """

    optimizer: str
    exponent: int
    seed: int

    @property
    def learning_rate(self) -> float:
        """The highest one of the schedule."""
        return rate_of(self.optimizer, self.exponent)

    @property
    def arguments(self) -> dict[str, Any]:
        """What the optimizer has beside it."""
        return OPTIMIZERS[self.optimizer].arguments


def rate_of(optimizer: str, exponent: int) -> float:
    """A learning rate with four significant digits."""
    return float(f"{OPTIMIZERS[optimizer].rate * 10 ** (exponent / 4):.4g}")


class Results:
    """The finished runs of a task, and the file that they are in."""

    def __init__(self, name: str, task: Task, folder: Path) -> None:
        self.path = folder / f"{name}.json"
        self.job = {
            "title": task.title,
            "model": repr(task.model),
            "steps": task.steps,
            "warmup_share": WARMUP_SHARE,
            **task.settings,
        }
        self.runs: dict[Run, dict[str, Any]] = {}
        self.times: dict[str, Any] = {}
        if self.path.exists():
            document = json.loads(self.path.read_text("utf-8"))
            if document["job"] != self.job:
                sys.exit(
                    f"{self.path}: these runs are of another job, {document['job']}; "
                    f"it is now {self.job}. Move the file away, or pass another --out."
                )
            self.times = document["times"]
            for found in document["runs"]:
                key = Run(found["optimizer"], found["exponent"], found["seed"])
                now = {"learning_rate": key.learning_rate, "arguments": key.arguments}
                if any(found[name] != value for name, value in now.items()):
                    sys.exit(
                        f"{self.path}: {key} was made with another optimizer than "
                        f"OPTIMIZERS has now, {now}. Remove its runs from the file, or "
                        "pass another --out."
                    )
                self.runs[key] = found

    def add(self, run: Run, found: dict[str, Any]) -> None:
        """Keeps a run, and writes all of them."""
        self.runs[run] = {
            "optimizer": run.optimizer,
            "exponent": run.exponent,
            "seed": run.seed,
            "learning_rate": run.learning_rate,
            "arguments": run.arguments,
            **found,
            **circumstances(),
        }
        self.write()

    def write(self) -> None:
        """Writes all runs, one a line, and the times."""
        order = list(OPTIMIZERS)
        runs = sorted(
            self.runs.values(),
            key=lambda r: (order.index(r["optimizer"]), r["seed"], r["exponent"]),
        )
        lines = ",\n".join(json.dumps(found) for found in runs)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(
            f'{{"job": {json.dumps(self.job)},\n"times": {json.dumps(self.times)},\n'
            f'"runs": [\n{lines}\n]}}\n',
            "utf-8",
        )

    def losses(self, optimizer: str) -> dict[int, float]:
        """The last validation losses of the trials, by exponent."""
        return {
            run.exponent: last_loss(found)
            for run, found in self.runs.items()
            if run.optimizer == optimizer and run.seed == 0
        }

    def best_exponent(self, optimizer: str) -> int:
        """Of the trial with the lowest last validation loss."""
        losses = self.losses(optimizer)
        if not losses:
            sys.exit(f"{self.path}: there is no trial of {optimizer} yet.")
        return min(losses, key=lambda exponent: losses[exponent])


def circumstances() -> dict[str, Any]:
    """What else might have changed the numbers."""
    return {
        "device": device(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }


def last_loss(found: dict[str, Any]) -> float:
    """The last validation loss; infinite for a run that diverged."""
    _, loss = found["validation"][-1]
    return math.inf if loss is None else loss


def next_exponent(losses: dict[int, float], trials: int = TRIALS) -> int | None:
    """What to try after these trials, or None if there were enough.

    After the first ones, a step beyond the end if the best one is at an end; else half
    a step to either side of it, to the better one of its neighbours first.
    """
    if len(losses) >= trials:
        return None
    for exponent in FIRST_EXPONENTS:
        if exponent not in losses:
            return exponent
    best = min((k for k in losses if k % 2 == 0), key=lambda k: losses[k])
    if best == max(losses):
        return best + 2
    if best == min(losses):
        return best - 2
    sides = sorted((-1, 1), key=lambda side: losses[best + 2 * side])
    return next(best + side for side in sides if best + side not in losses)


class Trainer:
    """Trains on one task with one optimizer, compiled once for all rates and seeds."""

    def __init__(self, task: Task, name: str, adamw_rate: float | None) -> None:
        self.task = task
        self.name = name
        self.adamw_rate = adamw_rate
        # The old parameters and state are donated: the new ones take their memory.
        self._step = jax.jit(self._take_step, donate_argnums=(0, 1))
        self._init = jax.jit(lambda rate, params: self.optimizer(rate).init(params))
        self._validation_loss = jax.jit(task.validation_loss)

    def optimizer(self, rate: Any) -> optax.GradientTransformationExtraArgs:
        """Of a learning rate, traced or not."""
        kind = OPTIMIZERS[self.name]
        others = dict(kind.arguments)
        if kind.keeps_adamw_rate:
            others["adamw_learning_rate"] = schedule(self.adamw_rate, self.task.steps)
        return optax.with_extra_args_support(
            optax.chain(
                ox.clip_by_global_norm(1.0),
                kind.factory(schedule(rate, self.task.steps), **others),
            )
        )

    def _take_step(
        self,
        params: Any,
        state: Any,
        rate: jax.Array,
        key: jax.Array,
        inputs: jax.Array,
        labels: jax.Array,
    ) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(self.task.loss)(params, inputs, labels)
        others = {}
        if OPTIMIZERS[self.name].needs_hessian:
            others["hessian"] = lambda params: ox.gauss_newton_bartlett(
                lambda params: self.task.logits(params, inputs), params, key
            )
        updates, state = self.optimizer(rate).update(grads, state, params, **others)
        return optax.apply_updates(params, updates), state, loss

    def start(self, run: Run) -> tuple[Any, Any]:
        """Parameters and state before the first step."""
        params = self.task.initial_params(run.seed)
        return params, self._init(run.learning_rate, params)

    def step(self, run: Run, step: int, params: Any, state: Any) -> tuple[Any, ...]:
        """Parameters, state, the loss before the step, and its seconds."""
        batch = self.task.draw(run.seed, step)
        key = jax.random.fold_in(jax.random.key(run.seed), step)
        start = time.perf_counter()
        *new, loss = self._step(params, state, run.learning_rate, key, *batch)
        loss = float(loss)
        return *new, loss, time.perf_counter() - start

    def train(self, run: Run, report: Callable[[int, float], bool]) -> dict[str, Any]:
        """What a run gave; `report` is told step and loss, and may end it."""
        steps = self.task.steps
        params, state = self.start(run)
        state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
        num_params = sum(x.size for x in jax.tree.leaves(params))
        every = max(steps // VALIDATIONS, SMALL_STEPS // 4)
        validation = [[0, self._validated(params)]]
        for step in range(steps):
            params, state, loss, _ = self.step(run, step, params, state)
            if (step + 1) % every == 0:
                validation.append([step + 1, self._validated(params)])
            if report(step + 1, loss):
                break
        return {
            "validation": validation,
            "state_bytes_per_param": round(state_bytes / num_params, 4),
            "num_params": num_params,
        }

    def _validated(self, params: Any) -> float | None:
        """The validation loss, or None if it is no number (which JSON has not)."""
        loss = float(self._validation_loss(params))
        return round(loss, 5) if math.isfinite(loss) else None


def schedule(rate: Any, steps: int) -> optax.Schedule:
    """The schedule that all share."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    shape = optax.warmup_cosine_decay_schedule(
        init_value=1 / (warmup + 1),
        peak_value=1.0,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
    )
    return lambda count: rate * shape(count)


def benchmark(
    name: str,
    task: Task,
    optimizers: Iterable[str],
    results: Results,
    interruption: Interruption,
    console: Console,
    *,
    trials: int = TRIALS,
    seeds: Sequence[int] = SEEDS,
) -> None:
    """Makes the runs of a task that are missing."""
    for optimizer in optimizers:
        if interruption.requested:
            return
        trainer = Trainer(task, optimizer, adamw_rate(optimizer, results))

        def make(run: Run, trainer: Trainer = trainer) -> None:
            if run in results.runs or interruption.requested:
                return
            with progress(name, run, task.steps, console) as report:
                found = trainer.train(
                    run, lambda *now: report(*now) or interruption.requested
                )
            if not interruption.requested:
                results.add(run, found)
                console.print(
                    f"{name}: {run.optimizer}, learning rate {run.learning_rate:g}, "
                    f"seed {run.seed}: {last_loss(found):.4f}",
                    highlight=False,
                )

        while not interruption.requested:
            exponent = next_exponent(results.losses(optimizer), trials)
            if exponent is None:
                break
            make(Run(optimizer, exponent, 0))
        for seed in () if interruption.requested else seeds:
            make(Run(optimizer, results.best_exponent(optimizer), seed))
        jax.clear_caches()


def adamw_rate(optimizer: str, results: Results) -> float | None:
    """AdamW's best learning rate, for those that need it."""
    if not OPTIMIZERS[optimizer].keeps_adamw_rate:
        return None
    return rate_of(BASELINE, results.best_exponent(BASELINE))


@contextlib.contextmanager
def progress(
    name: str, run: Run, steps: int, console: Console
) -> Iterator[Callable[[int, float], None]]:
    """Shows a live bar with the loss and the time left, in a terminal only."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    is_hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=is_hidden) as live:
        title = f"{name}: {run.optimizer}, {run.learning_rate:g}, seed {run.seed}"
        bar = live.add_task(title, total=steps, loss=math.nan)
        yield lambda step, loss: live.update(bar, completed=step, loss=loss)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=TASKS,
        default=None,
        help=f"(default: all; with --small {', '.join(SMALL_TASKS)})",
    )
    parser.add_argument(
        "--optimizers",
        nargs="+",
        choices=OPTIMIZERS,
        default=None,
        metavar="NAME",
        help=f"of {', '.join(OPTIMIZERS)} (default: all)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=None,
        help=f"of every run (default: those of the task; with --small {SMALL_STEPS})",
    )
    parser.add_argument(
        "--small",
        action="store_true",
        help=f"{SMALL_STEPS} steps, {', '.join(SMALL_OPTIMIZERS)}, one trial and seed",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="folder for the results (default: benchmarks/results/convergence, or "
        "convergence_N beside it with --steps N; with --small runs/convergence)",
    )
    options = parser.parse_args(arguments)
    if options.steps is not None and options.steps < VALIDATIONS:
        parser.error(
            f"--steps {options.steps}: runs have at least {VALIDATIONS} steps, one "
            "for each validation"
        )
    if options.optimizers is None:
        options.optimizers = [*(SMALL_OPTIMIZERS if options.small else OPTIMIZERS)]
    # Others are compared with it, and some take its learning rate.
    options.optimizers = list(dict.fromkeys([BASELINE, *options.optimizers]))
    if options.out is None and options.small:
        options.out = SMALL_RESULTS
    elif options.out is None:
        suffix = "" if options.steps is None else f"_{options.steps}"
        options.out = RESULTS.with_name(RESULTS.name + suffix)
    if options.steps is None and options.small:
        options.steps = SMALL_STEPS
    if options.tasks is None:
        options.tasks = [*(SMALL_TASKS if options.small else TASKS)]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the runs that are missing; returns the exit status."""
    options = parse_arguments(arguments)
    console = Console()
    counts = {"trials": 1, "seeds": SEEDS[:1]} if options.small else {}
    with Interruption() as interruption:
        for name in options.tasks:
            task = TASKS[name]()
            if options.steps is not None:
                task = replace(task, steps=options.steps)
            results = Results(name, task, options.out)
            if interruption.requested:
                break
            benchmark(
                name,
                task,
                options.optimizers,
                results,
                interruption,
                console,
                **counts,
            )
    console.print(f"Written to {options.out}", highlight=False)
    return 1 if interruption.requested else 0


if __name__ == "__main__":
    sys.exit(main())
