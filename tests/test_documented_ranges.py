"""What docstrings say of the range of a number is what factories let in and refuse."""

import inspect
import re
from typing import Any

import pytest

import optaxplus as ox
from tests.test_public_api import FACTORIES, OF_PARAMS

FUNCTIONS = {name: value for name, value in FACTORIES.items() if name not in OF_PARAMS}
WRAPPERS = ("dynamic_loss_scale", "master_weights", "quantize_state")
FUNCTIONS |= {name: getattr(ox, name) for name in WRAPPERS}

REQUIRED = {"learning_rate": 1e-3, "every_k": 2, "max_norm": 1.0, "tx": ox.sgd(1.0)}

# As docstrings write it -> what is on the edge inside, what is outside.
INTERVALS = {
    "[0, 1)": ([0.0, 0.5], [-0.1, 1.0]),
    "(0, 1]": ([0.1, 1.0], [0.0, 1.1]),
    "(0, 1)": ([0.1, 0.9], [0.0, 1.0]),
    "> 0": ([1e-3], [0.0, -1.0]),
}
# (function, argument): values of which its docstring says more.
SAID_APART = {("scale_by_shampoo", "b2"): {1.0}, ("shampoo", "b2"): {1.0}}


def ranges(name: str) -> dict[str, tuple[list[Any], list[Any]]]:
    """Argument -> values inside and outside of the range in the docstring."""
    doc = inspect.getdoc(FUNCTIONS[name]) or ""
    described = doc.partition("Args:\n")[2].partition("\nReturns:\n")[0]
    parameters = inspect.signature(FUNCTIONS[name]).parameters
    found = {}
    for entry in re.finditer(r"^  (\w+): (.*(?:\n    .*)*)", described, re.M):
        argument, text = entry[1], " ".join(entry[2].split())
        stated = re.search(r"[\[(]0, 1[\])]|(?<!radius )> 0|>= (\d+)", text)
        if not stated or isinstance(parameters[argument].default, bool):
            continue
        inside, outside = INTERVALS.get(stated[0], ([], []))
        if stated[1] is not None:
            inside, outside = [int(stated[1])], [int(stated[1]) - 1]
        if "eps_root may not both be 0" in text:
            inside = [1e-3]
        apart = SAID_APART.get((name, argument), set())
        found[argument] = inside, [value for value in outside if value not in apart]
    return found


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_ranges(name: str) -> None:
    factory = FUNCTIONS[name]
    parameters = inspect.signature(factory).parameters
    required = {key: value for key, value in REQUIRED.items() if key in parameters}
    if "inner" in parameters:
        required["inner"] = ox.scale_by_sign()
    for argument, (inside, outside) in ranges(name).items():
        for value in inside:
            factory(**required | {argument: value})
        for value in outside:
            with pytest.raises(ValueError, match=rf"\b{argument}={value}"):
                factory(**required | {argument: value})
    numbers = {
        argument
        for argument, parameter in parameters.items()
        if isinstance(parameter.default, int | float)
        and not isinstance(parameter.default, bool)
    }
    # Both say which numbers they take in other words.
    assert numbers - ranges(name).keys() <= {"bits", "init_scale"}
