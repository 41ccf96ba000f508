"""Weights in low precision: what they become, step by step and after many."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from tests.assertions import assert_trees_equal
from tests.precision.weight_rules import (
    NARROW,
    SGD,
    WRAPPERS,
    each_wrapper,
    joined,
    kahan,
    kept_of,
    record,
    resolution,
    rounded,
    spacing,
    train,
    weights_of,
    wide,
)
from tests.trajectories import follow

# What parameters become


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [("bfloat16", 1.0), ("float16", 1.0), ("float16", 2.0**-17)],
    ids=["bfloat16", "float16", "float16-denormal"],
)
@each_wrapper
def test_every_step_is_that_of_the_rule(name: str, dtype: str, scale: float):
    rng = np.random.default_rng(0)
    steps, size = 20, 2048
    sign = rng.choice([-scale, scale], size)
    start = jnp.asarray(sign * rng.uniform(1, 2, size), dtype)
    # Half a spacing of bfloat16 and of denormal numbers, four of float16; over 1 and 2,
    # where spacings change.
    grads = jnp.asarray(scale * rng.standard_normal((steps, size)), jnp.float32)
    params, states = record(WRAPPERS[name](SGD), start, grads)
    at = [jax.tree.map(lambda x, t=t: x[t], (params, states)) for t in range(steps + 1)]
    missed = 0
    for g, (p, state), (new_p, new_state) in zip(grads, at, at[1:], strict=False):
        u = wide(g) * np.float32(-(2.0**-8))
        w = weights_of(name, p, state)
        new_w = weights_of(name, new_p, new_state)
        target = w + u
        if name == "compensated":
            expected = kahan(p, kept_of(state), u)
            np.testing.assert_array_equal(wide(new_p), wide(expected[0]))
            np.testing.assert_array_equal(wide(kept_of(new_state)), wide(expected[1]))
        elif name == "master32":
            np.testing.assert_array_equal(new_w, target)
            np.testing.assert_array_equal(wide(new_p), rounded(target, dtype))
        else:
            grid = spacing(target, dtype) * (2.0**-8 if name == "master24" else 1.0)
            lower = np.floor(target / grid) * grid
            upper = np.ceil(target / grid) * grid
            assert ((new_w == lower) | (new_w == upper)).all()
            nearest = np.where(upper - target < target - lower, upper, lower)
            missed += np.mean((new_w != nearest) & (upper - target != target - lower))
            # The parameter is the nearest number to the weight.
            half = 0.5 * spacing(new_w, dtype)
            assert (np.abs(wide(new_p) - new_w) <= half).all()
    if name in ("master24", "stochastic"):
        # The farther neighbour has the probability min(f, 1 - f), 1/4 on average over
        # fractions f. Ties, which have no farther one, are 1/32 at most where the sum
        # has five bits more than the grid. 41,000 trials: five deviations are 0.011.
        ties = 0.5 / 32 if (name, dtype) == ("master24", "float16") else 0.5 / 256
        assert 0.25 - 0.011 - ties <= missed / steps <= 0.25 + 0.011


@each_wrapper
def test_the_same_compiled_or_not_in_a_loop_or_not(name: str):
    start = jnp.linspace(-2, 2, 64, dtype=jnp.bfloat16)
    grads = jnp.asarray(np.random.default_rng(1).standard_normal((4, 64)), jnp.float32)
    tx = WRAPPERS[name](SGD)
    last = jax.tree.map(lambda x: x[-1], record(tx, start, grads))
    assert_trees_equal(train(tx, start, grads), last)
    compiled = tx._replace(update=jax.jit(tx.update))
    assert_trees_equal(train(compiled, start, grads), last)


@pytest.mark.parametrize("name", ["master32", "master24", "compensated"])
def test_however_a_compiler_fuses_the_step(name: str):
    # A learning rate whose product with the update rounds, unless it is fused with what
    # follows: in the state as in the parameters, or one of them is off.
    steps, size = 10, 4096
    rng = np.random.default_rng(0)
    inner = ox.sgd(0.003, momentum=0.9, weight_decay=0.1)
    start = jnp.asarray(rng.uniform(1, 2, size), jnp.bfloat16)
    grads = jnp.asarray(rng.standard_normal((steps, size)), jnp.float32)
    params, states = record(WRAPPERS[name](inner), start, grads)
    exact, _ = follow(inner, start.astype(jnp.float32), grads)
    for t in range(1, steps + 1):
        p, state = jax.tree.map(lambda x, t=t: x[t], (params, states))
        w = weights_of(name, p, state)
        if name == "master32":
            np.testing.assert_array_equal(wide(p), rounded(w, "bfloat16"))
        # As many roundings of either kind; the spacing is that between 2 and 4.
        room = t * (resolution(name, 2.0, "bfloat16") + 4 * 2.0**-24)
        np.testing.assert_allclose(w, exact[t - 1], rtol=0, atol=room)


def test_an_update_that_all_but_cancels_a_parameter():
    # master 1 - 2^-24, p = 1; then -5·2^-24, which 1 + u reaches with no float32 u.
    g = [jnp.float32(2.0**-24), jnp.float32(1 + 2.0**-22)]
    params, state = train(ox.master_weights(ox.sgd(1.0)), jnp.ones((), "bfloat16"), g)
    assert kept_of(state) == -5 * 2.0**-24
    # Off by the rounding of numbers of the size of the old parameter.
    assert abs(float(params) - float(kept_of(state))) <= 2.0**-24
    # The parameter counts from then on.
    tx = ox.master_weights(ox.sgd(1.0))
    _, after = tx.update(jnp.zeros(()), state, params)
    assert kept_of(after) == float(params)


# Small steps


STEPS, ENTRIES = 10_000, 64


@pytest.fixture(scope="module", params=NARROW)
def small_steps(request):
    """Where 10,000 steps of 1e-6 to 1e-4 of the weight end, by every way."""
    dtype = request.param
    rng = np.random.default_rng(0)
    sizes = np.geomspace(1e-6, 1e-4, ENTRIES)
    sign = rng.choice([-1.0, 1.0], ENTRIES)
    start = jnp.asarray(sign * rng.uniform(1, 2, ENTRIES), dtype)
    # Away from 0, so that 1e-4 doubles the weight.
    base = -jnp.asarray(sizes, jnp.float32) * start.astype(jnp.float32)
    factors = jnp.asarray(rng.uniform(0.5, 1.5, STEPS), jnp.float32)
    sgd = ox.sgd(1.0)
    ways = {"float32": sgd, "plain": sgd}
    ways |= {name: wrap(sgd) for name, wrap in WRAPPERS.items()}

    def step(carry: Any, factor: jax.Array):
        after = {}
        for name, tx in ways.items():
            params, state = carry[name]
            updates, state = tx.update(base * factor, state, params)
            after[name] = optax.apply_updates(params, updates), state
        return after, None

    carry = {}
    for name, tx in ways.items():
        params = start.astype("float32" if name == "float32" else dtype)
        carry[name] = params, tx.init(params)
    ends, _ = jax.jit(lambda carry: jax.lax.scan(step, carry, factors))(carry)
    return dtype, start, jax.device_get(ends), np.abs(base)


def test_plain_parameters_do_not_move(small_steps):
    # What the wrappers are for: 1.5e-4 is less than half of the spacing of either.
    _, start, ends, _ = small_steps
    np.testing.assert_array_equal(wide(ends["plain"][0]), wide(start))
    moved = np.abs(ends["float32"][0] / wide(start) - 1)
    # 10,000 times 1e-6 and 1e-4; the mean factor is 1 to 1/100.
    np.testing.assert_allclose(moved[[0, -1]], [0.01, 1.0], rtol=0.01)


def test_a_float32_copy_takes_the_steps_of_float32(small_steps):
    dtype, _, ends, _ = small_steps
    params, state = ends["master32"]
    # A compiler may contract the product with the sum in one program and not in the
    # other: a step in some thousand then rounds otherwise, by 6e-8.
    np.testing.assert_allclose(kept_of(state), ends["float32"][0], rtol=1e-6)
    np.testing.assert_array_equal(wide(params), rounded(kept_of(state), dtype))


def deviations(actual: Any, expected: Any, grid: np.ndarray, path: np.ndarray):
    """Errors over the deviation of sums of stochastically rounded steps.

    A step over a part f of the grid has the variance f·(1 - f)·grid², at most a quarter
    of it and at most grid·step.
    """
    variance = np.minimum(grid * path, STEPS * grid**2 / 4)
    return (np.float64(actual) - np.float64(expected)) / np.sqrt(variance)


def assert_unbiased(z: np.ndarray):
    # Five deviations of one of 64 numbers: a chance of 4e-5. The mean, of deviation
    # 1/8, shows a bias, the root mean square noise that repeats: it is known to 9 %,
    # and 0.8 to 1 because the variance of a step is 3/4 of its bound or more, on
    # average over parts f.
    assert np.abs(z).max() <= 5
    assert np.abs(z.mean()) <= 4 / np.sqrt(ENTRIES)
    assert 0.5 <= np.sqrt(np.mean(z**2)) <= 1.35


def test_24_bits_take_the_steps_of_float32_on_average(small_steps):
    dtype, start, ends, _ = small_steps
    params, state = ends["master24"]
    exact = ends["float32"][0]
    path = np.abs(exact - wide(start))
    weights = joined(params, kept_of(state))
    # float32 rounds as well, 10,000 times by a third of 2^-24 of the weight: 1/200 of
    # the deviation in bfloat16, 1/25 in float16.
    assert_unbiased(deviations(weights, exact, spacing(exact, dtype) / 256, path))
    # 10,000 roundings have a deviation of at most 50/256 of a spacing; five of them,
    # and half of a spacing by which the parameter is off its weight.
    errors = np.abs(wide(params) - exact) / spacing(exact, dtype)
    assert errors.max() <= 1.5


def test_stochastic_rounding_takes_the_steps_of_float32_on_average(small_steps):
    dtype, start, ends, _ = small_steps
    exact = ends["float32"][0]
    path = np.abs(exact - wide(start))
    assert_unbiased(
        deviations(wide(ends["stochastic"][0]), exact, spacing(exact, dtype), path)
    )


def test_compensated_steps_above_its_resolution_arrive(small_steps):
    dtype, start, ends, sizes = small_steps
    exact = ends["float32"][0]
    errors = np.abs(wide(ends["compensated"][0]) - exact) / spacing(exact, dtype)
    # What is carried, up to half of a spacing, is rounded to 2^-(1 + digits) of that.
    unit = spacing(start, dtype) * 2.0 ** -(jnp.finfo(dtype).nmant + 2)
    # Steps of two units and more round up as often as down: 10,000 roundings of a
    # deviation of 0.3 units are 30 units, 1/17 of a spacing. Half of one is the
    # parameter's own rounding.
    arriving = sizes >= 2 * unit
    assert arriving.sum() >= 10
    assert errors[arriving].max() <= 1.0
    if dtype == "bfloat16":
        # Steps of up to half a unit are lost where a quarter of a spacing is carried.
        lost = 1.5 * sizes < unit / 2
        assert lost.sum() >= 10
        np.testing.assert_array_equal(
            wide(ends["compensated"][0])[lost], wide(start)[lost]
        )


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_24_bits_cross_the_denormal_numbers_of_float16(sign: float):
    # Over 2^-14, where they begin, up and down; over 0; and among them.
    unit = 2.0**-24
    start = np.float64([2**10 - 4, 2**10 + 4, 3, 500]) * unit
    step = np.float64([1, -1, -1, 1]) * unit / 16
    params = jnp.asarray(sign * start, jnp.float16)
    grads = jnp.tile(jnp.asarray(-sign * step, jnp.float32), (160, 1))
    params, _ = follow(ox.master_weights(ox.sgd(1.0), bits=24), params, grads)
    # Steps of 16 units of the correction are exact everywhere.
    np.testing.assert_array_equal(wide(params[-1]), sign * (start + 160 * step))
