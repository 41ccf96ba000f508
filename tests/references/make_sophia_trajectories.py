"""Records 25 steps of Sophia for PyTorch in ``sophia_trajectories.npz``.

Run it in an environment of its own, since the tests never import PyTorch::

    python -m venv torch-environment
    torch-environment/bin/pip install torch==2.13.0 numpy==2.4.6
    torch-environment/bin/pip install --no-deps pytorch-optimizer==4.1.0 \\
        sophia-opt==0.2.2
    torch-environment/bin/python tests/references/make_sophia_trajectories.py

The committed file was made with Python 3.11; the exact versions are inside it.
`sophia_trajectories` describes the problem and reads the file. PyTorch is imported
inside the functions, so that a test runner may import the module.

What the packages are:
    sophia-opt is the authors' `sophia.py` (Liuhong99/Sophia): its class differs by an
    unused variable. As in their training script `update_hessian` is called after every
    k-th step, with the gradient of sampled labels in the place of the gradient, and
    ``bs`` is the number of terms in its mean.
    pytorch-optimizer has Sophia-H in the order of the paper: an estimate that it is
    given is mixed in before the step. Its clipping at p without a gamma, after a
    division by max(h, eps), is the paper's with gamma = p, a learning rate p times as
    large and p times the eps.
"""

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

PATH = Path(__file__).with_name("sophia_trajectories.npz")
SEED = 20230523
STEPS = 25
PACKAGES = ["pytorch-optimizer", "sophia-opt"]


@dataclass(frozen=True)
class Case:
    """An optimizer with its arguments.

    Attributes:
        optimizer: "SophiaG" or "SophiaH".
        arguments: its keyword arguments.
        update_interval: steps from one refresh to the next.
        batch_size: of "SophiaG", its argument ``bs``.
    """

    optimizer: str
    arguments: Mapping[str, Any]
    update_interval: int
    batch_size: int = 1


CASES = {
    # The defaults, and the interval of the training script.
    "sophia_g": Case("SophiaG", {"lr": 1e-2}, 10, batch_size=480),
    "sophia_g_often": Case(
        "SophiaG",
        {"lr": 1e-2, "betas": [0.9, 0.8], "rho": 0.05, "weight_decay": 0.0},
        3,
        batch_size=64,
    ),
    "sophia_h": Case(
        "SophiaH",
        {"lr": 2e-2, "p": 0.5, "weight_decay": 0.1, "update_period": 10},
        10,
    ),
    "sophia_h_often": Case(
        "SophiaH",
        {"lr": 0.2, "p": 5e-2, "betas": [0.9, 0.8], "update_period": 4},
        4,
    ),
}


def make_problem() -> dict[str, dict[str, np.ndarray]]:
    """Returns float32 arrays by kind and leaf; all but "params" have one per step."""
    rng = np.random.default_rng(SEED)
    problem = {kind: {} for kind in ("params", "grads", "sampled", "hessians")}
    for leaf, shape in {"vector": (8,), "matrix": (5, 12)}.items():
        # Curvatures from those that clip nearly every step to those that clip none.
        size = np.geomspace(0.03, 10.0, shape[-1])
        noise = {
            kind: rng.standard_normal((STEPS, *shape))
            for kind in ("grads", "sampled", "hessians")
        }
        arrays = {
            "params": rng.standard_normal(shape),
            "grads": 0.3 * noise["grads"] + rng.standard_normal(shape),
            "sampled": size * noise["sampled"],
            # Of both signs, as estimates of Hutchinson are.
            "hessians": 30 * size * (1 + 2 * noise["hessians"]),
        }
        for kind, array in arrays.items():
            problem[kind][leaf] = array.astype(np.float32)
    return problem


def run(
    case: Case, leaves: Mapping[str, np.ndarray], dtype_name: str
) -> list[np.ndarray]:
    """Returns the parameters after every step."""
    import torch
    from pytorch_optimizer import SophiaH
    from sophia_opt import SophiaG

    def tensor(x: np.ndarray) -> torch.Tensor:
        return torch.tensor(x.copy(), dtype=getattr(torch, dtype_name))

    p = torch.nn.Parameter(tensor(leaves["params"]))
    is_g = case.optimizer == "SophiaG"
    optimizer = (SophiaG if is_g else SophiaH)([p], **case.arguments)
    trajectory = []
    for step in range(STEPS):
        p.grad = tensor(leaves["grads"][step])
        if is_g:
            optimizer.step(bs=case.batch_size)
            if step % case.update_interval == case.update_interval - 1:
                p.grad = tensor(leaves["sampled"][step])
                optimizer.update_hessian()
        elif step % case.update_interval == 0:
            optimizer.step(hessian=[tensor(leaves["hessians"][step])])
        else:
            optimizer.step()
        trajectory.append(p.detach().numpy().copy())
    return trajectory


def main() -> None:
    """Runs every case in both dtypes and writes the file."""
    problem = make_problem()
    description = {
        "versions": {
            "python": platform.python_version(),
            **{
                name: importlib.metadata.version(name)
                for name in ("torch", "numpy", *PACKAGES)
            },
        },
        "seed": SEED,
        "cases": {name: asdict(case) for name, case in CASES.items()},
    }
    arrays: dict[str, Any] = {"description": np.array(json.dumps(description))}
    for kind, leaves in problem.items():
        arrays |= {f"{kind}/{leaf}": value for leaf, value in leaves.items()}
    for name, case in CASES.items():
        for leaf in problem["params"]:
            leaves = {kind: problem[kind][leaf] for kind in problem}
            for dtype_name in ("float32", "float64"):
                arrays[f"{name}/{dtype_name}/{leaf}"] = np.stack(
                    run(case, leaves, dtype_name)
                )
    np.savez_compressed(PATH, **arrays)
    print(f"{PATH.name}: {PATH.stat().st_size} bytes, {len(CASES)} cases")


if __name__ == "__main__":
    main()
