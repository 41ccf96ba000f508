"""Heavy ball and moving average, with dampening, Nesterov's step and debiasing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from tests.assertions import assert_trees_close, assert_trees_equal
from tests.problems import gradients, normal_tree
from tests.references.classical import sgd
from tests.trajectories import follow_in_float64, updates_at

SHAPES = {"w": (3, 4), "b": (4,), "s": ()}
STEPS = 6
PARAMS = normal_tree(SHAPES, seed=0)
GRADS = jax.tree.map(lambda *g: jnp.stack(g), *gradients(SHAPES, steps=STEPS))


# Agreement


@pytest.mark.parametrize(
    "arguments",
    [
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.8, "dampening": 0.5},
        {"momentum": 0.8, "dampening": 1.0},
        {"momentum": 0.0},
    ],
    ids=str,
)
def test_momentum_reference(arguments):
    params, grads = PARAMS["w"], GRADS["w"]
    tx = optax.chain(ox.scale_by_momentum(**arguments), optax.scale(-0.1))
    # The reference has no buffer without momentum, so there is no dampening to give it.
    expected = sgd(params, grads, learning_rate=0.1, **arguments)
    # Some twenty float64 roundings.
    np.testing.assert_allclose(
        follow_in_float64(tx, params, grads), expected, rtol=1e-13, atol=1e-13
    )


def emas(grads: np.ndarray, b1: float, nesterov: bool, debias: bool) -> np.ndarray:
    """The definition, in float64."""
    m, result = np.zeros_like(grads[0], dtype=np.float64), []
    for t, g in enumerate(grads.astype(np.float64), start=1):
        m = b1 * m + (1 - b1) * g
        m_hat = m / (1 - b1 ** (t + nesterov)) if debias else m
        g_hat = g / (1 - b1**t) if debias else g
        result.append(b1 * m_hat + (1 - b1) * g_hat if nesterov else m_hat)
    return np.stack(result)


@pytest.mark.parametrize("b1", [0.0, 0.9, 0.999])
@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
def test_ema_definition(b1: float, nesterov: bool, debias: bool):
    tx = ox.scale_by_ema(b1, nesterov=nesterov, debias=debias)
    updates = updates_at(tx, PARAMS["w"], GRADS["w"])
    expected = emas(np.asarray(GRADS["w"]), b1, nesterov, debias)
    # Twenty float32 roundings relative to the largest gradient; debiasing 0.999 after
    # one step multiplies by 1000 what was multiplied by 0.001 before.
    atol = 2e-6 * np.abs(GRADS["w"]).max()
    np.testing.assert_allclose(updates, expected, rtol=0, atol=atol)


# Reductions


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_is_optax_trace(nesterov: bool):
    ours = updates_at(ox.scale_by_momentum(0.9, nesterov=nesterov), PARAMS, GRADS)
    theirs = updates_at(optax.trace(0.9, nesterov=nesterov), PARAMS, GRADS)
    # Float32 roundings of sums of ten terms.
    assert_trees_close(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("debias", [False, True])
def test_ema_is_optax_ema(nesterov: bool, debias: bool):
    if nesterov:  # optax has it inside Adam only: with b2 = 0 and a large eps.
        eps = 1e12
        theirs = updates_at(
            optax.scale_by_adam(0.9, 0.0, eps=eps, nesterov=True), PARAMS, GRADS
        )
        theirs = jax.tree.map(lambda u: u * eps, theirs)
        ours = ox.scale_by_ema(0.9, nesterov=True, debias=True)
    else:
        theirs = updates_at(optax.ema(0.9, debias=debias), PARAMS, GRADS)
        ours = ox.scale_by_ema(0.9, debias=debias)
    # Float32 roundings; optax's 1 - 0.9**t costs one digit.
    assert_trees_close(updates_at(ours, PARAMS, GRADS), theirs, rtol=2e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_ema_is_momentum_times_a_factor(nesterov: bool):
    sums = optax.chain(ox.scale_by_momentum(0.9, nesterov=nesterov), optax.scale(0.1))
    averages = ox.scale_by_ema(0.9, nesterov=nesterov)
    # Float32 roundings of sums of ten terms.
    assert_trees_close(
        updates_at(averages, PARAMS, GRADS), updates_at(sums, PARAMS, GRADS), rtol=2e-6
    )


def test_dampening_is_an_average_after_the_first_step():
    # With a constant gradient b = g stays, which an average that started from g does.
    grads = jnp.ones((STEPS, 3))
    updates = updates_at(ox.scale_by_momentum(0.9, dampening=0.9), jnp.ones(3), grads)
    # Ten roundings.
    np.testing.assert_allclose(updates, grads, rtol=1e-6)


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_constant_gradient_is_amplified(momentum: float):
    updates = updates_at(ox.scale_by_momentum(momentum), jnp.ones(()), jnp.ones(200))
    # 0.9^200 is 7e-10; two hundred float32 roundings of the sum, each damped.
    np.testing.assert_allclose(updates[-1], 1 / (1 - momentum), rtol=1e-5)


@pytest.mark.parametrize("debias", [False, True])
def test_zero_decay_is_the_gradient(debias: bool):
    tx = ox.scale_by_ema(0.0, debias=debias)
    assert_trees_equal(updates_at(tx, PARAMS, GRADS), GRADS)
    assert_trees_equal(updates_at(ox.scale_by_momentum(0.0), PARAMS, GRADS), GRADS)


# Invariances

TRANSFORMATIONS = {
    "momentum": lambda **dtypes: ox.scale_by_momentum(0.9, **dtypes),
    "nesterov": lambda **dtypes: ox.scale_by_momentum(0.9, nesterov=True, **dtypes),
    "dampening": lambda **dtypes: ox.scale_by_momentum(0.9, dampening=0.3, **dtypes),
    "ema": lambda **dtypes: ox.scale_by_ema(0.9, **dtypes),
    "debiased": lambda **dtypes: ox.scale_by_ema(
        0.9, nesterov=True, debias=True, **dtypes
    ),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_linear_in_the_gradient(name: str):
    tx = TRANSFORMATIONS[name]()
    doubled = updates_at(tx, PARAMS, jax.tree.map(lambda g: 2.0**40 * g, GRADS))
    expected = jax.tree.map(lambda u: 2.0**40 * u, updates_at(tx, PARAMS, GRADS))
    # Powers of two change no bit.
    assert_trees_equal(doubled, expected)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_gradients_are_not_rounded_again(name: str, dtype: str):
    tx = TRANSFORMATIONS[name]()
    narrow = jax.tree.map(lambda g: g.astype(dtype), GRADS)
    wide = jax.tree.map(lambda g: g.astype(jnp.float32), narrow)
    low = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    # Float32 roundings that fusion may order differently.
    assert_trees_close(
        updates_at(tx, low, narrow), updates_at(tx, PARAMS, wide), rtol=5e-7
    )


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_bfloat16_state_rounds_the_buffer_only(name: str):
    tx = TRANSFORMATIONS[name](mu_dtype="bfloat16")
    (buffer,) = [x for x in jax.tree.leaves(tx.init(PARAMS["w"])) if x.ndim]
    assert buffer.dtype == jnp.bfloat16
    # One rounding of 2^-9 a step, damped by the decay: at most ten times that, relative
    # to the largest entry.
    assert_trees_close(
        updates_at(tx, PARAMS, GRADS),
        updates_at(TRANSFORMATIONS[name](), PARAMS, GRADS),
        rtol=10 * 2**-9,
    )


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_complex_parameters(name: str):
    # Linear maps act on real and imaginary parts alike.
    tx = TRANSFORMATIONS[name]()
    real, imaginary = GRADS["w"], GRADS["w"][::-1]
    params = PARAMS["w"]
    combined = updates_at(tx, params.astype(jnp.complex64), real + 1j * imaginary)
    expected = updates_at(tx, params, real) + 1j * updates_at(tx, params, imaginary)
    # Float32 roundings.
    assert_trees_close(combined, expected, rtol=1e-6)


# Limits


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_zero_gradients_give_zero(name: str):
    zeros = jax.tree.map(jnp.zeros_like, GRADS)
    assert_trees_equal(updates_at(TRANSFORMATIONS[name](), PARAMS, zeros), zeros)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_empty_none_and_masked_leaves_pass(name: str):
    tx = TRANSFORMATIONS[name]()
    params = {"none": None, "masked": optax.MaskedNode(), "empty": jnp.zeros((0, 3))}
    updates, _ = tx.update(params, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert updates["empty"].shape == (0, 3)


def test_bad_entries_stay_where_they_are():
    grads = GRADS["w"].at[2, 0, 0].set(jnp.nan)
    for make in TRANSFORMATIONS.values():
        updates = np.asarray(updates_at(make(), PARAMS["w"], grads))
        assert np.isnan(updates[2:, 0, 0]).all()
        assert np.isnan(updates).sum() == STEPS - 2


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ox.scale_by_momentum(1.0),
            r"scale_by_momentum: momentum=1.0 .*\[0, 1",
        ),
        (lambda: ox.scale_by_momentum(-0.1), "scale_by_momentum: momentum=-0.1 is not"),
        (lambda: ox.scale_by_momentum(float("nan")), "momentum=nan is not allowed"),
        (
            lambda: ox.scale_by_momentum(0.9, dampening=-1.0),
            "scale_by_momentum: dampening=-1.0 is not allowed; .* >= 0",
        ),
        (
            lambda: ox.scale_by_momentum(0.9, nesterov=True, dampening=0.5),
            "nesterov=True is not allowed with momentum=0.9, dampening=0.5; it needs",
        ),
        (
            lambda: ox.scale_by_momentum(0.0, nesterov=True),
            "nesterov=True is not allowed with momentum=0.0, dampening=0.0",
        ),
        (
            lambda: ox.scale_by_ema(1.0),
            r"scale_by_ema: b1=1.0 is not allowed; .*\[0, 1",
        ),
        (lambda: ox.scale_by_ema(-1), "scale_by_ema: b1=-1 is not allowed"),
        (lambda: ox.scale_by_ema(float("nan")), "scale_by_ema: b1=nan is not allowed"),
    ],
)
def test_wrong_values_are_refused(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ox.scale_by_momentum("0.9"),
            "scale_by_momentum: momentum='0.9' is not",
        ),
        (lambda: ox.scale_by_momentum(True), "scale_by_momentum: momentum=True is not"),
        (lambda: ox.scale_by_momentum(0.9, nesterov=1), "nesterov=1 .* True or False"),
        (lambda: ox.scale_by_momentum(0.9, dampening="no"), "dampening='no' is not"),
        (lambda: ox.scale_by_momentum(0.9, mu_dtype="int8"), "mu_dtype='int8' is not"),
        (lambda: ox.scale_by_ema(None), "scale_by_ema: b1=None is not allowed"),
        (lambda: ox.scale_by_ema(0.9, nesterov="yes"), "scale_by_ema: nesterov='yes'"),
        (lambda: ox.scale_by_ema(0.9, debias=0), "scale_by_ema: debias=0 is not"),
        (lambda: ox.scale_by_ema(0.9, mu_dtype="bf"), "scale_by_ema: mu_dtype='bf' is"),
    ],
)
def test_wrong_types_are_refused(call, message: str):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize("function", [ox.scale_by_momentum, ox.scale_by_ema])
def test_wrong_parameters_are_refused(function):
    message = (
        f"{function.__name__}: parameter 'ids/table' of dtype int32 is not allowed"
    )
    with pytest.raises(TypeError, match=message):
        function().init({"ids": {"table": jnp.ones((2, 3), jnp.int32)}})
    with pytest.raises(TypeError, match=r"moment dtype of bfloat16 .* complex"):
        function(mu_dtype="bfloat16").init(jnp.ones(3, jnp.complex64))
