"""APOLLO: its state, degenerate matrices, wrappers, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optaxplus as ox
from optaxplus import MatrixAxes
from tests.assertions import (
    assert_finite,
    assert_same_types,
    assert_trees_close,
    assert_trees_equal,
)
from tests.sharding.meshes import is_placed, make_mesh, place
from tests.transforms.apollo_runs import MINI, STACK, follow, gradients, start

RANK_2 = {"rank": 2, "axes": STACK}

# State


def test_bytes():
    shapes = {"wide": (64, 256), "tall": (256, 64), "stack": (3, 64, 64)}
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, "bfloat16"),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    channels, matrices = 256 + 256 + 3 * 64, 1 + 1 + 3

    def state_bytes(**arguments):
        tx = ox.scale_by_apollo(axes=STACK, **arguments)
        return ox.memory_report(tx, params).state

    # Two moments of each channel, a norm of each matrix, a counter.
    assert state_bytes(**MINI) == 8 * channels + 4 * matrices + 4
    assert state_bytes(rank=16) == 16 * 8 * channels + 4 * matrices + 4
    assert state_bytes(rank=16, max_norm_growth=None) == 16 * 8 * channels + 4
    half = state_bytes(rank=16, mu_dtype="bfloat16", nu_dtype="bfloat16")
    assert half == 16 * 4 * channels + 4 * matrices + 4
    # Not more than the shorter side.
    assert state_bytes(rank=1000) == 64 * 8 * channels + 4 * matrices + 4
    # Beside AdamW's counter.
    mini = ox.apollo(0.1, **MINI, rules=(ox.Rule("", STACK, "hidden"),))
    assert ox.memory_report(mini, params).state == 8 * channels + 4 * matrices + 8
    adamw = ox.memory_report(ox.adamw(0.1), params).state
    assert state_bytes(**MINI) < adamw / 60


def test_low_precision_gradients_are_computed_in_float32():
    grads = [g.astype(jnp.bfloat16) for g in gradients((8, 12), steps=2)]
    updates, states = follow(grads, **RANK_2)
    wide, wide_states = follow([g.astype("float32") for g in grads], **RANK_2)
    assert_trees_equal(updates, wide)
    assert_trees_equal(states, wide_states)
    assert {x.dtype.name for x in (updates[0], *states[0][1:])} == {"float32"}


@pytest.mark.parametrize(
    "axis_type",
    [AxisType.Explicit, pytest.param(AxisType.Auto, marks=pytest.mark.slow)],
)
def test_moments_lie_as_the_longer_side(axis_type: AxisType):
    mesh = make_mesh(axis_type, x=2, y=4)
    axes = {
        "tall": STACK,
        "heads": MatrixAxes((1,), (2, 3)),
        "fused": MatrixAxes((1,), (2,), (8, 24)),
        "mixed": MatrixAxes((1,), (2,), (4, 28)),
    }
    shapes = {
        "tall": (2, 16, 8),
        "heads": (2, 8, 4, 4),
        "fused": (2, 8, 32),
        "mixed": (2, 8, 32),
    }
    specs = {
        "tall": P("x", "y", None),
        "heads": P("x", None, "y", None),
        "fused": P("x", None, "y"),
        "mixed": P("x", None, "y"),
    }
    # Of splits with channels on different sides nothing but the batch.
    expected = {key: P("x", None, "y") for key in shapes} | {"mixed": P("x")}
    tx = ox.scale_by_apollo(rank=2, axes=axes)
    grads = gradients(shapes, steps=2)
    with jax.set_mesh(mesh):
        placed = [place(g, mesh, specs) for g in grads]
        initial = tx.init(placed[0])
        update = jax.jit(tx.update)
        _, state = update(placed[0], initial)
        found, state = update(placed[1], state)
        planned = ox.state_sharding(tx, placed[0])
    for key, spec in expected.items():
        moments = [initial.mu, initial.nu, state.mu, state.nu]
        if key == "mixed" and axis_type == AxisType.Auto:
            # There the compiler is free to share out what update leaves whole.
            moments = moments[:2]
        for tree in moments:
            assert is_placed(tree[key], mesh, spec), key
        assert is_placed(state.last_norm[key], mesh, P("x")), key
        assert is_placed(found[key], mesh, specs[key]), key
        assert planned.mu[key].is_equivalent_to(initial.mu[key].sharding, 3)
    flat = tuple(axes.items())
    plain, states = follow(grads, rank=2, axes=lambda _: dict(flat))
    # Sums over devices in another order.
    assert_trees_close(found, plain[-1], rtol=1e-5)
    assert_trees_close(state, states[-1], rtol=1e-5)


# Wrappers


def test_codes_are_for_moments_of_the_parameter_s_shape():
    params = {"dense": {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(4096)}}
    small = ox.quantize_state(ox.apollo(0.1, rank=16)).init(params)
    kinds = [type(x) for x in jax.tree.leaves(small, is_leaf=_is_quantized)]
    # AdamW's, of the bias; those of low rank stay as they are.
    assert kinds.count(ox.QuantizedArray) == 2
    whole = ox.quantize_state(ox.apollo(0.1, rank=64)).init(params)
    kinds = [type(x) for x in jax.tree.leaves(whole, is_leaf=_is_quantized)]
    assert kinds.count(ox.QuantizedArray) == 4


def _is_quantized(node):
    return isinstance(node, ox.QuantizedArray)


def test_masking_vectors_away():
    params = {"d": {"kernel": gradients((8, 12), steps=1)[0], "bias": np.ones(3)}}
    tx = optax.masked(
        ox.scale_by_apollo(rank=2), {"d": {"kernel": True, "bias": False}}
    )
    updates, _ = jax.jit(lambda g: tx.update(g, tx.init(g)))(params)
    np.testing.assert_array_equal(updates["d"]["bias"], params["d"]["bias"])
    ((expected,), _) = follow([params["d"]["kernel"]], **RANK_2)
    # Roundings of fused operations.
    assert_trees_close(updates["d"]["kernel"], expected, rtol=1e-5)


# Limits


def test_zero_channels_stay_zero():
    grads = [g.copy() for g in gradients((4, 6), steps=3)]
    # With moments and without.
    grads[1][:, 2] = 0.0
    grads[2][:, 4] = 0.0
    updates, states = follow(grads, **RANK_2)
    assert_finite((updates, states))
    assert not updates[1][:, 2].any()
    assert not updates[2][:, 4].any()
    assert np.abs(updates[2][:, 2]).min() > 0


@pytest.mark.parametrize(
    ("arguments", "eps"), [({"rank": 2}, 0.0), (MINI, 1e-6), (MINI, 0.0)], ids=str
)
def test_tiny_and_huge_gradients(arguments, eps: float):
    g = np.sign(gradients((4, 6), steps=1)[0])
    for size in (1e-45, 1e-40, 1e-38, 1e-37, 1e-30, 1e-20, 1e18, 1e20, 1e30, 1e37):
        extreme = g * np.float32(size)
        for grads in ([extreme, g, extreme], [g, extreme, g], [extreme, 0 * g, g]):
            updates, states = follow(grads, eps=eps, axes=STACK, **arguments)
            assert_finite(updates)
            assert_finite([(state.mu, state.last_norm) for state in states])


def test_rank_deficient_gradients():
    rng = np.random.default_rng(0)
    g = np.float32(np.outer(rng.standard_normal(4), rng.standard_normal(6)))
    updates, states = follow([g] * 3, rank=4, axes=STACK)
    assert_finite((updates, states))
    assert (updates[-1] * g > 0).all()


@pytest.mark.parametrize("arguments", [MINI, {"rank": 2}], ids=["mini", "channels"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_bad_entry_makes_its_matrix_nan(bad: float, arguments):
    """With channels the limiter would otherwise let the others grow from then on."""
    (g,) = gradients((2, 3, 4), steps=1)
    poisoned = g.copy()
    poisoned[0, 1, 1] = bad
    updates, _ = follow([poisoned, g], axes=STACK, **arguments)
    for update in updates:
        assert np.isnan(update[0]).all()
        assert np.isfinite(update[1]).all()


def test_empty_none_and_masked_leaves_pass():
    params = {
        "n": None,
        "m": optax.MaskedNode(),
        "rows": np.zeros((0, 3), np.float32),
        "columns": np.zeros((3, 0), np.float32),
        "layers": np.zeros((0, 3, 4), np.float32),
    }
    state = start(params, **RANK_2)
    assert state.mu["rows"].shape == state.mu["columns"].shape == (0, 3)
    assert state.mu["layers"].shape == (0, 2, 4)
    (updates,), (after,) = follow([params], **RANK_2)
    assert_trees_equal(updates, params)
    assert_same_types(
        jax.tree.map(jnp.asarray, after), jax.tree.map(jnp.asarray, state)
    )


# Errors


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"b1": 1.0}, r"b1=1.0 is not allowed; .* \[0, 1\)"),
        (TypeError, {"b2": "0.9"}, "b2='0.9' is not allowed"),
        (ValueError, {"eps": -1e-8}, "eps=-1e-08 is not allowed; .* >= 0"),
        (ValueError, {"rank": 0}, "rank=0 is not allowed; .* integer >= 1"),
        (TypeError, {"rank": 2.0}, "rank=2.0 is not allowed"),
        (
            TypeError,
            {"rank": jnp.asarray(2)},
            r"rank shapes .* static_args=\('rank',\)",
        ),
        (ValueError, {"scale": 0.0}, "scale=0.0 is not allowed; .* > 0"),
        (
            ValueError,
            {"scaling": "row"},
            "scaling='row' is not allowed; .* one of 'channel', 'tensor'",
        ),
        (ValueError, {"update_interval": 0}, "update_interval=0 is .* >= 1"),
        (
            ValueError,
            {"max_norm_growth": 0.99},
            "max_norm_growth=0.99 is not allowed; it must be at least 1",
        ),
        (TypeError, {"max_norm_growth": "1"}, "max_norm_growth='1' is not allowed"),
        (ValueError, {"seed": -1}, "seed=-1 is not allowed; .* integer >= 0"),
        (TypeError, {"mu_dtype": "int8"}, "mu_dtype='int8' is not allowed"),
        (TypeError, {"nu_dtype": None}, "nu_dtype=None is not allowed"),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message: str):
    with pytest.raises(error, match="scale_by_apollo: " + message):
        ox.scale_by_apollo(**arguments)


@pytest.mark.parametrize("dtype", ["int32", "complex64"])
def test_wrong_parameters_are_refused(dtype: str):
    message = f"scale_by_apollo: parameter 'w' of dtype {dtype} .* real floating point"
    with pytest.raises(TypeError, match=message):
        ox.scale_by_apollo().init({"w": jnp.ones((2, 3), dtype)})


def test_vectors_are_refused():
    message = r"scale_by_apollo: parameter 'd/bias' of shape \(3,\) is not allowed"
    params = {"d": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    with pytest.raises(ValueError, match=message):
        ox.scale_by_apollo().init(params)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (MatrixAxes((0,), (5,)), "parameter 'w': .* axis 5 is out of range"),
        (MatrixAxes((0,), (1,), (2, 2)), "parameter 'w': .* splits add up to 4"),
    ],
)
def test_axes_that_do_not_fit_are_refused(axes, message: str):
    with pytest.raises(ValueError, match="scale_by_apollo: " + message):
        ox.scale_by_apollo(axes=axes).init({"w": jnp.ones((2, 3))})
