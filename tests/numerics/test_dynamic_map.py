"""The map of bitsandbytes."""

import hashlib

import numpy as np
import pytest

from optaxplus.numerics.quantization import dynamic_map

# Of the bytes that bitsandbytes 0.50.2 and torchao 0.18 (the same) made with torch 2.13
# on an x86 CPU with AVX2.
BITSANDBYTES_HASHES = {
    True: "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c",
    False: "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398",
}


signs = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


@signs
def test_dynamic_map_is_that_of_bitsandbytes_bit_for_bit(signed: bool):
    table = dynamic_map(signed)
    assert table.dtype == np.float32
    digest = hashlib.sha256(table.astype("<f4").tobytes()).hexdigest()
    assert digest == BITSANDBYTES_HASHES[signed]


@pytest.mark.parametrize(
    ("signed", "first", "entries"),
    [
        (True, 0, [-0.99296874, -0.9789063]),
        (True, 127, [0.0, 5.5e-7, 3.25e-6, 7.75e-6, 2.125e-5, 4.375e-5, 6.625e-5]),
        (True, 134, [8.875e-5, 1.5625e-4]),
        (True, 254, [0.99296874, 1.0]),
        (False, 0, [0.0, 3.25e-7, 7.75e-7, 2.125e-6, 4.375e-6, 6.625e-6, 8.875e-6]),
        (False, 7, [1.5625e-5]),
        (False, 254, [0.9964844, 1.0]),
    ],
)
def test_entries_of_the_dynamic_map(signed: bool, first: int, entries: list[float]):
    # Recorded with eight digits, and up to two float32 roundings apart.
    np.testing.assert_allclose(
        dynamic_map(signed)[first : first + len(entries)], entries, rtol=3e-7
    )


@signs
def test_decades_of_the_dynamic_map(signed: bool):
    table = dynamic_map(signed)
    assert (np.diff(table) > 0).all()
    assert table[127 if signed else 0] == 0.0
    counts = np.array([1, 2, 4, 8, 16, 32, 64]) * (1 if signed else 2)
    # The entry 1 has no part in the decade below it.
    decades = np.histogram(table[table < 1], 10.0 ** np.arange(-7, 1))[0]
    np.testing.assert_array_equal(decades, counts)
    if signed:
        np.testing.assert_array_equal(table[:127], -table[128:255][::-1])
