"""The table of a model of 70 billion parameters is what its script computes."""

import json
import sys

import pytest

from benchmarks import memory_table


@pytest.fixture(scope="module")
def document():
    return json.loads(memory_table.RESULTS.read_text("utf-8"))


def test_committed_results_are_those_of_today(document):
    fresh = memory_table.measure()
    assert fresh.keys() == document.keys() >= {"versions", "date"}
    for key in ("model", "mesh", "rows"):
        assert fresh[key] == document[key], "run benchmarks/memory_table.py"


def test_the_rule_of_thumb_holds(document):
    for row in document["rows"]:
        more = row["bytes_per_param"] - row["rule_of_thumb"]
        # Scales are 1/64 byte a moment, tables and head 0.8 % of the parameters, whose
        # moments take up to 6 bytes more; the factors of LoRA and of Adafactor's
        # statistics are as small.
        assert 0 <= more < 0.07, row["recipe"]


def test_without_codes_and_partitions_the_rule_is_exact(document):
    exact = {"sgd", "sgd(momentum=0.9)", "lion", "adamw"}
    rows = [
        row
        for row in document["rows"]
        if row["recipe"]["optimizer"] in exact
        and row["recipe"]["state"] is None
        and row["recipe"]["lora"] is None
    ]
    assert len(rows) == 6
    for row in rows:
        # Counters of steps, of four bytes each.
        assert 0 <= row["total"] - row["rule_of_thumb"] * row["num_params"] <= 8


def test_eight_bits_save_six_bytes(document):
    saved = memory_table.saved_by_codes(document) / 68_976_648_192
    # Less by the scales, 1/32, and by the moments of the tables, 0.4 % of 6 bytes.
    assert 5.94 < saved < 6
    assert f"saves {saved:.2f} bytes" in memory_table.markdown(document)


def test_every_device_of_64_has_its_part(document):
    for row in document["rows"]:
        share = row["per_device"]["total"] / row["total"]
        # Vectors are whole on every device: 0.002 % of the parameters.
        assert 1 / 64 <= share < 1.01 / 64


def test_it_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results" / "memory_table.json"
    monkeypatch.setattr(sys, "argv", ["memory_table.py", "--out", str(out)])
    memory_table.main()
    written = json.loads(out.read_text("utf-8"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(written["rows"]) == 2 + len(memory_table.ROWS)
    assert len(memory_table.markdown(written).splitlines()) == 4 + len(written["rows"])
