"""The tasks of `convergence.py`: a language model, a convolutional and a recurrent net.

All of them classify: bytes of Python source, given those before, or handwritten digits.
All data are on the machine already: the standard library's source and the digits that
scikit-learn ships.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from digits import Batch, split_digits
from gpt import GPT, GPTConfig
from text import Text, standard_library, training_batch, validation_batches


@dataclass(frozen=True)
class Task:
    """What every optimizer is given alike.

    Attributes:
        title: For tables and figures.
        model: Maps inputs (batch, ...) to logits (batch, ..., classes).
        steps: Length of a run.
        settings: What else decides the numbers.
        draw: Inputs and labels of a step, from the seed of a run and the step.
        validation: Inputs and labels (batches, batch, ...).
    """

    title: str
    model: nn.Module
    steps: int
    settings: dict[str, Any]
    draw: Callable[[int, int], Batch]
    validation: Batch

    def initial_params(self, seed: int) -> Any:
        """The parameters that all runs of a seed start from."""
        inputs = self.validation[0][0][:1]
        return jax.jit(self.model.init)(jax.random.key(seed), inputs)["params"]

    def logits(self, params: Any, inputs: jax.Array) -> jax.Array:
        """Of a batch."""
        return self.model.apply({"params": params}, inputs)

    def loss(self, params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        """The mean cross-entropy in nats."""
        losses = optax.softmax_cross_entropy_with_integer_labels(
            self.logits(params, inputs), labels
        )
        return jnp.mean(losses)

    def validation_loss(self, params: Any) -> jax.Array:
        """The mean loss over all batches for validation."""
        losses = jax.lax.map(lambda batch: self.loss(params, *batch), self.validation)
        return jnp.mean(losses)


class RecurrentNet(nn.Module):
    """A gated recurrent unit that reads bytes."""

    width: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps (batch, time) to logits (batch, time, 256)."""
        x = nn.Embed(256, self.width, name="embed")(tokens)
        x = nn.RNN(nn.GRUCell(self.width), name="recurrent")(x)
        return nn.Dense(256, name="lm_head")(nn.LayerNorm(name="norm")(x))


class ConvNet(nn.Module):
    """Three convolutions and a classifier."""

    width: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps (batch, 8, 8, 1) to logits (batch, 10)."""
        x = images
        for index, strides in enumerate((1, 2, 2)):
            features = self.width * 2**index
            x = nn.Conv(features, (3, 3), (strides, strides), name=f"conv_{index}")(x)
            x = nn.relu(nn.LayerNorm(name=f"norm_{index}")(x))
        return nn.Dense(10, name="head")(jnp.mean(x, axis=(1, 2)))


@cache
def text() -> Text:
    """The text, read once."""
    return standard_library()


def of_bytes(
    title: str, model: nn.Module, *, steps: int, batch: int, context: int
) -> Task:
    """To predict the next byte."""
    windows = validation_batches(
        text().validation, batches=16, batch=32, context=context
    )

    def draw(seed: int, step: int) -> Batch:
        window = training_batch(
            text().train, seed=seed, step=step, batch=batch, context=context
        )
        return window[:, :-1], window[:, 1:]

    settings = {"batch": batch, "context": context, "text": text().digest}
    validation = windows[..., :-1], windows[..., 1:]
    return Task(title, model, steps, settings, draw, validation)


def small_gpt() -> Task:
    """A GPT with a hundred thousand parameters in its blocks."""
    config = GPTConfig(width=64, depth=2, head_size=32, context=64)
    return of_bytes("GPT, width 64", GPT(config), steps=600, batch=16, context=64)


def gpt() -> Task:
    """The job of `examples/train_gpt.py`."""
    config = GPTConfig(width=128, depth=4, head_size=64, context=128)
    return of_bytes("GPT, width 128", GPT(config), steps=1200, batch=8, context=128)


def recurrent_net() -> Task:
    """Bytes again, by a recurrent network."""
    return of_bytes("GRU", RecurrentNet(128), steps=600, batch=16, context=64)


def conv_net() -> Task:
    """Digits of 8 x 8 pixels, moved by up to a pixel in training."""
    held_out, batch, steps = 360, 64, 600
    digits = split_digits(held_out)

    def draw(seed: int, step: int) -> Batch:
        return digits.draw(seed, step, batch)

    images, labels = digits.validation
    settings = {"batch": batch, "held_out": held_out}
    validation = images[None], labels[None]
    return Task("CNN, digits", ConvNet(16), steps, settings, draw, validation)


TASKS: dict[str, Callable[[], Task]] = {
    "small_gpt": small_gpt,
    "gpt": gpt,
    "conv_net": conv_net,
    "recurrent_net": recurrent_net,
}
