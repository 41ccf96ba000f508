"""The optimizers of `convergence.py`, with the middle of what is tried of each.

Gradients are clipped to norm 1 before every one of them, and what decays does so by 0.1
of the learning rate in the form of its paper (Lion's and Signum's rates are a tenth of
AdamW's, their decay ten times). Everything else is the default, but for second moments,
whose b2 is 0.95 where a paper does not ask for another one: runs are short.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import optax

import optaxplus as ox

Build = Callable[..., optax.GradientTransformation]


@dataclass(frozen=True)
class Optimizer:
    """What is tuned and compared.

    Attributes:
        build: Makes it from a learning rate or a schedule.
        rate: The learning rate in the middle of those that are tried.
        keeps_adamw_rate: Whether its rates mean something else for hidden matrices, so
            that the rest keeps AdamW's best, as its `adamw_learning_rate`.
        needs_hessian: Whether it is given estimates of the Hessian's diagonal.
    """

    build: Build
    rate: float
    keeps_adamw_rate: bool = False
    needs_hessian: bool = False


def _adam_like(build: Build, rate: float = 2e-3, **arguments: Any) -> Optimizer:
    return Optimizer(partial(build, b2=0.95, weight_decay=0.1, **arguments), rate)


def _sign_like(build: Build) -> Optimizer:
    return Optimizer(partial(build, weight_decay=1.0), 2e-4)


OPTIMIZERS = {
    "adamw": _adam_like(ox.adamw),
    "sgd": Optimizer(ox.sgd, 0.3),
    "momentum": Optimizer(partial(ox.sgd, momentum=0.9), 0.1),
    "nesterov": Optimizer(partial(ox.sgd, momentum=0.9, nesterov=True), 0.1),
    "adagrad": Optimizer(ox.adagrad, 3e-2),
    "rmsprop": Optimizer(ox.rmsprop, 2e-3),
    "adam": Optimizer(partial(ox.adam, b2=0.95), 2e-3),
    "amsgrad": Optimizer(partial(ox.amsgrad, b2=0.95), 2e-3),
    "nadam": Optimizer(partial(ox.nadam, b2=0.95), 2e-3),
    "radam": Optimizer(partial(ox.radam, b2=0.95), 2e-3),
    "ranger": Optimizer(partial(ox.ranger, b2=0.95), 2e-3),
    "stable_adamw": _adam_like(ox.stable_adamw),
    "adam_mini": _adam_like(ox.adam_mini),
    "adopt": Optimizer(partial(ox.adopt, weight_decay=0.1), 2e-3),
    "adan": Optimizer(partial(ox.adan, weight_decay=0.1), 2e-3),
    "ademamix": Optimizer(partial(ox.ademamix, weight_decay=0.1), 2e-3),
    "mars": Optimizer(partial(ox.mars, weight_decay=0.1), 2e-3),
    "adamw8bit": _adam_like(ox.adamw8bit),
    "lion": _sign_like(ox.lion),
    "lion8bit": _sign_like(ox.lion8bit),
    "signum": _sign_like(ox.signum),
    "lars": Optimizer(ox.lars, 2.0),
    "lamb": _adam_like(ox.lamb, 1e-2),
    "adafactor": Optimizer(ox.adafactor, 2e-2),
    "came": Optimizer(partial(ox.came, weight_decay=0.1), 2e-3),
    "sophia": Optimizer(
        partial(ox.sophia, gamma=0.05, weight_decay=0.1), 2e-4, needs_hessian=True
    ),
    "muon": Optimizer(ox.muon, 4e-3),
    "normuon": Optimizer(ox.normuon, 4e-3),
    "adamuon": Optimizer(ox.adamuon, 4e-3),
    "scion": Optimizer(ox.scion, 2e-4),
    "dion": Optimizer(partial(ox.dion, rank_fraction=0.25), 4e-3),
    "shampoo": Optimizer(ox.shampoo, 2e-3),
    "soap": Optimizer(ox.soap, 4e-3),
    "kron": Optimizer(ox.kron, 1e-3, keeps_adamw_rate=True),
    "apollo": Optimizer(partial(ox.apollo, rank=16), 1e-2, keeps_adamw_rate=True),
}
