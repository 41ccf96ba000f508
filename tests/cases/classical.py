"""Rows of what came before Adam."""

import numpy as np
import optax

import optaxplus as ox
from tests.case import Case
from tests.cases.expectations import (
    decay_of,
    reference,
)
from tests.references import classical

CASES = [
    Case(
        "sgd",
        ox.sgd,
        learning_rate=0.5,
        oracle=reference(classical.sgd),
        torch={"sgd": None},
        twin=optax.sgd,
    ),
    Case(
        "sgd-momentum",
        ox.sgd,
        {"momentum": 0.9},
        learning_rate=0.1,
        oracle=reference(classical.sgd, momentum=0.9),
        torch={"sgd_momentum": None},
        twin=lambda rate: optax.sgd(rate, momentum=0.9),
    ),
    Case(
        "sgd-nesterov",
        ox.sgd,
        {"momentum": 0.9, "nesterov": True},
        learning_rate=0.1,
        oracle=reference(classical.sgd, momentum=0.9, nesterov=True),
        torch={"sgd_nesterov": None},
        twin=lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    ),
    Case(
        "sgd-dampening",
        ox.sgd,
        {"momentum": 0.9, "dampening": 0.5},
        learning_rate=0.2,
        oracle=reference(classical.sgd, momentum=0.9, dampening=0.5),
        torch={"sgd_dampening": None},
    ),
    Case(
        "sgd-weight_decay",
        ox.sgd,
        {"momentum": 0.9, "weight_decay": 0.1},
        learning_rate=0.1,
        needs_params=True,
        zero_gradient=decay_of(0.1),
        oracle=reference(classical.sgd, momentum=0.9, weight_decay=0.1),
        torch={"sgd_weight_decay": None},
    ),
    Case(
        "adagrad",
        ox.adagrad,
        learning_rate=1.0,
        oracle=reference(classical.adagrad),
        torch={"adagrad": None},
    ),
    Case(
        "adagrad-optax",
        ox.adagrad,
        {"initial_accumulator": 0.1, "eps": 0.0, "eps_root": 1e-7},
        learning_rate=1.0,
        oracle=reference(
            classical.adagrad, initial_accumulator=0.1, eps=0.0, eps_root=1e-7
        ),
        twin=optax.adagrad,
    ),
    Case(
        "adagrad-weight_decay",
        ox.adagrad,
        {"initial_accumulator": 0.1, "weight_decay": 0.1},
        learning_rate=0.7,
        needs_params=True,
        # The sum of squares starts from 0.1 and decay passes through it.
        zero_gradient=lambda p, lr, _: -lr * 0.1 * p / np.sqrt(0.1 + (0.1 * p) ** 2),
        oracle=reference(classical.adagrad, initial_accumulator=0.1, weight_decay=0.1),
        # Recorded as a number and a decay of its own: the schedule 1/(1 + 0.1·step).
        torch={"adagrad_options": lambda step: 0.01 / (1.0 + 0.1 * step)},
    ),
    Case(
        "rmsprop",
        ox.rmsprop,
        learning_rate=0.02,
        oracle=reference(classical.rmsprop),
        torch={"rmsprop": None},
    ),
    Case(
        "rmsprop-optax",
        ox.rmsprop,
        {"b2": 0.9, "eps": 0.0, "eps_root": 1e-8},
        learning_rate=0.05,
        oracle=reference(classical.rmsprop, b2=0.9, eps=0.0, eps_root=1e-8),
        twin=optax.rmsprop,
    ),
    Case(
        "rmsprop-centered",
        ox.rmsprop,
        {"centered": True, "momentum": 0.9, "weight_decay": 0.1},
        learning_rate=0.003,
        needs_params=True,
        # The first gradient g is the decay alone, its variance β₂·(1 - β₂)·g².
        zero_gradient=lambda p, lr, _: (
            -lr * 0.1 * p / (np.sqrt(0.99 * 0.01) * 0.1 * np.abs(p) + 1e-8)
        ),
        oracle=reference(
            classical.rmsprop, centered=True, momentum=0.9, weight_decay=0.1
        ),
        torch={"rmsprop_centered": None},
    ),
]
