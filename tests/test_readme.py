"""The README says what is so."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("source", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_runs_as_it_stands(source, capsys):
    exec(compile(ast.parse(source), "README.md", "exec"), {"__name__": "readme"})


def test_tables_are_those_of_the_script():
    spec = importlib.util.spec_from_file_location(
        "readme_script", ROOT / "benchmarks" / "readme.py"
    )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.render(README) == README


def test_the_two_commands_are_copied_by_the_gate():
    pattern = r"^python3 -m venv .*\[test\].*pytest$"
    assert len(re.findall(pattern, README, re.MULTILINE)) == 1
