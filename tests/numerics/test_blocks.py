"""Which entries of an array share a scale."""

import math

import pytest

from optaxplus.numerics.quantization import blocks_of

SHAPES = [
    (2048, 8192),
    (768, 3072),
    (1280, 1280),
    (1600, 6400),
    (11008, 4096),
    (1000, 3000),
    (2048, 16, 128),
    (16, 128, 2048),
    (3, 3, 64, 128),
    (4096,),
    (384, 5),
    (7,),
    (1,),
    (0, 3),
    (5, 0),
    # Sizes with large odd factors.
    (509, 64),
    (5000, 64),
    (50257, 768),
]


@pytest.mark.parametrize("block_size", [8, 64, 100, 256, 2048])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_cover_their_axis(shape: tuple[int, ...], block_size: int):
    blocks = blocks_of(shape, block_size)
    size, length = shape[blocks.axis], blocks.groups * blocks.group
    assert size % blocks.group == 0
    # They hold all entries, and the last one at least one.
    assert (blocks.count - 1) * length < size <= blocks.count * length
    rows = math.gcd(8, size)  # 0 of an empty axis
    odd = size // (size & -size) if size else 0
    shortest = max(odd, rows * odd if odd > 1 else 0)
    if shortest <= 4 * block_size:
        assert length * blocks.count == max(1, size)
        assert length <= max(2**0.5 * block_size, shortest)
        assert blocks.count == 1 or length >= 2**-0.5 * block_size
        # What the compiler for TPUs can reduce.
        assert blocks.groups == 1 or blocks.group == rows
    else:
        assert blocks.group == rows
        assert block_size / 2 <= length <= block_size


@pytest.mark.parametrize("devices", [2, 8, 64, 256])
@pytest.mark.parametrize("size", [512, 768, 1024, 1280, 1536, 1792, 5120, 11008, 13824])
def test_no_block_is_shared_out_unevenly(size: int, devices: int):
    blocks = blocks_of((size, 64), 256)
    piece, length = size // devices, blocks.groups * blocks.group
    assert size % devices == 0
    assert piece % length == 0 or length % piece == 0


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
