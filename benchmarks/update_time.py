"""How long does one update take, beside optax and PyTorch?

One optimizer step is timed on the parameters of a transformer: the update and its
application in one jitted function, which is given the memory of parameters and state
to reuse. This package, optax and the implementations of PyTorch (a loop over tensors,
`foreach`, `fused`) get the same shapes, values, precision and number of threads.

    python benchmarks/update_time.py                   # all; written to --out
    python benchmarks/update_time.py --only lion lamb  # some; only printed
    python benchmarks/update_time.py --small           # seconds, to try the script

A new optimizer is a new row of `peers`. PyTorch is used if it is installed.

What makes the comparison fair:

- All that are compared run once in every round, in an order drawn anew for each, so
  a machine that is busy for a while is so for all. Ratios are taken within rounds.
- XLA and PyTorch have thread pools that spin for some time before they sleep; a pause
  before every measurement lets the other one's threads go to sleep. With it, what
  allocates nothing takes the same time beside the others as in a process of its own,
  within 3 %. So one process is enough.
- What allocates temporaries depends on the allocator: glibc gives large blocks back,
  and the next step pays for the page faults. That is what a user gets by default, but
  a train step whose activations can lend their memory need not pay. To see the times
  without it, start with the environment variables MALLOC_ARENA_MAX=1
  MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000; it is written down if so.
- Nothing else should run: PyTorch splits its work statically, so one busy core delays
  it more than XLA. How many CPUs others kept busy is reported with every row.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import gc
import inspect
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxplus as ox
from optaxplus.report.tables import format_table

# A script's own folder, also where the tests load it by its path.
sys.path.insert(0, str(Path(__file__).resolve().parent))
from peers import LEARNING_RATE, ROWS, Row, Torch

try:
    import torch
except ImportError:
    torch = None
if jax.default_backend() != "cpu":
    torch = None  # PyTorch would be measured on another device.

RESULTS = Path(__file__).parent / "results" / "update_time.json"
OURS = "optaxplus"
WARM_UPS = 2
PAUSE = 0.01  # Seconds; a longer one changes nothing, none costs up to 4 %.
SETTINGS = ("MALLOC_", "GLIBC_", "LD_PRELOAD", "NPROC", "XLA_")
SETTINGS += ("OMP_", "GOMP_", "KMP_", "OPENBLAS_")


def shapes(width: int, layers: int) -> dict[str, Any]:
    """The parameters of a transformer, named as Flax does; 60M by default."""
    layer = {
        "attention": {
            name: {"kernel": (width, width)}
            for name in ("query", "key", "value", "out")
        },
        "mlp": {
            "up": {"kernel": (width, 4 * width)},
            "down": {"kernel": (4 * width, width)},
        },
        "attention_norm": {"scale": (width,)},
        "mlp_norm": {"scale": (width,)},
    }
    return {
        "embedding": {"embedding": (8 * width, width)},
        **{f"layer_{index}": layer for index in range(layers)},
        "norm": {"scale": (width,)},
    }


def normal(tree: Any, scale: float, dtype: str, generator: np.random.Generator) -> Any:
    """Normally distributed arrays of these shapes, outside of JAX and PyTorch."""
    return jax.tree.map(
        lambda shape: (scale * generator.standard_normal(shape, "float32")).astype(
            jnp.dtype(dtype)
        ),
        tree,
        is_leaf=lambda node: isinstance(node, tuple),
    )


class JaxStep:
    """One step of a transformation, compiled, with the memory that it works on."""

    def __init__(self, tx: optax.GradientTransformation, params: Any, grads: Any):
        def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.grads = grads
        self.params = jax.tree.map(jnp.array, params)
        # A state may hold the parameters themselves; memory is given away only once.
        self.state = jax.tree.map(jnp.copy, tx.init(self.params))
        self.compiled = (
            jax.jit(step, donate_argnums=(0, 1))
            .lower(self.params, self.state, grads)
            .compile()
        )

    def __call__(self) -> None:
        """Does the step and waits for its end."""
        self.params, self.state = self.compiled(self.params, self.state, self.grads)
        jax.block_until_ready((self.params, self.state))

    def reset(self) -> None:
        """Nothing: gradients are as they were."""

    def memory(self) -> dict[str, float]:
        """Bytes per parameter: of temporaries, of state, and moved at least."""
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        params, state = (
            sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / count
            for tree in (self.params, self.state)
        )
        analysis = self.compiled.memory_analysis()
        return {
            "temporary_bytes_per_param": analysis.temp_size_in_bytes / count,
            "state_bytes_per_param": state,
            # Gradients are read; parameters and state are read and written.
            "moved_bytes_per_param": 3 * params + 2 * state,
        }


class TorchStep:
    """One step of a PyTorch optimizer in one of its implementations.

    `grads` are the gradients to work on and what they are to be before every step:
    clipping and `foreach` with Nesterov's momentum change them.
    """

    def __init__(self, peer: Torch, flags: dict[str, bool], params: Any, grads: Any):
        self.clip_norm = peer.clip_norm
        self.grads = grads
        self.foreach = flags.get("foreach", True)
        self.params = [as_tensor(leaf) for leaf in jax.tree.leaves(params)]
        for param, (grad, _) in zip(self.params, grads, strict=True):
            param.grad = grad
        self.optimizer = getattr(torch.optim, peer.name)(
            self.params, lr=LEARNING_RATE, **peer.arguments, **flags
        )

    def __call__(self) -> None:
        """Does the step."""
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(
                self.params, self.clip_norm, foreach=self.foreach
            )
        self.optimizer.step()

    def reset(self) -> None:
        """Undoes what the step did to the gradients."""
        for grad, original in self.grads:
            grad.copy_(original)


Step = JaxStep | TorchStep


def as_tensor(array: np.ndarray) -> Any:
    """A copy of an array as a tensor of the same precision."""
    tensor = torch.tensor(array.astype("float32"))
    return tensor.to(getattr(torch, array.dtype.name))


def torch_flags(peer: Torch) -> dict[str, dict[str, bool]]:
    """The implementations that a class of `torch.optim` has, and how to get them."""
    known = inspect.signature(getattr(torch.optim, peer.name)).parameters
    flags = {"torch loop": {"foreach": False}, "torch foreach": {"foreach": True}}
    if "fused" in known:
        flags["torch fused"] = {"fused": True}
    return flags


def candidates(row: Row, params: Any, grads: Any) -> dict[str, Step]:
    """Everything that takes part in one row."""
    shared = jax.tree.map(jnp.asarray, grads)
    steps: dict[str, Step] = {OURS: JaxStep(row.ours, params, shared)}
    if row.optax is not None:
        steps["optax"] = JaxStep(row.optax, params, shared)
    if row.torch is not None and torch is not None:
        leaves = jax.tree.leaves(grads)
        tensors = [(as_tensor(leaf), as_tensor(leaf)) for leaf in leaves]
        for name, flags in torch_flags(row.torch).items():
            steps[name] = TorchStep(row.torch, flags, params, tensors)
    return steps


def measure(
    steps: dict[str, Step],
    rounds: int,
    generator: np.random.Generator,
    show: Callable[[int], None],
) -> dict[str, np.ndarray]:
    """Seconds of every candidate in every round."""
    for step in steps.values():
        for _ in range(WARM_UPS):
            step()
            step.reset()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds):
        show(index)
        for name in generator.permutation(list(steps)):
            time.sleep(PAUSE)
            start = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - start)
            steps[name].reset()
    return {name: np.array(values) for name, values in seconds.items()}


def threads() -> int:
    """The size of XLA's thread pool on a CPU; PyTorch is given as many."""
    if "NPROC" in os.environ:
        return int(os.environ["NPROC"])
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def others_seconds() -> float | None:
    """CPU seconds that all other processes have used; None where that is not told."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _, _, *interrupts = map(
        int, stat.read_text("utf-8").split("\n", 1)[0].split()[1:9]
    )
    ticks = user + nice + system + sum(interrupts)
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def quartiles(values: np.ndarray) -> list[float]:
    """The first quartile, the median and the third quartile."""
    return [float(f"{value:.5g}") for value in np.percentile(values, (25, 50, 75))]


def summarize(
    row: Row, steps: dict[str, Step], seconds: dict[str, np.ndarray], num_params: int
) -> dict[str, Any]:
    """What is reported of a row; every range is [quartile, median, quartile]."""
    result: dict[str, Any] = {"name": row.name, "target": row.target, "candidates": {}}
    for name, step in steps.items():
        entry: dict[str, Any] = {"milliseconds": quartiles(1e3 * seconds[name])}
        if isinstance(step, JaxStep):
            entry |= step.memory()
        result["candidates"][name] = entry
    ours = result["candidates"][OURS]
    moved = ours["moved_bytes_per_param"] * num_params
    result["gigabytes_per_second"] = moved / ours["milliseconds"][1] / 1e6
    if "optax" in steps:
        result["ratio_to_optax"] = quartiles(seconds[OURS] / seconds["optax"])
    rivals = [name for name in steps if name.startswith("torch")]
    if rivals:
        best = min(rivals, key=lambda name: np.median(seconds[name]))
        result["best_torch"] = best
        result["ratio_to_best_torch"] = quartiles(seconds[OURS] / seconds[best])
    if row.target is not None:
        result["passed"] = result["ratio_to_optax"][1] <= row.target
    return result


def run(
    rows: Sequence[Row], options: argparse.Namespace, done: list[dict[str, Any]]
) -> None:
    """Measures row after row and appends what was found to `done`."""
    generator = np.random.default_rng(options.seed)
    tree = shapes(options.width, options.layers)
    params = normal(tree, 0.02, options.dtype, generator)
    grads = normal(tree, 0.01, options.dtype, generator)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    with progress(options.rounds) as show:
        for row in rows:
            steps = candidates(row, params, grads)
            start, others = time.perf_counter(), others_seconds()
            seconds = measure(
                steps, options.rounds, generator, lambda at, row=row: show(row.name, at)
            )
            if others is not None:
                used = max(0.0, others_seconds() - others)
                others = round(used / (time.perf_counter() - start), 3)
            summary = summarize(row, steps, seconds, num_params)
            done.append(summary | {"others_cpus": others})
            # The next row needs the memory.
            del steps
            jax.clear_caches()
            gc.collect()
            save(done, options, num_params)


@contextlib.contextmanager
def progress(rounds: int) -> Iterator[Callable[[str, int], None]]:
    """Yields a function that says which round of which optimizer is being run."""
    try:
        from rich.console import Console
    except ImportError:
        console = None
    else:
        console = Console(stderr=True)
    if console is None or not console.is_terminal:
        yield lambda name, at: print(name, file=sys.stderr) if at == 0 else None
        return
    with console.status("starting") as status:
        yield lambda name, at: status.update(f"{name}: round {at + 1} of {rounds}")


def processor() -> str:
    """The model of the CPU."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def versions() -> dict[str, str | None]:
    """The versions of everything that could change the numbers."""
    return {
        "python": platform.python_version(),
        "optaxplus": ox.__version__,
        **{
            name: metadata.version(name) for name in ("jax", "jaxlib", "optax", "numpy")
        },
        "torch": None if torch is None else torch.__version__,
    }


def environment() -> dict[str, str]:
    """The settings of allocators and threads."""
    return {
        key: value
        for key, value in sorted(os.environ.items())
        if key.startswith(SETTINGS)
    }


def save(
    done: list[dict[str, Any]], options: argparse.Namespace, num_params: int
) -> None:
    """Writes the rows that are finished, with what they were measured on."""
    if options.out is None:
        return
    document = {
        "device": jax.devices()[0].device_kind,
        "processor": processor(),
        "cpus": os.cpu_count(),
        "threads": threads(),
        "environment": environment(),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": options.seed,
        "arguments": {
            key: getattr(options, key)
            for key in ("width", "layers", "dtype", "rounds", "only")
        },
        "num_params": num_params,
        "rows": done,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


def table(done: Sequence[dict[str, Any]]) -> str:
    """The rows as text; a dash where there is no peer."""
    header = (
        *("optimizer", "ours ms", "optax", "loop", "foreach", "fused"),
        *("ours/optax", "target", "ours/torch", "temp B", "state B", "GB/s", "others"),
    )
    names = (OURS, "optax", "torch loop", "torch foreach", "torch fused")
    lines = []
    for row in done:
        peers = row["candidates"]
        times = [peers.get(name, {}).get("milliseconds") for name in names]
        lines.append(
            [
                row["name"],
                *("-" if time is None else f"{time[1]:.1f}" for time in times),
                spread(row.get("ratio_to_optax")),
                verdict(row),
                spread(row.get("ratio_to_best_torch")),
                side_by_side(peers, "temporary_bytes_per_param"),
                side_by_side(peers, "state_bytes_per_param"),
                f"{row['gigabytes_per_second']:.1f}",
                "-" if row["others_cpus"] is None else f"{row['others_cpus']:.2f}",
            ]
        )
    return format_table(header, lines, right=range(1, len(header)))


def spread(ratio: Sequence[float] | None) -> str:
    """A median with the quartiles around it."""
    if ratio is None:
        return "-"
    low, median, high = ratio
    return f"{median:.2f} ({low:.2f}-{high:.2f})"


def verdict(row: dict[str, Any]) -> str:
    """The target, and whether it is reached."""
    if row["target"] is None:
        return "-"
    return f"{row['target']:.2f} {'pass' if row['passed'] else 'FAIL'}"


def side_by_side(peers: dict[str, Any], key: str) -> str:
    """A number of this package, and that of optax."""
    return " : ".join(
        f"{peers[name][key]:.2f}" for name in (OURS, "optax") if name in peers
    )


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [row.name for row in ROWS]
    parser.add_argument(
        "--only",
        nargs="+",
        choices=names,
        metavar="NAME",
        help=f"of {', '.join(names)}",
    )
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="width 128, 2 layers")
    parser.add_argument(
        "--out",
        type=Path,
        help="where to write the results; a run of everything at the default size is "
        f"written to results/{RESULTS.name}, any other only printed",
    )
    options = parser.parse_args()
    if options.small:
        options.width, options.layers = 128, 2
    job = ("only", "width", "layers", "dtype")
    whole = all(getattr(options, key) == parser.get_default(key) for key in job)
    if whole and options.out is None:
        options.out = RESULTS
    return options


def main() -> int:
    """Measures and reports, also what there is when interrupted; exit status."""
    options = parse_arguments()
    if torch is not None:
        torch.set_num_threads(threads())
    rows = [row for row in ROWS if options.only is None or row.name in options.only]
    if options.small:  # The targets are for what does not fit into caches.
        rows = [dataclasses.replace(row, target=None) for row in rows]
    done: list[dict[str, Any]] = []
    status = 0
    try:
        run(rows, options, done)
    except KeyboardInterrupt:
        status = 130
    print(
        f"{options.layers} layers of width {options.width}, {options.dtype}, "
        f"{options.rounds} rounds, {threads()} threads.\n"
        "Medians in milliseconds; ratios with quartiles, of ours to optax and to the "
        "fastest of PyTorch;\nbytes per parameter, ours : optax; least memory traffic "
        "over time, ours; CPUs that others kept busy.\n"
    )
    print(table(done))
    return status


if __name__ == "__main__":
    sys.exit(main())
