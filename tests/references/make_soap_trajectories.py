"""Records runs of SOAP and Shampoo for PyTorch in ``soap_trajectories.npz``.

Run it in an environment of its own, since the tests never import PyTorch::

    python -m venv torch-environment
    torch-environment/bin/pip install torch==2.13.0 numpy==2.4.6
    torch-environment/bin/pip install --no-deps pytorch-optimizer==4.1.0
    torch-environment/bin/python tests/references/make_soap_trajectories.py

The committed file was made with Python 3.11 on a CPU; the exact versions are inside it.
PyTorch is imported inside the functions, so that a test runner may import the module.

What the classes of the package are:
    SOAP is the rule of the authors' `soap.py` (nikhilvyas/SOAP, at f42d296), read side
    by side: the first step makes the bases and moves nothing, ε is added before the
    bias correction, factors and bases follow the step, V is permuted and not turned.
    Two things are written otherwise: the mean is kept outside the eigenbasis and turned
    in every step, which is the same number, and QR runs in float32 whatever the
    parameters are. Here it runs in float64, as all the rest. Theirs keeps factors in
    float32 always, so that it has no run in float64.
    Shampoo is Algorithm 1 of the paper: sums, a root in every step.
    ScalableShampoo is Google's, with averages, blocks and grafting. Its averages have
    no bias correction and its momentum comes after the preconditioner; it is off here.

Gradients are float32 numbers, all else is float64. The parameters are zero before each
step and the learning rate is 1, so that the file has the updates themselves.
"""

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

PATH = Path(__file__).with_name("soap_trajectories.npz")
SEED = 20240917
STEPS = 23
# First factors of square matrices have full rank, and so determined eigenvectors.
SHAPES = {"square": (5, 5), "tall": (6, 4), "large": (6, 6), "vector": (4,)}


@dataclass(frozen=True)
class Case:
    """An optimizer with its arguments, and the leaves that it is run on."""

    optimizer: str
    leaves: tuple[str, ...]
    arguments: Mapping[str, Any]


_SCALABLE = {
    "betas": (0.0, 0.9),
    "start_preconditioning_step": 1,
    "preconditioning_compute_steps": 1,
    "shape_interpretation": False,
    "graft_type": 0,
    "nesterov": False,
    "diagonal_eps": 1e-30,
    "matrix_eps": 0.0,
    "use_svd": True,
}

CASES = {
    "soap": Case("SOAP", ("square", "vector"), {}),
    "soap_often": Case(
        "SOAP",
        ("square", "vector"),
        {"betas": (0.9, 0.8), "precondition_frequency": 3, "eps": 1e-3},
    ),
    "soap_factors": Case(
        "SOAP", ("square",), {"shampoo_beta": 0.7, "precondition_frequency": 3}
    ),
    # Rows have no basis.
    "soap_one_side": Case(
        "SOAP", ("tall",), {"max_precondition_dim": 5, "precondition_frequency": 3}
    ),
    "shampoo": Case("Shampoo", ("square", "vector"), {"matrix_eps": 0.0}),
    "averages": Case("ScalableShampoo", ("square",), _SCALABLE),
    "order_2": Case(
        "ScalableShampoo", ("square",), {**_SCALABLE, "inverse_exponent_override": 2}
    ),
    "tiles": Case("ScalableShampoo", ("large",), {**_SCALABLE, "block_size": 3}),
    "graft_sgd": Case("ScalableShampoo", ("square",), {**_SCALABLE, "graft_type": 1}),
    "graft_adagrad": Case(
        "ScalableShampoo", ("square",), {**_SCALABLE, "graft_type": 2}
    ),
    "graft_rmsprop": Case(
        "ScalableShampoo", ("square",), {**_SCALABLE, "graft_type": 3}
    ),
}


def make_gradients() -> dict[str, np.ndarray]:
    """Float32 gradients by leaf, one per step."""
    rng = np.random.default_rng(SEED)
    grads = {}
    for leaf, shape in SHAPES.items():
        noise = rng.standard_normal((STEPS, *shape))
        # Rows and columns of other sizes, which change places half-way.
        for axis, size in enumerate(shape, 1):
            scale = np.geomspace(0.5, 2.0, size)
            scale = np.stack([np.roll(scale, 2 * step // 7) for step in range(STEPS)])
            place = [1] * noise.ndim
            place[0], place[axis] = STEPS, size
            noise = noise * scale.reshape(place)
        grads[leaf] = (noise + 0.5 * rng.standard_normal(shape)).astype(np.float32)
    return grads


class _DecomposesInFloat64:
    """PyTorch, for a module that asks for a decomposition in float32."""

    def __getattr__(self, name: str) -> Any:
        import torch

        return torch.float64 if name == "float32" else getattr(torch, name)


def run(case: Case, grads: np.ndarray) -> np.ndarray:
    """Returns the update of every step, in float64."""
    import pytorch_optimizer
    import pytorch_optimizer.optimizer.soap as module
    import torch

    module.torch = _DecomposesInFloat64()
    p = torch.nn.Parameter(torch.zeros(grads.shape[1:], dtype=torch.float64))
    decay = {"weight_decay": 0.0}
    optimizer = getattr(pytorch_optimizer, case.optimizer)(
        [p], lr=1.0, **decay, **case.arguments
    )
    updates = []
    for g in grads:
        p.data.zero_()
        p.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
        updates.append(-p.detach().numpy().copy())
    return np.stack(updates)


def main() -> None:
    """Runs every case and writes the file."""
    grads = make_gradients()
    versions = {
        "python": platform.python_version(),
        **{
            name: importlib.metadata.version(name)
            for name in ("torch", "numpy", "pytorch-optimizer")
        },
    }
    description = {
        "versions": versions,
        "seed": SEED,
        "cases": {name: asdict(case) for name, case in CASES.items()},
    }
    arrays: dict[str, Any] = {"description": np.array(json.dumps(description))}
    arrays |= {f"grads/{leaf}": g for leaf, g in grads.items()}
    for name, case in CASES.items():
        for leaf in case.leaves:
            arrays[f"{name}/{leaf}"] = run(case, grads[leaf])
    np.savez_compressed(PATH, **arrays)
    print(f"{PATH.name}: {PATH.stat().st_size} bytes, {len(CASES)} cases")


if __name__ == "__main__":
    main()
