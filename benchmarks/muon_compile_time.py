"""How long does the TPU compiler take for an update of Muon, and what does it make?

The update of unstacked transformer layers is compiled for a TPU v5e, without one, by
libtpu; ours and `optax.contrib.muon`'s take turns.

    pip install -e ".[tpu]"
    python benchmarks/muon_compile_time.py              # 48 layers; written to --out
    python benchmarks/muon_compile_time.py --layers 4   # seconds, to try the script
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import optaxplus as ox
from optaxplus.report.tables import format_table

RESULTS = Path(__file__).parent / "results" / "muon_compile_time.json"
TARGET = 0.25
CANDIDATES = {
    "ox.muon": ox.muon(1e-3, weight_decay=0.1),
    "optax.contrib.muon": optax.contrib.muon(1e-3, weight_decay=0.1),
}


def tree(width: int, layers: int) -> dict[str, Any]:
    """Shapes of the hidden matrices, one leaf each."""
    layer = {
        **{name: (width, width) for name in ("query", "key", "value", "out")},
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }
    return {f"layer_{index}": layer for index in range(layers)}


def compile_once(
    tx: optax.GradientTransformation, params: Any, sharding: NamedSharding
) -> dict[str, Any]:
    """Traces, lowers and compiles one update."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def placed(abstract: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            abstract,
        )

    params = placed(params)
    state = placed(jax.eval_shape(tx.init, params))
    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)
    middle = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    text = compiled.as_text()
    return {
        "lower_seconds": middle - start,
        "compile_seconds": end - middle,
        "loops": text.count(" while("),
        "products": text.count(" convolution("),
        "instructions": text.count(" = "),
        "temporary_gigabytes": compiled.memory_analysis().temp_size_in_bytes / 1e9,
    }


def main() -> int:
    """Compiles, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help=f"default results/{RESULTS.name}")
    options = parser.parse_args()
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:2x2"
    ).devices
    sharding = NamedSharding(Mesh(devices[:1], ("data",)), PartitionSpec())
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tree(options.width, options.layers),
        is_leaf=lambda node: isinstance(node, tuple),
    )
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CANDIDATES}
    for index in range(options.rounds):
        for name, tx in CANDIDATES.items():
            print(f"round {index + 1}: {name}", file=sys.stderr)
            jax.clear_caches()
            found[name].append(compile_once(tx, params, sharding))
    ours, theirs = (
        sorted(row["lower_seconds"] + row["compile_seconds"] for row in rows)
        for rows in found.values()
    )
    ratio = ours[len(ours) // 2] / theirs[len(theirs) // 2]
    lines = [
        [
            name,
            *(
                f"{row['lower_seconds']:.1f} + {row['compile_seconds']:.1f}"
                for row in r
            ),
            str(r[0]["loops"]),
            str(r[0]["products"]),
            f"{r[0]['temporary_gigabytes']:.2f}",
        ]
        for name, r in found.items()
    ]
    header = (
        "update",
        *(f"seconds {index + 1}" for index in range(options.rounds)),
        *("loops", "products", "temporary GB"),
    )
    print(format_table(header, lines, right=range(1, len(header))))
    verdict = "pass" if ratio <= TARGET else "FAIL"
    print(f"\nratio of the medians {ratio:.2f}, target {TARGET} {verdict}")
    out = options.out or (RESULTS if options.layers == 48 else None)
    if out is not None:
        document = {
            "device": devices[0].device_kind,
            "versions": {
                "python": platform.python_version(),
                **{n: metadata.version(n) for n in ("jax", "jaxlib", "optax")},
            },
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "layers": options.layers,
            "width": options.width,
            "found": found,
            "ratio": round(ratio, 3),
            "target": TARGET,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
