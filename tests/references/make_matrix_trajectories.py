"""Records ten steps of Muon and its successors in ``matrix_trajectories.npz``.

Run it in an environment of its own, since the tests never import PyTorch::

    python -m venv torch-environment
    torch-environment/bin/pip install torch==2.13.0 numpy==2.4.6 absl-py \\
        adv-optm==2.5.16 muon-optimizer==0.1.0 pytorch-optimizer==4.1.0
    torch-environment/bin/pip install --no-deps --ignore-requires-python \\
        emerging-optimizers==0.3.0 gram-newton-schulz==0.1.6 heavyball==3.2.1 \\
        timm==1.0.31
    torch-environment/bin/python tests/references/make_matrix_trajectories.py

The committed file was made with Python 3.11, PyTorch 2.13.0 (CPU) and NumPy 2.4.6; the
exact versions are inside it. `matrix_trajectories` describes the problem and reads the
file. PyTorch is imported inside the functions, so that a test runner that imports every
module to look for examples in it does not need PyTorch.

Layout. Everything is recorded as PyTorch has it: a matrix is (fan_out, fan_in), a stack
(matrices, fan_out, fan_in). The last two axes swapped give JAX's kernels.

Arithmetic. Nearly all of these packages iterate in bfloat16 or float16 whatever the
parameters are, which agrees with exact arithmetic to a few hundredths in an entry of
the orthogonalized update. So each case is recorded as "float64", with float64
parameters and with the half and single precision types of PyTorch replaced by float64
while the package runs (`everything_in_float64`): the code is the package's, only its
rounding is gone. "native" is the package as it is, with float32 parameters. It is
recorded to show what the rounding costs, and not for AdaMuon, where a division by a
second moment that has seen few steps makes of a small entry, all rounding, a large one.
NVIDIA's optimizers are float32 throughout if told to be.

What the packages are:
    muon-optimizer is Keller Jordan's, gram-newton-schulz that of its authors, and
    emerging-optimizers NVIDIA's. The authors of NorMuon, AdaMuon, Scion and Dion have
    published no package, nor those of Moonlight and Kimi K2. pytorch-optimizer has
    NorMuon, AdaMuon, Scion and MuonClip, timm has AdaMuon, adv-optm has AdaMuon with
    signs; all were read beside the authors' code. No package has Dion; Muon as in Dion
    is in gram-newton-schulz, taken from there.

Where the packages differ, from the authors or from each other:
    Normalization before Newton-Schulz is ``X / (norm + 1e-7)`` in muon-optimizer and
    gram-newton-schulz, ``X / max(norm, eps)`` in the others. gram-newton-schulz has a
    momentum that is a sum, and so sees an ``eps`` that is 1 / (1 - b1) times smaller.
    AdaMuon: pytorch-optimizer is the repository's rule without Nesterov momentum, with
    another b1 (0.9), b2 (0.95) and eps (1e-10) by default. timm does not correct the
    second moment. Neither takes signs. adv-optm does, adds no eps to the norm, and puts
    Nesterov momentum before them. NVIDIA's "adamuon" does not rescale at all and is not
    recorded.
    NorMuon: pytorch-optimizer is the authors' code, or the paper's algorithm with
    ``update_scale="match_rms"``. NVIDIA's has a second moment for each row or for each
    column, whichever are more, and bounds it from below by eps instead of adding eps to
    the root.
    Scion: pytorch-optimizer is unconstrained by default, the authors' constrained.
    NVIDIA's is constrained, spectral, and has You Jiacheng's coefficients.
    The table named "aol" of emerging-optimizers takes a singular value of 1 to -0.585.
"""

import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import sys
import typing
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from unittest import mock

import numpy as np

PATH = Path(__file__).with_name("matrix_trajectories.npz")
SEED = 20251122
STEPS = 10
PACKAGES = [
    "adv-optm",
    "emerging-optimizers",
    "gram-newton-schulz",
    "heavyball",
    "muon-optimizer",
    "pytorch-optimizer",
    "timm",
]
# A default value was looked up when its function was made.
FUNCTIONS_WITH_A_DTYPE = [
    "timm.optim.muon.zeropower_via_newtonschulz",
    "pytorch_optimizer.optimizer.utils.matrix.zero_power_via_newton_schulz_5",
]
Arithmetic = Literal["native", "float64"]
BOTH: tuple[Arithmetic, ...] = ("native", "float64")
MATRICES = ("tall", "wide", "square")
SHAPES = {
    "vector": (5,),
    "tall": (6, 4),
    "wide": (4, 7),
    "square": (5, 5),
    "stack": (3, 5, 4),
}
# Largest logit before the softmax of two heads, in each step. Both cross the threshold
# of 100, and the second head's is negative in the first step.
MAX_LOGITS = [[150.0, -3.0], [90.0, 120.0]] + [
    [80.0 + 15 * step, 400.0 / (1 + step)] for step in range(2, STEPS)
]


@dataclass(frozen=True)
class Case:
    """An optimizer with its arguments.

    Attributes:
        optimizer: dotted path of the class.
        arguments: its keyword arguments, without the learning rate.
        learning_rate: the learning rate.
        group: options of the parameter group, for optimizers that want them there.
        leaves: those it is run on.
        arithmetics: see the module's docstring.
    """

    optimizer: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float = 0.02
    group: Mapping[str, Any] = field(default_factory=dict)
    leaves: tuple[str, ...] = MATRICES
    arithmetics: tuple[Arithmetic, ...] = ("float64",)


KELLER = "muon.SingleDeviceMuon"
TORCH = "torch.optim.Muon"
TIMM = "timm.optim.muon.Muon"
KOZISTR = "pytorch_optimizer."
SCION = "pytorch_optimizer.SCION"
DION_MUON = "gram_newton_schulz.Muon"
NVIDIA = "emerging_optimizers.orthogonalized_optimizers."
MUON_GROUP = {"use_muon": True}
DION_ARGUMENTS = {
    "weight_decay": 0.01,
    "nesterov": False,
    "ns_coefficients_preset": "YOU_COEFFICIENTS",
    "ns_algorithm": "standard_newton_schulz",
    "ns_use_kernels": False,
}
# "highest" is float32; the default is bfloat16.
NVIDIA_ARGUMENTS = {"fp32_matmul_prec": "highest", "coefficient_type": "simple"}
# LMONorm: 2 spectral, 4 signs, 5 bias, 6 columns, 7 rows.
SCION_NORMS: dict[str, dict[str, Any]] = {
    "spectral": {"norm_type": 2},
    "spectral_unnormalized": {"norm_type": 2, "norm_kwargs": {"normalize": False}},
    "spectral_at_least_one": {"norm_type": 2, "norm_kwargs": {"max_scale": True}},
    "sign": {"norm_type": 4},
    "sign_unnormalized": {"norm_type": 4, "norm_kwargs": {"normalize": False}},
    "column": {"norm_type": 6},
    "column_normalized": {"norm_type": 6, "norm_kwargs": {"normalized": True}},
    "row": {"norm_type": 7},
    "row_unnormalized": {"norm_type": 7, "norm_kwargs": {"normalized": False}},
    "bias_rms": {"norm_type": 5},
}

CASES = {
    "keller": Case(KELLER, leaves=(*MATRICES, "stack"), arithmetics=BOTH),
    "keller_decay": Case(KELLER, {"weight_decay": 0.1}, leaves=(*MATRICES, "stack")),
    "torch_original": Case(TORCH, {"adjust_lr_fn": "original"}),
    "torch_match_rms_adamw": Case(TORCH, {"adjust_lr_fn": "match_rms_adamw"}),
    "timm_original": Case(
        TIMM,
        {
            "adjust_lr_fn": "original",
            "ns_coefficients": "original",
            "nesterov": True,
        },
    ),
    # Moonlight's rule, whose momentum is a sum in its own code.
    "timm_match_rms_adamw": Case(
        TIMM,
        {
            "adjust_lr_fn": "match_rms_adamw",
            "ns_coefficients": "original",
            "nesterov": True,
            "weight_decay": 0.1,
        },
    ),
    "timm_rms_to_rms": Case(
        TIMM,
        {
            "adjust_lr_fn": "rms_to_rms",
            "ns_coefficients": "quintic",
            "weight_decay": 0.1,
        },
    ),
    "moonlight": Case(
        KOZISTR + "Muon",
        {"weight_decay": 0.1, "use_adjusted_lr": True},
        group=MUON_GROUP,
        arithmetics=BOTH,
    ),
    # Dion's Muon with its two factors.
    "dion_muon_spectral": Case(
        DION_MUON,
        {**DION_ARGUMENTS, "adjust_lr": "spectral_norm"},
        0.01,
        leaves=(*MATRICES, "stack"),
        arithmetics=BOTH,
    ),
    "dion_muon_rms": Case(DION_MUON, {**DION_ARGUMENTS, "adjust_lr": "rms_norm"}, 0.01),
    # The authors' Gram Newton-Schulz and their coefficients, with a restart before the
    # third step.
    "gram_muon": Case(
        DION_MUON,
        {
            "adjust_lr": "rms_norm",
            "gram_newton_schulz_restart_iterations": [2],
            "ns_use_kernels": False,
        },
        leaves=(*MATRICES, "stack"),
        arithmetics=BOTH,
    ),
    "nvidia_muon_keller": Case(
        NVIDIA + "Muon",
        {
            **NVIDIA_ARGUMENTS,
            "scale_mode": "shape_scaling",
            "nesterov": True,
            "weight_decay": 0.1,
        },
        arithmetics=BOTH,
    ),
    "nvidia_muon_spectral": Case(
        NVIDIA + "Muon",
        {
            **NVIDIA_ARGUMENTS,
            "coefficient_type": "quintic",
            "scale_mode": "unit_rms_norm",
            "weight_decay": 0.0,
        },
        arithmetics=BOTH,
    ),
    "normuon": Case(KOZISTR + "NorMuon", group=MUON_GROUP, arithmetics=BOTH),
    "normuon_decay": Case(KOZISTR + "NorMuon", {"weight_decay": 0.1}, group=MUON_GROUP),
    "normuon_plain": Case(
        KOZISTR + "NorMuon",
        {
            "weight_decay": 0.1,
            "nesterov": False,
            "beta2": 0.8,
            "use_adjusted_lr": True,
            "ns_coeffs": "quintic",
        },
        group=MUON_GROUP,
    ),
    "normuon_rms": Case(
        KOZISTR + "NorMuon",
        {"weight_decay": 0.1, "update_scale": "match_rms"},
        group=MUON_GROUP,
    ),
    "nvidia_normuon": Case(
        NVIDIA + "AdaptiveMuon",
        {
            **NVIDIA_ARGUMENTS,
            "moment2_method": "normuon",
            "scale_mode": "shape_scaling",
            "nesterov": True,
            "momentum": 0.95,
            "weight_decay": 0.1,
        },
        arithmetics=BOTH,
    ),
    "adamuon": Case(
        KOZISTR + "AdaMuon",
        {"betas": [0.95, 0.999], "eps": 1e-8},
        group=MUON_GROUP,
    ),
    "adamuon_decay": Case(KOZISTR + "AdaMuon", {"weight_decay": 0.1}, group=MUON_GROUP),
    "timm_adamuon": Case(
        TIMM,
        {
            "algo": "adamuon",
            "adjust_lr_fn": "match_rms_adamw",
            "betas": [0.9, 0.999],
            "ns_coefficients": "original",
            "nesterov": True,
            "weight_decay": 0.1,
        },
    ),
    # Versions 2 and 3 of the paper. The stochastic rounding is for bfloat16 parameters,
    # which float64 ones pass for while everything is float64.
    "adamuon_sign": Case(
        "adv_optm.AdaMuon_adv",
        {"weight_decay": 0.1, "nesterov": False, "stochastic_rounding": False},
    ),
    "adamuon_sign_nesterov": Case(
        "adv_optm.AdaMuon_adv", {"eps": 1e-4, "stochastic_rounding": False}
    ),
    **{
        f"scion_{name}": Case(
            SCION,
            {**norm, "scale": 3.0},
            leaves=("vector",) if name == "bias_rms" else MATRICES,
        )
        for name, norm in SCION_NORMS.items()
    },
    **{
        f"scion_{name}_constrained": Case(
            SCION,
            {**SCION_NORMS[name], "scale": 3.0, "momentum": 0.3, "constraint": True},
            leaves=("vector",) if name == "bias_rms" else MATRICES,
            arithmetics=BOTH if name == "spectral" else ("float64",),
        )
        for name in ("spectral", "sign", "column", "row", "bias_rms")
    },
    "nvidia_scion": Case(
        NVIDIA + "Scion",
        {**NVIDIA_ARGUMENTS, "coefficient_type": "quintic", "spectral_radius": 3.0},
        arithmetics=BOTH,
    ),
    **{
        f"muon_clip_{role}": Case(
            KOZISTR + "MuonClip",
            {"weight_decay": 0.1},
            group={**MUON_GROUP, "qk_clip": role, "attention_name": "attention"},
            leaves=("tall", "wide"),
        )
        for role in ("query", "key", "query_rotary", "key_rotary")
    },
}


@dataclass(frozen=True)
class Function:
    """An orthogonalization, run on the gradients of the first step.

    Attributes:
        function: dotted path of it, or of a class whose instances are called.
        arguments: keyword arguments of the function, or of the class.
        table: dotted path of the coefficients, if they are an argument.
        table_argument: name of that argument.
        arithmetics: see the module's docstring.
    """

    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    table: str | None = None
    table_argument: str = ""
    arithmetics: tuple[Arithmetic, ...] = BOTH


GRAM = "gram_newton_schulz.GramNewtonSchulz"
GRAM_ARGUMENTS = {"ns_use_kernels": False, "compile_kwargs": None}
NVIDIA_NS = NVIDIA + "muon_utils.newton_schulz"
FUNCTIONS = {
    "keller": Function("muon.zeropower_via_newtonschulz5", {"steps": 5}),
    # Rounds to bfloat16 at random.
    "heavyball_polar_express": Function(
        "heavyball.utils.msign", {"steps": 10}, arithmetics=("float64",)
    ),
    "timm_polar_express_safer": Function(
        "timm.optim.muon.zeropower_via_newtonschulz",
        {"steps": 8, "safety_factor": 1.02},
        "timm.optim.muon._COEFFICIENTS.polar_express_safer",
        "coefficients",
    ),
    "gram": Function(GRAM, {**GRAM_ARGUMENTS}),
    **{
        f"gram_reset_{'_'.join(map(str, resets)) or 'never'}": Function(
            GRAM,
            {**GRAM_ARGUMENTS, "gram_newton_schulz_reset_iterations": resets},
            "gram_newton_schulz.YOU_COEFFICIENTS",
            "ns_coefficients",
        )
        for resets in ([], [1, 3])
    },
    **{
        f"nvidia_{table}": Function(
            NVIDIA_NS, {"steps": steps, "coefficient_type": table}
        )
        for table, steps in [
            ("simple", 5),
            ("quintic", 5),
            ("polar_express", 10),
            ("cans", 5),
            ("aol", 4),
            ("deepseekv4", 10),
        ]
    },
}
TABLES = {
    "timm_polar_express": "timm.optim.muon._COEFFICIENTS.polar_express",
    "timm_polar_express_safer": "timm.optim.muon._COEFFICIENTS.polar_express_safer",
    "heavyball_polar_express": "heavyball.utils.ABC_LIST",
    "gram_polar_express": "gram_newton_schulz.POLAR_EXPRESS_COEFFICIENTS",
    "gram_you": "gram_newton_schulz.YOU_COEFFICIENTS",
    **{
        f"nvidia_{name}": f"{NVIDIA}muon_utils._COEFFICIENT_SETS.{name}"
        for name in ["simple", "quintic", "polar_express", "cans", "aol", "deepseekv4"]
    },
}


def make_problem() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns float32 parameters and gradients (one per step) by leaf."""
    rng = np.random.default_rng(SEED)
    params, grads = {}, {}
    for leaf, shape in SHAPES.items():
        params[leaf] = rng.standard_normal(shape).astype(np.float32)
        noise = rng.standard_normal((STEPS, *shape)) + rng.standard_normal(shape)
        shrinking = np.geomspace(1.0, 0.1, STEPS).reshape(-1, *[1] * len(shape))
        grads[leaf] = (noise * shrinking).astype(np.float32)
    return params, grads


def prepare_packages() -> None:
    """Makes the packages importable and keeps them from compiling anything."""
    # Before PyTorch is imported: functions that they compile run as they are written.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    from make_torch_trajectories import leave_packages_empty

    leave_packages_empty("timm.optim.muon")
    # emerging-optimizers wants Python 3.12 for a decorator without effect, and Triton
    # for kernels that only run on GPUs.
    if not hasattr(typing, "override"):
        typing.override = lambda method: method
    kernels = ModuleType("emerging_optimizers.triton_kernels")
    kernels.HAS_TRITON_340 = False
    sys.modules[kernels.__name__] = kernels
    # Not later: what is imported while everything is float64 stays so.
    for case in CASES.values():
        look_up(case.optimizer)
    for function in FUNCTIONS.values():
        look_up(function.function)


def look_up(path: str) -> Any:
    """Returns the object of a dotted path; behind a mapping come its keys."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            result = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            is_mapping = isinstance(result, Mapping)
            result = result[part] if is_mapping else getattr(result, part)
        return result
    raise ModuleNotFoundError(path)


@contextlib.contextmanager
def everything_in_float64() -> Iterator[None]:
    """Makes code that asks for a smaller floating-point type get float64."""
    import torch

    def unrounded(x: torch.Tensor) -> torch.Tensor:
        return x.double()

    with contextlib.ExitStack() as stack:
        for name in ("float32", "float16", "bfloat16"):
            stack.enter_context(mock.patch.object(torch, name, torch.float64))
        for name in ("float", "half", "bfloat16"):
            stack.enter_context(mock.patch.object(torch.Tensor, name, unrounded))
        for path in FUNCTIONS_WITH_A_DTYPE:
            function = look_up(path)
            defaults = tuple(
                torch.float64 if isinstance(value, torch.dtype) else value
                for value in function.__defaults__
            )
            stack.enter_context(mock.patch.object(function, "__defaults__", defaults))
        yield


def in_arithmetic(arithmetic: Arithmetic) -> contextlib.AbstractContextManager[None]:
    """Returns the context in which a package runs."""
    if arithmetic == "native":
        return contextlib.nullcontext()
    return everything_in_float64()


def run_case(
    case: Case, params: np.ndarray, grads: np.ndarray, arithmetic: Arithmetic
) -> np.ndarray:
    """Returns the parameters of one leaf after every step."""
    import torch

    dtype = torch.float32 if arithmetic == "native" else torch.float64
    p = torch.nn.Parameter(torch.tensor(params, dtype=dtype))
    groups = [{"params": [p], **case.group}] if case.group else [p]
    trajectory = []
    with in_arithmetic(arithmetic):
        optimizer = look_up(case.optimizer)(
            groups, lr=case.learning_rate, **case.arguments
        )
        for step, g in enumerate(grads):
            # The packages overwrite gradients.
            p.grad = torch.tensor(g, dtype=dtype)
            if "qk_clip" in case.group:
                logits = torch.tensor(MAX_LOGITS[step], dtype=dtype)
                optimizer.step(attention_max_logits={"attention": logits})
            else:
                optimizer.step()
            trajectory.append(p.detach().numpy().copy())
    return np.stack(trajectory)


def run_function(
    function: Function, grad: np.ndarray, arithmetic: Arithmetic
) -> np.ndarray:
    """Returns the orthogonalized matrix or stack."""
    import torch

    dtype = torch.float32 if arithmetic == "native" else torch.float64
    arguments = dict(function.arguments)
    if function.table is not None:
        arguments[function.table_argument] = look_up(function.table)
    with in_arithmetic(arithmetic):
        called = look_up(function.function)
        x = torch.tensor(grad, dtype=dtype)
        result = called(**arguments)(x) if isinstance(called, type) else None
        result = called(x, **arguments) if result is None else result
    return result.to(dtype).numpy().copy()


def main() -> None:
    """Runs everything and writes the file."""
    prepare_packages()
    import torch

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
        "cases": {name: asdict(case) for name, case in CASES.items()},
        "functions": {name: asdict(case) for name, case in FUNCTIONS.items()},
    }
    arrays: dict[str, Any] = {
        "description": np.array(json.dumps(description)),
        "max_logits": np.array(MAX_LOGITS),
    }
    arrays |= {f"params/{leaf}": value for leaf, value in params.items()}
    arrays |= {f"grads/{leaf}": value for leaf, value in grads.items()}
    arrays |= {
        f"tables/{name}": np.array(look_up(path)) for name, path in TABLES.items()
    }
    for name, case in CASES.items():
        for arithmetic in case.arithmetics:
            for leaf in case.leaves:
                arrays[f"cases/{name}/{arithmetic}/{leaf}"] = run_case(
                    case, params[leaf], grads[leaf], arithmetic
                )
    for name, function in FUNCTIONS.items():
        for arithmetic in function.arithmetics:
            for leaf in (*MATRICES, "stack"):
                arrays[f"functions/{name}/{arithmetic}/{leaf}"] = run_function(
                    function, grads[leaf][0], arithmetic
                )
    np.savez_compressed(PATH, **arrays)
    print(f"{PATH.name}: {PATH.stat().st_size} bytes, {len(CASES)} cases")


if __name__ == "__main__":
    main()
