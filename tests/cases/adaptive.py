"""Rows of Adam and what followed it."""

import optax

import optaxplus as ox
from tests.case import Case, Oracle
from tests.cases.expectations import (
    BFLOAT16_RTOL,
    decay_of,
    muon_oracle,
    partition_branches,
    reference,
)
from tests.references import adam_successors, adam_variants, adaptive


def _matrices(matrices: Oracle, vectors: Oracle) -> Oracle:
    """One reference for matrices and another one for vectors."""

    def oracle(p, grads, learning_rate, is_matrix):
        method = matrices if is_matrix else vectors
        return method(p, grads, learning_rate, is_matrix)

    return oracle


def _mars_shampoo(p, grads, learning_rate, is_matrix):
    """Newton-Schulz of the average of the corrected gradients."""
    corrected = list(adam_successors.mars_corrections(grads))
    orthogonalized = muon_oracle(reference(adaptive.adamw), nesterov=False)
    return orthogonalized(p, corrected, learning_rate, is_matrix)


CASES = [
    Case(
        "adam",
        ox.adam,
        learning_rate=0.1,
        oracle=reference(adaptive.adam),
        torch={"adam": None},
        twin=optax.adam,
    ),
    Case(
        "amsgrad",
        ox.amsgrad,
        {"b2": 0.8},
        learning_rate=0.1,
        oracle=reference(adaptive.adam, b2=0.8, amsgrad=True),
        torch={"adam_amsgrad": None},
    ),
    Case(
        "adam-nesterov",
        ox.adam,
        {"b2": 0.99, "eps_root": 1e-6, "nesterov": True},
        learning_rate=0.1,
        oracle=reference(adaptive.adam, b2=0.99, eps_root=1e-6, nesterov=True),
        twin=lambda rate: optax.adam(rate, b2=0.99, eps_root=1e-6, nesterov=True),
    ),
    Case(
        "adamw",
        ox.adamw,
        {"weight_decay": 0.1},
        learning_rate=0.1,
        needs_params=True,
        zero_gradient=decay_of(0.1),
        oracle=reference(adaptive.adamw, weight_decay=0.1),
        torch={"adamw": None, "adamw_schedule": None},
        twin=lambda rate: optax.adamw(rate, weight_decay=0.1),
    ),
    *(
        Case(
            f"adamw-{decay}",
            ox.adamw,
            {"weight_decay": 0.01, "decay": decay},
            learning_rate=0.1,
            needs_params=True,
            zero_gradient=zero_gradient,
            oracle=reference(adaptive.adamw, weight_decay=0.01, decay=decay),
        )
        for decay, zero_gradient in {
            "independent": lambda p, _, __: -0.01 * p,
            "cautious": decay_of(0.01),
            "proximal": decay_of(0.01 / 1.001),  # 1 + η·λ
        }.items()
    ),
    Case(
        "nadam",
        ox.nadam,
        learning_rate=0.1,
        oracle=reference(adam_variants.nadam),
        torch={"nadam": None},
    ),
    Case(
        "nadam-weight_decay",
        ox.nadam,
        {"weight_decay": 0.1},
        learning_rate=0.1,
        needs_params=True,
        zero_gradient=decay_of(0.1),
        oracle=reference(adam_variants.nadam, weight_decay=0.1),
        torch={"nadam_decay": None},
    ),
    Case(
        "radam",
        ox.radam,
        learning_rate=0.3,
        oracle=reference(adam_variants.radam),
        torch={"radam": None},
    ),
    Case(
        "radam-weight_decay",
        ox.radam,
        {"weight_decay": 0.1},
        learning_rate=0.3,
        needs_params=True,
        zero_gradient=decay_of(0.1),
        oracle=reference(adam_variants.radam, weight_decay=0.1),
        torch={"radam_decay": None},
    ),
    Case(
        "adan",
        ox.adan,
        learning_rate=0.1,
        oracle=reference(adam_successors.adan),
        torch={"adan": None},
    ),
    Case(
        "adan-weight_decay",
        ox.adan,
        {"weight_decay": 0.1},
        learning_rate=0.1,
        needs_params=True,
        zero_gradient=decay_of(0.1 / 1.01),  # 1 + η·λ
        oracle=reference(adam_successors.adan, weight_decay=0.1),
        torch={"adan_decay": None},
    ),
    Case(
        "adan-no_prox",
        ox.adan,
        {"weight_decay": 0.1, "decay": "decoupled"},
        learning_rate=0.1,
        needs_params=True,
        zero_gradient=decay_of(0.1),
        oracle=reference(adam_successors.adan, weight_decay=0.1, decay="decoupled"),
        torch={"adan_no_prox": None},
    ),
    Case(
        "adopt",
        ox.adopt,
        learning_rate=0.1,
        silent_steps=1,
        oracle=reference(adam_successors.adopt, clip=True),
        twin=optax.contrib.adopt,
    ),
    Case(
        "adopt-weight_decay",
        ox.adopt,
        {"weight_decay": 0.1},
        learning_rate=0.1,
        needs_params=True,
        silent_steps=1,
        oracle=reference(adam_successors.adopt, clip=True, weight_decay=0.1),
        torch={"adopt_clipped": None},
    ),
    Case(
        "adopt-unclipped",
        ox.adopt,
        # With the default eps the first gradient after zeros moves parameters by 1e6
        # times the learning rate, which float16 cannot hold.
        {"clip": False, "eps": 1e-2},
        learning_rate=0.1,
        silent_steps=1,
        oracle=reference(adam_successors.adopt, b3=None, eps=1e-2),
    ),
    Case(
        "ademamix",
        ox.ademamix,
        {"b3": 0.99, "alpha": 5.0},
        learning_rate=0.05,
        oracle=reference(adam_successors.ademamix, b3=0.99, alpha=5.0),
        torch={"ademamix": None},
        twin=lambda rate: optax.contrib.ademamix(rate, b3=0.99, alpha=5.0),
    ),
    Case(
        "ademamix-warmup",
        ox.ademamix,
        {
            "b3": 0.99,
            "alpha": 5.0,
            "alpha_warmup": 6.0,
            "b3_warmup": 6.0,
            "weight_decay": 0.1,
        },
        learning_rate=0.05,
        needs_params=True,
        zero_gradient=decay_of(0.1),
        oracle=reference(
            adam_successors.ademamix,
            b3=0.99,
            alpha=5.0,
            alpha_warmup=6,
            b3_warmup=6,
            weight_decay=0.1,
        ),
        torch={"ademamix_warmup": None},
        # The recorded package leaves out the authors' shift of the decays by 1e-8,
        # which is 1e-6 of 1 - b3.
        torch_rtol=1e-6,
    ),
    Case(
        "stable_adamw",
        ox.stable_adamw,
        {"weight_decay": 0.1},
        learning_rate=0.1,
        needs_params=True,
        scope="block",
        zero_gradient=decay_of(0.1),
        oracle=reference(adam_variants.stable_adamw, weight_decay=0.1),
        torch={"stable_adamw": None},
    ),
    Case(
        "mars",
        ox.mars,
        learning_rate=0.1,
        needs_params=True,
        scope="block",
        zero_gradient=decay_of(0.1, role="vector"),
        oracle=_matrices(
            reference(adam_successors.mars),
            reference(adaptive.adamw, b2=0.95, weight_decay=0.1),
        ),
        branches=partition_branches("mars", "adamw"),
    ),
    Case(
        "mars-correct_vectors",
        ox.mars,
        {"weight_decay": 0.1, "correct_vectors": True},
        learning_rate=0.1,
        needs_params=True,
        scope="block",
        zero_gradient=decay_of(0.1),
        oracle=reference(adam_successors.mars, weight_decay=0.1),
        torch={"mars": None},
    ),
    Case(
        "mars-lion",
        ox.mars,
        {"variant": "lion", "weight_decay": 0.1, "correct_vectors": True},
        learning_rate=0.1,
        needs_params=True,
        scope="block",
        zero_gradient=decay_of(0.1),
        oracle=reference(adam_successors.mars, variant="lion", weight_decay=0.1),
        torch={"mars_lion": None},
    ),
    Case(
        "mars-shampoo",
        ox.mars,
        {"variant": "shampoo"},
        learning_rate=0.1,
        needs_params=True,
        complex_supported=False,
        multiplies_matrices=True,
        scope="block",
        rtol=BFLOAT16_RTOL,
        zero_gradient=decay_of(0.1, role="vector"),
        oracle=_matrices(
            _mars_shampoo, reference(adaptive.adamw, b2=0.95, weight_decay=0.1)
        ),
        branches=partition_branches("mars", "adamw"),
    ),
]
