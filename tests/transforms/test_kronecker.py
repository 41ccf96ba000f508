"""What SOAP, Shampoo and Kron share: micro-batches, dtypes, refusals."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from optaxplus.numerics.matrix_axes import MatrixAxes
from tests.assertions import assert_trees_close
from tests.transforms.kron_runs import gradients
from tests.transforms.kronecker_runs import FAST, RTOL, follow

RULES = {
    "scale_by_soap": (ox.scale_by_soap, ox.soap),
    "scale_by_shampoo": (ox.scale_by_shampoo, ox.shampoo),
    "scale_by_kron": (ox.scale_by_kron, ox.kron),
}
MATRIX = MatrixAxes((0,), (1,))
each_link = pytest.mark.parametrize("name", RULES)


@pytest.mark.slow
@each_link
def test_micro_batches(name: str) -> None:
    arguments: dict[str, Any] = {"update_interval": 2, "axes": MATRIX}
    link, _ = RULES[name]
    grads = gradients((4, 5), steps=8)
    wrapped = optax.MultiSteps(link(**arguments), 2)
    update = jax.jit(wrapped.update, compiler_options=FAST)
    state = wrapped.init(grads[0])
    updates = []
    for g in grads:
        u, state = update(g, state)
        updates.append(jax.device_get(u))
    pairs = zip(grads[::2], grads[1::2], strict=True)
    means = [(one + other) / 2 for one, other in pairs]
    expected, _ = follow(link, means, **arguments)
    for silent, ours, theirs in zip(updates[::2], updates[1::2], expected, strict=True):
        assert not silent.any()
        # MultiSteps rounds the mean otherwise; small eigenvalues amplify it.
        assert_trees_close(ours, theirs, rtol=RTOL)


@each_link
def test_dtypes_of_leaves_and_gradients_may_differ(name: str) -> None:
    with jax.enable_x64(True):
        params = {"a": jnp.ones((3, 3), "float32"), "b": jnp.ones((3, 3), "float64")}
        grads = {key: jnp.eye(3, dtype="float64") for key in params}
        tx = RULES[name][0](update_interval=1, axes=MATRIX)
        before = tx.init(params)
        _, state = tx.update(grads, before)
        _, state = tx.update(grads, state)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True):
        assert old.dtype == new.dtype


# Errors

OF_ALL: list[tuple[type[Exception], dict[str, Any], str]] = [
    (ValueError, {"b1": 1.0}, r"b1=1.0 is not allowed; .* \[0, 1\)"),
    (ValueError, {"update_interval": 0}, "update_interval=0 is .* integer >= 1"),
    (TypeError, {"update_interval": 2.5}, "update_interval=2.5 is not allowed"),
    (
        TypeError,
        {"update_interval": np.array(2)},
        "update_interval=array.* integer >= 1",
    ),
    (ValueError, {"max_dim": 0}, "max_dim=0 is not allowed; .* integer >= 1"),
    (
        ValueError,
        {"large_dims": "blocks"},
        "large_dims='blocks' is not allowed; .* 'tiles', 'diagonal'",
    ),
    (TypeError, {"mu_dtype": "int8"}, "mu_dtype='int8' is not allowed"),
    (TypeError, {"placement": "here"}, "placement='here' is not allowed"),
]
OF_BOTH: list[tuple[type[Exception], dict[str, Any], str]] = [
    (TypeError, {"b2": "1"}, "b2='1' is not allowed"),
    (ValueError, {"b3": 1.0}, r"b3=1.0 is not allowed; .* \[0, 1\)"),
    (TypeError, {"b3": "0.9"}, "b3='0.9' is not allowed"),
    (TypeError, {"nu_dtype": "int8"}, "nu_dtype='int8' is not allowed"),
]
OF_SOAP: list[tuple[type[Exception], dict[str, Any], str]] = [
    *OF_BOTH,
    (TypeError, {"b2": None}, "b2=None is not allowed"),
    (ValueError, {"b2": -0.1}, r"b2=-0.1 is not allowed; .* \[0, 1\)"),
    (ValueError, {"eps": 0.0}, "eps=0.0 is not allowed; .* > 0"),
]
OF_SHAMPOO: list[tuple[type[Exception], dict[str, Any], str]] = [
    *OF_BOTH,
    (ValueError, {"b2": -0.1}, "b2=-0.1 is not allowed; .* >= 0"),
    (ValueError, {"b2": 1.5}, "b2=1.5 is not allowed; .* at most 1"),
    (TypeError, {"b3": None}, "b3=None is not allowed"),
    (ValueError, {"eps": -1e-6}, "eps=-1e-06 is not allowed; .* >= 0"),
    (ValueError, {"grafting_eps": 0.0}, "grafting_eps=0.0 is not allowed; .* > 0"),
    (
        ValueError,
        {"grafting": "rmsprop"},
        "grafting='rmsprop' is not allowed; .* 'sgd', 'adagrad', 'adam', None",
    ),
    (ValueError, {"root_order": 0}, "root_order=0 is not allowed; .* >= 1"),
    (TypeError, {"root_order": 0.5}, "root_order=0.5 is not allowed"),
    (
        ValueError,
        {"root_method": "svd"},
        "root_method='svd' is not allowed; .* 'eigh', 'newton'",
    ),
]
OF_KRON: list[tuple[type[Exception], dict[str, Any], str]] = [
    (TypeError, {"b1": "0.9"}, "b1='0.9' is not allowed"),
    (
        ValueError,
        {"preconditioner_learning_rate": 0.0},
        r"preconditioner_learning_rate=0.0 is not allowed; .* \(0, 1\)",
    ),
    (
        ValueError,
        {"preconditioner_learning_rate": 1.0},
        r"preconditioner_learning_rate=1.0 is not allowed; .* \(0, 1\)",
    ),
    (ValueError, {"init_scale": 0.0}, "init_scale=0.0 is not allowed; .* > 0"),
    (TypeError, {"init_scale": None}, "init_scale=None is not allowed"),
    (ValueError, {"warmup_steps": -1}, "warmup_steps=-1 is .* integer >= 0"),
    (ValueError, {"interval_growth": -0.1}, "interval_growth=-0.1 is .* >= 0"),
    (ValueError, {"max_update_rms": 0.0}, "max_update_rms=0.0 is .* > 0"),
    (ValueError, {"seed": -1}, "seed=-1 is not allowed; .* integer >= 0"),
    (TypeError, {"factor_dtype": "int8"}, "factor_dtype='int8' is not allowed"),
]


@pytest.mark.parametrize(
    ("name", "error", "arguments", "message"),
    [
        (name, *row)
        for name, own in zip(RULES, (OF_SOAP, OF_SHAMPOO, OF_KRON), strict=True)
        for row in OF_ALL + own
    ],
)
def test_wrong_arguments_are_refused(
    name: str, error: type[Exception], arguments: dict[str, Any], message: str
) -> None:
    link, optimizer = RULES[name]
    with pytest.raises(error, match=f"{name}: {message}"):
        link(**arguments)
    with pytest.raises(error, match=message):
        optimizer(0.1, **arguments)


@each_link
@pytest.mark.parametrize("argument", ["update_interval", "max_dim"])
def test_traced_sizes_are_refused(name: str, argument: str) -> None:
    message = rf"{name}: {argument} shapes .* static_args=\('{argument}',\)"
    with pytest.raises(TypeError, match=message):
        RULES[name][0](**{argument: jnp.asarray(2)})


def test_a_traced_margin_is_refused_where_it_decides_the_steps() -> None:
    with pytest.raises(TypeError, match=r"eps shapes .* static_args=\('eps',\)"):
        ox.scale_by_shampoo(eps=jnp.asarray(1e-6), root_method="newton")


@each_link
@pytest.mark.parametrize("dtype", ["int32", "complex64"])
def test_wrong_parameters_are_refused(name: str, dtype: str) -> None:
    message = f"{name}: parameter 'w' of dtype {dtype} .* real floating point"
    with pytest.raises(TypeError, match=message):
        RULES[name][0]().init({"w": jnp.ones((2, 3), dtype)})


@each_link
@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (MatrixAxes((0,), (5,)), "parameter 'w': .* axis 5 is out of range"),
        (MatrixAxes((0,), (1,), (2, 2)), "parameter 'w': .* splits add up to 4"),
    ],
)
def test_axes_that_do_not_fit_are_refused(
    name: str, axes: MatrixAxes, message: str
) -> None:
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        RULES[name][0](axes=axes).init({"w": jnp.ones((2, 3))})


@each_link
def test_sides_without_even_tiles_are_refused(name: str) -> None:
    link, optimizer = RULES[name]
    message = (
        rf"{name}: parameter 'layer/kernel' of shape \(37, 4\) is not allowed "
        r"with max_dim=16: .*side of 37 .*large_dims='diagonal'"
    )
    params = {"layer": {"kernel": jax.ShapeDtypeStruct((37, 4), "float32")}}
    arguments: dict[str, Any] = {"max_dim": 16, "large_dims": "tiles"}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(link(**arguments).init, params)
    with pytest.raises(ValueError, match="'layer/kernel'"):
        jax.eval_shape(optimizer(0.1, **arguments).init, params)


@each_link
@pytest.mark.parametrize("size", [32, 37])
def test_vectors_without_full_factors_are_not_cut(name: str, size: int) -> None:
    tx = RULES[name][0](max_dim=16, large_dims="tiles")
    if name == "scale_by_shampoo" and size == 37:
        with pytest.raises(ValueError, match="no even tiles"):
            jax.eval_shape(tx.init, jnp.ones(size))
        return
    state = jax.eval_shape(tx.init, jnp.ones(size))
    shapes = {
        "scale_by_soap": None,
        "scale_by_shampoo": (2, 16, 16),
        "scale_by_kron": (1, size, 1),
    }
    assert getattr(state.factor_out, "shape", None) == shapes[name]
