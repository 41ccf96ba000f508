"""Codes and scales as NumPy arrays, and what they stand for in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optaxplus.numerics.quantization import dequantize, dynamic_map, quantize

KINDS = [
    ("root", True),
    ("root", False),
    ("dynamic", True),
    ("dynamic", False),
]
every_kind = pytest.mark.parametrize(
    ("code", "signed"),
    KINDS,
    ids=[f"{code}-{'signed' if signed else 'unsigned'}" for code, signed in KINDS],
)

signs = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])

STATIC = ("signed", "code", "block_size")
_encode = jax.jit(quantize, static_argnames=STATIC)
_decode = jax.jit(dequantize, static_argnames=STATIC)


def encoded(x, code: str, signed: bool, **options) -> tuple[np.ndarray, np.ndarray]:
    codes, scales = _encode(jnp.asarray(x), code=code, signed=signed, **options)
    return np.array(codes), np.array(scales)


def decoded(codes, scales, code: str, signed: bool, **options) -> np.ndarray:
    codes, scales = jnp.asarray(codes), jnp.asarray(scales)
    return np.asarray(_decode(codes, scales, code=code, signed=signed, **options))


def round_trip(x, code: str, signed: bool, **options) -> np.ndarray:
    return decoded(*encoded(x, code, signed, **options), code, signed, **options)


def samples(
    shape: tuple[int, ...], signed: bool, decades: float = 7.0, seed: int = 0
) -> np.ndarray:
    """float32 numbers of sizes 10^-decades to 1."""
    rng = np.random.default_rng(seed)
    x = 10.0 ** rng.uniform(-decades, 0, shape)
    return (x * rng.choice([-1, 1], shape) if signed else x).astype(np.float32)


def by_columns(scales: np.ndarray, rows: int, block: int = 256) -> np.ndarray:
    """The scale of every entry of a matrix of `rows`, whose blocks lie along them."""
    return np.repeat(scales.astype(np.float64), block, axis=0)[:rows]


def exponent(signed: bool) -> int:
    """Of "root": first moments are coded by square roots, second ones by fourth."""
    return 2 if signed else 4


def codes_and_values(code: str, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """All codes that an entry may get, and what they stand for, in float64."""
    if code == "root":
        codes = np.arange(-127, 128) if signed else np.arange(1, 256)
        return codes, np.sign(codes) * (np.abs(codes) / codes[-1]) ** exponent(signed)
    codes = np.arange(256)[0 if signed else 1 :]
    return codes, dynamic_map(signed).astype(np.float64)[codes]


def measured(ratio: np.ndarray, code: str, signed: bool) -> np.ndarray:
    """In what the nearest code is the nearest: "root" rounds roots."""
    if code == "dynamic":
        return ratio
    root = np.abs(ratio) ** (1 / exponent(signed))
    # Between 0 and the first code it is the number itself.
    return np.sign(ratio) * (np.minimum(root, 127 * root**2) if signed else root)
