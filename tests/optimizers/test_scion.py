"""What is specific to Scion."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from optaxplus import DEFAULT_RULES, LORA_RULES, MatrixAxes, Rule, trees
from optaxplus.optimizers.scion import SCION_NORMS
from tests.assertions import assert_trees_close, assert_trees_equal
from tests.problems import gradients, normal_tree
from tests.references import muon_family
from tests.references.matrix_trajectories import load_matrix_trajectories
from tests.trajectories import follow, follow_in_float64

# A parameter of every role, and one of each kind that is not what its role says.
SHAPES = {
    "block": {"kernel": (3, 4)},
    "wte": (5, 3),
    "lm_head": {"kernel": (4, 5)},
    "norm": {"scale": (4,)},
    "router": {"kernel": (4, 2)},
    "patch_embed": {"kernel": (6, 4)},
    "cls": (4,),
}
# Path -> whose norm it takes.
ROLES = {
    "block/kernel": "hidden",
    "wte": "embedding",
    "lm_head/kernel": "head",
    "norm/scale": "vector",
    "router/kernel": "other",
    "patch_embed/kernel": "other",
    "cls": "vector",
}
PARAMS = normal_tree(SHAPES, seed=0)
GRADS = jax.tree.map(lambda *g: jnp.stack(g), *gradients(SHAPES, steps=5))
# Norm -> its name in the reference.
KINDS = {"spectral": "spectral", "sign": "sign", "rms": "bias_rms"}
# As the reference normalises and rounds.
AS_THERE = {"normalization": "frobenius", "compute_dtype": "float64"}
SMALL = {
    "hidden": ("spectral", 3.0),
    "embedding": ("per_input", 1.0),
    "head": ("per_output", 10.0),
    "vector": ("rms", 2.0),
    "other": ("sign", 4.0),
}


def by_path(tree) -> dict[str, np.ndarray]:
    """Leaves in float64."""
    return {p: np.asarray(x, np.float64) for p, x in trees.leaves_with_paths(tree)}


def fans(path: str, p: np.ndarray) -> tuple[int, int]:
    """(fan_in, fan_out); a vector has one input, which is always 1."""
    return p.shape if p.ndim == 2 else (1, p.size)


# Agreement


@pytest.mark.parametrize("constrained", [True, False])
def test_reference_of_every_role(constrained: bool):
    tx = ox.scion(0.01, ns_coeffs="jordan", constrained=constrained, **AS_THERE)
    with jax.enable_x64(True):
        wide = [
            jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), tree)
            for tree in (PARAMS, GRADS)
        ]
        ours = by_path(follow(tx, *wide)[0])
    params, grads = by_path(PARAMS), by_path(GRADS)
    assert ours.keys() == ROLES.keys()
    for path, role in ROLES.items():
        norm, radius = SCION_NORMS[role]
        fan_in, fan_out = fans(path, params[path])
        expected = muon_family.scion(
            params[path],
            grads[path],
            learning_rate=0.01,
            fan_in=fan_in,
            fan_out=fan_out,
            kind=KINDS[norm],
            radius=radius,
            constrained=constrained,
            normalized=role != "embedding",
            eps=0.0,
            ns_eps=0.0,
        )
        # The relative eps of 1e-7, amplified by the slope 485 of the table.
        np.testing.assert_allclose(
            ours[path], expected, rtol=0, atol=1e-4, err_msg=path
        )


# Case of pytorch-optimizer's SCION -> norm, one-hot, constrained. It has the authors'
# names; their bound of the factor of "spectral" by 1 is not here.
RECORDED = {
    "scion_spectral": ("spectral", False, False),
    "scion_spectral_unnormalized": ("spectral", True, False),
    "scion_sign": ("sign", False, False),
    "scion_sign_unnormalized": ("sign", True, False),
    "scion_column": ("per_input", True, False),
    "scion_column_normalized": ("per_input", False, False),
    "scion_row": ("per_output", False, False),
    "scion_row_unnormalized": ("per_output", True, False),
    "scion_bias_rms": ("rms", False, False),
    "scion_spectral_constrained": ("spectral", False, True),
    "scion_sign_constrained": ("sign", False, True),
    "scion_column_constrained": ("per_input", True, True),
    "scion_row_constrained": ("per_output", False, True),
    "scion_bias_rms_constrained": ("rms", False, True),
    "nvidia_scion": ("spectral", False, True),
}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_runs_of_other_packages(name: str):
    recorded = load_matrix_trajectories()
    norm, one_hot, constrained = RECORDED[name]
    is_vector = norm == "rms"
    axes = MatrixAxes((), (-1,)) if is_vector else MatrixAxes((-1,), (-2,))
    tx = ox.scion(
        recorded.cases[name].learning_rate,
        b1=0.95 if name == "nvidia_scion" else 0.7 if constrained else 0.9,
        norms={"mine": (norm, 3.0)},
        one_hot_roles=("mine",) if one_hot else (),
        constrained=constrained,
        ns_coeffs="you" if name == "nvidia_scion" else "jordan",
        rules=(Rule("", axes, "mine"),),
        **AS_THERE,
    )
    for leaf, expected in recorded.cases[name].trajectories["float64"].items():
        ours = follow_in_float64(tx, recorded.params[leaf], recorded.grads[leaf])
        # Ours has an eps of 1e-7 in front of Newton-Schulz, amplified by its slope;
        # theirs adds 1e-8 to denominators.
        atol = (1e-4 if norm == "spectral" else 1e-6) * np.abs(expected).max()
        np.testing.assert_allclose(ours, expected, rtol=0, atol=atol)


def test_every_recorded_run_of_scion_is_used():
    runs = {name for name in load_matrix_trajectories().cases if "scion" in name}
    assert runs - set(RECORDED) == {"scion_spectral_at_least_one"}


# Reductions


def test_a_role_is_the_visible_chain():
    axes = MatrixAxes((0,), (1,))
    chain = optax.chain(
        ox.scale_by_ema(0.8),
        ox.orthogonalize_via_newton_schulz(
            ns_steps=3, ns_coeffs="jordan", compute_dtype="float32", axes=axes
        ),
        ox.scale_by_matrix_shape("spectral", axes=axes),
        optax.scale(7.0),
        optax.add_decayed_weights(1.0),
        optax.scale_by_learning_rate(0.1),
    )
    tx = ox.scion(
        0.1,
        b1=0.8,
        norms={"hidden": ("spectral", 7.0)},
        ns_steps=3,
        ns_coeffs="jordan",
        compute_dtype="float32",
    )
    w, g = PARAMS["block"]["kernel"], GRADS["block"]["kernel"]
    # Float32 roundings, amplified by 40 in three steps.
    assert_trees_close(
        follow(tx, {"w": w}, {"w": g})[0]["w"], follow(chain, w, g)[0], rtol=1e-5
    )


def test_signs_everywhere_are_signum():
    norms = dict.fromkeys(SCION_NORMS, ("sign", 1.0))
    tx = ox.scion(0.1, norms=norms, one_hot_roles=SCION_NORMS, constrained=False)
    signum = ox.signum(0.1, b1=0.9)
    assert_trees_close(
        follow(tx, PARAMS, GRADS)[0], follow(signum, PARAMS, GRADS)[0], rtol=1e-6
    )


def test_norms_that_are_missing_keep_the_default():
    norms = {"hidden": ("spectral", 50.0), "vector": ("sign", 2.0)}
    some, _ = follow(ox.scion(0.1, norms=norms), PARAMS, GRADS)
    plain, _ = follow(ox.scion(0.1), PARAMS, GRADS)
    # Both take their norm from "vector".
    assert np.abs(some.pop("cls") - plain.pop("cls")).max() > 0.1
    assert np.abs(some.pop("norm")["scale"] - plain.pop("norm")["scale"]).max() > 0.1
    assert_trees_equal(some, plain)


def test_clipping_is_of_the_whole_trainable_gradient():
    frozen = (Rule("^wte$", MatrixAxes((0,), (1,)), "frozen"), *DEFAULT_RULES)
    grads = {**GRADS, "wte": 1e6 * GRADS["wte"]}
    ours, _ = follow(ox.scion(0.1, clip_norm=0.5, rules=frozen), PARAMS, grads)

    def clipped(step):
        g = jax.tree.map(lambda g: g[step], {**GRADS, "wte": jnp.zeros((5, 5, 3))})
        return jax.tree.map(lambda x: x * min(1.0, 0.5 / optax.tree.norm(g)), g)

    shortened = jax.tree.map(lambda *g: jnp.stack(g), *map(clipped, range(5)))
    expected, _ = follow(ox.scion(0.1, rules=frozen), PARAMS, shortened)
    # bfloat16 products of averages that differ by roundings.
    assert_trees_close(ours, expected, rtol=2e-2)
    np.testing.assert_array_equal(ours["wte"][-1], PARAMS["wte"])


def test_first_step_does_not_depend_on_the_decay_rate():
    # The average starts from zero, and its scale does not matter.
    first = {key: jax.tree.map(lambda g: g[:1], g) for key, g in GRADS.items()}
    slow, _ = follow(ox.scion(0.1, b1=0.99, compute_dtype="float32"), PARAMS, first)
    none, _ = follow(ox.scion(0.1, b1=0.0, compute_dtype="float32"), PARAMS, first)
    assert_trees_close(slow, none, rtol=1e-4)


# Balls


SIZES = {
    "spectral": lambda x, m, n: np.sqrt(m / n) * np.linalg.norm(x, 2),
    "sign": lambda x, m, n: m * np.abs(x).max(),
    "per_input": lambda x, m, n: m * np.sqrt(np.mean(x**2, axis=1)).max(),
    "per_output": lambda x, m, n: np.sqrt(m) * np.linalg.norm(x, axis=0).max(),
    "rms": lambda x, m, n: np.sqrt(np.mean(x**2)),
}


def sizes(params, norms) -> dict[str, float]:
    """The norm of every parameter over its radius."""
    result = {}
    for path, x in by_path(params).items():
        norm, radius = norms[ROLES[path]]
        m, n = fans(path, x)
        m = 1 if ROLES[path] == "embedding" else m
        result[path] = SIZES[norm](x, m, n) / radius
    return result


@pytest.mark.parametrize("norms", [SCION_NORMS, SMALL], ids=["default", "small"])
def test_constrained_parameters_stay_in_their_balls(norms):
    exact = {"ns_coeffs": "deepseek", "ns_steps": 10, "compute_dtype": "float32"}
    tx = ox.scion(0.3, norms=norms, **exact)
    start = jax.tree.map(lambda p: 1e-3 * p, PARAMS)
    # Gradients that keep their direction push to the boundary.
    steady = jax.tree.map(lambda g: jnp.repeat(g[:1], 30, axis=0), GRADS)
    trajectory, _ = follow(tx, start, steady)
    for step in range(30):
        for path, size in sizes(
            jax.tree.map(lambda p, step=step: p[step], trajectory), norms
        ).items():
            # "deepseek" leaves singular values within 5e-4 of 1.
            assert size < 1 + 1e-3, path
    for path, size in sizes(jax.tree.map(lambda p: p[-1], trajectory), norms).items():
        # 1 - 0.7^30 of the way.
        assert size > 1 - 1e-3, path


def test_parameters_outside_shrink_into_their_balls():
    start = {"w": 1e3 * PARAMS["block"]["kernel"]}
    zeros = {"w": jnp.zeros((4, 3, 4))}
    trajectory, _ = follow(ox.scion(0.1), start, zeros)
    assert_trees_close(trajectory["w"][-1], 0.9**4 * start["w"], rtol=1e-6)


def test_unconstrained_parameters_move_by_the_radius():
    _, updates = follow(
        ox.scion(0.1, norms=SMALL, constrained=False, compute_dtype="float32"),
        PARAMS,
        GRADS,
    )
    for path, size in sizes(jax.tree.map(lambda u: u[2], updates), SMALL).items():
        # The band of the default table.
        np.testing.assert_allclose(size, 0.1, rtol=0.15, err_msg=path)


def test_no_params_are_needed_without_constraint():
    tx = ox.scion(0.1, constrained=False)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS))
    with_params, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert_trees_equal(updates, with_params)
    with pytest.raises(ValueError, match="scion: params=None is not allowed"):
        ox.scion(0.1).update(PARAMS, ox.scion(0.1).init(PARAMS))


# Roles


def test_a_role_of_ones_own():
    rule = Rule("^wte$", MatrixAxes((0,), (1,)), "tables")
    rules = (rule, *DEFAULT_RULES)
    with pytest.raises(
        ValueError,
        match=r"scion: parameter 'wte' has the role 'tables', which has no norm; pass "
        r"norms=\{'tables': \('spectral', 50.0\)\}",
    ):
        ox.scion(0.1, rules=rules).init(PARAMS)
    tx = ox.scion(
        0.1,
        norms={"tables": ("sign", 2.0)},
        one_hot_roles=("tables",),
        constrained=False,
        rules=rules,
    )
    updates, _ = tx.update(PARAMS, tx.init(PARAMS))
    assert_trees_close(updates["wte"], -0.2 * jnp.sign(PARAMS["wte"]), rtol=1e-6)


def test_tied_tables_have_the_rule_of_the_authors():
    width = PARAMS["wte"].shape[1]
    tx = ox.scion(
        0.01, norms={"embedding": ("sign", 3000.0 / width)}, constrained=False
    )
    updates, _ = tx.update(PARAMS, tx.init(PARAMS))
    # The same table as a head, (features, tokens).
    head = {"lm_head": {"kernel": PARAMS["wte"].T}}
    tx = ox.scion(0.01, constrained=False)
    expected, _ = tx.update(head, tx.init(head))
    assert_trees_close(updates["wte"].T, expected["lm_head"]["kernel"], rtol=1e-6)


@pytest.mark.parametrize(
    ("shapes", "roles"),
    [
        ({"embedding": {"kernel": (4, 4, 3, 8), "bias": (8,)}}, ["vector", "other"]),
        ({"patch_embed": {"weight": (6, 8), "bias": (8,)}}, ["vector", "other"]),
        ({"patch_embed.proj.kernel": (4, 4, 3, 8)}, ["other"]),
        ({"embed": {"embedding": (6, 8)}}, ["embedding"]),
        ({"tok_embeddings": {"weight": (6, 8)}}, ["embedding"]),
        ({"embedding": {"weight": (6, 8)}}, ["embedding"]),
        ({"pos_embedding": (1, 6, 8)}, ["embedding"]),
        ({"cls": (8,)}, ["vector"]),
    ],
    ids=lambda node: "" if isinstance(node, list) else next(iter(node)),
)
def test_what_is_looked_up_and_what_is_multiplied(shapes, roles):
    params = normal_tree(shapes, seed=0)
    # The size of a sign tells whose it is.
    norms = {role: ("sign", 2.0**i) for i, role in enumerate(SCION_NORMS)}
    tx = ox.scion(1.0, norms=norms, one_hot_roles=SCION_NORMS, constrained=False)
    updates, _ = tx.update(params, tx.init(params))
    for u, role in zip(jax.tree.leaves(updates), roles, strict=True):
        np.testing.assert_array_equal(np.abs(u), np.full(u.shape, norms[role][1]))


def test_frozen_parameters_have_no_state():
    shapes = {"up": {"kernel": (3, 4), "lora_a": (3, 2), "lora_b": (2, 4)}}
    params = normal_tree(shapes, seed=0)
    tx = ox.scion(0.1, rules=LORA_RULES)
    state = tx.init(params)
    assert sorted(x.size for x in jax.tree.leaves(state)) == [1, 6, 8]
    updates, _ = tx.update(params, state, params)
    np.testing.assert_array_equal(updates["up"]["kernel"], np.zeros((3, 4)))
    assert np.all(np.asarray(updates["up"]["lora_a"]) != 0)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_state_is_one_number_a_parameter(dtype: str, size: int):
    state = ox.scion(0.1, mu_dtype=dtype).init(PARAMS)
    count = sum(p.size for p in jax.tree.leaves(PARAMS))
    # And the number of steps.
    assert sum(x.nbytes for x in jax.tree.leaves(state)) == size * count + 4


def test_norms_may_change_during_a_run():
    state = ox.scion(0.1).init(PARAMS)
    _, state = ox.scion(0.1).update(PARAMS, state, PARAMS)
    _, after = ox.scion(0.1, norms=SMALL).update(PARAMS, state, PARAMS)
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_schedules_serve_every_role():
    tx = ox.scion(lambda step: jnp.where(step < 2, 0.1, 0.0))
    params, _ = follow(tx, PARAMS, GRADS)
    for p in jax.tree.leaves(params):
        np.testing.assert_array_equal(p[2:], np.broadcast_to(p[1], p[2:].shape))
        assert np.abs(p[1] - p[0]).max() > 1e-3


# Invariances


def test_scale_of_the_gradient_does_not_matter():
    tx = ox.scion(0.1, compute_dtype="float32")
    expected, _ = follow(tx, PARAMS, GRADS)
    huge, _ = follow(tx, PARAMS, jax.tree.map(lambda g: 2.0**60 * g, GRADS))
    assert_trees_close(huge, expected, rtol=1e-6)


def test_fused_projections_are_separate_matrices():
    fused = normal_tree((4, 12), seed=4)
    grads = jnp.stack(gradients((4, 12), steps=3))
    rule = Rule("c_attn", MatrixAxes((0,), (1,), splits=(4, 4, 4)), "hidden")
    tx = ox.scion(0.1, compute_dtype="float32", rules=(rule, *DEFAULT_RULES))
    whole, _ = follow(tx, {"c_attn": fused}, {"c_attn": grads})
    plain = ox.scion(0.1, compute_dtype="float32")
    parts = [
        follow(plain, {"w": fused[:, cut]}, {"w": grads[..., cut]})[0]["w"]
        for cut in (slice(0, 4), slice(4, 8), slice(8, 12))
    ]
    # Float32 roundings, amplified by up to 1000.
    assert_trees_close(whole["c_attn"], jnp.concatenate(parts, axis=-1), rtol=2e-4)


def test_a_traced_radius():
    def step(radius):
        tx = ox.scion(0.1, norms={"head": ("sign", radius)})
        return tx.update(PARAMS, tx.init(PARAMS), PARAMS)[0]["lm_head"]["kernel"]

    assert_trees_close(jax.jit(step)(30.0), step(30.0), rtol=1e-6)


# Errors


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"learning_rate": -0.1}, "scion: learning_rate=-0.1 is not"),
        (ValueError, {"learning_rate": 1.5}, "learning_rate=1.5 is not .* at most 1"),
        (TypeError, {"learning_rate": "1e-3"}, "scion: learning_rate='1e-3' is not"),
        (ValueError, {"clip_norm": 0.0}, "scion: clip_norm=0.0 is not allowed; .* > 0"),
        (ValueError, {"b1": 1.0}, r"scion: b1=1.0 is not allowed; .* \[0, 1\)"),
        (TypeError, {"constrained": 1}, "scion: constrained=1 is not allowed"),
        (TypeError, {"mu_dtype": "int8"}, "scion: mu_dtype='int8' is not allowed"),
        (ValueError, {"ns_steps": 0}, "ns_steps=0 is not allowed"),
        (TypeError, {"ns_steps": jnp.asarray(5)}, r"static_args=\('ns_steps',\)"),
        (ValueError, {"ns_coeffs": "standard"}, "ns_coeffs='standard' is not allowed"),
        (ValueError, {"method": "newton"}, "method='newton' is not allowed"),
        (ValueError, {"normalization": "l2"}, "normalization='l2' is not allowed"),
        (TypeError, {"compute_dtype": "int8"}, "compute_dtype='int8' is not allowed"),
        (TypeError, {"rules": 1}, "scion: rules=1 is not allowed"),
        (TypeError, {"norms": 50.0}, "scion: norms=50.0 is not .* pairs"),
        (TypeError, {"norms": {"head": "sign"}}, r"norms\['head'\]='sign' .* a pair"),
        (TypeError, {"norms": {"head": ("sign",)}}, r"norms\['head'\]=\('sign',\) is"),
        (
            ValueError,
            {"norms": {"head": ("Sign", 1.0)}},
            r"norms\['head'\]\[0\]='Sign' is not allowed; it must be one of 'spectral'",
        ),
        (
            ValueError,
            {"norms": {"head": ("sign", -1.0)}},
            r"norms\['head'\]\[1\]=-1.0 is not allowed; it must be a finite number > 0",
        ),
        (
            ValueError,
            {"norms": {"heads": ("sign", 1.0)}},
            r"norms\['heads'\] is not allowed; no rule gives the role 'heads'. Those "
            "that have a norm are 'embedding', 'head', 'hidden', 'other', 'vector'",
        ),
        (ValueError, {"norms": {"frozen": ("sign", 1.0)}}, r"norms\['frozen'\] is not"),
        (TypeError, {"one_hot_roles": "head"}, "one_hot_roles='head' .* a collection"),
        (
            ValueError,
            {"one_hot_roles": ("tables",)},
            r"one_hot_roles=\('tables',\) is not allowed; no rule gives the role 'tabl",
        ),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message: str):
    with pytest.raises(error, match=message):
        ox.scion(**{"learning_rate": 0.1, **arguments})


def test_long_steps_are_allowed_without_constraint():
    ox.scion(1.5, constrained=False).init(PARAMS)


def test_wrong_parameters_are_refused_at_init():
    tx = ox.scion(0.1)
    with pytest.raises(ValueError, match=r"scion: .*\n  'w' of shape \(2, 3, 4\)"):
        tx.init({"w": jnp.ones((2, 3, 4))})
    with pytest.raises(TypeError, match="parameter 'w' of dtype int32 is not allowed"):
        tx.init({"w": jnp.ones((2, 3), jnp.int32)})
    with pytest.raises(TypeError, match="parameter 'w' of dtype complex64 is not"):
        tx.init({"w": jnp.ones((2, 3), jnp.complex64)})
    vector = (Rule("b", MatrixAxes((), (0,)), "hidden"), *DEFAULT_RULES)
    with pytest.raises(ValueError, match=r"parameter 'b' of shape \(4,\) .* a vector"):
        ox.scion(0.1, rules=vector).init({"b": jnp.ones(4)})
