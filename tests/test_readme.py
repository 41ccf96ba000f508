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


def anchors(text):
    """What a link may lead to on a page: its titles, as GitHub spells them."""
    return {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md"])
def test_links_lead_somewhere(page):
    here = ROOT / page
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", here.read_text("utf-8")):
        path, _, anchor = target.partition("#")
        there = here.parent / path if path else here
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there.read_text("utf-8")), target


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


def test_the_gate_runs_the_test_command_of_this_page():
    gate = (ROOT / ".ci" / "run").read_text("utf-8")
    pattern = re.search(r"grep -E '(.*)' README.md\)", gate).group(1)
    assert len(re.findall(pattern, README, re.MULTILINE)) == 1
    assert 'bash -euo pipefail -c "${command/#python3/$PYTHON}"' in gate
