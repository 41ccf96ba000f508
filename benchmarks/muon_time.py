"""How long does an update of Muon take, beside optax and PyTorch, and how good is it?

The update of all matrices of a transformer (four d x d, one d x 4d and one 4d x d a
layer) and its application, in one jitted function that may reuse the memory of
parameters and state, against `optax.contrib.muon` and `torch.optim.Muon`. Beside every
time stands the error of the first update's direction: its distance to the exact polar
factor (float64 singular value decomposition), relative, over one layer.

    python benchmarks/muon_time.py            # d = 512 and 768; written to --out
    python benchmarks/muon_time.py --small    # seconds, to try the script

The measuring is that of update_time.py, whose docstring says what makes it fair.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import sys
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
from update_time import (
    JaxStep,
    as_tensor,
    measure,
    normal,
    others_seconds,
    processor,
    quartiles,
    spread,
    threads,
    torch,
    versions,
)

RESULTS = Path(__file__).parent / "results" / "muon_time.json"
RATE, DECAY = 1e-3, 0.1
OPTAX, TORCH = "optax.contrib.muon", "torch.optim.Muon"
OURS = {
    "ox.muon": {},
    "ox.muon, ns_steps=4": {"ns_steps": 4},
    "ox.muon, standard form": {"method": "standard"},
    "ox.muon, float32": {"compute_dtype": "float32"},
}
# (ours, peer): the ratio that is to be reached.
TARGETS = {
    ("ox.muon", OPTAX): 0.18,
    ("ox.muon", TORCH): 0.7,
    ("ox.muon, ns_steps=4", OPTAX): 0.18,
    ("ox.muon, ns_steps=4", TORCH): 0.7,
    ("ox.muon, standard form", OPTAX): 0.18,
    ("ox.muon, standard form", TORCH): 0.7,
    ("ox.muon, float32", OPTAX): 0.8,
}


def shapes(width: int, layers: int) -> dict[str, Any]:
    """The hidden matrices of a transformer."""
    layer = {
        **{name: (width, width) for name in ("query", "key", "value", "out")},
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }
    return {f"layer_{index}": layer for index in range(layers)}


def transformations() -> dict[str, optax.GradientTransformation]:
    """Everything of JAX that takes part."""
    arguments = {"weight_decay": DECAY}
    return {
        **{name: ox.muon(RATE, **arguments, **more) for name, more in OURS.items()},
        OPTAX: optax.contrib.muon(RATE, **arguments, consistent_rms=0.2),
    }


class TorchMuon:
    """One step of `torch.optim.Muon`."""

    def __init__(self, params: Any, grads: Any):
        self.params = [as_tensor(leaf) for leaf in jax.tree.leaves(params)]
        for param, grad in zip(self.params, jax.tree.leaves(grads), strict=True):
            param.grad = as_tensor(grad)
        self.optimizer = torch.optim.Muon(
            self.params, lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"
        )

    def __call__(self) -> None:
        """Does the step."""
        self.optimizer.step()

    def reset(self) -> None:
        """Nothing: gradients are as they were."""


def direction(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """What was added to a parameter, decay, learning rate and shape scale taken off."""
    scale = RATE * 0.2 * np.sqrt(max(before.shape))
    return (before * (1 - RATE * DECAY) - after) / scale


def polar_error(found: np.ndarray, gradient: np.ndarray) -> float:
    """Relative distance to the polar factor of the gradient."""
    left, _, right = np.linalg.svd(gradient, full_matrices=False)
    exact = left @ right
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def errors_of(name: str, params: Any, grads: Any) -> dict[str, float]:
    """The error of the first update, by kind of matrix, from parameters of zero."""
    zeros = jax.tree.map(np.zeros_like, params)
    leaves = sorted(params)
    if name == TORCH:
        step = TorchMuon([zeros[key] for key in leaves], [grads[key] for key in leaves])
        step()
        after = {
            key: tensor.detach().numpy()
            for key, tensor in zip(leaves, step.params, strict=True)
        }
    else:
        tx = transformations()[name]
        ours = jax.tree.map(jnp.asarray, zeros)
        updates, _ = jax.jit(tx.update)(
            jax.tree.map(jnp.asarray, grads), tx.init(ours), ours
        )
        after = jax.tree.map(np.asarray, updates)
    return {
        key: round(
            polar_error(
                direction(np.float64(0 * params[key]), np.float64(after[key])),
                np.float64(grads[key]),
            ),
            4,
        )
        for key in ("query", "up", "down")
    }


def run(width: int, layers: int, rounds: int, seed: int) -> dict[str, Any]:
    """Measures one model."""
    generator = np.random.default_rng(seed)
    tree = shapes(width, layers)
    params = normal(tree, 0.02, "float32", generator)
    grads = normal(tree, 0.01, "float32", generator)
    shared = jax.tree.map(jnp.asarray, grads)
    steps: dict[str, Any] = {
        name: JaxStep(tx, params, shared) for name, tx in transformations().items()
    }
    if torch is not None:
        steps[TORCH] = TorchMuon(params, grads)
    others = others_seconds()
    show = lambda at: print(f"width {width}: round {at + 1}", file=sys.stderr)  # noqa: E731
    seconds = measure(steps, rounds, generator, show)
    busy = None if others is None else others_seconds() - others
    total = float(sum(values.sum() for values in seconds.values()))
    result: dict[str, Any] = {
        "width": width,
        "layers": layers,
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "others_cpus": None if busy is None else round(max(0.0, busy) / total, 3),
        "candidates": {},
        "ratios": [],
    }
    for name, step in steps.items():
        entry: dict[str, Any] = {"milliseconds": quartiles(1e3 * seconds[name])}
        if isinstance(step, JaxStep):
            entry |= step.memory()
        result["candidates"][name] = entry
    for ours, peer in TARGETS:
        if peer in steps:
            ratio = quartiles(seconds[ours] / seconds[peer])
            result["ratios"].append({"ours": ours, "peer": peer, "ratio": ratio})
    del steps
    gc.collect()
    for name, entry in result["candidates"].items():
        entry["polar_error"] = errors_of(name, params["layer_0"], grads["layer_0"])
    return result


def tables(models: list[dict[str, Any]]) -> str:
    """The results as text."""
    parts = []
    for model in models:
        parts.append(f"{model['layers']} layers of width {model['width']}")
        lines = [
            [
                name,
                f"{entry['milliseconds'][1]:.0f}",
                *(f"{entry['polar_error'][key]:.3f}" for key in ("query", "up")),
            ]
            for name, entry in model["candidates"].items()
        ]
        header = ("update", "ms", "error d x d", "error d x 4d")
        parts.append(format_table(header, lines, right=range(1, 4)))
        lines = []
        for row in model["ratios"]:
            target = TARGETS[row["ours"], row["peer"]]
            verdict = "pass" if row["ratio"][1] <= target else "FAIL"
            lines.append(
                [row["ours"], row["peer"], spread(row["ratio"]), f"{target} {verdict}"]
            )
        header = ("of ours", "to", "ratio of times", "target")
        parts.append(format_table(header, lines, right=()))
    return "\n\n".join(parts)


def main() -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="width 64, 2 layers")
    parser.add_argument("--out", type=Path, help=f"default results/{RESULTS.name}")
    options = parser.parse_args()
    if torch is not None:
        torch.set_num_threads(threads())
    sizes = ((64, 2),) if options.small else ((512, 6), (768, 8))
    models = [run(*size, options.rounds, options.seed) for size in sizes]
    print(tables(models))
    out = options.out or (None if options.small else RESULTS)
    if out is not None:
        document = {
            "device": jax.devices()[0].device_kind,
            "processor": processor(),
            "cpus": os.cpu_count(),
            "threads": threads(),
            "versions": versions(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seed": options.seed,
            "rounds": options.rounds,
            "models": models,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
