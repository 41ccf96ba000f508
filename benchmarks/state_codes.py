"""Which code of 8 bits does the least harm to the moments of a real training run?

The GPT of `examples/train_gpt.py` is trained with AdamW in float32. At some steps every
large moment is rounded to the nearest code in float64 NumPy, in blocks of 256 (with 4
bits 128) along the axis that `ox.quantize_state` takes, and the update is computed from
what is left. Reported for each code, as the mean over parameters and steps: by how much
the update of Adam changes (norm of the change over norm of the update) if the first, or
the second moment is coded; for first moments also the change of the moment itself,
which is what Muon and Lion see; and the share of entries that become 0. What many steps
of coding add up to is the matter of `slow_averages.py`.

    python benchmarks/state_codes.py                # a minute
    python benchmarks/state_codes.py --steps 20 --at 5 20 --out codes.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import optaxplus as ox
from optaxplus.numerics.quantization import blocks_of, dynamic_map

# A script's own folder, also where the tests load it by its path.
sys.path.insert(0, str(Path(__file__).resolve().parent))
import train_gpt_learning_rates as sweep
from train_gpt_learning_rates import train_gpt

RESULTS = Path(__file__).parent / "results" / "state_codes.json"
BLOCK = 256
EPS = 1e-8

Rounding = Callable[[np.ndarray], np.ndarray]


def power(exponent: float, sizes: int, x: np.ndarray) -> np.ndarray:
    """|x| = (c / sizes)^exponent; a non-negative x that is not 0 has c >= 1."""
    code = np.rint(sizes * np.abs(x) ** (1 / exponent))
    if sizes in UNSIGNED_SIZES:
        code = np.where(x > 0, np.maximum(code, 1), code)
    return np.sign(x) * (code / sizes) ** exponent


def logarithm(decades: float, sizes: int, x: np.ndarray) -> np.ndarray:
    """Sizes at equal ratios from 10^-decades to 1, and 0."""
    size = np.abs(x)
    code = np.rint((np.log10(np.maximum(size, 1e-38)) / decades + 1) * (sizes - 1)) + 1
    code = np.clip(code, 1 if sizes in UNSIGNED_SIZES else 0, sizes)
    code = np.where(size > 0, code, 0)
    read = 10.0 ** (-decades * (1 - (code - 1) / (sizes - 1)))
    return np.sign(x) * np.where(code > 0, read, 0.0)


def floating(exponent_bits: int, mantissa_bits: int, x: np.ndarray) -> np.ndarray:
    """A floating-point format whose largest number is 1, with denormal ones."""
    size = np.abs(x)
    lowest = 1 - 2**exponent_bits
    exponent = np.maximum(np.floor(np.log2(np.maximum(size, 1e-38))), lowest)
    spacing = 2.0 ** (exponent - mantissa_bits)
    return np.sign(x) * np.minimum(np.rint(size / spacing) * spacing, 1.0)


def dynamic(signed: bool, x: np.ndarray) -> np.ndarray:
    """The map of bitsandbytes."""
    table = dynamic_map(signed).astype(np.float64)
    code = np.searchsorted((table[1:] + table[:-1]) / 2, x, side="right")
    if not signed:
        code = np.where(x > 0, np.maximum(code, 1), code)
    return table[code]


UNSIGNED_SIZES = (255, 15)
FIRST: dict[str, Rounding] = {
    "x": partial(power, 1, 127),
    "x^1/2": partial(power, 2, 127),
    "x^1/3": partial(power, 3, 127),
    "x^1/4": partial(power, 4, 127),
    "x^1/5": partial(power, 5, 127),
    "dynamic": partial(dynamic, True),
    "float, 3 + 4 bits": partial(floating, 3, 4),
    "float, 4 + 3 bits": partial(floating, 4, 3),
    "logarithm, 7 decades": partial(logarithm, 7, 127),
    "x^1/2, 4 bits": partial(power, 2, 7),
    "x^1/4, 4 bits": partial(power, 4, 7),
}
SECOND: dict[str, Rounding] = {
    "x^1/2": partial(power, 2, 255),
    "x^1/4": partial(power, 4, 255),
    "x^1/6": partial(power, 6, 255),
    "x^1/8": partial(power, 8, 255),
    "dynamic": partial(dynamic, False),
    "float, 4 + 4 bits": partial(floating, 4, 4),
    "float, 5 + 3 bits": partial(floating, 5, 3),
    "logarithm, 10 decades": partial(logarithm, 10, 255),
    "x^1/4, 4 bits": partial(power, 4, 15),
    "x^1/6, 4 bits": partial(power, 6, 15),
}


def moments(steps: int, at: list[int], seed: int) -> list[tuple[str, Any, Any]]:
    """(parameter, first, second moment) of large hidden parameters at some steps."""
    task = train_gpt.Task(sweep.model(), sweep.standard_library(), steps, seed)
    recipe = train_gpt.RECIPES["adamw"]
    tx = train_gpt.build_optimizer(recipe, steps)
    params = task.initial_params()
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any, windows: jax.Array) -> tuple[Any, Any]:
        grads = jax.grad(partial(train_gpt.loss_in_float32, task.model))(
            params, windows
        )
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    found = []
    for index in range(steps):
        params, state = step(params, state, task.batch(index))
        if index + 1 in at:
            mu, nu = (
                dict(jax.tree_util.tree_leaves_with_path(optax.tree.get(state, name)))
                for name in ("mu", "nu")
            )
            roles = dict(jax.tree_util.tree_leaves_with_path(ox.infer_roles(params)))
            found += [
                (jax.tree_util.keystr(path), *(np.asarray(x, np.float64) for x in pair))
                for path in mu
                if mu[path].size >= 4096 and roles[path] != "embedding"
                for pair in [(mu[path], nu[path])]
            ]
    return found


def in_blocks(x: np.ndarray, block: int) -> np.ndarray:
    """(blocks, entries of a block): along the axis that `ox.quantize_state` takes."""
    blocks = blocks_of(x.shape, block)
    x = np.moveaxis(x, blocks.axis, -1)
    return x.reshape(-1, blocks.groups * blocks.group)


def changes(
    found: list[tuple[str, Any, Any]], codes: dict[str, Rounding], *, first: bool
) -> list[dict[str, Any]]:
    """What every code does, as the mean over parameters and steps."""
    lines = []
    for name, code in codes.items():
        block = BLOCK // 2 if "4 bits" in name else BLOCK
        update_change, moment_change, lost = [], [], []
        for _, mu, nu in found:
            m, v = in_blocks(mu, block), in_blocks(nu, block)
            x = m if first else v
            scale = np.abs(x).max(axis=-1, keepdims=True)
            scale[scale == 0] = 1.0
            read = code(x / scale) * scale
            exact = m / (np.sqrt(v) + EPS)
            coded = read / (np.sqrt(v) + EPS) if first else m / (np.sqrt(read) + EPS)
            update_change.append(np.linalg.norm(coded - exact) / np.linalg.norm(exact))
            moment_change.append(np.linalg.norm(read - x) / np.linalg.norm(x))
            lost.append(np.mean(read[x != 0] == 0))
        lines.append(
            {
                "code": name,
                "update_change": float(np.mean(update_change)),
                "moment_change": float(np.mean(moment_change)),
                "became_zero": float(np.mean(lost)),
            }
        )
    return lines


def main() -> int:
    """Trains, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--at", type=int, nargs="+", default=[10, 100, 400])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = moments(options.steps, options.at, options.seed)
    tables = {
        "first": changes(found, FIRST, first=True),
        "second": changes(found, SECOND, first=False),
    }
    document = {
        "job": sweep.job(),
        "device": sweep.device(),
        "versions": sweep.versions(),
        "date": sweep.datetime.date.today().isoformat(),
        "arguments": {"steps": options.steps, "at": options.at, "seed": options.seed},
        **tables,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    console = Console()
    for moment, lines in tables.items():
        table = Table(title=f"{moment} moments")
        for title in ("code", "update changes by", "moment changes by", "become 0"):
            table.add_column(title, justify="left" if title == "code" else "right")
        for line in lines:
            table.add_row(
                line["code"],
                *(
                    f"{100 * line[key]:.2f} %"
                    for key in ("update_change", "moment_change", "became_zero")
                ),
            )
        console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
