"""Checks the references against optax, which shares no code with them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import optax
import pytest

from tests.references import clipping
from tests.references.by_name import REFERENCES
from tests.references.conventions import Array


@dataclass(frozen=True)
class OptaxCase:
    """A reference and the optax transformation that must agree with it.

    Attributes:
        name: unique name, for the test's identifier.
        method: name of the reference.
        arguments: keyword arguments of the reference.
        make: builds the transformation.
        rtol: error allowed, relative to the largest parameter of the block. The default
            is for float64: ten steps of some dozen roundings each.
    """

    name: str
    method: str
    arguments: Mapping[str, Any]
    make: Callable[[], optax.GradientTransformation] = field(repr=False)
    rtol: float = 1e-14


def schedule(step: Any) -> Any:
    """A learning rate that falls quickly, for a number and for a traced step."""
    return 0.01 / (1 + step)


def growing_half_life(step: Any) -> Any:
    """AdEMAMix's slow decay: eight steps from a half-life of 0.9 to that of 0.99."""
    share = (step + 1.0) / 8.0
    fast, slow = np.log(0.5) / np.log(np.array([0.9, 0.99]) + 1e-8) - 1
    steps = (1 - share) * float(fast) + share * float(slow)
    return jax.numpy.where(share < 1, 0.5 ** (1 / (steps + 1)), 0.99)


def fast_params_of_lookahead(
    fast: optax.GradientTransformation, every_k: int, alpha: float
) -> optax.GradientTransformation:
    """optax.lookahead, its slow parameters kept in the state."""
    pair = optax.lookahead(fast, every_k, alpha)

    def init(params: Any) -> Any:
        return pair.init(optax.LookaheadParams.init_synced(params)), params

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        inner_state, slow = state
        updates, inner_state = pair.update(
            updates, inner_state, optax.LookaheadParams(params, slow)
        )
        return updates.fast, (inner_state, optax.apply_updates(slow, updates.slow))

    return optax.GradientTransformation(init, update)


# optax.adafactor forms ``1 - t ** -0.8`` and its momentum in float32 even when
# everything else is float64; that is a relative error of about 1e-7 in the update.
FLOAT32_DECAY = 1e-6

OPTAX_CASES = [
    OptaxCase(
        "sgd",
        "sgd",
        {"learning_rate": schedule, "momentum": 0.9},
        lambda: optax.sgd(schedule, momentum=0.9),
    ),
    OptaxCase(
        "sgd_nesterov",
        "sgd",
        {"learning_rate": 0.01, "momentum": 0.9, "nesterov": True},
        lambda: optax.sgd(0.01, momentum=0.9, nesterov=True),
    ),
    OptaxCase(
        "adagrad",
        "adagrad",
        {
            "learning_rate": schedule,
            "eps": 0.0,
            "eps_root": 1e-7,
            "initial_accumulator": 0.1,
        },
        lambda: optax.adagrad(schedule),
    ),
    OptaxCase(
        "rmsprop",
        "rmsprop",
        {"learning_rate": schedule, "b2": 0.9, "eps": 0.0, "eps_root": 1e-8},
        lambda: optax.rmsprop(schedule),
    ),
    OptaxCase(
        "rmsprop_eps_outside",
        "rmsprop",
        {"learning_rate": schedule},
        lambda: optax.rmsprop(schedule, decay=0.99, eps_in_sqrt=False),
    ),
    # optax has the learning rate inside the buffer, which differs under a schedule.
    OptaxCase(
        "rmsprop_centered_momentum",
        "rmsprop",
        {
            "learning_rate": 0.01,
            "b2": 0.9,
            "eps": 0.0,
            "eps_root": 1e-3,
            "centered": True,
            "momentum": 0.9,
        },
        lambda: optax.rmsprop(0.01, eps=1e-3, centered=True, momentum=0.9),
    ),
    OptaxCase(
        "adam",
        "adam",
        {"learning_rate": schedule, "eps_root": 1e-6},
        lambda: optax.adam(schedule, eps_root=1e-6),
    ),
    OptaxCase(
        "nadam",
        "adam",
        {"learning_rate": 0.01, "b2": 0.99, "nesterov": True},
        lambda: optax.nadam(0.01, b2=0.99),
    ),
    OptaxCase(
        "adamw",
        "adamw",
        {"learning_rate": schedule, "weight_decay": 0.1},
        lambda: optax.adamw(schedule, weight_decay=0.1),
    ),
    OptaxCase(
        "nadamw",
        "adamw",
        {"learning_rate": 0.01, "weight_decay": 0.1, "nesterov": True},
        lambda: optax.nadamw(0.01, weight_decay=0.1),
    ),
    # optax has no schedule of the momentum; this one is over before the first step.
    OptaxCase(
        "nadam_without_schedule",
        "nadam",
        {"learning_rate": schedule, "momentum_decay": 1e6},
        lambda: optax.nadam(schedule),
    ),
    # The two add their epsilon at different places; next to this one it has no effect
    # but to make 0 / 0 zero.
    OptaxCase(
        "radam",
        "radam",
        {"learning_rate": schedule, "eps": 1e-150},
        lambda: optax.radam(schedule, eps=1e-150),
    ),
    OptaxCase(
        "radam_threshold",
        "radam",
        {"learning_rate": 0.01, "b2": 0.9, "threshold": 4.0, "eps": 1e-150},
        lambda: optax.radam(0.01, b2=0.9, threshold=4.0, eps=1e-150),
    ),
    # optax multiplies the differences with 1 - b2, the authors with b2.
    OptaxCase(
        "adan",
        "adan",
        {
            "learning_rate": schedule,
            "b2": 0.5,
            "weight_decay": 0.1,
            "decay": "decoupled",
        },
        lambda: optax.adan(schedule, b2=0.5, eps_root=0.0, weight_decay=0.1),
    ),
    OptaxCase(
        "adopt_clipped",
        "adopt",
        {"learning_rate": schedule, "clip": True},
        lambda: optax.contrib.adopt(schedule),
    ),
    OptaxCase(
        "adopt_unclipped",
        "adopt",
        {"learning_rate": 0.01, "b1": 0.8, "b2": 0.95, "b3": None},
        lambda: optax.contrib.adopt(0.01, b1=0.8, b2=0.95, use_clipping=False),
    ),
    OptaxCase(
        "ademamix",
        "ademamix",
        {"learning_rate": schedule, "alpha": 5.0, "weight_decay": 0.1},
        lambda: optax.contrib.ademamix(schedule, weight_decay=0.1),
    ),
    OptaxCase(
        "ademamix_warmup",
        "ademamix",
        {
            "learning_rate": 0.01,
            "b3": 0.99,
            "alpha": 5.0,
            "alpha_warmup": 6,
            "b3_warmup": 8,
        },
        lambda: optax.contrib.ademamix(
            0.01,
            b3=growing_half_life,
            alpha=lambda step: jax.numpy.minimum(5 / 6 * (step + 1.0), 5.0),
        ),
    ),
    OptaxCase(
        "signum",
        "signum",
        {"learning_rate": schedule, "b1": 0.8},
        lambda: optax.signum(schedule, beta=0.8),
    ),
    OptaxCase(
        "lion",
        "lion",
        {"learning_rate": schedule, "b1": 0.8, "b2": 0.95, "weight_decay": 0.1},
        lambda: optax.lion(schedule, b1=0.8, b2=0.95, weight_decay=0.1),
    ),
    OptaxCase(
        "lars",
        "lars",
        {"learning_rate": schedule, "weight_decay": 0.1, "form": "optax"},
        lambda: optax.lars(schedule, weight_decay=0.1),
    ),
    OptaxCase(
        "lars_nesterov",
        "lars",
        {
            "learning_rate": 0.1,
            "nesterov": True,
            "trust_coefficient": 0.02,
            "eps": 1e-3,
            "form": "optax",
        },
        lambda: optax.lars(0.1, nesterov=True, trust_coefficient=0.02, eps=1e-3),
    ),
    OptaxCase(
        "lamb",
        "lamb",
        {"learning_rate": schedule, "weight_decay": 0.1},
        lambda: optax.lamb(schedule, weight_decay=0.1),
    ),
    OptaxCase(
        "lookahead",
        "lookahead",
        {"learning_rate": schedule, "every_k": 3, "alpha": 0.6},
        lambda: fast_params_of_lookahead(optax.adam(schedule), 3, 0.6),
    ),
    OptaxCase(
        "lamb_without_decay",
        "lamb",
        {"learning_rate": 0.01, "b1": 0.8, "b2": 0.95},
        lambda: optax.lamb(0.01, b1=0.8, b2=0.95),
    ),
    OptaxCase(
        "adafactor_factored",
        "adafactor",
        {"learning_rate": schedule, "min_dim_size_to_factor": 4},
        lambda: optax.adafactor(schedule, min_dim_size_to_factor=4),
        rtol=FLOAT32_DECAY,
    ),
    OptaxCase(
        "adafactor_unfactored",
        "adafactor",
        {"learning_rate": 0.01, "decay_rate": 0.5, "clipping_threshold": 0.8},
        lambda: optax.adafactor(0.01, decay_rate=0.5, clipping_threshold=0.8),
        rtol=FLOAT32_DECAY,
    ),
    OptaxCase(
        "adafactor_momentum_and_decay",
        "adafactor",
        {
            "learning_rate": 0.01,
            "min_dim_size_to_factor": 1,
            "momentum": 0.9,
            "weight_decay_rate": 0.1,
        },
        lambda: optax.adafactor(
            0.01, min_dim_size_to_factor=1, momentum=0.9, weight_decay_rate=0.1
        ),
        rtol=FLOAT32_DECAY,
    ),
    OptaxCase(
        "adafactor_unclipped_and_unscaled",
        "adafactor",
        {
            "learning_rate": 0.01,
            "min_dim_size_to_factor": 1,
            "clipping_threshold": None,
            "multiply_by_parameter_scale": False,
        },
        lambda: optax.adafactor(
            0.01,
            min_dim_size_to_factor=1,
            clipping_threshold=None,
            multiply_by_parameter_scale=False,
        ),
        rtol=FLOAT32_DECAY,
    ),
]


def run_optax(
    transformation: optax.GradientTransformation,
    problem: Mapping[str, tuple[Array, Array]],
) -> dict[str, list[np.ndarray]]:
    """Returns the parameters after every step in float64, by block."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        params: Any = {key: jax.numpy.asarray(p) for key, (p, _) in problem.items()}
        assert all(p.dtype == np.float64 for p in params.values())
        state = transformation.init(params)
        update = jax.jit(transformation.update)
        trajectories: dict[str, list[np.ndarray]] = {key: [] for key in problem}
        for step in range(len(next(iter(problem.values()))[1])):
            grads = {key: jax.numpy.asarray(g[step]) for key, (_, g) in problem.items()}
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            for key, p in params.items():
                trajectories[key].append(np.asarray(p))
    return trajectories


@pytest.mark.parametrize("case", OPTAX_CASES, ids=lambda case: case.name)
def test_optax(case: OptaxCase, problem: dict[str, tuple[Array, Array]]) -> None:
    trajectories = run_optax(case.make(), problem)
    for key, (params, grads) in problem.items():
        result = REFERENCES[case.method](params, grads, **case.arguments)
        tolerance = case.rtol * np.abs(result).max()
        np.testing.assert_allclose(
            result, trajectories[key], rtol=0, atol=tolerance, err_msg=key
        )


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e6])
def test_clip_by_global_norm_is_optax(
    max_norm: float, problem: dict[str, tuple[Array, Array]]
) -> None:
    grads = [g[0] for _, g in problem.values()]
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        arrays = [jax.numpy.asarray(g) for g in grads]
        expected, _ = optax.clip_by_global_norm(max_norm).update(
            arrays, optax.EmptyState()
        )
        expected_norm = float(optax.tree.norm(arrays))
    # One sum of a hundred squares, in another order.
    assert clipping.global_norm(grads) == pytest.approx(expected_norm, rel=1e-14)
    for result, array in zip(
        clipping.clip_by_global_norm(grads, max_norm),
        jax.tree.leaves(expected),
        strict=True,
    ):
        np.testing.assert_allclose(result, np.asarray(array), rtol=1e-14)


@pytest.mark.parametrize("threshold", [0.1, 1.0, 1e4])
def test_clip_update_rms_is_optax(
    threshold: float, problem: dict[str, tuple[Array, Array]]
) -> None:
    for _, grads in problem.values():
        with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
            expected, _ = optax.clip_by_block_rms(threshold).update(
                jax.numpy.asarray(grads[0]), optax.EmptyState()
            )
        result = clipping.clip_update_rms(grads[0], threshold)
        # One mean of some twenty squares, in another order.
        np.testing.assert_allclose(result, np.asarray(expected), rtol=1e-14)
