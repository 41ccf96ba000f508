"""What do the optimizers with curvature cost beside AdamW and Muon?

One step on the hidden matrices of transformer layers (four d x d, one d x 4d and one
4d x d each): the update and its application, in one jitted function that is given the
memory of parameters and state. Some steps refresh what changes slowly (bases, roots,
factors, the diagonal of the Hessian) and others do not; both are measured, and the
mean step with a refresh in every k-th follows: plain + (refresh - plain) / k.

    python benchmarks/curvature_cost.py          # CPU times
    python benchmarks/curvature_cost.py --tpu    # by the compiler for TPU v5e
    python benchmarks/curvature_cost.py --width 32 --layers 1 --rounds 2   # seconds

CPU: all steps of all methods run once in every round, in an order drawn anew; see
update_time.py for what makes such ratios fair. Every step has the next of a few
gradients, so that factors have their full rank. Nothing else should run, least of all
here: decompositions are those of SciPy's OpenBLAS, whose threads wait for each other
thousands of times, each time for a time slice of the system if a processor is busy.
With the environment variable OPENBLAS_NUM_THREADS=1 they do not; it is written down.

TPU: each step is compiled for one chip by libtpu, without one, and nothing is timed.
From the program come products, those of float32 at the highest precision apart (six
passes of the matrix unit, which multiplies bfloat16), and bytes that are moved from and
to HBM; the estimate is the longer one of the times at the peaks of the chip. That is a
lower bound: kernels of the compiler for QR and for blocks of triangular solves, which
use the vector unit, and the start of loop iterations are not in it. Shampoo is there by
Newton's method: eigendecompositions take the compiler too long.

Sophia gets its estimate of the Hessian ready: what it costs is up to the caller, for
`gauss_newton_bartlett` another gradient in every k-th step. APOLLO draws its projection
anew in every step, so a refresh costs it nothing.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# A script's own folder, also where the tests load it by its path.
sys.path.insert(0, str(Path(__file__).resolve().parent))
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pod_cost
import update_time
from curvature_methods import COUNTS, METHODS, MethodStep, before, given
from hlo_cost import hlo_cost
from hlo_traffic import hbm_bytes
from jax.sharding import SingleDeviceSharding
from muon_time import shapes
from pod_devices import devices_of, found_apart, unavailable
from update_time import quartiles

from optaxplus.report.tables import format_table

RESULTS = Path(__file__).parent / "results" / "curvature_cost.json"
INTERVALS = (1, 10, 100)
PEERS = ("adamw", "muon")
GRADIENTS = 4  # A side of 4d has the rank of four gradients.
# Peaks of a TPU v5e: https://cloud.google.com/tpu/docs/v5e
FLOPS_PER_SECOND, BYTES_PER_SECOND = 197e12, 819e9
PASSES = 6  # Of the matrix unit for one float32 product of highest precision.
CPU_WIDTHS, CPU_LAYERS = (512, 768), 2
TPU_WIDTHS, TPU_LAYERS = (512,), 1
README_WIDTH = 512


def measure(
    steps: dict[str, MethodStep],
    rounds: int,
    first_rounds: int,
    generator: np.random.Generator,
) -> dict[str, dict[str, np.ndarray]]:
    """Seconds of every method and kind of step in every round."""
    seconds: dict[str, dict[str, list[float]]] = {
        name: {kind: [] for kind in step.method.kinds} for name, step in steps.items()
    }
    for index in range(rounds):
        jobs = [
            (name, kind)
            for name, kinds in seconds.items()
            for kind in kinds
            if kind != "first" or index < first_rounds
        ]
        for at in generator.permutation(len(jobs)):
            name, kind = jobs[at]
            steps[name].prepare(kind)
            time.sleep(update_time.PAUSE)
            start = time.perf_counter()
            steps[name]()
            seconds[name][kind].append(time.perf_counter() - start)
            steps[name].reset()
    return {
        name: {kind: np.array(values) for kind, values in kinds.items()}
        for name, kinds in seconds.items()
    }


def mean_step(found: dict[str, Any], interval: int) -> Any:
    """Of steps of which every `interval`-th refreshes."""
    plain = found["plain"]
    return plain + (found.get("refresh", plain) - plain) / interval


def summarize(
    steps: dict[str, MethodStep], seconds: dict[str, dict[str, np.ndarray]]
) -> dict[str, Any]:
    """By method; every time and ratio is [quartile, median, quartile]."""
    result = {}
    for name, step in steps.items():
        means = {str(k): mean_step(seconds[name], k) for k in INTERVALS}
        memory = step.memory()
        entry: dict[str, Any] = {
            "milliseconds": {
                kind: quartiles(1e3 * values) for kind, values in seconds[name].items()
            },
            "mean_milliseconds": {k: quartiles(1e3 * x) for k, x in means.items()},
            "state_bytes_per_param": memory["state_bytes_per_param"],
            "temporary_bytes_per_param": memory["temporary_bytes_per_param"],
        }
        for peer in PEERS:
            theirs = seconds[peer]["plain"]
            entry[f"ratio_to_{peer}"] = {
                k: quartiles(x / theirs) for k, x in means.items()
            }
        result[name] = entry
    return result


def run(width: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measures one width on this device."""
    generator = np.random.default_rng(options.seed)
    tree = shapes(width, options.layers or CPU_LAYERS)
    params = update_time.normal(tree, 0.02, "float32", generator)
    gradients = [
        jax.tree.map(jnp.asarray, update_time.normal(tree, 0.01, "float32", generator))
        for _ in range(GRADIENTS)
    ]
    steps = {}
    for name in (name for name in METHODS if name in {*PEERS, *options.methods}):
        print(f"width {width}: {name}", file=sys.stderr, flush=True)
        steps[name] = MethodStep(name, width, params, gradients)
        steps[name].check()
    start, others = time.perf_counter(), update_time.others_seconds()
    seconds = measure(steps, options.rounds, options.first_rounds, generator)
    if others is not None:
        used = max(0.0, update_time.others_seconds() - others)
        others = round(used / (time.perf_counter() - start), 3)
    result = {
        "width": width,
        "device": jax.devices()[0].device_kind,
        "processor": update_time.processor(),
        "cpus": os.cpu_count(),
        "threads": update_time.threads(),
        "others_cpus": others,
        "environment": update_time.environment(),
        "versions": update_time.versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": options.seed,
        "arguments": {
            "layers": options.layers or CPU_LAYERS,
            "rounds": options.rounds,
            "first_rounds": options.first_rounds,
        },
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "methods": summarize(steps, seconds),
    }
    del steps
    jax.clear_caches()
    gc.collect()
    return result


@dataclass(frozen=True)
class Case:
    """A program for a TPU."""

    method: str
    kind: str
    width: int
    layers: int

    @property
    def key(self) -> str:
        """Names the row in the results."""
        return " / ".join(map(str, asdict(self).values()))


def compile_for_tpu(case: Case) -> dict[str, Any]:
    """The cost of one step of a known kind, so that no conditional is left of it."""
    tx = METHODS[case.method].make(case.width)
    sharding = SingleDeviceSharding(devices_of("v5e", 8)[0])

    def placed(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, before(case.kind, state), params)
        return optax.apply_updates(params, updates), state

    params = placed(
        jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
            shapes(case.width, case.layers),
            is_leaf=lambda node: isinstance(node, tuple),
        )
    )
    state = placed(jax.eval_shape(tx.init, params))
    start = time.perf_counter()
    compiled = (
        jax.jit(step, donate_argnums=(0, 1))
        .lower(params, state, given(case.method, params, params))
        .compile()
    )
    seconds = time.perf_counter() - start
    text = compiled.as_text()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return {
        **estimate(text),
        "temporary_bytes_per_param": temporary
        / sum(leaf.size for leaf in jax.tree.leaves(params)),
        "compile_seconds": round(seconds, 1),
    }


def estimate(text: str) -> dict[str, float]:
    """Products, bytes and the least time of a program on one TPU v5e."""
    cost, moved = hlo_cost(text), hbm_bytes(text)
    passes = cost.flops + (PASSES - 1) * cost.flops_highest
    matrix, memory = passes / FLOPS_PER_SECOND, moved / BYTES_PER_SECOND
    return {
        "flops_bfloat16": cost.flops - cost.flops_highest,
        "flops_float32": cost.flops_highest,
        "hbm_bytes": moved,
        "matrix_unit_milliseconds": 1e3 * matrix,
        "hbm_milliseconds": 1e3 * memory,
        "least_milliseconds": 1e3 * max(matrix, memory),
    }


def cases(width: int, layers: int) -> list[Case]:
    """The programs for one width."""
    return [
        Case(name, kind, width, layers)
        for name, method in METHODS.items()
        if method.on_tpus
        for kind in method.kinds
    ]


def tpu_milliseconds(
    rows: dict[str, Any], width: int, layers: int
) -> dict[str, dict[str, float]]:
    """The least times by method and kind; methods that did not compile are left out."""
    found: dict[str, dict[str, float]] = {}
    failed = set()
    for case in cases(width, layers):
        milliseconds = rows.get(case.key, {}).get("found", {}).get("least_milliseconds")
        if milliseconds is None:
            failed.add(case.method)
        else:
            found.setdefault(case.method, {})[case.kind] = milliseconds
    return {name: kinds for name, kinds in found.items() if name not in failed}


def cpu_table(model: dict[str, Any]) -> str:
    """The times of one width as text."""
    header = ("step", *(f"{kind} ms" for kind in COUNTS))
    header += tuple(f"/{peer}, {k}" for peer in PEERS for k in INTERVALS)
    header += ("state B", "temp B")
    lines = []
    for name, entry in model["methods"].items():
        times = (entry["milliseconds"].get(kind) for kind in COUNTS)
        lines.append(
            [
                name,
                *("-" if found is None else f"{found[1]:.1f}" for found in times),
                *(
                    update_time.spread(entry[f"ratio_to_{peer}"][str(k)])
                    for peer in PEERS
                    for k in INTERVALS
                ),
                f"{entry['state_bytes_per_param']:.1f}",
                f"{entry['temporary_bytes_per_param']:.1f}",
            ]
        )
    return format_table(header, lines, right=range(1, len(header)))


def tpu_table(rows: Sequence[dict[str, Any]]) -> str:
    """What was compiled as text."""
    header = ("step", "kind", "bf16 GFLOP", "f32 GFLOP", "HBM MB", "matrix unit ms")
    header += ("HBM ms", "temp B", "compiled in s")
    lines = []
    for row in rows:
        case, found = row["case"], row["found"]
        numbers = (
            [found["error"][:60], *[""] * 6]
            if "error" in found
            else [
                f"{found['flops_bfloat16'] / 1e9:.1f}",
                f"{found['flops_float32'] / 1e9:.1f}",
                f"{found['hbm_bytes'] / 1e6:.0f}",
                f"{found['matrix_unit_milliseconds']:.3f}",
                f"{found['hbm_milliseconds']:.3f}",
                f"{found['temporary_bytes_per_param']:.1f}",
                f"{found['compile_seconds']:.0f}",
            ]
        )
        lines.append([case["method"], case["kind"], *numbers])
    return format_table(header, lines, right=range(2, len(header)))


def markdown(document: dict[str, Any]) -> str:
    """The table for README.md."""
    model = document["cpu"][str(README_WIDTH)]
    rows = document["tpu"]
    least = tpu_milliseconds(rows, README_WIDTH, TPU_LAYERS)
    lines = [
        "| update | state, bytes per parameter | CPU, of AdamW's time | of Muon's | "
        "v5e, of Muon's |",
        "|---|---|---|---|---|",
    ]
    for name, entry in model["methods"].items():
        columns = [
            ", ".join(_ratio(entry[f"ratio_to_{peer}"][str(k)][1]) for k in INTERVALS)
            for peer in PEERS
        ]
        on_tpu = "-"
        if name in least and "muon" in least:
            muon = least["muon"]["plain"]
            on_tpu = ", ".join(
                _ratio(mean_step(least[name], k) / muon) for k in INTERVALS
            )
        entries = [f"{entry['state_bytes_per_param']:.3g}", *columns, on_tpu]
        lines.append(f"| `{name}` | {' | '.join(entries)} |")
    first = model["methods"]["soap"]["milliseconds"]["first"][1] / 1e3
    versions = {k: v for row in rows.values() for k, v in row["versions"].items()}
    return "\n".join(
        [
            *lines,
            "",
            f"Mean time of a step that refreshes every {INTERVALS[0]}, {INTERVALS[1]} "
            f"and {INTERVALS[2]} steps, on the hidden matrices of "
            f"{model['arguments']['layers']} transformer layers of width "
            f"{model['width']}; medians of {model['arguments']['rounds']} interleaved "
            f"rounds on {model['threads']} threads of {model['processor']}, of which "
            f"other programs kept {model['others_cpus'] or 0.0:.1f} busy. The first "
            f"step of `soap` takes {first:.0f} s there. `sophia` without its estimate, "
            "a gradient more per refresh. v5e: the least time of a program for one "
            "chip, by its products (six passes for float32) and its bytes in HBM; QR "
            "and triangular solves within panels are not in it. "
            f"jax {model['versions']['jax']}, libtpu {versions['libtpu']}; `python "
            "benchmarks/curvature_cost.py` measures the times, with `--tpu` it "
            "compiles.",
        ]
    )


def _ratio(value: float) -> str:
    return f"{value:.{2 if value < 1 else 1 if value < 10 else 0}f}"


def measured(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """The results of the CPU, by width."""
    for width in options.width or CPU_WIDTHS:
        model = run(width, options)
        print(f"{model['arguments']['layers']} layers of width {width}\n")
        print(cpu_table(model), flush=True)
        yield str(width), model


def compiled(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """The results of the TPU compiler, by case."""
    rows = []
    for width in options.width or TPU_WIDTHS:
        for case in cases(width, options.layers or TPU_LAYERS):
            if case.method not in options.methods or case.kind not in options.kinds:
                continue
            command = [sys.executable, __file__, "--row", json.dumps(asdict(case))]
            row = {
                "case": asdict(case),
                "device": "TPU v5e",
                "versions": pod_cost.versions(),
                "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M}",
                "found": found_apart(command, options.timeout),
            }
            rows.append(row)
            print(case.key, row["found"], file=sys.stderr, flush=True)
            yield case.key, row
    print(tpu_table(rows))


def main() -> int:
    """Measures or compiles, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tpu", action="store_true", help="compile for TPU v5e")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        metavar="NAME",
        default=list(METHODS),
        help=f"beside {' and '.join(PEERS)}, of {', '.join(METHODS)}",
    )
    parser.add_argument(
        "--kinds", nargs="+", choices=COUNTS, default=list(COUNTS), help="with --tpu"
    )
    parser.add_argument("--width", type=int, nargs="+", help="512 768; TPU: 512")
    parser.add_argument("--layers", type=int, help="2; TPU: 1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--first-rounds", type=int, default=2, help="with a first step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=1200, help="seconds a row")
    parser.add_argument(
        "--out",
        type=Path,
        help=f"default results/{RESULTS.name}; on a CPU for all methods, the default "
        "layers and rounds",
    )
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row is not None:
        print(json.dumps(compile_for_tpu(Case(**json.loads(options.row)))))
        return 0
    reason = unavailable("v5e") if options.tpu else None
    if reason is not None:
        print(f"--tpu: {reason}", file=sys.stderr)
        return 1
    # Those of the compiler are added one by one, to others of any size.
    job = ("layers", "rounds", "first_rounds", "methods")
    is_whole = options.tpu or all(
        getattr(options, key) == parser.get_default(key) for key in job
    )
    out = options.out or (RESULTS if is_whole else None)
    document: dict[str, Any] = {"cpu": {}, "tpu": {}}
    if out is not None and out.exists():
        document = json.loads(out.read_text("utf-8"))
    part, results = "cpu", measured(options)
    if options.tpu:
        part, results = "tpu", compiled(options)
    for key, found in results:
        document[part][key] = found
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
