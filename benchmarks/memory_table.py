"""What does a model of 70 billion parameters take, with each optimizer?

The table that textbooks print, for the shapes of Llama 2 70B, of which nothing is
allocated: bytes of weights, gradients, masters and moments from the real states of the
optimizers (`jax.eval_shape`), in all and on each device of a mesh, beside the rule of
thumb that textbooks add up: 4 bytes for a number in float32, 2 in bfloat16, 1 in 8
bits. Activations are not counted.

    python benchmarks/memory_table.py        # a few seconds; written to --out

The two differ by what the rule leaves out: scales of 8-bit codes (1/32 byte for two
moments), tables of tokens, whose moments stay in float32, and what Muon leaves to
AdamW, which has a second moment.

Sources of the rule: Rajbhandari et al., ZeRO, arXiv 1910.02054, section 3.1 (16 bytes
for mixed precision, with gradients in 16 bits), and for gradients in 32 bits (18 bytes)
and state in 8 https://huggingface.co/docs/transformers/model_memory_anatomy.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from optaxplus.report.recipes import Recipe
from optaxplus.report.tables import format_table

RESULTS = Path(__file__).parent / "results" / "memory_table.json"
MODEL = "llama-70b"
MESH = {"fsdp": 64}
MIXED = {"weights": "bfloat16", "grads": "float32", "master": "float32"}
NARROW = {"weights": "bfloat16", "master": "24bit", "state": "8bit"}
MOMENTUM = "sgd(momentum=0.9)"

# How everything is kept, the recipe, and by the rule of thumb its bytes per parameter.
ROWS = (
    ("float32", Recipe("sgd"), 8),
    ("float32", Recipe(MOMENTUM), 12),
    ("float32", Recipe("adafactor"), 8),
    ("float32", Recipe("lion"), 12),
    ("float32", Recipe("muon"), 12),
    ("float32", Recipe("adamw"), 16),
    ("mixed", Recipe("adafactor", **MIXED), 10),
    ("mixed", Recipe("lion", **MIXED), 14),
    ("mixed", Recipe("muon", **MIXED), 14),
    ("mixed", Recipe("adamw", **MIXED), 18),
    ("mixed, 8-bit state", Recipe("lion", **MIXED, state="8bit"), 11),
    ("mixed, 8-bit state", Recipe("muon", **MIXED, state="8bit"), 11),
    ("mixed, 8-bit state", Recipe("adamw", **MIXED, state="8bit"), 12),
    ("24-bit weights, 8-bit state", Recipe("muon", **NARROW), 6),
    ("24-bit weights, 8-bit state", Recipe("adamw", **NARROW), 7),
    ("LoRA of rank 16", Recipe("adamw", **MIXED, lora=16), 2),
)


def measure() -> dict[str, Any]:
    """Every row of the table, and what it was computed with."""
    rows = [
        {
            "storage": storage,
            "recipe": asdict(recipe),
            "rule_of_thumb": rule,
            **recipe.report(MODEL, MESH).to_dict(),
        }
        for storage, recipe, rule in ROWS
    ]
    packages = ("jax", "optax")
    return {
        "model": MODEL,
        "mesh": MESH,
        "rows": rows,
        "versions": {
            "python": platform.python_version(),
            **{package: metadata.version(package) for package in packages},
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def table(document: Mapping[str, Any]) -> list[list[str]]:
    """The header and the rows for a reader."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in document["mesh"].items())
    parts = ("params", "grads", "state", "total")
    header = ["optimizer", "kept as", "weights", "gradients", "state", "total, GB"]
    header += ["bytes per parameter", "rule of thumb", f"GB on a device, {mesh}"]
    return [
        header,
        *(
            [
                row["recipe"]["optimizer"],
                row["storage"],
                *(f"{row[part] / 1e9:,.1f}" for part in parts),
                f"{row['bytes_per_param']:.2f}",
                f"{row['rule_of_thumb']}",
                f"{row['per_device']['total'] / 1e9:.2f}",
            ]
            for row in document["rows"]
        ),
    ]


def saved_by_codes(document: Mapping[str, Any]) -> int:
    """Bytes by which 8-bit state makes mixed AdamW smaller."""
    total = {
        row["recipe"]["state"]: row["total"]
        for row in document["rows"]
        if row["recipe"] | {"state": None} == asdict(Recipe("adamw", **MIXED))
    }
    return total[None] - total["8bit"]


def markdown(document: Mapping[str, Any]) -> str:
    """The block of the README."""
    num_params = document["rows"][0]["num_params"]
    header, *rows = table(document)
    saved = saved_by_codes(document)
    return "\n".join(
        [
            f"| {' | '.join(header)} |",
            "|---|---|" + "---:|" * (len(header) - 2),
            *(f"| `{row[0]}` | {' | '.join(row[1:])} |" for row in rows),
            "",
            f"Llama 2 70B, {num_params:,} parameters, before activations; weights, "
            "gradients and state in GB of 1e9 bytes. Mixed: weights in bfloat16, "
            "gradients and a master, which is state, in float32. 24-bit weights: "
            "bfloat16 and 8 bits more, gradients in bfloat16. Beside mixed AdamW 8-bit "
            f"state saves {saved / num_params:.2f} bytes per parameter, "
            f"{saved / 1e9:.0f} GB; by the rule of thumb of textbooks 6, or 420 GB of "
            "70 billion parameters. The rule leaves out the scales of codes, tables of "
            "tokens, whose moments stay in float32, and that Muon leaves these and the "
            "output head to AdamW. From the real states of the optimizers, by "
            "`python benchmarks/memory_table.py`.",
        ]
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to write it")
    options = parser.parse_args()
    document = measure()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    header, *rows = table(document)
    print(format_table(header, rows, right=range(2, len(header))))


if __name__ == "__main__":
    main()
