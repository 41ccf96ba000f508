"""The farthest point of a norm ball along a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from optaxplus import MatrixAxes
from optaxplus.numerics.coefficients import COEFFICIENT_TABLES
from tests.assertions import assert_trees_close, assert_trees_equal
from tests.problems import normal_tree
from tests.references import muon_family
from tests.selection import mostly

NORMS = ("spectral", "sign", "per_input", "per_output", "rms")
OF_MATRICES = ("spectral", "per_input", "per_output")
KINDS = dict(zip(NORMS, ("spectral", "sign", "column", "row", "bias_rms"), strict=True))
STACK = MatrixAxes((-2,), (-1,))
# Singular values within 5e-4 of 1.
EXACT = {"ns_coeffs": "deepseek", "ns_steps": 10, "compute_dtype": "float64"}
BAND = 5e-4

each_norm = pytest.mark.parametrize("norm", NORMS)
# The norm that multiplies matrices, and one that does not.
some_norms = pytest.mark.parametrize("norm", mostly(["spectral", "per_output"], NORMS))
each_size = pytest.mark.parametrize("shape", [(4, 6), (6, 4), (1, 5), (5, 1)])
each_kind_of_input = pytest.mark.parametrize("one_hot", [False, True])


def direction(b, norm: str, **arguments):
    tx = ox.scale_by_norm_lmo(norm, **arguments)
    return tx.update(b, tx.init(b))[0]


def in_float64(b, norm: str, **arguments) -> np.ndarray:
    with jax.enable_x64(True):
        return np.asarray(direction(jnp.asarray(b, jnp.float64), norm, **arguments))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


# What each norm is, and its dual, of a matrix (m, n) = (fan_in, fan_out).
SIZES = {
    "spectral": lambda x, m, n: np.sqrt(m / n) * np.linalg.norm(x, 2),
    "sign": lambda x, m, n: m * np.abs(x).max(),
    "per_input": lambda x, m, n: m / np.sqrt(n) * np.linalg.norm(x, axis=1).max(),
    "per_output": lambda x, m, n: np.sqrt(m) * np.linalg.norm(x, axis=0).max(),
    "rms": lambda x, m, n: np.sqrt(np.mean(x**2)),
}
DUALS = {
    "spectral": lambda x, m, n: np.sqrt(n / m) * np.linalg.norm(x, "nuc"),
    "sign": lambda x, m, n: np.abs(x).sum() / m,
    "per_input": lambda x, m, n: np.sqrt(n) / m * np.linalg.norm(x, axis=1).sum(),
    "per_output": lambda x, m, n: np.linalg.norm(x, axis=0).sum() / np.sqrt(m),
    "rms": lambda x, m, n: np.sqrt(x.size) * np.linalg.norm(x),
}


# Agreement


@each_norm
@each_kind_of_input
@each_size
def test_reference(norm: str, one_hot: bool, shape: tuple[int, int]):
    b = normal(*shape)
    expected = muon_family.norm_lmo(
        b,
        KINDS[norm],
        fan_in=shape[0],
        fan_out=shape[1],
        normalized=not one_hot,
        ns_coeffs=COEFFICIENT_TABLES["jordan"].rows,
        eps=0.0,
        ns_eps=0.0,
    )
    ours = in_float64(
        b,
        norm,
        radius=3.0,
        one_hot=one_hot,
        ns_coeffs="jordan",
        normalization="frobenius",
        compute_dtype="float64",
        eps=0.0,
    )
    # Float64 roundings, amplified by the slope 485 of the table.
    np.testing.assert_allclose(ours, 3.0 * expected, rtol=0, atol=1e-12)


@each_norm
def test_axes_of_the_authors(norm: str):
    b = normal(4, 6)
    turned = in_float64(b.T, norm, axes=MatrixAxes((1,), (0,)), **EXACT)
    np.testing.assert_allclose(turned, in_float64(b, norm, **EXACT).T, rtol=1e-12)


def test_spectral_is_the_visible_chain():
    axes = MatrixAxes((0,), (1,), splits=(2, 4))
    arguments = {
        "ns_steps": 3,
        "ns_coeffs": "jordan",
        "method": "gram",
        "normalization": "frobenius",
        "compute_dtype": "float16",
        "eps": 0.1,
        "axes": axes,
    }
    chain = optax.chain(
        ox.orthogonalize_via_newton_schulz(**arguments),
        ox.scale_by_matrix_shape("spectral", axes=axes),
    )
    b = normal_tree((4, 6), seed=0)
    expected, _ = chain.update(b, chain.init(b))
    assert_trees_close(direction(b, "spectral", **arguments), expected, rtol=1e-7)


def test_sign_of_an_average_is_signum():
    b = normal_tree((4, 6), seed=0)
    assert_trees_equal(direction(b, "sign", radius=4.0), jnp.sign(b))


# The farthest point of the ball


@each_norm
@each_size
def test_it_reaches_the_dual_norm(norm: str, shape: tuple[int, int]):
    b = normal(*shape)
    u = in_float64(b, norm, **EXACT)
    band = BAND if norm == "spectral" else 1e-12
    np.testing.assert_allclose(np.sum(b * u), DUALS[norm](b, *shape), rtol=band)
    np.testing.assert_allclose(SIZES[norm](u, *shape), 1.0, rtol=band)


@each_norm
@each_size
def test_no_point_of_the_ball_is_farther(norm: str, shape: tuple[int, int]):
    b = normal(*shape)
    farthest = np.sum(b * in_float64(b, norm, **EXACT))
    rng = np.random.default_rng(1)
    others = [rng.standard_normal(shape) for _ in range(200)]
    # Near the farthest one, too.
    others += [b + 0.1 * other for other in others] + [b, np.sign(b)]
    reached = [np.sum(b * x) / SIZES[norm](x, *shape) for x in others]
    assert max(reached) <= farthest * (1 + BAND)


def test_newton_schulz_is_within_its_band():
    # The table leaves singular values within 0.15 of 1, where they are not tiny.
    b = normal(8, 12)
    u = np.asarray(direction(jnp.asarray(b, jnp.float32), "spectral"), np.float64)
    np.testing.assert_allclose(np.sum(b * u), DUALS["spectral"](b, 8, 12), rtol=0.15)
    assert SIZES["spectral"](u, 8, 12) < 1.15


@pytest.mark.parametrize("norm", ["spectral", "sign", "per_input", "per_output"])
@each_size
def test_inputs_of_rms_1_have_small_outputs(norm: str, shape: tuple[int, int]):
    u = in_float64(normal(*shape), norm, **EXACT)
    x = normal(1000, shape[0], seed=2)
    x = np.concatenate([x, np.sign(x), np.eye(shape[0])])
    outputs = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True)) @ u
    sizes = {"sign": np.inf, "per_output": np.inf}.get(norm, 2)
    bound = 1.0 if sizes == np.inf else np.sqrt(shape[1])
    assert np.linalg.norm(outputs, sizes, axis=1).max() <= bound * (1 + BAND)


@pytest.mark.parametrize("norm", ["spectral", "sign", "per_input", "per_output"])
def test_tokens_have_vectors_of_unit_size(norm: str):
    # More features than tokens, so that all rows of the polar factor have length 1.
    table = in_float64(normal(5, 8), norm, one_hot=True, **EXACT)
    if norm in ("spectral", "per_input"):
        sizes = np.sqrt(np.mean(table**2, axis=1))
        np.testing.assert_allclose(sizes, 1.0, rtol=BAND)
    else:
        assert np.abs(table).max() <= 1 + 1e-12


# Invariances


@each_norm
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter(norm: str, scale: float):
    arguments = {**EXACT, "compute_dtype": "float32"}
    b = normal_tree((4, 6), seed=0)
    # Float32 roundings, which "deepseek" damps.
    assert_trees_close(
        direction(b * scale, norm, **arguments),
        direction(b, norm, **arguments),
        rtol=1e-5,
    )


def test_changes_of_basis():
    b = normal(4, 6)
    left, right = (np.linalg.qr(normal(n, n, seed=n))[0] for n in (4, 6))
    for norm, turn in {
        "spectral": lambda x: left @ x @ right,
        "per_output": lambda x: left @ x,
        "per_input": lambda x: x @ right,
        "rms": lambda x: left @ x @ right,
    }.items():
        np.testing.assert_allclose(
            in_float64(turn(b), norm, **EXACT),
            turn(in_float64(b, norm, **EXACT)),
            rtol=0,
            atol=BAND if norm == "spectral" else 1e-12,
            err_msg=norm,
        )


@some_norms
@each_kind_of_input
def test_a_stack_is_its_slices(norm: str, one_hot: bool):
    stack = normal(3, 4, 5) * np.asarray([1e-9, 1, 1e9]).reshape(3, 1, 1)
    arguments = {"one_hot": one_hot, **EXACT}
    expected = [in_float64(one, norm, **arguments) for one in stack]
    result = in_float64(stack, norm, axes=STACK, **arguments)
    np.testing.assert_allclose(result, np.stack(expected), rtol=0, atol=1e-12)


@some_norms
@pytest.mark.parametrize(
    "axes",
    [
        MatrixAxes((0,), (1,), splits=(2, 3, 3)),
        pytest.param(MatrixAxes((1,), (0,), splits=(2, 1, 1)), marks=pytest.mark.slow),
    ],
)
def test_splits_are_matrices_of_their_own(norm: str, axes: MatrixAxes):
    fused = normal(4, 8)
    axis = axes.fan_out[0]
    parts = np.split(fused, np.cumsum(axes.splits)[:-1], axis=axis)
    plain = MatrixAxes(axes.fan_in, axes.fan_out)
    expected = [in_float64(part, norm, axes=plain, **EXACT) for part in parts]
    np.testing.assert_allclose(
        in_float64(fused, norm, axes=axes, **EXACT),
        np.concatenate(expected, axis=axis),
        rtol=0,
        atol=1e-12,
    )


@some_norms
def test_heads_and_windows_are_flattened(norm: str):
    # (features, heads, head size) sums over the first axis, (*window, in, out) over
    # all but the last.
    for shape, axes, rows in (
        ((4, 2, 3), MatrixAxes((0,), (1, 2)), 4),
        ((3, 3, 2, 4), MatrixAxes((0, 1, 2), (3,)), 18),
    ):
        b = normal(*shape)
        result = in_float64(b, norm, axes=axes, **EXACT).reshape(rows, -1)
        expected = in_float64(b.reshape(rows, -1), norm, **EXACT)
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-12)


@each_norm
def test_the_radius_multiplies(norm: str):
    b = normal_tree((4, 6), seed=0)
    expected = 2.5 * direction(b, norm)
    result = jax.jit(lambda r: direction(b, norm, radius=r))(2.5)
    # Compiled and not, in bfloat16.
    assert_trees_close(result, expected, rtol=1e-2 if norm == "spectral" else 1e-6)


@each_norm
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_gradients(norm: str, dtype: str):
    b = normal_tree((4, 6), seed=0).astype(dtype)
    result = direction(b, norm)
    assert result.dtype == jnp.float32
    assert_trees_equal(result, direction(b.astype("float32"), norm))


@pytest.mark.parametrize("norm", ["sign", "per_input", "per_output", "rms"])
def test_complex_gradients_turn_with_their_phase(norm: str):
    b = normal_tree((4, 6), seed=0)
    phase = np.complex64(np.exp(0.7j))
    # Float32 roundings.
    assert_trees_close(
        direction(b * phase, norm), direction(b, norm) * phase, rtol=1e-6
    )


# Vectors


@pytest.mark.parametrize("norm", ["sign", "rms"])
def test_vectors_have_one_input(norm: str):
    b = {"bias": normal_tree((6,), seed=0), "temperature": jnp.float32(-0.3)}
    result = direction(b, norm, radius=2.0)
    for x, u in zip(jax.tree.leaves(b), jax.tree.leaves(result), strict=True):
        expected = np.sign(x) if norm == "sign" else x / np.sqrt(np.mean(x**2))
        np.testing.assert_allclose(u, 2.0 * expected, rtol=1e-6)


def test_rms_of_a_vector_is_spectral_of_a_matrix_with_one_input():
    b = normal(6)
    matrix = in_float64(b[None], "spectral", **EXACT)[0]
    np.testing.assert_allclose(in_float64(b, "rms"), matrix, rtol=BAND)


def test_rms_takes_a_matrix_as_one_block():
    b = normal(4, 6)
    expected = b / np.sqrt(np.mean(b**2))
    np.testing.assert_allclose(in_float64(b, "rms"), expected, rtol=1e-12)
    stacked = MatrixAxes((), (1,))
    rows = b / np.sqrt(np.mean(b**2, axis=1, keepdims=True))
    np.testing.assert_allclose(in_float64(b, "rms", axes=stacked), rows, rtol=1e-12)


# Limits


@each_norm
def test_zeros_stay_zeros(norm: str):
    zeros = {"w": jnp.zeros((3, 4)), "none": None, "masked": optax.MaskedNode()}
    assert_trees_equal(direction(zeros, norm), zeros)


def test_a_zero_block_leaves_the_others_alone():
    b = normal_tree((4, 6), seed=0)
    for norm, hole in {"per_input": np.s_[1], "per_output": np.s_[:, 1]}.items():
        result = direction(b.at[hole].set(0.0), norm)
        expected = direction(b, norm).at[hole].set(0.0)
        assert_trees_equal(result, expected)


@each_norm
def test_shapes_without_entries_or_with_one(norm: str):
    params = {
        "rows": jnp.zeros((0, 3)),
        "columns": jnp.zeros((3, 0)),
        "layers": jnp.zeros((0, 3, 4)),
        "one": jnp.full((1, 1), -3.0),
    }
    result = direction(params, norm, axes=STACK, **EXACT | {"compute_dtype": "float32"})
    one = result.pop("one")
    assert_trees_equal(result, {key: params[key] for key in result})
    np.testing.assert_allclose(one, [[-1.0]], rtol=BAND)


@each_norm
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_bad_entry_stays_in_its_block(norm: str, bad: float):
    stack = normal_tree((2, 3, 4), seed=0)
    result = np.array(direction(stack.at[0, 1, 2].set(bad), norm, axes=STACK))
    block = {
        "spectral": np.s_[0],
        "sign": np.s_[0, 1, 2],
        "per_input": np.s_[0, 1],
        "per_output": np.s_[0, :, 2],
        "rms": np.s_[0],
    }[norm]
    if norm == "sign" and np.isinf(bad):
        assert result[block] == np.float32(1 / 3)
    else:
        assert np.isnan(result[block]).all()
    result[block] = 0.0
    assert np.isfinite(result).all()


def test_there_is_no_state():
    tx = ox.scale_by_norm_lmo("sign")
    assert not jax.tree.leaves(tx.init({"w": jnp.ones((2, 3))}))


# Errors


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (
            ValueError,
            {"norm": "ColNorm"},
            "norm='ColNorm' .* one of 'spectral', 'sign'",
        ),
        (ValueError, {"norm": None}, "norm=None is not allowed; it must be one of"),
        (ValueError, {"radius": 0.0}, "radius=0.0 is not allowed; .* > 0"),
        (ValueError, {"radius": jnp.ones(2)}, "radius=.* an array must have shape"),
        (TypeError, {"radius": "50"}, "radius='50' is not allowed"),
        (TypeError, {"one_hot": 1}, "one_hot=1 is not allowed; it must be True or"),
        (ValueError, {"ns_steps": 0}, "ns_steps=0 is not allowed; .* integer >= 1"),
        (TypeError, {"ns_steps": jnp.asarray(5)}, r"static_args=\('ns_steps',\)"),
        (ValueError, {"ns_coeffs": "you", "ns_steps": 4}, "defines exactly 5 steps"),
        (ValueError, {"ns_coeffs": "dion"}, "ns_coeffs='dion' is .* one of"),
        (ValueError, {"method": "newton"}, "method='newton' is not allowed"),
        (ValueError, {"normalization": "l2"}, "normalization='l2' is not allowed"),
        (TypeError, {"compute_dtype": "int8"}, "compute_dtype='int8' is not allowed"),
        (ValueError, {"eps": -1.0}, "eps=-1.0 is not allowed; .* >= 0"),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message: str):
    with pytest.raises(error, match="scale_by_norm_lmo: .*" + message):
        ox.scale_by_norm_lmo(**arguments)


@pytest.mark.parametrize("norm", OF_MATRICES)
def test_vectors_have_no_norm_of_matrices(norm: str):
    params = {"d": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    message = (
        r"scale_by_norm_lmo: parameter 'd/bias' of shape \(3,\) is not allowed; it is "
        f"a vector, and '{norm}' is a norm of matrices. Take 'rms' or 'sign'"
    )
    tx = ox.scale_by_norm_lmo(norm)
    with pytest.raises(ValueError, match=message):
        tx.init(params)
    masked = optax.masked(tx, {"d": {"kernel": True, "bias": False}})
    updates, _ = masked.update(params, masked.init(params))
    assert_trees_equal(updates["d"]["bias"], params["d"]["bias"])


def test_wrong_parameters_are_refused():
    for norm in NORMS:
        tx = ox.scale_by_norm_lmo(norm)
        with pytest.raises(TypeError, match="parameter 'w' of dtype int32 is not"):
            tx.init({"w": jnp.ones((2, 3), jnp.int32)})
        with pytest.raises(ValueError, match=r"'kernel' of shape \(2, 3, 4\)"):
            tx.init({"kernel": jnp.ones((2, 3, 4))})
    with pytest.raises(TypeError, match=r"'w' of dtype complex64 .* real floating"):
        ox.scale_by_norm_lmo().init({"w": jnp.ones((2, 3), jnp.complex64)})


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (MatrixAxes((0,), (5,)), "parameter 'w': .* axis 5 is out of range"),
        (MatrixAxes((0,), (1,), (2, 2)), "parameter 'w': .* splits add up to 4"),
    ],
)
def test_axes_that_do_not_fit_are_refused(axes: MatrixAxes, message: str):
    with pytest.raises(ValueError, match=f"scale_by_norm_lmo: {message}"):
        ox.scale_by_norm_lmo("sign", axes=axes).init({"w": jnp.ones((2, 3))})
