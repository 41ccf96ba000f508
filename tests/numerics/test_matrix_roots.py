"""Inverse roots against eigendecompositions in float64."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from optaxplus import numerics
from optaxplus.numerics.matrix_roots import (
    ROOT_METHODS,
    inverse_root,
)
from tests.numerics.symmetric import (
    N,
    compiled,
    primitives,
    with_condition,
    with_spectrum,
)
from tests.selection import mostly
from tests.sharding.meshes import is_placed, make_mesh, place

ORDERS = (1, 2, 3, 4, 6)
CONDITIONS = (1.0, 1e2, 1e4, 1e6, 1e8, 1e12)

each_method = pytest.mark.parametrize("method", ROOT_METHODS)
each_dtype = pytest.mark.parametrize(
    "dtype", mostly(["float32"], ["float32", "float64"])
)


def roots_of(x: Any, orders: Sequence[int], **arguments: Any) -> list[np.ndarray]:
    """The roots of several orders, in one program."""

    def roots(x: jax.Array) -> list[jax.Array]:
        return [inverse_root(x, order, **arguments) for order in orders]

    return [np.asarray(root) for root in compiled(roots, jnp.asarray(x))]


def root_of(x: Any, order: int, **arguments: Any) -> np.ndarray:
    return roots_of(x, (order,), **arguments)[0]


def expected_root(x: Any, order: int, eps: float, method: str) -> np.ndarray:
    """The definition, for one matrix: floor or shift of the eigenvalues."""
    x = np.asarray(x, np.float64)
    values, vectors = np.linalg.eigh((x + x.T) / 2)
    least = eps * np.linalg.norm(x)
    if method == "eigh":
        values = np.maximum(values, least)
    else:
        values = np.maximum(values, 0.0) + least
    return (vectors * values ** (-1 / order)) @ vectors.T


def tolerance(x: Any, order: int, eps: float, dtype: Any) -> float:
    """Of an entry, relative to the largest one.

    A decomposition, as Newton's iteration, gives the root of a matrix that is off by
    about n roundings of its norm, and the derivative of λ^(-1/p) is the root over p·λ:
    the condition number, which eps bounds, over p. The products add n roundings.
    Measured: at most half of it.
    """
    x = np.asarray(x, np.float64)
    least = np.linalg.eigvalsh(x)[0] / np.linalg.norm(x)
    condition = 1 / max(least, eps)
    return len(x) * float(jnp.finfo(dtype).eps) * (1 + condition / order)


def assert_root(
    actual: np.ndarray, x: Any, order: int, eps: float, method: str
) -> None:
    expected = expected_root(x, order, eps, method)
    bound = tolerance(x, order, eps, actual.dtype) * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)


# The root


@each_method
@each_dtype
def test_batches_of_all_conditions(method: str, dtype: str, x64) -> None:
    # eps is the only bound of the last ones.
    x = np.stack([with_condition(c, seed=i) for i, c in enumerate(CONDITIONS)])
    x = x.astype(dtype).reshape(2, 3, N, N)
    for order, roots in zip(ORDERS, roots_of(x, ORDERS, method=method), strict=True):
        assert roots.dtype == dtype
        assert roots.shape == x.shape
        for index in np.ndindex(2, 3):
            assert_root(roots[index], x[index], order, 1e-6, method)


@each_dtype
def test_methods_agree_where_eps_does_not_matter(dtype: str, x64) -> None:
    x = with_condition(100.0).astype(dtype)
    eps = float(jnp.finfo(dtype).eps)
    both = [roots_of(x, ORDERS, eps=eps, method=method) for method in ROOT_METHODS]
    for order, *pair in zip(ORDERS, *both, strict=True):
        for method, root in zip(ROOT_METHODS, pair, strict=True):
            assert_root(root, x, order, eps, method)
        # The shift of newton is a rounding as well.
        bound = 2 * tolerance(x, order, eps, dtype) * np.abs(pair[0]).max()
        np.testing.assert_allclose(*pair, rtol=0, atol=bound)


@each_method
def test_powers_of_the_root_undo_the_matrix(method: str, x64) -> None:
    x = with_condition(10.0)
    for order, root in zip(
        ORDERS, roots_of(x, ORDERS, eps=0.0, method=method), strict=True
    ):
        identity = np.linalg.matrix_power(root, order) @ x
        # The definition, with no reference: p + 1 products of condition 10.
        atol = 10 * (order + 1) * N * 2.2e-16
        np.testing.assert_allclose(identity, np.eye(N), rtol=0, atol=atol)


@each_method
@each_dtype
def test_rank_deficient(method: str, dtype: str, x64) -> None:
    ranks = (1, 3, N - 1)
    gs = [np.random.default_rng(rank).standard_normal((N, rank)) for rank in ranks]
    x = np.stack([g.astype(dtype) @ g.astype(dtype).T for g in gs])
    for order, roots in zip((2, 4), roots_of(x, (2, 4), method=method), strict=True):
        for root, matrix in zip(roots, x, strict=True):
            assert_root(root, matrix, order, 1e-6, method)


@each_method
def test_eps_as_documented(method: str) -> None:
    values = np.array([4.0, 1.0, 0.25, 1e-3, 0.0])
    x, eps = np.diag(values).astype("float32"), 1e-2
    norm = np.linalg.norm(values)
    root = root_of(x, 2, eps=eps, method=method)
    wanted = np.maximum(values, eps * norm) if method == "eigh" else values + eps * norm
    # No eigenvalue is below eps of the norm: 100 roundings, over 2.
    np.testing.assert_allclose(np.diag(root), wanted**-0.5, rtol=50 * 1.2e-7)
    np.testing.assert_allclose(root - np.diag(np.diag(root)), 0.0, atol=1e-6)


def test_eigh_leaves_what_is_above_eps() -> None:
    values = np.array([4.0, 1.0, 0.25], "float32")
    small, none = (root_of(np.diag(values), 2, eps=eps) for eps in (0.05, 0.0))
    np.testing.assert_array_equal(small, none)


@each_method
@each_dtype
def test_eps_below_rounding_is_rounding(method: str, dtype: str, x64) -> None:
    x = np.diag(np.array([1.0, 0.0], dtype))
    least = float(jnp.finfo(dtype).eps)
    zero, rounding = (root_of(x, 4, eps=e, method=method) for e in (0.0, least))
    np.testing.assert_array_equal(zero, rounding)
    np.testing.assert_allclose(zero[1, 1], least**-0.25, rtol=1e-2)


@each_method
@pytest.mark.parametrize("eps", mostly([1.0], [0.5, 1.0, 3.0]))
def test_large_eps(method: str, eps: float) -> None:
    x = with_condition(100.0).astype("float32")
    assert_root(root_of(x, 4, eps=eps, method=method), x, 4, eps, method)


def test_eps_of_eigh_may_be_traced() -> None:
    x = jnp.asarray(with_condition(1e4), "float32")
    traced = compiled(lambda x, eps: inverse_root(x, 4, eps=eps), x, jnp.float32(1e-3))
    np.testing.assert_array_equal(traced, root_of(x, 4, eps=1e-3))


def test_the_error_of_newton_in_float32() -> None:
    """At eps=1e-6 and in the worst case: 1e6 roundings of 1.2e-7, over the order.

    Measured: 2e-2 of the largest entry at order 1, 4e-3 at order 4.
    """
    rng = np.random.default_rng(0)
    gs = [rng.standard_normal((32, rank)).astype("float32") for rank in (1, 16, 32)]
    x = np.stack([g @ g.T for g in gs])
    for order, roots in zip(
        (1, 2, 4), roots_of(x, (1, 2, 4), method="newton"), strict=True
    ):
        for root, matrix in zip(roots, x, strict=True):
            expected = expected_root(matrix, order, 1e-6, "newton")
            error = np.abs(root - expected).max()
            assert error <= 0.12 / order * np.abs(expected).max()


@each_method
def test_sizes_of_entries(method: str) -> None:
    """Homogeneous of degree -1/p, as far as entries and roots are normal numbers."""
    x = with_condition(100.0).astype("float32")
    x /= np.abs(x).max()
    scales = np.array([1e-34, 1e-30, 1e-3, 1.0, 1e30, 1e34, 8e37])
    stack = (x * scales[:, None, None]).astype("float32")
    for order, roots in zip(
        (1, 2, 4), roots_of(stack, (1, 2, 4), method=method), strict=True
    ):
        unit = expected_root(x, order, 1e-6, method)
        # The power of the scale has the rounding of its logarithm, of up to 88.
        rtol = tolerance(x, order, 1e-6, "float32") + 88 * 1.2e-7
        for root, scale in zip(roots, scales[: 6 if order == 1 else 7], strict=False):
            wanted = unit * scale ** (-1 / order)
            np.testing.assert_allclose(
                root, wanted, rtol=0, atol=rtol * np.abs(wanted).max()
            )


@each_method
def test_entries_near_the_largest_number(method: str) -> None:
    # The reciprocal of what is above 2^126 is no normal number.
    x = 3e38 * np.array([[1.0, 0.5], [0.5, 0.7]], "float32")
    assert_root(root_of(x, 2, method=method), x, 2, 1e-6, method)


@each_method
def test_what_has_no_root_stays_with_its_matrix(method: str) -> None:
    good = with_condition(10.0).astype("float32")
    nan, inf, minus, off = (good.copy() for _ in range(4))
    nan[2, 3], inf[1, 1], minus[0, 0], off[0, 5] = np.nan, np.inf, -np.inf, np.inf
    stack = np.stack([good, nan, good, inf, np.zeros_like(good), minus, off, good])
    roots = root_of(stack, 4, method=method)
    for index in (1, 3, 5, 6):
        assert np.isnan(roots[index]).all()
    np.testing.assert_array_equal(roots[4], 0.0)
    for index in (0, 2, 7):
        assert_root(roots[index], good, 4, 1e-6, method)
    np.testing.assert_array_equal(
        roots[[0, 2, 7]], np.broadcast_to(roots[0], (3, N, N))
    )


@each_method
def test_slightly_negative_eigenvalues_count_as_rounding(method: str) -> None:
    values = np.array([1.0, 0.1, 1e-8, -3e-8])
    x = with_spectrum(values).astype("float32")
    eps = 1e-4
    assert_root(root_of(x, 4, eps=eps, method=method), x, 4, eps, method)


@each_method
@pytest.mark.parametrize("order", [1, 4])
def test_one_by_one(method: str, order: int) -> None:
    x = np.array([16.0, 1e-30, 1e30, 0.0], "float32").reshape(4, 1, 1)
    roots = root_of(x, order, method=method).ravel()
    factor = 1.0 if method == "eigh" else (1 + 1e-6) ** (-1 / order)
    wanted = factor * x.ravel()[:3].astype(float) ** (-1 / order)
    # As in test_sizes_of_entries.
    np.testing.assert_allclose(roots[:3], wanted, rtol=88 * 1.2e-7)
    assert roots[3] == 0.0


@each_method
@pytest.mark.parametrize("shape", [(0, 0), (3, 0, 0), (0, 2, 2)])
def test_empty(method: str, shape: tuple[int, ...]) -> None:
    root = inverse_root(jnp.zeros(shape), 2, method=method)
    assert root.shape == shape
    assert root.dtype == "float32"


def test_empty_narrow_input_gives_float32() -> None:
    root = jax.eval_shape(lambda x: inverse_root(x, 2), jnp.zeros((0, 0), "bfloat16"))
    assert root.dtype == "float32"


@each_method
@pytest.mark.parametrize("dtype", mostly(["bfloat16"], ["bfloat16", "float16"]))
def test_narrow_input_gives_float32(method: str, dtype: str) -> None:
    x = jnp.asarray(with_condition(10.0), dtype)
    root = root_of(x, 4, method=method)
    assert root.dtype == "float32"
    np.testing.assert_array_equal(root, root_of(x.astype("float32"), 4, method=method))


@each_method
def test_roots_are_symmetric(method: str) -> None:
    root = root_of(with_condition(1e3).astype("float32"), 3, method=method)
    # eigh: a product of two that are not quite each other's transposes.
    largest = np.abs(root).max()
    np.testing.assert_allclose(root, root.T, rtol=0, atol=N * 1.2e-7 * largest)


@each_method
def test_under_vmap(method: str) -> None:
    x = np.stack([with_condition(10.0, seed=i) for i in range(3)]).astype("float32")
    function = functools.partial(inverse_root, order=4, method=method)
    mapped = compiled(jax.vmap(function), jnp.asarray(x))
    bound = tolerance(x[0], 4, 1e-6, "float32") * np.abs(mapped).max()
    np.testing.assert_allclose(mapped, root_of(x, 4, method=method), atol=bound)


def test_newton_is_of_products_alone() -> None:
    x = jax.ShapeDtypeStruct((2, N, N), "float32")
    function = functools.partial(inverse_root, order=4, method="newton")
    found = primitives(jax.make_jaxpr(function)(x).jaxpr)
    assert not found.keys() & {"eigh", "qr", "svd", "cholesky", "lu", "householder"}
    assert found["dot_general"]


def test_under_explicit_axes_the_result_lies_as_the_argument() -> None:
    x = np.stack([with_condition(10.0, seed=i) for i in range(8)]).astype("float32")
    mesh = make_mesh(AxisType.Explicit, fsdp=8)
    spec = P("fsdp", None, None)
    function = functools.partial(inverse_root, order=4, method="newton")
    with jax.set_mesh(mesh):
        root = compiled(function, place(jnp.asarray(x), mesh, spec))
    assert is_placed(root, mesh, spec)
    for actual, matrix in zip(np.asarray(root), x, strict=True):
        assert_root(actual, matrix, 4, 1e-6, "newton")


def test_it_is_public() -> None:
    assert numerics.inverse_root is inverse_root


GOOD = jnp.eye(2)
WRONG = [
    (TypeError, (jnp.ones((2, 2), "int32"), 2), {}, "x of dtype int32 is not allowed"),
    (TypeError, (jnp.ones((2, 2), "complex64"), 2), {}, "x of dtype complex64 .* real"),
    (TypeError, (jnp.ones((2, 2), "bool"), 2), {}, "x of dtype bool is not allowed"),
    (TypeError, ([[1.0]], 2), {}, "x of type list is not allowed; .* floating point"),
    (TypeError, (GOOD, 2.0), {}, r"order=2.0 is not allowed; .* an integer >= 1"),
    (TypeError, (GOOD, True), {}, "order=True is not allowed"),
    (TypeError, (GOOD, jnp.int32(2)), {}, "order shapes the compiled program"),
    (TypeError, (GOOD, 2), {"eps": "small"}, "eps='small' is not allowed"),
    (TypeError, (GOOD, 2), {"eps": None}, "eps=None is not allowed"),
    (
        TypeError,
        (GOOD, 2),
        {"eps": jnp.float32(1e-6), "method": "newton"},
        "eps shapes the compiled program and must be a Python number",
    ),
    (ValueError, (GOOD, 0), {}, r"order=0 is not allowed; .* an integer >= 1"),
    (ValueError, (GOOD, -2), {}, "order=-2 is not allowed"),
    (ValueError, (GOOD, 2), {"eps": -1e-6}, r"eps=-1e-06 is not allowed; .* >= 0"),
    (ValueError, (GOOD, 2), {"eps": math.nan}, "eps=nan is not allowed"),
    (ValueError, (GOOD, 2), {"eps": math.inf}, "eps=inf is not allowed"),
    (
        ValueError,
        (GOOD, 2),
        {"method": "qr"},
        "method='qr' is not allowed; it must be one of 'eigh', 'newton'",
    ),
    (
        ValueError,
        (jnp.ones((2, 3)), 2),
        {},
        r"x of shape \(2, 3\) is not allowed; its last two axes .* square matrix",
    ),
    (ValueError, (jnp.ones(3), 2), {}, r"x of shape \(3,\) is not allowed"),
    (ValueError, (jnp.ones(()), 2), {}, r"x of shape \(\) is not allowed"),
    (ValueError, (jnp.ones((0, 3)), 2), {}, r"x of shape \(0, 3\) is not allowed"),
]


@pytest.mark.parametrize(("error", "args", "kwargs", "message"), WRONG)
def test_what_is_refused(error, args, kwargs, message: str) -> None:
    with pytest.raises(error, match=f"^inverse_root: {message}"):
        inverse_root(*args, **kwargs)
