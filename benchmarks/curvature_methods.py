"""The optimizers that curvature_cost.py compares, and their steps by kind."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A script's own folder, also where the tests load it by its path.
sys.path.insert(0, str(Path(__file__).resolve().parent))
import jax
import jax.numpy as jnp
import numpy as np
import optax
from update_time import JaxStep

import optaxplus as ox

RATE = 1e-3
# What is compiled refreshes in every `EVERY`-th step: before it finished so many.
EVERY = 100
COUNTS = {"plain": 1, "refresh": EVERY, "first": 0}


@dataclass(frozen=True)
class Method:
    """A row.

    Attributes:
      make: The optimizer for matrices of a width.
      slow: Fields of its state that only refreshes change; empty if there are none.
      has_first: Whether its first step is unlike others.
      on_tpus: Whether it compiles for TPUs in useful time.
    """

    make: Callable[[int], optax.GradientTransformation]
    slow: tuple[str, ...] = ()
    has_first: bool = False
    on_tpus: bool = True

    @property
    def kinds(self) -> list[str]:
        """Its kinds of steps; of SOAP the first has to come first."""
        has = {"first": self.has_first, "refresh": bool(self.slow), "plain": True}
        return [kind for kind, is_there in has.items() if is_there]


def _shampoo(method: str) -> optax.GradientTransformation:
    return ox.shampoo(RATE, update_interval=EVERY, root_method=method)


def _kron() -> optax.GradientTransformation:
    return ox.kron(RATE, update_interval=EVERY, warmup_steps=0, interval_growth=None)


def _sophia() -> optax.GradientTransformation:
    """Sophia, whose gradients bring the diagonal of the Hessian with them."""
    tx = ox.sophia(RATE, update_interval=EVERY)

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return tx.update(grads["gradient"], state, params, hessian=grads["hessian"])

    return optax.GradientTransformation(tx.init, update)


METHODS = {
    "adamw": Method(lambda _: ox.adamw(RATE, weight_decay=0.1)),
    "muon": Method(lambda _: ox.muon(RATE, weight_decay=0.1)),
    "sophia": Method(lambda _: _sophia(), slow=("hessian",)),
    "apollo(rank=d/4)": Method(lambda width: ox.apollo(RATE, rank=width // 4)),
    "kron": Method(lambda _: _kron(), slow=("factor_in", "factor_out")),
    "shampoo": Method(
        lambda _: _shampoo("eigh"), slow=("root_in", "root_out"), on_tpus=False
    ),
    'shampoo(root_method="newton")': Method(
        lambda _: _shampoo("newton"), slow=("root_in", "root_out")
    ),
    "soap": Method(
        lambda _: ox.soap(RATE, update_interval=EVERY),
        slow=("basis_in", "basis_out"),
        has_first=True,
    ),
}


def field_of(path: Any) -> str | None:
    """Which field of its state a leaf belongs to."""
    names = [key.name for key in path if hasattr(key, "name")]
    return names[-1] if names else None


def before(kind: str, state: Any) -> Any:
    """The state as it counts before a step of a kind."""
    # Kron's last refresh is the step before the first.
    values = {"count": COUNTS[kind], "refreshed": 0}

    def leaf(path: Any, x: Any) -> Any:
        return jnp.int32(values[field_of(path)]) if field_of(path) in values else x

    return jax.tree.map_with_path(leaf, state)


def given(name: str, grads: Any, others: Any) -> Any:
    """What the update of a method takes for gradients."""
    return {"gradient": grads, "hessian": others} if name == "sophia" else grads


class MethodStep(JaxStep):
    """One step of a method, of the kind that was prepared."""

    def __init__(self, name: str, width: int, params: Any, gradients: list[Any]):
        self.method = METHODS[name]
        self.tx = self.method.make(width)
        pairs = zip(gradients, gradients[1:] + gradients[:1], strict=True)
        inputs = [given(name, *pair) for pair in pairs]
        super().__init__(self.tx, params, inputs[0])
        self.inputs = itertools.cycle(inputs)
        self.kept: Any = None

    def prepare(self, kind: str) -> None:
        """Makes the next step one of this kind, with the next gradient."""
        self.grads = next(self.inputs)
        if kind == "first":  # It forgets, so it gets a state of its own.
            self.kept = self.params, self.state
            self.params = jax.tree.map(jnp.copy, self.params)
            self.state = jax.tree.map(jnp.copy, self.tx.init(self.params))
        self.state = before(kind, self.state)
        jax.block_until_ready((self.params, self.state))

    def reset(self) -> None:
        """Undoes a first step."""
        if self.kept is not None:
            (self.params, self.state), self.kept = self.kept, None

    def slow(self) -> dict[str, np.ndarray]:
        """What only refreshes change, copied."""
        return {
            jax.tree_util.keystr(path): np.array(leaf)
            for path, leaf in jax.tree.leaves_with_path(self.state)
            if field_of(path) in self.method.slow
        }

    def check(self) -> None:
        """Runs every kind once, and raises if one refreshes that should not."""
        for kind in self.method.kinds:
            self.prepare(kind)
            self.kept = None  # The state that follows the first step is a good one.
            old = self.slow()
            self()
            new = self.slow()
            changed = {not np.array_equal(new[name], old[name]) for name in old}
            if old and changed != {kind != "plain"}:
                raise AssertionError(f"{kind} step: slow fields changed: {changed}")
