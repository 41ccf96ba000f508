"""Does a model train as well with its state in 8 bits and its weights in bfloat16?

The job of `examples/train_gpt.py` with the learning rates found there, once with
everything in float32 and once with each way of keeping state and weights in fewer bits.
Weights are computed with in float32 whatever they are kept in, so that only storage
differs. Lion alone stays at a loss of 2.6 in this job: it gets the hidden matrices, and
AdamW, with its own learning rate, the rest. Reported are the last validation loss and
its difference from the float32 run of the same optimizer and seed, and the measured
bytes of weights and optimizer state.

    python benchmarks/train_gpt_storage.py
    python benchmarks/train_gpt_storage.py --runs "adamw" "adamw, 8-bit state" --seeds 1

Each run is written to `--out` when it ends, and runs that are there are skipped: the
script can be stopped and started again at any time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import optaxplus as ox
from optaxplus.numerics import quantization

# A script's own folder, also where the tests load it by its path.
sys.path.insert(0, str(Path(__file__).resolve().parent))
import train_gpt_learning_rates as sweep
from train_gpt_learning_rates import train_gpt

RESULTS = Path(__file__).parent / "results" / "train_gpt_storage.json"
FOUR_BITS = "root, 4 bits"

Wrapper = Callable[[optax.GradientTransformation], optax.GradientTransformation]


def in_8_bits(
    tx: optax.GradientTransformation, **arguments: Any
) -> optax.GradientTransformation:
    """The optimizer with its moments in codes."""
    return ox.quantize_state(tx, **arguments)


def in_4_bits(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer with moments of as many values as 4 bits tell apart.

    Blocks of 128, as in torchao. The codes still take a byte: this is about accuracy.
    """
    quantization.CODES[FOUR_BITS] = quantization.root_code(sizes=7, unsigned_sizes=15)
    return ox.quantize_state(tx, code=FOUR_BITS, block_size=128)


@dataclass(frozen=True)
class Storage:
    """One way of keeping state and weights.

    Attributes:
        optimizer: Name in `RECIPES`.
        wrap: What is put around it.
        param_dtype: Dtype of the weights.
    """

    optimizer: str
    wrap: Wrapper | None = None
    param_dtype: str = "float32"


def split_in_8_bits(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """24-bit weights and 8-bit moments."""
    return ox.master_weights(ox.quantize_state(tx), bits=24)


def lion_and_adamw(learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """Lion for hidden matrices, AdamW for the rest, with clipping as for the others."""

    def for_others(count: Any) -> Any:
        adamw_rate = train_gpt.RECIPES["adamw"].learning_rate
        return learning_rate(count) * (adamw_rate / LION_RATE)

    return optax.chain(
        ox.clip_by_global_norm(1.0),
        optax.partition(
            {
                "hidden": ox.lion(learning_rate, weight_decay=1.0),
                "others": ox.adamw(for_others, b2=0.95, weight_decay=0.1),
            },
            lambda params: jax.tree.map(
                lambda role: "hidden" if role == "hidden" else "others",
                ox.infer_roles(params),
            ),
        ),
    )


# The best of eight trials, with rates from 5e-5 to 1e-3.
LION_RATE = 2e-4
RECIPES = {
    "adamw": train_gpt.RECIPES["adamw"],
    "lion": train_gpt.Recipe(LION_RATE, lion_and_adamw),
    "muon": train_gpt.RECIPES["muon"],
}
RUNS = {
    "adamw": Storage("adamw"),
    "adamw, 8-bit state": Storage("adamw", in_8_bits),
    "adamw, 8-bit state, dynamic code": Storage(
        "adamw", partial(in_8_bits, code="dynamic")
    ),
    "adamw, 4-bit state": Storage("adamw", in_4_bits),
    "lion": Storage("lion"),
    "lion, 8-bit state": Storage("lion", in_8_bits),
    "muon": Storage("muon"),
    "muon, 8-bit state": Storage("muon", in_8_bits),
    "adamw, bfloat16 weights": Storage("adamw", None, "bfloat16"),
    "adamw, bfloat16, master 32": Storage("adamw", ox.master_weights, "bfloat16"),
    "adamw, bfloat16, master 24": Storage(
        "adamw", partial(ox.master_weights, bits=24), "bfloat16"
    ),
    "adamw, bfloat16, stochastic rounding": Storage(
        "adamw", ox.stochastic_rounding, "bfloat16"
    ),
    "adamw, bfloat16, compensated": Storage("adamw", ox.compensated, "bfloat16"),
    "adamw, bfloat16, master 24, 8-bit state": Storage(
        "adamw", split_in_8_bits, "bfloat16"
    ),
    "muon, bfloat16, master 24, 8-bit state": Storage(
        "muon", split_in_8_bits, "bfloat16"
    ),
}


def recipe_of(storage: Storage) -> train_gpt.Recipe:
    """The optimizer, as it is tuned for float32."""
    recipe = RECIPES[storage.optimizer]
    if storage.wrap is None:
        return recipe
    wrap, build = storage.wrap, recipe.build
    return train_gpt.Recipe(recipe.learning_rate, lambda rate: wrap(build(rate)))


def train(label: str, trainer: train_gpt.Trainer) -> dict[str, Any]:
    """Trains once."""
    storage, task = RUNS[label], trainer.task
    recipe = recipe_of(storage)
    run = trainer.train(label, recipe)
    params = task.initial_params()
    state = recipe.build(optax.constant_schedule(0.0)).init(params)
    return {
        "storage": label,
        "optimizer": storage.optimizer,
        "learning_rate": recipe.learning_rate,
        "param_dtype": storage.param_dtype,
        "steps": task.steps,
        "seed": task.seed,
        "validation": run.validation,
        "seconds": run.seconds,
        "num_params": optax.tree.size(params),
        "weight_bytes": _bytes(params),
        "state_bytes": _bytes(state),
    }


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Losses of each storage over the seeds, beside those of float32."""
    wide = {
        (run["storage"], run["seed"]): run["validation"][-1][1]
        for run in runs
        if run["storage"] == run["optimizer"]
    }
    lines = []
    for label in RUNS:
        mine = [run for run in runs if run["storage"] == label]
        if not mine:
            continue
        losses = [run["validation"][-1][1] for run in mine]
        # Per cent of the float32 loss with the same seed.
        change = [
            100 * (loss / wide[run["optimizer"], run["seed"]] - 1)
            for run, loss in zip(mine, losses, strict=True)
            if (run["optimizer"], run["seed"]) in wide
        ]
        lines.append(
            {
                "storage": label,
                "seeds": len(mine),
                "loss": [min(losses), float(np.median(losses)), max(losses)],
                "change": [min(change), float(np.median(change)), max(change)]
                if change
                else None,
                "weight_bytes": mine[0]["weight_bytes"] / mine[0]["num_params"],
                "state_bytes": mine[0]["state_bytes"] / mine[0]["num_params"],
            }
        )
    return lines


def table(runs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The summary as text, the header first."""
    rows = [
        [
            "state and weights",
            "validation loss",
            "against float32, same seed",
            "bytes of weights + state",
        ]
    ]
    for line in summary(runs):
        low, middle, high = line["loss"]
        change = line["change"]
        rows.append(
            [
                line["storage"],
                f"{middle:.3f} ({low:.3f} to {high:.3f})",
                "-"
                if change is None or line["storage"] in RECIPES
                else f"{change[1]:+.2f} % ({change[0]:+.2f} to {change[2]:+.2f})",
                f"{line['weight_bytes']:.0f} + {line['state_bytes']:.2f}",
            ]
        )
    return rows


def main() -> int:
    """Trains what is missing, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--runs",
        nargs="+",
        choices=RUNS,
        default=list(RUNS),
        metavar="NAME",
        help=f"of {', '.join(map(repr, RUNS))} (default: all)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=train_gpt.STEPS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    runs = sweep.load(options.out)
    console = Console()
    text = sweep.standard_library()
    with sweep.Interruption() as interruption:
        for seed in options.seeds:
            for label in options.runs:
                wanted = {"storage": label, "steps": options.steps, "seed": seed}
                if any(sweep.is_same(wanted, run) for run in runs):
                    continue
                task = train_gpt.Task(
                    sweep.model(),
                    text,
                    options.steps,
                    seed,
                    param_dtype=RUNS[label].param_dtype,
                )
                trainer = train_gpt.Trainer(task, interruption, Console(quiet=True))
                run = train(label, trainer)
                if interruption.requested:
                    return 1
                runs.append(run)
                sweep.save(runs, options.out)
                console.print(f"{label}, seed {seed}: {run['validation'][-1][1]:.4f}")
    header, *lines = table([run for run in runs if run["steps"] == options.steps])
    printed = Table(*header)
    for line in lines:
        printed.add_row(*line)
    console.print(printed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
