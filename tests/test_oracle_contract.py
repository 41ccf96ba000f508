"""Every named optimizer does what its paper says, and gets somewhere."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from optaxplus import trees
from tests import problems
from tests.assertions import assert_trees_close
from tests.cases import (
    BFLOAT16_RTOL,
    FAMILIES,
    NAMED,
    Case,
    one_of_each_family,
    variants_are_slow,
)
from tests.references.clipping import clip_by_global_norm
from tests.references.torch_trajectories import load_torch_trajectories

RECORDED = load_torch_trajectories()
STEPS = 10
RATE = 0.05
AXES = {
    "vector": ox.MatrixAxes((), (0,)),
    "tall": ox.MatrixAxes((0,), (1,)),
    "wide": ox.MatrixAxes((0,), (1,)),
    "stack": problems.STACKED_MATRIX,
}


def displacements(tx, params: Mapping[str, Any], grads: Mapping[str, Any]):
    """How far each leaf has gone after every step, shape (steps, *leaf), in float64.

    The sum of the updates, because float32 parameters would hide small ones. Op by op:
    each operation is compiled once for all rows.
    """
    state = tx.init(params)
    steps = []
    for step in range(STEPS):
        g = {key: g[step] for key, g in grads.items()}
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        steps.append(updates)
    return {
        key: np.cumsum([np.asarray(u[key], np.float64) for u in steps], axis=0)
        for key in params
    }


def recorded(dtype: str, leaves: Iterable[str] = tuple(AXES)):
    """Recorded parameters and gradients of every step as JAX arrays."""
    return (
        {key: jnp.asarray(RECORDED.params[key], dtype) for key in leaves},
        {key: jnp.asarray(RECORDED.grads[key], dtype) for key in leaves},
    )


def from_start(
    trajectory: Mapping[str, Any], params: Mapping[str, Any] = RECORDED.params
) -> dict[str, Any]:
    """A recorded or reference trajectory, less the parameters it started from."""
    return {
        key: np.asarray(leaf, np.float64) - np.asarray(params[key], np.float64)
        for key, leaf in trajectory.items()
    }


def oracle_trajectory(
    case: Case, params: Mapping[str, Any], grads: Mapping[str, Any], learning_rate: Any
):
    """The reference, one block after the other, in float64."""

    def run(p, g):
        return np.stack(case.oracle(p, g, learning_rate, p.ndim == 2))

    return {
        key: np.stack([run(p[i], grads[key][:, i]) for i in range(len(p))], axis=1)
        if p.ndim == 3
        else run(p, grads[key])
        for key, p in params.items()
    }


def clipped(grads: Mapping[str, Any], max_norm: float) -> dict[str, Any]:
    """Every step's gradient, shortened as a whole."""
    steps = [
        clip_by_global_norm([g[step] for g in grads.values()], max_norm)
        for step in range(STEPS)
    ]
    return {
        key: np.stack([step[index] for step in steps])
        for index, key in enumerate(grads)
    }


# A rate that falls by half in ten steps, for a number and for a traced step.
def schedule(step: Any) -> Any:
    return RATE / (1.0 + 0.1 * step)


# Dtype -> (learning rate, tolerance relative to the largest entry, and that of rows
# that multiply matrices; None is what the row says). float64: the reference loses
# 1e-16 / 5e-6 where it subtracts the start of the leaf that moves least; Muon's
# normalisation has a margin of 1e-7. float32: ten steps of a few dozen roundings of
# 6e-8. bfloat16: updates are rounded by 2^-9 of themselves, and parameters, which decay
# and norms look at, by 2^-9 of themselves ten times over; or what the row says.
PRECISIONS = {
    "float64": (RATE, 1e-9, 2e-6),
    "float32": (schedule, 1e-5, None),
    "bfloat16": (RATE, None, BFLOAT16_RTOL),
}


# The names of the first row of every factory.
FIRST = {case.factory: case.name for case in reversed(NAMED)}.values()


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(
            *row.values,
            dtype,
            id=f"{row.id}-{dtype}",
            # Variants show in float64 what they compute, if it compiles in a second;
            # the narrower types are the same program for one row of each family.
            marks=[]
            if (dtype == "float64" and (row.values[0].by_default or row.id in FIRST))
            or row.id in FAMILIES
            else [pytest.mark.slow],
        )
        for row in variants_are_slow(NAMED)
        for dtype in PRECISIONS
    ],
)
def test_oracle(case: Case, dtype: str) -> None:
    rate, rtol, matrix_rtol = PRECISIONS[dtype]
    with jax.enable_x64(dtype == "float64"):
        params, grads = recorded(dtype)
        # The reference starts from what the dtype made of the numbers.
        start, seen = (
            {key: np.asarray(leaf, np.float64) for key, leaf in tree.items()}
            for tree in (params, grads)
        )
        if "clip_norm" in case.kwargs:
            seen = clipped(seen, case.kwargs["clip_norm"])
            assert all(np.abs(seen[key]).max() < 5.0 for key in seen)
        theirs = from_start(oracle_trajectory(case, start, seen, rate), start)
        iterates = case.multiplies_matrices
        wide = {}
        if dtype == "float64" and "compute_dtype" in case.parameters:
            wide["compute_dtype"] = "float64"
        tx = case.make(rate, **case.with_axes(AXES), **wide)
        ours = displacements(tx, params, grads)
    if iterates:
        rtol = matrix_rtol or case.rtol
    assert_trees_close(ours, theirs, rtol=rtol or case.bfloat16_rtol)


@pytest.mark.parametrize(
    ("case", "run"),
    [
        pytest.param(case, run, id=f"{case}-{run}")
        for case in NAMED
        for run in case.torch
    ],
)
def test_torch(case: Case, run: str) -> None:
    torch = RECORDED.cases[run]
    rate = case.torch[run] or (lambda step: jnp.asarray(torch.learning_rates)[step])
    theirs = from_start(torch.trajectories["float64"])
    axes = {key: AXES[key] for key in theirs}
    with jax.enable_x64(True):
        ours = displacements(
            case.make(rate, **case.with_axes(axes)), *recorded("float64", theirs)
        )
    # As above, but PyTorch's Muon iterates in bfloat16.
    rtol = BFLOAT16_RTOL if case.multiplies_matrices else case.torch_rtol
    assert_trees_close(ours, theirs, rtol=rtol)


# Recorded with arguments that no row has; tested beside the link.
RUNS_OF_LINKS = {"adam_mini_block", "adopt"}


def test_every_recorded_run_has_a_row() -> None:
    runs = {run for case in NAMED for run in case.torch}
    assert set(RECORDED.cases) == runs | RUNS_OF_LINKS


@pytest.mark.parametrize("case", [case for case in NAMED if case.twin], ids=str)
def test_optax(case: Case) -> None:
    # optax knows neither stacks nor layers inside a leaf.
    leaves = ("vector", "tall", "wide")
    axes = {key: AXES[key] for key in leaves}
    params, grads = recorded("float32", leaves)
    ours = displacements(case.make(RATE, **case.with_axes(axes)), params, grads)
    theirs = displacements(case.twin(RATE), params, grads)
    assert_trees_close(ours, theirs, rtol=1e-5)  # as above, twice


# What bfloat16 parameters reach, float32 parameters reach too.
@pytest.mark.parametrize("case", one_of_each_family(NAMED))
@pytest.mark.parametrize(
    "dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"]
)
def test_descends_on_every_problem(case: Case, dtype: str) -> None:
    steps = 60
    params = problems.cast(problems.descent_start(), dtype)
    tx = case.make(optax.linear_schedule(case.learning_rate, 0.0, steps))
    state = tx.init(params)
    if case.branches is not None:
        assert all(case.branches(state).values())

    def total(params):
        return sum(jax.tree.leaves(problems.descent_losses(params)))

    def step(_, carry):
        params, state = carry
        updates, state = tx.update(jax.grad(total)(params), state, params)
        return optax.apply_updates(params, updates), state

    final, _ = jax.jit(lambda carry: jax.lax.fori_loop(0, steps, step, carry))(
        (params, state)
    )
    before, after = problems.descent_losses(params), problems.descent_losses(final)
    ratios = jax.tree.map(lambda a, b: float(a / b), after, before)
    # Every leaf on its own: a branch that stands still or climbs shows.
    for path, ratio in trees.leaves_with_paths(ratios):
        assert ratio < case.remaining_loss, f"{path}: {ratio}"
