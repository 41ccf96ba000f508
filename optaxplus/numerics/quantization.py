"""Arrays in 8 bits: a code of one byte for every entry, a scale for every block.

    x ≈ s·f(c),      s = max |x| of the block,      c an integer, f(c) in [-1, 1]

"root":     f(c) = sign(c)·(c/127)², or (c/255)⁴ where no x is negative
"dynamic":  f(c) = the c-th entry of the map of bitsandbytes, see `dynamic_map`

Codes have the shape of the array. Blocks lie along one axis, the last but one if it is
long enough: a maximum along the last axis, in which TPUs and vector units lay out their
lanes, costs several times as much.

"root" is the square root of a gradient's size in both: non-negative arrays hold squares
of gradients. It changes the updates of Adam, and first moments themselves, less than
other powers, logarithms, floating-point formats and the map of bitsandbytes do, see
benchmarks/state_codes.py, and needs no table, which a TPU would be slow to look up.

An average that moves by less than half of the gap between two codes in a step would not
move at all if its root were rounded to the nearest. So "root" rounds it up in as large
a share of the steps as it is above the lower one:

    c <- nearest(root + u),      u = (i + j + step)·φ mod 1, from -1/2 to 1/2

With the golden ratio φ, the shifts u of the entry with index i along the block and j
along the last axis fill their range evenly over any number of steps, and over a block,
with less error than random ones.

Sources: Dettmers et al., 8-bit optimizers via block-wise quantization, arXiv
2110.02861, sections 2.1 and 2.2, for blocks and the dynamic map; FlashOptim, arXiv
2602.23349, for codes by arithmetic; Weyl, Über die Gleichverteilung von Zahlen mod.
Eins, Math. Ann. 77 (1916), for the shifts.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from optaxplus.numerics.explicit_axes import explicit_axes, left_to_compiler
from optaxplus.numerics.rounding import even_shifts

__all__ = [
    "CODES",
    "Blocks",
    "Code",
    "blocks_of",
    "dequantize",
    "dynamic_map",
    "quantize",
    "root_code",
]

# Compilers take numbers below this for 0.
_TINY = float(np.finfo(np.float32).tiny)
# Of larger numbers, four times the inverse is neither 0 nor infinite.
_SMALLEST_SCALE = 4 * _TINY

# Adding it to a float32 leaves the nearest integer in the low bits, ties to even.
_ROUNDER = 1.5 * 2.0**23


@dataclass(frozen=True)
class Blocks:
    """Which entries of an array share a scale.

    Attributes:
      axis: The axis along which blocks lie, non-negative.
      count: Blocks along the axis.
      groups: Groups of a block; the last block may have fewer.
      group: Entries of a group. Groups divide the axis, so that its blocks can be
        found without padding an array.
    """

    axis: int
    count: int
    groups: int
    group: int


def blocks_of(shape: tuple[int, ...], block_size: int) -> Blocks:
    """The blocks of an array.

    They lie along the last axis but one if that has at least block_size / 2 entries,
    else along the longest axis before the last of which the same is true, else along
    the longest axis.

    The axis is halved until its parts have 0.7 to 1.4 times block_size entries, or a
    multiple of eight that is no longer one if halved, so that blocks and the pieces of
    2^k devices contain each other. If that leaves more than 4 block_size, blocks have
    at most block_size entries, equally many but for the last.
    """
    long = [axis for axis in range(len(shape) - 1) if 2 * shape[axis] >= block_size]
    if long:
        axis = long[-1] if long[-1] == len(shape) - 2 else max(long, key=_at(shape))
    else:
        axis = max(range(len(shape)), key=_at(shape))
    size, count = max(1, shape[axis]), 1
    # TPUs reduce a power of two, or the eight rows of a register, where they compute
    # them. With other lengths their compiler keeps all that is reduced, or aborts.
    rows = math.gcd(8, size)
    while size % (2 * count * rows) == 0 and size**2 > 2 * (count * block_size) ** 2:
        count *= 2
    length = size // count
    if length <= 4 * block_size:
        group = length if length.bit_count() == 1 else rows
        return Blocks(axis, count, length // group, group)
    count = -(-size // (block_size // rows * rows))
    return Blocks(axis, count, -(-size // (rows * count)), rows)


def _at(shape: tuple[int, ...]) -> Callable[[int], int]:
    return lambda axis: shape[axis]


# Compiled by itself so that a call outside of `jax.jit` compiles only once.
_compiled = functools.partial(
    jax.jit, static_argnames=("signed", "code", "block_size"), inline=True
)


@_compiled
def quantize(
    x: jax.Array,
    *,
    signed: bool,
    code: str = "root",
    block_size: int = 256,
    step: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of an array.

    Args:
      x: Real floating-point array with at least one axis.
      signed: Whether entries may be negative. A positive entry of an unsigned array
        never gets the code of 0.
      code: Name in `CODES`.
      block_size: About how many entries share a scale, see `blocks_of`.
      step: Of the shifts of "root", shape (), int32; None rounds to the nearest.
        "dynamic" always does, as bitsandbytes.

    Returns:
      Codes of the shape of `x`, int8 for the signed "root" and uint8 otherwise, and
      scales in the dtype of `x`, at least float32, with one entry a block in the axis
      of `blocks_of`. Entries that are not finite leave the scale alone; see `CODES`
      for what becomes of them.
    """
    blocks = blocks_of(x.shape, block_size)
    sharding = jax.typeof(x).sharding

    def inside(x: jax.Array, step: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        size = jnp.abs(wide)
        finite = jnp.where(size < jnp.inf, size, 0.0)
        scales = _block_max(jnp.maximum(finite, _SMALLEST_SCALE), blocks)
        ratio = _ratio(size, scales, blocks).astype(jnp.float32)
        sign = wide.astype(jnp.float32) if signed else None
        last = x.ndim - 1
        axes = {max(0, last - 1) if blocks.axis == last else blocks.axis, last}
        shift = 0.0 if step is None else even_shifts(step, x.shape, axes)
        return CODES[code].encode(ratio, sign, shift), scales

    shardings = sharding, _scales_sharding(sharding, x.shape, blocks)
    return left_to_compiler(inside, x, shardings=shardings, step=step)


@_compiled
def dequantize(
    codes: jax.Array,
    scales: jax.Array,
    *,
    signed: bool,
    code: str = "root",
    block_size: int = 256,
) -> jax.Array:
    """The array of which these are the codes and scales, in the dtype of the scales."""
    blocks = blocks_of(codes.shape, block_size)

    def inside(codes: jax.Array, scales: jax.Array) -> jax.Array:
        ratio = CODES[code].decode(codes, signed).astype(scales.dtype)
        x = ratio * _spread(scales, blocks, codes.shape)
        # What was positive stays so where the product underflows.
        return x if signed else jnp.maximum(x, _TINY)

    return left_to_compiler(inside, codes, scales, shardings=jax.typeof(codes).sharding)


def _scales_sharding(
    sharding: NamedSharding, shape: tuple[int, ...], blocks: Blocks
) -> NamedSharding:
    """That of the array, without mesh axes that would cut blocks.

    Where those count more than eight devices, they cut another axis instead: scales on
    all of them would take more memory than an eighth of the codes.
    """
    mesh = sharding.mesh
    if not explicit_axes(mesh):
        return sharding
    names = [
        (entry if isinstance(entry, tuple) else (entry,)) if entry else ()
        for entry in sharding.spec
    ]

    def divides(names: tuple[str, ...], length: int) -> bool:
        return length % math.prod(mesh.shape[name] for name in names) == 0

    cut = names[blocks.axis]
    whole = next(n for n in range(len(cut), -1, -1) if divides(cut[:n], blocks.count))
    names[blocks.axis], others = cut[:whole], cut[whole:]
    if math.prod(mesh.shape[name] for name in others) > 8:
        for axis in reversed(range(len(shape))):
            if axis != blocks.axis and divides(names[axis] + others, shape[axis]):
                names[axis] += others
                break
    return NamedSharding(mesh, PartitionSpec(*(entry or None for entry in names)))


def _block_max(x: jax.Array, blocks: Blocks) -> jax.Array:
    """The largest entry of every block; `x` is not negative."""
    axis = blocks.axis
    x = _max_in_parts(x, axis, blocks.group)
    missing = blocks.count * blocks.groups - x.shape[axis]
    if missing:
        x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
    return _max_in_parts(x, axis, blocks.groups)


def _ratio(size: jax.Array, scales: jax.Array, blocks: Blocks) -> jax.Array:
    """`size` over the scale of its block."""

    def multiplied(size: jax.Array, scales: jax.Array) -> jax.Array:
        # The division also keeps XLA from finding the maximum anew for every entry.
        return 0.25 * size * _spread(4.0 / scales, blocks, size.shape)

    def divided(size: jax.Array, scales: jax.Array) -> jax.Array:
        # Inverse scales would be one more loop on an accelerator.
        return size / _spread(scales, blocks, size.shape)

    return lax.platform_dependent(size, scales, cpu=multiplied, default=divided)


def _max_in_parts(x: jax.Array, axis: int, length: int) -> jax.Array:
    """The largest of every `length` entries along an axis."""
    count = x.shape[axis] // length
    x = x.reshape(*x.shape[:axis], count, length, *x.shape[axis + 1 :])
    return lax.platform_dependent(
        x, cpu=lambda x: _max_of_slices(x, axis + 1), default=lambda x: x.max(axis + 1)
    )


def _max_of_slices(x: jax.Array, axis: int) -> jax.Array:
    """`x.max(axis)` as maxima of slices, at most eight at a time.

    XLA computes what it reduces before it reduces it on CPUs, and keeps all of it;
    slices it computes on the way.
    """
    while (length := x.shape[axis]) > 1:
        divisors = [n for n in range(2, 9) if length % n == 0]
        if not divisors:
            return x.max(axis)
        # Neighbours first: they are on one device, whose piece may be shorter by a
        # power of two.
        last = _odd_part(length) == 1
        parts = min(divisors, key=lambda n: (_odd_part(length // n), -n if last else n))
        x = x.reshape(*x.shape[:axis], length // parts, parts, *x.shape[axis + 1 :])
        slices = [
            lax.index_in_dim(x, i, axis + 1, keepdims=False) for i in range(parts)
        ]
        x = functools.reduce(jnp.maximum, slices)
    return lax.squeeze(x, (axis,))


def _odd_part(n: int) -> int:
    return n // (n & -n)


def _spread(scales: jax.Array, blocks: Blocks, shape: tuple[int, ...]) -> jax.Array:
    """One scale for every entry of an array of `shape`."""
    axis = blocks.axis
    x = _repeated(scales, axis, blocks.groups)
    x = lax.slice_in_dim(x, 0, shape[axis] // blocks.group, axis=axis)
    return _repeated(x, axis, blocks.group)


def _repeated(x: jax.Array, axis: int, times: int) -> jax.Array:
    before, length, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    x = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), (*before, length, times, *after))
    return x.reshape(*before, length * times, *after)


@dataclass(frozen=True)
class Code:
    """A code for numbers in [-1, 1].

    Attributes:
      encode: (ratios, signs, shifts) -> codes. Ratios are the sizes of the numbers,
        float32, and may exceed 1 by a rounding; the second argument has their signs,
        and is None if none is negative; the third is added before rounding, from
        -1/2 to 1/2.
      decode: (codes, signed) -> float32 ratios.
    """

    encode: Callable[[jax.Array, jax.Array | None, jax.Array | float], jax.Array]
    decode: Callable[[jax.Array, bool], jax.Array]


def root_code(sizes: int = 127, unsigned_sizes: int = 255) -> Code:
    """The code that is a rounded root.

    What is not finite becomes 0 if numbers may be negative, and else infinite: the code
    0 of numbers that may not is of no other use, because none of them is 0 then.

    Args:
      sizes: Sizes besides 0 of a number that may be negative. <= 127.
      unsigned_sizes: Sizes of a number that may not. <= 255.
    """
    smallest = float(unsigned_sizes) ** -4

    def encode(
        ratio: jax.Array, sign: jax.Array | None, shift: jax.Array | float
    ) -> jax.Array:
        if sign is None:
            root = jnp.sqrt(jnp.sqrt(jnp.maximum(ratio, smallest)))
            code = jnp.maximum(unsigned_sizes * root + shift, 1.0)
            code = jnp.minimum(code, unsigned_sizes)
            return _nearest(jnp.where(ratio < jnp.inf, code, 0.0)).astype(jnp.uint8)
        # Sizes from -0.5 on, of which the negative ones are rounded to 0.
        # Between 0 and 1 the share of steps is x itself: of its root it would be large.
        size = jnp.minimum(sizes * jnp.sqrt(ratio), sizes**2 * ratio)
        code = jnp.minimum(size + shift, sizes)
        code = jnp.where(ratio < jnp.inf, code, 0.0)
        sign_bit = _bits(sign) & np.int32(-(2**31))
        signed_code = lax.bitcast_convert_type(_bits(code) | sign_bit, jnp.float32)
        return _nearest(signed_code).astype(jnp.int8)

    def decode(codes: jax.Array, signed: bool) -> jax.Array:
        root = codes.astype(jnp.float32) * (1.0 / (sizes if signed else unsigned_sizes))
        if signed:
            return root * jnp.abs(root)
        square = root * root
        return jnp.where(codes == 0, jnp.inf, square * square)

    return Code(encode, decode)


def _nearest(x: jax.Array) -> jax.Array:
    """The nearest integer, ties to even, in the low bits of an int32; |x| < 2^22."""
    return _bits(x + _ROUNDER)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def dynamic_map(signed: bool) -> np.ndarray:
    """The 256 entries of bitsandbytes' `create_dynamic_map`, float32, ascending.

    Seven decades, with twice as many entries in each as in the next smaller one, 0
    and 1. Not symmetric: there is no -1.
    """
    low, high, values = np.float32(0.1), np.float32(1.0), [0.0, 1.0]
    for exponent in range(7):
        bins = 2**exponent * (1 if signed else 2)
        # Edges at equal distances, computed from the nearer end, as PyTorch does.
        step, i = float((high - low) / np.float32(bins)), np.arange(bins + 1)
        from_low, from_high = float(low) + step * i, float(high) - step * (bins - i)
        edges = np.where(2 * i < bins, from_low, from_high).astype(np.float32)
        centers = (edges[:-1] + edges[1:]) / 2 * np.float32(10.0 ** (exponent - 6))
        values += [*centers, *(-centers if signed else ())]
    return np.sort(np.asarray(values, np.float32))


def _encode_dynamic(
    ratio: jax.Array, sign: jax.Array | None, shift: jax.Array | float
) -> jax.Array:
    del shift  # bitsandbytes rounds to the nearest
    table = dynamic_map(signed=sign is not None)
    midpoints = (table[1:] + table[:-1]) / 2
    x = ratio if sign is None else jnp.where(jnp.signbit(sign), -ratio, ratio)
    # What is in the middle of two entries goes up; what is not finite goes to an end,
    # because no entry is left for it.
    codes = jnp.searchsorted(midpoints, x, side="right")
    if sign is None:
        codes = jnp.maximum(codes, 1)
    return codes.astype(jnp.uint8)


def _decode_dynamic(codes: jax.Array, signed: bool) -> jax.Array:
    return jnp.asarray(dynamic_map(signed))[codes.astype(jnp.int32)]


# By name; `root_code` and `_encode_dynamic` say what becomes of NaN.
CODES: dict[str, Code] = {
    "root": root_code(),
    "dynamic": Code(_encode_dynamic, _decode_dynamic),
}
