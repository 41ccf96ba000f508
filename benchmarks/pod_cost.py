"""What does an update of a matrix method cost on a pod, where parameters are sharded?

The update of a llama-like tree of a billion parameters is compiled for real TPUs,
without one, by libtpu. What each chip sends, multiplies and needs for temporaries is
read from the program; nothing is timed but the compiler.

    pip install -e ".[tpu]"
    python benchmarks/pod_cost.py                     # all; results/pod_cost.json
    python benchmarks/pod_cost.py --layouts "FSDP 64" --implementations exact optax
    python benchmarks/pod_cost.py --layers 4          # seconds a row, not written
    python benchmarks/pod_cost.py --topologies v5e --layouts "FSDP 8" \
        --implementations soap "soap, refresh" shampoo "shampoo, refresh" kron \
        "kron, refresh"                               # minutes a row

With `--topologies h100` for eight GPUs, without one, by the plugin of JAX for CUDA:
`pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt`, of the version of jax.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import platform
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

# A script's own folder, also where the tests load it by its path.
sys.path.insert(0, str(Path(__file__).resolve().parent))
import jax
import jax.numpy as jnp
import optax
from curvature_methods import EVERY, before
from hlo_cost import hlo_cost
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from pod_devices import TOPOLOGIES, devices_of, found_apart, unavailable

import optaxplus as ox
from optaxplus.report.tables import format_table

RESULTS = Path(__file__).parent / "results" / "pod_cost.json"
LAYERS = 16
# Of one layer of a llama of a billion parameters: shape, and the axis of d_model.
MATRICES = {
    ("attention", "query"): ((2048, 2048), 0),
    ("attention", "key"): ((2048, 512), 0),
    ("attention", "value"): ((2048, 512), 0),
    ("attention", "out"): ((2048, 2048), 1),
    ("mlp", "gate"): ((2048, 8192), 0),
    ("mlp", "up"): ((2048, 8192), 0),
    ("mlp", "down"): ((8192, 2048), 1),
}
MODELS = ("stacked", "leaves")


@dataclass(frozen=True)
class Layout:
    """How parameters lie on a mesh.

    Attributes:
      mesh: Chips by axis; d_model is split over "fsdp", the other axis of a matrix
        over "tensor", nothing over "data".
      targets: Largest ratios of wire bytes and products to their bounds to aim at.
    """

    mesh: dict[str, int]
    targets: tuple[float, float]

    @property
    def chips(self) -> int:
        """Of the whole mesh."""
        return math.prod(self.mesh.values())

    def spec(self, model_axis: int, stacked: bool) -> P:
        """Of a matrix, or of a stack of them."""
        axes = ["fsdp", "tensor"] if model_axis == 0 else ["tensor", "fsdp"]
        named = (axis if axis in self.mesh else None for axis in axes)
        return P(*([None] if stacked else []), *named)


LAYOUTS = {
    "replicated 8": Layout({"data": 8}, (1.1, 1.1)),
    "FSDP 8": Layout({"fsdp": 8}, (1.02, 1.02)),
    "FSDP 64": Layout({"fsdp": 64}, (1.25, 0.8)),
    "FSDP 8 x TP 8": Layout({"fsdp": 8, "tensor": 8}, (1.5, 1.5)),
    "FSDP 256": Layout({"fsdp": 256}, (6.0, 1.8)),
}
# Ours with the shardings given, read from types, and unknown; and two others.
IMPLEMENTATIONS = {
    "exact": "ox.muon, Placement",
    "explicit": "ox.muon, explicit mesh",
    "auto": "ox.muon, auto mesh",
    "optax": "optax.contrib.muon",
    "adamw": "ox.adamw",
    "soap": "ox.soap",
    "soap, refresh": "ox.soap, a refresh",
    "shampoo": "ox.shampoo",
    "shampoo, refresh": "ox.shampoo, a refresh",
    "kron": "ox.kron",
    "kron, refresh": "ox.kron, a refresh",
}
MUONS = ("exact", "explicit", "auto", "optax")
# Sides of 8192 in tiles, so that no factor is larger than a square matrix.
TILES = {"max_dim": 2048, "large_dims": "tiles", "update_interval": EVERY}
WITH_FACTORS = {
    "soap": partial(ox.soap, **TILES),
    "shampoo": partial(ox.shampoo, root_method="newton", **TILES),
    "kron": partial(ox.kron, warmup_steps=0, interval_growth=None, **TILES),
}


@dataclass(frozen=True)
class Case:
    """One row: what is compiled for what."""

    topology: str
    layout: str
    model: str
    implementation: str
    layers: int

    @property
    def key(self) -> str:
        """Names the row in the results."""
        return " / ".join(map(str, asdict(self).values()))

    @property
    def method(self) -> str:
        """The implementation without the kind of its step."""
        return self.implementation.removesuffix(", refresh")

    @property
    def is_explicit(self) -> bool:
        """Whether shardings are parts of types."""
        return self.implementation == "explicit" or self.method in WITH_FACTORS


def bytes_bound(layout: Layout, layers: int) -> float:
    """Bytes of bfloat16 that a chip sends: there and back, back only if replicated."""
    parameters = layers * sum(
        rows * columns for (rows, columns), _ in MATRICES.values()
    )
    chips = layout.chips
    passes = 1 if "data" in layout.mesh else 2 / chips
    return passes * parameters * 2 * (chips - 1) / chips


def flops_bound(layout: Layout, layers: int) -> float:
    """Five standard Newton-Schulz steps, their work divided evenly."""
    one_layer = sum(
        5 * (4 * min(shape) ** 2 * max(shape) + 2 * min(shape) ** 3)
        for shape, _ in MATRICES.values()
    )
    return layers * one_layer / layout.chips


def shapes_and_specs(layout: Layout, model: str, layers: int) -> tuple[Any, Any]:
    """The tree's shapes and its partition specs."""
    shapes: dict[str, Any] = {}
    specs: dict[str, Any] = {}
    stacked = model == "stacked"
    for name in ["layers"] if stacked else [f"layers_{i}" for i in range(layers)]:
        for (block, matrix), (shape, model_axis) in MATRICES.items():
            leaf = {"kernel": (layers, *shape) if stacked else shape}
            shapes.setdefault(name, {}).setdefault(block, {})[matrix] = leaf
            leaf = {"kernel": layout.spec(model_axis, stacked)}
            specs.setdefault(name, {}).setdefault(block, {})[matrix] = leaf
    return shapes, specs


def mesh_of(case: Case) -> Mesh:
    """The mesh of a row, of its devices."""
    axes = LAYOUTS[case.layout].mesh
    devices = mesh_utils.create_device_mesh(
        tuple(axes.values()),
        devices_of(case.topology, LAYOUTS[case.layout].chips),
        allow_split_physical_axes=True,  # 8 x 8 on the cube of a v5p
    )
    kind = AxisType.Explicit if case.is_explicit else AxisType.Auto
    return Mesh(devices, tuple(axes), axis_types=(kind,) * len(axes))


def transformation(
    case: Case, params: Any, mesh: Mesh, specs: Any
) -> optax.GradientTransformation:
    """The optimizer of a row; those of ours are checked to treat all as matrices."""
    stacked = case.model == "stacked"
    if case.implementation == "adamw":
        return ox.adamw(1e-3, weight_decay=0.1)
    if case.implementation == "optax":
        numbers = optax.contrib.MuonDimensionNumbers(*((1, 2) if stacked else (0, 1)))
        return optax.contrib.muon(
            1e-3,
            weight_decay=0.1,
            muon_weight_dimension_numbers=jax.tree.map(lambda _: numbers, params),
        )
    rules = (*(ox.stacked(r"^layers/") if stacked else ()), *ox.DEFAULT_RULES)
    if set(jax.tree.leaves(ox.label_params(params, rules))) != {"muon"}:
        raise AssertionError(str(ox.explain_routing(params, rules)))
    if case.method in WITH_FACTORS:
        return WITH_FACTORS[case.method](1e-3, rules=rules)
    if case.implementation == "exact":
        return ox.muon(1e-3, rules=rules, placement=ox.Placement(mesh, specs))
    return ox.muon(1e-3, rules=rules)


def compiled_update(case: Case) -> tuple[Any, float, float]:
    """The compiled update, and the seconds of lowering and compiling."""
    mesh = mesh_of(case)
    shapes, specs = shapes_and_specs(LAYOUTS[case.layout], case.model, case.layers)
    params = jax.tree.map(
        lambda spec, shape: jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(mesh, spec)
        ),
        specs,
        shapes,
        is_leaf=lambda node: isinstance(node, P),
    )
    tx = transformation(case, params, mesh, specs)
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(tx.init, params),
        ox.state_sharding(tx, params),
    )

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        if case.method in WITH_FACTORS:
            # As it counts before such a step, which leaves no conditional.
            is_refresh = case.method != case.implementation
            state = before("refresh" if is_refresh else "plain", state)
        return tx.update(grads, state, params)

    results = None  # Types decide.
    if not case.is_explicit:
        results = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
    start = time.perf_counter()
    step = jax.jit(update, out_shardings=results, donate_argnums=(0, 1))
    lowered = step.lower(params, state, params)
    middle = time.perf_counter()
    compiled = lowered.compile()
    return compiled, middle - start, time.perf_counter() - middle


def measure(case: Case, text_path: Path | None = None) -> dict[str, Any]:
    """One row of the results."""
    compiled, lower_seconds, compile_seconds = compiled_update(case)
    text = compiled.as_text()
    if text_path is not None:
        text_path.write_text(text, "utf-8")
    cost = hlo_cost(text, compiled.memory_analysis().temp_size_in_bytes)
    layout = LAYOUTS[case.layout]
    return {
        "collectives": {k: asdict(found) for k, found in cost.collectives.items()},
        "collectives_in_products": cost.collectives_in_products,
        "wire_bytes": cost.wire_bytes,
        "times_bytes_bound": cost.wire_bytes / bytes_bound(layout, case.layers),
        "flops": cost.flops,
        "times_flops_bound": cost.flops / flops_bound(layout, case.layers),
        "temporary_bytes": cost.temporary_bytes,
        "lower_seconds": lower_seconds,
        "compile_seconds": compile_seconds,
    }


def measure_apart(case: Case, timeout: float, text: Path | None) -> dict[str, Any]:
    """`measure` in a process of its own, which the compiler may end or keep busy."""
    command = [sys.executable, __file__, "--row", json.dumps(asdict(case))]
    if text is not None:
        text.mkdir(parents=True, exist_ok=True)
        command += ["--text", str(text / f"{case.key.replace(' / ', '-')}.hlo")]
    return found_apart(command, timeout)


def versions() -> dict[str, str]:
    """Of what decides the numbers."""
    names = ("jax", "jaxlib", "optax", "libtpu", "jax-cuda13-plugin")
    installed = {d.name: d.version for d in metadata.distributions()}
    return {
        "python": platform.python_version(),
        **{name: installed[name] for name in names if name in installed},
    }


def verdict(value: float, target: float | None) -> str:
    """A ratio, with its target where it has one."""
    if target is None:
        return f"{value:.2f}"
    return f"{value:.2f} ({'<=' if value <= target else 'FAIL'} {target:g})"


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the printed table."""
    case, found = row["case"], row["found"]
    head = [
        f"{case['topology']}:{row['chips']}",
        case["layout"],
        case["model"],
        IMPLEMENTATIONS[case["implementation"]],
    ]
    if "error" in found:
        return [*head, found["error"][:60], *[""] * 7]
    knows_shardings = case["implementation"] in ("exact", "explicit")
    targets = LAYOUTS[case["layout"]].targets if knows_shardings else (None, None)
    return [
        *head,
        ", ".join(f"{k} {c['executions']}" for k, c in found["collectives"].items()),
        str(found["collectives_in_products"]),
        f"{found['wire_bytes'] / 1e6:.0f}",
        verdict(found["times_bytes_bound"], targets[0]),
        f"{found['flops'] / 1e12:.3f}",
        verdict(found["times_flops_bound"], targets[1]),
        f"{found['temporary_bytes'] / 1e9:.2f}",
        f"{found['lower_seconds']:.0f} + {found['compile_seconds']:.0f}",
    ]


HEADER = (
    *("chips", "layout", "parameters", "update", "collectives", "in loops of products"),
    *("wire MB", "of bound", "TFLOP", "of bound", "temporary GB", "seconds"),
)


def ordered(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the results in the order of the tables above."""
    orders = [list(TOPOLOGIES), list(LAYOUTS), list(MODELS), list(IMPLEMENTATIONS)]
    names = ("topology", "layout", "model", "implementation")
    return sorted(
        rows,
        key=lambda row: [
            order.index(row["case"][name])
            for order, name in zip(orders, names, strict=True)
        ],
    )


def main() -> int:
    """Compiles, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choices = {
        "topologies": (TOPOLOGIES, ["v5e", "v5p"]),
        "layouts": (LAYOUTS, list(LAYOUTS)),
        "models": (MODELS, list(MODELS)),
        "implementations": (IMPLEMENTATIONS, [*MUONS, "adamw"]),
    }
    for name, (allowed, default) in choices.items():
        parser.add_argument(f"--{name}", nargs="+", choices=allowed, default=default)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--timeout", type=float, default=1200, help="seconds a row")
    parser.add_argument("--text", type=Path, help="folder for the compiled programs")
    parser.add_argument("--out", type=Path, help=f"default results/{RESULTS.name}")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row is not None:
        print(json.dumps(measure(Case(**json.loads(options.row)), options.text)))
        return 0
    out = options.out or (RESULTS if options.layers == LAYERS else None)
    document: dict[str, Any] = {"rows": {}}
    if out is not None and out.exists():
        document = json.loads(out.read_text("utf-8"))
    rows = []
    for names in itertools.product(*(getattr(options, name) for name in choices)):
        case = Case(*names, layers=options.layers)
        layout = LAYOUTS[case.layout]
        reason = unavailable(case.topology)
        if layout.chips not in TOPOLOGIES[case.topology]:
            reason = f"no topology of {layout.chips} chips"
        if reason is not None:
            print(f"{case.key}: skipped, {reason}", file=sys.stderr)
            continue
        found = measure_apart(case, options.timeout, options.text)
        rows.append(
            {
                "case": asdict(case),
                "chips": TOPOLOGIES[case.topology][layout.chips],
                "versions": versions(),
                "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M}",
                "found": found,
            }
        )
        print(" | ".join(cells(rows[-1])), file=sys.stderr, flush=True)
        if out is not None:
            document["rows"][case.key] = rows[-1]
            document["arguments"] = sys.argv[1:]
            out.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(document, indent=1) + "\n"
            out.write_text(text, "utf-8")
    print(format_table(HEADER, [cells(row) for row in ordered(rows)], range(5, 12)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
