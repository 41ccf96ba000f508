"""How does one write an optimizer that the library does not have?

AdaGO in thirty lines: Muon's direction with AdaGrad's step length, one number for each
weight matrix. The rule is a `NamedTuple` and two functions; what surrounds it is from
optaxplus: which parameters are hidden matrices, and by which axes (`ox.route`), float32
arithmetic whatever the parameters are (`ox.chain_in_float32`), learning rate, schedule
and weight decay (`ox.descend`). Each layer of a stack then is a matrix of its own,
`ox.quantize_state` keeps the momentum in 8 bits, and `ox.state_sharding` lays the state
out on a mesh, on which the matrices are orthogonalized as Muon's are.

    python examples/own_optimizer.py                  # a minute on two cores
    python examples/own_optimizer.py --steps small    # half of it

The script shows where each parameter goes and what the state takes in memory. Then it
trains a small GPT on Python's source code: with AdamW, with AdaGO, and with AdaGO on
weights of 16 + 8 bits and moments of 8. Both learning rates are the best of a sweep in
factors of 2 at the default number of steps. What AdaGO gains is Muon's direction:
`ox.muon(8e-3)` ends at 1.97 nats per byte, AdaGO at 2.03, AdamW at 2.33.

References:
    Zhang, Liu, Schaeffer, "AdaGrad Meets Muon: Adaptive Stepsizes for Orthogonal
    Updates", 2025, https://arxiv.org/abs/2509.02981, Algorithm 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from comparison import empty_table
from gpt import GPT, GPTConfig, next_token_loss
from rich.console import Console
from text import Text, standard_library, training_batch, validation_batches
from train_gpt import positive

import optaxplus as ox

STEPS, SMALL_STEPS = 300, 60
CONFIG = GPTConfig(width=96, depth=2, context=64)
BATCH, VALIDATION_BATCHES = 16, 16
ADAMW_LEARNING_RATE, ADAGO_LEARNING_RATE = 2e-3, 0.2


# The optimizer. For each matrix with gradient G, momentum M and accumulated norm v
#
#     M_t  = b1·M_{t-1} + (1 - b1)·G_t
#     v_t² = v_{t-1}² + min(‖G_t‖, gamma)²
#     O_t  = polar factor of M_t
#     u_t  = max(floor, min(‖G_t‖, gamma) / v_t)·O_t
#
# and the parameters move by -learning_rate·u_t. The paper's ε, the smallest step, is
# learning_rate·floor. Its v_0 > 0 is 0 here, so that the first step is learning_rate
# long, and a matrix without a gradient so far stays where it is.


class ScaleByAdagoState(NamedTuple):
    """State of `scale_by_adago`; `ox.quantize_state` knows these names of fields."""

    mu: Any  # like the parameters: the momentum M
    sum_of_squares: Any  # one number for each matrix, v²: its axes have size 1


def scale_by_adago(axes, b1=0.95, gamma=1.0, floor=0.0):
    """Orthogonalizes momentum, and divides by the norm of all gradients so far.

    Args:
        axes: A `MatrixAxes` for each parameter: what `ox.route` gives.
        b1: Decay rate of the momentum, in [0, 1).
        gamma: Bound on the norm of a matrix's gradient, > 0.
        floor: Smallest factor of the orthogonal direction, >= 0.

    Returns:
        A transformation with state `ScaleByAdagoState`.
    """
    orthogonalize = ox.orthogonalize_via_newton_schulz(axes=axes)

    def squares(matrix, node):
        # Masked parameters have axes, too, but no arrays: the node is empty there.
        # Fused projections (`matrix.splits`) share one norm.
        over = matrix.fan_in + matrix.fan_out
        norm = partial(jnp.sum, axis=over, keepdims=True)
        return jax.tree.map(lambda g: jnp.minimum(norm(g * g), gamma**2), node)

    def init_fn(params):
        orthogonalize.init(params)  # Refuses what is no matrix.
        mu = optax.tree.zeros_like(params, dtype=jnp.float32)
        return ScaleByAdagoState(mu, jax.tree.map(squares, axes, mu))

    def update_fn(grads, state, params=None):
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        direction, _ = orthogonalize.update(mu, optax.EmptyState(), params)
        new = jax.tree.map(squares, axes, grads)
        total = jax.tree.map(jnp.add, state.sum_of_squares, new)

        def scaled(o, s, v):
            return jnp.maximum(floor, jnp.sqrt(s / jnp.where(v == 0, 1, v))) * o

        updates = jax.tree.map(scaled, direction, new, total)
        return updates, ScaleByAdagoState(mu, total)

    return optax.GradientTransformation(init_fn, update_fn)


def adago(learning_rate, others, weight_decay=0.1):
    """AdaGO on hidden weight matrices, another optimizer on everything else.

    Args:
        learning_rate: Length of a matrix's first step in the spectral norm; a number
            or a schedule.
        others: The other optimizer, learning rate included.
        weight_decay: Decay of the matrices, relative to their learning rate.

    Returns:
        A transformation whose update has the dtype of the gradient.
    """

    def build(roles, axes):
        step = ox.descend(learning_rate, weight_decay)
        groups = {"adago": optax.chain(scale_by_adago(axes), step), "adamw": others}
        labels = jax.tree.map(lambda r: "adago" if r == "hidden" else "adamw", roles)
        return optax.partition(groups, lambda _: labels)

    return ox.chain_in_float32(ox.route(build))


# What this script does with it.

loss_of = jax.jit(next_token_loss, static_argnums=0)


class Task(NamedTuple):
    """What every optimizer is given.

    Attributes:
        model: A GPT.
        text: What it learns from.
        steps: Number of steps.
        seed: Of the initial parameters and of the order of the data.
    """

    model: GPT
    text: Text
    steps: int
    seed: int

    def initial_params(self, dtype: str) -> Any:
        """The parameters before training."""
        tokens = jnp.zeros((1, self.model.config.context), jnp.int32)
        params = jax.jit(self.model.init)(jax.random.key(self.seed), tokens)["params"]
        return optax.tree.cast(params, dtype)

    def batches(self) -> Iterator[np.ndarray]:
        """The training data, in the same order for everyone."""
        sizes = {"batch": BATCH, "context": self.model.config.context}
        for step in range(self.steps):
            yield training_batch(self.text.train, seed=self.seed, step=step, **sizes)

    def validation_loss(self, params: Any) -> float:
        """The mean loss over windows that lie in other files."""
        windows = validation_batches(
            self.text.validation,
            batches=VALIDATION_BATCHES,
            batch=BATCH,
            context=self.model.config.context,
        )
        wide = optax.tree.cast(params, "float32")
        losses = [loss_of(self.model, wide, batch) for batch in windows]
        return float(np.mean(losses))


class Result(NamedTuple):
    """What came out of one run.

    Attributes:
        loss: Validation loss after the last step, in nats per byte.
        seconds: Time of the steps, without the first, which compiles.
    """

    loss: float
    seconds: float


def optimizers(
    steps: int, adamw_learning_rate: float, adago_learning_rate: float
) -> dict[str, tuple[optax.GradientTransformation, str]]:
    """Of each run: its optimizer, and the dtype of its weights."""

    def warm(peak: float) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps)

    adamw = ox.adamw(warm(adamw_learning_rate), weight_decay=0.1, mask=ox.decay_mask)
    ours = adago(warm(adago_learning_rate), others=adamw)
    in_8_bits = ox.master_weights(ox.quantize_state(ours), bits=24)
    return {
        "adamw": (adamw, "float32"),
        "adago": (ours, "float32"),
        "adago, 8 bits": (in_8_bits, "bfloat16"),
    }


def train(task: Task, tx: optax.GradientTransformation, dtype: str) -> Result:
    """Trains a model whose weights are kept in `dtype`."""
    params = task.initial_params(dtype)
    state = jax.jit(tx.init)(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, windows: jax.Array) -> tuple[Any, Any]:
        # Computed with in float32, whatever they are kept in.
        wide = optax.tree.cast(params, "float32")
        grads = jax.grad(partial(next_token_loss, task.model))(wide, windows)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    start = 0.0
    for windows in task.batches():
        params, state = step(params, state, windows)
        start = start or time.perf_counter()
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    return Result(task.validation_loss(params), seconds)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])

    def step_count(text: str) -> int:
        return SMALL_STEPS if text == "small" else positive(text)

    parser.add_argument(
        "--steps",
        type=step_count,
        default=STEPS,
        metavar="N",
        help=f"steps of each run, or 'small' for {SMALL_STEPS} (default: %(default)s)",
    )
    parser.add_argument(
        "--adamw-learning-rate", type=float, default=ADAMW_LEARNING_RATE
    )
    parser.add_argument(
        "--adago-learning-rate", type=float, default=ADAGO_LEARNING_RATE
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Shows the routing and the memory, trains, and prints a table."""
    options = parse_arguments(arguments)
    task = Task(GPT(CONFIG), standard_library(), options.steps, options.seed)
    runs = optimizers(
        options.steps, options.adamw_learning_rate, options.adago_learning_rate
    )
    shapes = {
        dtype: jax.eval_shape(partial(task.initial_params, dtype))
        for _, dtype in runs.values()
    }
    print(f"{ox.explain_routing(shapes['float32'], labels={'hidden': 'adago'})}\n")
    for name, (tx, dtype) in runs.items():
        memory = ox.memory_report(tx, shapes[dtype], grads_dtype="float32")
        print(f"{name}\n{memory}\n")
    table = empty_table(
        f"{options.steps} steps", "optimizer", "loss (nats\nper byte)", "\nseconds"
    )
    for name, (tx, dtype) in runs.items():
        print(f"training with {name} ...")
        result = train(task, tx, dtype)
        table.add_row(name, f"{result.loss:.4f}", f"{result.seconds:.1f}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
