"""Adam's direction: its references, its reductions, and what does not change it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from tests.assertions import assert_finite, assert_trees_close, assert_trees_equal
from tests.problems import gradients, normal_tree
from tests.references.adaptive import adam_directions
from tests.references.torch_trajectories import load_torch_trajectories
from tests.trajectories import updates_at

SHAPES = {"w": (3, 4), "b": (4,), "s": ()}
STEPS = 6
PARAMS = normal_tree(SHAPES, seed=0)
GRADS = jax.tree.map(lambda *g: jnp.stack(g), *gradients(SHAPES, steps=STEPS))

VARIANTS = {
    "plain": {},
    "short": {"b1": 0.5, "b2": 0.8},
    "no_momentum": {"b1": 0.0},
    "sign": {"b1": 0.0, "b2": 0.0},
    "eps": {"eps": 0.1},
    "eps_root": {"eps": 0.0, "eps_root": 1e-4},
    "amsgrad": {"b2": 0.8, "amsgrad": True},
    "nesterov": {"nesterov": True},
    "nesterov_amsgrad": {"b2": 0.8, "nesterov": True, "amsgrad": True},
}


def directions(grads: jax.Array, **arguments) -> np.ndarray:
    return np.stack(list(adam_directions(np.asarray(grads), **arguments)))


# Agreement


@pytest.mark.parametrize("name", VARIANTS)
def test_reference(name: str):
    arguments = VARIANTS[name]
    updates = updates_at(ox.scale_by_adam(**arguments), PARAMS, GRADS)
    expected = jax.tree.map(lambda g: directions(g, **arguments), GRADS)
    # Two moments of a few float32 roundings each, a quotient and a root.
    assert_trees_close(updates, expected, rtol=2e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_reference_in_float64(name: str):
    arguments = VARIANTS[name]
    with jax.enable_x64(True):
        grads = jnp.asarray(np.asarray(GRADS["w"], np.float64))
        updates = updates_at(ox.scale_by_adam(**arguments), grads[0], grads)
        assert updates.dtype == jnp.float64
    # As many float64 roundings; 1 - b2**t in the reference loses three digits.
    np.testing.assert_allclose(updates, directions(grads, **arguments), rtol=1e-12)


def test_amsgrad_matters_on_the_recorded_gradients():
    # A second moment that falls, so that its largest value is another number.
    grads = load_torch_trajectories().grads["tall"]
    params = jnp.asarray(grads[0])
    arguments = {"b1": 0.9, "b2": 0.8}
    plain = updates_at(ox.scale_by_adam(**arguments), params, grads)
    largest = updates_at(ox.scale_by_adam(**arguments, amsgrad=True), params, grads)
    assert np.abs(plain - largest).max() > 0.1
    # As above.
    np.testing.assert_allclose(
        largest, directions(grads, **arguments, amsgrad=True), rtol=0, atol=1e-5
    )


# Reductions


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"b1": 0.5, "b2": 0.8, "eps": 1e-3},
        {"eps": 0.0, "eps_root": 1e-6},
        {"nesterov": True},
    ],
    ids=str,
)
def test_adam_is_optax(arguments):
    ours = updates_at(ox.scale_by_adam(**arguments), PARAMS, GRADS)
    theirs = updates_at(optax.scale_by_adam(**arguments), PARAMS, GRADS)
    # optax forms 1 - 0.999**t in float32, which errs by 6e-8 / 0.001 in the first step,
    # halved by the root.
    assert_trees_close(ours, theirs, rtol=5e-5)


def test_amsgrad_of_growing_gradients_is_adam():
    growing = jax.tree.map(
        lambda g: g[:1] * 2.0 ** jnp.arange(STEPS).reshape(-1, *[1] * (g.ndim - 1)),
        GRADS,
    )
    assert_trees_close(
        updates_at(ox.scale_by_adam(amsgrad=True), PARAMS, growing),
        updates_at(ox.scale_by_adam(), PARAMS, growing),
        rtol=1e-6,  # Float32 roundings that fusion may order differently.
    )


def test_without_averages_it_is_the_sign():
    updates = updates_at(ox.scale_by_adam(0.0, 0.0, eps=1e-30), PARAMS, GRADS)
    signs = jax.tree.map(jnp.sign, GRADS)
    # One root and one quotient.
    assert_trees_close(updates, signs, rtol=3e-7)


@pytest.mark.parametrize("name", ["plain", "short", "amsgrad", "no_momentum"])
def test_first_step_is_the_sign(name: str):
    tx = ox.scale_by_adam(**VARIANTS[name], eps=1e-30)
    first = jax.tree.map(lambda g: g[:1], GRADS)
    # The corrections cancel to a few roundings.
    assert_trees_close(
        updates_at(tx, PARAMS, first), jax.tree.map(jnp.sign, first), rtol=5e-7
    )


# Invariances


@pytest.mark.parametrize("name", ["plain", "amsgrad", "nesterov"])
@pytest.mark.parametrize("power", [-35, 50])
def test_scale_does_not_matter(name: str, power: int):
    # Squares, a thousandth of them in the first step, stay inside float32.
    tx = ox.scale_by_adam(**VARIANTS[name], eps=1e-30)
    scaled = jax.tree.map(lambda g: g * 2.0**power, GRADS)
    assert_trees_close(
        updates_at(tx, PARAMS, scaled), updates_at(tx, PARAMS, GRADS), rtol=1e-6
    )


def test_elementwise():
    # Reshaping the tree reshapes the result; nothing is shared between entries.
    flat = jax.tree.map(lambda g: g.reshape(STEPS, -1), GRADS)
    params = jax.tree.map(jnp.ravel, PARAMS)
    updates = updates_at(ox.scale_by_adam(), PARAMS, GRADS)
    expected = jax.tree.map(lambda u: u.reshape(STEPS, -1), updates)
    # Vectorised and scalar roots may differ in the last place.
    assert_trees_close(
        updates_at(ox.scale_by_adam(), params, flat), expected, rtol=3e-7
    )


def test_opposite_gradients_take_opposite_steps():
    negative = jax.tree.map(jnp.negative, GRADS)
    for name in ("plain", "nesterov_amsgrad"):
        tx = ox.scale_by_adam(**VARIANTS[name])
        ours, theirs = (updates_at(tx, PARAMS["w"], g["w"]) for g in (GRADS, negative))
        np.testing.assert_array_equal(ours, -theirs)


def test_complex_parameters_share_one_second_moment():
    # A complex number of constant phase behaves like its magnitude.
    phase = np.exp(1j * np.linspace(0, 2, 4)).astype(np.complex64)
    grads = GRADS["b"] * phase
    params = PARAMS["b"].astype(jnp.complex64)
    state = ox.scale_by_adam().init(params)
    assert (state.mu.dtype, state.nu.dtype) == (jnp.complex64, jnp.float32)
    updates = updates_at(ox.scale_by_adam(), params, grads)
    expected = updates_at(ox.scale_by_adam(), PARAMS["b"], GRADS["b"]) * phase
    # Float32 roundings, a few more than for real numbers.
    assert_trees_close(updates, expected, rtol=2e-6)


@pytest.mark.parametrize("name", ["plain", "nesterov_amsgrad"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_gradients_are_not_rounded_again(name: str, dtype: str):
    tx = ox.scale_by_adam(**VARIANTS[name])
    narrow = jax.tree.map(lambda g: g.astype(dtype), GRADS)
    wide = jax.tree.map(lambda g: g.astype(jnp.float32), narrow)
    low = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    # Float32 roundings that fusion may order differently.
    assert_trees_close(
        updates_at(tx, low, narrow), updates_at(tx, PARAMS, wide), rtol=1e-6
    )


@pytest.mark.parametrize("moments", [{"mu_dtype": "bfloat16"}, {"nu_dtype": "float16"}])
def test_low_precision_moments(moments):
    tx = ox.scale_by_adam(**moments, amsgrad=True)
    state = tx.init(PARAMS["w"])
    assert state.mu.dtype == moments.get("mu_dtype", "float32")
    assert state.nu.dtype == moments.get("nu_dtype", "float32")
    assert state.nu_max.dtype == state.nu.dtype
    # Gradients of about 1, whose squares float16 holds; a rounding of 2^-9 a step,
    # weighted like the gradients.
    grads = GRADS["w"] / jnp.abs(GRADS["w"]).max()
    assert_trees_close(
        updates_at(tx, PARAMS["w"], grads),
        updates_at(ox.scale_by_adam(amsgrad=True), PARAMS["w"], grads),
        rtol=6 * 2**-9,
    )


# Limits


@pytest.mark.parametrize("name", VARIANTS)
def test_zero_gradients_give_zero(name: str):
    zeros = jax.tree.map(jnp.zeros_like, GRADS)
    tx = ox.scale_by_adam(**VARIANTS[name])
    assert_trees_equal(updates_at(tx, PARAMS, zeros), zeros)


def test_huge_gradients_stop_and_never_explode():
    # Squares of 1e20 overflow float32: infinite second moment, update 0 from then on.
    grads = jnp.stack([jnp.ones(3), jnp.asarray([1e20, 1e18, 1.0]), jnp.ones(3)])
    updates = updates_at(ox.scale_by_adam(), jnp.ones(3), grads)
    np.testing.assert_array_equal(updates[1:, 0], [0.0, 0.0])
    assert_finite(updates)
    assert np.abs(updates[:, 1:]).min() > 0


def test_bad_entries_stay_where_they_are():
    grads = GRADS["w"].at[2, 0, 0].set(jnp.nan).at[3, 1, 1].set(jnp.inf)
    updates = np.asarray(updates_at(ox.scale_by_adam(), PARAMS["w"], grads))
    assert np.isnan(updates[2:, 0, 0]).all()
    assert np.isnan(updates[3:, 1, 1]).all()
    assert np.isnan(updates).sum() == (STEPS - 2) + (STEPS - 3)


def test_empty_none_and_masked_leaves_pass():
    tx = ox.scale_by_adam(amsgrad=True)
    params = {"none": None, "masked": optax.MaskedNode(), "empty": jnp.zeros((0, 3))}
    updates, _ = tx.update(params, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert updates["empty"].shape == (0, 3)


def test_rounded_hyper_parameters_are_survived():
    # inject_hyperparams rounds 0.999 to 1 and 1e-8 to 0 in float16.
    tx = ox.scale_by_adam(jnp.float16(0.9), jnp.float16(0.9999), eps=jnp.float16(1e-9))
    updates = updates_at(tx, PARAMS, GRADS)
    assert_finite(updates)
    # The mean square is then the plain mean of all squares.
    count = np.arange(1, STEPS + 1)[:, None]
    grads = np.asarray(GRADS["b"], np.float64)
    mean_square = np.cumsum(grads**2, axis=0) / count
    numerator = updates["b"] * np.sqrt(mean_square)
    expected = debiased_mean(grads, float(np.float16(0.9)))
    # 1 - b2 is 2^-24: its product with g² and the corrections lose few digits.
    np.testing.assert_allclose(
        numerator, expected, rtol=0, atol=1e-4 * np.abs(grads).max()
    )


def debiased_mean(grads: np.ndarray, decay: float) -> np.ndarray:
    m, result = np.zeros_like(grads[0]), []
    for t, g in enumerate(grads, start=1):
        m = decay * m + (1 - decay) * g
        result.append(m / (1 - decay**t))
    return np.stack(result)


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"b1": 1.0}, r"scale_by_adam: b1=1.0 is not allowed; .* \[0, 1\)"),
        ({"b1": -0.1}, "scale_by_adam: b1=-0.1 is not allowed"),
        ({"b1": float("nan")}, "scale_by_adam: b1=nan is not allowed"),
        ({"b2": 1.5}, r"scale_by_adam: b2=1.5 is not allowed; .* \[0, 1\)"),
        ({"eps": -1e-8}, "scale_by_adam: eps=-1e-08 is not allowed; .* >= 0"),
        ({"eps": float("inf")}, "scale_by_adam: eps=inf is not allowed"),
        ({"eps_root": -1.0}, "scale_by_adam: eps_root=-1.0 is not allowed"),
        (
            {"eps": 0.0},
            "scale_by_adam: eps=0.0 is not allowed; eps or eps_root must be",
        ),
    ],
)
def test_wrong_values_are_refused(arguments, message: str):
    with pytest.raises(ValueError, match=message):
        ox.scale_by_adam(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"b1": "0.9"}, "scale_by_adam: b1='0.9' is not allowed"),
        ({"b2": True}, "scale_by_adam: b2=True is not allowed"),
        ({"eps": None}, "scale_by_adam: eps=None is not allowed"),
        ({"amsgrad": 1}, "scale_by_adam: amsgrad=1 is not allowed; .* True or False"),
        ({"nesterov": "no"}, "scale_by_adam: nesterov='no' is not allowed"),
        ({"mu_dtype": "int32"}, "scale_by_adam: mu_dtype='int32' .* floating-point"),
        ({"nu_dtype": "complex64"}, "scale_by_adam: nu_dtype='complex64' is not"),
        ({"mu_dtype": None}, "scale_by_adam: mu_dtype=None is not allowed"),
    ],
)
def test_wrong_types_are_refused(arguments, message: str):
    with pytest.raises(TypeError, match=message):
        ox.scale_by_adam(**arguments)


def test_wrong_parameters_are_refused():
    with pytest.raises(
        TypeError, match="scale_by_adam: parameter 'a/0' of dtype int32"
    ):
        ox.scale_by_adam().init({"a": [jnp.ones(3, jnp.int32)]})
    with pytest.raises(TypeError, match=r"scale_by_adam: a moment dtype .* complex"):
        ox.scale_by_adam(mu_dtype="bfloat16").init(jnp.ones(3, jnp.complex64))
