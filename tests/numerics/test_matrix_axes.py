"""The view of an array as a batch of matrices, and the way back."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optaxplus.numerics.matrix_axes import (
    MatrixAxes,
    block_axes,
    block_shape,
    block_statistic,
    from_matrices,
    map_all_matrices,
    reduce_blocks,
    resolve_axes,
    scale_matrices,
    split_columns,
    spread_statistic,
    to_matrices,
)

_MATRIX = MatrixAxes((-2,), (-1,))

# axes, shape, einops-like subscripts of the same view written by hand
VIEWS = {
    "matrix": (MatrixAxes((0,), (1,)), (3, 4), "io->io"),
    "transposed": (MatrixAxes((1,), (0,)), (3, 4), "oi->io"),
    "negative": (MatrixAxes((-2,), (-1,)), (2, 3, 4), "bio->bio"),
    "heads": (MatrixAxes((0,), (1, 2)), (5, 2, 3), "ihd->ihd"),
    "out": (MatrixAxes((0, 1), (2,)), (2, 3, 5), "hdo->hdo"),
    "reordered": (MatrixAxes((2, 0), (1,)), (2, 5, 3), "aob->bao"),
    "batch_inside": (MatrixAxes((0,), (2,)), (3, 2, 4), "ibo->bio"),
    "two_batches": (MatrixAxes((1,), (3,)), (2, 3, 2, 4), "aibo->abio"),
    "convolution": (MatrixAxes((0, 1, 2), (3,)), (2, 2, 3, 4), "hwio->hwio"),
    "vector": (MatrixAxes((), (0,)), (5,), "o->o"),
    "stacked_vectors": (MatrixAxes((), (1,)), (2, 5), "bo->bo"),
    "scalar": (MatrixAxes((), ()), (), "->"),
}


def view_by_hand(x: np.ndarray, axes: MatrixAxes, subscripts: str) -> np.ndarray:
    batch = x.ndim - len(axes.fan_in) - len(axes.fan_out)
    permuted = np.einsum(subscripts, x)
    shape = permuted.shape
    rows = int(np.prod(shape[batch : batch + len(axes.fan_in)]))
    columns = int(np.prod(shape[batch + len(axes.fan_in) :]))
    return permuted.reshape(*shape[:batch], rows, columns)


def numbered(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def map_matrices(function, x, axes):
    """`map_all_matrices` of one array, split by split."""
    (result,) = map_all_matrices(
        lambda blocks: [function(block) for block in blocks], [x], [axes]
    )
    return result


@pytest.mark.parametrize("name", VIEWS)
def test_view_and_back(name: str):
    axes, shape, subscripts = VIEWS[name]
    axes = resolve_axes(axes, shape)
    x = numbered(shape)
    matrices = to_matrices(jnp.asarray(x), axes)
    np.testing.assert_array_equal(matrices, view_by_hand(x, axes, subscripts))
    np.testing.assert_array_equal(from_matrices(matrices, axes, shape), x)
    assert block_shape(axes, shape) == matrices.shape[-2:]


@pytest.mark.parametrize("name", VIEWS)
def test_map_matrices_shows_each_matrix_and_puts_it_back(name: str):
    axes, shape, subscripts = VIEWS[name]
    x = numbered(shape)
    seen = []

    def reversed_columns(matrices: jax.Array) -> jax.Array:
        seen.append(np.asarray(matrices))
        return matrices[..., ::-1]

    result = map_matrices(reversed_columns, jnp.asarray(x), axes)
    resolved = resolve_axes(axes, shape)
    by_hand = view_by_hand(x, resolved, subscripts)
    np.testing.assert_array_equal(np.stack(seen), by_hand[None])
    np.testing.assert_array_equal(
        to_matrices(result, resolved), view_by_hand(x, resolved, subscripts)[..., ::-1]
    )


def test_order_of_axes_is_the_order_of_flattening():
    x = numbered((2, 3, 4))
    first = to_matrices(jnp.asarray(x), MatrixAxes((0, 1), (2,)))
    second = to_matrices(jnp.asarray(x), MatrixAxes((1, 0), (2,)))
    np.testing.assert_array_equal(first, x.reshape(6, 4))
    np.testing.assert_array_equal(second, x.swapaxes(0, 1).reshape(6, 4))


@pytest.mark.parametrize("order", [*itertools.permutations(range(4))])
def test_permuting_the_array_and_its_axes_changes_nothing(order: tuple[int, ...]):
    axes, x = MatrixAxes((1, 2), (3,)), numbered((2, 3, 2, 4))
    moved = MatrixAxes(
        tuple(order.index(axis) for axis in axes.fan_in),
        tuple(order.index(axis) for axis in axes.fan_out),
    )
    np.testing.assert_array_equal(
        to_matrices(jnp.transpose(x, order), moved), to_matrices(jnp.asarray(x), axes)
    )


# Splits: fused projections stored side by side

SPLIT_VIEWS = {
    "last_axis": (MatrixAxes((0,), (1,), splits=(2, 2, 3)), (4, 7)),
    "stack": (MatrixAxes((1,), (2,), splits=(1, 5)), (2, 4, 6)),
    # (features, query/key/value, heads, head size), as some fused layers store it
    "own_axis": (MatrixAxes((0,), (1, 2, 3), splits=(4, 4, 4)), (5, 3, 2, 2)),
    "transposed": (MatrixAxes((1,), (0,), splits=(3, 3)), (6, 4)),
    "vector": (MatrixAxes((), (0,), splits=(2, 3)), (5,)),
}


@pytest.mark.parametrize("name", SPLIT_VIEWS)
def test_splits_are_matrices_of_their_own(name: str):
    axes, shape = SPLIT_VIEWS[name]
    x = jnp.asarray(numbered(shape)) + 1
    whole = to_matrices(x, resolve_axes(axes, shape))
    ends = np.cumsum(axes.splits)
    parts = [
        whole[..., end - size : end]
        for end, size in zip(ends, axes.splits, strict=True)
    ]
    for cut, part in zip(split_columns(whole, axes.splits), parts, strict=True):
        np.testing.assert_array_equal(cut, part)

    def share_of_total(matrices: jax.Array) -> jax.Array:
        return matrices / matrices.sum((-2, -1), keepdims=True)

    result = map_matrices(share_of_total, x, axes)
    expected = np.concatenate([share_of_total(part) for part in parts], axis=-1)
    # The same float32 operations, but a sum may be ordered differently.
    np.testing.assert_allclose(
        to_matrices(result, resolve_axes(axes, shape)), expected, rtol=1e-6
    )
    assert block_shape(axes, shape) == (whole.shape[-2], min(axes.splits))


def test_no_splits_is_one_matrix():
    x = jnp.ones((2, 3))
    assert split_columns(x, ()) == [x]


# One number per block


def total(block: jax.Array, over: tuple[int, ...]) -> jax.Array:
    return jnp.sum(block, axis=over, keepdims=True)


@pytest.mark.parametrize("name", VIEWS)
def test_reduced_blocks_broadcast_and_keep_the_batch(name: str):
    axes, shape, subscripts = VIEWS[name]
    x = numbered(shape)
    reduced = reduce_blocks(total, jnp.asarray(x), axes)
    resolved = resolve_axes(axes, shape)
    assert reduced.shape == tuple(
        1 if axis in block_axes(resolved) else size for axis, size in enumerate(shape)
    )
    by_hand = view_by_hand(x, resolved, subscripts).sum(axis=(-2, -1))
    # Sums of small integers are exact in float32.
    np.testing.assert_array_equal(reduced.ravel(), by_hand.ravel())


def test_reduced_splits_have_the_full_width():
    x = jnp.asarray([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    reduced = reduce_blocks(total, x, MatrixAxes((0,), (1,), splits=(1, 2)))
    np.testing.assert_array_equal(reduced, [[5.0, 16.0, 16.0]])


# axes, shape, shape of the stored statistic
STORED = {
    "one_split": (MatrixAxes((0,), (1,), splits=(4,)), (3, 4), (1, 1)),
    "last_axis": (MatrixAxes((0,), (1,), splits=(2, 2, 3)), (4, 7), (1, 3)),
    "negative": (MatrixAxes((-2,), (-1,), splits=(1, 5)), (2, 4, 6), (2, 1, 2)),
    "own_axis": (
        MatrixAxes((0,), (1, 2, 3), splits=(4, 8)),
        (5, 3, 2, 2),
        (1, 2, 1, 1),
    ),
    "transposed": (MatrixAxes((1,), (0,), splits=(1, 2, 3)), (6, 4), (3, 1)),
    "reordered": (MatrixAxes((0,), (3, 1), splits=(6, 2)), (5, 2, 3, 4), (1, 1, 3, 2)),
    "vector": (MatrixAxes((), (0,), splits=(2, 3)), (5,), (2,)),
    "batch_behind": (MatrixAxes((0,), (1,), splits=(1, 1)), (3, 2, 4), (1, 2, 4)),
}


@pytest.mark.parametrize("name", STORED)
def test_stored_statistic_has_one_number_a_split(name: str):
    axes, shape, stored = STORED[name]
    x = numbered(shape)
    statistic = block_statistic(total, jnp.asarray(x), axes)
    assert statistic.shape == stored
    resolved = resolve_axes(axes, shape)
    matrices = np.asarray(to_matrices(jnp.asarray(x), resolved))
    ends = np.cumsum((0, *axes.splits))
    sums = np.stack(
        [
            matrices[..., start:end].sum(axis=(-2, -1))
            for start, end in itertools.pairwise(ends)
        ],
        axis=-1,
    )
    # Sums of small integers are exact in float32.
    np.testing.assert_array_equal(to_matrices(statistic, resolved)[..., 0, :], sums)
    # Spread, every column has the number of its split.
    spread = spread_statistic(statistic, axes, shape)
    columns = np.repeat(sums, axes.splits, axis=-1)[..., None, :]
    whole = from_matrices(jnp.broadcast_to(columns, matrices.shape), resolved, shape)
    np.testing.assert_array_equal(jnp.broadcast_to(spread, shape), whole)
    np.testing.assert_array_equal(reduce_blocks(total, x, axes), spread)
    # Rows are left to broadcasting.
    assert {spread.shape[axis] for axis in resolved.fan_in} <= {1}


@pytest.mark.parametrize("name", VIEWS)
def test_statistic_without_splits_is_stored_as_it_broadcasts(name: str):
    axes, shape, _ = VIEWS[name]
    x = jnp.asarray(numbered(shape))
    statistic = block_statistic(total, x, axes)
    np.testing.assert_array_equal(statistic, reduce_blocks(total, x, axes))
    assert spread_statistic(statistic, axes, shape) is statistic


def test_splits_are_spread_inside_a_program():
    # Their sizes have to be static there.
    axes = MatrixAxes((0,), (1,), splits=(1, 2))
    x = jnp.asarray([[1.0, 2.0, 3.0]])
    spread = jax.jit(lambda x: reduce_blocks(total, x, axes))(x)
    np.testing.assert_array_equal(spread, [[1.0, 5.0, 5.0]])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 2, 3), (2, 0, 3)])
def test_empty_arrays_keep_their_shape(shape: tuple[int, ...]):
    result = map_matrices(lambda matrices: matrices * 2, jnp.zeros(shape), _MATRIX)
    assert result.shape == shape
    assert reduce_blocks(total, jnp.zeros(shape), _MATRIX).size == np.prod(shape[:-2])


# The value itself


def test_matrix_axes_are_values_and_leaves():
    axes = MatrixAxes((0,), (1, 2))
    assert axes == MatrixAxes((0,), (1, 2), ())
    assert hash(axes) == hash(MatrixAxes((0,), (1, 2)))
    assert axes != MatrixAxes((0,), (2, 1))
    assert jax.tree.leaves({"w": axes}) == [axes]
    assert axes.is_matrix
    assert not MatrixAxes((), (0,)).is_matrix
    assert not MatrixAxes((0,), ()).is_matrix
    assert not MatrixAxes((), ()).is_matrix


def test_resolved_axes_are_non_negative_and_stay():
    shape = (2, 3, 5, 4)
    axes = resolve_axes(MatrixAxes((-3, 2), (-1,), splits=(2, 2)), shape)
    assert axes == MatrixAxes((1, 2), (3,), splits=(2, 2))
    assert resolve_axes(axes, shape) == axes


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fan_in": [0], "fan_out": (1,)}, r"MatrixAxes: fan_in=\[0\] .* tuple of int"),
        ({"fan_in": (0,), "fan_out": 1}, r"MatrixAxes: fan_out=1 is not allowed"),
        ({"fan_in": (0,), "fan_out": (1.0,)}, r"fan_out=\(1.0,\) is not allowed"),
        ({"fan_in": (False,), "fan_out": (1,)}, r"fan_in=\(False,\) is not allowed"),
        ({"fan_in": (0,), "fan_out": "1"}, r"fan_out='1' is not allowed"),
        (
            {"fan_in": (0,), "fan_out": (1,), "splits": 3},
            r"MatrixAxes: splits=3 is not allowed; it must be a tuple of integers",
        ),
    ],
)
def test_wrong_types_are_refused(arguments, message: str):
    with pytest.raises(TypeError, match=message):
        MatrixAxes(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"fan_in": (0,), "fan_out": (0,)},
            r"MatrixAxes: fan_in=\(0,\), fan_out=\(0,\) is not allowed; .* only once",
        ),
        ({"fan_in": (1, 1), "fan_out": (0,)}, "named only once"),
        (
            {"fan_in": (0,), "fan_out": (1,), "splits": (2, 0)},
            r"MatrixAxes: splits=\(2, 0\) is not allowed; sizes must be > 0",
        ),
        ({"fan_in": (0,), "fan_out": (1,), "splits": (4, -1)}, "sizes must be > 0"),
    ],
)
def test_impossible_axes_are_refused(arguments, message: str):
    with pytest.raises(ValueError, match=message):
        MatrixAxes(**arguments)


@pytest.mark.parametrize(
    ("axes", "shape", "message"),
    [
        (MatrixAxes((0,), (2,)), (3, 4), r"shape \(3, 4\): axis 2 is out of range"),
        (MatrixAxes((-3,), (-1,)), (3, 4), "axis -3 is out of range"),
        (MatrixAxes((), (0,)), (), "axis 0 is out of range"),
        (MatrixAxes((1,), (-1,)), (3, 4), "it names an axis twice"),
        (
            MatrixAxes((0,), (1,), splits=(2, 3)),
            (3, 4),
            r"the splits add up to 5, the flattened fan_out has 4",
        ),
    ],
)
@pytest.mark.parametrize(
    "user",
    ["resolve_axes", "map_all_matrices", "block_shape", "block_statistic", "spread"],
)
def test_axes_that_do_not_fit_are_refused(axes, shape, message: str, user: str):
    call = {
        "resolve_axes": lambda: resolve_axes(axes, shape),
        "map_all_matrices": lambda: map_matrices(lambda x: x, jnp.zeros(shape), axes),
        "block_shape": lambda: block_shape(axes, shape),
        "block_statistic": lambda: block_statistic(total, jnp.zeros(shape), axes),
        "spread": lambda: spread_statistic(jnp.zeros(shape), axes, shape),
    }[user]
    with pytest.raises(ValueError, match=message):
        call()


def test_scale_matrices_knows_each_split_by_its_shape():
    x = jnp.ones((2, 6, 3, 4))
    axes = MatrixAxes((1,), (3, 2), (3, 9))
    scaled = scale_matrices(x, axes, lambda rows, columns: rows + 10 * columns)
    expected = map_matrices(
        lambda block: block * (block.shape[-2] + 10 * block.shape[-1]), x, axes
    )
    np.testing.assert_array_equal(scaled, expected)
    assert sorted(set(np.asarray(scaled).ravel())) == [36, 96]
    whole = MatrixAxes((1,), (2, 3))
    np.testing.assert_array_equal(scale_matrices(x, whole, lambda *_: 2.0), 2 * x)
    empty = jnp.zeros((0, 4))
    assert scale_matrices(empty, MatrixAxes((0,), (1,)), lambda m, n: n / m).size == 0
