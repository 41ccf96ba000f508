"""Rows of Scion and of the oracles of norm balls."""

import optaxplus as ox
from optaxplus.numerics.coefficients import COEFFICIENT_TABLES
from tests.case import Case, Oracle
from tests.cases.expectations import (
    BFLOAT16_RTOL,
    NEWTON_SCHULZ_RTOL,
    decay_of,
)
from tests.references import muon_family

# Norm -> its name in the reference.
_KINDS = {
    "spectral": "spectral",
    "sign": "sign",
    "per_input": "column",
    "per_output": "row",
    "rms": "bias_rms",
}
_STATIC = ("ns_steps", "eps")
_SMALL_NORMS = {
    "hidden": ("spectral", 4.0),
    "embedding": ("sign", 4.0),
    "vector": ("rms", 4.0),
}
_OTHER_NORMS = {
    "hidden": ("per_output", 4.0),
    "embedding": ("per_input", 4.0),
    "vector": ("sign", 1.0),
}


def scion_oracle(
    *,
    hidden: tuple[str, float] = ("spectral", 50.0),
    vector: tuple[str, float] = ("rms", 50.0),
    ns_coeffs: str = "gram_newton_schulz",
    constrained: bool = True,
) -> Oracle:
    def oracle(p, grads, learning_rate, is_matrix):
        norm, radius = hidden if is_matrix else vector
        # A vector has one input, which is always 1.
        fan_in, fan_out = p.shape if is_matrix else (1, p.size)
        return muon_family.scion(
            p,
            grads,
            learning_rate=learning_rate,
            fan_in=fan_in,
            fan_out=fan_out,
            kind=_KINDS[norm],
            radius=radius,
            constrained=constrained,
            normalized=True,
            ns_coeffs=COEFFICIENT_TABLES[ns_coeffs].rows,
            # The reference's are absolute, the library's relative or none.
            eps=0.0,
            ns_eps=0.0,
        )

    return oracle


LINKS = [
    Case(
        "scale_by_norm_lmo",
        ox.scale_by_norm_lmo,
        static_args=_STATIC,
        multiplies_matrices=True,
        complex_supported=False,
        matrix_only=True,
        scope="block",
        rtol=BFLOAT16_RTOL,
    ),
    Case(
        "scale_by_norm_lmo-sign",
        ox.scale_by_norm_lmo,
        {"norm": "sign", "radius": 3.0},
        static_args=_STATIC,
    ),
    Case(
        "scale_by_norm_lmo-per_input",
        ox.scale_by_norm_lmo,
        {"norm": "per_input", "radius": 3.0},
        static_args=_STATIC,
        matrix_only=True,
        scope="block",
    ),
    Case(
        "scale_by_norm_lmo-per_output",
        ox.scale_by_norm_lmo,
        {"norm": "per_output", "radius": 0.5, "one_hot": True},
        static_args=_STATIC,
        matrix_only=True,
        scope="block",
    ),
    Case(
        "scale_by_norm_lmo-rms",
        ox.scale_by_norm_lmo,
        {"norm": "rms"},
        static_args=_STATIC,
        scope="block",
    ),
]

CASES = [
    Case(
        "scion",
        ox.scion,
        # That of the reference.
        {"normalization": "frobenius"},
        learning_rate=0.02,
        static_args=("ns_steps",),
        multiplies_matrices=True,
        needs_params=True,
        complex_supported=False,
        scope="block",
        rtol=BFLOAT16_RTOL,
        zero_gradient=decay_of(1.0),
        oracle=scion_oracle(),
    ),
    Case(
        "scion-clip_norm",
        ox.scion,
        {
            "clip_norm": 5.0,
            "ns_coeffs": "jordan",
            "normalization": "frobenius",
            "compute_dtype": "float32",
            "norms": _SMALL_NORMS,
        },
        learning_rate=0.1,
        static_args=("ns_steps",),
        multiplies_matrices=True,
        needs_params=True,
        complex_supported=False,
        scope="tree",
        rtol=NEWTON_SCHULZ_RTOL,
        zero_gradient=decay_of(1.0),
        oracle=scion_oracle(
            hidden=_SMALL_NORMS["hidden"],
            vector=_SMALL_NORMS["vector"],
            ns_coeffs="jordan",
        ),
    ),
    Case(
        "scion-unconstrained",
        ox.scion,
        {"norms": _OTHER_NORMS, "constrained": False},
        learning_rate=0.1,
        static_args=("ns_steps",),
        scope="block",
        oracle=scion_oracle(
            hidden=_OTHER_NORMS["hidden"],
            vector=_OTHER_NORMS["vector"],
            constrained=False,
        ),
    ),
]
