"""Records ten steps of PyTorch's optimizers in ``torch_trajectories.npz``.

Run it in an environment of its own, since the tests never import PyTorch::

    python -m venv torch-environment
    torch-environment/bin/pip install torch==2.13.0 numpy==2.4.6
    torch-environment/bin/python tests/references/make_torch_trajectories.py

The committed file was made with Python 3.11, PyTorch 2.13.0 (CPU) and NumPy 2.4.6;
the exact versions are inside it. `torch_trajectories` describes the problem and reads
the file. To record another optimizer add a row to `CASES`.

PyTorch's Muon wants (fan_out, fan_in) matrices: it is given transposes, so that its
shape scales mean the same as ours, and its results are transposed back. It runs
Newton-Schulz in bfloat16 whatever the parameters are; a float64 iteration agrees with
it to a few hundredths in each entry of the orthogonalized update, not better.
"""

import json
import math
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

PATH = Path(__file__).with_name("torch_trajectories.npz")
SEED = 20250701
STEPS = 10
DTYPES = {"float32": torch.float32, "float64": torch.float64}

# A warm-up over three steps or a cosine, whichever is smaller.
SCHEDULE = [
    0.01 * min((step + 1) / 3, 0.5 + 0.5 * math.cos(math.pi * step / STEPS))
    for step in range(STEPS)
]


@dataclass(frozen=True)
class Case:
    """A row of the table: which optimizer, with which arguments.

    Attributes:
        optimizer: class in ``torch.optim``.
        arguments: its keyword arguments, without the learning rate.
        learning_rate: a number, or one per step.
        transposed_matrices_only: whether it takes (fan_out, fan_in) matrices and
            nothing else, as Muon does.
    """

    optimizer: str
    arguments: dict[str, Any]
    learning_rate: float | list[float]
    transposed_matrices_only: bool = False


CASES = {
    "sgd": Case("SGD", {}, 0.01),
    "sgd_momentum": Case("SGD", {"momentum": 0.9}, 0.01),
    "sgd_nesterov": Case("SGD", {"momentum": 0.9, "nesterov": True}, 0.01),
    "sgd_dampening": Case("SGD", {"momentum": 0.9, "dampening": 0.5}, 0.01),
    "sgd_weight_decay": Case("SGD", {"momentum": 0.9, "weight_decay": 0.1}, 0.01),
    "adam": Case("Adam", {}, 0.01),
    # With a short memory and shrinking gradients the second moment falls, so that its
    # maximum matters.
    "adam_amsgrad": Case("Adam", {"betas": [0.9, 0.8], "amsgrad": True}, 0.01),
    "adamw": Case("AdamW", {"weight_decay": 0.1}, 0.01),
    "adamw_schedule": Case("AdamW", {"weight_decay": 0.1}, SCHEDULE),
    "muon_original": Case("Muon", {"adjust_lr_fn": "original"}, 0.02, True),
    "muon_match_rms_adamw": Case(
        "Muon", {"adjust_lr_fn": "match_rms_adamw"}, 0.02, True
    ),
    # The paper's epsilons. PyTorch's default for the first is the machine epsilon, a
    # floor that in float32 lies above the squares of the smallest gradients here.
    "adafactor": Case("Adafactor", {"eps": [1e-30, 1e-3]}, 0.01),
    # From the fifth step on 1 / sqrt(t) is the smaller one.
    "adafactor_relative_step": Case("Adafactor", {"eps": [1e-30, 1e-3]}, 0.5),
}


def make_problem() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns float32 parameters and gradients (one per step) by leaf."""
    rng = np.random.default_rng(SEED)
    shapes = {"vector": (5,), "tall": (6, 4), "wide": (3, 8), "stack": (3, 4, 5)}
    scales = {
        "vector": 1e-4,
        "tall": 1.0,
        "wide": 1e3,
        "stack": np.array([1e-4, 1.0, 1e3]).reshape(3, 1, 1),
    }
    params, grads = {}, {}
    for leaf, shape in shapes.items():
        params[leaf] = rng.standard_normal(shape).astype(np.float32)
        noise = rng.standard_normal((STEPS, *shape)) + rng.standard_normal(shape)
        shrinking = np.geomspace(1.0, 0.1, STEPS).reshape(-1, *[1] * len(shape))
        grads[leaf] = (noise * scales[leaf] * shrinking).astype(np.float32)
    return params, grads


def run_block(
    case: Case, params: np.ndarray, grads: np.ndarray, dtype: torch.dtype
) -> np.ndarray:
    """Returns the parameters of one vector or matrix after every step."""
    if case.transposed_matrices_only:
        params, grads = params.T, grads.swapaxes(1, 2)
    p = torch.nn.Parameter(torch.tensor(params.copy(), dtype=dtype))
    rates = case.learning_rate
    rates = rates if isinstance(rates, list) else [rates] * STEPS
    optimizer = getattr(torch.optim, case.optimizer)([p], lr=rates[0], **case.arguments)
    trajectory = []
    for rate, g in zip(rates, grads, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        p.grad = torch.tensor(g.copy(), dtype=dtype)
        optimizer.step()
        trajectory.append(p.detach().numpy().copy())
    stacked = np.stack(trajectory)
    return stacked.swapaxes(1, 2) if case.transposed_matrices_only else stacked


def run_leaf(
    case: Case, params: np.ndarray, grads: np.ndarray, dtype: torch.dtype
) -> np.ndarray:
    """Returns the parameters of one leaf after every step, a stack slice by slice."""
    if params.ndim < 3:
        return run_block(case, params, grads, dtype)
    slices = [
        run_block(case, params[i], grads[:, i], dtype) for i in range(len(params))
    ]
    return np.stack(slices, axis=1)


def main() -> None:
    """Runs every case in both dtypes and writes the file."""
    torch.set_num_threads(1)
    params, grads = make_problem()
    description = {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "seed": SEED,
        "cases": {
            name: {
                "optimizer": case.optimizer,
                "arguments": case.arguments,
                "learning_rates": (
                    case.learning_rate
                    if isinstance(case.learning_rate, list)
                    else [case.learning_rate] * STEPS
                ),
            }
            for name, case in CASES.items()
        },
    }
    arrays: dict[str, Any] = {"description": np.array(json.dumps(description))}
    arrays |= {f"params/{leaf}": value for leaf, value in params.items()}
    arrays |= {f"grads/{leaf}": value for leaf, value in grads.items()}
    for name, case in CASES.items():
        for dtype_name, dtype in DTYPES.items():
            for leaf in params:
                if case.transposed_matrices_only and params[leaf].ndim < 2:
                    continue
                arrays[f"{name}/{dtype_name}/{leaf}"] = run_leaf(
                    case, params[leaf], grads[leaf], dtype
                )
    np.savez_compressed(PATH, **arrays)
    print(f"{PATH.name}: {PATH.stat().st_size} bytes, {len(CASES)} cases")


if __name__ == "__main__":
    main()
