"""Records ten steps of the authors' APOLLO in ``low_rank_trajectories.npz``.

Run it in an environment of its own, since the tests never import PyTorch::

    python -m venv torch-environment
    torch-environment/bin/pip install torch==2.13.0 numpy==2.4.6
    torch-environment/bin/pip install --no-deps apollo-torch==1.0.3
    torch-environment/bin/python tests/references/make_low_rank_trajectories.py

The committed file was made with these versions and Python 3.11 on a CPU. The package is
imported file by file: its ``__init__`` wants bitsandbytes, and its optimizer wants
nothing of transformers but a check of versions.

Parameters are float64, and so is the arithmetic, but for the projections, which the
package draws in float32. They are recorded too, one for every step. Everything is as
PyTorch has it: matrices are (fan_out, fan_in). The gradients grow and shrink from step
to step, so that the limiter acts in some steps and not in others.
"""

import importlib
import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

PATH = Path(__file__).with_name("low_rank_trajectories.npz")
STEPS = 10
RATE = 0.01
SHAPES = {"tall": (6, 4), "wide": (4, 7), "square": (5, 5)}
SIZES = (1.0, 0.1, 3.0, 3.0, 0.5, 0.01, 0.02, 2.0, 2.0, 1.0)
APOLLO = {"rank": 2, "proj": "random", "proj_type": "std", "update_proj_gap": 4}
CASES: Mapping[str, Mapping[str, Any]] = {
    "channel": {"group": {**APOLLO, "scale_type": "channel", "scale": 1}},
    "channel_decay": {
        "group": {**APOLLO, "scale_type": "channel", "scale": 3},
        "arguments": {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1},
    },
    "channel_unlimited": {
        "group": {**APOLLO, "scale_type": "channel", "scale": 1},
        "arguments": {"disable_nl": True},
    },
    "mini": {"group": {**APOLLO, "rank": 1, "scale_type": "tensor", "scale": 128}},
    "mini_front": {
        "group": {**APOLLO, "rank": 1, "scale_type": "tensor", "scale": 128},
        "arguments": {"scale_front": True},
    },
}


def load_package() -> Any:
    """The authors' optimizer, without what it does not need."""
    versions = types.ModuleType("transformers.utils.versions")
    versions.require_version = lambda _: None
    sys.modules["transformers"] = types.ModuleType("transformers")
    sys.modules["transformers.utils"] = types.ModuleType("transformers.utils")
    sys.modules["transformers.utils.versions"] = versions
    folder = next(
        path
        for entry in sys.path
        if (path := Path(entry) / "apollo_torch").is_dir()  # what pip installed
    )
    package = types.ModuleType("apollo_torch")
    package.__path__ = [str(folder)]
    sys.modules["apollo_torch"] = package
    return importlib.import_module("apollo_torch.apollo").AdamW


def run(case: Mapping[str, Any], start: np.ndarray, grads: np.ndarray):
    """Parameters after every step, and the projection of every step."""
    import torch

    p = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    group = {"params": [p], **case["group"]}
    optimizer = load_package()([group], lr=RATE, **case.get("arguments", {}))
    trajectory, projections = [], []
    for g in grads:
        p.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
        trajectory.append(p.detach().numpy().copy())
        matrix = optimizer.state[p]["projector"].ortho_matrix.numpy().copy()
        # (rank, shorter side), also where it stands on the left.
        projections.append(matrix if matrix.shape[0] == group["rank"] else matrix.T)
    return np.stack(trajectory), np.stack(projections)


def main() -> None:
    """Writes the file."""
    rng = np.random.default_rng(20261123)
    sizes = np.float32(SIZES).reshape(-1, 1, 1)
    arrays: dict[str, np.ndarray] = {}
    for leaf, shape in SHAPES.items():
        arrays[f"params/{leaf}"] = rng.standard_normal(shape).astype(np.float32)
        normal = rng.standard_normal((STEPS, *shape)).astype(np.float32)
        arrays[f"grads/{leaf}"] = normal * sizes
        for name, case in CASES.items():
            trajectory, projections = run(
                case, arrays[f"params/{leaf}"], arrays[f"grads/{leaf}"]
            )
            arrays[f"{name}/{leaf}"] = trajectory
            arrays[f"{name}/{leaf}/projections"] = projections.astype(np.float32)
    text = json.dumps({"learning_rate": RATE, "cases": CASES})
    np.savez_compressed(PATH, description=np.array(text), **arrays)


if __name__ == "__main__":
    main()
