"""Does Muon train a small GPT faster than AdamW?

A byte-level GPT learns the source code of the Python standard library, once with AdamW
for every parameter and once with Muon for the hidden matrices and AdamW for the rest.
Both start from the same parameters, see the same data in the same order for the same
number of steps, and follow the same schedule from their own best learning rate.

    python examples/train_gpt.py                  # some four minutes on two cores
    python examples/train_gpt.py --steps small    # under a minute
    python examples/train_gpt.py --optimizers adamw muon lion --seed 1

Written to `--out`: `results.json` (every number), `train_gpt.png` (the curves) and
`checkpoints/`. Ctrl-C stops after the current step and keeps what was measured;
`--resume` goes on from there, to the last bit as if nothing had happened.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import string
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from comparison import plot, print_results, results
from flax.training.train_state import TrainState
from gpt import GPT, GPTConfig, generate, next_token_loss
from progress import live_progress
from rich.console import Console
from text import Text, standard_library, training_batch, validation_batches
from training_run import Checkpoints, Interruption, ResumeError, Run

import optaxplus as ox

# The size of the job: what two cores can do in the time.
STEPS = 1200
SMALL_STEPS = 80
WIDTH = 128
DEPTH = 4
HEAD_SIZE = 64
CONTEXT = 128
BATCH = 8
# A part of the run is spent on warming up, the rest on a cosine decay to zero.
WARMUP_SHARE = 0.05
# How often a run is measured and saved; a short run is measured less often.
VALIDATIONS = 30
VALIDATION_BATCHES = 16
CHECKPOINTS = 4
SAMPLE_PROMPT = "import os\n\n\nclass "
SAMPLE_LENGTH = 500


@dataclass(frozen=True)
class Recipe:
    """An optimizer with the learning rate at which it does best here.

    Attributes:
        learning_rate: The highest learning rate of the schedule.
        build: Makes the optimizer from a learning-rate schedule.
    """

    learning_rate: float
    build: Callable[[optax.Schedule], optax.GradientTransformation]


def adamw(
    learning_rate: optax.Schedule, *, clip_norm: float | None = None, **arguments: Any
) -> optax.GradientTransformation:
    """AdamW with the clipping of the whole gradient that `ox.muon` has built in."""
    tx = ox.adamw(learning_rate, **arguments)
    return (
        tx if clip_norm is None else optax.chain(ox.clip_by_global_norm(clip_norm), tx)
    )


# The first seven: the best of four trials each, by the last validation loss, with the
# same clipping, decay and b2. benchmarks/train_gpt_learning_rates.py repeats them, and
# benchmarks/results/train_gpt_learning_rates.json has them. The others are reasonable,
# but hardly tuned.
RECIPES = {
    "adamw": Recipe(2e-3, partial(adamw, b2=0.95, weight_decay=0.1, clip_norm=1.0)),
    "muon": Recipe(4e-3, partial(ox.muon, clip_norm=1.0)),
    "normuon": Recipe(4e-3, partial(ox.normuon, clip_norm=1.0)),
    "adamuon": Recipe(4e-3, partial(ox.adamuon, clip_norm=1.0)),
    "scion": Recipe(1.8e-4, partial(ox.scion, clip_norm=1.0)),
    "soap": Recipe(4e-3, partial(ox.soap, clip_norm=1.0)),
    "shampoo": Recipe(2e-3, partial(ox.shampoo, clip_norm=1.0)),
    "sgd": Recipe(0.3, partial(ox.sgd, momentum=0.9, nesterov=True)),
    "adam": Recipe(2e-3, partial(ox.adam, b2=0.95)),
    "lion": Recipe(4e-4, partial(ox.lion, weight_decay=0.5)),
    "lars": Recipe(2.0, ox.lars),
    "lamb": Recipe(1e-2, partial(ox.lamb, b2=0.95, weight_decay=0.1)),
    "adafactor": Recipe(2e-2, ox.adafactor),
}


@dataclass(frozen=True)
class Task:
    """What every optimizer is given alike.

    Attributes:
        model: The model.
        text: What it learns.
        steps: Length of a run.
        seed: Of the initial parameters and the order of the data.
        param_dtype: Dtype in which parameters are kept; they are computed with in
            float32.
    """

    model: GPT
    text: Text
    steps: int
    seed: int
    param_dtype: str = field(default="float32", kw_only=True)

    def initial_params(self) -> Any:
        """The parameters that every run starts from."""
        tokens = jnp.zeros((1, self.model.config.context), jnp.int32)
        params = jax.jit(self.model.init)(jax.random.key(self.seed), tokens)["params"]
        return optax.tree.cast(params, self.param_dtype)

    def batch(self, step: int) -> np.ndarray:
        """The data of one step; see `training_batch`."""
        return training_batch(
            self.text.train,
            seed=self.seed,
            step=step,
            batch=BATCH,
            context=self.model.config.context,
        )


class Trainer:
    """Trains a model with one optimizer after the other."""

    def __init__(
        self, task: Task, interruption: Interruption, console: Console
    ) -> None:
        self.task = task
        self.interruption = interruption
        self.console = console
        model = task.model
        self._loss = partial(loss_in_float32, model)
        self._validation_loss = jax.jit(self._loss)
        self._validation_batches = validation_batches(
            task.text.validation,
            batches=VALIDATION_BATCHES,
            batch=BATCH,
            context=model.config.context,
        )

    def train(
        self, name: str, recipe: Recipe, checkpoints: Checkpoints | None = None
    ) -> Run:
        """Trains with one optimizer, from the start or from its checkpoint."""
        task = self.task
        run = Run(name, run_settings(task, recipe))
        state = TrainState.create(
            apply_fn=task.model.apply,
            params=task.initial_params(),
            tx=build_optimizer(recipe, task.steps),
        )
        if checkpoints is not None:
            state, run = checkpoints.restore(state, run)
        if not run.is_finished:
            state = self._take_steps(state, run, checkpoints)
            if run.step == task.steps:
                run.sample = self._sample(state.params)
            if checkpoints is not None:
                checkpoints.save(state, run)
        return run

    def _take_steps(
        self, state: TrainState, run: Run, checkpoints: Checkpoints | None
    ) -> TrainState:
        """Takes the steps that are left, or as many as the user has patience for."""
        steps = self.task.steps
        validate_at = milestones(steps, min(VALIDATIONS, max(5, steps // 10)))
        # The last one is saved by `train`, with the sample.
        save_at = milestones(steps, CHECKPOINTS) - {steps}
        # The step is counted on the device, so that a new count compiles nothing.
        state = state.replace(step=jnp.int32(run.step))
        if run.step < steps:
            with self.console.status(f"{run.optimizer}: compiling the training step"):
                train_step = self._compile(state, run)
        if not run.validation:
            self._validate(state, run)
        with live_progress(run, steps, "tokens/s", self.console) as report:
            while run.step < steps and not self.interruption.requested:
                start = time.perf_counter()
                state, loss = train_step(state, self.task.batch(run.step))
                run.train.append([run.step + 1, float(loss)])
                run.seconds += time.perf_counter() - start
                report(run.tokens_per_second)
                if run.step in validate_at:
                    self._validate(state, run)
                if run.step in save_at and checkpoints is not None:
                    checkpoints.save(state, run)
        return state

    def _compile(self, state: TrainState, run: Run) -> Callable[..., Any]:
        """Compiles the training step before the clock of the run starts."""
        start = time.perf_counter()
        windows = self.task.batch(0)
        # The old state is donated: the new one takes its memory.
        jitted = jax.jit(self._train_step, donate_argnums=0)
        compiled = jitted.lower(state, windows).compile()
        # The first call is slow; it is made with a copy, because of the donation.
        jax.block_until_ready(compiled(jax.tree.map(jnp.copy, state), windows))
        run.compile_seconds += time.perf_counter() - start
        return compiled

    def _train_step(self, state: TrainState, windows: jax.Array) -> tuple[Any, Any]:
        """Takes one step; gives back the new state and the loss before it."""
        # Gradients have the dtype of what is differentiated.
        weights = optax.tree.cast(state.params, "float32")
        loss, grads = jax.value_and_grad(self._loss)(weights, windows)
        return state.apply_gradients(grads=grads), loss

    def _validate(self, state: TrainState, run: Run) -> None:
        """Measures the validation loss and prints a line."""
        losses = [
            float(self._validation_loss(state.params, windows))
            for windows in self._validation_batches
        ]
        run.validation.append([run.step, float(np.mean(losses))])
        run.validation_seconds.append(run.seconds)
        self.console.print(
            f"{run.optimizer:>10}  step {run.step:>5}/{self.task.steps}"
            f"  validation loss {run.validation[-1][1]:.4f}"
            f"  {run.tokens_per_second:>7,.0f} tokens/s  {run.seconds:>6.1f} s",
            highlight=False,
        )

    def _sample(self, params: Any) -> str:
        """Lets the model write some code."""
        tokens = generate(
            self.task.model,
            optax.tree.cast(params, "float32"),
            jnp.asarray(list(SAMPLE_PROMPT.encode())),
            jax.random.key(self.task.seed),
            length=SAMPLE_LENGTH,
        )
        text = bytes(np.asarray(tokens, np.uint8)).decode("ascii", errors="replace")
        return "".join(c if c in string.printable else "?" for c in text)


def loss_in_float32(model: GPT, params: Any, windows: jax.Array) -> jax.Array:
    """Computes the loss of parameters of any dtype in float32."""
    return next_token_loss(model, optax.tree.cast(params, "float32"), windows)


def build_optimizer(recipe: Recipe, steps: int) -> optax.GradientTransformation:
    """Builds an optimizer with the schedule that all of them share."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=recipe.learning_rate / (warmup + 1),
        peak_value=recipe.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
    )
    return recipe.build(schedule)


def run_settings(task: Task, recipe: Recipe) -> dict[str, Any]:
    """Everything that has to stay the same when a run is resumed."""
    return {
        "steps": task.steps,
        "seed": task.seed,
        "width": task.model.config.width,
        "depth": task.model.config.depth,
        "context": task.model.config.context,
        "batch": BATCH,
        "learning_rate": recipe.learning_rate,
        "param_dtype": task.param_dtype,
        "text": task.text.digest,
    }


def milestones(steps: int, count: int) -> frozenset[int]:
    """At most `count` steps, equally spaced up to the last one."""
    return frozenset(round(steps * (i + 1) / count) for i in range(count)) - {0}


def print_tables(task: Task, names: Sequence[str], console: Console) -> None:
    """Prints who updates which parameter, and what the optimizers remember."""
    params = jax.eval_shape(task.initial_params)
    print(ox.explain_routing(params))
    for name in names:
        console.rule(f"memory of {name}", align="left")
        print(ox.memory_report(build_optimizer(RECIPES[name], task.steps), params))
    console.print(
        f"\n{len(task.text.train):,} bytes of Python from {task.text.files} files for "
        f"training, {len(task.text.validation):,} for validation; "
        f"{task.steps} steps of {BATCH * CONTEXT:,} tokens",
        highlight=False,
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps",
        type=step_count,
        default=STEPS,
        metavar="N",
        help=f"steps of each optimizer, or 'small' for {SMALL_STEPS} "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--optimizers",
        nargs="+",
        choices=RECIPES,
        default=["adamw", "muon"],
        metavar="NAME",
        help=f"which to compare, of {', '.join(RECIPES)} (default: adamw muon)",
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--width",
        type=positive,
        default=WIDTH,
        help=f"width of the model, a multiple of {HEAD_SIZE} (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/train_gpt"),
        help="directory for everything that is written; without --resume, checkpoints "
        "of an earlier run in it are removed (default: %(default)s)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the checkpoints in --out"
    )
    parsed = parser.parse_args(arguments)
    parsed.optimizers = list(dict.fromkeys(parsed.optimizers))
    if parsed.width % HEAD_SIZE:
        parser.error(f"--width must be a multiple of {HEAD_SIZE}, got {parsed.width}")
    if parsed.seed < 0:
        parser.error(f"--seed must not be negative, got {parsed.seed}")
    if parsed.resume and not (parsed.out / "checkpoints").is_dir():
        parser.error(f"--resume: there are no checkpoints in {parsed.out}")
    return parsed


def positive(text: str) -> int:
    """Reads a positive integer from the command line."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def step_count(text: str) -> int:
    """Reads a number of steps, or `small`, from the command line."""
    return SMALL_STEPS if text == "small" else positive(text)


def resume_command(arguments: argparse.Namespace) -> str:
    """The command line that continues this run."""
    words = ["python", sys.argv[0], "--steps", arguments.steps]
    words += ["--optimizers", *arguments.optimizers]
    words += ["--seed", arguments.seed, "--width", arguments.width]
    words += ["--out", arguments.out, "--resume"]
    return shlex.join(map(str, words))


def compare(
    task: Task, options: argparse.Namespace, console: Console
) -> tuple[dict[str, Run], bool]:
    """Trains with every optimizer; returns the runs and whether Ctrl-C ended them."""
    runs: dict[str, Run] = {}
    with Interruption() as interruption:
        print_tables(task, options.optimizers, console)
        trainer = Trainer(task, interruption, console)
        for name in options.optimizers:
            if interruption.requested:
                break
            checkpoints = Checkpoints(options.out / "checkpoints" / name)
            runs[name] = trainer.train(name, RECIPES[name], checkpoints)
        if runs:
            document = results(runs, options)
            (options.out / "results.json").write_text(json.dumps(document) + "\n")
            plot(runs, options.out / "train_gpt.png")
    return runs, interruption.requested


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison; returns the exit status."""
    options = parse_arguments(arguments)
    console = Console()
    if not options.resume:
        shutil.rmtree(options.out / "checkpoints", ignore_errors=True)
    options.out.mkdir(parents=True, exist_ok=True)
    config = GPTConfig(
        width=options.width, depth=DEPTH, head_size=HEAD_SIZE, context=CONTEXT
    )
    task = Task(GPT(config), standard_library(), options.steps, options.seed)
    try:
        runs, interrupted = compare(task, options, console)
    except ResumeError as error:
        print(error, file=sys.stderr)
        return 2
    if runs:
        print_results(runs, console)
        print(f"\nWritten to {options.out}: results.json, train_gpt.png, checkpoints/")
    if interrupted and runs:
        print(f"Interrupted. To go on from here:\n  {resume_command(options)}")
    elif interrupted:
        print("Interrupted before anything was measured.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
