"""The optimizers of `convergence.py`, with the middle of what is tried of each.

Gradients are clipped to norm 1 before every one of them, and what decays does so by 0.1
of the learning rate in the form of its paper (Lion's and Signum's rates are a tenth of
AdamW's, their decay ten times). The decay rate b2 of mean squares is 0.95, as runs
are short, but for ADOPT, Adan, MARS, Sophia, Kron and Adafactor, where it means
something else or is a schedule. Everything else is the default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import optax

import optaxplus as ox


@dataclass(frozen=True)
class Optimizer:
    """What is tuned and compared.

    Attributes:
        factory: Makes it from a learning rate or a schedule.
        rate: The learning rate in the middle of those that are tried.
        arguments: For the factory.
        keeps_adamw_rate: Whether its rates mean something else for hidden matrices, so
            that the rest keeps AdamW's best, as its `adamw_learning_rate`.
        needs_hessian: Whether it is given estimates of the Hessian's diagonal.
    """

    factory: Callable[..., optax.GradientTransformation]
    rate: float
    arguments: dict[str, Any] = field(default_factory=dict)
    keeps_adamw_rate: bool = False
    needs_hessian: bool = False


B2 = {"b2": 0.95}
ADAM = B2 | {"weight_decay": 0.1}
SIGN = {"weight_decay": 1.0}
DECAY = {"weight_decay": 0.1}

OPTIMIZERS = {
    "adamw": Optimizer(ox.adamw, 2e-3, ADAM),
    "sgd": Optimizer(ox.sgd, 0.3),
    "momentum": Optimizer(ox.sgd, 0.1, {"momentum": 0.9}),
    "nesterov": Optimizer(ox.sgd, 0.1, {"momentum": 0.9, "nesterov": True}),
    "adagrad": Optimizer(ox.adagrad, 3e-2),
    "rmsprop": Optimizer(ox.rmsprop, 2e-3, B2),
    "adam": Optimizer(ox.adam, 2e-3, B2),
    "amsgrad": Optimizer(ox.amsgrad, 2e-3, B2),
    "nadam": Optimizer(ox.nadam, 2e-3, B2),
    "radam": Optimizer(ox.radam, 2e-3, B2),
    "ranger": Optimizer(ox.ranger, 2e-3, B2),
    "stable_adamw": Optimizer(ox.stable_adamw, 2e-3, ADAM),
    "adam_mini": Optimizer(ox.adam_mini, 2e-3, ADAM),
    "adopt": Optimizer(ox.adopt, 2e-3, DECAY),
    "adan": Optimizer(ox.adan, 2e-3, DECAY),
    "ademamix": Optimizer(ox.ademamix, 2e-3, ADAM),
    "mars": Optimizer(ox.mars, 2e-3, DECAY),
    "adamw8bit": Optimizer(ox.adamw8bit, 2e-3, ADAM),
    "lion": Optimizer(ox.lion, 2e-4, SIGN),
    "lion8bit": Optimizer(ox.lion8bit, 2e-4, SIGN),
    "signum": Optimizer(ox.signum, 2e-4, SIGN),
    "lars": Optimizer(ox.lars, 2.0),
    "lamb": Optimizer(ox.lamb, 1e-2, ADAM),
    # Its default, 128, would leave most of these small matrices as they are.
    "adafactor": Optimizer(ox.adafactor, 2e-2, {"min_dim_size_to_factor": 16}),
    "came": Optimizer(ox.came, 2e-3, ADAM),
    "sophia": Optimizer(ox.sophia, 2e-4, {"gamma": 0.05} | DECAY, needs_hessian=True),
    "muon": Optimizer(ox.muon, 4e-3),
    "normuon": Optimizer(ox.normuon, 4e-3),
    "adamuon": Optimizer(ox.adamuon, 4e-3, B2),
    "scion": Optimizer(ox.scion, 2e-4),
    "dion": Optimizer(ox.dion, 4e-3, {"rank_fraction": 0.25}),
    "shampoo": Optimizer(ox.shampoo, 2e-3),
    "soap": Optimizer(ox.soap, 4e-3),
    "kron": Optimizer(ox.kron, 1e-3, keeps_adamw_rate=True),
    "apollo": Optimizer(ox.apollo, 1e-2, {"rank": 16} | B2, keeps_adamw_rate=True),
    "apollo_mini": Optimizer(
        ox.apollo,
        1e-2,
        {"rank": 1, "scaling": "tensor", "scale": 128.0} | B2,
        keeps_adamw_rate=True,
    ),
}
