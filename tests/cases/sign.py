"""Rows of optimizers that step by signs."""

import optax

import optaxplus as ox
from tests.case import Case
from tests.cases.expectations import (
    decay_of,
    reference,
)
from tests.references import sign

CASES = [
    Case(
        "lion",
        ox.lion,
        learning_rate=0.1,
        needs_params=True,
        zero_gradient=decay_of(1e-3),
        oracle=reference(sign.lion, weight_decay=1e-3),
        twin=optax.lion,
    ),
    Case(
        "lion-weight_decay",
        ox.lion,
        {"weight_decay": 0.1},
        learning_rate=0.1,
        needs_params=True,
        zero_gradient=decay_of(0.1),
        oracle=reference(sign.lion, weight_decay=0.1),
        torch={"lion": None},
    ),
    Case(
        "signum",
        ox.signum,
        {"weight_decay": 0.1},
        learning_rate=0.1,
        needs_params=True,
        zero_gradient=decay_of(0.1),
        oracle=reference(sign.signum, weight_decay=0.1),
        torch={"signum": None},
    ),
    Case(
        "signum-signsgd",
        ox.signum,
        {"b1": 0.0},
        learning_rate=0.1,
        oracle=reference(sign.signum, b1=0.0),
        twin=optax.sign_sgd,
    ),
]
