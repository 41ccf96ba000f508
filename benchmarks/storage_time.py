"""What does it cost in time to keep state in 8 bits and weights in bfloat16?

One optimizer step, update and application in one jitted function that is given the
memory of parameters and state, with each way of keeping them, and beside it the same
optimizer without: in float32 for state in 8 bits, on bfloat16 weights (which then do
not learn) for what keeps such weights exact.

    python benchmarks/storage_time.py                     # written to --out
    python benchmarks/storage_time.py --width 128 --layers 2 --out time.json

Both are measured in every round, in an order drawn anew; see `update_time.py` for what
makes such ratios fair. Nothing else should run.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import optaxplus as ox
from optaxplus.report.tables import format_table

# A script's own folder, also where the tests load it by its path.
sys.path.insert(0, str(Path(__file__).resolve().parent))
import update_time
from update_time import JaxStep

RESULTS = Path(__file__).parent / "results" / "storage_time.json"

ADAMW = ox.adamw(1e-3, weight_decay=0.1)
LION = ox.lion(1e-4, weight_decay=0.1)
MOMENTUM = ox.sgd(0.1, momentum=0.9)
# name: (how it is kept, the same without, dtype of the weights)
ROWS: dict[
    str, tuple[optax.GradientTransformation, optax.GradientTransformation, str]
] = {
    "quantize_state(adamw)": (ox.quantize_state(ADAMW), ADAMW, "float32"),
    "quantize_state(lion)": (ox.quantize_state(LION), LION, "float32"),
    "quantize_state(momentum)": (ox.quantize_state(MOMENTUM), MOMENTUM, "float32"),
    "quantize_state(adamw), dynamic": (
        ox.quantize_state(ADAMW, code="dynamic"),
        ADAMW,
        "float32",
    ),
    "master_weights(adamw)": (ox.master_weights(ADAMW), ADAMW, "bfloat16"),
    "master_weights(adamw, bits=24)": (
        ox.master_weights(ADAMW, bits=24),
        ADAMW,
        "bfloat16",
    ),
    "stochastic_rounding(adamw)": (ox.stochastic_rounding(ADAMW), ADAMW, "bfloat16"),
    "compensated(adamw)": (ox.compensated(ADAMW), ADAMW, "bfloat16"),
}


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures row after row."""
    generator = np.random.default_rng(options.seed)
    tree = update_time.shapes(options.width, options.layers)
    done = []
    for name, (tx, plain, dtype) in ROWS.items():
        print(name, file=sys.stderr)
        params = update_time.normal(tree, 0.02, dtype, generator)
        grads = update_time.normal(tree, 0.01, dtype, generator)
        shared = jax.tree.map(jax.numpy.asarray, grads)
        steps = {
            "kept": JaxStep(tx, params, shared),
            "plain": JaxStep(plain, params, shared),
        }
        start, others = time.perf_counter(), update_time.others_seconds()
        seconds = update_time.measure(steps, options.rounds, generator, lambda _: None)
        if others is not None:
            used = max(0.0, update_time.others_seconds() - others)
            others = round(used / (time.perf_counter() - start), 3)
        done.append(
            {
                "name": name,
                "weights": dtype,
                "ratio": update_time.quartiles(seconds["kept"] / seconds["plain"]),
                "others_cpus": others,
                **{
                    key: {
                        "milliseconds": update_time.quartiles(1e3 * seconds[key]),
                        **step.memory(),
                    }
                    for key, step in steps.items()
                },
            }
        )
        # The next row needs the memory.
        del steps
        jax.clear_caches()
        gc.collect()
    return done


def save(done: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Writes the rows with what they were measured on."""
    document = {
        "device": jax.devices()[0].device_kind,
        "processor": update_time.processor(),
        "cpus": os.cpu_count(),
        "threads": update_time.threads(),
        "versions": update_time.versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": options.seed,
        "arguments": {
            key: getattr(options, key) for key in ("width", "layers", "rounds")
        },
        "rows": done,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


def table(done: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The rows as text, the header first."""
    rows = [["kept so", "ms", "of the time without", "bytes of state", "temporaries"]]
    for row in done:
        low, middle, high = row["ratio"]
        kept = row["kept"]
        rows.append(
            [
                row["name"],
                f"{kept['milliseconds'][1]:.0f}",
                f"{middle:.2f} ({low:.2f} to {high:.2f})",
                f"{kept['state_bytes_per_param']:.2f}",
                f"{kept['temporary_bytes_per_param']:.2f}",
            ]
        )
    return rows


def main() -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    done = run(options)
    save(done, options)
    header, *lines = table(done)
    print(format_table(header, lines, right=range(1, len(header))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
