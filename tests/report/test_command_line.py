"""python -m optaxplus."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import optaxplus as ox
from optaxplus.__main__ import main
from optaxplus.report import tables
from optaxplus.report.models import MODELS
from optaxplus.report.recipes import OPTIMIZERS

ROOT = Path(__file__).resolve().parents[2]
MIXED = ["--weights", "bfloat16", "--grads", "float32", "--master", "float32"]


def printed(capsys, *arguments: str) -> str:
    main(arguments)
    return capsys.readouterr().out


def test_memory_is_the_report(capsys):
    report = ox.memory_report(ox.adamw(1e-3), "gpt2-small")
    out = printed(capsys, "memory", "--model", "gpt2-small")
    assert out == f"{report}\n"


def test_the_example_of_the_textbooks(capsys):
    arguments = ["memory", "--model", "llama-70b", "--optimizer", "adamw", *MIXED]
    found = json.loads(printed(capsys, *arguments, "--json"))
    params = 68_976_648_192
    assert found["num_params"] == params
    assert found["params"] == 2 * params
    assert found["grads"] == 4 * params
    # A master, two moments, and two counters of steps.
    assert found["state"] == 12 * params + 8
    assert found["recipe"]["master"] == "float32"
    assert found["per_device"] is None
    eight = json.loads(printed(capsys, *arguments, "--state", "8bit", "--json"))
    # All but the moments of the table, of which a hundredth would be more.
    assert 5.9 * params < found["total"] - eight["total"] < 6 * params


def test_mesh(capsys):
    arguments = [
        "memory",
        "--model",
        "llama-70b",
        "--mesh",
        "fsdp=8,tensor=8",
        "--json",
    ]
    found = json.loads(printed(capsys, *arguments))
    assert found["mesh"] == {"fsdp": 8, "tensor": 8}
    share = found["per_device"]
    # 161 norms of 8192 are whole.
    norms = 161 * 8192
    assert share["params"] == 4 * ((68_976_648_192 - norms) // 64 + norms)
    assert "per device" in printed(capsys, *arguments[:-1])


def test_compare_stands_side_by_side(capsys):
    names = ["adamw", "lion", "muon", "adamw8bit", "sgd(momentum=0.9)"]
    out = printed(capsys, "compare", *names, "--model", "llama-7b")
    header, _, *lines = out.splitlines()
    assert header.startswith("6,738,415,616 parameters")
    assert "per device" not in header
    assert [line.split("  ")[0] for line in lines] == names
    assert [line.split()[-1] for line in lines[:2]] == ["16.000", "12.000"]
    out = printed(capsys, "compare", *names, "--model", "llama-7b", "--mesh", "fsdp=64")
    assert out.splitlines()[0].endswith("per device")
    assert out.splitlines()[2].endswith("1.689 GB")


def test_csv_and_json_are_exact(capsys):
    arguments = ["compare", "adamw", "adam(b1=0.8)", "--model", "gpt2-small"]
    arguments += ["--mesh", "data=2,fsdp=2"]
    rows = list(csv.DictReader(io.StringIO(printed(capsys, *arguments, "--csv"))))
    entries = json.loads(printed(capsys, *arguments, "--json"))
    assert len(rows) == len(entries) == 2
    for row, entry in zip(rows, entries, strict=True):
        assert row["model"] == entry["model"] == "gpt2-small"
        assert row["mesh"] == "data=2,fsdp=2"
        assert row["optimizer"] == entry["recipe"]["optimizer"]
        assert row["master"] == row["lora"] == ""
        assert row["num_params"] == str(entry["num_params"]) == "124439808"
        for part in ("params", "grads", "state", "total"):
            assert row[f"{part}_bytes"] == str(entry[part])
            assert row[f"{part}_bytes_per_device"] == str(entry["per_device"][part])
    out = printed(capsys, "memory", "--model", "gpt2-small", "--csv")
    (row,) = csv.DictReader(io.StringIO(out))
    assert row["mesh"] == row["total_bytes_per_device"] == ""


def test_lora(capsys):
    arguments = ["memory", "--model", "llama-7b", "--weights", "bfloat16", "--json"]
    found = json.loads(printed(capsys, *arguments, "--lora", "16"))
    # 2 x 16 numbers for each of 4 x (4096 + 4096) and 3 x (4096 + 11008) in 32 layers.
    factors = 32 * 16 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert found["num_params"] == 6_738_415_616 + factors
    assert found["grads"] == 2 * factors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["memory", "--model", "gpt5"], "invalid choice: 'gpt5'"),
        (["memory", "--model", "gpt2-small", "--optimizer", "x"], "'adafactor', 'adag"),
        (["compare", "adamw", "x", "--model", "gpt2-small"], "optimizer='x' is not"),
        (["compare", "--model", "gpt2-small"], "the following arguments are required"),
        (["memory", "--model", "gpt2-small", "--mesh", "x=2"], "data, fsdp, tensor"),
        (["memory", "--model", "gpt2-small", "--json", "--csv"], "not allowed with"),
        (["memory", "--model", "gpt2-small", "--weights", "int8"], "'int8'"),
        (["memory", "--model", "gpt2-small", "--master", "24bit"], "weights='float32'"),
        (
            "compare lion8bit --model gpt2-small --state 8bit".split(),
            "inner is quantized already",
        ),
        ([], "COMMAND"),
    ],
    ids=" ".join,
)
def test_what_is_wrong_is_said(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_help_lists_what_there_is(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for name in (*MODELS, *OPTIMIZERS, "memory", "compare"):
        assert name in out
    with pytest.raises(SystemExit):
        main(["memory", "--help"])
    assert "--mesh" in capsys.readouterr().out


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_table_by_rich(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "100")
    tables.print_table(["a", "b"], [["  [red]x", "1"], ["y", "22"]], right=(1,))
    lines = terminal.getvalue().splitlines()
    assert any("│   [red]x │  1 │" in line for line in lines)


def test_a_terminal_without_rich_gets_plain_text(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(tables.importlib.util, "find_spec", lambda name: None)
    tables.print_table(["a", "b"], [["x", "1"]], right=(1,))
    assert terminal.getvalue() == "a  b\n-  -\nx  1\n"


def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "optaxplus", "memory", "--model", "vit-b/16"]
    out = subprocess.run(
        [*command, "--optimizer", "sgd", "--json"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ).stdout
    assert json.loads(out)["total"] == 8 * 86_567_656


def test_errors_speak_of_the_command_line(capsys):
    with pytest.raises(SystemExit):
        main(["memory", "--model", "gpt2-small", "--optimizer", "moun"])
    error = capsys.readouterr().err
    assert "error: optimizer='moun' is not allowed" in error
    assert "did you mean 'muon'?" in error
