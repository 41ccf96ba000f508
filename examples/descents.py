"""An optimizer's run on a problem, compiled whole, and the best of a grid of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from landscapes import Factorization, Plane

Problem = Plane | Factorization
Build = Callable[[optax.Schedule], optax.GradientTransformation]

SCHEDULES = ("constant", "linear to 0")
# Of the loss at the start: who stays below it has arrived.
THRESHOLD = 1e-6


@dataclass(frozen=True)
class Outcome:
    """The best run of an optimizer on a problem.

    Attributes:
        learning_rate: At the first step.
        schedule: One of `SCHEDULES`.
        arrived: The first step from which on the loss is below the threshold, or None.
        losses: At the start and after every step.
        params: The parameters, a tree with an axis of steps in front, start included.
        tried: Of every run of the grid: learning rate, schedule, arrived, last loss.
    """

    learning_rate: float
    schedule: str
    arrived: int | None
    losses: np.ndarray
    params: Any
    tried: list[dict[str, Any]]

    @property
    def note(self) -> str:
        """What to know of it: a wider grid might be better; all of it diverges."""
        if not np.isfinite(self.losses[-1]):
            return "diverges"
        rates = [entry["learning_rate"] for entry in self.tried]
        at_the_edge = self.learning_rate in (min(rates), max(rates))
        return "edge of grid" if at_the_edge else ""

    @property
    def settings(self) -> str:
        """The settings, as a legend says them."""
        falls = "" if self.schedule == SCHEDULES[0] else " falling"
        return f"rate {self.learning_rate:g}{falls}"


def descend(
    build: Build,
    problem: Problem,
    steps: int,
    learning_rate: jax.Array,
    fall: jax.Array,
) -> tuple[Any, jax.Array]:
    """Runs an optimizer; returns parameters and losses, the first of each at the start.

    Args:
        build: Makes the optimizer from a learning-rate schedule.
        problem: What is minimized.
        steps: How many steps are taken.
        learning_rate: At the first step.
        fall: Which share of it is lost over the run: 0 or 1.
    """
    tx = build(lambda step: learning_rate * (1 - fall * step / steps))
    value_and_grad = jax.value_and_grad(problem.loss)

    def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], Any]:
        params, state = carry
        loss, grads = value_and_grad(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), (params, loss)

    start = (problem.start, tx.init(problem.start))
    (last, _), (params, losses) = jax.lax.scan(step, start, length=steps)
    params = jax.tree.map(lambda all_, x: jnp.append(all_, x[None], 0), params, last)
    return params, jnp.append(losses, problem.loss(last))


def plain(array: np.ndarray) -> Any:
    """Nested lists of five digits, with None for what is not finite."""
    if np.ndim(array):
        return [plain(part) for part in array]
    return float(f"{array:.4e}") if np.isfinite(array) else None


def arrival(losses: np.ndarray) -> int | None:
    """The first step from which on all losses are below the threshold, or None."""
    above = np.flatnonzero(~(losses < THRESHOLD * losses[0]))
    step = above[-1] + 1
    return int(step) if step < len(losses) else None


def rank(losses: np.ndarray) -> tuple[float, float]:
    """What the best run has least of: steps to arrive, then the last loss."""
    step = arrival(losses)
    last = losses[-1] if np.isfinite(losses[-1]) else np.inf
    return (np.inf if step is None else step), last


def tune(build: Build, problem: Problem, steps: int, rates: Sequence[float]) -> Outcome:
    """Tries every learning rate with every schedule, and keeps the best run."""
    # One compilation: rate and schedule are arguments of the compiled run.
    run = jax.jit(partial(descend, build, problem, steps))
    best, tried = None, []
    for fall, schedule in enumerate(SCHEDULES):
        for rate in rates:
            params, losses = jax.device_get(run(jnp.float32(rate), jnp.float32(fall)))
            tried.append(
                {
                    "learning_rate": rate,
                    "schedule": schedule,
                    "arrived": arrival(losses),
                    "last_loss": plain(losses[-1]),
                }
            )
            if best is None or rank(losses) < rank(best.losses):
                best = Outcome(rate, schedule, arrival(losses), losses, params, tried)
    assert best is not None
    return best
