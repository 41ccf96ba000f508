"""LoRA with Muon: a GPT that knows Python's source is adapted to Python's manual.

A byte-level GPT learns the source code of the Python standard library. The same model
is then adapted to another text, the manual that Python's `help()` shows, in three ways:
by low-rank factors A and B beside its frozen hidden matrices, with Muon on B and AdamW
on A (`ox.muon(rules=ox.LORA_RULES)`) or with AdamW on both, and by AdamW on everything.
The loss on the new text says what was learned, the loss on the old one what was
forgotten.

    python examples/finetune_lora.py                  # under three minutes on two cores
    python examples/finetune_lora.py --steps small    # under a minute
    python examples/finetune_lora.py --methods lora-muon --learning-rates 0.005 0.01

Written to `--out`: `results.json` (every number) and `finetune_lora.png` (the curves).
Ctrl-C stops after the current step and keeps what was measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import train_gpt
from comparison import LOSS_LABEL, device, empty_table, print_best_sample, versions
from flax.training.train_state import TrainState
from gpt import GPT, GPTConfig, generate, next_token_loss
from lora import base_params, factor_params, init_lora, is_identical, merge_lora
from matplotlib.figure import Figure
from rich.console import Console
from text import Text, python_manual, standard_library, validation_batches
from train_gpt import Recipe, Task, Trainer, adamw, build_optimizer, positive
from training_run import Checkpoints, Interruption, Run

import optaxplus as ox
from optaxplus.report.plots import loss_curves

# The size of the job: what two cores can do in the time.
STEPS = 300
SMALL_STEPS = 40
# Steps of the base for one step of an adaptation.
BASE_STEPS = 2
RANK = 8
ALPHA = 16.0
# Each of both texts.
VALIDATION_BATCHES = 8
SAMPLE_PROMPT = 'The "match" statement is used for '
SAMPLE_LENGTH = 300


@dataclass(frozen=True)
class Method(Recipe):
    """A way to adapt the base, with the learning rate at which it does best here.

    Attributes:
        has_factors: Whether low-rank factors are trained and all else is frozen.
    """

    has_factors: bool = True


def lora_adamw(
    learning_rate: optax.Schedule, **arguments: Any
) -> optax.GradientTransformation:
    """AdamW for both factors; what is frozen in `ox.LORA_RULES` is frozen here too."""
    labels = partial(ox.label_params, rules=ox.LORA_RULES, labels={"hidden": "adamw"})
    groups: dict[Hashable, optax.GradientTransformation] = {
        "adamw": adamw(learning_rate, **arguments),
        "frozen": optax.set_to_zero(),
    }
    return optax.partition(groups, labels)


# The learning rates with the lowest last loss on the new text, seed 0, default size:
#     rate        0.0005  0.001  0.002  0.0025  0.004  0.005  0.007   0.01   0.02
#     lora-muon                         1.7408         1.7147 1.7043 1.7132 1.8072
#     lora-adamw                        1.7365         1.7132 1.7046 1.7032 1.8470
#     full-adamw  1.6529 1.6219 1.6127         1.6387
# With seed 1, at 0.005 and 0.01: lora-muon 1.7011 and 1.6905, lora-adamw 1.6950 and
# 1.6842. Muon on B is no better here; it has three quarters of the state.
# `--learning-rates` repeats these trials.
ALIKE = {"clip_norm": 1.0, "weight_decay": 0.0}
METHODS = {
    "lora-muon": Method(
        7e-3, partial(ox.muon, rules=ox.LORA_RULES, adamw_b2=0.99, **ALIKE)
    ),
    "lora-adamw": Method(1e-2, partial(lora_adamw, b2=0.99, **ALIKE)),
    "full-adamw": Method(2e-3, partial(adamw, b2=0.99, **ALIKE), has_factors=False),
}


@dataclass(frozen=True)
class Adaptation(Task):
    """A task that starts from trained parameters, with factors beside them or without.

    Attributes:
        base: The trained parameters.
        has_factors: Whether factors stand beside them.
    """

    base: Any
    has_factors: bool

    def initial_params(self) -> Any:
        """The parameters that the adaptation starts from, in memory of their own."""
        return self.start_from(jax.tree.map(jnp.copy, self.base))

    def start_from(self, params: Any) -> Any:
        """Puts factors beside parameters, if this is what the method trains."""
        if not self.has_factors:
            return params
        return init_lora(params, RANK, jax.random.key(self.seed))


@partial(jax.jit, static_argnames="model")
def adapted_loss(model: GPT, params: Any, windows: jax.Array) -> jax.Array:
    """The loss of a model with whatever factors stand beside its parameters.

    Factors and base are differentiated alike: the optimizer answers the gradients of
    frozen parameters with zeros, so XLA computes neither.
    """
    return next_token_loss(model, merge_lora(params, ALPHA), windows)


class TwoTextTrainer(Trainer):
    """Trains on one text and validates on another one as well.

    Attributes:
        params: The parameters that the run ended with.
        other_validation: [step, loss] on the other text, as in `Run.validation`.
    """

    def __init__(
        self, task: Task, other: Text, interruption: Interruption, console: Console
    ) -> None:
        super().__init__(task, interruption, console)
        self.params: Any = None
        self.other_validation: list[list[float]] = []
        self._loss = partial(adapted_loss, task.model)
        self._validation_loss = self._loss
        self._validation_batches, self._other_batches = (
            validation_batches(
                text.validation,
                batches=VALIDATION_BATCHES,
                batch=train_gpt.BATCH,
                context=task.model.config.context,
            )
            for text in (task.text, other)
        )

    def _take_steps(
        self, state: TrainState, run: Run, checkpoints: Checkpoints | None
    ) -> TrainState:
        """Keeps the parameters of the last state."""
        state = super()._take_steps(state, run, checkpoints)
        self.params = state.params
        return state

    def _validate(self, state: TrainState, run: Run) -> None:
        """Measures the loss on the other text, too."""
        super()._validate(state, run)
        losses = [
            float(self._validation_loss(state.params, windows))
            for windows in self._other_batches
        ]
        self.other_validation.append([run.step, float(np.mean(losses))])

    def _sample(self, params: Any) -> str:
        """Lets the model write about Python."""
        tokens = generate(
            self.task.model,
            merge_lora(params, ALPHA),
            jnp.asarray(list(SAMPLE_PROMPT.encode())),
            jax.random.key(self.task.seed),
            length=SAMPLE_LENGTH,
        )
        text = bytes(np.asarray(tokens, np.uint8)).decode(errors="replace")
        return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


@dataclass
class Outcome:
    """What was measured of one adaptation, or of the training of the base.

    Attributes:
        run: The run; its `validation` is on the text that was trained on.
        other_validation: [step, loss] on the other one of the two texts.
        trained_parameters: Number of scalar parameters that the optimizer changes.
        state_bytes: Bytes of the optimizer's state.
        is_base_unchanged: Whether the frozen parameters are, to the last bit, what they
            were; None if nothing is frozen.
    """

    run: Run
    other_validation: list[list[float]]
    trained_parameters: int
    state_bytes: int
    is_base_unchanged: bool | None = None


def count(params: Any) -> int:
    """Number of scalars in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


class Job:
    """Trains the base and adapts it, with what all runs have in common."""

    def __init__(
        self, options: argparse.Namespace, interruption: Interruption, console: Console
    ) -> None:
        self.options = options
        self.interruption = interruption
        self.console = console
        config = GPTConfig(
            width=options.width,
            depth=train_gpt.DEPTH,
            head_size=train_gpt.HEAD_SIZE,
            context=train_gpt.CONTEXT,
        )
        self.old, self.new = standard_library(), python_manual()
        steps = BASE_STEPS * options.steps
        self.base_task = Task(GPT(config), self.old, steps, options.seed)
        self.base: Any = None

    def train_base(self) -> Outcome:
        """Trains the base on the old text, with the Muon of the main example."""
        recipe = train_gpt.RECIPES["muon"]
        trainer, outcome = self._train("base", recipe, self.base_task, self.new)
        self.base = trainer.params
        return outcome

    def adapt(self, name: str, method: Method) -> Outcome:
        """Adapts the base to the new text."""
        task = self.task(method, self.base)
        trainer, outcome = self._train(name, method, task, self.old)
        if method.has_factors:
            outcome.is_base_unchanged = is_identical(
                base_params(trainer.params), self.base
            )
            verdict = "unchanged" if outcome.is_base_unchanged else "CHANGED"
            self.console.print(
                f"{name:>10}  bits of the frozen parameters: {verdict}", highlight=False
            )
        return outcome

    def task(self, method: Method, base: Any) -> Adaptation:
        """What a method is given to do."""
        return Adaptation(
            model=self.base_task.model,
            text=self.new,
            steps=self.options.steps,
            seed=self.options.seed,
            base=base,
            has_factors=method.has_factors,
        )

    def _train(
        self, name: str, recipe: Recipe, task: Task, other: Text
    ) -> tuple[TwoTextTrainer, Outcome]:
        trainer = TwoTextTrainer(task, other, self.interruption, self.console)
        run = trainer.train(name, recipe)
        trained = factor_params(trainer.params) or trainer.params
        memory = ox.memory_report(build_optimizer(recipe, task.steps), trainer.params)
        outcome = Outcome(run, trainer.other_validation, count(trained), memory.state)
        return trainer, outcome

    def print_tables(self, methods: dict[str, Method]) -> None:
        """Prints what is done, who updates what, and what optimizers remember."""
        base = jax.eval_shape(self.base_task.initial_params)

        def params_of(method: Method) -> Any:
            return jax.eval_shape(self.task(method, base).start_from, base)

        tokens = train_gpt.BATCH * train_gpt.CONTEXT
        self.console.print(
            f"A GPT of {count(base):,} parameters learns {len(self.old.train):,} bytes "
            f"of Python source in {self.base_task.steps} steps of {tokens:,} tokens, "
            f"then {len(self.new.train):,} bytes of Python's manual in "
            f"{self.options.steps} steps of each method: {', '.join(methods)}. "
            f"Factors have rank {RANK}.\n",
            highlight=False,
        )
        print(ox.explain_routing(params_of(METHODS["lora-muon"]), ox.LORA_RULES))
        for name, method in methods.items():
            tx = build_optimizer(method, self.options.steps)
            report = ox.memory_report(tx, params_of(method))
            self.console.rule(f"memory of {name}", align="left")
            print(report)
            labels = ", ".join(f"{k} {v:,}" for k, v in report.by_label.items())
            print(f"bytes of state by label: {labels}")
        print()


def results(
    base: Outcome, outcomes: dict[str, Outcome], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Collects everything measured, in the form of `results.json`.

    `validation` is on the text that was trained on, `other_validation` on the other:
    of `base` the source and the manual, of `runs` the manual and the source.
    """

    def entry(outcome: Outcome) -> dict[str, Any]:
        values = asdict(outcome)
        speed = {"tokens_per_second": outcome.run.tokens_per_second}
        return values.pop("run") | speed | values

    return {
        "base": entry(base),
        "runs": {name: entry(outcome) for name, outcome in outcomes.items()},
        "rank": RANK,
        "alpha": ALPHA,
        "device": device(),
        "versions": versions(),
        "seed": arguments.seed,
        "date": datetime.date.today().isoformat(),
        "arguments": vars(arguments) | {"out": str(arguments.out)},
    }


def plot(outcomes: dict[str, Outcome], path: Path) -> None:
    """Draws what is learned of the new text and what is forgotten of the old one."""
    new, old, steps = {}, {}, {}
    for name, outcome in outcomes.items():
        label = f"{name}: {outcome.trained_parameters:,} parameters"
        steps[label], new[label] = zip(*outcome.run.validation, strict=True)
        _, old[label] = zip(*outcome.other_validation, strict=True)
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set_title("new text: Python's manual")
    right.set_title("old text: Python's source")
    loss_curves(new, steps, ylabel=LOSS_LABEL, ax=left)
    loss_curves(old, steps, ylabel=LOSS_LABEL, legend=False, ax=right, path=path)


def print_results(outcomes: dict[str, Outcome], console: Console) -> None:
    """Prints the table of results and a sample from the best model."""
    table = empty_table(
        "Results; validation losses in nats per byte",
        "method",
        "learning\nrate",
        "new text\nbefore",
        "\nafter",
        "old text\nbefore",
        "\nafter",
        "trained\nparams",
        "bytes\nof state",
        "\nseconds",
    )
    for name, outcome in outcomes.items():
        new, old = outcome.run.validation, outcome.other_validation
        table.add_row(
            name,
            f"{outcome.run.settings['learning_rate']:g}",
            *(f"{curve[at][1]:.4f}" for curve in (new, old) for at in (0, -1)),
            f"{outcome.trained_parameters:,}",
            f"{outcome.state_bytes:,}",
            f"{outcome.run.seconds:.0f}",
        )
    console.print(table)
    runs = (outcome.run for outcome in outcomes.values())
    print_best_sample(runs, "written", console)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--steps",
        type=lambda text: SMALL_STEPS if text == "small" else positive(text),
        default=STEPS,
        metavar="N",
        help=f"steps of each adaptation, or 'small' for {SMALL_STEPS}; the base is "
        f"trained for {BASE_STEPS} times as many (default: %(default)s)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="NAME",
        help=f"which to compare, of {', '.join(METHODS)} (default: all)",
    )
    parser.add_argument(
        "--learning-rates",
        nargs="+",
        type=float,
        metavar="RATE",
        help="try each of these with each method (default: the best one of each)",
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
        default=Path("runs/finetune_lora"),
        help="directory for everything that is written (default: %(default)s)",
    )
    parsed = parser.parse_args(arguments)
    parsed.methods = list(dict.fromkeys(parsed.methods))
    if parsed.width % train_gpt.HEAD_SIZE:
        parser.error(
            f"--width must be a multiple of {train_gpt.HEAD_SIZE}, got {parsed.width}"
        )
    if parsed.seed < 0:
        parser.error(f"--seed must not be negative, got {parsed.seed}")
    return parsed


def methods_to_compare(options: argparse.Namespace) -> dict[str, Method]:
    """The methods that were asked for, by the names of their runs."""
    methods = {name: METHODS[name] for name in options.methods}
    if not options.learning_rates:
        return methods
    return {
        f"{name} {rate:g}": replace(method, learning_rate=rate)
        for name, method in methods.items()
        for rate in options.learning_rates
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains the base and adapts it; returns the exit status."""
    options = parse_arguments(arguments)
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    methods = methods_to_compare(options)
    outcomes: dict[str, Outcome] = {}
    with Interruption() as interruption:
        job = Job(options, interruption, console)
        job.print_tables(methods)
        base = job.train_base()
        for name, method in methods.items():
            if interruption.requested:
                break
            outcomes[name] = job.adapt(name, method)
    if outcomes:
        document = results(base, outcomes, options)
        (options.out / "results.json").write_text(json.dumps(document) + "\n")
        plot(outcomes, options.out / "finetune_lora.png")
        print_results(outcomes, console)
        print(f"\nWritten to {options.out}: results.json, finetune_lora.png")
    if interruption.requested:
        print(
            "Interrupted." if outcomes else "Interrupted before anything was measured."
        )
    return 1 if any(o.is_base_unchanged is False for o in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
