"""Rows of optimizers with their state in 8 bits.

Leaves of the table are small, and keep float32 moments: these rows are the optimizers
without codes. With codes they are in `test_storage_contract`.
"""

import optax

import optaxplus as ox
from tests.case import Case
from tests.cases.expectations import decay_of, reference
from tests.references import adaptive, sign

_STATIC = ("block_size", "min_size")

CASES = [
    Case(
        "adamw8bit",
        ox.adamw8bit,
        {"weight_decay": 0.1},
        learning_rate=0.1,
        static_args=_STATIC,
        needs_params=True,
        zero_gradient=decay_of(0.1),
        oracle=reference(adaptive.adamw, weight_decay=0.1),
        torch={"adamw": None},
        twin=lambda rate: optax.adamw(rate, weight_decay=0.1),
    ),
    Case(
        "lion8bit",
        ox.lion8bit,
        learning_rate=0.1,
        static_args=_STATIC,
        needs_params=True,
        zero_gradient=decay_of(1e-3),
        oracle=reference(sign.lion, weight_decay=1e-3),
        twin=optax.lion,
    ),
]
