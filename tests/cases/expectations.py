"""What the rows of the table expect: references, decays, branches."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from tests.case import Oracle
from tests.references import matrix
from tests.references.conventions import Array

# Newton-Schulz multiplies small singular values, and their rounding errors, by about
# 1000 (8.2 · 4.0 · 3.9 · 3.3 · 2.3) before it bends them.
NEWTON_SCHULZ_RTOL = 2e-4
# bfloat16 products: 2^-8 a rounding, fifteen products.
BFLOAT16_RTOL = 5e-2


def decay_of(coefficient: float, role: str | None = None):
    """Decay of the parameters relative to the learning rate, of one role or all."""

    def update(p: Array, learning_rate: float, of_role: str) -> Array:
        return -learning_rate * (coefficient if role in (None, of_role) else 0.0) * p

    return update


def reference(method: Callable[..., list[Array]], **arguments: Any) -> Oracle:
    def oracle(p, grads, learning_rate, is_matrix):
        return method(p, grads, learning_rate=learning_rate, **arguments)

    return oracle


def matrix_oracle(
    others: Oracle, method: Callable[..., list[Array]], **arguments: Any
) -> Oracle:
    """A method for matrices, and what the other parameters get."""

    def oracle(p, grads, learning_rate, is_matrix):
        if not is_matrix:
            return others(p, grads, learning_rate, is_matrix)
        fan_in, fan_out = p.shape
        return method(
            p,
            grads,
            learning_rate=learning_rate,
            fan_in=fan_in,
            fan_out=fan_out,
            **arguments,
        )

    return oracle


def muon_oracle(others: Oracle, **arguments: Any) -> Oracle:
    # The eps of the reference is absolute, that of the library relative.
    return matrix_oracle(others, matrix.muon, eps=0.0, **arguments)


def factored_branches(state: Any) -> Mapping[str, bool]:
    rows, full = (optax.tree.get(state, name) for name in ("nu_row", "nu"))
    sizes = [
        (row.size, v.size)
        for row, v in zip(jax.tree.leaves(rows), jax.tree.leaves(full), strict=True)
    ]
    return {
        "factored": any(row > 1 and v == 1 for row, v in sizes),
        "full": any(row == 1 and v > 1 for row, v in sizes),
    }


def partition_branches(*labels: str) -> Callable[[Any], Mapping[str, bool]]:
    """Which groups of a partition have parameters."""

    def branches(state: Any) -> Mapping[str, bool]:
        groups = optax.tree.get(state, "inner_states")
        return {
            label: any(leaf.ndim > 0 for leaf in jax.tree.leaves(groups[label]))
            for label in labels
        }

    return branches
