"""The contracts of the table with state and weights in fewer bits, and measured.

Every wrapper around every named optimizer: five families of state by default (one
moment, two, matrices beside vectors, factors, an average of parameters), the others
with `-m slow`.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import optax
import pytest

import optaxplus as ox
from tests import test_composition_contract, test_contract
from tests.cases import NAMED, Case

FAMILIES = ("adamw", "muon", "adafactor")

WEIGHTS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "master_weights": ox.master_weights,
    "master_weights-24": partial(ox.master_weights, bits=24),
    "stochastic_rounding": ox.stochastic_rounding,
    "compensated": ox.compensated,
}
# Blocks of a few entries, so that the small leaves of the table have several.
QUANTIZED = partial(ox.quantize_state, min_size=1, block_size=8, keep=())
WRAPPERS = WEIGHTS | {
    "quantize_state": QUANTIZED,
    "dynamic_loss_scale": ox.dynamic_loss_scale,
    "with_metrics": ox.with_metrics,
}
# They emit what is inside of them, in its dtype.
AS_INSIDE = ("quantize_state", "with_metrics")


def wrapped(name: str, case: Case) -> Case:
    """The row with a wrapper around its factory."""

    @functools.wraps(case.factory)
    def factory(*args: Any, **kwargs: Any) -> optax.GradientTransformation:
        return WRAPPERS[name](case.factory(*args, **kwargs))

    is_quantized = name == "quantize_state"
    return replace(
        case,
        name=f"{name}-{case.name}",
        factory=factory,
        needs_params=case.needs_params or name in (*WEIGHTS, "with_metrics"),
        is_wide=case.is_wide if name in AS_INSIDE else True,
        scope="tree" if name == "dynamic_loss_scale" else case.scope,
        # A rounding may move a moment to the next code: 2/127 of one that is large.
        rtol=max(case.rtol, 0.1) if is_quantized else case.rtol,
        oracle=None,
        torch={},
        twin=None,
        branches=None,
    )


def families(name: str) -> Sequence[str]:
    """The rows that a wrapper is put around by default."""
    if name == "with_metrics":
        return ()  # Around AdamW it has a row of the table.
    if name == "master_weights-24":
        return FAMILIES[:1]
    # The others treat states as `master_weights` does.
    return FAMILIES if name == "quantize_state" else ("adamw",)


def rows() -> list[Any]:
    """Parameters of a test: every wrapper around every named optimizer."""
    return [
        pytest.param(
            wrapped(name, case),
            id=f"{name}-{case.name}",
            marks=[] if case.name in families(name) else [pytest.mark.slow],
        )
        for name in WRAPPERS
        for case in NAMED
        # Already in codes; the subtraction of two moments bears none.
        if name != "quantize_state"
        or not case.name.endswith(("8bit", "rmsprop-centered"))
    ]


CONTRACTS = [
    test_contract.test_types_of_states_and_updates,
    test_contract.test_state_is_the_carry_of_a_scan,
    test_contract.test_state_can_be_donated,
    test_contract.test_zero_parameters_can_grow,
    test_contract.test_tiny_and_huge_gradients_are_finite,
    test_contract.test_degenerate_shapes,
    test_contract.test_empty_nodes_pass_through,
    test_contract.test_integer_parameters_are_refused_by_path,
    test_contract.test_params_are_needed_where_the_table_says_so,
    test_composition_contract.test_injected_hyperparameters_equal_plain_ones,
    test_composition_contract.test_hyperparameters_rounded_by_optax_stay_finite,
    test_composition_contract.test_equal_micro_batches_equal_one_batch,
    test_composition_contract.test_accumulated_micro_batches_equal_one_batch,
    test_composition_contract.test_masked_and_partitioned_trees,
    test_composition_contract.test_nonfinite_steps_are_skipped,
    test_composition_contract.test_chains_and_unknown_extra_arguments,
    test_composition_contract.test_state_can_be_searched_and_mapped,
    test_composition_contract.test_vmap_is_one_after_the_other,
    test_composition_contract.test_learning_rate_may_be_anything_scalar,
]


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda f: f.__name__[5:])
@pytest.mark.parametrize("case", rows())
def test_contracts(case: Case, contract: Callable[[Case], None]) -> None:
    contract(case)
