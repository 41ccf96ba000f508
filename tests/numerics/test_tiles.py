"""Tiles against blocks cut by hand, and the way back."""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from optaxplus.numerics.matrix_axes import MatrixAxes
from optaxplus.numerics.tiles import Tiling, tile

M = MatrixAxes
MATRIX = M((-2,), (-1,))

# axes, shape, max_dim, size of a tile, tiles down and right
CUTS = {
    "whole": (MATRIX, (6, 4), None, (6, 4), (1, 1)),
    "large enough": (MATRIX, (6, 4), 6, (6, 4), (1, 1)),
    "rows": (MATRIX, (6, 4), 4, (3, 4), (2, 1)),
    "columns": (MATRIX, (4, 6), 5, (4, 3), (1, 2)),
    "both": (MATRIX, (6, 8), 3, (3, 2), (2, 4)),
    "single entries": (MATRIX, (3, 2), 1, (1, 1), (3, 2)),
    "stack": (MATRIX, (2, 3, 6, 4), 2, (2, 2), (3, 2)),
    "transposed": (M((1,), (0,)), (6, 4), 3, (2, 3), (2, 2)),
    "batch inside": (M((0,), (2,)), (4, 3, 6), 4, (4, 3), (1, 2)),
    "heads": (M((0,), (1, 2)), (4, 2, 6), 4, (4, 4), (1, 3)),
    "two rows": (M((2, 0), (1,)), (2, 4, 3), 3, (3, 2), (2, 2)),
    "convolution": (M((0, 1, 2), (3,)), (2, 2, 3, 4), 6, (6, 4), (2, 1)),
    "vector": (M((), (0,)), (12,), 5, (1, 4), (1, 3)),
    "stacked vectors": (M((), (1,)), (3, 8), 4, (1, 4), (1, 2)),
    "scalar": (M((), ()), (), 4, (1, 1), (1, 1)),
    "splits": (M((0,), (1,), (3, 3)), (4, 6), None, (4, 3), (1, 2)),
    "splits in a stack": (M((1,), (2,), (4, 4)), (2, 4, 8), 2, (2, 2), (2, 4)),
    "splits of several widths": (M((0,), (1,), (6, 3, 3)), (4, 12), 8, (4, 3), (1, 4)),
    "splits of heads": (M((0,), (1, 2), (4, 2)), (2, 3, 2), None, (2, 2), (1, 3)),
    "no rows": (MATRIX, (0, 4), 2, (0, 2), (1, 2)),
    "no columns": (MATRIX, (2, 4, 0), 2, (2, 0), (2, 1)),
    "no matrices": (MATRIX, (0, 4, 4), 2, (2, 2), (2, 2)),
    "a quarter": (MATRIX, (22, 7), 8, (2, 7), (11, 1)),
}


def numbered(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(math.prod(shape), dtype="float32").reshape(shape)


def matrices_of(x: np.ndarray, axes: MatrixAxes) -> np.ndarray:
    """(*batch, rows, columns), all splits side by side."""
    sides = [[axis % x.ndim for axis in side] for side in (axes.fan_in, axes.fan_out)]
    batch = [axis for axis in range(x.ndim) if axis not in sides[0] + sides[1]]
    sizes = [math.prod(x.shape[axis] for axis in side) for side in sides]
    shape = [x.shape[axis] for axis in batch] + sizes
    return x.transpose(batch + sides[0] + sides[1]).reshape(shape)


def blocks(matrices: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The blocks of matrices row by row, as slices."""
    *batch, rows, columns = matrices.shape
    m, n = size
    down, right = rows // m if m else 1, columns // n if n else 1
    cut = [
        matrices[..., i * m : (i + 1) * m, j * n : (j + 1) * n]
        for i in range(down)
        for j in range(right)
    ]
    return np.stack(cut, axis=len(batch))


def there_and_back(
    tilings: Sequence[Tiling], arrays: Sequence[np.ndarray]
) -> list[tuple[jax.Array, jax.Array]]:
    """Tiles of every array, and arrays of the tiles, in one program."""

    def both(arrays: Sequence[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
        pairs = zip(tilings, arrays, strict=True)
        tiles = [tiling.to_tiles(x) for tiling, x in pairs]
        pairs = zip(tilings, lax.optimization_barrier(tiles), strict=True)
        return [(x, tiling.from_tiles(x)) for tiling, x in pairs]

    options = {"xla_backend_optimization_level": 0}
    return jax.jit(both, compiler_options=options)(arrays)


def test_tiles_are_the_blocks() -> None:
    tilings = [tile(axes, shape, max_dim) for axes, shape, max_dim, *_ in CUTS.values()]
    arrays = [numbered(tiling.shape) for tiling in tilings]
    results = there_and_back(tilings, arrays)
    for name, tiling, x, (tiles, back) in zip(
        CUTS, tilings, arrays, results, strict=True
    ):
        axes, shape, _, size, counts = CUTS[name]
        assert (tiling.shape, tiling.size, tiling.counts) == (shape, size, counts), name
        assert tiles.shape == (*tiling.batch, *size), name
        np.testing.assert_array_equal(
            tiles, blocks(matrices_of(x, axes), size), err_msg=name
        )
        np.testing.assert_array_equal(back, x, err_msg=name)


def test_axes_come_out_non_negative() -> None:
    tiling = tile(MATRIX, (2, 4, 6), 3)
    assert tiling.axes == M((1,), (2,))
    assert tiling == Tiling(M((1,), (2,)), (2, 4, 6), (2, 3), (2, 2))
    assert hash(tiling) == hash(tile(M((1,), (2,)), (2, 4, 6), 3))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int32", "bool"])
def test_dtypes_stay(dtype: str) -> None:
    tiling = tile(MATRIX, (4, 4), 2)
    x = jnp.ones((4, 4), dtype)
    assert tiling.to_tiles(x).dtype == dtype
    assert tiling.from_tiles(tiling.to_tiles(x)).dtype == dtype


def test_abstract_and_traced_arrays() -> None:
    tiling = tile(MATRIX, (2, 4, 6), 3)
    x = jax.ShapeDtypeStruct((2, 4, 6), "float32")
    tiles = jax.eval_shape(tiling.to_tiles, x)
    assert tiles.shape == (2, 4, 2, 3)
    assert jax.eval_shape(tiling.from_tiles, tiles).shape == x.shape


def random_axes(rng: np.random.Generator) -> tuple[MatrixAxes, tuple[int, ...]]:
    rank = int(rng.integers(0, 5))
    shape = tuple(int(n) for n in rng.choice([1, 2, 3, 4, 6, 8, 11], rank))
    order = [int(axis) for axis in rng.permutation(rank)]
    first, second = sorted(int(n) for n in rng.integers(0, rank + 1, 2))
    fan_in, fan_out = tuple(order[:first]), tuple(order[first:second])
    if fan_in and not fan_out:
        fan_in, fan_out = (), fan_in
    width = math.prod(shape[axis] for axis in fan_out)
    cuts = sorted({int(n) for n in rng.integers(1, width + 1, 2)} | {width})
    splits = tuple(np.diff([0, *cuts]).tolist()) if fan_out else ()
    return M(fan_in, fan_out, splits if rng.integers(2) else ()), shape


def test_any_axes_there_and_back() -> None:
    rng = np.random.default_rng(0)
    tilings, all_axes = [], []
    for _ in range(60):
        axes, shape = random_axes(rng)
        max_dim = [None, 1, 2, 3, 4, 6, 9][int(rng.integers(7))]
        try:
            tiling = tile(axes, shape, max_dim)
        except ValueError:
            continue
        tilings.append(tiling)
        all_axes.append(axes)
        (m, n), (down, right) = tiling.size, tiling.counts
        rows, columns = matrices_of(numbered(shape), axes).shape[-2:]
        assert (m * down, n * right) == (rows, columns)
        assert max_dim is None or max(m, n) <= max_dim
        # No tile has columns of two splits.
        assert all(end % n == 0 for end in itertools.accumulate(axes.splits))
    assert len(tilings) > 40
    arrays = [numbered(tiling.shape) for tiling in tilings]
    results = there_and_back(tilings, arrays)
    for axes, tiling, x, (tiles, back) in zip(
        all_axes, tilings, arrays, results, strict=True
    ):
        wanted = blocks(matrices_of(x, axes), tiling.size)
        np.testing.assert_array_equal(tiles, wanted, err_msg=str(tiling))
        np.testing.assert_array_equal(back, x, err_msg=str(tiling))


@pytest.mark.parametrize("max_dim", range(1, 13))
def test_the_widest_even_tiles(max_dim: int) -> None:
    for size in range(1, 60):
        divisors = [n for n in range(1, max_dim + 1) if size % n == 0]
        widest = size if size <= max_dim else divisors[-1]
        for shape, side in (((size, 1), 0), ((1, size), 1)):
            if size > max_dim > 4 * widest:
                with pytest.raises(ValueError, match=f"^a side of {size} has no even"):
                    tile(MATRIX, shape, max_dim)
            else:
                tiling = tile(MATRIX, shape, max_dim)
                assert tiling.size[side] == widest
                assert tiling.counts[side] == size // widest


@pytest.mark.parametrize(
    ("axes", "shape", "message"),
    [
        (MATRIX, (7, 6), "a side of 7 has no even tiles of up to 6: the widest are 1"),
        (MATRIX, (6, 23), "a side of 23 has no even tiles of up to 6: .* are 1"),
        (M((0,), (1,), (7, 14)), (4, 21), "a side of 7 .* up to 6: the widest are 1"),
        (M((0,), (2,)), (4, 6), "axis 2 is out of range"),
        (M((0,), (1,), (2, 2)), (4, 6), "the splits add up to 4"),
        (M((1,), (-1,)), (4, 6), "names an axis twice"),
    ],
)
def test_what_is_refused(axes: MatrixAxes, shape: tuple[int, int], message: str):
    with pytest.raises(ValueError, match=message):
        tile(axes, shape, 6)
