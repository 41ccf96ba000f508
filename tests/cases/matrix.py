"""Rows of the Muon family."""

import optaxplus as ox
from optaxplus.numerics.coefficients import COEFFICIENT_TABLES
from tests.case import Case
from tests.cases.expectations import (
    BFLOAT16_RTOL,
    NEWTON_SCHULZ_RTOL,
    decay_of,
    muon_oracle,
    partition_branches,
    reference,
)
from tests.references import adaptive, classical

_POLAR_EXPRESS = COEFFICIENT_TABLES["polar_express"].rows
_ADAMW_OF_MUON = reference(adaptive.adamw, b2=0.95, weight_decay=0.1)


CASES = [
    Case(
        "muon",
        ox.muon,
        learning_rate=0.2,
        static_args=("ns_steps",),
        contracts_sharded_axes=True,
        needs_params=True,
        complex_supported=False,
        scope="block",
        rtol=BFLOAT16_RTOL,
        zero_gradient=decay_of(0.1),
        oracle=muon_oracle(
            _ADAMW_OF_MUON,
            weight_decay=0.1,
            ns_coeffs=_POLAR_EXPRESS,
            shape_scale="match_adamw",
        ),
        branches=partition_branches("muon", "adamw"),
    ),
    Case(
        "muon-clip_norm",
        ox.muon,
        {"clip_norm": 5.0, "compute_dtype": "float32"},
        learning_rate=0.2,
        static_args=("ns_steps",),
        contracts_sharded_axes=True,
        needs_params=True,
        complex_supported=False,
        scope="tree",
        rtol=NEWTON_SCHULZ_RTOL,
        zero_gradient=decay_of(0.1),
        oracle=muon_oracle(
            _ADAMW_OF_MUON,
            weight_decay=0.1,
            ns_coeffs=_POLAR_EXPRESS,
            shape_scale="match_adamw",
        ),
        branches=partition_branches("muon", "adamw"),
    ),
    Case(
        "muon-keller",
        ox.muon,
        {"ns_coeffs": "jordan", "shape_scale": "keller", "compute_dtype": "float32"},
        learning_rate=0.1,
        static_args=("ns_steps",),
        contracts_sharded_axes=True,
        needs_params=True,
        complex_supported=False,
        scope="block",
        rtol=NEWTON_SCHULZ_RTOL,
        zero_gradient=decay_of(0.1),
        oracle=muon_oracle(_ADAMW_OF_MUON, weight_decay=0.1, shape_scale="keller"),
        torch={"muon_original": None},
        branches=partition_branches("muon", "adamw"),
    ),
    Case(
        "muon-fallback",
        ox.muon,
        {
            "ns_coeffs": "jordan",
            "compute_dtype": "float32",
            "weight_decay": 0.1,
            "nesterov": False,
            "fallback": ox.sgd(0.5, momentum=0.8, dampening=0.8),
        },
        learning_rate=0.2,
        static_args=("ns_steps",),
        contracts_sharded_axes=True,
        needs_params=True,
        complex_supported=False,
        scope="block",
        rtol=NEWTON_SCHULZ_RTOL,
        zero_gradient=decay_of(0.1, role="hidden"),
        oracle=muon_oracle(
            lambda p, grads, _, __: classical.sgd(
                p, grads, learning_rate=0.5, momentum=0.8, dampening=0.8
            ),
            weight_decay=0.1,
            nesterov=False,
            shape_scale="match_adamw",
        ),
        branches=partition_branches("muon", "adamw"),
    ),
    Case(
        "muon-match_adamw",
        ox.muon,
        {"ns_coeffs": "jordan"},
        learning_rate=0.2,
        static_args=("ns_steps",),
        contracts_sharded_axes=True,
        needs_params=True,
        complex_supported=False,
        scope="block",
        rtol=BFLOAT16_RTOL,
        zero_gradient=decay_of(0.1),
        oracle=muon_oracle(_ADAMW_OF_MUON, weight_decay=0.1, shape_scale="match_adamw"),
        torch={"muon_match_rms_adamw": None},
        branches=partition_branches("muon", "adamw"),
    ),
]
