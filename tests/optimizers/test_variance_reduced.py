"""What is specific to MARS: its variants, and which parameters they move."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from optaxplus import DEFAULT_RULES, MatrixAxes, Rule
from tests.assertions import assert_trees_close, assert_trees_equal
from tests.problems import gradients, normal_tree
from tests.references.golden import GOLDEN_CASES
from tests.trajectories import follow, follow_in_float64, run

SHAPES = {
    "embed": {"embedding": (5, 4)},
    "layers": {"kernel": (2, 4, 3), "bias": (2, 3)},
    "norm": {"scale": (4,)},
}
PARAMS = normal_tree(SHAPES, seed=0)
TREES = gradients(SHAPES, steps=3)
GRADS = jax.tree.map(lambda *g: jnp.stack(g), *TREES)


def part(tree, matrices: bool):
    """The matrices of a tree, or what is none."""
    flat = jax.tree.leaves(tree)
    chosen = [True, False, True, False]
    return [
        leaf
        for leaf, is_matrix in zip(flat, chosen, strict=True)
        if is_matrix == matrices
    ]


def test_the_parts_are_what_they_are_called():
    shapes = jax.tree.map(lambda p: p.shape, [part(PARAMS, True), part(PARAMS, False)])
    assert shapes == [[(5, 4), (2, 4, 3)], [(2, 3), (4,)]]


def test_golden_numbers():
    (case,) = [case for case in GOLDEN_CASES if case.method == "mars"]
    tx = ox.mars(**case.arguments, correct_vectors=True)
    trajectory = follow_in_float64(tx, case.params, case.grads)
    # Half a unit of the last decimal printed; float64 itself errs by 1e-15.
    atol = 0.505 * 10.0**-case.decimals
    np.testing.assert_allclose(trajectory[-1], case.expected, rtol=0, atol=atol)


# Who gets what


def corrected(*rule, gamma=0.025, b1=0.95, max_norm=1.0, decay=0.0):
    """The chain of matrices."""
    axes = ox.infer_matrix_axes(PARAMS)
    return optax.chain(
        ox.mars_correction(gamma=gamma, b1=b1, max_norm=max_norm, axes=axes),
        *rule,
        ox.descend(0.1, decay),
    )


VARIANTS = {
    "adamw": ({}, corrected(ox.scale_by_adam(0.95, 0.99))),
    "adamw_arguments": (
        {"b1": 0.8, "b2": 0.7, "gamma": 0.1, "max_norm": 5.0, "weight_decay": 0.3},
        corrected(
            ox.scale_by_adam(0.8, 0.7), gamma=0.1, b1=0.8, max_norm=5.0, decay=0.3
        ),
    ),
    "unclipped": (
        {"max_norm": None},
        corrected(ox.scale_by_adam(0.95, 0.99), max_norm=None),
    ),
    "lion": (
        {"variant": "lion", "b1": 0.9},
        corrected(ox.scale_by_ema(0.9), ox.scale_by_sign(), b1=0.9),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_matrices_get_the_corrected_gradient_and_vectors_adamw(name: str):
    arguments, chain = VARIANTS[name]
    ours, _ = follow(ox.mars(0.1, **arguments), PARAMS, GRADS)
    of_matrices, _ = follow(chain, PARAMS, GRADS)
    adamw, _ = follow(ox.adamw(0.1, b2=0.95, weight_decay=0.1), PARAMS, GRADS)
    # The same operations; fusion may order them differently.
    assert_trees_close(part(ours, True), part(of_matrices, True), rtol=2e-6)
    assert_trees_close(part(ours, False), part(adamw, False), rtol=2e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_correct_vectors(name: str):
    arguments, chain = VARIANTS[name]
    ours, _ = follow(ox.mars(0.1, **arguments, correct_vectors=True), PARAMS, GRADS)
    # The same operations; fusion may order them differently.
    assert_trees_close(ours, follow(chain, PARAMS, GRADS)[0], rtol=2e-6)


def test_vectors_have_hyper_parameters_of_their_own():
    tx = ox.mars(
        0.1,
        eps=0.01,
        adamw_learning_rate=lambda step: 0.3 / (step + 1),
        adamw_b1=0.5,
        adamw_b2=0.6,
        adamw_weight_decay=0.7,
        decay="independent",
    )
    adamw = optax.chain(
        ox.scale_by_adam(0.5, 0.6, eps=0.01),
        ox.descend(lambda step: 0.3 / (step + 1), 0.7, decay="independent"),
    )
    # The same operations; fusion may order them differently.
    assert_trees_close(
        part(follow(tx, PARAMS, GRADS)[0], False),
        part(follow(adamw, PARAMS, GRADS)[0], False),
        rtol=2e-6,
    )


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_shampoo_orthogonalizes_the_average(compute_dtype: str):
    params, grads = PARAMS["embed"]["embedding"], GRADS["embed"]["embedding"]
    tx = ox.mars(0.1, variant="shampoo", compute_dtype=compute_dtype, weight_decay=0.3)
    chain = optax.chain(
        ox.mars_correction(),
        ox.scale_by_ema(0.95),
        ox.orthogonalize_via_newton_schulz(
            ns_coeffs="jordan",
            normalization="frobenius",
            compute_dtype=compute_dtype,
        ),
        ox.scale_by_matrix_shape("keller"),
        ox.descend(0.1, 0.3),
    )
    # The same operations; fusion may order them differently, which Newton-Schulz
    # amplifies: 500 roundings of float32, one of bfloat16.
    rtol = {"float32": 3e-5, "bfloat16": 2**-8}[compute_dtype]
    assert_trees_close(
        follow(tx, params, grads)[0], follow(chain, params, grads)[0], rtol=rtol
    )


def test_every_layer_is_clipped_on_its_own():
    tx = ox.mars(0.1, variant="lion", max_norm=0.5)
    _, state = run(tx, PARAMS, TREES[:1])
    average = optax.tree.get(state, "ScaleByEmaState").mu["layers"]["kernel"]
    # A twentieth of the corrected gradient, in float32; both are long.
    norms = np.linalg.norm(average, axis=(1, 2)) / 0.05
    np.testing.assert_allclose(norms, [0.5, 0.5], rtol=1e-6)


# What is frozen, and params


@pytest.mark.parametrize("variant", ["adamw", "lion", "shampoo"])
def test_frozen_parameters_do_not_change(variant: str):
    frozen = Rule("^embed/", MatrixAxes((0,), (1,)), "frozen")
    tx = ox.mars(0.1, variant=variant, weight_decay=0.5, rules=(frozen, *DEFAULT_RULES))
    params = {**PARAMS, "embed": {"embedding": jnp.arange(6).reshape(2, 3)}}
    grads = {**TREES[0], "embed": params["embed"]}
    (updates,), _ = run(tx, params, [grads])
    assert_trees_equal(updates["embed"]["embedding"], jnp.zeros((2, 3), jnp.int32))
    assert (np.asarray(updates["layers"]["kernel"]) != 0).all()


def test_params_are_needed_for_decay_alone():
    tx = ox.mars(0.1, adamw_weight_decay=0.0)
    tx.update(TREES[0], tx.init(PARAMS))
    for arguments in ({}, {"weight_decay": 0.1, "adamw_weight_decay": 0.0}):
        tx = ox.mars(0.1, **arguments)
        with pytest.raises(ValueError, match="mars: params=None is not allowed"):
            tx.update(TREES[0], tx.init(PARAMS))


# Errors


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"learning_rate": -0.1}, "mars: learning_rate=-0.1 is not"),
        (
            TypeError,
            {"adamw_learning_rate": "1"},
            "mars: adamw_learning_rate='1' is not allowed",
        ),
        (ValueError, {"weight_decay": -0.1}, "mars: weight_decay=-0.1 .* >= 0"),
        (ValueError, {"adamw_weight_decay": -0.1}, "mars: .*weight_decay=-0.1 .* >= 0"),
        (TypeError, {"correct_vectors": 1}, "mars: correct_vectors=1 .* True or False"),
        (
            ValueError,
            {"variant": "muon"},
            "mars: variant='muon' .* one of 'adamw', 'lion', 'shampoo'",
        ),
        (
            ValueError,
            {"variant": "shampoo", "correct_vectors": True},
            "mars: correct_vectors=True is not allowed with variant='shampoo'; only "
            "matrices can be orthogonalized",
        ),
        (ValueError, {"b1": 1.0}, r"b1=1.0 is not allowed; .* \[0, 1\)"),
        (ValueError, {"b2": -0.1}, "b2=-0.1 is not allowed"),
        (ValueError, {"eps": 0.0}, "eps=0.0 is not allowed; .* > 0"),
        (ValueError, {"gamma": -1}, "gamma=-1 is not allowed; .* >= 0"),
        (ValueError, {"max_norm": 0.0}, "max_norm=0.0 is not allowed; .* > 0"),
        (ValueError, {"adamw_b1": 1.0}, r"b1=1.0 is not allowed; .* \[0, 1\)"),
        (ValueError, {"adamw_b2": 1.0}, r"b2=1.0 is not allowed; .* \[0, 1\)"),
        (ValueError, {"decay": "l2"}, "decay='l2' is not allowed; .* one of"),
        (
            TypeError,
            {"variant": "shampoo", "compute_dtype": "int8"},
            "compute_dtype='int8' is not allowed",
        ),
        (TypeError, {"rules": 3}, "rules=3 is not allowed; .* sequence of Rule"),
        (TypeError, {"mu_dtype": "int8"}, "mu_dtype='int8' is not allowed"),
        (TypeError, {"nu_dtype": "int8"}, "nu_dtype='int8' is not allowed"),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message: str):
    with pytest.raises(error, match=message):
        ox.mars(**{"learning_rate": 0.1, **arguments})


def test_wrong_parameters_are_refused():
    with pytest.raises(TypeError, match="parameter 'n' of dtype int32 is not allowed"):
        ox.mars(0.1).init({"n": jnp.ones(2, jnp.int32)})
    with pytest.raises(ValueError, match=r"(?s)no rule decides .*'kernel'"):
        ox.mars(0.1).init({"kernel": jnp.ones((2, 3, 4))})
