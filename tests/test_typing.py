"""Runs `typing/downstream.py`, which pyright checks, and finds no name missing."""

import ast
import inspect
from pathlib import Path

import jax
import pytest

import optaxplus as ox
from tests.typing import downstream

SOURCE = Path(downstream.__file__).read_text("utf-8")
TABLES = (downstream.links_and_their_states, downstream.wrappers_and_their_states)
PROGRAMS = [
    function
    for name, function in inspect.getmembers(downstream, inspect.isfunction)
    if function.__module__ == downstream.__name__
    and function not in (*TABLES, downstream.refused)
]


def test_every_public_name_is_used():
    used = {
        node.attr
        for node in ast.walk(ast.parse(SOURCE))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "ox"
    }
    assert set(ox.__all__) <= used


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_it_runs(program):
    program()


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
def test_states_are_of_the_classes_that_have_their_names(table):
    params = {"kernel": downstream.PARAMS["dense"]["kernel"]}
    for tx, state_class in table():
        assert isinstance(jax.eval_shape(tx.init, params), state_class)
