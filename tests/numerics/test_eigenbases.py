"""Eigenbases, steps towards them, and decompositions in groups."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optaxplus.numerics.matrix_roots import (
    eigenbasis,
    in_groups,
    inverse_root,
    iterated_eigenbasis,
    next_eigenbasis,
    orthonormal,
    second_moment,
)
from optaxplus.numerics.products import product
from tests.numerics.symmetric import (
    N,
    compiled,
    equations,
    primitives,
    with_condition,
    with_spectrum,
)
from tests.selection import mostly

each_dtype = pytest.mark.parametrize(
    "dtype", mostly(["float32"], ["float32", "float64"])
)


def basis_of(x: Any) -> np.ndarray:
    return np.asarray(compiled(eigenbasis, jnp.asarray(x)))


def step(x: Any, basis: Any) -> tuple[np.ndarray, np.ndarray]:
    found, order = compiled(next_eigenbasis, jnp.asarray(x), jnp.asarray(basis))
    return np.asarray(found), np.asarray(order)


def assert_orthonormal(basis: np.ndarray) -> None:
    n = basis.shape[-1]
    gram = np.swapaxes(basis, -1, -2) @ basis
    # A product of n reflections, or rotations, each with its rounding.
    atol = 2 * n * float(jnp.finfo(basis.dtype).eps)
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(n), gram.shape), atol=atol)


@each_dtype
def test_eigenbasis_has_the_largest_eigenvalues_first(dtype: str, x64) -> None:
    values = np.array([3.0, 7.0, 0.5, 5.0, 0.0])
    x = np.stack([with_spectrum(values, seed) for seed in range(4)])
    x = x.astype(dtype).reshape(2, 2, 5, 5)
    basis = basis_of(x)
    assert basis.dtype == dtype
    assert_orthonormal(basis)
    turned = np.swapaxes(basis, -1, -2) @ x @ basis
    wanted = np.broadcast_to(np.diag([7.0, 5.0, 3.0, 0.5, 0.0]), turned.shape)
    # n roundings of the norm, 9, of the decomposition and of each product here.
    np.testing.assert_allclose(
        turned, wanted, atol=3 * 5 * 9 * float(jnp.finfo(dtype).eps)
    )


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_eigenbasis_of_equal_eigenvalues_is_one_of_them(scale: float) -> None:
    assert_orthonormal(basis_of(scale * np.eye(4, dtype="float32")))


def in_coordinates(x: np.ndarray, rank: int) -> np.ndarray:
    """Eigenvectors of diag(1, …, ½) in the space of the smallest eigenvalues."""
    n = len(x)
    rest = np.linalg.eigh(x.astype(float))[1][:, : n - rank]
    turned = rest.T @ np.diag(np.linspace(1.0, 0.5, n)) @ rest
    return rest @ np.linalg.eigh(turned)[1][:, ::-1]


@each_dtype
@pytest.mark.parametrize("scale", mostly([1e-18], [1e-18, 1.0, 1e18]))
def test_directions_without_a_gradient_are_chosen_by_the_coordinates(
    scale: float, dtype: str, x64
) -> None:
    n, eps = 6, float(jnp.finfo(dtype).eps)
    ranks = range(1, n + 1)
    x = np.stack(
        [
            scale * with_spectrum(np.r_[np.linspace(2, 1, r), np.zeros(n - r)], r)
            for r in ranks
        ]
    )
    # Another sum rounds in another way.
    noise = np.random.default_rng(0).uniform(-eps, eps, (2, len(x), n, n)) / 4
    noisy = x + scale * (noise + np.swapaxes(noise, -1, -2))
    for bases in basis_of(noisy.astype(dtype)):
        assert_orthonormal(bases)
        for rank, basis, matrix in zip(ranks, bases, x, strict=True):
            # n roundings of the norm, 2, over gaps of at least 0.1/n.
            atol = n * 2 * eps * 10 * n
            wanted = in_coordinates(matrix, rank)
            np.testing.assert_allclose(
                np.abs(basis[:, rank:]), np.abs(wanted), rtol=0, atol=atol
            )


def test_eigenbasis_of_a_zero_matrix_is_the_identity() -> None:
    np.testing.assert_array_equal(
        np.abs(basis_of(np.zeros((2, N, N), "float32"))),
        np.broadcast_to(np.eye(N), (2, N, N)),
    )


def test_eigenbasis_poisons_its_matrix_alone() -> None:
    good = with_condition(10.0).astype("float32")
    nan, inf = good.copy(), good.copy()
    nan[0, 1], inf[3, 3] = np.nan, np.inf
    basis = basis_of(np.stack([nan, good, inf]))
    assert np.isnan(basis[[0, 2]]).all()
    np.testing.assert_array_equal(basis[1], basis_of(good))


def test_eigenbases_of_nothing() -> None:
    for shape in ((0, 0), (0, 3, 3), (2, 0, 0)):
        x = jnp.zeros(shape)
        assert eigenbasis(x).shape == shape
        basis, order = next_eigenbasis(x, x)
        assert basis.shape == shape
        assert order.shape == shape[:-1]
        assert jnp.issubdtype(order.dtype, jnp.integer)


def test_one_column() -> None:
    x = np.array([[[4.0]], [[0.0]]], "float32")
    np.testing.assert_array_equal(np.abs(basis_of(x)), 1.0)
    basis, order = step(x, np.ones_like(x))
    np.testing.assert_array_equal(np.abs(basis), 1.0)
    np.testing.assert_array_equal(order, 0)


@each_dtype
def test_an_eigenbasis_is_a_fixed_point(dtype: str, x64) -> None:
    x = np.stack([with_spectrum([5.0, 4.0, 2.0, 1.0, 0.5], s) for s in range(3)])
    x = x.astype(dtype)
    start = basis_of(x)
    basis, order = step(x, start)
    assert basis.dtype == dtype
    assert_orthonormal(basis)
    np.testing.assert_array_equal(order, np.broadcast_to(np.arange(5), (3, 5)))
    # Up to the signs. Roundings of the norm, 7, over the gaps, at least 0.5.
    alike = np.abs(np.sum(basis * start, axis=-2))
    atol = 5 * 7 / 0.5 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(alike, 1.0, atol=atol)
    np.testing.assert_allclose(np.abs(basis), np.abs(start), atol=atol)


def test_columns_are_put_in_order() -> None:
    x = with_spectrum([5.0, 4.0, 2.0, 1.0, 0.5]).astype("float32")
    sorted_basis = basis_of(x)
    shuffled = np.random.default_rng(1).permutation(5)
    start = sorted_basis[:, shuffled]
    basis, order = step(x, start)
    np.testing.assert_array_equal(shuffled[order], np.arange(5))
    # Column i comes from column order[i] of the old basis.
    alike = np.abs(np.sum(basis * start[:, order], axis=0))
    np.testing.assert_allclose(alike, 1.0, atol=1e-5)


@each_dtype
def test_it_is_an_orthogonal_iteration(dtype: str, x64) -> None:
    """The same as NumPy's, one matrix at a time, up to the signs of columns."""
    rng = np.random.default_rng(0)
    x = np.stack([with_condition(20.0, 6, seed) for seed in range(3)]).astype(dtype)
    start = np.linalg.qr(rng.standard_normal((3, 6, 6)))[0].astype(dtype)
    found, order = step(x, start)
    assert_orthonormal(found)
    for a, q, basis, columns in zip(x, start, found, order, strict=True):
        a, q = a.astype(float), q.astype(float)
        values = np.diag(q.T @ a @ q)
        wanted = np.argsort(-values)
        np.testing.assert_array_equal(columns, wanted)
        least = 4 * math.sqrt(6) * float(jnp.finfo(dtype).eps) * values.max()
        reference = np.linalg.qr((a @ q + least * q)[:, wanted])[0]
        signs = np.sign(np.sum(reference * basis, axis=0))
        # QR multiplies roundings by the condition of its argument, 20.
        atol = 6 * 20 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(basis, signs * reference, atol=atol)


def tangent(basis: np.ndarray, count: int) -> float:
    """Of the largest angle of the first columns to the first unit vectors."""
    head, tail = basis[:count, :count], basis[count:, :count]
    return np.linalg.norm(tail @ np.linalg.inv(head), 2)


def test_it_converges_by_the_ratio_of_neighbours(x64) -> None:
    values = np.array([8.0, 4.0, 3.0, 1.0, 0.25])
    noise = np.random.default_rng(0).standard_normal((5, 5))
    # Near enough for the order to stay.
    basis = np.linalg.qr(np.eye(5) + 0.1 * noise)[0]
    x = np.diag(values)
    first = [tangent(basis, k) for k in range(1, 5)]
    for steps in range(1, 25):
        basis, order = step(x, basis)
        np.testing.assert_array_equal(order, np.arange(5))
        assert_orthonormal(basis)
        for k, start in enumerate(first, 1):
            # Exact for a diagonal matrix, up to rounding.
            ratio = (values[k] / values[k - 1]) ** steps
            assert tangent(basis, k) <= start * ratio * (1 + 1e-9) + 1e-14
    np.testing.assert_allclose(
        np.abs(basis), np.eye(5), atol=first[1] * 0.75**24 + 1e-9
    )


def test_it_converges_from_anywhere_to_what_eigenbasis_gives(x64) -> None:
    x = with_spectrum([16.0, 8.0, 4.0, 2.0, 1.0], seed=3)
    rng = np.random.default_rng(4)
    basis = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    for _ in range(60):
        basis, _ = step(x, basis)
    # Halved every time: 2^-60.
    np.testing.assert_allclose(np.abs(basis), np.abs(basis_of(x)), atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-19, 1.0, 1e18, 1e30])
def test_orthonormal_at_any_scale_and_rank(scale: float) -> None:
    rng = np.random.default_rng(0)
    start = np.linalg.qr(rng.standard_normal((3, N, N)))[0].astype("float32")
    gs = [rng.standard_normal((N, rank)) for rank in (1, 4, N)]
    x = np.stack([(scale * g @ g.T).astype("float32") for g in gs])
    basis, order = step(x, start)
    assert_orthonormal(basis)
    np.testing.assert_array_equal(np.sort(order), np.broadcast_to(range(N), (3, N)))


def test_directions_without_a_gradient_stay_as_they_are() -> None:
    x = np.stack(
        [with_spectrum(np.r_[np.ones(rank), np.zeros(N - rank)]) for rank in range(N)]
    ).astype("float32")
    start = basis_of(x)
    basis, order = step(x, start)
    for rank in range(N):
        # Equal eigenvalues are in any order.
        assert set(order[rank, rank:]) == set(range(rank, N))
        alike = np.abs(np.sum(basis[rank] * start[rank][:, order[rank]], axis=0))
        # What rounding makes of zero, of up to a quarter of what is added.
        np.testing.assert_allclose(alike[rank:], 1.0, atol=0.1)


def test_equal_eigenvalues_keep_their_order() -> None:
    identity = np.eye(N, dtype="float32")
    for x in (identity, 0 * identity):
        basis, order = step(x, identity)
        np.testing.assert_array_equal(order, np.arange(N))
        np.testing.assert_array_equal(np.abs(basis), identity)


def test_next_eigenbasis_poisons_its_matrix_alone() -> None:
    good = with_condition(10.0).astype("float32")
    nan, inf = good.copy(), good.copy()
    nan[0, 1], inf[3, 3] = np.nan, np.inf
    start = np.broadcast_to(basis_of(good), (3, N, N))
    basis, order = step(np.stack([nan, good, inf]), start)
    assert np.isnan(basis[[0, 2]]).all()
    assert_orthonormal(basis[1])
    np.testing.assert_array_equal(order[1], np.arange(N))


def test_products_are_not_rounded_by_accelerators() -> None:
    x = jax.ShapeDtypeStruct((3, 3), "float32")
    highest = jax.lax.Precision.HIGHEST
    for function in (
        lambda x: product(x, x),
        second_moment,
        eigenbasis,
        lambda x: next_eigenbasis(x, x),
        iterated_eigenbasis,
        lambda x: inverse_root(x, 4),
        lambda x: inverse_root(x, 4, method="newton"),
    ):
        products = [
            equation
            for equation in equations(jax.make_jaxpr(function)(x).jaxpr)
            if equation.primitive.name == "dot_general"
        ]
        assert products
        for equation in products:
            assert equation.params["precision"] == (highest, highest)


@each_dtype
def test_second_moment(dtype: str, x64) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 2, 4, 5)).astype(dtype)
    moment = np.asarray(second_moment(jnp.asarray(x)))
    assert moment.dtype == dtype
    # Sums of five products.
    rtol = 5 * float(jnp.finfo(dtype).eps)
    wanted = np.einsum("...ik,...jk->...ij", *[x.astype(float)] * 2)
    np.testing.assert_allclose(moment, wanted, rtol=0, atol=rtol * np.abs(wanted).max())


def test_second_moments_that_would_overflow() -> None:
    x = np.random.default_rng(0).standard_normal((4, 5)).astype("float32")
    x /= np.abs(x).max()
    limit = 2.0**50
    wanted = limit**2 * (x.astype(float) @ x.T.astype(float))
    for scale in (limit, 1e19, 1e30, 3e38):
        moment = np.asarray(second_moment(jnp.asarray(scale * x, "float32")))
        atol = 8 * 1.2e-7 * np.abs(wanted).max()
        np.testing.assert_allclose(moment, wanted, rtol=0, atol=atol)
    small = np.asarray(second_moment(jnp.asarray(2.0**-40 * x, "float32")))
    np.testing.assert_allclose(
        small, wanted * 2.0**-180, rtol=0, atol=6e-7 * np.abs(small).max()
    )


def test_second_moments_of_what_is_not_finite_and_of_nothing() -> None:
    x = np.ones((4, 2, 3), "float32")
    x[0, 0, 0], x[1, 1, 1], x[3] = np.nan, np.inf, 0.0
    moment = np.asarray(second_moment(jnp.asarray(x)))
    assert np.isnan(moment[0, 0, 0])
    assert not np.isfinite(moment[1]).all()
    np.testing.assert_array_equal(moment[2], 3.0)
    np.testing.assert_array_equal(moment[3], 0.0)
    assert second_moment(jnp.zeros((2, 0))).shape == (2, 2)
    np.testing.assert_array_equal(second_moment(jnp.zeros((2, 0))), 0.0)
    assert second_moment(jnp.zeros((0, 2))).shape == (0, 0)


# On TPUs


@pytest.mark.parametrize("columns", [1, 3, 4, 8, 11])
@each_dtype
def test_panels_are_the_columns_of_qr(columns: int, dtype: str, x64) -> None:
    rng = np.random.default_rng(columns)
    x = rng.standard_normal((2, 11, columns)).astype(dtype)
    q = np.asarray(compiled(lambda x: orthonormal(x, width=4), jnp.asarray(x)))
    assert q.dtype == dtype
    assert q.shape == x.shape
    assert_orthonormal(q)
    wanted = np.linalg.qr(x.astype(float))[0]
    signs = np.sign(np.sum(wanted * q, axis=-2, keepdims=True))
    # QR multiplies roundings by the condition number of its argument.
    atol = 11 * np.linalg.cond(x).max() * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(q, signs * wanted, atol=atol)


def test_panels_are_orthogonal_to_each_other_where_columns_are_alike() -> None:
    n = 12
    x = np.stack([with_condition(c, n, seed=1) for c in (1e2, 1e4, 1e6)])
    q = np.asarray(compiled(lambda x: orthonormal(x, width=4), jnp.float32(x)))
    assert_orthonormal(q)


def test_panels_of_nothing() -> None:
    for shape in ((0, 3, 2), (3, 0), (0, 0)):
        assert orthonormal(jnp.zeros(shape)).shape == shape


def test_panels_poison_their_matrix_alone() -> None:
    x = np.stack([np.eye(5, dtype="float32")] * 2)
    x[0, 1, 4] = np.nan
    q = np.asarray(compiled(lambda x: orthonormal(x, width=2), jnp.asarray(x)))
    assert np.isnan(q[0]).any()
    assert_orthonormal(q[1])


@each_dtype
def test_an_iteration_by_panels_is_an_iteration(dtype: str, x64) -> None:
    x = with_condition(20.0, 130).astype(dtype)
    start = np.linalg.qr(np.random.default_rng(0).standard_normal((130, 130)))[0]
    start = start.astype(dtype)
    basis, order = compiled(
        lambda x, q: next_eigenbasis(x, q, by_panels=True),
        jnp.asarray(x),
        jnp.asarray(start),
    )
    wanted, wanted_order = step(x, start)
    np.testing.assert_array_equal(order, wanted_order)
    signs = np.sign(np.sum(wanted * basis, axis=0))
    # Roundings of two decompositions times the condition number.
    atol = 2 * 130 * 20 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(basis, signs * wanted, atol=atol)


def off_diagonal(x: np.ndarray, basis: np.ndarray) -> float:
    """How much of QᵀXQ is not on its diagonal, in Frobenius norms."""
    turned = basis.T.astype(float) @ x.astype(float) @ basis.astype(float)
    diagonal = np.diag(np.diag(turned))
    return float(np.linalg.norm(turned - diagonal) / np.linalg.norm(turned))


def test_iterations_from_the_identity_come_near_an_eigenbasis() -> None:
    rng = np.random.default_rng(0)
    n = 32
    noise = rng.standard_normal((n, 4 * n))
    few = rng.standard_normal((n, n // 4))
    steep = with_spectrum(np.arange(1.0, n + 1) ** -2, seed=2)
    x = np.stack([noise @ noise.T, few @ few.T, steep]).astype("float32")
    bases = np.asarray(compiled(iterated_eigenbasis, jnp.asarray(x)))
    assert_orthonormal(bases)
    for matrix, basis in zip(x, bases, strict=True):
        assert off_diagonal(matrix, np.eye(n)) > 0.4
        # Neighbours of eigenvalues 1 % apart are still mixed after 32 iterations.
        assert off_diagonal(matrix, basis) < 0.03
        values = np.sum(basis * (matrix @ basis), axis=0)
        assert (np.diff(values) <= 0.03 * values[0]).all()


def test_iterations_of_extreme_matrices() -> None:
    rng = np.random.default_rng(0)
    g = rng.standard_normal((N, 2))
    x = np.stack([1e30 * g @ g.T, 1e-30 * g @ g.T, np.zeros((N, N)), np.eye(N)])
    bases = np.asarray(compiled(iterated_eigenbasis, jnp.asarray(x, "float32")))
    assert_orthonormal(bases)
    np.testing.assert_array_equal(np.abs(bases[2:]), np.stack([np.eye(N)] * 2))
    x[0, 1, 2] = x[1, 0, 0] = np.nan
    bases = np.asarray(compiled(iterated_eigenbasis, jnp.asarray(x, "float32")))
    assert np.isnan(bases[:2]).all()
    assert_orthonormal(bases[2:])


@pytest.mark.parametrize("scale", mostly([1e-38], [1e-38, 1e-16, 1e18]))
def test_panels_of_small_and_large_matrices_are_orthogonal(scale: float) -> None:
    """Of the squares of gradients from 1e-19 to 1e9, of low rank."""
    g = np.random.default_rng(0).standard_normal((160, 8))
    x = jnp.asarray(scale * (g @ g.T), "float32")
    assert_orthonormal(np.asarray(compiled(iterated_eigenbasis, x)))
    basis, _ = compiled(lambda x: next_eigenbasis(x, jnp.eye(160), by_panels=True), x)
    assert_orthonormal(np.asarray(basis))


# Groups


SHAPES = [(4, 4), (2, 3, 4, 4), (0, 5, 5), (1, 5, 5), (2, 2)]


def lists(shapes: Any = SHAPES) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    gs = [rng.standard_normal(shape) for shape in shapes]
    return [jnp.asarray(g @ np.swapaxes(g, -1, -2), "float32") for g in gs]


def test_groups_are_the_same_as_one_by_one() -> None:
    def both(*xs: jax.Array) -> tuple[list[Any], list[Any]]:
        bases = [eigenbasis(x) for x in xs]
        return in_groups(lambda x: (eigenbasis(x),), xs), bases

    for x, (result,), wanted in zip(lists(), *compiled(both, *lists()), strict=True):
        assert result.shape == x.shape
        # Roundings of the products, over the gaps of eigenvalues, here at least 1e-2.
        np.testing.assert_allclose(
            np.abs(result), np.abs(wanted), rtol=0, atol=5 * 1.2e-7 / 1e-2
        )


def test_groups_of_several_lists_and_results_of_other_shapes() -> None:
    def both(*xs: jax.Array) -> tuple[list[Any], list[Any]]:
        # Any order of the columns but the first ones.
        bases = [jnp.flip(eigenbasis(x), axis=-1) for x in xs]
        alone = [next_eigenbasis(x, q) for x, q in zip(xs, bases, strict=True)]
        return in_groups(next_eigenbasis, xs, bases), alone

    for x, result, wanted in zip(lists(), *compiled(both, *lists()), strict=True):
        for y, z, shape in zip(result, wanted, (x.shape, x.shape[:-1]), strict=True):
            assert y.shape == shape
            np.testing.assert_allclose(y, z, rtol=0, atol=5 * 1.2e-7 / 1e-2)


def test_groups_of_nothing() -> None:
    assert in_groups(lambda x: (x,), []) == []
    (result,) = in_groups(lambda x: (x, x[..., 0]), [jnp.zeros((2, 0, 3, 3))])
    assert [x.shape for x in result] == [(2, 0, 3, 3), (2, 0, 3)]


def test_one_decomposition_for_each_size() -> None:
    def bases(*xs: jax.Array) -> list[Any]:
        return in_groups(lambda x: (eigenbasis(x),), xs)

    def steps(*xs: jax.Array) -> list[Any]:
        return in_groups(next_eigenbasis, xs, xs)

    for function, kind in ((bases, "eigh"), (steps, "qr")):
        one = primitives(jax.make_jaxpr(function)(jnp.ones((4, 4))).jaxpr)[kind]
        many = primitives(jax.make_jaxpr(function)(*lists()).jaxpr)[kind]
        assert one >= 1
        assert many == 3 * one
