"""Checks SOAP and Shampoo against recorded runs of them for PyTorch.

`make_soap_trajectories` wrote the file and says what ran.
"""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import optaxplus as ox

PATH = Path(__file__).with_name("soap_trajectories.npz")
# Compiling takes longer than running.
FAST = {"xla_backend_optimization_level": 0}
with np.load(PATH) as file:
    RECORDED = {key: file[key] for key in file.files}
CASES = json.loads(str(RECORDED["description"]))["cases"]

SUMS = {"b1": 0.0, "b2": 1.0, "eps": 0.0, "update_interval": 1, "grafting": None}
AVERAGES = {**SUMS, "b2": 0.9}
GRAFTED = {**AVERAGES, "b3": 0.9, "grafting_eps": 1e-30}
# Our arguments of each case.
SOAP = {
    "soap": {},
    "soap_often": {"b1": 0.9, "b2": 0.8, "update_interval": 3, "eps": 1e-3},
    "soap_factors": {"b3": 0.7, "update_interval": 3},
    "soap_one_side": {"max_dim": 5, "update_interval": 3},
}
SHAMPOO = {
    "shampoo": SUMS,
    "averages": AVERAGES,
    "order_2": {**AVERAGES, "root_order": 2},
    "tiles": {**AVERAGES, "max_dim": 3},
    "graft_sgd": {**GRAFTED, "grafting": "sgd"},
    "graft_adagrad": {**GRAFTED, "grafting": "adagrad"},
    "graft_rmsprop": {**GRAFTED, "grafting": "adam"},
}
# Ours corrects averages for their start: theirs are to be multiplied by this power of
# 1 - 0.9ᵗ. Two roots of order p, 1/p each; a square root in the grafted step.
CORRECTIONS = {"averages": 1 / 2, "tiles": 1 / 2, "order_2": 1, "graft_rmsprop": 1 / 2}
# A sum of fewer gradients than a vector has entries is singular, and its root rounding.
FIRST = {("shampoo", "vector"): 6}
# One of each kind of program; the others are slow.
QUICK = ("soap_often", "soap_one_side", "shampoo", "tiles", "graft_rmsprop")


def cases(*quick: str):
    return [
        name if name in quick else pytest.param(name, marks=pytest.mark.slow)
        for name in CASES
    ]


def expected(name: str, leaf: str) -> np.ndarray:
    """Updates of every step in our terms."""
    theirs = RECORDED[f"{name}/{leaf}"]
    correction = 1 - 0.9 ** np.arange(1, len(theirs) + 1)
    shape = (-1, *(1,) * (theirs.ndim - 1))
    return theirs * correction.reshape(shape) ** CORRECTIONS.get(name, 0)


def follow(tx, grads):
    """Updates and states of every step."""
    state = tx.init(grads[0])
    update = jax.jit(tx.update, compiler_options=FAST)
    updates, states = [], []
    for g in grads:
        u, state = update(g, state)
        updates.append(jax.device_get(u))
        states.append(jax.device_get(state))
    return updates, states


@functools.cache
def ours(name: str, dtype: str):
    grads = {
        leaf: RECORDED[f"grads/{leaf}"].astype(dtype) for leaf in CASES[name]["leaves"]
    }
    make = ox.scale_by_soap if name in SOAP else ox.scale_by_shampoo
    tx = make(**{**SOAP, **SHAMPOO}[name])
    rows = zip(*grads.values(), strict=True)
    return follow(tx, [dict(zip(grads, row, strict=True)) for row in rows])


def assert_recorded(name: str, dtype: str, rtol: float) -> None:
    """Agreement relative to the largest entry."""
    updates, _ = ours(name, dtype)
    for leaf in CASES[name]["leaves"]:
        first = FIRST.get((name, leaf), 0)
        wanted = expected(name, leaf)[first:]
        result = np.stack([u[leaf] for u in updates[first:]])
        assert result.dtype == dtype
        np.testing.assert_allclose(
            result, wanted, rtol=0, atol=rtol * np.abs(wanted).max(), err_msg=leaf
        )


def test_every_case_is_tested():
    assert CASES.keys() == {*SOAP, *SHAMPOO}


@pytest.mark.parametrize("name", cases(*QUICK))
def test_recorded(name: str, x64):
    # 23 steps of float64 roundings, amplified by the condition of the factors and by
    # the gaps between their eigenvalues; measured 6e-14.
    assert_recorded(name, "float64", 5e-13)


@pytest.mark.parametrize("name", cases("tiles"))
def test_recorded_in_float32(name: str):
    # The same in float32; measured 8e-6, and 2e-5 where tiles of 3×3 are nearly
    # singular in the first steps.
    assert_recorded(name, "float32", 1e-4)


def test_the_recorded_bases_change_their_order(x64):
    _, states = ours("soap_often", "float64")
    swaps = 0
    for step in range(3, 23, 3):
        factor = states[step].factor_in["square"]
        basis = states[step - 1].basis_in["square"]
        sizes = np.sum(basis * (factor @ basis), axis=-2)
        swaps += bool((np.diff(sizes) > 0).any())
    assert swaps >= 3


def test_golden(x64):
    """Three gradients, twice; the first of them makes the bases."""
    begin = np.array([[1, -0.5, 0.25], [0.5, 2, -1]])
    grads = np.array(
        [
            [[0.1, -0.2, 0.3], [0.4, 0.1, -0.5]],
            [[-0.3, 0.2, 0.1], [0.05, -0.6, 0.2]],
            [[0.2, 0.2, -0.1], [0.3, -0.1, 0.4]],
        ]
    )
    updates, _ = follow(ox.scale_by_soap(), [*grads, *grads])
    # The third column of Q_R is determined, up to its sign, by the other two.
    wanted = [[1.00337681, -0.50565294, 0.2451801], [0.49583639, 2.014354, -1.00777431]]
    # The row has nine digits.
    np.testing.assert_allclose(
        begin - 3e-3 * np.sum(updates, axis=0), wanted, rtol=0, atol=6e-9
    )
