"""What is specific to Muon."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from optaxplus import DEFAULT_RULES, MatrixAxes, Rule
from optaxplus.numerics.coefficients import COEFFICIENT_TABLES
from tests.assertions import assert_trees_close, assert_trees_equal
from tests.problems import gradients, normal_tree
from tests.references import matrix
from tests.references.golden import GOLDEN_CASES
from tests.references.torch_trajectories import load_torch_trajectories
from tests.selection import mostly
from tests.trajectories import follow, follow_in_float64

SHAPES = {"w": (3, 4), "b": (4,), "wte": (5, 3)}
PARAMS = normal_tree(SHAPES, seed=0)
GRADS = jax.tree.map(lambda *g: jnp.stack(g), *gradients(SHAPES, steps=5))
TRANSPOSED = (Rule("", MatrixAxes((1,), (0,)), "hidden"),)
STACK = (Rule("", MatrixAxes((-2,), (-1,)), "hidden"),)


# Agreement


def test_golden_numbers():
    # The golden matrices are (fan_out, fan_in); the eps of the reference is absolute,
    # that of the library relative, hence the decimals given up.
    (case,) = [case for case in GOLDEN_CASES if case.method == "muon"]
    tx = ox.muon(
        case.arguments["learning_rate"],
        ns_coeffs="jordan",
        normalization="frobenius",
        shape_scale="keller",
        weight_decay=0.0,
        compute_dtype="float64",
        rules=TRANSPOSED,
    )
    trajectory = follow_in_float64(tx, case.params, case.grads)
    # An eps of 1e-7 beside averages of norm 0.05 is a relative error of 2e-6, amplified
    # by the slope 16 of the table, in three steps of 0.02.
    np.testing.assert_allclose(trajectory[-1], case.expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize(
    ("name", "shape_scale", "nesterov"),
    [
        ("polar_express", "match_adamw", True),
        ("you", "keller", False),
        ("cans", "spectral", True),
    ],
)
@pytest.mark.parametrize("normalization", ["frobenius", "schatten"])
def test_reference(name: str, shape_scale: str, nesterov: bool, normalization: str):
    arguments = {
        "b1": 0.9,
        "nesterov": nesterov,
        "weight_decay": 0.3,
        "shape_scale": shape_scale,
        "normalization": normalization,
    }
    tx = ox.muon(0.1, ns_coeffs=name, compute_dtype="float64", **arguments)
    expected = matrix.muon(
        PARAMS["w"],
        GRADS["w"],
        learning_rate=0.1,
        fan_in=3,
        fan_out=4,
        ns_coeffs=COEFFICIENT_TABLES[name].rows,
        eps=0.0,
        **arguments,
    )
    # The eps of 1e-7, amplified by slopes of up to 1000, times steps of 0.1.
    np.testing.assert_allclose(
        follow_in_float64(tx, PARAMS["w"], GRADS["w"]), expected, rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("name", ["muon_original", "muon_match_rms_adamw"])
@pytest.mark.parametrize("leaf", ["tall", "wide", "stack"])
@pytest.mark.parametrize(
    ("compute_dtype", "atol"), [("float32", 0.05), ("bfloat16", 0.1)]
)
def test_torch(name: str, leaf: str, compute_dtype: str, atol: float):
    recorded = load_torch_trajectories()
    case = recorded.cases[name]
    scale = {"muon_original": "keller", "muon_match_rms_adamw": "match_adamw"}[name]
    tx = ox.muon(
        case.learning_rates[0],
        ns_coeffs="jordan",
        normalization="frobenius",
        shape_scale=scale,
        weight_decay=0.1,
        compute_dtype=compute_dtype,
        rules=STACK,
    )
    params = jnp.asarray(recorded.params[leaf])
    trajectory, _ = follow(tx, params, jnp.asarray(recorded.grads[leaf]))
    fan_in, fan_out = params.shape[-2:]
    unit = matrix.matrix_shape_scale(scale, fan_in=fan_in, fan_out=fan_out)

    def orthogonal(after: np.ndarray) -> np.ndarray:
        """What every step must have added, decay and learning rate taken off."""
        after = np.asarray(after, np.float64)
        before = np.concatenate([np.asarray(params, np.float64)[None], after[:-1]])
        rate = case.learning_rates[0]
        return (before * (1 - 0.1 * rate) - after) / (rate * unit)

    # PyTorch iterates in bfloat16, where one unit in the last place of a number near 1
    # is 2^-8 and fifteen products accumulate: up to 0.036 in an entry against an exact
    # iteration, and as much again where ours is in bfloat16 too. A momentum of 0.9
    # would make 0.12, no Nesterov, four steps or the exact polar factor more than 0.2.
    np.testing.assert_allclose(
        orthogonal(trajectory),
        orthogonal(case.trajectories["float32"][leaf]),
        rtol=0,
        atol=atol,
    )


# Reductions


@pytest.mark.parametrize(("adamw_rate", "adamw_decay"), [(None, None), (0.02, 0.7)])
def test_the_others_are_adamw(adamw_rate, adamw_decay):
    tx = ox.muon(
        0.1,
        weight_decay=0.3,
        adamw_learning_rate=adamw_rate,
        adamw_weight_decay=adamw_decay,
        adamw_b1=0.8,
        adamw_b2=0.7,
        adamw_eps=1e-3,
    )
    adamw = ox.adamw(
        0.1 if adamw_rate is None else adamw_rate,
        b1=0.8,
        b2=0.7,
        eps=1e-3,
        weight_decay=0.3 if adamw_decay is None else adamw_decay,
    )
    params, _ = follow(tx, PARAMS, GRADS)
    expected, _ = follow(adamw, PARAMS, GRADS)
    for name in ("b", "wte"):
        # Float32 roundings that fusion may order differently.
        assert_trees_close(params[name], expected[name], rtol=1e-6)
    assert np.abs(params["w"] - expected["w"]).max() > 1e-2


def test_the_matrices_are_the_visible_chain():
    axes = MatrixAxes((0,), (1,))
    chain = optax.chain(
        ox.scale_by_ema(0.9, nesterov=False),
        ox.orthogonalize_via_newton_schulz(
            ns_steps=3, ns_coeffs="jordan", compute_dtype="float32", axes=axes
        ),
        ox.scale_by_matrix_shape("spectral", axes=axes),
        optax.add_decayed_weights(0.3),
        optax.scale_by_learning_rate(0.1),
    )
    tx = ox.muon(
        0.1,
        b1=0.9,
        nesterov=False,
        ns_steps=3,
        ns_coeffs="jordan",
        compute_dtype="float32",
        shape_scale="spectral",
        weight_decay=0.3,
    )
    # Float32 roundings, amplified by 40 in three steps.
    assert_trees_close(
        follow(tx, PARAMS, GRADS)[0]["w"],
        follow(chain, PARAMS["w"], GRADS["w"])[0],
        rtol=1e-5,
    )


def test_ema_and_heavy_ball_give_the_same_direction():
    def with_momentum(momentum):
        return optax.chain(
            momentum, ox.orthogonalize_via_newton_schulz(compute_dtype="float32")
        )

    averages = with_momentum(ox.scale_by_ema(0.9, nesterov=True))
    sums = with_momentum(ox.scale_by_momentum(0.9, nesterov=True))
    # Float32 roundings, amplified by up to 1000.
    assert_trees_close(
        follow(averages, PARAMS["w"], GRADS["w"])[1],
        follow(sums, PARAMS["w"], GRADS["w"])[1],
        rtol=5e-4,
    )


@pytest.mark.parametrize(
    "fallback", [optax.sgd(0.5), {"adamw": optax.sgd(0.5)}], ids=["one", "mapping"]
)
def test_fallback_replaces_adamw(fallback):
    params, _ = follow(ox.muon(0.1, fallback=fallback), PARAMS, GRADS)
    expected, _ = follow(optax.sgd(0.5), PARAMS, GRADS)
    for name in ("b", "wte"):
        # Float32 roundings that fusion may order differently.
        assert_trees_close(params[name], expected[name], rtol=1e-6)


def test_only_vectors_and_only_matrices():
    vectors = {"b": PARAMS["b"]}
    grads = {"b": GRADS["b"]}
    assert_trees_close(
        follow(ox.muon(0.1), vectors, grads)[0],
        follow(ox.adamw(0.1, b2=0.95, weight_decay=0.1), vectors, grads)[0],
        rtol=1e-6,  # Float32 roundings.
    )
    state = ox.muon(0.1).init({"w": PARAMS["w"]})
    assert [x.shape for x in jax.tree.leaves(state) if x.shape] == [(3, 4)]


# Invariances


def test_scale_of_the_gradient_of_a_matrix_does_not_matter():
    tx = ox.muon(0.1, compute_dtype="float32")
    expected, _ = follow(tx, PARAMS["w"], GRADS["w"])
    scaled, _ = follow(tx, PARAMS["w"], 2.0**60 * GRADS["w"])
    np.testing.assert_array_equal(scaled, expected)


def test_updates_have_the_rms_of_adamw():
    params = normal_tree({"u": (4, 16), "v": (16, 4), "w": (8, 8)}, seed=3)
    grads = jax.tree.map(lambda p: p[None] * 1e-5, params)
    tx = ox.muon(
        1.0,
        weight_decay=0.0,
        ns_coeffs="deepseek",
        ns_steps=10,
        compute_dtype="float32",
    )
    _, updates = follow(tx, params, grads)
    for u in jax.tree.leaves(updates):
        # Singular values are within 5e-4 of 1.
        np.testing.assert_allclose(np.sqrt(np.mean(u**2)), 0.2, rtol=1e-3)


def test_decay_does_not_see_the_shape_scale():
    zeros = jax.tree.map(jnp.zeros_like, GRADS)
    params, _ = follow(ox.muon(0.1, weight_decay=0.5), PARAMS, zeros)
    # Decay by 1 - 0.1·0.5 a step in both groups; float32 roundings.
    assert_trees_close(
        jax.tree.map(lambda p: p[-1], params),
        jax.tree.map(lambda p: 0.95**5 * p, PARAMS),
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    "mask",
    [ox.decay_mask, {"w": True, "b": False, "wte": True}],
    ids=["function", "tree"],
)
@pytest.mark.parametrize(
    "factory",
    mostly(
        [ox.muon, ox.apollo],
        [ox.muon, ox.normuon, ox.adamuon, ox.dion, ox.kron, ox.apollo],
    ),
)
def test_masked_parameters_do_not_decay(factory, mask):
    zeros = jax.tree.map(jnp.zeros_like, GRADS)
    params, _ = follow(factory(0.1, weight_decay=0.5, mask=mask), PARAMS, zeros)
    np.testing.assert_array_equal(params["b"][-1], PARAMS["b"])
    for key in ("w", "wte"):
        # Decay by 1 - 0.1·0.5 a step; float32 roundings.
        assert_trees_close(params[key][-1], 0.95**5 * PARAMS[key], rtol=1e-6)


@pytest.mark.parametrize(
    "factory", [ox.muon, ox.normuon, ox.adamuon, ox.dion, ox.kron, ox.apollo]
)
def test_the_form_of_the_decay_reaches_both_groups(factory):
    zeros = jax.tree.map(jnp.zeros_like, GRADS)
    tx = factory(0.1, weight_decay=0.01, decay="independent")
    params, _ = follow(tx, PARAMS, zeros)
    # By 1 - 0.01 a step, whatever the learning rate; float32 roundings.
    assert_trees_close(
        jax.tree.map(lambda p: p[-1], params),
        jax.tree.map(lambda p: 0.99**5 * p, PARAMS),
        rtol=1e-6,
    )


def test_without_decay_no_params_are_needed():
    tx = ox.muon(0.1, weight_decay=0.0)
    with_params, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    without, _ = tx.update(PARAMS, tx.init(PARAMS))
    assert_trees_equal(without, with_params)


def test_fused_projections_are_separate_matrices():
    fused = normal_tree((4, 12), seed=4)
    grads = jnp.stack(gradients((4, 12), steps=3))
    rule = Rule("c_attn", MatrixAxes((0,), (1,), splits=(4, 4, 4)), "hidden")
    tx = ox.muon(0.1, compute_dtype="float32", rules=(rule, *DEFAULT_RULES))
    whole, _ = follow(tx, {"c_attn": fused}, {"c_attn": grads})
    plain = ox.muon(0.1, compute_dtype="float32")
    parts = [
        follow(plain, {"w": fused[:, cut]}, {"w": grads[..., cut]})[0]["w"]
        for cut in (slice(0, 4), slice(4, 8), slice(8, 12))
    ]
    # Float32 roundings, amplified by up to 1000, times steps of 0.1·0.4.
    np.testing.assert_allclose(
        whole["c_attn"], jnp.concatenate(parts, axis=-1), rtol=0, atol=1e-4
    )


def test_schedules_serve_both_groups():
    tx = ox.muon(lambda step: jnp.where(step < 2, 0.1, 0.0))
    params, _ = follow(tx, PARAMS, GRADS)
    for p in jax.tree.leaves(params):
        np.testing.assert_array_equal(p[2:], np.broadcast_to(p[1], p[2:].shape))
        assert np.abs(p[1] - p[0]).max() > 1e-3


def test_bfloat16_momentum():
    state = ox.muon(0.1, mu_dtype="bfloat16").init(PARAMS)
    mu = [x for x in optax.tree.get_all_with_path(state, "mu")]
    found = {x.dtype for _, tree in mu for x in jax.tree.leaves(tree)}
    assert found == {jnp.dtype("bfloat16")}
    (_, nu), *_ = optax.tree.get_all_with_path(state, "nu")
    assert {x.dtype for x in jax.tree.leaves(nu)} == {jnp.dtype("float32")}


# Errors


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (
            ValueError,
            {"learning_rate": -0.1},
            "muon: learning_rate=-0.1 is not",
        ),
        (ValueError, {"learning_rate": float("nan")}, "muon: learning_rate=nan is not"),
        (TypeError, {"learning_rate": "1e-3"}, "muon: learning_rate='1e-3' is not"),
        (
            ValueError,
            {"adamw_learning_rate": -1.0},
            "muon: adamw_learning_rate=-1.0 is not allowed",
        ),
        (ValueError, {"clip_norm": 0.0}, "clip_norm=0.0 is not allowed; .* > 0"),
        (TypeError, {"clip_norm": "1"}, "clip_norm='1' is not allowed"),
        (ValueError, {"b1": 1.0}, r"b1=1.0 is not allowed; .* \[0, 1\)"),
        (TypeError, {"nesterov": 1}, "nesterov=1 is not allowed"),
        (ValueError, {"weight_decay": -0.1}, "muon: weight_decay=-0.1 is not allowed"),
        (
            ValueError,
            {"adamw_weight_decay": -0.1},
            "muon: adamw_weight_decay=-0.1 is not allowed",
        ),
        (ValueError, {"ns_steps": 0}, "ns_steps=0 is not allowed"),
        (ValueError, {"ns_coeffs": "you", "ns_steps": 6}, "defines exactly 5 steps"),
        (ValueError, {"method": "fast"}, "method='fast' is not allowed"),
        (ValueError, {"normalization": "l2"}, "normalization='l2' is not allowed"),
        (ValueError, {"decay": "L2"}, "decay='L2' is not allowed"),
        (TypeError, {"debias": 1}, "debias=1 is not allowed"),
        (TypeError, {"nu_dtype": "int8"}, "nu_dtype='int8' is not allowed"),
        (ValueError, {"ns_coeffs": "standard"}, "ns_coeffs='standard' is not allowed"),
        (TypeError, {"compute_dtype": "int8"}, "compute_dtype='int8' is not allowed"),
        (
            ValueError,
            {"shape_scale": "moonlight"},
            "shape_scale='moonlight' is not allowed; it must be one of 'match_adamw'",
        ),
        (ValueError, {"adamw_b1": 1.0}, "muon: adamw_b1=1.0 is not allowed"),
        (ValueError, {"adamw_b2": -1}, "muon: adamw_b2=-1 is not allowed"),
        (ValueError, {"adamw_eps": 0.0}, "muon: adamw_eps=0.0 is not allowed; .* > 0"),
        (TypeError, {"mu_dtype": "int8"}, "mu_dtype='int8' is not allowed"),
        (TypeError, {"fallback": 0.1}, "muon: fallback=0.1 is not allowed; .* mapping"),
        (
            TypeError,
            {"fallback": {"x": 1}},
            r"muon: fallback=\{'x': 1\} is not",
        ),
        (TypeError, {"fallback": {1: optax.sgd(0.1)}}, r"muon: fallback=\{1: Gradient"),
        (
            ValueError,
            {"fallback": {"muon": optax.sgd(0.1)}},
            r"muon: fallback\['muon'\] is not allowed; that group is muon's own",
        ),
        (
            ValueError,
            {"fallback": {"frozen": optax.sgd(0.1)}},
            r"muon: fallback\['frozen'\] is not allowed",
        ),
        (
            TypeError,
            {"ns_steps": jnp.asarray(5)},
            r"ns_steps shapes the compiled program .* static_args=\('ns_steps',\)",
        ),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message: str):
    with pytest.raises(error, match=message):
        ox.muon(**{"learning_rate": 0.1, **arguments})


def test_wrong_parameters_are_refused_at_init():
    tx = ox.muon(0.1)
    with pytest.raises(ValueError, match=r"muon: .*\n  'w' of shape \(2, 3, 4\)"):
        tx.init({"w": jnp.ones((2, 3, 4))})
    with pytest.raises(TypeError, match="parameter 'w' of dtype int32 is not allowed"):
        tx.init({"w": jnp.ones((2, 3), jnp.int32)})
    with pytest.raises(TypeError, match="parameter 'w' of dtype complex64 is not"):
        tx.init({"w": jnp.ones((2, 3), jnp.complex64)})
    vector = (Rule("b", MatrixAxes((), (0,)), "hidden"), *DEFAULT_RULES)
    with pytest.raises(ValueError, match=r"parameter 'b' of shape \(4,\) .*vector"):
        ox.muon(0.1, rules=vector).init(PARAMS)


def test_params_are_needed():
    tx = ox.muon(0.1)
    with pytest.raises(ValueError, match="params"):
        tx.update(PARAMS, tx.init(PARAMS))


def test_updates_of_none_and_masked_leaves():
    params = {"w": PARAMS["w"], "n": None, "m": optax.MaskedNode()}
    tx = ox.muon(0.1)
    updates, _ = tx.update(params, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    alone, _ = tx.update(params["w"], tx.init(params["w"]), params["w"])
    assert_trees_equal(updates["w"], alone)


def test_a_fallback_that_nothing_can_reach_is_refused():
    with pytest.raises(ValueError, match=r"muon: fallback\['adam'\] is not allowed"):
        ox.muon(0.1, fallback={"adam": optax.sgd(0.1)})
