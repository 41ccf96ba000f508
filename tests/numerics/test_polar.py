"""What is multiplied for a polar factor, and that many matrices share one program."""

import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaxplus as ox
from optaxplus.numerics import COEFFICIENT_TABLES, polar, polar_factor
from optaxplus.numerics.newton_schulz import in_pairs, multiplications, newton_schulz
from optaxplus.numerics.polar import polar_factors
from tests.numerics.spectra import (
    DEFAULTS,
    METHODS,
    gaussian,
)
from tests.selection import mostly

# What is multiplied


def products(x, platform: str, **arguments) -> list[tuple[str, str, str]]:
    """(left, right, result) of every product in the program, as "4x16xbf16"."""
    lowered = jax.jit(lambda x: polar_factor(x, **arguments)).trace(x)
    text = lowered.lower(lowering_platforms=(platform,)).as_text()
    return [
        re.search(r"\(tensor<(\S+)>, tensor<(\S+)>\) -> tensor<(\S+)>", line).groups()
        for line in text.splitlines()
        if "dot_general" in line
    ]


MLIR = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("compute_dtype", "ns_steps"), [("bfloat16", 5), ("float16", 3), ("float32", 2)]
)
def test_products_have_narrow_operands_and_wide_results(
    dtype: str, compute_dtype: str, ns_steps: int, platform: str
):
    found = products(
        jax.ShapeDtypeStruct((2, 4, 6), dtype),
        platform,
        compute_dtype=compute_dtype,
        ns_steps=ns_steps,
        method="standard",
    )
    # Every step has three, and another Gram matrix is for extreme scales. On CPUs two
    # matrices at a time; elsewhere the steps after the first are a loop.
    on_cpu = platform == "cpu"
    assert len(found) == (2 * (3 * ns_steps + 1) if on_cpu else 3 * 2 + 1)
    for *operands, result in found:
        assert all(operand.endswith("x" + MLIR[compute_dtype]) for operand in operands)
        assert result.endswith("xf32")


@pytest.mark.parametrize("shape", [(4, 16), (16, 4)])
def test_gram_matrices_are_formed_on_the_short_side(shape: tuple[int, int]):
    x = jax.ShapeDtypeStruct(shape, "float32")
    found = [result for *_, result in products(x, "cpu", method="standard")]
    # The second Gram matrix is that for extreme scales.
    assert found.pop(1) == "4x4xf32"
    assert found == ["4x4xf32", "4x4xf32", "4x16xf32"] * 5


def test_the_gram_form_touches_the_matrix_once_a_pair():
    x = jax.ShapeDtypeStruct((4, 16), "float32")
    found = products(x, "cpu", ns_coeffs="gram_newton_schulz", method="gram")
    long = [operands for *operands, _ in found if "4x16xbf16" in operands]
    # Three blocks (1, 2 and 2 steps): X·Xᵀ and Q·X, and the spare Gram matrix.
    assert len(long) == 2 * 3 + 1
    # R² in every step; Q·Z, R·Z and Z·R·Z in the second of a pair.
    assert len(found) - len(long) == 5 + 3 * 2


@pytest.mark.parametrize(
    ("shape", "expected"), [((64, 64), 15), ((64, 96), 15), ((64, 256), 17)]
)
def test_auto_multiplies_less(shape: tuple[int, int], expected: int):
    x = jax.ShapeDtypeStruct(shape, "float32")
    found = products(x, "cpu", ns_coeffs="gram_newton_schulz")
    assert len(found) == expected + 1
    rows = COEFFICIENT_TABLES["gram_newton_schulz"].rows
    blocks = {"standard": [(row,) for row in rows], "gram": in_pairs(rows)}
    costs = {
        name: multiplications(blocks[name], min(shape), max(shape)) for name in blocks
    }
    assert (costs["gram"] < costs["standard"]) == (expected == 17)


@pytest.mark.parametrize("method", METHODS)
def test_multiplications_are_those_of_the_program(method: str):
    shape = (8, 32)
    arguments = {"ns_coeffs": "gram_newton_schulz", "method": method}
    found = products(jax.ShapeDtypeStruct(shape, "float32"), "cpu", **arguments)
    found.pop(1)  # For extreme scales.
    # Every entry of the left operand meets every column of the result.
    total = sum(
        math.prod(int(size) for size in left.split("x")[:-1])
        * int(result.split("x")[1])
        for left, _, result in found
    )
    rows = COEFFICIENT_TABLES["gram_newton_schulz"].rows
    blocks = in_pairs(rows) if method == "gram" else [(row,) for row in rows]
    assert total == multiplications(blocks, *shape)


def test_bfloat16_takes_the_gram_form_only_with_room_for_rounding():
    x = jax.ShapeDtypeStruct((4, 64), "float32")
    # "polar_express" leaves 2 %, "gram_newton_schulz" 5 %.
    unsafe = {"ns_coeffs": "polar_express"}
    assert len(products(x, "cpu", **unsafe)) == 16
    assert len(products(x, "cpu", ns_coeffs="gram_newton_schulz")) == 18
    assert len(products(x, "cpu", **unsafe, compute_dtype="float16")) == 18
    with pytest.raises(ValueError, match=r"method='gram' is not allowed .*bfloat16"):
        polar_factor(jnp.ones((4, 64)), ns_coeffs="polar_express", method="gram")


# Many matrices


def test_one_loop_for_each_canonical_shape_on_cpus():
    shapes = [(4, 6), (6, 4), (3, 4, 6), (5, 5), (2, 2, 5, 5), (6, 4)]
    iteration = newton_schulz("test", **DEFAULTS)
    xs = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    text = jax.jit(lambda xs: polar_factors(xs, iteration)).lower(xs).as_text()
    assert text.count("stablehlo.while") == 2


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_one_batch_for_each_canonical_shape_elsewhere(platform: str):
    shapes = [(4, 6), (6, 4), (3, 4, 6), (5, 5), (2, 2, 5, 5), (6, 4)]
    iteration = newton_schulz("test", **DEFAULTS)
    xs = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    traced = jax.jit(lambda xs: polar_factors(xs, iteration)).trace(xs)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    # The first step has one product more, for extreme scales; the others are a loop.
    assert text.count("dot_general") == 2 * (4 + 3)
    assert text.count("stablehlo.while") == 2
    assert "tensor<6x4x6xbf16>" in text
    assert "tensor<5x5x5xbf16>" in text


@pytest.mark.parametrize(("ns_steps", "loops"), [(1, 0), (3, 0), (4, 0), (5, 1)])
def test_blocks_of_the_gram_form_elsewhere(ns_steps: int, loops: int):
    # Blocks of as many steps are one loop: (1), (1, 2), (1, 2, 1) and (1, 2, 2).
    iteration = newton_schulz("test", **{**DEFAULTS, "ns_steps": ns_steps})
    x = jax.ShapeDtypeStruct((3, 4, 16), "float32")
    traced = jax.jit(lambda x: polar_factors([x], iteration)).trace(x)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.while") == loops
    x = jnp.float32(gaussian(31, (3, 4, 16)))
    (batch,) = jax.jit(partial(polar._at_once, iteration))(x.astype("bfloat16"))
    (turns,) = jax.jit(partial(polar._in_turn, iteration))(x.astype("bfloat16"))
    # A rounding to bfloat16 moved by the order of a float32 sum, 2^-8 twice.
    difference = np.float32(batch) - np.float32(turns)
    assert np.abs(difference).max() < 2e-2


@pytest.mark.parametrize(
    "compute_dtype", mostly(["bfloat16"], ["bfloat16", "float16", "float32"])
)
def test_together_as_one_by_one(compute_dtype: str):
    shapes = [(4, 6), (6, 4), (3, 6, 4), (5, 5), (2, 2, 4, 6), (1, 3), (3, 1), (0, 6)]
    iteration = newton_schulz("test", **{**DEFAULTS, "compute_dtype": compute_dtype})
    xs = [jnp.float32(gaussian(seed, shape)) for seed, shape in enumerate(shapes)]
    together = jax.jit(lambda xs: polar_factors(xs, iteration))(xs)
    for x, result in zip(xs, together, strict=True):
        alone = polar_factor(x, compute_dtype=compute_dtype)
        assert (result.shape, result.dtype) == (x.shape, jnp.float32)
        # The same operations on the same numbers; float32 sums may be ordered
        # otherwise, and where that moves a rounding to bfloat16, 2^-8 twice.
        atol = {"bfloat16": 2e-2, "float16": 2e-3, "float32": 5e-6}[compute_dtype]
        np.testing.assert_allclose(result, alone, rtol=0, atol=atol)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", mostly([(4, 6)], [(4, 6), (6, 4), (5, 5)]))
def test_both_ways_give_the_same(count: int, shape: tuple[int, int]):
    iteration = newton_schulz("test", **{**DEFAULTS, "compute_dtype": "float32"})
    x = jnp.float32(gaussian(22, (count, *shape)))
    (batch,) = jax.jit(partial(polar._at_once, iteration))(x)
    (turns,) = jax.jit(partial(polar._in_turn, iteration))(x)
    # Float32 sums in another order, amplified.
    np.testing.assert_allclose(turns, batch, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ("shape", "panels"), [((4, 16), 4), ((4, 40), 4), ((3, 14), 2), ((4, 7), 1)]
)
def test_panels(shape: tuple[int, int], panels: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(polar, "_SMALL", 1)
    assert shape[1] // polar._panel_width(*shape) == panels
    iteration = newton_schulz("test", **{**DEFAULTS, "compute_dtype": "float32"})
    xs = [jnp.float32(gaussian(24 + i, shape[:: 1 - 2 * i])) for i in range(2)]
    batch = jax.jit(partial(polar._at_once, iteration))(*xs)
    turns = jax.jit(partial(polar._in_turn, iteration))(*xs)
    for ours, whole in zip(turns, batch, strict=True):
        # Float32 sums in another order, amplified.
        np.testing.assert_allclose(ours, whole, rtol=0, atol=5e-6)


def test_the_loop_on_cpus_does_not_copy_its_stacks():
    # Two stacks of four matrices. If lanes shared one, XLA would copy it twice a turn,
    # which took a quarter of the time of Muon's update.
    iteration = newton_schulz("test", **DEFAULTS)
    xs = [jax.ShapeDtypeStruct((64, 64), "bfloat16")] * 8
    function = jax.jit(partial(polar._in_turn, iteration))
    text = function.lower(*xs).compile().as_text()
    assert re.search(r"= u16\[4,4096\]\S* dynamic-update-slice\(", text)
    assert not re.search(r"= u16\[4,4096\]\S* copy\(", text)


@pytest.mark.parametrize("compute_dtype", mostly(["float32"], ["bfloat16", "float32"]))
def test_derivatives_are_those_of_the_batch(compute_dtype: str):
    iteration = newton_schulz("test", **{**DEFAULTS, "compute_dtype": compute_dtype})
    x, direction = (jnp.float32(gaussian(seed, (2, 4, 6))) for seed in (26, 27))

    def along(factors: Any) -> jax.Array:
        return jax.grad(lambda x: jnp.vdot(factors(x)[0], direction))(x)

    ours = along(lambda x: polar_factors([x], iteration))
    batch = along(lambda x: polar._at_once(iteration, x.astype(compute_dtype)))
    assert np.abs(ours).max() > 0.1
    # Float32 sums in another order, amplified by slopes of up to 800.
    np.testing.assert_allclose(ours, batch, rtol=0, atol=5e-4)


def test_derivative_in_float64():
    x, direction = gaussian(28, (4, 6)), gaussian(29, (4, 6))
    with jax.enable_x64(True):
        factor = partial(polar_factor, compute_dtype="float64")
        _, derivative = jax.jvp(factor, (x,), (direction,))
        step = 1e-6
        difference = (factor(x + step * direction) - factor(x - step * direction)) / (
            2 * step
        )
    # The error of central differences, of the order of step², and their roundings.
    np.testing.assert_allclose(derivative, difference, rtol=0, atol=1e-7)


def test_float64_needs_x64():
    with pytest.raises(
        ValueError, match=r"'float64' is not allowed while .*enable_x64"
    ):
        polar_factor(jnp.ones((2, 2)), compute_dtype="float64")


@pytest.mark.parametrize("function", [polar_factor, ox.scale_by_norm_lmo])
def test_eps_is_static(function):
    first = jnp.ones((2, 2)) if function is polar_factor else "spectral"
    with pytest.raises(TypeError, match=r"eps shapes the .*static_args=\('eps',\)"):
        function(first, eps=jnp.float32(1e-7))


def test_vmap():
    x = jnp.float32(gaussian(23, (3, 2, 6, 4)))
    mapped = jax.vmap(lambda x: polar_factor(x, compute_dtype="float32"))(x)
    # Float32 sums in another order, amplified.
    np.testing.assert_allclose(
        mapped, polar_factor(x, compute_dtype="float32"), rtol=0, atol=5e-6
    )
