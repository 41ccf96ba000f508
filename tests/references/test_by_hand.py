"""Checks what no other implementation says of the references, by hand."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from tests.references import classical, factored, layerwise, lookahead, matrix
from tests.references.by_name import REFERENCES
from tests.references.cautious import cautious_directions
from tests.references.conventions import Array
from tests.references.golden import YOU
from tests.references.weight_decay import Decay, descend, follow

# A handful of float64 roundings.
ROUNDING = 1e-14

# A method, and arguments that make it another one.
SPECIAL_CASES: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
    "ademamix": ("adamw", {"alpha": 0.0}, {"weight_decay": 0.0}),
    "mars": (
        "adamw",
        {"gamma": 0.0, "max_norm": np.inf},
        {"b1": 0.95, "b2": 0.99, "weight_decay": 0.0},
    ),
    "lion": ("signum", {"b2": 0.9}, {}),
    "lookahead": ("adam", {"alpha": 1.0}, {}),
    "ranger": (
        "radam",
        {"centralize": False, "every_k": 99},
        {"b1": 0.95, "eps": 1e-5},
    ),
}


@pytest.mark.parametrize("name", SPECIAL_CASES)
def test_special_cases(name: str, problem: dict[str, tuple[Array, Array]]) -> None:
    other, arguments, other_arguments = SPECIAL_CASES[name]
    for params, grads in problem.values():
        np.testing.assert_allclose(
            REFERENCES[name](params, grads, learning_rate=0.01, **arguments),
            REFERENCES[other](params, grads, learning_rate=0.01, **other_arguments),
            rtol=ROUNDING,
            atol=ROUNDING,
        )


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("decoupled", [2 - 0.1 * (0.5 + 0.2), -1 - 0.1 * (1 - 0.1), 0.99]),
        ("independent", [2 - 0.05 - 0.2, -1 - 0.1 + 0.1, 0.9]),
        ("cautious", [2 - 0.1 * (0.5 + 0.2), -1 - 0.1, 0.99]),
        ("proximal", [1.95 / 1.01, -1.1 / 1.01, 1 / 1.01]),
    ],
)
def test_weight_decay(decay: Decay, expected: list[float]) -> None:
    # The step makes the first parameter smaller, the second larger, and leaves the
    # third alone.
    p, u = np.array([2.0, -1.0, 1.0]), np.array([0.5, 1.0, 0.0])
    np.testing.assert_allclose(descend(p, u, 0.1, 0.1, decay), expected, rtol=ROUNDING)
    (result,) = follow(
        p, [u], learning_rate=lambda _: 0.1, weight_decay=0.1, decay=decay
    )
    np.testing.assert_allclose(result, expected, rtol=ROUNDING)


def test_independent_weight_decay_knows_no_learning_rate() -> None:
    result = descend(np.array([2.0]), np.array([7.0]), 0.0, 0.25, "independent")
    np.testing.assert_array_equal(result, [1.5])


def test_cautious_directions() -> None:
    directions = [[1.0, -2.0, 3.0, 4.0], [1.0, -1.0, 0.0, 2.0]]
    grads = [[5.0, 1.0, -1.0, 0.0], [-1.0, 1.0, 1.0, -1.0]]
    one, none = cautious_directions(map(np.array, directions), grads)
    np.testing.assert_array_equal(one, [4.0, 0.0, 0.0, 0.0])
    assert not none.any()


def test_cautious_directions_grow_by_a_thousand_at_most() -> None:
    grad = np.full(10_000, -1.0)
    grad[7] = 1.0
    (result,) = cautious_directions([np.ones(10_000)], [grad])
    assert result[7] == result.sum() == 1000.0


def test_lookahead_by_hand() -> None:
    # Fast: -1, -2; the slow one goes half of the way from 0, to -1. Then -2, -3, and
    # half of the way from -1 is -2.
    result = lookahead.lookahead(
        [0.0], [np.ones(1)] * 5, learning_rate=1.0, every_k=2, alpha=0.5
    )
    np.testing.assert_array_equal(np.ravel(result), [-1, -1, -2, -2, -3])


def test_centralized_gradients_have_no_mean_over_fan_in() -> None:
    rng = np.random.default_rng(5)
    grad = rng.standard_normal((3, 4))
    result = lookahead.centralized(grad)
    # Means of three numbers near one.
    np.testing.assert_allclose(result.mean(axis=0), 0, atol=1e-15)
    np.testing.assert_allclose(result - result[0], grad - grad[0], atol=1e-15)
    np.testing.assert_array_equal(lookahead.centralized(grad[0]), grad[0])


def test_stable_adamw_is_adamw_where_gradients_shrink() -> None:
    rng = np.random.default_rng(6)
    params = rng.standard_normal(5)
    grads = rng.standard_normal(5) * np.geomspace(1, 0.1, 8)[:, None]
    arguments = {"learning_rate": 0.1, "b2": 0.99, "eps": 1e-6, "weight_decay": 0.1}
    stable, plain = (
        REFERENCES[name](params, grads, **arguments)
        for name in ("stable_adamw", "adamw")
    )
    np.testing.assert_allclose(stable, plain, rtol=ROUNDING)
    # Ten times the gradient is a shorter step, and less decay.
    stable, plain = (
        REFERENCES[name](params, [*grads, 10 * grads[0]], **arguments)
        for name in ("stable_adamw", "adamw")
    )
    v = sum(0.99**i * 0.01 * g**2 for i, g in enumerate([10 * grads[0], *grads[::-1]]))
    excess = np.sqrt(np.mean((10 * grads[0]) ** 2 / (v / (1 - 0.99**9))))
    assert excess > 1.5
    np.testing.assert_allclose(
        stable[-1] - stable[-2], (plain[-1] - plain[-2]) / excess, rtol=1e-12
    )


def test_adam_mini_is_adamw_where_all_gradients_are_of_one_size() -> None:
    rng = np.random.default_rng(7)
    params = rng.standard_normal((3, 4))
    grads = rng.choice([-1, 1], (5, 3, 4)) * rng.uniform(0.1, 2, (5, 1, 1))
    arguments = {"learning_rate": 0.1, "weight_decay": 0.1}
    np.testing.assert_allclose(
        REFERENCES["adam_mini"](params, grads, **arguments),
        REFERENCES["adamw"](params, grads, **arguments),
        rtol=1e-13,
    )


@pytest.mark.parametrize("clip", [False, True])
def test_adopt_only_looks_at_the_first_gradient(clip: bool) -> None:
    first, second = REFERENCES["adopt"](
        [3.0, 4.0],
        [[1.0, 0.0], [2.0, 0.5]],
        learning_rate=1.0,
        weight_decay=0.5,
        clip=clip,
    )
    np.testing.assert_array_equal(first, [3.0, 4.0])
    # Divided by 1, and by the least divisor: 1 in the second step of Algorithm 1, else
    # 1e-6, which the clipping makes 1; its average has seen a tenth of it.
    step = [0.1, 0.1] if clip else [2.0, 0.5]
    np.testing.assert_allclose(second, [1.5 - step[0], 2 - step[1]], rtol=ROUNDING)


def test_centered_rmsprop_survives_a_variance_below_zero() -> None:
    grads = np.full((200, 3), 0.1)
    result = classical.rmsprop(
        np.zeros(3), grads, learning_rate=0.1, b2=0.5, centered=True
    )
    assert np.isfinite(result).all()


@pytest.mark.parametrize(
    ("arguments", "length"),
    [
        ({}, 5.0),
        ({"param_norm_max": 2.0}, 2.0),
        ({"param_norm_min": 10.0}, 10.0),
        ({"params": [0.0, 0.0]}, np.sqrt(2)),
        ({"params": [0.0, 0.0], "param_norm_min": 0.5}, 0.5),
    ],
)
def test_lamb_clamps_the_norm_of_the_parameters(
    arguments: Mapping[str, Any], length: float
) -> None:
    arguments = {"params": [3.0, 4.0], "eps": 0.0, **arguments}
    (result,) = layerwise.lamb(grads=[[2.0, -2.0]], learning_rate=0.1, **arguments)
    # Adam's first direction consists of signs, two of them here; a ratio of 1 leaves
    # it its length.
    step = 0.1 * length * np.array([1, -1]) / np.sqrt(2)
    np.testing.assert_allclose(result, arguments["params"] - step, rtol=ROUNDING)


def test_lamb_without_bias_correction() -> None:
    # m / sqrt(v) = 0.1 * g / sqrt(0.001 * g^2) = sqrt(10) * sign(g).
    (result,) = layerwise.lamb(
        [3.0, 4.0],
        [[2.0, -2.0]],
        learning_rate=0.1,
        eps=0.0,
        weight_decay=0.5,
        bias_correction=False,
    )
    q = np.sqrt(10) * np.array([1, -1]) + [1.5, 2.0]
    np.testing.assert_allclose(
        result, [3, 4] - 0.1 * 5 / np.sqrt(q @ q) * q, rtol=ROUNDING
    )


def test_lars_of_apex_by_hand() -> None:
    arguments = {
        "params": [3.0, 4.0],
        "grads": [[0.0, 2.0], [0.0, 0.0]],
        "momentum": 0.5,
        "weight_decay": 0.5,
        "trust_coefficient": 0.1,
        "form": "apex",
    }
    # As in the paper's form, the local rate is 1/9 and the buffer (1/6, 4/9), without
    # the learning rate of 2. In the second step half of the buffer is left, and no
    # weight decay enters next to a gradient of zero.
    first, second = layerwise.lars(learning_rate=lambda step: 2 - step, **arguments)
    np.testing.assert_allclose(first, [3 - 1 / 3, 4 - 8 / 9], rtol=ROUNDING)
    np.testing.assert_allclose(second, first - np.array([1 / 12, 2 / 9]), rtol=ROUNDING)
    # The local rate of 1/10, with its epsilon, is the smaller one, then 0.05 is.
    for learning_rate, smaller in [(2.0, 0.1), (0.05, 0.05), (0.0, 0.0)]:
        first, _ = layerwise.lars(
            learning_rate=learning_rate, clip=True, eps=0.5, **arguments
        )
        np.testing.assert_allclose(
            first, [3 - smaller * 1.5, 4 - smaller * 4], rtol=ROUNDING
        )


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
