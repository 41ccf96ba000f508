"""How near do the settings of Newton-Schulz come to the polar factor, for what work?

Every coefficient table, with the numbers of steps that it is defined for, in the
standard and in the Gram form, with products in float32, bfloat16 and float16, on

- the momenta that Muon orthogonalizes in the job of `examples/train_gpt.py`, at several
  steps of the run,
- random matrices, and matrices with condition numbers from 1 to 1e6 (singular values
  equally spaced in the logarithm),

each in two shapes, 128 x 128 and 128 x 512. The error is the distance to the exact
polar factor (singular value decomposition in float64), relative, root mean square over
the matrices of a set; the work is the number of scalar multiplications in matrix
products, in units of one product of the square with the matrix.

    python benchmarks/orthogonality.py            # trains first, then some ten minutes
    python benchmarks/orthogonality.py --small    # a minute, without momenta

Written to `--out`: `orthogonality.json` (every number) and `orthogonality.png`. The
momenta are kept in `--momenta` and read from there the next time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib import pyplot as plt
from rich.console import Console
from rich.progress import track

import optaxplus as ox
from optaxplus.numerics import polar_factor
from optaxplus.numerics.matrix_axes import resolve_axes, to_matrices
from optaxplus.numerics.newton_schulz import multiplications, newton_schulz

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import train_gpt
from comparison import device, versions
from gpt import GPT, GPTConfig
from text import standard_library

RESULTS = Path(__file__).parent / "results"
MOMENTA = Path("runs/orthogonality")
SHAPES = {"square": (128, 128), "long": (128, 512)}
CAPTURED = (1, 30, 200, 600, 1200)
CONDITIONS = tuple(10**power for power in range(7))
# Matrices of every synthetic set.
COPIES = 4
DTYPES = ("bfloat16", "float16", "float32")
# Table -> numbers of steps. The last two are made for rows scaled by "aol".
TABLES: dict[str, Sequence[int]] = {
    "gram_newton_schulz": range(3, 8),
    "polar_express": range(3, 8),
    "polar_express_paper": range(5, 9),
    "jordan": range(3, 8),
    "cubic": (5, 10, 15, 20),
    "you": (5,),
    "cans": (5,),
    "cubic5": (5,),
    "deepseek": (10,),
    "turbo": (4,),
    "aol": (4,),
}
DEFAULT, STEPS = "gram_newton_schulz", 5
# What most implementations have, and with what norm.
JORDAN = "jordan"
OTHER_NORMS = {DEFAULT: ("frobenius", "aol"), JORDAN: ("frobenius",)}


@dataclass(frozen=True)
class Setting:
    """Arguments of `polar_factor`."""

    ns_coeffs: str
    ns_steps: int
    method: str
    normalization: str
    compute_dtype: str


def usual_steps(table: str) -> int:
    """The number of steps that a table is used with."""
    return STEPS if STEPS in TABLES[table] else TABLES[table][0]


def usual_norm(table: str) -> str:
    """The normalization that a table is used with, or made for."""
    return "aol" if table in ("turbo", "aol") else "schatten"


def settings(small: bool) -> Iterator[Setting]:
    """Everything that is allowed."""
    for table, all_steps in TABLES.items():
        for steps in [usual_steps(table)] if small else all_steps:
            norms = [
                usual_norm(table),
                *(OTHER_NORMS.get(table, ()) if steps == STEPS else ()),
            ]
            for norm in norms:
                for dtype in DTYPES[:1] if small else DTYPES:
                    for method in ("standard", "gram"):
                        setting = Setting(table, steps, method, norm, dtype)
                        if is_allowed(setting):
                            yield setting


def is_allowed(setting: Setting) -> bool:
    """Whether the library takes it: not every table bears the Gram form."""
    try:
        newton_schulz("benchmark", **asdict(setting), eps=1e-7)
    except ValueError:
        return False
    return True


def momenta(path: Path, seed: int, console: Console) -> dict[str, list[np.ndarray]]:
    """What Muon orthogonalizes in the job of the example, by step."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **capture(seed, console))
    sets: dict[str, list[np.ndarray]] = {}
    with np.load(path) as arrays:
        for key, array in arrays.items():
            step, _ = key.split(":")
            sets.setdefault(f"momenta, step {step}", []).append(array)
    return sets


def capture(seed: int, console: Console) -> dict[str, np.ndarray]:
    """Trains, and keeps the hidden matrices' momenta of some steps."""
    config = GPTConfig(
        width=train_gpt.WIDTH,
        depth=train_gpt.DEPTH,
        head_size=train_gpt.HEAD_SIZE,
        context=train_gpt.CONTEXT,
    )
    task = train_gpt.Task(
        GPT(config), standard_library(), steps=train_gpt.STEPS, seed=seed
    )
    tx = train_gpt.build_optimizer(train_gpt.RECIPES["muon"], task.steps)
    # As in that recipe.
    momentum = optax.chain(
        ox.clip_by_global_norm(1.0), ox.scale_by_ema(0.95, nesterov=True)
    )
    loss = jax.value_and_grad(partial(train_gpt.next_token_loss, task.model))

    @jax.jit
    def train_step(params: Any, state: Any, windows: jax.Array) -> Any:
        _, grads = loss(params, windows)
        updates, rule = tx.update(grads, state[0], params)
        directions, average = momentum.update(grads, state[1])
        return optax.apply_updates(params, updates), (rule, average), directions

    params = task.initial_params()
    roles = jax.tree.leaves(ox.infer_roles(params))
    axes = jax.tree.leaves(
        ox.infer_matrix_axes(params), is_leaf=lambda x: isinstance(x, ox.MatrixAxes)
    )
    state, kept = (tx.init(params), momentum.init(params)), {}
    for step in track(
        range(1, task.steps + 1), "training", console=console, transient=True
    ):
        params, state, directions = train_step(params, state, task.batch(step - 1))
        if step in CAPTURED:
            leaves = enumerate(
                zip(roles, axes, jax.tree.leaves(directions), strict=True)
            )
            for index, (role, leaf_axes, array) in leaves:
                if role == "hidden":
                    resolved = resolve_axes(leaf_axes, array.shape)
                    kept[f"{step}:{index}"] = np.asarray(to_matrices(array, resolved))
    return kept


def synthetic(seed: int) -> dict[str, list[np.ndarray]]:
    """Random matrices of both shapes, and of known singular values."""
    generator = np.random.default_rng(seed)
    sets: dict[str, list[np.ndarray]] = {
        "random": [
            generator.standard_normal(shape)
            for shape in SHAPES.values()
            for _ in range(COPIES)
        ]
    }
    for condition in CONDITIONS:
        sets[f"condition {condition:g}"] = [
            with_condition(condition, shape, generator)
            for shape in SHAPES.values()
            for _ in range(COPIES)
        ]
    return sets


def with_condition(
    condition: float, shape: tuple[int, int], generator: np.random.Generator
) -> np.ndarray:
    """A matrix with singular values from 1 down to 1 / condition."""
    left, _, right = np.linalg.svd(
        generator.standard_normal(shape), full_matrices=False
    )
    return left * np.geomspace(1.0, 1.0 / condition, len(left)) @ right


def by_shape(
    sets: dict[str, list[np.ndarray]],
) -> dict[str, dict[str, np.ndarray]]:
    """Shape -> set -> stack of wide matrices."""
    wide = {
        name: [np.float32(x if x.shape[0] <= x.shape[1] else x.T) for x in matrices]
        for name, matrices in sets.items()
    }
    return {
        kind: {
            name: np.stack([x for x in matrices if x.shape == shape])
            for name, matrices in wide.items()
        }
        for kind, shape in SHAPES.items()
    }


def exact_factors(stack: np.ndarray) -> np.ndarray:
    """The polar factors of a stack."""
    left, _, right = np.linalg.svd(stack.astype(np.float64), full_matrices=False)
    return left @ right


def measure(
    setting: Setting, stacks: dict[str, np.ndarray], exact: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Errors and largest singular values of one setting, by set."""
    function = partial(polar_factor, **asdict(setting))
    together = jnp.concatenate([jnp.asarray(stack) for stack in stacks.values()])
    # Compiled in a hurry: it runs once.
    options = {"xla_backend_optimization_level": 0}
    found = np.float64(jax.jit(function, compiler_options=options)(together))
    parts = np.split(found, np.cumsum([len(stack) for stack in stacks.values()])[:-1])
    errors, largest = {}, {}
    for (name, factors), part in zip(exact.items(), parts, strict=True):
        square = np.sum((part - factors) ** 2, axis=(1, 2)) / factors.shape[1]
        errors[name] = float(f"{np.sqrt(np.mean(square)):.4g}")
        values = jnp.linalg.svd(jnp.float32(part), compute_uv=False)
        largest[name] = float(f"{values.max():.4g}")
    return {"errors": errors, "largest_singular_value": largest}


def work(setting: Setting, shape: tuple[int, int]) -> float:
    """Multiplications in units of one product of the square with the matrix."""
    iteration = newton_schulz("benchmark", **asdict(setting), eps=1e-7)
    short, long = shape
    count = multiplications(iteration.blocks(short, long), short, long)
    return count / (short * short * long)


def run(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Measures every setting on every set."""
    sets = synthetic(options.seed)
    if not options.small:
        path = options.momenta / f"momenta_seed_{options.seed}.npz"
        sets = momenta(path, options.seed, console) | sets
    shapes = by_shape(sets)
    exact = {
        kind: {name: exact_factors(stack) for name, stack in stacks.items()}
        for kind, stacks in shapes.items()
    }
    rows = []
    for setting in track(
        list(settings(options.small)), "settings", console=console, transient=True
    ):
        for kind, stacks in shapes.items():
            rows.append(
                asdict(setting)
                | {"shape": kind, "work": round(work(setting, SHAPES[kind]), 3)}
                | measure(setting, stacks, exact[kind])
            )
        jax.clear_caches()
    return rows


# Figure


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Error against work, and error against the condition number."""
    sets = list(rows[0]["errors"])
    real = [name for name in sets if name.startswith("momenta")]
    # The run is at its most uneven spectra in the beginning.
    shown = [*(real[1::3] or ["random", "condition 100"]), "condition 1000"]
    figure, axes = plt.subplots(
        3, 3, figsize=(15, 11), layout="constrained", squeeze=False
    )
    styles = {
        table: {"color": plt.cm.tab20(index), "marker": "osv^Dx*P+hX"[index]}
        for index, table in enumerate(TABLES)
    }
    for row_axes, kind in zip(axes, SHAPES, strict=False):
        for axis, name in zip(row_axes, shown, strict=False):
            against_work(axis, rows, kind, name, styles)
            axis.set_title(f"{name}, {' x '.join(map(str, SHAPES[kind]))}")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    usual = [row for row in rows if is_usual(row) and row["method"] == "standard"]
    in_bfloat16 = [row for row in usual if row["compute_dtype"] == "bfloat16"]
    last = axes[-1]
    against_condition(
        last[0],
        [(row["ns_coeffs"], row, styles[row["ns_coeffs"]]) for row in in_bfloat16],
        "tables, bfloat16",
    )
    against_condition(
        last[1],
        [
            (
                f"{row['compute_dtype']}, {row['method']}",
                row,
                {"linestyle": "-" if row["method"] == "standard" else "--"},
            )
            for row in rows
            if is_usual(row) and row["ns_coeffs"] == DEFAULT
        ],
        f"dtypes and forms, {DEFAULT}",
    )
    against_condition(
        last[2],
        [
            (f"{row['ns_coeffs']}, {row['normalization']}", row, {})
            for row in rows
            if row["ns_coeffs"] in (DEFAULT, JORDAN)
            and row["ns_steps"] == STEPS
            and row["shape"] == "square"
            and row["method"] == "standard"
            and row["compute_dtype"] == "bfloat16"
        ],
        "normalizations, bfloat16",
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def is_usual(row: dict[str, Any]) -> bool:
    """Square, with the norm and the number of steps that a table is used with."""
    table = row["ns_coeffs"]
    expected = ("square", usual_steps(table), usual_norm(table))
    return (row["shape"], row["ns_steps"], row["normalization"]) == expected


def against_work(
    axis: Any, rows: list[dict[str, Any]], kind: str, name: str, styles: dict[str, Any]
) -> None:
    """Draws a curve over the numbers of steps for every table and form."""
    for table, style in styles.items():
        for method in ("standard", "gram"):
            points = [
                (row["work"], row["errors"][name])
                for row in rows
                if row["ns_coeffs"] == table
                and row["shape"] == kind
                and row["method"] == method
                and row["compute_dtype"] == "bfloat16"
                and row["normalization"] == usual_norm(table)
            ]
            if points:
                filled = method == "gram"
                axis.plot(
                    *zip(*points, strict=True),
                    **style,
                    linestyle="-" if filled else ":",
                    fillstyle="full" if filled else "none",
                    label=f"{table}, {method}",
                )
    axis.set(yscale="log", xlabel="work, products with the matrix", ylabel="error")
    axis.grid(alpha=0.3)


def against_condition(
    axis: Any, curves: list[tuple[str, dict[str, Any], dict[str, Any]]], title: str
) -> None:
    """Draws the error of some settings over the condition number."""
    for label, row, style in curves:
        errors = [row["errors"][f"condition {value:g}"] for value in CONDITIONS]
        axis.plot(CONDITIONS, errors, label=label, **style)
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="condition number",
        ylabel="error",
        title=title,
    )
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)


def main() -> int:
    """Measures, draws and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="to try the script")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--momenta",
        type=Path,
        default=MOMENTA,
        help="directory that keeps the momenta (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    matplotlib.use("Agg")
    console = Console(stderr=True)
    rows = run(options, console)
    options.out.mkdir(parents=True, exist_ok=True)
    document = {
        "device": device(),
        "versions": versions(),
        "seed": options.seed,
        "date": datetime.date.today().isoformat(),
        "shapes": SHAPES,
        "small": options.small,
    }
    lines = ",\n".join(json.dumps(row) for row in rows)
    head = json.dumps(document, indent=1).removesuffix("\n}")
    path = options.out / "orthogonality.json"
    path.write_text(f'{head},\n "rows": [\n{lines}\n]}}\n', "utf-8")
    plot(rows, options.out / "orthogonality.png")
    console.print(f"Written to {options.out}: orthogonality.json, orthogonality.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
