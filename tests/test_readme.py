"""The README says what is so."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

import optaxplus as ox

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("source", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_runs_as_it_stands(source, capsys):
    exec(compile(ast.parse(source), "README.md", "exec"), {"__name__": "readme"})


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(
        "readme_script", ROOT / "benchmarks" / "readme.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md"])
def test_tables_are_those_of_the_script(script, page):
    text = (ROOT / page).read_text("utf-8")
    assert script.render(page, text) == text


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text("utf-8")
    anchors = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        if path:
            assert (ROOT / page).parent.joinpath(path).exists(), target
        else:
            assert anchor in anchors, target


def test_every_optimizer_has_a_row(script):
    # qk_clip works on the parameters and stands with what surrounds an optimizer.
    rows = {method.name.partition("(")[0] for method in script.METHODS} | {"qk_clip"}
    assert rows == {
        name
        for name in ox.__all__
        if getattr(getattr(ox, name), "__module__", "").startswith(
            "optaxplus.optimizers"
        )
    }


def test_the_two_commands_are_copied_by_the_gate():
    pattern = r"^python3 -m venv .*\[test\].*pytest$"
    assert len(re.findall(pattern, README, re.MULTILINE)) == 1
