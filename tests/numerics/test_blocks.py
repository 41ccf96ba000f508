"""Which entries of an array share a scale."""

import pytest

from optaxplus.numerics.quantization import blocks_of

SHAPES = [
    (2048, 8192),
    (1000, 3000),
    (2048, 16, 128),
    (16, 128, 2048),
    (3, 3, 64, 128),
    (4096,),
    (509, 64),
    (384, 5),
    (7,),
    (1,),
    (0, 3),
    (5, 0),
]


@pytest.mark.parametrize("block_size", [8, 64, 100, 256, 2048])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_cover_their_axis(shape: tuple[int, ...], block_size: int):
    blocks = blocks_of(shape, block_size)
    size, length = shape[blocks.axis], blocks.groups * blocks.group
    assert 1 <= length <= block_size
    assert size % blocks.group == 0
    # They hold all entries, and the last one at least one.
    assert (blocks.count - 1) * length < size <= blocks.count * length
    # As few as possible, but for room for groups of eight.
    rows = 8 if size % 8 == 0 else 4 if size % 4 == 0 else 2 if size % 2 == 0 else 1
    assert blocks.count <= -(-size // (block_size // rows * rows))
    if blocks.groups > 1:
        assert blocks.group == rows


@pytest.mark.parametrize(
    ("shape", "block_size", "axis"),
    [
        # The last but one, down to half a block.
        ((2048, 8192), 256, 0),
        ((128, 8192), 256, 0),
        ((4096, 128, 16), 256, 1),
        # The longest before the last of the others.
        ((2048, 16, 128), 256, 0),
        ((130, 200, 16, 128), 256, 1),
        # The longest of all.
        ((127, 8192), 256, 1),
        ((3, 3, 64, 127), 256, 3),
        ((127, 100), 256, 0),
        ((127, 100), 200, 0),
        ((4096,), 256, 0),
    ],
)
def test_axis_of_the_blocks(shape: tuple[int, ...], block_size: int, axis: int):
    assert blocks_of(shape, block_size).axis == axis
