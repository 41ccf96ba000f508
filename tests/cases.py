"""THE table: every transformation of the library with arguments worth testing.

A row is all that a new optimizer needs to be held to every contract of
`test_contract` and its neighbours. `test_public_api` fails while a row is missing.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optaxplus as ox
from optaxplus.numerics.coefficients import COEFFICIENT_TABLES
from tests.case import Case, Oracle
from tests.references import adaptive, classical, factored, layerwise, matrix, sign
from tests.references.conventions import Array


def _decay(coefficient: float, role: str | None = None):
    """Decay of the parameters relative to the learning rate, of one role or all."""

    def update(p: Array, learning_rate: float, of_role: str) -> Array:
        return -learning_rate * (coefficient if role in (None, of_role) else 0.0) * p

    return update


def _of(reference: Callable[..., list[Array]], **arguments: Any) -> Oracle:
    def oracle(p, grads, learning_rate, is_matrix):
        return reference(p, grads, learning_rate=learning_rate, **arguments)

    return oracle


def _muon_oracle(others: Oracle, **arguments: Any) -> Oracle:
    def oracle(p, grads, learning_rate, is_matrix):
        if not is_matrix:
            return others(p, grads, learning_rate, is_matrix)
        fan_in, fan_out = p.shape
        return matrix.muon(
            p,
            grads,
            learning_rate=learning_rate,
            fan_in=fan_in,
            fan_out=fan_out,
            eps=0.0,  # The reference's is absolute, the library's relative.
            **arguments,
        )

    return oracle


def _factored_branches(state: Any) -> Mapping[str, bool]:
    rows, full = (optax.tree.get(state, name) for name in ("nu_row", "nu"))
    sizes = [
        (row.size, v.size)
        for row, v in zip(jax.tree.leaves(rows), jax.tree.leaves(full), strict=True)
    ]
    return {
        "factored": any(row > 1 and v == 1 for row, v in sizes),
        "full": any(row == 1 and v > 1 for row, v in sizes),
    }


def _muon_branches(state: Any) -> Mapping[str, bool]:
    groups = optax.tree.get(state, "inner_states")
    return {
        label: any(leaf.ndim > 0 for leaf in jax.tree.leaves(groups[label]))
        for label in ("muon", "adamw")
    }


_POLAR_EXPRESS = COEFFICIENT_TABLES["polar_express"].rows
_ADAMW_OF_MUON = _of(adaptive.adamw, b2=0.95, weight_decay=0.1)

# Newton-Schulz multiplies small singular values, and their rounding errors, by about
# 1000 (8.2 · 4.0 · 3.9 · 3.3 · 2.3) before it bends them.
NEWTON_SCHULZ_RTOL = 2e-4
# bfloat16 products: 2^-8 a rounding, fifteen products.
BFLOAT16_RTOL = 5e-2

LINKS = [
    Case("scale_by_momentum", ox.scale_by_momentum, {"momentum": 0.9}),
    Case(
        "scale_by_momentum-nesterov",
        ox.scale_by_momentum,
        {"momentum": 0.8, "nesterov": True},
    ),
    Case(
        "scale_by_momentum-dampening",
        ox.scale_by_momentum,
        {"momentum": 0.9, "dampening": 0.5},
    ),
    Case("scale_by_ema", ox.scale_by_ema),
    Case("scale_by_ema-nesterov", ox.scale_by_ema, {"b1": 0.8, "nesterov": True}),
    Case("scale_by_ema-debias", ox.scale_by_ema, {"b1": 0.95, "debias": True}),
    Case(
        "scale_by_ema-nesterov-debias",
        ox.scale_by_ema,
        {"nesterov": True, "debias": True},
    ),
    Case("scale_by_adam", ox.scale_by_adam),
    Case("scale_by_adam-amsgrad", ox.scale_by_adam, {"b2": 0.8, "amsgrad": True}),
    Case("scale_by_adam-nesterov", ox.scale_by_adam, {"b2": 0.99, "nesterov": True}),
    Case("scale_by_adam-eps_root", ox.scale_by_adam, {"eps": 0.0, "eps_root": 1e-12}),
    Case("scale_by_sign", ox.scale_by_sign),
    Case("scale_by_lion", ox.scale_by_lion),
    Case("trust_ratio-lamb", ox.trust_ratio, needs_params=True, scope="block"),
    Case(
        "trust_ratio-lars",
        ox.trust_ratio,
        {"trust_coefficient": 1e-3, "weight_decay": 1e-2},
        needs_params=True,
        scope="block",
        zero_gradient=lambda p, _, __: 1e-3 * p,  # λ·w · η·‖w‖ / (λ·‖w‖)
    ),
    Case("scale_by_param_rms", ox.scale_by_param_rms, needs_params=True),
    Case(
        "factored_rms",
        ox.factored_rms,
        {"min_dim_size_to_factor": 2},
        static_args=("min_dim_size_to_factor",),
        complex_supported=False,
        scope="block",
        branches=_factored_branches,
    ),
    Case(
        "factored_rms-unfactored",
        ox.factored_rms,
        {"decay_rate": 0.5},
        static_args=("min_dim_size_to_factor",),
        complex_supported=False,
    ),
    Case("clip_update_rms", ox.clip_update_rms, {"threshold": 0.5}, scope="block"),
    Case(
        "clip_by_global_norm", ox.clip_by_global_norm, {"max_norm": 2.0}, scope="tree"
    ),
    Case(
        "orthogonalize_via_newton_schulz",
        ox.orthogonalize_via_newton_schulz,
        static_args=("ns_steps", "eps"),
        contracts_sharded_axes=True,
        complex_supported=False,
        matrix_only=True,
        scope="block",
        rtol=BFLOAT16_RTOL,
    ),
    Case(
        "orthogonalize_via_newton_schulz-float32",
        ox.orthogonalize_via_newton_schulz,
        {"ns_steps": 6, "ns_coeffs": "jordan", "compute_dtype": "float32"},
        static_args=("ns_steps", "eps"),
        contracts_sharded_axes=True,
        complex_supported=False,
        matrix_only=True,
        scope="block",
        rtol=NEWTON_SCHULZ_RTOL,
    ),
    *(
        Case(
            f"scale_by_matrix_shape-{mode}",
            ox.scale_by_matrix_shape,
            {"mode": mode},
            matrix_only=True,
        )
        for mode in ("match_adamw", "keller", "spectral")
    ),
]


NAMED = [
    Case(
        "sgd",
        ox.sgd,
        learning_rate=0.5,
        oracle=_of(classical.sgd),
        torch={"sgd": None},
        twin=optax.sgd,
    ),
    Case(
        "sgd-momentum",
        ox.sgd,
        {"momentum": 0.9},
        learning_rate=0.1,
        oracle=_of(classical.sgd, momentum=0.9),
        torch={"sgd_momentum": None},
        twin=lambda rate: optax.sgd(rate, momentum=0.9),
    ),
    Case(
        "sgd-nesterov",
        ox.sgd,
        {"momentum": 0.9, "nesterov": True},
        learning_rate=0.1,
        oracle=_of(classical.sgd, momentum=0.9, nesterov=True),
        torch={"sgd_nesterov": None},
        twin=lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    ),
    Case(
        "sgd-dampening",
        ox.sgd,
        {"momentum": 0.9, "dampening": 0.5},
        learning_rate=0.2,
        oracle=_of(classical.sgd, momentum=0.9, dampening=0.5),
        torch={"sgd_dampening": None},
    ),
    Case(
        "sgd-weight_decay",
        ox.sgd,
        {"momentum": 0.9, "weight_decay": 0.1},
        learning_rate=0.1,
        needs_params=True,
        zero_gradient=_decay(0.1),
        oracle=_of(classical.sgd, momentum=0.9, weight_decay=0.1),
        torch={"sgd_weight_decay": None},
    ),
    Case(
        "adam",
        ox.adam,
        learning_rate=0.1,
        oracle=_of(adaptive.adam),
        torch={"adam": None},
        twin=optax.adam,
    ),
    Case(
        "adam-amsgrad",
        ox.adam,
        {"b2": 0.8, "amsgrad": True},
        learning_rate=0.1,
        oracle=_of(adaptive.adam, b2=0.8, amsgrad=True),
        torch={"adam_amsgrad": None},
    ),
    Case(
        "adam-nesterov",
        ox.adam,
        {"b2": 0.99, "eps_root": 1e-6, "nesterov": True},
        learning_rate=0.1,
        oracle=_of(adaptive.adam, b2=0.99, eps_root=1e-6, nesterov=True),
        twin=lambda rate: optax.adam(rate, b2=0.99, eps_root=1e-6, nesterov=True),
    ),
    Case(
        "adamw",
        ox.adamw,
        {"weight_decay": 0.1},
        learning_rate=0.1,
        needs_params=True,
        zero_gradient=_decay(0.1),
        oracle=_of(adaptive.adamw, weight_decay=0.1),
        torch={"adamw": None, "adamw_schedule": None},
        twin=lambda rate: optax.adamw(rate, weight_decay=0.1),
    ),
    Case(
        "lion",
        ox.lion,
        learning_rate=0.1,
        needs_params=True,
        zero_gradient=_decay(1e-3),
        oracle=_of(sign.lion, weight_decay=1e-3),
        twin=optax.lion,
    ),
    Case(
        "lars",
        ox.lars,
        {"trust_coefficient": 0.02},
        learning_rate=1.0,
        needs_params=True,
        scope="block",
        oracle=_of(layerwise.lars, trust_coefficient=0.02),
        twin=lambda rate: optax.lars(rate, trust_coefficient=0.02),
    ),
    Case(
        "lars-weight_decay",
        ox.lars,
        {"weight_decay": 0.01, "nesterov": True},
        learning_rate=20.0,
        needs_params=True,
        scope="block",
        # λ·w · η·‖w‖ / (λ·‖w‖), and Nesterov's first step is 1 + μ times as long.
        zero_gradient=_decay(1e-3 * 1.9),
        oracle=_of(layerwise.lars, weight_decay=0.01, nesterov=True),
    ),
    Case(
        "lamb",
        ox.lamb,
        {"weight_decay": 0.1},
        learning_rate=0.15,
        needs_params=True,
        scope="block",
        zero_gradient=_decay(1.0),  # λ·w scaled to the norm of w
        oracle=_of(layerwise.lamb, weight_decay=0.1),
        twin=lambda rate: optax.lamb(rate, weight_decay=0.1),
    ),
    Case(
        "adafactor",
        ox.adafactor,
        {"min_dim_size_to_factor": 2},
        learning_rate=0.2,
        static_args=("min_dim_size_to_factor",),
        needs_params=True,
        complex_supported=False,
        scope="block",
        oracle=_of(factored.adafactor, min_dim_size_to_factor=2),
        torch={
            "adafactor": None,
            # Recorded as the largest learning rate; the paper's rule made it smaller.
            "adafactor_relative_step": lambda step: jnp.minimum(
                0.5, (step + 1.0) ** -0.5
            ),
        },
        twin=lambda rate: optax.adafactor(rate, min_dim_size_to_factor=2),
        branches=_factored_branches,
    ),
    Case(
        "adafactor-b1",
        ox.adafactor,
        {"min_dim_size_to_factor": 2, "b1": 0.9, "multiply_by_param_rms": False},
        learning_rate=0.1,
        static_args=("min_dim_size_to_factor",),
        needs_params=True,
        complex_supported=False,
        scope="block",
        oracle=_of(
            factored.adafactor,
            min_dim_size_to_factor=2,
            momentum=0.9,
            multiply_by_parameter_scale=False,
        ),
        twin=lambda rate: optax.adafactor(
            rate,
            min_dim_size_to_factor=2,
            momentum=0.9,
            multiply_by_parameter_scale=False,
        ),
        branches=_factored_branches,
    ),
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
        zero_gradient=_decay(0.1),
        oracle=_muon_oracle(
            _ADAMW_OF_MUON,
            weight_decay=0.1,
            ns_coeffs=_POLAR_EXPRESS,
            shape_scale="match_adamw",
        ),
        branches=_muon_branches,
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
        zero_gradient=_decay(0.1),
        oracle=_muon_oracle(
            _ADAMW_OF_MUON,
            weight_decay=0.1,
            ns_coeffs=_POLAR_EXPRESS,
            shape_scale="match_adamw",
        ),
        branches=_muon_branches,
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
        zero_gradient=_decay(0.1),
        oracle=_muon_oracle(_ADAMW_OF_MUON, weight_decay=0.1, shape_scale="keller"),
        torch={"muon_original": None},
        branches=_muon_branches,
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
        zero_gradient=_decay(0.1, role="hidden"),
        oracle=_muon_oracle(
            lambda p, grads, _, __: classical.sgd(
                p, grads, learning_rate=0.5, momentum=0.8, dampening=0.8
            ),
            weight_decay=0.1,
            nesterov=False,
            shape_scale="match_adamw",
        ),
        branches=_muon_branches,
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
        zero_gradient=_decay(0.1),
        oracle=_muon_oracle(
            _ADAMW_OF_MUON, weight_decay=0.1, shape_scale="match_adamw"
        ),
        torch={"muon_match_rms_adamw": None},
        branches=_muon_branches,
    ),
]

CASES = [*LINKS, *NAMED]
