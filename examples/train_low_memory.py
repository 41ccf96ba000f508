"""Does a GPT learn as well with weights in bfloat16 and optimizer state in 8 bits?

The job of `train_gpt.py` with its Muon and AdamW, twice: with everything in float32,
and with weights in bfloat16, 8 more bits of them beside, and moments in 8-bit codes.
Both see the same data and follow the same schedule. The second also cuts its batches
into micro-batches, one after the other, so that the activations of one of them are in
memory at a time. Weights are computed with in float32 in both: what differs is what is
kept from step to step.

    python examples/train_low_memory.py                  # three minutes on two cores
    python examples/train_low_memory.py --steps small    # under a minute
    python examples/train_low_memory.py --micro-batches 8 --seed 1

Written to `--out`: `results.json` (every number), `train_low_memory.png` (the curves)
and `checkpoints/`. Ctrl-C stops after the current step and keeps what was measured;
`--resume` goes on from there, to the last bit as if nothing had happened.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import optax
import train_gpt
from comparison import empty_table, plot, results
from flax.training.train_state import TrainState
from gpt import GPT, GPTConfig
from rich.console import Console
from text import standard_library
from train_gpt import Recipe, Task, Trainer, build_optimizer, positive, run_settings
from training_run import Checkpoints, Interruption, ResumeError, Run

import optaxplus as ox

MICRO_BATCHES = 2
MUON = train_gpt.RECIPES["muon"]


def in_low_memory(schedule: optax.Schedule) -> optax.GradientTransformation:
    """The same optimizer with 8-bit moments, for weights of 16 + 8 bits."""
    return ox.master_weights(ox.quantize_state(MUON.build(schedule)), bits=24)


# Of each run: its optimizer, and the dtype of its weights.
RUNS = {
    "float32": (MUON, "float32"),
    "low-memory": (Recipe(MUON.learning_rate, in_low_memory), "bfloat16"),
}


class MeasuringTrainer(Trainer):
    """Trains in micro-batches, and says what was in memory.

    Attributes:
        micro_batches: Number of parts of a batch; 1 leaves it whole.
        memory: Bytes of the run, by what they are; empty before it.
    """

    def __init__(self, *arguments: Any, micro_batches: int) -> None:
        super().__init__(*arguments)
        self.micro_batches = micro_batches
        self.memory: dict[str, int] = {}

    def train(self, name: str, recipe: Recipe, checkpoints: Checkpoints) -> Run:
        """Trains from the start or from the checkpoint, and measures the arrays."""
        task, params = self.task, self.task.initial_params()
        tx = build_optimizer(recipe, task.steps)
        # Compiled, `init` makes codes without the float32 moments they stand for.
        opt_state = jax.jit(tx.init)(params)
        state = TrainState(
            0, apply_fn=task.model.apply, params=params, tx=tx, opt_state=opt_state
        )
        settings = run_settings(task, recipe) | {"micro_batches": self.micro_batches}
        state, run = checkpoints.restore(state, Run(name, settings))
        if run.step == task.steps:
            # It was finished when resumed: the step is compiled to be measured.
            self._compile(state, run)
        state = self._take_steps(state, run, checkpoints)
        checkpoints.save(state, run)
        self.memory = bytes_held(state) | self.memory
        return run

    def _train_step(self, state: TrainState, windows: jax.Array) -> tuple[Any, Any]:
        """Takes one step; gives back the new state and the loss before it."""
        # Gradients have the dtype of what is differentiated, and their sums over
        # micro-batches are not to be rounded to bfloat16.
        weights = optax.tree.cast(state.params, "float32")
        loss, grads = value_and_grad(self._loss, self.micro_batches)(weights, windows)
        return state.apply_gradients(grads=grads), loss

    def _compile(self, state: TrainState, run: Run) -> Callable[..., Any]:
        """Notes how much memory the compiler asks for."""
        compiled = super()._compile(state, run)
        bytes_in_step = compiled.memory_analysis().temp_size_in_bytes
        self.memory = {"temporary, within a step": bytes_in_step}
        return compiled


def value_and_grad(loss: Callable[..., Any], micro_batches: int) -> Callable[..., Any]:
    """Makes a function that computes a loss and its gradient, part after part."""
    size = None if micro_batches == 1 else train_gpt.BATCH // micro_batches
    # Parts are equally large, so the mean of their means is that of the batch.
    mean = optax.microbatching.AccumulationType.MEAN
    return optax.microbatch(jax.value_and_grad(loss), 1, size, mean)


def bytes_held(state: TrainState) -> dict[str, int]:
    """Bytes of the arrays that are kept from step to step, by what they are."""
    nodes = jax.tree.leaves(
        state.opt_state, is_leaf=lambda node: isinstance(node, ox.QuantizedArray)
    )
    coded = [node for node in nodes if isinstance(node, ox.QuantizedArray)]
    in_state = {
        "8-bit correction of weights": getattr(state.opt_state, "kept", ()),
        "moments in codes": [moment.codes for moment in coded],
        "scales of the codes": [moment.scales for moment in coded],
    }
    held = {"weights": tree_bytes(state.params)}
    held |= {part: tree_bytes(arrays) for part, arrays in in_state.items()}
    total = tree_bytes((state.params, state.opt_state))
    held["float32 rest of the state"] = total - sum(held.values())
    return held | {"total": total}


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def difference(runs: dict[str, Run]) -> dict[str, list[float]] | None:
    """[step, per cent of the float32 loss] at the end, and where it is largest."""
    if len(runs) < len(RUNS):
        return None
    # An interrupted run is compared as far as it got.
    pairs = zip(*(run.validation for run in runs.values()), strict=False)
    percent = {step: 100 * (loss / wide - 1) for (step, wide), (_, loss) in pairs}
    last, largest = max(percent), max(percent, key=lambda step: abs(percent[step]))
    return {"last": [last, percent[last]], "largest": [largest, percent[largest]]}


def print_memory(
    memory: dict[str, dict[str, int]], num_params: int, console: Console
) -> None:
    """Prints what was in memory, in MB and in bytes per parameter."""
    numbers = (f"{name}\n{unit}" for name in memory for unit in ("MB", "a parameter"))
    title = f"Memory as measured, in MB and bytes a parameter, of {num_params:,}"
    table = empty_table(title, "", *numbers)
    for part in next(iter(memory.values())):
        counts = [taken[part] for taken in memory.values()]
        cells = ((f"{n / 1e6:.3f}", f"{n / num_params:.3f}") for n in counts)
        table.add_row(part, *chain(*cells))
    console.print(table)


def print_losses(runs: dict[str, Run]) -> None:
    """Prints how well both have learned, and how they differ."""
    for name, run in runs.items():
        step, loss = run.validation[-1]
        print(
            f"{name}: validation loss {loss:.4f} nats per byte after step {step}, "
            f"{run.tokens_per_second:,.0f} tokens/s"
        )
    if found := difference(runs):
        (end, last), (step, largest) = found.values()
        print(
            f"In low memory the loss differs by {last:+.2f} % after step {end}, and "
            f"most after step {step}, by {largest:+.2f} %."
        )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--steps",
        type=train_gpt.step_count,
        default=train_gpt.STEPS,
        metavar="N",
        help=f"steps of each run, or 'small' for {train_gpt.SMALL_STEPS} "
        "(default: %(default)s)",
    )
    divisors = [n for n in range(1, train_gpt.BATCH + 1) if train_gpt.BATCH % n == 0]
    parser.add_argument(
        "--micro-batches",
        type=positive,
        choices=divisors,
        default=MICRO_BATCHES,
        metavar="N",
        help="into how many parts the low-memory run cuts a batch: "
        f"{', '.join(map(str, divisors))} (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--width",
        type=positive,
        default=train_gpt.WIDTH,
        help=f"width of the model, a multiple of {train_gpt.HEAD_SIZE} "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/train_low_memory"),
        help="directory for everything that is written; without --resume, checkpoints "
        "of an earlier run in it are removed (default: %(default)s)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the checkpoints in --out"
    )
    parsed = parser.parse_args(arguments)
    if parsed.width % train_gpt.HEAD_SIZE:
        parser.error(
            f"--width must be a multiple of {train_gpt.HEAD_SIZE}, got {parsed.width}"
        )
    if parsed.seed < 0:
        parser.error(f"--seed must not be negative, got {parsed.seed}")
    if parsed.resume and not (parsed.out / "checkpoints").is_dir():
        parser.error(f"--resume: there are no checkpoints in {parsed.out}")
    return parsed


def resume_command(options: argparse.Namespace) -> str:
    """The command line that continues these runs."""
    words = ["python", sys.argv[0], "--steps", options.steps]
    words += ["--micro-batches", options.micro_batches, "--seed", options.seed]
    words += ["--width", options.width, "--out", options.out, "--resume"]
    return shlex.join(map(str, words))


def compare(options: argparse.Namespace, console: Console) -> bool:
    """Trains both, writes and prints; returns whether Ctrl-C ended it."""
    sizes = (options.width, train_gpt.DEPTH, train_gpt.HEAD_SIZE, train_gpt.CONTEXT)
    common = (GPT(GPTConfig(*sizes)), standard_library(), options.steps, options.seed)
    tasks = {
        name: Task(*common, param_dtype=dtype) for name, (_, dtype) in RUNS.items()
    }
    parts = {"float32": 1, "low-memory": options.micro_batches}
    runs, memory, reports = {}, {}, {}
    for name, task in tasks.items():
        tx = build_optimizer(RUNS[name][0], task.steps)
        params = jax.eval_shape(task.initial_params)
        reports[name] = ox.memory_report(tx, params, grads_dtype="float32")
        console.rule(f"memory of {name}, predicted", align="left")
        print(f"{reports[name]}\n")
    with Interruption() as interruption:
        for name, task in tasks.items():
            checkpoints = Checkpoints(options.out / "checkpoints" / name)
            trainer = MeasuringTrainer(
                task, interruption, console, micro_batches=parts[name]
            )
            runs[name] = trainer.train(name, RUNS[name][0], checkpoints)
            memory[name] = trainer.memory
            if interruption.requested:
                break
        document = results(runs, options) | {
            "num_params": reports["float32"].num_params,
            "bytes": memory,
            "predicted": {name: each.to_dict() for name, each in reports.items()},
            "difference_percent": difference(runs),
        }
        (options.out / "results.json").write_text(json.dumps(document) + "\n")
        plot(runs, options.out / "train_low_memory.png")
        print_memory(memory, document["num_params"], console)
        print_losses(runs)
    return interruption.requested


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison; returns the exit status."""
    options = parse_arguments(arguments)
    if not options.resume:
        shutil.rmtree(options.out / "checkpoints", ignore_errors=True)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        interrupted = compare(options, Console())
    except ResumeError as error:
        print(error, file=sys.stderr)
        return 2
    print(
        f"\nWritten to {options.out}: results.json, train_low_memory.png, checkpoints/"
    )
    if interrupted:
        print(f"Interrupted. To go on from here:\n  {resume_command(options)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
