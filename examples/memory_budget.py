"""Which optimizers, kept how, fit into the memory of a device?

Given a model, the memory of a device and a mesh of them: every optimizer of a short
list with every way to keep weights, gradients and state, as far as they fit, the best
fit first. Nothing is allocated, so a model of 70 billion parameters takes seconds.

    python examples/memory_budget.py --model llama-7b --memory 24 --mesh fsdp=4
    python examples/memory_budget.py --model llama-70b --memory 80 --mesh fsdp=16
    python examples/memory_budget.py --model gpt --memory 0.5 --mesh fsdp=1

`gpt` is the Flax model of the other examples, with a width of 1024; to ask about one of
your own, give its parameters to `candidates`.

The best fit is that which gives up least. Optimizers come first, in the order in which
they did in the main job (README, "In fewer bits" and "Muon and its relatives"), then
those with little state: muon, adamw, lion, adafactor, sgd with momentum. How things are
kept comes second, the most exact first, from float32 to weights in 24 bits (bfloat16
and 8 bits beside) with state in 8 bits: in the main job this changes the loss by less
than another seed does, a change of optimizer by more. What saves less than a hundredth
over a more exact way is left out, and so is float32 masters beside bfloat16 weights,
two bytes more than float32 alone, whose use is speed. Fine-tuning by LoRA, another job,
stands last.

What is left on a device is for activations and the compiler; `--reserve` sets some of
it aside. Parameters are cut along `fsdp` and `tensor` as
`optaxplus.report.layout.lay_out` says.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from gpt import GPT, GPTConfig

import optaxplus as ox
from optaxplus.report.layout import mesh_sizes
from optaxplus.report.models import MODELS
from optaxplus.report.recipes import Recipe
from optaxplus.report.tables import format_bytes, print_table

OPTIMIZERS = ("muon", "adamw", "lion", "adafactor", "sgd(momentum=0.9)")
STORAGE: Mapping[str, Mapping[str, Any]] = {
    "float32": {},
    "24-bit weights, float32 gradients": {
        "weights": "bfloat16",
        "grads": "float32",
        "master": "24bit",
    },
    "24-bit weights": {"weights": "bfloat16", "master": "24bit"},
    "24-bit weights, 8-bit state": {
        "weights": "bfloat16",
        "master": "24bit",
        "state": "8bit",
    },
}
LORA = {"LoRA of rank 16, bfloat16": {"weights": "bfloat16", "lora": 16}}
LORA_OPTIMIZERS = ("adamw",)


@dataclass(frozen=True)
class Candidate:
    """An optimizer, how it is kept, and what that takes on a device."""

    recipe: Recipe
    storage: str
    report: ox.MemoryReport

    @property
    def on_device(self) -> int:
        """Bytes of parameters, gradients and state on each device."""
        assert self.report.per_device is not None
        return self.report.per_device["total"]


def candidates(model: Any, mesh: Mapping[str, int]) -> list[Candidate]:
    """What there is to choose from, in order of preference.

    Args:
        model: Name of a published model, or the parameters of one's own: arrays or
            what `jax.eval_shape(model.init, ...)` returns.
        mesh: Sizes of the axes of a mesh.
    """
    found = []
    for optimizers, ways in ((OPTIMIZERS, STORAGE), (LORA_OPTIMIZERS, LORA)):
        for optimizer in optimizers:
            least = math.inf
            for storage, formats in ways.items():
                recipe = Recipe(optimizer, **formats)
                candidate = Candidate(recipe, storage, recipe.report(model, mesh))
                if candidate.on_device < 0.99 * least:
                    found.append(candidate)
                    least = candidate.on_device
    return found


def flax_gpt() -> Any:
    """The parameters of a Flax model as shapes."""
    config = GPTConfig(width=1024)
    tokens = jnp.zeros((1, config.context), jnp.int32)
    return jax.eval_shape(GPT(config).init, jax.random.key(0), tokens)["params"]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default="llama-7b",
        choices=("gpt", *MODELS),
        help="a published model, or gpt, the Flax model of the examples",
    )
    parser.add_argument(
        "--memory", type=gigabytes, default=24.0, help="of a device, in GB of 1e9 bytes"
    )
    parser.add_argument(
        "--reserve",
        type=gigabytes,
        default=0.0,
        help="GB of it to leave for activations",
    )
    parser.add_argument(
        "--mesh", type=mesh, default="fsdp=4", help="as fsdp=8,tensor=4"
    )
    options = parser.parse_args(arguments)
    if options.reserve >= options.memory:
        parser.error(
            f"--reserve {options.reserve:g} leaves nothing of --memory "
            f"{options.memory:g}"
        )
    return options


def gigabytes(text: str) -> float:
    """Reads an amount of memory from the command line."""
    try:
        amount = float(text)
    except ValueError:
        amount = -1.0
    if not 0 <= amount < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of GB >= 0; got {text!r}")
    return amount


def mesh(text: str) -> dict[str, int]:
    """Reads a mesh from the command line."""
    try:
        return mesh_sizes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what fits; returns 1 if nothing does."""
    options = parse_arguments(arguments)
    model = flax_gpt() if options.model == "gpt" else options.model
    budget = 1e9 * (options.memory - options.reserve)
    choices = candidates(model, options.mesh)
    fitting = [choice for choice in choices if choice.on_device <= budget]
    sizes = ",".join(f"{axis}={size}" for axis, size in options.mesh.items())
    print(
        f"{options.model}, {choices[0].report.num_params:,} parameters, on {sizes}: "
        f"{len(fitting)} of {len(choices)} fit into {format_bytes(budget)} a device"
        f"{', the one that gives up least first' if fitting else ''}"
    )
    if not fitting:
        least = min(choices, key=lambda choice: choice.on_device)
        print(
            f"The smallest is {least.recipe.optimizer}, {least.storage}: "
            f"{format_bytes(least.on_device)} on each device."
        )
        return 1
    print_table(
        ("optimizer", "weights and state", "on a device", "left"),
        [
            (
                choice.recipe.optimizer,
                choice.storage,
                format_bytes(choice.on_device),
                format_bytes(budget - choice.on_device),
            )
            for choice in fitting
        ],
        right=(2, 3),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
