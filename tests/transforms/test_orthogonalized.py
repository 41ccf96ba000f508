"""Orthogonalized updates and the factors that belong to a shape."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from optaxplus import MatrixAxes
from optaxplus.numerics import polar_factor
from tests.assertions import assert_trees_close, assert_trees_equal
from tests.problems import normal_tree
from tests.references import matrix

STACK = MatrixAxes((-2,), (-1,))
EXACT = {"ns_coeffs": "deepseek", "ns_steps": 10, "compute_dtype": "float32"}


def apply(tx, updates):
    return tx.update(updates, tx.init(updates))[0]


def orthogonalize(updates, axes=None, **arguments):
    arguments = {"compute_dtype": "float32", **arguments}
    return apply(ox.orthogonalize_via_newton_schulz(axes=axes, **arguments), updates)


# Agreement


def test_jordan_reference():
    g = normal_tree((4, 6), seed=0)
    expected = matrix.newton_schulz(g, matrix.JORDAN)
    # Float32 roundings, amplified by the slope 485 of the table at 0.
    np.testing.assert_allclose(
        orthogonalize(g, ns_coeffs="jordan", normalization="frobenius"),
        expected,
        rtol=0,
        atol=1e-4,
    )


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (1, 5), (5, 1)])
def test_exact_polar_factor(shape):
    g = normal_tree(shape, seed=0)
    # "deepseek" leaves singular values within 5e-4 of 1.
    np.testing.assert_allclose(
        orthogonalize(g, **EXACT), matrix.polar_factor(g), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("mode", ["match_adamw", "keller", "spectral"])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5), (1, 7)])
def test_shape_scale_reference(mode: str, shape):
    u = normal_tree(shape, seed=0)
    factor = matrix.matrix_shape_scale(mode, fan_in=shape[0], fan_out=shape[1])
    # One rounding of the factor and one of the product.
    np.testing.assert_allclose(
        apply(ox.scale_by_matrix_shape(mode), u), factor * np.float64(u), rtol=2e-7
    )


# Reductions


def test_every_argument_reaches_the_polar_factor():
    g = normal_tree((4, 6), seed=0)
    arguments = {
        "ns_steps": 3,
        "ns_coeffs": ((2.0, -1.5, 0.5), (1.5, -0.5, 0.0), (1.5, -0.5, 0.0)),
        "method": "gram",
        "normalization": "frobenius",
        "compute_dtype": "float16",
        "eps": 0.1,
    }
    for name in arguments.keys() - {"ns_coeffs", "ns_steps"}:
        others = {key: value for key, value in arguments.items() if key != name}
        assert not np.array_equal(
            polar_factor(g, **others), polar_factor(g, **arguments)
        )
    assert_trees_equal(orthogonalize(g, **arguments), polar_factor(g, **arguments))


def test_defaults_are_those_of_the_polar_factor():
    g = normal_tree((4, 6), seed=0)
    assert_trees_equal(apply(ox.orthogonalize_via_newton_schulz(), g), polar_factor(g))


def test_heads_are_flattened():
    # (features, heads, head size) sums over the first axis, (heads, head size,
    # features) over the first two.
    params = {
        "query": {"kernel": normal_tree((4, 2, 3), seed=0)},
        "out": {"kernel": normal_tree((2, 3, 4), seed=1)},
    }
    result = orthogonalize(params)
    for name, rows in (("query", 4), ("out", 6)):
        flat = params[name]["kernel"].reshape(rows, -1)
        # Float32 sums in another order, amplified by 1e3.
        np.testing.assert_allclose(
            result[name]["kernel"].reshape(rows, -1),
            orthogonalize(flat),
            rtol=0,
            atol=1e-4,
        )


def test_convolutions_sum_over_their_window():
    conv = {"Conv_0": {"kernel": normal_tree((3, 3, 2, 4), seed=0)}}
    result = orthogonalize(conv)["Conv_0"]["kernel"]
    flat = conv["Conv_0"]["kernel"].reshape(18, 4)
    # Float32 sums in another order, amplified by 1e3.
    np.testing.assert_allclose(
        result.reshape(18, 4), orthogonalize(flat), rtol=0, atol=1e-4
    )


# Invariances


def test_stack_is_its_slices():
    stack = normal_tree((3, 4, 5), seed=0) * jnp.asarray([1e-9, 1, 1e9]).reshape(
        3, 1, 1
    )
    result = orthogonalize(stack, axes=STACK)
    expected = jnp.stack([orthogonalize(one) for one in stack])
    # Float32 sums in another order, amplified by at most 1e3; measured 2e-6.
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "axes",
    [
        MatrixAxes((0,), (1,), splits=(2, 3, 3)),
        MatrixAxes((1,), (0,), splits=(2, 1, 1)),
    ],
)
def test_splits_are_matrices_of_their_own(axes: MatrixAxes):
    fused = normal_tree((4, 8), seed=0)
    axis = axes.fan_out[0]
    parts = jnp.split(fused, np.cumsum(axes.splits)[:-1], axis=axis)
    plain = MatrixAxes(axes.fan_in, axes.fan_out)
    for make in (
        lambda axes: ox.orthogonalize_via_newton_schulz(
            axes=axes, compute_dtype="float32"
        ),
        lambda axes: ox.scale_by_matrix_shape("keller", axes=axes),
    ):
        expected = [apply(make(plain), part) for part in parts]
        # Float32 sums in another order, amplified by at most 1e3.
        np.testing.assert_allclose(
            apply(make(axes), fused),
            jnp.concatenate(expected, axis=axis),
            rtol=0,
            atol=1e-5,
        )


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_transpose(shape):
    g = normal_tree(shape, seed=0)
    result = orthogonalize(g.T, axes=MatrixAxes((1,), (0,)))
    # The same iteration on the same matrix.
    np.testing.assert_array_equal(result, orthogonalize(g).T)


def test_orthogonal_change_of_basis():
    g = normal_tree((4, 6), seed=0)
    left = np.linalg.qr(normal_tree((4, 4), seed=1))[0]
    right = np.linalg.qr(normal_tree((6, 6), seed=2))[0]
    # Float32 roundings; "deepseek" converges, which damps them.
    np.testing.assert_allclose(
        orthogonalize(jnp.asarray(left @ g @ right), **EXACT),
        left @ orthogonalize(g, **EXACT) @ right,
        rtol=0,
        atol=1e-3,
    )


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter(scale: float):
    g = normal_tree((4, 6), seed=0)
    # "deepseek" converges, so roundings of bfloat16 remain: 2^-9, several of them.
    for arguments, atol in (
        (EXACT, 1e-5),
        ({**EXACT, "compute_dtype": "bfloat16"}, 0.05),
    ):
        np.testing.assert_allclose(
            orthogonalize(g * scale, **arguments),
            orthogonalize(g, **arguments),
            rtol=0,
            atol=atol,
        )


@pytest.mark.parametrize("shape", [(4, 16), (16, 4), (8, 8), (3, 4, 16)])
def test_match_adamw_has_the_rms_of_adamw(shape):
    tx = optax.chain(
        ox.orthogonalize_via_newton_schulz(axes=STACK, **EXACT),
        ox.scale_by_matrix_shape("match_adamw", axes=STACK),
    )
    updates = np.asarray(apply(tx, normal_tree(shape, seed=0)))
    rms = np.sqrt(np.mean(updates**2, axis=(-2, -1)))
    # A semi-orthogonal matrix has RMS 1 / sqrt(max(m, n)); singular values are within
    # 5e-4 of 1.
    np.testing.assert_allclose(rms, np.full_like(rms, 0.2), rtol=1e-3)


@pytest.mark.parametrize("shape", [(4, 16), (16, 4)])
def test_spectral_has_unit_gain(shape):
    tx = optax.chain(
        ox.orthogonalize_via_newton_schulz(**EXACT),
        ox.scale_by_matrix_shape("spectral"),
    )
    update = np.asarray(apply(tx, normal_tree(shape, seed=0)))
    # Inputs of RMS 1 give outputs of RMS at most 1; within 5e-4.
    gain = np.linalg.norm(update, ord=2) * np.sqrt(shape[0] / shape[1])
    np.testing.assert_allclose(gain, 1.0, rtol=1e-3)


def test_scale_reads_the_matrix_not_the_stack():
    # 8 layers of (2, 3): the factor is that of (2, 3).
    u = jnp.ones((8, 2, 3))
    result = apply(ox.scale_by_matrix_shape("keller", axes=STACK), u)
    # One rounding.
    np.testing.assert_allclose(result, np.full((8, 2, 3), 1.5**0.5), rtol=1e-7)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_gradients(dtype: str):
    g = normal_tree((4, 6), seed=0).astype(dtype)
    for result in (
        apply(ox.orthogonalize_via_newton_schulz(), g),
        apply(ox.scale_by_matrix_shape(), g),
    ):
        assert result.dtype == jnp.float32
    assert_trees_equal(orthogonalize(g), orthogonalize(g.astype("float32")))


# Limits


def test_zero_and_missing_directions():
    updates = {
        "zero": jnp.zeros((3, 4)),
        "rank_one": jnp.outer(jnp.ones(3), jnp.arange(4.0)),
    }
    result = orthogonalize(updates)
    np.testing.assert_array_equal(result["zero"], np.zeros((3, 4)))
    values = np.linalg.svd(result["rank_one"], compute_uv=False)
    # The band of the table; float32 zeros of 1e-7, amplified by 1e3.
    assert 0.85 < values[0] < 1.15
    assert values[1:].max() < 1e-3


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1)])
def test_single_rows_are_normalised(shape):
    g = normal_tree(shape, seed=0) * 1e-6
    result = orthogonalize(g, **EXACT)
    # Within 5e-4 of length 1.
    np.testing.assert_allclose(result, g / np.linalg.norm(g), rtol=1e-3)


def test_empty_none_and_masked_leaves_pass():
    params = {
        "n": None,
        "m": optax.MaskedNode(),
        "rows": jnp.zeros((0, 3)),
        "columns": jnp.zeros((3, 0)),
        "layers": jnp.zeros((0, 3, 4)),
    }
    tx = optax.chain(
        ox.orthogonalize_via_newton_schulz(axes=STACK),
        ox.scale_by_matrix_shape("spectral", axes=STACK),
    )
    updates = apply(tx, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert_trees_equal(updates, params)


def test_one_bad_entry_makes_its_matrix_nan():
    stack = normal_tree((2, 3, 4), seed=0)
    for value in (jnp.nan, jnp.inf):
        result = np.asarray(orthogonalize(stack.at[0, 1, 1].set(value), axes=STACK))
        assert np.isnan(result[0]).all()
        assert np.isfinite(result[1]).all()


# Errors


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (
            ValueError,
            {"ns_coeffs": "dion"},
            "ns_coeffs='dion' is .* one of",
        ),
        (ValueError, {"ns_coeffs": "you", "ns_steps": 4}, "defines exactly 5 steps"),
        (ValueError, {"ns_steps": 0}, "ns_steps=0 is not allowed; .* integer >= 1"),
        (ValueError, {"ns_coeffs": ((1.0, 2.0, 3.0),)}, "so pass ns_steps=1"),
        (ValueError, {"eps": -1.0}, "eps=-1.0 is not allowed; .* >= 0"),
        (TypeError, {"eps": "0"}, "eps='0' is not allowed"),
        (TypeError, {"ns_steps": True}, "ns_steps=True is not allowed"),
        (TypeError, {"compute_dtype": "int8"}, "compute_dtype='int8' is not allowed"),
        (
            TypeError,
            {"ns_steps": jnp.asarray(5)},
            r"ns_steps shapes the compiled program .* static_args=\('ns_steps',\)",
        ),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message: str):
    with pytest.raises(error, match="orthogonalize_via_newton_schulz: .*" + message):
        ox.orthogonalize_via_newton_schulz(**arguments)


@pytest.mark.parametrize("mode", ["adamw", "Keller", None, 0.2])
def test_unknown_modes_are_refused(mode):
    message = (
        f"scale_by_matrix_shape: shape_scale={mode!r} .* 'match_adamw', 'keller', 'spec"
    )
    with pytest.raises(ValueError, match=message):
        ox.scale_by_matrix_shape(mode)


@pytest.mark.parametrize(
    "function", [ox.orthogonalize_via_newton_schulz, ox.scale_by_matrix_shape]
)
class TestParameters:
    def test_vectors_are_refused(self, function):
        message = (
            rf"{function.__name__}: parameter 'd/bias' of shape \(3,\) is not allowed; "
            "it is a vector. Give it the role"
        )
        params = {"d": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
        with pytest.raises(ValueError, match=message):
            function().init(params)

    def test_vectors_by_axes_are_refused(self, function):
        with pytest.raises(ValueError, match=r"'w' of shape \(2, 3\) .* is a vector"):
            function(axes=MatrixAxes((), (0, 1))).init({"w": jnp.ones((2, 3))})

    def test_integers_are_refused(self, function):
        with pytest.raises(TypeError, match="parameter 'w' of dtype int32 is not"):
            function().init({"w": jnp.ones((2, 3), jnp.int32)})

    @pytest.mark.parametrize(
        ("axes", "message"),
        [
            (MatrixAxes((0,), (5,)), "parameter 'w': .* axis 5 is out of range"),
            (MatrixAxes((0,), (-2,)), "parameter 'w': .* names an axis twice"),
            (MatrixAxes((0,), (1,), (2, 2)), "parameter 'w': .* splits add up to 4"),
        ],
    )
    def test_axes_that_do_not_fit_are_refused(self, function, axes, message: str):
        with pytest.raises(ValueError, match=f"{function.__name__}: {message}"):
            function(axes=axes).init({"w": jnp.ones((2, 3))})

    def test_undecided_parameters_are_refused(self, function):
        with pytest.raises(ValueError, match=r"'kernel' of shape \(2, 3, 4\)"):
            function().init({"kernel": jnp.ones((2, 3, 4))})


def test_complex_matrices_are_refused():
    with pytest.raises(TypeError, match=r"'w' of dtype complex64 .* real floating"):
        ox.orthogonalize_via_newton_schulz().init(
            {"w": jnp.ones((2, 3), jnp.complex64)}
        )
    assert apply(ox.scale_by_matrix_shape(), jnp.ones((2, 3), jnp.complex64)).dtype == (
        jnp.complex64
    )


def test_masking_vectors_away():
    params = {"d": {"kernel": normal_tree((2, 3), seed=0), "bias": jnp.ones(3)}}
    tx = optax.masked(
        ox.orthogonalize_via_newton_schulz(), {"d": {"kernel": True, "bias": False}}
    )
    updates = apply(tx, params)
    np.testing.assert_array_equal(updates["d"]["bias"], params["d"]["bias"])
    # Bands, not orthogonality: the default table in bfloat16.
    values = np.linalg.svd(updates["d"]["kernel"], compute_uv=False)
    assert 0.8 < values.min() <= values.max() < 1.2
    assert_trees_close(
        updates["d"]["kernel"], polar_factor(params["d"]["kernel"]), rtol=1e-6
    )


def test_a_dtype_that_the_iteration_is_not_made_for_is_refused():
    with pytest.raises(ValueError, match=r"compute_dtype='float8_e4m3fn'.*'bfloat16'"):
        ox.orthogonalize_via_newton_schulz(compute_dtype="float8_e4m3fn")


def test_traced_coefficients_name_the_remedy():
    with pytest.raises(TypeError, match=r"static_args=\('ns_coeffs',\)"):
        ox.orthogonalize_via_newton_schulz(ns_steps=1, ns_coeffs=jnp.ones((1, 3)))


def test_an_undecided_leaf_names_the_argument_that_there_is():
    with pytest.raises(ValueError, match=r"axes=ox.infer_matrix_axes\(params"):
        ox.orthogonalize_via_newton_schulz().init({"w": jnp.ones((2, 3, 4))})
