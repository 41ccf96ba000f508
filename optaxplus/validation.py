"""Argument checks with one message form for the whole library.

Every message names the function, the argument, the value and what is allowed, so
that it can be acted on without opening the source. Only Python and NumPy numbers
are checked by value: a JAX array is left alone, because `optax.inject_hyperparams`
calls the factories with traced values. Schedules (callables) pass too.
"""

import difflib
import math
import numbers
from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

__all__ = [
    "check_at_least",
    "check_at_most",
    "check_below_one",
    "check_between_zero_and_one",
    "check_choice",
    "check_decay_rate",
    "check_epsilon",
    "check_flag",
    "check_floating_dtype",
    "check_fraction",
    "check_int",
    "check_learning_rate",
    "check_non_negative",
    "check_params",
    "check_positive",
    "check_static_margin",
    "check_transformation",
    "check_weight_decay",
    "did_you_mean",
]


def _refuse(kind: type[Exception], function: str, argument: str, value, allowed: str):
    raise kind(f"{function}: {argument}={value!r} is not allowed; {allowed}.")


def _check_number(
    function: str,
    argument: str,
    value: Any,
    accept: Callable[[float], bool],
    allowed: str,
) -> None:
    if isinstance(value, jax.Array):
        if value.ndim:
            scalar = f"it must be {allowed}; an array must have shape ()"
            _refuse(ValueError, function, argument, value, scalar)
        return
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool | np.bool_) or not isinstance(
        value, int | float | np.floating | np.integer
    ):
        _refuse(TypeError, function, argument, value, f"it must be {allowed}")
    if not accept(float(value)):
        _refuse(ValueError, function, argument, value, f"it must be {allowed}")


def check_learning_rate(function: str, value: Any, argument: str = "learning_rate"):
    """Refuses a learning rate that is neither finite and >= 0 nor a schedule."""
    if callable(value):
        return
    _check_number(
        function,
        argument,
        value,
        lambda x: math.isfinite(x) and x >= 0,
        "a finite number >= 0, a scalar array, or a schedule (step -> number)",
    )


def check_weight_decay(function: str, value: Any, argument: str = "weight_decay"):
    """Refuses a weight decay that is neither finite and >= 0 nor a schedule."""
    if callable(value):
        return
    _check_number(
        function,
        argument,
        value,
        lambda x: math.isfinite(x) and x >= 0,
        "a finite number >= 0, a scalar array, or a schedule (step -> number)",
    )


def check_non_negative(function: str, **values: Any) -> None:
    """Refuses numbers that are negative, infinite or NaN."""
    for argument, value in values.items():
        _check_number(
            function,
            argument,
            value,
            lambda x: math.isfinite(x) and x >= 0,
            "a finite number >= 0",
        )


def check_positive(function: str, **values: Any) -> None:
    """Refuses numbers that are not finite and > 0."""
    for argument, value in values.items():
        _check_number(
            function,
            argument,
            value,
            lambda x: math.isfinite(x) and x > 0,
            "a finite number > 0",
        )


def check_decay_rate(function: str, **values: Any) -> None:
    """Refuses decay rates of moving averages outside [0, 1)."""
    check_below_one(function, **values)


def check_below_one(function: str, **values: Any) -> None:
    """Refuses numbers outside [0, 1)."""
    for argument, value in values.items():
        _check_number(
            function, argument, value, lambda x: 0 <= x < 1, "a number in [0, 1)"
        )


def check_between_zero_and_one(function: str, **values: Any) -> None:
    """Refuses numbers outside (0, 1)."""
    for argument, value in values.items():
        _check_number(
            function, argument, value, lambda x: 0 < x < 1, "a number in (0, 1)"
        )


def check_epsilon(function: str, *, eps: Any, eps_root: Any = 0.0) -> None:
    """Refuses a denominator that a zero gradient would make 0 / 0."""
    check_non_negative(function, eps=eps, eps_root=eps_root)
    if isinstance(eps, jax.Array) or isinstance(eps_root, jax.Array):
        return
    if eps == 0 and eps_root == 0:
        _refuse(
            ValueError,
            function,
            "eps",
            eps,
            "eps or eps_root must be > 0, or a zero gradient divides 0 by 0",
        )


def check_at_most(function: str, largest: float, **values: Any) -> None:
    """Refuses numbers above `largest`."""
    for argument, value in values.items():
        _check_number(
            function, argument, value, lambda x: x <= largest, f"at most {largest:g}"
        )


def check_at_least(function: str, smallest: float, **values: Any) -> None:
    """Refuses numbers below `smallest`."""
    for argument, value in values.items():
        _check_number(
            function, argument, value, lambda x: x >= smallest, f"at least {smallest:g}"
        )


def check_transformation(function: str, argument: str, value: Any) -> None:
    """Refuses anything but a gradient transformation."""
    if not isinstance(value, optax.GradientTransformation):
        _refuse(
            TypeError,
            function,
            argument,
            value,
            "it must be an optax.GradientTransformation, what a factory returns",
        )


def check_int(function: str, *, minimum: int, **values: Any) -> None:
    """Refuses anything but a Python integer >= `minimum`.

    Such arguments shape the compiled program, so a traced value cannot work; the
    message says how to keep `optax.inject_hyperparams` from tracing it.
    """
    for argument, value in values.items():
        _refuse_array(function, argument, value, "a Python integer")
        allowed = f"it must be an integer >= {minimum}"
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            _refuse(TypeError, function, argument, value, allowed)
        if int(value) < minimum:
            _refuse(ValueError, function, argument, value, allowed)


def check_fraction(function: str, **values: Any) -> None:
    """Refuses anything but a Python number in (0, 1] where it decides a size.

    Arrays are refused with a message, as in `check_int`.
    """
    for argument, value in values.items():
        _refuse_array(function, argument, value, "a Python number")
        _check_number(
            function, argument, value, lambda x: 0 < x <= 1, "a number in (0, 1]"
        )


def check_static_margin(function: str, **values: Any) -> None:
    """Refuses anything but a finite Python number >= 0; arrays as in `check_int`."""
    for argument, value in values.items():
        _refuse_array(function, argument, value, "a Python number")
    check_non_negative(function, **values)


def _refuse_array(function: str, argument: str, value: Any, wanted: str) -> None:
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{function}: {argument} shapes the compiled program and must be {wanted}, "
            f"but it is an array ({value}). Under optax.inject_hyperparams pass "
            f"static_args=({argument!r},)."
        )


def check_flag(function: str, **values: Any) -> None:
    """Refuses anything but a Python bool."""
    for argument, value in values.items():
        if not isinstance(value, bool | np.bool_):
            _refuse(TypeError, function, argument, value, "it must be True or False")


def check_choice(
    function: str, argument: str, value: Any, choices: Collection[str | None]
) -> None:
    """Refuses a mode that is not among the known ones, and lists those."""
    if not isinstance(value, str | None) or value not in choices:
        known = ", ".join(repr(choice) for choice in choices)
        allowed = f"it must be one of {known}{did_you_mean(value, choices)}"
        _refuse(ValueError, function, argument, value, allowed)


def did_you_mean(value: Any, choices: Iterable[str | None]) -> str:
    """The choice that looks most like the value, as the end of a message; or ""."""
    words = [choice for choice in choices if choice is not None]
    close = difflib.get_close_matches(value, words, 1) if isinstance(value, str) else ()
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_floating_dtype(function: str, **values: Any) -> None:
    """Refuses anything that does not name a real floating-point dtype."""
    for argument, value in values.items():
        try:
            valid = value is not None and jnp.issubdtype(jnp.dtype(value), jnp.floating)
        except TypeError:
            valid = False
        if not valid:
            _refuse(
                TypeError,
                function,
                argument,
                value,
                "it must name a floating-point dtype, such as 'float32' or 'bfloat16'",
            )


def check_params(function: str, params: Any) -> None:
    """Refuses a missing `params` where the update depends on the parameters."""
    if params is None:
        raise ValueError(
            f"{function}: params=None is not allowed; the update depends on the "
            "parameters, so call tx.update(grads, state, params)."
        )
