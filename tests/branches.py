"""Which work of an update lies in a branch, and is left out where that is not taken."""

from typing import Any

import jax
import optax


def products_in_branches(tx: optax.GradientTransformation, params: Any) -> list[bool]:
    """For every matrix product of an update, whether it lies in a branch."""
    program = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
    return _products(program.jaxpr, False)


def _products(jaxpr: Any, inside_cond: bool) -> list[bool]:
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(inside_cond)
        inside = inside_cond or equation.primitive.name == "cond"
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found += _products(inner, inside)
    return found


def assert_products_only_in_branches(
    tx: optax.GradientTransformation, inner: optax.GradientTransformation, params: Any
) -> None:
    """Whether `tx` has the products of `inner`, which has no branches, all in one."""
    plain = products_in_branches(inner, params)
    assert len(plain) > 2
    assert not any(plain)
    assert products_in_branches(tx, params) == [True] * len(plain)
