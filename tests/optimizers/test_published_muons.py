"""The published implementations of Muon and its successors, reproduced by arguments.

The recorded runs are the packages' own code in float64, see
`tests.references.make_matrix_trajectories`; optax is run here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from optaxplus import MatrixAxes, Rule
from tests.problems import gradients, normal_tree
from tests.references.matrix_trajectories import as_kernel, load_matrix_trajectories
from tests.trajectories import follow, follow_in_float64

RECORDED = load_matrix_trajectories()
RULES = (Rule("", MatrixAxes((-2,), (-1,)), "hidden"),)
PUBLISHED = {"ns_coeffs": "jordan", "normalization": "frobenius"}

# What the docstrings say.
KELLER = {**PUBLISHED, "shape_scale": "keller"}
MATCH_ADAMW = {**PUBLISHED, "shape_scale": "match_adamw"}
DION = {**PUBLISHED, "ns_coeffs": "you", "nesterov": False, "weight_decay": 0.01}
GRAM = {"ns_coeffs": "gram_newton_schulz", "normalization": "frobenius"}
COUNTERPARTS = {
    "keller": (ox.muon, {**KELLER, "weight_decay": 0.0}),
    "keller_decay": (ox.muon, {**KELLER, "weight_decay": 0.1}),
    "torch_original": (ox.muon, KELLER),
    "torch_match_rms_adamw": (ox.muon, MATCH_ADAMW),
    "timm_match_rms_adamw": (ox.muon, MATCH_ADAMW),
    "moonlight": (ox.muon, MATCH_ADAMW),
    "dion_muon_spectral": (ox.muon, {**DION, "shape_scale": "spectral"}),
    "dion_muon_rms": (ox.muon, {**DION, "shape_scale": "match_adamw"}),
    "gram_muon": (ox.muon, {**GRAM, "method": "gram"}),
    "nvidia_muon_keller": (ox.muon, KELLER),
    "normuon": (ox.normuon, {**KELLER, "weight_decay": 0.0}),
    "normuon_decay": (ox.normuon, KELLER),
    "normuon_plain": (
        ox.normuon,
        {**MATCH_ADAMW, "ns_coeffs": "you", "b2": 0.8, "nesterov": False},
    ),
    "adamuon": (ox.adamuon, {**MATCH_ADAMW, "nesterov": False, "weight_decay": 0.0}),
    "adamuon_decay": (
        ox.adamuon,
        {**MATCH_ADAMW, "b1": 0.9, "b2": 0.95, "eps": 1e-10, "nesterov": False},
    ),
    "timm_adamuon": (ox.adamuon, {**MATCH_ADAMW, "eps": 1e-7}),
    "adamuon_sign": (
        ox.adamuon,
        {
            **MATCH_ADAMW,
            "b2": 0.95,
            "eps": 1e-8,
            "nesterov": False,
            "use_sign": True,
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTERPARTS)
def test_published(name: str):
    case = RECORDED.cases[name]
    factory, arguments = COUNTERPARTS[name]
    tx = factory(case.learning_rate, compute_dtype="float64", rules=RULES, **arguments)
    assert case.trajectories["float64"]
    for leaf, trajectory in case.trajectories["float64"].items():
        start = as_kernel(RECORDED.params[leaf])
        ours = follow_in_float64(tx, start, as_kernel(RECORDED.grads[leaf]))
        moved = as_kernel(trajectory) - start
        # An eps of 1e-7 beside a norm of about 1, here relative, there absolute or
        # none, amplified by 485 for the smallest singular values; and what the eps of
        # the second moments does to a small one.
        np.testing.assert_allclose(
            ours - start, moved, rtol=0, atol=1e-4 * np.abs(moved).max(), err_msg=leaf
        )


@pytest.mark.parametrize(
    ("consistent_rms", "shape_scale"), [(None, "keller"), (0.2, "match_adamw")]
)
@pytest.mark.parametrize("nesterov", [True, False])
def test_optax(consistent_rms: float | None, shape_scale: str, nesterov: bool):
    shapes = {"tall": (6, 4), "wide": (3, 7), "bias": (5,)}
    params = normal_tree(shapes, seed=0)
    grads = jax.tree.map(lambda *g: jnp.stack(g), *gradients(shapes, steps=10))
    theirs = optax.contrib.muon(
        0.05, nesterov=nesterov, weight_decay=0.1, consistent_rms=consistent_rms
    )
    ours = ox.muon(
        0.05,
        **PUBLISHED,
        shape_scale=shape_scale,
        nesterov=nesterov,
        debias=True,
        weight_decay=0.1,
        adamw_weight_decay=0.0,
        adamw_b2=0.999,
        compute_dtype="float32",
    )
    expected, _ = follow(theirs, params, grads)
    found, _ = follow(ours, params, grads)
    # Their Adam takes Nesterov's step if Muon does.
    for key, start in params.items():
        if key == "bias" and nesterov:
            continue
        moved = np.abs(expected[key] - start).max()
        # Float32 roundings, amplified by up to 485.
        np.testing.assert_allclose(
            found[key], expected[key], rtol=0, atol=1e-4 * moved, err_msg=key
        )


def test_optax_differs_without_debias():
    # So that the test above tests something.
    params, grads = normal_tree((6, 4), seed=0), jnp.stack(gradients((6, 4), steps=2))
    arguments = {**KELLER, "compute_dtype": "float32", "weight_decay": 0.0}
    with_it, _ = follow(ox.muon(0.05, debias=True, **arguments), params, grads)
    without, _ = follow(ox.muon(0.05, **arguments), params, grads)
    assert np.abs(with_it[1] - without[1]).max() > 1e-3
