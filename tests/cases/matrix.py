"""Rows of the Muon family."""

from typing import Any

import jax
import numpy as np

import optaxplus as ox
from optaxplus.numerics.coefficients import COEFFICIENT_TABLES
from tests.case import Case
from tests.cases.expectations import (
    BFLOAT16_RTOL,
    NEWTON_SCHULZ_RTOL,
    decay_of,
    matrix_oracle,
    muon_oracle,
    partition_branches,
    reference,
)
from tests.references import (
    adaptive,
    classical,
    kronecker,
    low_rank,
    muon_family,
    psgd,
)
from tests.references.conventions import Array
from tests.transforms.kron_runs import kron_noise
from tests.transforms.projections import projection

_DEFAULT_ROWS = COEFFICIENT_TABLES["gram_newton_schulz"].rows
_ADAMW_OF_MUON = reference(adaptive.adamw, b2=0.95, weight_decay=0.1)
# QR loses as many digits as M·Q has condition; measured: 2.4e-5.
_QR_RTOL = 1e-4
# Eigenvectors turn by the rounding error over the distance of their eigenvalues, and
# Adam divides small coordinates by themselves.
_EIGENBASIS_RTOL = 1e-4
# Eigenvalues at eps=1e-6 have one digit; what they are multiplied with has few.
_ROOT_RTOL = 1e-3
# That of the reference is absolute, that of the library relative.
_NO_EPS = {"eps": 0.0}
_DION_STATIC = ("rank_fraction", "rank_multiple", "power_iterations", "seed")
_KRON_STATIC = ("update_interval", "warmup_steps", "max_dim", "seed")
_KRONECKER_STATIC = ("update_interval", "max_dim", "b2", "b3")
_APOLLO_STATIC = ("rank", "update_interval", "seed")
# Jordan's table and norm are what the references know.
_AS_PUBLISHED = {
    "ns_coeffs": "jordan",
    "normalization": "frobenius",
    "compute_dtype": "float32",
}


def _dion(
    p: Array,
    grads: Any,
    *,
    rank_fraction: float,
    fan_in: int,
    fan_out: int,
    **arguments: Any,
):
    """The reference from the library's first basis."""
    with jax.enable_x64(True):
        state = ox.scale_by_dion(rank_fraction=rank_fraction).init(np.float64(p))
    return muon_family.dion(
        p,
        grads,
        q=np.asarray(state.basis, np.float64),
        q_axis=0 if fan_in <= fan_out else 1,
        fan_in=fan_in,
        fan_out=fan_out,
        eps=0.0,
        **arguments,
    )


def _kron(p: Array, grads: Any, *, fan_in: int, fan_out: int, **arguments: Any):
    """The reference with the library's random numbers."""
    grads = list(grads)
    noise = kron_noise(p.shape, len(grads))
    return psgd.kron(p, grads, noise, **arguments)


def _apollo(
    p: Array,
    grads: Any,
    *,
    rank: int = 256,
    fan_in: int,
    fan_out: int,
    **arguments: Any,
):
    """The reference with the library's projection, of the first interval."""
    del fan_in, fan_out
    # The table's trajectories run op by op.
    matrix = projection(rank, min(p.shape), compiled=False)
    return low_rank.apollo(p, grads, lambda _: matrix, **arguments)


def _apollo_row(name: str, kwargs: dict[str, Any], **more: Any) -> Case:
    return Case(
        name,
        ox.apollo,
        kwargs,
        static_args=_APOLLO_STATIC,
        by_default=False,
        needs_params=True,
        complex_supported=False,
        scope="block",
        zero_gradient=decay_of(0.1),
        branches=partition_branches("muon", "adamw"),
        oracle=matrix_oracle(_ADAMW_OF_MUON, _apollo, weight_decay=0.1, **kwargs),
        **more,
    )


def _matrix_row(name: str, factory: Any, kwargs: dict[str, Any], **more: Any) -> Case:
    return Case(
        name,
        factory,
        kwargs,
        multiplies_matrices=True,
        needs_params=True,
        complex_supported=False,
        scope="block",
        zero_gradient=decay_of(0.1),
        branches=partition_branches("muon", "adamw"),
        **more,
    )


CASES = [
    _matrix_row(
        "normuon",
        ox.normuon,
        _AS_PUBLISHED,
        learning_rate=0.2,
        static_args=("ns_steps",),
        rtol=NEWTON_SCHULZ_RTOL,
        oracle=matrix_oracle(
            _ADAMW_OF_MUON,
            muon_family.normuon,
            weight_decay=0.1,
            shape_scale="match_adamw",
            ns_eps=0.0,
        ),
    ),
    _matrix_row(
        "normuon-bfloat16",
        ox.normuon,
        {**_AS_PUBLISHED, "shape_scale": "keller", "compute_dtype": "bfloat16"},
        learning_rate=0.1,
        static_args=("ns_steps",),
        rtol=BFLOAT16_RTOL,
        oracle=matrix_oracle(
            _ADAMW_OF_MUON, muon_family.normuon, weight_decay=0.1, ns_eps=0.0
        ),
    ),
    _matrix_row(
        "adamuon",
        ox.adamuon,
        _AS_PUBLISHED,
        learning_rate=0.2,
        static_args=("ns_steps",),
        rtol=NEWTON_SCHULZ_RTOL,
        oracle=matrix_oracle(
            _ADAMW_OF_MUON,
            muon_family.adamuon,
            weight_decay=0.1,
            bias_correction=False,
            ns_eps=0.0,
        ),
    ),
    _matrix_row(
        "adamuon-use_sign",
        ox.adamuon,
        {**_AS_PUBLISHED, "use_sign": True, "b2": 0.95},
        learning_rate=0.2,
        static_args=("ns_steps",),
        rtol=NEWTON_SCHULZ_RTOL,
        oracle=matrix_oracle(
            _ADAMW_OF_MUON,
            muon_family.adamuon,
            weight_decay=0.1,
            b2=0.95,
            sign=True,
            bias_correction=False,
            ns_eps=0.0,
        ),
    ),
    _matrix_row(
        "dion",
        ox.dion,
        _NO_EPS,
        rtol=_QR_RTOL,
        learning_rate=0.2,
        static_args=_DION_STATIC,
        oracle=matrix_oracle(
            _ADAMW_OF_MUON, _dion, rank_fraction=1.0, weight_decay=0.1
        ),
    ),
    _matrix_row(
        "dion-rank_fraction",
        ox.dion,
        {**_NO_EPS, "rank_fraction": 0.5},
        rtol=_QR_RTOL,
        learning_rate=0.2,
        static_args=_DION_STATIC,
        oracle=matrix_oracle(
            _ADAMW_OF_MUON, _dion, rank_fraction=0.5, weight_decay=0.1
        ),
    ),
    *(
        _matrix_row(
            "kron" + variant,
            ox.kron,
            kwargs,
            learning_rate=0.1,
            by_default=False,
            static_args=_KRON_STATIC,
            oracle=matrix_oracle(_ADAMW_OF_MUON, _kron, weight_decay=0.1, **theirs),
        )
        for variant, kwargs, theirs in (
            ("", {}, {}),
            ("-max_dim", {"max_dim": 1}, {"diagonal": (True, True)}),
        )
    ),
    *(
        _matrix_row(
            "soap" + variant,
            ox.soap,
            kwargs,
            learning_rate=0.1,
            silent_steps=1,
            static_args=_KRONECKER_STATIC,
            rtol=_EIGENBASIS_RTOL,
            oracle=matrix_oracle(
                _ADAMW_OF_MUON, kronecker.soap, weight_decay=0.1, **kwargs
            ),
        )
        for variant, kwargs in (
            ("", {}),
            ("-often", {"update_interval": 2, "max_dim": 4, "b3": 0.9}),
        )
    ),
    *(
        _matrix_row(
            "shampoo" + variant,
            ox.shampoo,
            kwargs,
            learning_rate=learning_rate,
            by_default=False,
            static_args=_KRONECKER_STATIC,
            rtol=_ROOT_RTOL,
            oracle=matrix_oracle(
                _ADAMW_OF_MUON,
                kronecker.shampoo,
                weight_decay=0.1,
                **{k: x for k, x in kwargs.items() if k != "large_dims"},
            ),
        )
        for variant, learning_rate, kwargs in (
            ("", 0.1, {}),
            (
                "-sums",
                1.0,  # As Adagrad's: steps shrink.
                {
                    "b1": 0.0,
                    "b2": 1.0,
                    "update_interval": 1,
                    "grafting": None,
                    "max_dim": 4,
                    "large_dims": "diagonal",
                },
            ),
        )
    ),
    _apollo_row("apollo", {}, learning_rate=0.2),
    _apollo_row("apollo-rank", {"rank": 2}, learning_rate=0.2),
    _apollo_row(
        "apollo-mini",
        {"rank": 1, "scaling": "tensor", "scale": 128.0},
        learning_rate=0.1,
    ),
    Case(
        "muon",
        ox.muon,
        learning_rate=0.2,
        static_args=("ns_steps",),
        multiplies_matrices=True,
        needs_params=True,
        complex_supported=False,
        scope="block",
        rtol=BFLOAT16_RTOL,
        zero_gradient=decay_of(0.1),
        oracle=muon_oracle(
            _ADAMW_OF_MUON,
            weight_decay=0.1,
            ns_coeffs=_DEFAULT_ROWS,
            shape_scale="match_adamw",
            normalization="schatten",
        ),
        branches=partition_branches("muon", "adamw"),
    ),
    Case(
        "muon-clip_norm",
        ox.muon,
        {"clip_norm": 5.0, "compute_dtype": "float32"},
        learning_rate=0.2,
        static_args=("ns_steps",),
        multiplies_matrices=True,
        needs_params=True,
        complex_supported=False,
        scope="tree",
        rtol=NEWTON_SCHULZ_RTOL,
        zero_gradient=decay_of(0.1),
        oracle=muon_oracle(
            _ADAMW_OF_MUON,
            weight_decay=0.1,
            ns_coeffs=_DEFAULT_ROWS,
            shape_scale="match_adamw",
            normalization="schatten",
        ),
        branches=partition_branches("muon", "adamw"),
    ),
    Case(
        "muon-keller",
        ox.muon,
        {
            "ns_coeffs": "jordan",
            "normalization": "frobenius",
            "shape_scale": "keller",
            "compute_dtype": "float32",
        },
        learning_rate=0.1,
        static_args=("ns_steps",),
        multiplies_matrices=True,
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
            "normalization": "frobenius",
            "compute_dtype": "float32",
            "weight_decay": 0.1,
            "nesterov": False,
            "fallback": ox.sgd(0.5, momentum=0.8, dampening=0.8),
        },
        learning_rate=0.2,
        static_args=("ns_steps",),
        multiplies_matrices=True,
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
        {"ns_coeffs": "jordan", "normalization": "frobenius"},
        learning_rate=0.2,
        static_args=("ns_steps",),
        multiplies_matrices=True,
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
