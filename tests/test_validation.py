"""One message form for every argument: function, argument, value, what is allowed."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from optaxplus import validation

NAN, INF = math.nan, math.inf

# check, values that pass, values that are refused (ValueError), what is allowed
NUMBERS = {
    "learning_rate": (
        lambda value: validation.check_learning_rate("f", value, "x"),
        [0, 0.0, 1e-3, 10, np.float32(0.1), np.array(0.1)],
        [-1e-3, NAN, INF, -INF, np.float32(-1)],
        r"a finite number >= 0, a scalar array, or a schedule \(step -> number\)",
    ),
    "non_negative": (
        lambda value: validation.check_non_negative("f", x=value),
        [0, 0.0, 5, np.int32(2), np.array(0.5)],
        [-1, NAN, INF, np.array(-0.5)],
        "a finite number >= 0",
    ),
    "positive": (
        lambda value: validation.check_positive("f", x=value),
        [1e-30, 1, np.float64(2)],
        [0, 0.0, -1, NAN, INF],
        "a finite number > 0",
    ),
    "decay_rate": (
        lambda value: validation.check_decay_rate("f", x=value),
        [0, 0.0, 0.999, np.float32(0.5)],
        [1, 1.0, -0.1, NAN, INF],
        r"a number in \[0, 1\)",
    ),
    "at_most": (
        lambda value: validation.check_at_most("f", 1.0, x=value),
        [1, 1.0, -3, np.float32(0.5), np.array(1.0)],
        [1.5, 2, NAN, INF, np.float32(1.1)],
        r"at most 1\.$",
    ),
}
NOT_NUMBERS = [
    "0.1",
    None,
    True,
    np.bool_(False),
    [0.1],
    1j,
    np.complex64(1),
    np.array([0.1]),
]


def rows(index: int):
    return [(name, value) for name, row in NUMBERS.items() for value in row[index]]


@pytest.mark.parametrize(("name", "value"), rows(1))
def test_numbers_pass(name: str, value):
    NUMBERS[name][0](value)


@pytest.mark.parametrize(("name", "value"), rows(2))
def test_numbers_out_of_range_are_refused(name: str, value):
    check, _, _, allowed = NUMBERS[name]
    message = f"f: x=.* is not allowed; it must be {allowed}"
    with pytest.raises(ValueError, match=message) as error:
        check(value)
    shown = value.item() if isinstance(value, np.ndarray) else value
    assert str(error.value).startswith(f"f: x={shown!r} is not allowed")


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=repr)
@pytest.mark.parametrize("name", NUMBERS)
def test_things_that_are_no_numbers_are_refused(name: str, value):
    check, _, _, allowed = NUMBERS[name]
    with pytest.raises(
        TypeError, match=f"f: x=.* is not allowed; it must be {allowed}"
    ):
        check(value)


@pytest.mark.parametrize("name", NUMBERS)
def test_arrays_and_tracers_pass_unread(name: str):
    check = NUMBERS[name][0]
    check(jnp.asarray(-1.0))
    jax.jit(lambda x: (check(x), x)[1])(jnp.nan)


def test_schedules_are_rates_only():
    validation.check_learning_rate("f", lambda step: 0.1)
    validation.check_weight_decay("f", lambda step: 0.1)
    with pytest.raises(TypeError, match="f: x=<function"):
        validation.check_non_negative("f", x=lambda step: 0.1)


@pytest.mark.parametrize("value", NUMBERS["learning_rate"][1])
def test_weight_decays_pass(value):
    validation.check_weight_decay("f", value)
    validation.check_weight_decay("f", jnp.asarray(value))


@pytest.mark.parametrize(
    ("error", "values"),
    [(ValueError, NUMBERS["learning_rate"][2]), (TypeError, NOT_NUMBERS)],
)
def test_other_weight_decays_are_refused(error, values):
    # In the words of a learning rate, since they may be schedules too.
    message = f"f: weight_decay=.* must be {NUMBERS['learning_rate'][3]}"
    for value in values:
        with pytest.raises(error, match=message):
            validation.check_weight_decay("f", value)


def test_every_argument_is_checked_by_its_name():
    with pytest.raises(ValueError, match="f: second=-1 is not allowed"):
        validation.check_non_negative("f", first=1, second=-1)


@pytest.mark.parametrize(
    "values",
    [
        {"eps": 1e-8},
        {"eps": 0.0, "eps_root": 1e-8},
        {"eps": jnp.zeros(())},
        {"eps": 0.0, "eps_root": jnp.zeros(())},
    ],
    ids=str,
)
def test_denominators_that_stay_away_from_zero(values):
    validation.check_epsilon("f", **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eps": 0.0}, "f: eps=0.0 is not allowed; eps or eps_root must be > 0"),
        ({"eps": 0, "eps_root": 0}, "f: eps=0 is not allowed; eps or eps_root"),
        ({"eps": -1.0}, "f: eps=-1.0 is not allowed; it must be a finite number >= 0"),
        ({"eps": 1.0, "eps_root": NAN}, "f: eps_root=nan is not allowed"),
    ],
)
def test_denominators_that_may_be_zero(values, message: str):
    with pytest.raises(ValueError, match=message):
        validation.check_epsilon("f", **values)


def test_integers():
    validation.check_int("f", minimum=1, x=1, y=np.int64(7))
    for value in (0, -3, np.int32(0)):
        with pytest.raises(ValueError, match=r"f: x=.* must be an integer >= 1"):
            validation.check_int("f", minimum=1, x=value)
    for value in (1.0, "1", None, True, np.float32(2)):
        with pytest.raises(TypeError, match=r"f: x=.* must be an integer >= 1"):
            validation.check_int("f", minimum=1, x=value)


def test_fractions():
    validation.check_fraction("f", x=1, y=1e-9, z=np.float32(0.25), u=np.array(0.5))
    for value in (0, 0.0, -0.5, 1.5, NAN, INF):
        with pytest.raises(ValueError, match=r"f: x=.* must be a number in \(0, 1\]"):
            validation.check_fraction("f", x=value)
    for value in NOT_NUMBERS:
        with pytest.raises(TypeError, match=r"f: x=.* must be a number in \(0, 1\]"):
            validation.check_fraction("f", x=value)


@pytest.mark.parametrize(
    ("check", "number"),
    [
        (lambda value: validation.check_int("f", minimum=1, steps=value), "integer"),
        (lambda value: validation.check_fraction("f", steps=value), "number"),
    ],
)
def test_traced_sizes_name_the_remedy(check, number: str):
    message = (
        f"f: steps shapes the compiled program and must be a Python {number}.* "
        r"optax.inject_hyperparams pass static_args=\('steps',\)"
    )
    with pytest.raises(TypeError, match=message):
        check(jnp.asarray(1))
    with pytest.raises(TypeError, match=message):
        jax.jit(check)(1)


def test_flags():
    validation.check_flag("f", x=True, y=np.bool_(False))
    for value in (0, 1, "True", None, jnp.asarray(True)):
        with pytest.raises(TypeError, match=r"f: x=.* it must be True or False"):
            validation.check_flag("f", x=value)


def test_choices():
    choices = {"one": 1, "two": 2}
    validation.check_choice("f", "mode", "two", choices)
    for value in ("three", "One", "", None, 1, ["one"]):
        with pytest.raises(ValueError, match=r"f: mode=.* one of 'one', 'two'[. ]"):
            validation.check_choice("f", "mode", value, choices)
    with pytest.raises(ValueError, match=r"'two' \(did you mean 'one'\?\)\.$"):
        validation.check_choice("f", "mode", "one ", choices)


@pytest.mark.parametrize(
    "dtype",
    ["float32", "bfloat16", "float16", "float64", jnp.float32, np.dtype("float16")],
    ids=str,
)
def test_floating_dtypes(dtype):
    validation.check_floating_dtype("f", x=dtype)


@pytest.mark.parametrize(
    "dtype",
    ["int8", "bool", "complex64", "float33", None, 32, int, "", jnp.int32],
    ids=str,
)
def test_other_dtypes_are_refused(dtype):
    message = r"f: x=.* is not allowed; it must name a floating-point dtype, such as"
    with pytest.raises(TypeError, match=message):
        validation.check_floating_dtype("f", x=dtype)


def test_params():
    validation.check_params("f", {})
    message = (
        r"f: params=None is not allowed; .* call tx.update\(grads, state, params\)"
    )
    with pytest.raises(ValueError, match=message):
        validation.check_params("f", None)


@pytest.mark.parametrize(
    "value",
    [optax.identity(), optax.adam(0.1), optax.inject_hyperparams(optax.sgd)(0.1)],
    ids=["plain", "extra_args", "injected"],
)
def test_transformations(value):
    validation.check_transformation("f", "inner", value)


@pytest.mark.parametrize(
    "value", [None, optax.adam, 0.1, (len, len), optax.MultiSteps(optax.adam(0.1), 2)]
)
def test_other_than_transformations_are_refused(value):
    message = (
        r"f: inner=.* is not allowed; it must be an optax.GradientTransformation, what "
        r"a factory returns"
    )
    with pytest.raises(TypeError, match=message):
        validation.check_transformation("f", "inner", value)


def test_an_array_of_numbers_is_no_number():
    with pytest.raises(ValueError, match=r"adamw: learning_rate=.*shape \(\)"):
        ox.adamw(jnp.ones(3))
