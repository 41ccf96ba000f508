"""The example that chooses an optimizer for the memory there is."""

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("memory_budget")
    finally:
        sys.path.remove(str(FOLDER))


def lines_of(capsys):
    heading, header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[::3] == ["optimizer", "state", "device"]
    return heading, rows


def test_what_fits_is_listed_best_first(example, capsys):
    assert example.main(["--model", "llama-7b", "--memory", "24"]) == 0
    heading, rows = lines_of(capsys)
    choices = example.candidates("llama-7b", {"fsdp": 4})
    fitting = [choice for choice in choices if choice.on_device <= 24e9]
    assert 0 < len(fitting) < len(choices)
    assert f"{len(fitting)} of {len(choices)} fit into 24 GB" in heading
    assert [row.split()[0] for row in rows] == [c.recipe.optimizer for c in fitting]
    # 12 and 4 bytes for each of 6.7e9 parameters on four devices; 16 do not fit.
    assert rows[0].startswith("muon ") and "float32" in rows[0]
    first_adamw = next(row for row in rows if row.startswith("adamw"))
    assert "24-bit weights" in first_adamw
    assert heading.endswith(", the one that gives up least first")


def test_order(example):
    choices = example.candidates("gpt2-small", {"fsdp": 1})
    *own, lora = choices
    assert lora.recipe.lora == 16
    optimizers = list(dict.fromkeys(choice.recipe.optimizer for choice in own))
    assert optimizers == list(example.OPTIMIZERS)
    for optimizer in optimizers:
        sizes = [c.on_device for c in own if c.recipe.optimizer == optimizer]
        # Whatever is less exact takes less.
        assert sizes == sorted(sizes, reverse=True)
        assert len(sizes) >= 3


@pytest.mark.slow
def test_a_reserve_leaves_less(example, capsys):
    example.main(["--memory", "24", "--reserve", "12"])
    _, few = lines_of(capsys)
    example.main(["--memory", "12"])
    assert lines_of(capsys)[1] == few
    example.main(["--memory", "24"])
    assert len(lines_of(capsys)[1]) > len(few)


@pytest.mark.slow
def test_nothing_fits(example, capsys):
    assert example.main(["--model", "llama-70b", "--memory", "1"]) == 1
    out = capsys.readouterr().out
    assert "0 of" in out
    assert "The smallest is adamw, LoRA of rank 16, bfloat16: 35" in out


def test_a_flax_model(example, capsys):
    assert example.main(["--model", "gpt", "--memory", "1", "--mesh", "fsdp=2"]) == 0
    heading, _ = lines_of(capsys)
    assert heading.startswith("gpt, 51,")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "x"], "must be a number of GB >= 0; got 'x'"),
        (["--memory", "-1"], "must be a number of GB >= 0"),
        (["--memory", "8", "--reserve", "8"], "leaves nothing of --memory 8"),
        (["--mesh", "x=2"], "with axes of data, fsdp, tensor"),
        (["--model", "x"], "invalid choice"),
    ],
)
def test_what_is_wrong_is_said(example, capsys, arguments, message):
    with pytest.raises(SystemExit):
        example.main(arguments)
    assert message in capsys.readouterr().err
