"""Do moving averages that are kept in 8 bits follow their gradients?

    m <- b m + (1 - b) g,      m <- decode(encode(m))

An average over a thousand steps moves by 0.1 % in a step, a tenth of the gap between
codes: rounded to the nearest code it may stay where it is. Here independent normal
gradients are averaged, exactly and in the codes of `optaxplus.numerics.quantization`,
in columns of 256 entries whose sizes are log-normal (a block each), once with gradients
that stay as large as they are, once with a half of the entries whose gradients shrink
to a tenth after a third of the steps. Reported at the end, when six times as many
steps have passed as an average remembers: by how much the average in codes is off (norm
of the difference over norm of the exact one), for second moments also by how much an
update is that it divides (root mean square of sqrt(exact / coded) - 1), and where
gradients have shrunk the median of |coded / exact - 1|.

    python benchmarks/slow_averages.py                # a minute
    python benchmarks/slow_averages.py --columns 4 --memories 1 --out averages.json
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from optaxplus.numerics.quantization import dequantize, quantize

# A script's own folder, also where the tests load it by its path.
sys.path.insert(0, str(Path(__file__).resolve().parent))
import train_gpt_learning_rates as sweep

RESULTS = Path(__file__).parent / "results" / "slow_averages.json"
BLOCK = 256
FIRST, SECOND = (0.9, 0.95, 0.99), (0.95, 0.99, 0.999)
# name: (code, whether it rounds in turn)
CODINGS = {
    "root, in turn": ("root", True),
    "root, nearest": ("root", False),
    "dynamic": ("dynamic", False),
}


@partial(jax.jit, static_argnames=("coding", "second", "columns", "steps", "shrinks"))
def average(
    coding: str | None,
    decay: float,
    key: jax.Array,
    *,
    second: bool,
    columns: int,
    steps: int,
    shrinks: bool,
) -> tuple[jax.Array, jax.Array]:
    """The average after all steps, and which of its gradients have shrunk."""
    of_sizes, of_shrunk, of_grads = jax.random.split(key, 3)
    shape = (BLOCK, columns)
    sizes = jnp.exp(jax.random.normal(of_sizes, shape))
    shrunk = jax.random.bernoulli(of_shrunk, 0.5, shape) & shrinks

    def step(m: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        g = sizes * jax.random.normal(jax.random.fold_in(of_grads, index), shape)
        g = jnp.where(shrunk & (index >= steps // 3), 0.1 * g, g)
        m = decay * m + (1 - decay) * (g * g if second else g)
        if coding is not None:
            code, in_turn = CODINGS[coding]
            how = {"signed": not second, "code": code, "block_size": BLOCK}
            codes, scales = quantize(m, **how, step=index if in_turn else None)
            m = dequantize(codes, scales, **how)
        return m, None

    return jax.lax.scan(step, jnp.zeros(shape), jnp.arange(steps))[0], shrunk


def compare(columns: int, memories: int, seed: int) -> list[dict[str, Any]]:
    """What every coding does to every average, with both kinds of gradients."""
    lines = []
    for second, decays in ((False, FIRST), (True, SECOND)):
        for decay in decays:
            for shrinks in (False, True):
                mean = partial(
                    average,
                    decay=decay,
                    key=jax.random.key(seed),
                    second=second,
                    columns=columns,
                    steps=round(memories / (1 - decay)),
                    shrinks=shrinks,
                )
                exact, shrunk = mean(None)
                for coding in CODINGS:
                    coded, _ = mean(coding)
                    norm = jnp.linalg.norm
                    change = norm(coded - exact) / norm(exact)
                    update = jnp.sqrt(exact / coded) - 1 if second else None
                    lines.append(
                        {
                            "moment": "second" if second else "first",
                            "decay": decay,
                            "gradients": "half shrink" if shrinks else "stationary",
                            "code": coding,
                            "change": float(change),
                            "update_change": None
                            if update is None
                            else float(jnp.sqrt(jnp.mean(update * update))),
                            "shrunken": float(
                                jnp.median(jnp.abs(coded / exact - 1)[shrunk])
                            )
                            if shrinks
                            else None,
                        }
                    )
    return lines


def main() -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description="Moving averages in 8 bits.")
    parser.add_argument("--columns", type=int, default=64, help="(default: 64)")
    parser.add_argument(
        "--memories",
        type=int,
        default=6,
        help="steps, in units of 1 / (1 - decay) (default: 6)",
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    lines = compare(options.columns, options.memories, options.seed)
    document = {
        "device": sweep.device(),
        "versions": sweep.versions(),
        "date": sweep.datetime.date.today().isoformat(),
        "arguments": {
            key: getattr(options, key) for key in ("columns", "memories", "seed")
        },
        "averages": lines,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    table = Table("moment", "decay", "gradients", "code", "off", "update", "shrunken")
    for line in lines:
        update, shrunken = line["update_change"], line["shrunken"]
        table.add_row(
            line["moment"],
            f"{line['decay']}",
            line["gradients"],
            line["code"],
            f"{100 * line['change']:.1f} %",
            "-" if update is None else f"{100 * update:.1f} %",
            "-" if shrunken is None else f"{100 * shrunken:.0f} %",
        )
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
