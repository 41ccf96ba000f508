"""Does QK-Clip keep the logits of attention in bounds where Muon lets them grow?

A byte-level GPT learns the source code of the Python standard library with Muon, at a
learning rate far above the best one: once as it is, and once with `ox.qk_clip` after
every step. Both start from the same parameters and see the same data. The largest logit
of every head is recorded in every step of both.

    python examples/qk_clip.py                  # about a minute on two cores
    python examples/qk_clip.py --steps small    # less
    python examples/qk_clip.py --learning-rate 0.03 --threshold 20

At the best rate, 0.004, and up to 0.016 no logit of so small a model reaches the
threshold in so few steps: both runs are the same to the last bit, and their loss is
lower than any here. QK-Clip keeps attention from saturating; it does not make a bad
learning rate good.

Written to `--out`: `results.json` (every number) and `qk_clip.png` (the curves). Ctrl-C
stops after the current step and keeps what was measured.

QK-Clip has to be told the logits. `attention_that_sows` computes attention as Flax does
and sows its largest logits; Flax calls it with the module if `sow_weights=True`. In
linen (see `ClipTrainer._train_step`) the collection is "intermediates". In NNX the type
is `nnx.Intermediate`, and `nnx.capture` collects what was sown:

```python
import jax.numpy as jnp
import optaxplus as ox
from flax import linen, nnx


def attention_that_sows(query, key, value, mask=None, module=None, **_):
    scaled = query / jnp.sqrt(query.shape[-1]).astype(query.dtype)
    logits = jnp.einsum("...qhd,...khd->...hqk", scaled, key)
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf)
    if module is not None:
        largest = jnp.max(logits, axis=(0, -2, -1))
        module.sow(nnx.Intermediate, "max_logits", largest)
    return linen.dot_product_attention(query, key, value, mask=mask)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(
            4, 32, decode=False, attention_fn=attention_that_sows, rngs=rngs
        )

    def __call__(self, x):
        return self.attention(x, sow_weights=True)


@nnx.jit
def train_step(model, optimizer, x):
    loss_fn = nnx.capture(lambda m: jnp.mean((m(x) - x) ** 2), nnx.Intermediate)
    (loss, sown), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads)
    params = nnx.state(model, nnx.Param)
    nnx.update(model, ox.qk_clip(params, sown, threshold=30.0))
    return loss


model = Model(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, ox.muon(0.02), wrt=nnx.Param)
loss = train_step(model, optimizer, jnp.ones((2, 8, 32)))
```
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import train_gpt
from comparison import LOSS_LABEL, device, empty_table, versions
from flax import linen as nn
from flax.training.train_state import TrainState
from gpt import GPT, GPTConfig
from matplotlib.figure import Figure
from rich.console import Console
from text import standard_library
from train_gpt import Recipe, Task, Trainer, positive
from training_run import Interruption, Run

import optaxplus as ox
from optaxplus.report.plots import loss_curves

# The size of the job: what two cores can do in a minute.
STEPS = 150
SMALL_STEPS = 40
# The best rate of Muon for this model is 0.004.
LEARNING_RATE = 0.064
THRESHOLD = 30.0
# How many moments the table of heads shows.
MOMENTS = 6
METHODS = ("muon", "muon-clip")


def attention_that_sows(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    module: nn.Module | None = None,
) -> jax.Array:
    """Flax's attention, which sows the largest logit of every head as "max_logits".

    The logits are those before the softmax, scaled, of all pairs that are not masked.
    XLA sees that they are computed twice and does so once.

    Args:
        query: (batch, time, heads, head size).
        key: The same.
        value: The same.
        mask: (batch, 1, time, time), other than 0 where a query may see a key.
        module: Where to sow; nothing happens unless "intermediates" are asked for.
    """
    scaled = query / jnp.sqrt(query.shape[-1]).astype(query.dtype)
    logits = jnp.einsum("...qhd,...khd->...hqk", scaled, key)
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf)
    if module is not None:
        largest = jnp.max(logits, axis=(0, -2, -1))
        module.sow("intermediates", "max_logits", largest)
    return nn.dot_product_attention(query, key, value, mask=mask)


def loss_and_logits(
    model: GPT, params: Any, windows: jax.Array
) -> tuple[jax.Array, Any]:
    """The loss of the next token, and what the model has sown."""
    logits, sown = model.apply(
        {"params": params}, windows[:, :-1], mutable="intermediates"
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
    return losses.mean(), sown["intermediates"]


class ClipTrainer(Trainer):
    """Records the largest logit of every head, and clips them or does not.

    Attributes:
        threshold: The threshold of QK-Clip; None trains without it.
        max_logits: (layers, heads) for every step, before it.
    """

    def __init__(
        self,
        task: Task,
        threshold: float | None,
        interruption: Interruption,
        console: Console,
    ) -> None:
        super().__init__(task, interruption, console)
        self.threshold = threshold
        self.max_logits: list[np.ndarray] = []

    def _train_step(self, state: TrainState, windows: jax.Array) -> tuple[Any, Any]:
        """Takes one step and clips what it has led to."""
        loss_fn = jax.value_and_grad(
            partial(loss_and_logits, self.task.model), has_aux=True
        )
        (loss, sown), grads = loss_fn(state.params, windows)
        state = state.apply_gradients(grads=grads)
        if self.threshold is not None:
            clipped = ox.qk_clip(state.params, sown, threshold=self.threshold)
            state = state.replace(params=clipped)
        return state, (loss, jnp.stack(jax.tree.leaves(sown)))

    def _compile(self, state: TrainState, run: Run) -> Callable[..., Any]:
        """Compiles a step that keeps the logits and gives back the loss."""
        compiled = super()._compile(state, run)

        def train_step(state: TrainState, windows: jax.Array) -> tuple[TrainState, Any]:
            state, (loss, max_logits) = compiled(state, windows)
            self.max_logits.append(np.asarray(max_logits))
            return state, loss

        return train_step

    def _validate(self, state: TrainState, run: Run) -> None:
        """Says how large the logits were at most since the last time, too."""
        super()._validate(state, run)
        since = run.validation[-2][0] if len(run.validation) > 1 else 0
        recent = self.max_logits[int(since) :]
        if recent:
            self.console.print(
                f"{'':>10}  largest logit {np.max(recent):,.1f}", highlight=False
            )

    def _sample(self, params: Any) -> str:
        """Writes nothing: what matters here are the logits."""
        return ""


def excess(max_logits: np.ndarray, threshold: float) -> float:
    """The largest logit, as a multiple of the threshold."""
    return float(max_logits.max() / threshold)


def results(
    runs: dict[str, Run],
    logits: dict[str, np.ndarray],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Collects everything measured, in the form of `results.json`.

    `max_logits` is (steps, layers, heads): the largest logit of every head in the
    forward pass of every step.
    """
    table = {
        name: {
            "learning_rate": run.settings["learning_rate"],
            "train": run.train,
            "validation": run.validation,
            "seconds": run.seconds,
            "compile_seconds": run.compile_seconds,
            "tokens_per_second": run.tokens_per_second,
            "max_logits": logits[name].round(4).tolist(),
            "largest_logit": float(logits[name].max()),
            "largest_over_threshold": excess(logits[name], arguments.threshold),
        }
        for name, run in runs.items()
    }
    return {
        "runs": table,
        "threshold": arguments.threshold,
        "device": device(),
        "versions": versions(),
        "seed": arguments.seed,
        "date": datetime.date.today().isoformat(),
        "arguments": vars(arguments) | {"out": str(arguments.out)},
    }


def plot(
    runs: dict[str, Run], logits: dict[str, np.ndarray], threshold: float, path: Path
) -> None:
    """Draws the logits of all heads and the losses over steps."""
    heads, losses, largest, steps, moments = {}, {}, {}, {}, {}
    for name, run in runs.items():
        heads[name] = logits[name].reshape(len(logits[name]), -1)
        largest[name] = heads[name].max(axis=1)
        steps[name] = np.arange(1, len(heads[name]) + 1)
        moments[name], losses[name] = zip(*run.validation, strict=True)
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    figure.suptitle(f"Muon at a learning rate of {run.settings['learning_rate']:g}")
    left, right = figure.subplots(1, 2)
    loss_curves(
        largest,
        steps,
        reference={"threshold": threshold},
        log=True,
        ylabel="largest logit (thick: of all heads)",
        ax=left,
    )
    thin = {"linewidth": 0.5, "alpha": 0.5}
    for line, name in zip(left.lines[: len(heads)], heads, strict=True):
        left.plot(steps[name], heads[name], color=line.get_color(), **thin)
    left.autoscale(axis="y")
    # The first losses would squeeze the part that matters.
    loss_curves(losses, moments, crop_start=0.2, ylabel=LOSS_LABEL, ax=right, path=path)


def print_heads(logits: dict[str, np.ndarray], console: Console) -> None:
    """Prints the largest logit of every head at some moments of the training."""
    for name, history in logits.items():
        steps, layers, heads = history.shape
        moments = np.unique(np.linspace(0, steps - 1, MOMENTS).round().astype(int))
        table = empty_table(
            f"Largest logit of every head: {name}",
            "head",
            *(f"step {moment + 1}" for moment in moments),
        )
        for layer in range(layers):
            for head in range(heads):
                values = (f"{history[moment, layer, head]:,.1f}" for moment in moments)
                table.add_row(f"block_{layer} {head}", *values)
        console.print(table)


def print_results(
    runs: dict[str, Run],
    logits: dict[str, np.ndarray],
    threshold: float,
    console: Console,
) -> None:
    """Prints what became of the logits and of the loss."""
    table = empty_table(
        f"Results; the threshold is {threshold:g}, losses are in nats per byte",
        "method",
        "learning\nrate",
        "largest\nlogit",
        "of the\nthreshold",
        "steps\nabove it",
        "final\nloss",
        "best\nloss",
        "\nseconds",
    )
    for name, run in runs.items():
        losses = [loss for _, loss in run.validation]
        above = (logits[name] > threshold).any(axis=(1, 2)).sum()
        table.add_row(
            name,
            f"{run.settings['learning_rate']:g}",
            f"{logits[name].max():,.1f}",
            f"{excess(logits[name], threshold):.2f}",
            f"{above} of {len(logits[name])}",
            f"{losses[-1]:.4f}",
            f"{min(losses):.4f}",
            f"{run.seconds:.0f}",
        )
    console.print(table)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--steps",
        type=lambda text: SMALL_STEPS if text == "small" else positive(text),
        default=STEPS,
        metavar="N",
        help=f"steps of each run, or 'small' for {SMALL_STEPS} (default: %(default)s)",
    )
    parser.add_argument(
        "--learning-rate",
        type=positive_number,
        default=LEARNING_RATE,
        metavar="RATE",
        help="the highest of the schedule (default: %(default)s)",
    )
    parser.add_argument(
        "--threshold",
        type=positive_number,
        default=THRESHOLD,
        help="largest logit that is let through (default: %(default)s)",
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
        default=Path("runs/qk_clip"),
        help="directory for everything that is written (default: %(default)s)",
    )
    parsed = parser.parse_args(arguments)
    if parsed.width % train_gpt.HEAD_SIZE:
        parser.error(
            f"--width must be a multiple of {train_gpt.HEAD_SIZE}, got {parsed.width}"
        )
    if parsed.seed < 0:
        parser.error(f"--seed must not be negative, got {parsed.seed}")
    return parsed


def positive_number(text: str) -> float:
    """Reads a positive number from the command line."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison; returns the exit status."""
    options = parse_arguments(arguments)
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    config = GPTConfig(
        width=options.width,
        depth=train_gpt.DEPTH,
        head_size=train_gpt.HEAD_SIZE,
        context=train_gpt.CONTEXT,
    )
    model = GPT(config, attention_fn=attention_that_sows)
    task = Task(model, standard_library(), options.steps, options.seed)
    # Without weight decay nothing else holds the weights back.
    muon = partial(ox.muon, clip_norm=1.0, adamw_b2=0.99, weight_decay=0.0)
    recipe = Recipe(options.learning_rate, muon)
    runs: dict[str, Run] = {}
    logits: dict[str, np.ndarray] = {}
    with Interruption() as interruption:
        for name in METHODS:
            if interruption.requested:
                break
            threshold = options.threshold if name == "muon-clip" else None
            trainer = ClipTrainer(task, threshold, interruption, console)
            run = trainer.train(name, recipe)
            if trainer.max_logits:
                runs[name], logits[name] = run, np.stack(trainer.max_logits)
    if runs:
        document = results(runs, logits, options)
        (options.out / "results.json").write_text(json.dumps(document) + "\n")
        plot(runs, logits, options.threshold, options.out / "qk_clip.png")
        print_heads(logits, console)
        print_results(runs, logits, options.threshold, console)
        print(f"\nWritten to {options.out}: results.json, qk_clip.png")
    if interruption.requested:
        print("Interrupted." if runs else "Interrupted before anything was measured.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
