"""Checks the references themselves: golden numbers, PyTorch's runs, and optax."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import optax
import pytest

from tests.references import (
    adaptive,
    classical,
    clipping,
    factored,
    layerwise,
    matrix,
    sign,
)
from tests.references.conventions import Array
from tests.references.golden import (
    GOLDEN_CASES,
    GOLDEN_POLAR_CASES,
    POLAR_DECIMALS,
    POLAR_MATRIX,
    POLAR_SINGULAR_VALUES,
    YOU,
    GoldenCase,
    GoldenPolarCase,
)
from tests.references.torch_trajectories import (
    TorchTrajectories,
    load_torch_trajectories,
)

REFERENCES: Mapping[str, Callable[..., list[Array]]] = {
    "sgd": classical.sgd,
    "adam": adaptive.adam,
    "adamw": adaptive.adamw,
    "lion": sign.lion,
    "lars": layerwise.lars,
    "lamb": layerwise.lamb,
    "adafactor": factored.adafactor,
    "muon": matrix.muon,
}


@pytest.fixture(scope="module")
def recorded() -> TorchTrajectories:
    """The recorded PyTorch runs."""
    return load_torch_trajectories()


def blocks(leaf: np.ndarray, *, axis: int) -> Iterator[np.ndarray]:
    """Yields the matrices of a stack, or the one vector or matrix that a leaf is.

    Args:
        leaf: parameters, or anything with a leading axis of steps.
        axis: where the axis of a stack is, if there is one: 0 for parameters, 1 behind
            the axis of steps.
    """
    is_stack = leaf.ndim - axis == 3
    yield from np.moveaxis(leaf, axis, 0) if is_stack else [leaf]


# Golden numbers


@pytest.mark.parametrize("case", GOLDEN_CASES, ids=lambda case: case.name)
def test_golden_parameters(case: GoldenCase) -> None:
    result = REFERENCES[case.method](case.params, case.grads, **case.arguments)
    assert len(result) == len(case.grads)
    # The expected numbers are rounded to so many decimals. Float64 itself errs by 1e-15
    # here; the 1 % on top lets a number stand on the edge between two roundings.
    tolerance = 0.505 * 10.0**-case.decimals
    np.testing.assert_allclose(result[-1], case.expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", GOLDEN_POLAR_CASES, ids=lambda case: case.name)
def test_golden_polar_factors(case: GoldenPolarCase) -> None:
    if case.ns_coeffs is None:
        result = matrix.polar_factor(POLAR_MATRIX)
    else:
        result = matrix.newton_schulz(POLAR_MATRIX, case.ns_coeffs)
    # Rounded as above.
    tolerance = 0.505 * 10.0**-POLAR_DECIMALS
    np.testing.assert_allclose(result, case.expected, rtol=0, atol=tolerance)


# PyTorch

# Recorded case -> reference, its arguments. PyTorch's names and defaults differ, which
# is why this is written out and not derived from the recorded arguments.
TORCH_COUNTERPARTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "sgd": ("sgd", {}),
    "sgd_momentum": ("sgd", {"momentum": 0.9}),
    "sgd_nesterov": ("sgd", {"momentum": 0.9, "nesterov": True}),
    "sgd_dampening": ("sgd", {"momentum": 0.9, "dampening": 0.5}),
    "sgd_weight_decay": ("sgd", {"momentum": 0.9, "weight_decay": 0.1}),
    "adam": ("adam", {}),
    "adam_amsgrad": ("adam", {"b2": 0.8, "amsgrad": True}),
    "adamw": ("adamw", {"weight_decay": 0.1}),
    "adamw_schedule": ("adamw", {"weight_decay": 0.1}),
    "adafactor": ("adafactor", {"min_dim_size_to_factor": 1}),
    "adafactor_relative_step": (
        "adafactor",
        {
            "min_dim_size_to_factor": 1,
            "learning_rate": lambda step: factored.relative_step(step, largest=0.5),
        },
    ),
    "muon_original": ("muon", {"weight_decay": 0.1, "shape_scale": "keller"}),
    "muon_match_rms_adamw": (
        "muon",
        {"weight_decay": 0.1, "shape_scale": "match_adamw"},
    ),
}
ELEMENTWISE_CASES = [name for name in TORCH_COUNTERPARTS if "muon" not in name]
MUON_CASES = [name for name in TORCH_COUNTERPARTS if "muon" in name]

# Relative to the largest parameter of the block in any step: ten steps of a dozen
# roundings each. Measured: 6e-16 and 4e-7.
TORCH_TOLERANCES = {"float64": 5e-15, "float32": 2e-6}


def test_every_recorded_case_is_used(recorded: TorchTrajectories) -> None:
    assert set(recorded.cases) == set(TORCH_COUNTERPARTS)
    assert recorded.versions["torch"].startswith("2.13.0")


@pytest.mark.parametrize("dtype", TORCH_TOLERANCES)
@pytest.mark.parametrize("name", ELEMENTWISE_CASES)
def test_torch(recorded: TorchTrajectories, name: str, dtype: str) -> None:
    case = recorded.cases[name]
    method, arguments = TORCH_COUNTERPARTS[name]
    arguments = {"learning_rate": case.learning_rate, **arguments}
    assert set(case.trajectories[dtype]) == set(recorded.params)
    for leaf, trajectory in case.trajectories[dtype].items():
        for params, grads, expected in zip(
            blocks(recorded.params[leaf], axis=0),
            blocks(recorded.grads[leaf], axis=1),
            blocks(trajectory, axis=1),
            strict=True,
        ):
            result = REFERENCES[method](params, grads, **arguments)
            tolerance = TORCH_TOLERANCES[dtype] * np.abs(expected).max()
            np.testing.assert_allclose(result, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", TORCH_TOLERANCES)
@pytest.mark.parametrize("name", MUON_CASES)
def test_torch_muon(recorded: TorchTrajectories, name: str, dtype: str) -> None:
    case = recorded.cases[name]
    _, arguments = TORCH_COUNTERPARTS[name]
    assert set(case.trajectories[dtype]) == {"tall", "wide", "stack"}
    for leaf, trajectory in case.trajectories[dtype].items():
        fan_in, fan_out = recorded.params[leaf].shape[-2:]
        scale = matrix.matrix_shape_scale(
            arguments["shape_scale"], fan_in=fan_in, fan_out=fan_out
        )

        def orthogonal(before: np.ndarray, after: np.ndarray, scale: float) -> Array:
            """What a step must have added, decay and learning rate taken off."""
            decayed = before * (1 - case.learning_rate(0) * arguments["weight_decay"])
            return (decayed - after) / (case.learning_rate(0) * scale)

        for params, grads, expected in zip(
            blocks(recorded.params[leaf], axis=0),
            blocks(recorded.grads[leaf], axis=1),
            blocks(trajectory, axis=1),
            strict=True,
        ):
            result = matrix.muon(
                params,
                grads,
                learning_rate=case.learning_rate,
                fan_in=fan_in,
                fan_out=fan_out,
                **arguments,
            )
            ours = [params.astype(np.float64), *result]
            theirs = np.concatenate([params[None], expected]).astype(np.float64)
            for step in range(len(result)):
                # PyTorch iterates in bfloat16, where one unit in the last place of a
                # number near 1 is 2^-8 = 0.004 and fifteen products accumulate. 0.036
                # is the largest error measured in an entry. A momentum of 0.9 makes
                # 0.12 on the same data; no Nesterov, four steps or the exact polar
                # factor make more than 0.2.
                np.testing.assert_allclose(
                    orthogonal(ours[step], ours[step + 1], scale),
                    orthogonal(theirs[step], theirs[step + 1], scale),
                    rtol=0,
                    atol=0.05,
                )


def test_recorded_gradients_make_amsgrad_matter(recorded: TorchTrajectories) -> None:
    params, grads = recorded.params["tall"], recorded.grads["tall"]
    plain = adaptive.adam(params, grads, learning_rate=0.01, b2=0.8)
    amsgrad = recorded.cases["adam_amsgrad"].trajectories["float64"]["tall"]
    assert np.abs(plain[-1] - amsgrad[-1]).max() > 1e-3


# optax


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


@pytest.fixture(scope="module")
def problem(recorded: TorchTrajectories) -> dict[str, tuple[Array, Array]]:
    """The recorded problem by block, and blocks with nothing in them."""
    result: dict[str, tuple[Array, Array]] = {}
    for leaf in recorded.params:
        pairs = zip(
            blocks(recorded.params[leaf], axis=0),
            blocks(recorded.grads[leaf], axis=1),
            strict=True,
        )
        for i, (params, grads) in enumerate(pairs):
            result[f"{leaf}_{i}"] = params.astype(float), grads.astype(float)
    params, grads = result["tall_0"]
    result["zero_params"] = np.zeros_like(params), grads
    result["zero_grads"] = params, np.zeros_like(grads)
    return result


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


# What no other implementation says


def test_lars_paper_form_by_hand() -> None:
    # norm(w) = 5, norm(g) = 2: lambda = 0.1 * 5 / (2 + 0.5 * 5) = 1/9, so that
    # u = 2 * 1/9 * (g + 0.5 * w) = (1/3, 8/9). In the second step the learning rate is
    # zero and only the momentum is left.
    first, second = layerwise.lars(
        [3.0, 4.0],
        [[0.0, 2.0], [1.0, 1.0]],
        learning_rate=lambda step: 2.0 * (step == 0),
        momentum=0.5,
        weight_decay=0.5,
        trust_coefficient=0.1,
    )
    # A handful of float64 roundings.
    np.testing.assert_allclose(first, [3 - 1 / 3, 4 - 8 / 9], rtol=1e-15)
    np.testing.assert_allclose(second, [3 - 1 / 2, 4 - 4 / 3], rtol=1e-15)


def test_lars_forms_agree_without_weight_decay(
    problem: dict[str, tuple[Array, Array]],
) -> None:
    for params, grads in problem.values():
        np.testing.assert_array_equal(
            layerwise.lars(params, grads, learning_rate=0.1, form="paper"),
            layerwise.lars(params, grads, learning_rate=0.1, form="optax"),
        )


def test_adafactor_reconstructs_squares_of_rank_one() -> None:
    rng = np.random.default_rng(0)
    signs = rng.choice([-1.0, 1.0], size=(6, 4))
    grad = signs * np.outer(rng.uniform(0.1, 2, 6), rng.uniform(0.1, 2, 4))
    (result,) = factored.adafactor(
        np.zeros((6, 4)),
        [grad],
        learning_rate=1.0,
        min_dim_size_to_factor=1,
        multiply_by_parameter_scale=False,
    )
    # Two sums, a product, a quotient, a root.
    np.testing.assert_allclose(result, -signs, rtol=1e-14)


def test_adafactor_refuses_a_stack() -> None:
    with pytest.raises(ValueError, match=r"got shape \(2, 3, 4\)"):
        factored.adafactor(np.ones((2, 3, 4)), [], learning_rate=1.0)


def test_dampening_without_momentum_does_nothing() -> None:
    # torch.optim.SGD keeps no buffer then, and so never reaches the dampening.
    arguments = {"params": [1.0], "grads": [[1.0], [2.0]], "learning_rate": 0.1}
    np.testing.assert_array_equal(
        classical.sgd(**arguments, dampening=0.5), classical.sgd(**arguments)
    )


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5), (1, 7), (7, 1)])
def test_newton_schulz_acts_on_the_singular_values(shape: tuple[int, int]) -> None:
    a = np.random.default_rng(1).standard_normal(shape)
    u, s, vh = np.linalg.svd(a / (np.linalg.norm(a) + 1e-7), full_matrices=False)
    for x, y, z in YOU:
        s = x * s + y * s**3 + z * s**5
    # Fifteen products of small matrices; singular directions amplified by up to 500.
    np.testing.assert_allclose(
        matrix.newton_schulz(a, YOU), u * s @ vh, rtol=0, atol=1e-12
    )


def test_golden_matrix_has_the_stated_singular_values() -> None:
    s = np.linalg.svd(np.array(POLAR_MATRIX), compute_uv=False)
    # Printed with eight decimals.
    np.testing.assert_allclose(
        s / np.linalg.norm(s), POLAR_SINGULAR_VALUES, rtol=0, atol=0.505e-8
    )


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5), (1, 7), (7, 1)])
def test_polar_factor_is_semi_orthogonal_and_nearest(shape: tuple[int, int]) -> None:
    a = np.random.default_rng(2).standard_normal(shape)
    q = matrix.polar_factor(a)
    small = q @ q.T if shape[0] <= shape[1] else q.T @ q
    # A float64 singular value decomposition of a well-conditioned small matrix.
    np.testing.assert_allclose(small, np.eye(min(shape)), rtol=0, atol=1e-13)
    # <A, Q> is the nuclear norm exactly when Q is the polar factor.
    nuclear = np.linalg.svd(a, compute_uv=False).sum()
    assert np.sum(a * q) == pytest.approx(nuclear, rel=1e-13)


def test_polar_factor_leaves_out_what_is_not_there() -> None:
    u, v = np.array([0.6, 0.8]), np.array([1.0, 2.0, 2.0]) / 3
    # The one direction of a matrix of rank one, to a few float64 roundings.
    np.testing.assert_allclose(
        matrix.polar_factor(7 * np.outer(u, v)), np.outer(u, v), rtol=1e-14
    )
    assert not matrix.polar_factor(np.zeros((2, 3))).any()
    assert not matrix.newton_schulz(np.zeros((2, 3)), eps=0.0).any()


def test_matrix_shape_scale() -> None:
    scale = matrix.matrix_shape_scale
    assert scale("keller", fan_in=4, fan_out=16) == 2.0
    assert scale("keller", fan_in=16, fan_out=4) == 1.0
    assert scale("spectral", fan_in=4, fan_out=16) == 2.0
    assert scale("spectral", fan_in=16, fan_out=4) == 0.5
    assert scale("match_adamw", fan_in=16, fan_out=4) == pytest.approx(0.8, rel=1e-15)
    assert scale("match_adamw", fan_in=4, fan_out=16) == pytest.approx(0.8, rel=1e-15)


def test_muon_matches_the_rms_of_adamw_with_exact_polar_factors() -> None:
    rng = np.random.default_rng(3)
    (result,) = matrix.muon(
        np.zeros((4, 6)),
        [rng.standard_normal((4, 6))],
        learning_rate=1.0,
        fan_in=4,
        fan_out=6,
        ns_coeffs=None,
        shape_scale="match_adamw",
    )
    # RMS 1 / sqrt(6) of a semi-orthogonal matrix, times 0.2 * sqrt(6).
    assert np.sqrt(np.mean(result**2)) == pytest.approx(0.2, rel=1e-14)


@pytest.mark.parametrize("name", REFERENCES)
def test_references_never_write_into_their_inputs(name: str) -> None:
    rng = np.random.default_rng(4)
    params, grads = rng.standard_normal((3, 4)), rng.standard_normal((2, 3, 4))
    params_before, grads_before = params.copy(), grads.copy()
    sizes = {"fan_in": 3, "fan_out": 4} if name == "muon" else {}
    first, second = REFERENCES[name](params, grads, learning_rate=0.1, **sizes)
    np.testing.assert_array_equal(params, params_before)
    np.testing.assert_array_equal(grads, grads_before)
    assert not np.shares_memory(first, second)
    # A constant schedule is the same as a number.
    scheduled = REFERENCES[name](params, grads, learning_rate=lambda _: 0.1, **sizes)
    np.testing.assert_array_equal(scheduled, [first, second])
