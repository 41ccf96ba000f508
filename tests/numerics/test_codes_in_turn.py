"""The code "root" rounds up and down in turn: right on average, and not together."""

import jax.numpy as jnp
import numpy as np
import pytest

from optaxplus.numerics.quantization import blocks_of
from tests.numerics.codes import codes_and_values, encoded, measured, samples, signs


@signs
def test_codes_in_turn_are_right_on_average(signed: bool):
    x = samples((256, 8), signed, decades=6.0)
    x[0] = 1.0
    taken = np.array(
        [
            encoded(x, "root", signed, step=jnp.int32(step))[0].astype(int)
            for step in range(1000)
        ]
    )
    moves = np.ptp(taken, axis=0)
    assert moves.max() == 1
    assert moves.mean() > 0.5
    root = measured(x.astype(np.float64), "root", signed) * (127 if signed else 255)
    # The smallest code of second moments is 1.
    root = root if signed else np.maximum(root, 1)
    # The share of shifts below p differs from p by 1.9 log(n) / n at most.
    assert np.abs(taken.mean(axis=0) - root).max() < 0.014


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((256, 16), 0),
        ((256, 4, 4), 0),
        ((3, 256, 16), 1),
        ((16, 256), 1),
        ((2, 16, 256), 2),
        ((256,), 0),
    ],
    ids=str,
)
def test_entries_of_a_block_do_not_move_together(shape: tuple[int, ...], axis: int):
    # All between two codes, of which 0.6 are the upper one in every step.
    x = np.full(shape, (20.6 / 127) ** 2, np.float32)
    np.moveaxis(x, axis, 0)[0] = 1.0
    assert blocks_of(shape, 256).axis == axis
    for step in range(3):
        codes, _ = encoded(x, "root", True, step=jnp.int32(step))
        inner = np.moveaxis(codes, axis, 0)[1:]
        assert np.abs(inner.mean(axis=0) - 20.6).max() < 0.02


@signs
def test_what_is_a_code_stays_one(signed: bool):
    codes, values = codes_and_values("root", signed)
    x = np.repeat(values.astype(np.float32)[:, None], 4, axis=1)
    x = np.concatenate([x, x])[: 2 * 256] if signed else np.concatenate([x, x])
    for step in range(50):
        found, _ = encoded(x, "root", signed, step=jnp.int32(step), block_size=512)
        np.testing.assert_array_equal(found[: len(codes), 0], codes)
