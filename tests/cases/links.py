"""Rows of the links of chains."""

import optax

import optaxplus as ox
from tests.case import Case
from tests.cases.expectations import (
    BFLOAT16_RTOL,
    NEWTON_SCHULZ_RTOL,
    factored_branches,
)

_DION_STATIC = ("rank_fraction", "rank_multiple", "power_iterations", "seed")
_KRON_STATIC = ("update_interval", "warmup_steps", "max_dim", "seed")
_APOLLO = {
    "by_default": False,
    "static_args": ("rank", "update_interval", "seed"),
    "complex_supported": False,
    "matrix_only": True,
    "scope": "block",
}

CASES = [
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
    Case("scale_by_adagrad", ox.scale_by_adagrad),
    Case(
        "scale_by_adagrad-optax",
        ox.scale_by_adagrad,
        {"initial_accumulator": 0.1, "eps": 0.0, "eps_root": 1e-7},
    ),
    Case("scale_by_rmsprop", ox.scale_by_rmsprop),
    Case(
        "scale_by_rmsprop-centered", ox.scale_by_rmsprop, {"b2": 0.9, "centered": True}
    ),
    Case("scale_by_nadam", ox.scale_by_nadam),
    Case("scale_by_radam", ox.scale_by_radam),
    Case("scale_by_adan", ox.scale_by_adan),
    Case("scale_by_adopt", ox.scale_by_adopt, silent_steps=1),
    Case(
        "scale_by_adopt-unclipped", ox.scale_by_adopt, {"clip": False}, silent_steps=1
    ),
    Case("scale_by_ademamix", ox.scale_by_ademamix),
    Case(
        "scale_by_ademamix-warmup",
        ox.scale_by_ademamix,
        {"alpha": 5.0, "alpha_warmup": 4.0, "b3_warmup": 2.0},
    ),
    # What `stable_adamw` compiles.
    Case(
        "scale_by_stable_adam",
        ox.scale_by_stable_adam,
        scope="block",
        by_default=False,
    ),
    Case(
        "scale_by_stable_adam-weight_decay",
        ox.scale_by_stable_adam,
        {"weight_decay": 0.1},
        needs_params=True,
        scope="block",
        zero_gradient=lambda p, _, __: 0.1 * p,
    ),
    Case("scale_by_adam_mini", ox.scale_by_adam_mini, scope="block"),
    Case("cautious", ox.cautious, {"inner": ox.scale_by_adam()}, scope="block"),
    # What `came` compiles.
    Case(
        "scale_by_confidence",
        ox.scale_by_confidence,
        by_default=False,
        static_args=("min_dim_size_to_factor",),
        complex_supported=False,
        scope="block",
    ),
    Case("mars_correction", ox.mars_correction, scope="block"),
    Case("mars_correction-unclipped", ox.mars_correction, {"max_norm": None}),
    Case("centralize", ox.centralize, scope="block"),
    Case(
        "lookahead",
        ox.lookahead,
        {
            "inner": optax.chain(ox.scale_by_adam(), ox.descend(0.1)),
            "every_k": 2,
        },
        static_args=("every_k",),
        needs_params=True,
    ),
    Case("descend", ox.descend, {"learning_rate": 0.1}),
    Case(
        "descend-decoupled",
        ox.descend,
        {"learning_rate": 0.1, "weight_decay": 0.5},
        needs_params=True,
        zero_gradient=lambda p, _, __: -0.05 * p,
    ),
    Case(
        "descend-independent",
        ox.descend,
        {"learning_rate": 0.1, "weight_decay": 0.05, "decay": "independent"},
        needs_params=True,
        zero_gradient=lambda p, _, __: -0.05 * p,
    ),
    Case(
        "descend-cautious",
        ox.descend,
        {"learning_rate": 0.1, "weight_decay": 0.5, "decay": "cautious"},
        needs_params=True,
        zero_gradient=lambda p, _, __: -0.05 * p,
    ),
    Case(
        "descend-proximal",
        ox.descend,
        {"learning_rate": 0.1, "weight_decay": 0.5, "decay": "proximal"},
        needs_params=True,
        zero_gradient=lambda p, _, __: -0.05 / 1.05 * p,
    ),
    Case("trust_ratio-lamb", ox.trust_ratio, needs_params=True, scope="block"),
    Case(
        "trust_ratio-lars",
        ox.trust_ratio,
        {"trust_coefficient": 1e-3, "weight_decay": 1e-2},
        needs_params=True,
        scope="block",
        zero_gradient=lambda p, _, __: 1e-3 * p,  # λ·w · η·‖w‖ / (λ·‖w‖)
    ),
    Case(
        "trust_ratio-optax",
        ox.trust_ratio,
        {"trust_coefficient": 1e-3, "weight_decay": 1e-2, "form": "optax"},
        needs_params=True,
        scope="block",
        zero_gradient=lambda p, _, __: 1e-3 * p,
    ),
    *(
        Case(
            f"trust_ratio-{form}",
            ox.trust_ratio,
            {"trust_coefficient": 1e-3, "weight_decay": 1e-2, "form": form},
            needs_params=True,
            scope="block",
        )
        for form in ("tensorflow", "apex")
    ),
    Case("scale_by_adam-raw", ox.scale_by_adam, {"debias": False}),
    Case("scale_by_param_rms", ox.scale_by_param_rms, needs_params=True),
    Case(
        "factored_rms",
        ox.factored_rms,
        {"min_dim_size_to_factor": 2},
        static_args=("min_dim_size_to_factor",),
        complex_supported=False,
        scope="block",
        branches=factored_branches,
    ),
    Case(
        "factored_rms-clipped",
        ox.factored_rms,
        {"min_dim_size_to_factor": 2, "b2": 0.9, "clip_threshold": 0.5},
        static_args=("min_dim_size_to_factor",),
        complex_supported=False,
        scope="block",
        branches=factored_branches,
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
        multiplies_matrices=True,
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
        multiplies_matrices=True,
        complex_supported=False,
        matrix_only=True,
        scope="block",
        rtol=NEWTON_SCHULZ_RTOL,
    ),
    Case(
        "normalize_neurons",
        ox.normalize_neurons,
        complex_supported=False,
        matrix_only=True,
        scope="block",
    ),
    Case(
        "scale_by_adamuon",
        ox.scale_by_adamuon,
        complex_supported=False,
        matrix_only=True,
        scope="block",
    ),
    Case(
        "scale_by_dion",
        ox.scale_by_dion,
        static_args=_DION_STATIC,
        multiplies_matrices=True,
        complex_supported=False,
        matrix_only=True,
        scope="block",
    ),
    Case(
        "scale_by_dion-rank_fraction",
        ox.scale_by_dion,
        {"rank_fraction": 0.5, "rank_multiple": 2, "power_iterations": 2},
        static_args=_DION_STATIC,
        multiplies_matrices=True,
        complex_supported=False,
        matrix_only=True,
        scope="block",
    ),
    *(
        Case(
            name + variant,
            factory,
            kwargs,
            static_args=("update_interval", "max_dim", "b2", "b3"),
            multiplies_matrices=True,
            complex_supported=False,
            scope="block",
            by_default=False,
            silent_steps=silent,
            rtol=1e-3,
        )
        for name, factory, silent in (
            ("scale_by_soap", ox.scale_by_soap, 1),
            ("scale_by_shampoo", ox.scale_by_shampoo, 0),
        )
        for variant, kwargs in (
            ("", {}),
            ("-often", {"update_interval": 1, "max_dim": 3, "large_dims": "diagonal"}),
        )
    ),
    Case("scale_by_apollo", ox.scale_by_apollo, **_APOLLO),
    Case(
        "scale_by_apollo-mini",
        ox.scale_by_apollo,
        {"rank": 1, "scaling": "tensor", "scale": 128.0},
        **_APOLLO,
    ),
    Case(
        "scale_by_apollo-unlimited",
        ox.scale_by_apollo,
        {"rank": 2, "max_norm_growth": None, "update_interval": 1},
        **_APOLLO,
    ),
    *(
        Case(
            "scale_by_kron" + variant,
            ox.scale_by_kron,
            kwargs,
            static_args=_KRON_STATIC,
            multiplies_matrices=True,
            complex_supported=False,
            by_default=False,
            scope="block",
        )
        for variant, kwargs in {
            "": {},
            # One factor diagonal, or both.
            "-max_dim": {"max_dim": 3, "max_update_rms": None},
        }.items()
    ),
    *(
        Case(
            f"scale_by_matrix_shape-{shape_scale}",
            ox.scale_by_matrix_shape,
            {"shape_scale": shape_scale},
            matrix_only=True,
        )
        for shape_scale in ("match_adamw", "keller", "spectral")
    ),
]
