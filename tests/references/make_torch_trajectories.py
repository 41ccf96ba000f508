"""Records ten steps of optimizers for PyTorch in ``torch_trajectories.npz``.

Run it in an environment of its own, since the tests never import PyTorch::

    python -m venv torch-environment
    torch-environment/bin/pip install torch==2.13.0 numpy==2.4.6 adam-mini==1.1.1 \\
        came-pytorch==0.1.3 lion-pytorch==0.2.5 pytorch-optimizer==4.1.0 \\
        torch-adopt==0.1.0 torch-optimi==0.3.3
    torch-environment/bin/pip install --no-deps timm==1.0.31
    torch-environment/bin/python tests/references/make_torch_trajectories.py

The committed file was made with Python 3.11, PyTorch 2.13.0 (CPU) and NumPy 2.4.6;
the exact versions are inside it. `torch_trajectories` describes the problem and reads
the file. To record another optimizer add a row to `CASES`: its authors' own package
where there is one, or else one whose code was read and found to follow the authors'
rule, with arguments that switch off what it adds to that rule.

Muon and gradient centralization treat the two sides of a matrix differently: they are
given (fan_out, fan_in) matrices, the transposes of ours, and their results are
transposed back. PyTorch's Muon runs Newton-Schulz in bfloat16 whatever the parameters
are; a float64 iteration agrees with it to a few hundredths in each entry of the
orthogonalized update, not better.
"""

import importlib
import importlib.metadata
import json
import math
import platform
import sys
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

PATH = Path(__file__).with_name("torch_trajectories.npz")
SEED = 20250701
STEPS = 10
DTYPES = {"float32": torch.float32, "float64": torch.float64}
PACKAGES = [
    "adam-mini",
    "came-pytorch",
    "lion-pytorch",
    "pytorch-optimizer",
    "timm",
    "torch-adopt",
    "torch-optimi",
]

# A warm-up over three steps or a cosine, whichever is smaller.
SCHEDULE = [
    0.01 * min((step + 1) / 3, 0.5 + 0.5 * math.cos(math.pi * step / STEPS))
    for step in range(STEPS)
]


@dataclass(frozen=True)
class Case:
    """A row of the table: which optimizer, with which arguments.

    Attributes:
        optimizer: class in ``torch.optim``, or the dotted path of another one.
        arguments: its keyword arguments, without the learning rate.
        learning_rate: a number, or one per step.
        wrapped: class of the optimizer that it wraps, which has its own defaults and
            gets the learning rate.
        transposed: whether its matrices are (fan_out, fan_in).
        leaves: those it is run on.
        parameter_name: what to call its parameter, if it goes by names.
    """

    optimizer: str
    arguments: dict[str, Any]
    learning_rate: float | list[float]
    wrapped: str | None = None
    transposed: bool = False
    leaves: tuple[str, ...] = ("vector", "tall", "wide", "stack")
    parameter_name: str | None = None


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
    "muon_original": Case(
        "Muon",
        {"adjust_lr_fn": "original"},
        0.02,
        transposed=True,
        leaves=("tall", "wide", "stack"),
    ),
    "muon_match_rms_adamw": Case(
        "Muon",
        {"adjust_lr_fn": "match_rms_adamw"},
        0.02,
        transposed=True,
        leaves=("tall", "wide", "stack"),
    ),
    # The paper's epsilons. PyTorch's default for the first is the machine epsilon, a
    # floor that in float32 lies above the squares of the smallest gradients here.
    "adafactor": Case("Adafactor", {"eps": [1e-30, 1e-3]}, 0.01),
    # From the fifth step on 1 / sqrt(t) is the smaller one.
    "adafactor_relative_step": Case("Adafactor", {"eps": [1e-30, 1e-3]}, 0.5),
    "adagrad": Case("Adagrad", {}, 0.01),
    "adagrad_options": Case(
        "Adagrad",
        {"initial_accumulator_value": 0.1, "weight_decay": 0.1, "lr_decay": 0.1},
        0.01,
    ),
    "rmsprop": Case("RMSprop", {}, 0.01),
    "rmsprop_centered": Case(
        "RMSprop", {"centered": True, "momentum": 0.9, "weight_decay": 0.1}, SCHEDULE
    ),
    "nadam": Case("NAdam", {}, 0.01),
    "nadam_decay": Case(
        "NAdam", {"decoupled_weight_decay": True, "weight_decay": 0.1}, SCHEDULE
    ),
    # With the default memory the first five of ten steps are not rectified.
    "radam": Case("RAdam", {}, 0.01),
    "radam_decay": Case(
        "RAdam", {"decoupled_weight_decay": True, "weight_decay": 0.1}, SCHEDULE
    ),
    # The reference implementation; its loop over the parameters runs on a CPU too.
    "stable_adamw": Case(
        "optimi.StableAdamW",
        {"weight_decay": 0.1, "foreach": False, "triton": False},
        SCHEDULE,
    ),
    # The authors publish no package; timm has their code, argument by argument.
    "adan": Case("timm.optim.adan.Adan", {}, 0.01),
    "adan_decay": Case("timm.optim.adan.Adan", {"weight_decay": 0.1}, SCHEDULE),
    "adan_no_prox": Case(
        "timm.optim.adan.Adan", {"weight_decay": 0.1, "no_prox": True}, 0.01
    ),
    # The authors' package. It clips at the fourth root of the number of steps before.
    "adopt": Case("adopt.ADOPT", {"clip_lambda": None}, 0.01),
    "adopt_clipped": Case(
        "adopt.ADOPT", {"weight_decay": 0.1, "decouple": True}, SCHEDULE
    ),
    # The authors publish no package. Their code adds 1e-8 to the two rates between
    # which the warm-up interpolates, this one does not: with 0.99 for the slow one,
    # rather than 0.9999, that is one part in a million of 1 - rate. It also lets ten
    # steps of the slow average weigh something.
    "ademamix": Case(
        "pytorch_optimizer.AdEMAMix", {"betas": [0.9, 0.999, 0.99], "alpha": 5.0}, 0.01
    ),
    "ademamix_warmup": Case(
        "pytorch_optimizer.AdEMAMix",
        {
            "betas": [0.9, 0.999, 0.99],
            "alpha": 5.0,
            "t_alpha_beta3": 6,
            "weight_decay": 0.1,
            "weight_decouple": True,
        },
        SCHEDULE,
    ),
    # The authors' package. A matrix of an MLP has one second moment for each output, a
    # name that says nothing of the layer's kind gets one for all.
    "adam_mini": Case(
        "adam_mini.Adam_mini",
        {"weight_decay": 0.1, "verbose": False},
        0.01,
        transposed=True,
        leaves=("tall", "wide", "stack"),
        parameter_name="mlp",
    ),
    "adam_mini_block": Case(
        "adam_mini.Adam_mini",
        {"weight_decay": 0.1, "verbose": False},
        0.01,
        parameter_name="block",
    ),
    # Averages with 1 - momentum, then takes the sign.
    "signum": Case("pytorch_optimizer.SignSGD", {"weight_decay": 0.1}, 0.01),
    # The same as the authors' code for JAX.
    "lion": Case("lion_pytorch.Lion", {"weight_decay": 0.1}, SCHEDULE),
    # Without the global clipping this is the rule of the paper and of TensorFlow.
    "lamb": Case(
        "timm.optim.lamb.Lamb", {"weight_decay": 0.1, "max_grad_norm": None}, 0.01
    ),
    # Without its epsilon this is the paper's rate. The learning rate is outside the
    # buffer, which at a constant rate is the same as inside.
    "lars": Case(
        "timm.optim.lars.Lars",
        {"momentum": 0.9, "weight_decay": 0.1, "trust_coeff": 0.02, "eps": 0.0},
        0.5,
    ),
    # The authors' package.
    "came": Case("came_pytorch.CAME", {"weight_decay": 0.1}, SCHEDULE),
    "came_plain": Case("came_pytorch.CAME", {}, 0.01),
    # The authors publish no package. timm has their code, but takes the last gradient
    # before the first step for equal and not for zero: that shows where gradients are
    # small, elsewhere the clipping hides it.
    "mars": Case(
        "timm.optim.mars.Mars",
        {"betas": [0.95, 0.99], "weight_decay": 0.1, "optimize_1d": True},
        SCHEDULE,
        leaves=("tall", "wide"),
    ),
    # This one takes it for zero, but adds to the second moment that Lion does not have.
    "mars_lion": Case(
        "pytorch_optimizer.MARS",
        {"mars_type": "lion", "weight_decay": 0.1, "optimize_1d": True},
        0.01,
    ),
    "lookahead": Case(
        "pytorch_optimizer.Lookahead", {"k": 3, "alpha": 0.6}, 0.01, wrapped="Adam"
    ),
    # The author publishes no package. This one follows his code if told to take the
    # steps that cannot be rectified.
    "ranger": Case(
        "pytorch_optimizer.Ranger",
        {"k": 3, "weight_decay": 0.1, "degenerated_to_sgd": True},
        0.01,
        transposed=True,
    ),
    "ranger_no_gc": Case(
        "pytorch_optimizer.Ranger",
        {"k": 3, "weight_decay": 0.1, "degenerated_to_sgd": True, "use_gc": False},
        0.01,
    ),
    # The authors' present normaliser is timm's, max(mean(mask), 1e-3).
    "cautious_adamw": Case(
        "timm.optim.adamw.AdamWLegacy", {"weight_decay": 0.1, "caution": True}, 0.01
    ),
    "cautious_lion": Case(
        "timm.optim.lion.Lion", {"weight_decay": 0.1, "caution": True}, 0.01
    ),
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


def load_class(path: str) -> type:
    """Returns the class of a dotted path, or of ``torch.optim`` if there is no dot."""
    module, _, name = path.rpartition(".")
    if module.startswith("timm."):
        leave_packages_empty(module)
    return getattr(importlib.import_module(module or "torch.optim"), name)


def leave_packages_empty(module: str) -> None:
    """Makes a module importable without what the packages around it import.

    timm's import torchvision and all its models, of which its optimizers need nothing.
    """
    name, path = "", None
    for part in module.split(".")[:-1]:
        name = f"{name}.{part}" if name else part
        spec = PathFinder.find_spec(name, path)
        if spec is None:
            raise ModuleNotFoundError(name)
        path = spec.submodule_search_locations
        package = sys.modules.setdefault(name, ModuleType(name))
        package.__path__ = path


def make_optimizer(
    case: Case, p: torch.nn.Parameter, learning_rate: float
) -> torch.optim.Optimizer:
    """Returns the optimizer of one parameter."""
    params = [(case.parameter_name, p)] if case.parameter_name else [p]
    if case.wrapped is None:
        return load_class(case.optimizer)(params, lr=learning_rate, **case.arguments)
    wrapped = load_class(case.wrapped)(params, lr=learning_rate)
    return load_class(case.optimizer)(wrapped, **case.arguments)


def run_block(
    case: Case, params: np.ndarray, grads: np.ndarray, dtype: torch.dtype
) -> np.ndarray:
    """Returns the parameters of one vector or matrix after every step."""
    transposed = case.transposed and params.ndim == 2
    if transposed:
        params, grads = params.T, grads.swapaxes(1, 2)
    p = torch.nn.Parameter(torch.tensor(params.copy(), dtype=dtype))
    rates = case.learning_rate
    rates = rates if isinstance(rates, list) else [rates] * STEPS
    optimizer = make_optimizer(case, p, rates[0])
    trajectory = []
    for rate, g in zip(rates, grads, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        p.grad = torch.tensor(g.copy(), dtype=dtype)
        optimizer.step()
        trajectory.append(p.detach().numpy().copy())
    stacked = np.stack(trajectory)
    return stacked.swapaxes(1, 2) if transposed else stacked


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
            **{name: importlib.metadata.version(name) for name in PACKAGES},
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
                "wrapped": case.wrapped,
            }
            for name, case in CASES.items()
        },
    }
    arrays: dict[str, Any] = {"description": np.array(json.dumps(description))}
    arrays |= {f"params/{leaf}": value for leaf, value in params.items()}
    arrays |= {f"grads/{leaf}": value for leaf, value in grads.items()}
    for name, case in CASES.items():
        for dtype_name, dtype in DTYPES.items():
            # NAdam accumulates a scalar in the default dtype.
            torch.set_default_dtype(dtype)
            for leaf in case.leaves:
                arrays[f"{name}/{dtype_name}/{leaf}"] = run_leaf(
                    case, params[leaf], grads[leaf], dtype
                )
    np.savez_compressed(PATH, **arrays)
    print(f"{PATH.name}: {PATH.stat().st_size} bytes, {len(CASES)} cases")


if __name__ == "__main__":
    main()
