"""What rounding does to the Newton-Schulz iteration, and which forms bear it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optaxplus.numerics import COEFFICIENT_TABLES, polar_express_coefficients
from optaxplus.numerics.newton_schulz import NewtonSchulz, bear_pairs, iterate
from tests.numerics.spectra import (
    BANDS,
    NORMS,
    SMALL,
    STEPS,
    polar_factor,
    singular_values,
    with_two_singular_values,
)
from tests.selection import mostly

# Tables whose band in low precision is that of exact arithmetic with 0.04 beside it.
# "cans" leaves single values at 0.3; "aol" has no margin above 1; "turbo", "cubic5" and
# "cubic" do not reach singular values of 1e-3.
STEADY = [
    "polar_express",
    "polar_express_paper",
    "gram_newton_schulz",
    "jordan",
    "you",
    "deepseek",
]


@pytest.mark.slow
@pytest.mark.parametrize("compute_dtype", mostly(["bfloat16"], ["bfloat16", "float16"]))
@pytest.mark.parametrize("name", [*STEADY, "cans"])
def test_bands_in_low_precision(name: str, compute_dtype: str):
    # Rounding a matrix of norm 1 to bfloat16 moves its singular values by up to
    # 2^-9 = 2e-3, so only those above 2e-2 can be told from noise in a dense matrix; a
    # diagonal one has its singular values rounded one by one.
    dense = with_two_singular_values(np.geomspace(2e-2, 0.7, 32))
    diagonal = np.stack([np.sqrt(1 - SMALL**2), SMALL], axis=-1)[..., None] * np.eye(2)
    # One bfloat16 rounding is 2^-9 = 2e-3 of a value near 1, and each of the last rows
    # amplifies what reaches it two- to threefold. Measured: up to 0.027.
    slack = 0.04
    low, high = BANDS[name]
    for x in (dense, diagonal):
        values = singular_values(
            polar_factor(
                jnp.float32(x),
                ns_coeffs=name,
                ns_steps=STEPS[name],
                method="standard",
                normalization="frobenius",
                compute_dtype=compute_dtype,
            )
        )
        if name != "cans":  # Noise takes single values of it down to 0.3, see its row.
            assert values.min() >= low - slack
        assert values.min() > 0.2
        assert values.max() <= high + slack


PAIRS = [
    (name, dtype)
    for dtype in ("bfloat16", "float16", "float32")
    for name in ("gram_newton_schulz", "jordan", "deepseek", "polar_express")
    if bear_pairs(COEFFICIENT_TABLES[name].rows, dtype)
]


def structured_matrices(kind: str, count: int = 64) -> np.ndarray:
    """Matrices on which rounding errors do not average out; shape (count, 16, 64)."""
    rng = np.random.default_rng(0)
    values = 10 ** rng.uniform(-4, 0, (count, 16))
    if kind == "dominant":
        values[:, 0], values[:, 1:] = 1.0, 0.1 * values[:, 1:]
    left = np.linalg.qr(rng.standard_normal((count, 16, 16)))[0]
    if kind == "blocks":  # Rotations in planes.
        angle = rng.uniform(0, 2 * np.pi, (count, 8))
        left = np.zeros((count, 16, 16))
        for i in range(8):
            c, s = np.cos(angle[:, i]), np.sin(angle[:, i])
            left[:, 2 * i, 2 * i], left[:, 2 * i, 2 * i + 1] = c, -s
            left[:, 2 * i + 1, 2 * i], left[:, 2 * i + 1, 2 * i + 1] = s, c
    right = np.eye(16, 64)
    if kind != "blocks":
        right = np.linalg.qr(rng.standard_normal((count, 64, 16)))[0].swapaxes(-1, -2)
    return (left * values[:, None]) @ right


@pytest.mark.slow
@pytest.mark.parametrize(("name", "compute_dtype"), PAIRS)
@pytest.mark.parametrize("kind", ["dense", "dominant", "blocks"])
def test_the_gram_form_stays_in_its_band(name: str, compute_dtype: str, kind: str):
    x = jnp.float32(structured_matrices(kind))
    values = singular_values(
        polar_factor(
            x,
            ns_coeffs=name,
            ns_steps=STEPS[name],
            method="gram",
            compute_dtype=compute_dtype,
        )
    )
    # A pair rounds thrice where two steps round once. Measured: 0.07 in bfloat16. In
    # float32 it is what "deepseek" makes of values below 1e-3, which are none of its
    # band.
    slack = {"bfloat16": 0.1, "float16": 0.02, "float32": 3e-3}[compute_dtype]
    low, high = BANDS[name]
    assert values.max() <= high + slack
    # As many as stand out from the roundings of the norm have to arrive, see above.
    exact = singular_values(x)
    norms = np.sum(exact**4, axis=-1, keepdims=True) ** 0.25
    arrived = np.sum(exact / norms >= 2e-2, axis=-1)
    assert (np.sum(values >= low - slack, axis=-1) >= arrived).all()


def test_rows_without_room_for_rounding_do_break_the_gram_form():
    # Why `bear_pairs` refuses them.
    x = jnp.bfloat16(structured_matrices("blocks", count=512))
    largest = {}
    for name in ("polar_express", "gram_newton_schulz"):
        rows = COEFFICIENT_TABLES[name].rows
        iteration = NewtonSchulz(rows, "gram", "schatten", "bfloat16", 1e-7)
        (y,) = jax.jit(partial(iterate, iteration=iteration, rolled=False))([x])
        largest[name] = np.abs(np.asarray(y)).max()
    assert not largest["polar_express"] < 2.0
    # No entry exceeds the largest singular value: the band and its slack.
    assert largest["gram_newton_schulz"] < 1.124 + 0.1


@pytest.mark.parametrize("safety", [0.02, 0.05])
def test_room_for_rounding_comes_from_the_safety_factor(safety: float):
    *rows, (a, b, c) = polar_express_coefficients(5, safety=safety)
    margin = 1 + safety
    rows.append((a / margin, b / margin**3, c / margin**5))
    assert bear_pairs(rows, "bfloat16") == (safety == 0.05)
    assert bear_pairs(rows, "float16")


# Spectra of condition number up to 1e3, all singular values of which the default has to
# bring into its band.
@pytest.mark.parametrize("condition", [1.0, 10.0, 1e2, 1e3])
@pytest.mark.parametrize("shape", [(32, 32), (32, 128), (128, 32)])
def test_bands_by_condition_number(condition: float, shape: tuple[int, int]):
    rng = np.random.default_rng(1)
    left = np.linalg.qr(rng.standard_normal((shape[0], 32)))[0]
    right = np.linalg.qr(rng.standard_normal((shape[1], 32)))[0]
    # What rounds to bfloat16 has other singular values than what it was made from.
    x = jnp.bfloat16((left * np.geomspace(1, 1 / condition, 32)) @ right.T)
    exact = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    reached = exact / NORMS["schatten"](exact) >= 2.5e-4
    values = singular_values(polar_factor(x, ns_steps=6))
    # Six steps reach 2.5e-4 of the norm: at this size condition numbers up to 1e3.
    assert reached.all()
    # Their band is 0.855 to 1.115; the slacks are those above, of long matrices that of
    # the Gram form.
    slack = 0.04 if shape[0] == shape[1] else 0.1
    assert values.min() >= 0.855 - slack
    assert values.max() <= 1.115 + slack
