"""Checks the references of Muon's successors: recorded runs, tables, laws, by hand."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
import pytest

from tests.references import matrix, muon_family
from tests.references.conventions import Array
from tests.references.golden import (
    MATRIX_GRADS,
    MATRIX_PARAMS,
    POLAR_MATRIX,
    YOU,
)
from tests.references.matrix_trajectories import (
    MatrixTrajectories,
    as_kernel,
    kernel_blocks,
    load_matrix_trajectories,
)
from tests.references.torch_trajectories import blocks

REFERENCES: Mapping[str, Callable[..., list[Array]]] = {
    "muon": matrix.muon,
    "normuon": muon_family.normuon,
    "adamuon": muon_family.adamuon,
    "scion": muon_family.scion,
}

# Polar Express as the paper lists it, then as in the NanoGPT speedrun.
PAPER_ROWS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
SPEEDRUN_ROWS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def over(rows: matrix.Coefficients, safety: float) -> list[muon_family.Row]:
    """Returns the rows as polynomials of x / safety."""
    return [(a / safety, b / safety**3, c / safety**5) for a, b, c in rows]


# gram-newton-schulz has another safety factor.
GRAM_ROWS = over(PAPER_ROWS[:5], 1.05)
# gram-newton-schulz divides by the norm + 1e-7 of a momentum that is a sum, 1 / 0.05
# times ours.
SUM_EPS = 1e-7 * 0.05
# Recorded case -> reference, its arguments. The packages' names and defaults differ.
# Those that bound the norm from below instead of adding to it have an epsilon of zero.
COUNTERPARTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "keller": ("muon", {}),
    "keller_decay": ("muon", {"weight_decay": 0.1}),
    "torch_original": ("muon", {"weight_decay": 0.1, "eps": 0.0}),
    "torch_match_rms_adamw": (
        "muon",
        {"weight_decay": 0.1, "shape_scale": "match_adamw", "eps": 0.0},
    ),
    "timm_original": ("muon", {"eps": 0.0}),
    "timm_match_rms_adamw": (
        "muon",
        {"weight_decay": 0.1, "shape_scale": "match_adamw", "eps": 0.0},
    ),
    "timm_rms_to_rms": (
        "muon",
        {
            "weight_decay": 0.1,
            "nesterov": False,
            "shape_scale": "spectral",
            "ns_coeffs": YOU,
            "eps": 0.0,
        },
    ),
    "moonlight": (
        "muon",
        {"weight_decay": 0.1, "shape_scale": "match_adamw", "eps": 0.0},
    ),
    "dion_muon_spectral": (
        "muon",
        {
            "weight_decay": 0.01,
            "nesterov": False,
            "shape_scale": "spectral",
            "ns_coeffs": YOU,
            "eps": SUM_EPS,
        },
    ),
    "dion_muon_rms": (
        "muon",
        {
            "weight_decay": 0.01,
            "nesterov": False,
            "shape_scale": "match_adamw",
            "ns_coeffs": YOU,
            "eps": SUM_EPS,
        },
    ),
    "gram_muon": (
        "muon",
        {
            "weight_decay": 0.1,
            "shape_scale": "match_adamw",
            "ns_coeffs": GRAM_ROWS,
            "eps": SUM_EPS,
        },
    ),
    "nvidia_muon_keller": ("muon", {"weight_decay": 0.1, "eps": 0.0}),
    "nvidia_muon_spectral": (
        "muon",
        {
            "nesterov": False,
            "shape_scale": "spectral",
            "ns_coeffs": YOU,
            "eps": 0.0,
        },
    ),
    "normuon": ("normuon", {"ns_eps": 0.0}),
    "normuon_decay": ("normuon", {"weight_decay": 0.1, "ns_eps": 0.0}),
    "normuon_plain": (
        "normuon",
        {
            "b2": 0.8,
            "nesterov": False,
            "weight_decay": 0.1,
            "shape_scale": "match_adamw",
            "ns_coeffs": YOU,
            "ns_eps": 0.0,
        },
    ),
    "normuon_rms": (
        "normuon",
        {"weight_decay": 0.1, "rescale": "rms", "ns_eps": 0.0},
    ),
    "nvidia_normuon": ("normuon", {"weight_decay": 0.1, "eps": 0.0, "ns_eps": 0.0}),
    "adamuon": ("adamuon", {"nesterov": False, "weight_decay": 0.0, "ns_eps": 0.0}),
    "adamuon_decay": (
        "adamuon",
        {
            "b1": 0.9,
            "b2": 0.95,
            "nesterov": False,
            "weight_decay": 0.1,
            "eps": 1e-10,
            "norm_eps": 1e-10,
            "ns_eps": 0.0,
        },
    ),
    "timm_adamuon": (
        "adamuon",
        {
            "weight_decay": 0.1,
            "bias_correction": False,
            "eps": 1e-7,
            "norm_eps": 1e-7,
            "ns_eps": 0.0,
        },
    ),
    "adamuon_sign": (
        "adamuon",
        {
            "b2": 0.95,
            "nesterov": False,
            "weight_decay": 0.1,
            "sign": True,
            "bias_correction": False,
            "norm_eps": 0.0,
            "ns_eps": 0.0,
        },
    ),
    "adamuon_sign_nesterov": (
        "adamuon",
        {
            "b2": 0.95,
            "weight_decay": 0.0,
            "sign": True,
            "bias_correction": False,
            "norm_eps": 0.0,
            "eps": 1e-4,
            "ns_eps": 0.0,
        },
    ),
    **{
        f"scion_{name}": (
            "scion",
            {"radius": 3.0, "constrained": False, "ns_eps": 0.0, **arguments},
        )
        for name, arguments in {
            "spectral": {},
            "spectral_unnormalized": {"normalized": False},
            "spectral_at_least_one": {"at_least_one": True},
            "sign": {"kind": "sign"},
            "sign_unnormalized": {"kind": "sign", "normalized": False},
            "column": {"kind": "column"},
            "column_normalized": {"kind": "column", "normalized": True},
            "row": {"kind": "row"},
            "row_unnormalized": {"kind": "row", "normalized": False},
            "bias_rms": {"kind": "bias_rms"},
        }.items()
    },
    **{
        f"scion_{kind}_constrained": (
            "scion",
            {"radius": 3.0, "b1": 0.7, "kind": kind, "ns_eps": 0.0},
        )
        for kind in ("spectral", "sign", "column", "row", "bias_rms")
    },
    "nvidia_scion": (
        "scion",
        {"radius": 3.0, "b1": 0.95, "ns_coeffs": YOU, "ns_eps": 0.0},
    ),
}
CLIPPED_CASES = {
    "muon_clip_query": "query",
    "muon_clip_key": "key",
    "muon_clip_query_rotary": "query_rotary",
    "muon_clip_key_rotary": None,
}


@pytest.fixture(scope="module")
def recorded() -> MatrixTrajectories:
    """The recorded runs of this family, in the place of the others."""
    return load_matrix_trajectories()


def run_counterpart(
    name: str, params: npt.ArrayLike, grads: npt.ArrayLike, learning_rate: float
) -> list[Array]:
    """Runs the reference of a case on a kernel or a vector."""
    method, arguments = COUNTERPARTS[name]
    fan_in, fan_out = np.shape(params) if np.ndim(params) == 2 else (1, 1)
    arguments = {"learning_rate": learning_rate, **arguments}
    if name == "nvidia_normuon" and fan_out < fan_in:
        # One second moment for each input, of which there are more.
        arguments["output_axis"] = 0
    return REFERENCES[method](
        params, grads, fan_in=fan_in, fan_out=fan_out, **arguments
    )


def test_every_recorded_case_is_used(recorded: MatrixTrajectories) -> None:
    assert set(recorded.cases) == set(COUNTERPARTS) | set(CLIPPED_CASES)
    assert recorded.versions["torch"].startswith("2.13.0")


# Relative to the largest parameter of the block in any step. Measured: 8e-16.
FLOAT64 = 5e-15


@pytest.mark.parametrize("name", COUNTERPARTS)
def test_recorded_in_float64(recorded: MatrixTrajectories, name: str) -> None:
    case = recorded.cases[name]
    for leaf, trajectory in case.trajectories["float64"].items():
        for params, grads, expected in kernel_blocks(
            recorded.params[leaf], recorded.grads[leaf], trajectory
        ):
            result = run_counterpart(name, params, grads, case.learning_rate)
            tolerance = FLOAT64 * np.abs(expected).max()
            np.testing.assert_allclose(result, expected, rtol=0, atol=tolerance)


# Share of the largest entry of an update by which the packages' own arithmetic may
# change an entry. In bfloat16 and float16, with 8 and 11 bits, fifteen products add up;
# measured 0.08. NVIDIA's float32 is measured at 1e-5: parameters near 2, rounded, over
# a learning rate of 0.02 and updates near 1.
NATIVE = {"half": 0.12, "float32": 5e-5}


@pytest.mark.parametrize(
    "name",
    [
        "keller",
        "moonlight",
        "dion_muon_spectral",
        "gram_muon",
        "normuon",
        "scion_spectral_constrained",
        "nvidia_muon_keller",
        "nvidia_muon_spectral",
        "nvidia_normuon",
        "nvidia_scion",
    ],
)
def test_recorded_in_their_own_arithmetic(
    recorded: MatrixTrajectories, name: str
) -> None:
    case = recorded.cases[name]
    method, arguments = COUNTERPARTS[name]
    decay = 1.0 if method == "scion" else arguments.get("weight_decay", 0.0)
    tolerance = NATIVE["float32" if name.startswith("nvidia") else "half"]
    assert set(case.trajectories) == {"native", "float64"}
    for leaf, trajectory in case.trajectories["native"].items():
        assert trajectory.dtype == np.float32
        for params, grads, expected in kernel_blocks(
            recorded.params[leaf], recorded.grads[leaf], trajectory
        ):
            result = run_counterpart(name, params, grads, case.learning_rate)
            ours, theirs = (
                updates(params, after, case.learning_rate, decay)
                for after in (result, expected)
            )
            atol = tolerance * np.abs(ours).max()
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


def updates(
    params: npt.ArrayLike, after: npt.ArrayLike, learning_rate: float, decay: float
) -> Array:
    """Returns what was subtracted in each step, decay and learning rate taken off."""
    params, after = np.asarray(params, np.float64), np.asarray(after, np.float64)
    before = np.concatenate([params[None], after[:-1]])
    return (before * (1 - learning_rate * decay) - after) / learning_rate


def test_everything_with_its_own_arithmetic_is_checked(
    recorded: MatrixTrajectories,
) -> None:
    (mark,) = test_recorded_in_their_own_arithmetic.pytestmark
    native = {
        name for name, case in recorded.cases.items() if "native" in case.trajectories
    }
    assert native == set(mark.args[1])


@pytest.mark.parametrize("name", CLIPPED_CASES)
def test_recorded_qk_clip(recorded: MatrixTrajectories, name: str) -> None:
    case = recorded.cases[name]
    factors = muon_family.qk_clip_factors(recorded.max_logits)
    heads = factors.query.shape[1]
    assert set(case.trajectories["float64"]) == {"tall", "wide"}
    for leaf, trajectory in case.trajectories["float64"].items():
        ((w, grads, expected),) = kernel_blocks(
            recorded.params[leaf], recorded.grads[leaf], trajectory
        )
        w = w.astype(np.float64)
        fan_in, fan_out = w.shape
        # What Muon subtracts does not depend on the parameters.
        steps = updates(
            np.zeros_like(w),
            matrix.muon(
                np.zeros_like(w),
                grads,
                learning_rate=1.0,
                fan_in=fan_in,
                fan_out=fan_out,
                nesterov=False,
                shape_scale="match_adamw",
                eps=0.0,
            ),
            learning_rate=1.0,
            decay=0.0,
        )
        for step, theirs in enumerate(expected):
            w = w * (1 - case.learning_rate * 0.1) - case.learning_rate * steps[step]
            if CLIPPED_CASES[name]:
                # The weights of a head are neighbouring outputs.
                factor = getattr(factors, CLIPPED_CASES[name])[step]
                w = w * np.repeat(factor, fan_out // heads)
            np.testing.assert_allclose(w, theirs, rtol=0, atol=FLOAT64)


def test_recorded_logits_reach_every_case(recorded: MatrixTrajectories) -> None:
    logits = recorded.max_logits
    assert logits.shape == (10, 2)
    assert logits.min() < 0
    assert ((logits > 100).any(axis=0) & (logits < 100).any(axis=0)).all()


# The functions that were run on single gradients.
ORTHOGONALIZATIONS: Mapping[str, Callable[[Array, MatrixTrajectories], Array]] = {
    "keller": lambda x, _: matrix.newton_schulz(x),
    # Ten steps: safe, but for the last of the published rows, which repeats.
    "heavyball_polar_express": lambda x, _: matrix.newton_schulz(
        x, [*over(PAPER_ROWS[:-1], 1.01), *[PAPER_ROWS[-1]] * 3], eps=0.0
    ),
    "timm_polar_express_safer": lambda x, recorded: muon_family.newton_schulz_steps(
        x / (1.02 * np.linalg.norm(x)), recorded.tables["timm_polar_express_safer"]
    ),
    "gram": lambda x, _: muon_family.gram_newton_schulz(x, GRAM_ROWS, [2]),
    "gram_reset_never": lambda x, _: muon_family.gram_newton_schulz(x, YOU),
    "gram_reset_1_3": lambda x, _: muon_family.gram_newton_schulz(x, YOU, [1, 3]),
    "nvidia_simple": lambda x, _: matrix.newton_schulz(x, eps=0.0),
    "nvidia_quintic": lambda x, _: matrix.newton_schulz(x, YOU, eps=0.0),
    "nvidia_polar_express": lambda x, recorded: matrix.newton_schulz(
        x,
        [*recorded.tables["nvidia_polar_express"], *[(1.875, -1.25, 0.375)] * 2],
        eps=0.0,
    ),
    "nvidia_cans": lambda x, recorded: matrix.newton_schulz(
        x, recorded.tables["nvidia_cans"], eps=0.0
    ),
    "nvidia_aol": lambda x, recorded: matrix.newton_schulz(
        x, recorded.tables["nvidia_aol"], eps=0.0
    ),
    "nvidia_deepseekv4": lambda x, _: matrix.newton_schulz(
        x, [*[(3.4445, -4.7750, 2.0315)] * 8, *[(2.0, -1.5, 0.5)] * 2], eps=0.0
    ),
}


# Entries are near 1 or below. Fifteen to thirty products of small matrices that blow up
# the smallest singular value by up to 1000; measured 2e-14. The packages' bfloat16 or
# float16, measured 0.054, and NVIDIA's float32, measured 7e-6.
ORTHOGONALIZATION_TOLERANCES = {"float64": 1e-13, "half": 0.08, "float32": 2e-5}


@pytest.mark.parametrize("name", ORTHOGONALIZATIONS)
def test_recorded_orthogonalizations(recorded: MatrixTrajectories, name: str) -> None:
    case = recorded.functions[name]
    native = "float32" if name.startswith("nvidia") else "half"
    for arithmetic, leaves in case.results.items():
        tolerance = ORTHOGONALIZATION_TOLERANCES[
            native if arithmetic == "native" else arithmetic
        ]
        assert set(leaves) == {"tall", "wide", "square", "stack"}
        for leaf, result in leaves.items():
            for grad, expected in zip(
                blocks(recorded.grads[leaf][0], axis=0),
                blocks(result, axis=0),
                strict=True,
            ):
                # In either orientation.
                for x, y in (grad, expected), (grad.T, expected.T):
                    ours = ORTHOGONALIZATIONS[name](x.astype(np.float64), recorded)
                    np.testing.assert_allclose(ours, y, rtol=0, atol=tolerance)


def test_every_recorded_orthogonalization_is_used(
    recorded: MatrixTrajectories,
) -> None:
    assert set(recorded.functions) == set(ORTHOGONALIZATIONS)
    assert all("float64" in case.results for case in recorded.functions.values())


# Published rows -> what makes them. Speedrun and timm: the authors' generator. Paper:
# its listing, to which a safety factor is applied afterwards.
POLAR_EXPRESS_TABLES: Mapping[str, tuple[float, float]] = {
    "speedrun": (1.02, 0.02),
    "timm_polar_express": (1.01, 0.02),
    "timm_polar_express_safer": (1.02, 0.02),
    "paper": (1.0, 0.02407327424182761),
    "heavyball_polar_express": (1.0, 0.02407327424182761),
}


@pytest.mark.parametrize("name", POLAR_EXPRESS_TABLES)
def test_polar_express_rows(recorded: MatrixTrajectories, name: str) -> None:
    published = {"speedrun": SPEEDRUN_ROWS, "paper": PAPER_ROWS}
    expected = np.array(published.get(name, recorded.tables.get(name)))
    safety, cushion = POLAR_EXPRESS_TABLES[name]
    rows = np.array(
        muon_family.polar_express_rows(len(expected), safety=safety, cushion=cushion)
    )
    # Coefficients up to 25, from a few exchanges that each solve four equations.
    # Measured: 2e-14.
    np.testing.assert_allclose(rows[:6], expected[:6], rtol=0, atol=1e-12)
    # The seventh interval is less than 0.01 wide and the eighth less than 1e-4. The
    # four equations are then nearly one, here and where the numbers were made.
    # Measured: 3e-11 and 3e-6.
    np.testing.assert_allclose(rows[6:7], expected[6:7], rtol=0, atol=2e-10)
    np.testing.assert_allclose(rows[7:], expected[7:], rtol=0, atol=1e-5)


def test_derived_polar_express_tables(recorded: MatrixTrajectories) -> None:
    np.testing.assert_array_equal(
        recorded.tables["heavyball_polar_express"], PAPER_ROWS
    )
    np.testing.assert_array_equal(
        recorded.tables["gram_polar_express"], over(PAPER_ROWS[:5], 1.05)
    )
    # Printed with four decimals, most of them rounded, 8.20516 cut.
    np.testing.assert_allclose(
        recorded.tables["nvidia_polar_express"],
        [*over(PAPER_ROWS[:-1], 1.01), PAPER_ROWS[-1]],
        rtol=0,
        atol=1e-4,
    )
    # Where the safety factor is applied makes a difference already in the first row,
    # and so does the cushion.
    inside, outside = (
        muon_family.polar_express_rows(5, safety=1.01)[0],
        over(PAPER_ROWS, 1.01)[0],
    )
    assert inside[0] == pytest.approx(8.2373, abs=5e-5)
    assert outside[0] == pytest.approx(8.2052, abs=5e-5)


@pytest.mark.parametrize("bounds", [(0.02, 1.0), (0.3, 1.02), (0.9, 1.1)])
def test_best_odd_quintic_errs_equally_four_times(bounds: tuple[float, float]) -> None:
    lower, upper = bounds
    x = np.linspace(lower, upper, 100_001)
    a, b, c = muon_family.best_odd_quintic(lower, upper)
    error = 1 - (a * x + b * x**3 + c * x**5)
    extrema = error[np.flatnonzero(np.diff(np.sign(np.diff(error)))) + 1]
    peaks = np.array([error[0], *extrema, error[-1]])
    # 1e5 points miss an extremum by up to half a step, which costs the square of that.
    # Measured: 7e-10.
    np.testing.assert_allclose(np.abs(peaks), np.abs(peaks[0]), rtol=1e-8)
    np.testing.assert_array_equal(np.sign(peaks), [1, -1, 1, -1])


def test_best_odd_quintic_in_the_limit() -> None:
    x = 1.3
    a, b, c = muon_family.best_odd_quintic(x, x * (1 + 1e-6))
    # Value 1 and no first or second derivative at the upper end, 1e-6 away.
    assert a * x + b * x**3 + c * x**5 == pytest.approx(1, rel=1e-5)
    assert a + 3 * b * x**2 + 5 * c * x**4 == pytest.approx(0, abs=1e-5)
    assert 6 * b * x + 20 * c * x**3 == pytest.approx(0, abs=1e-5)


def test_polar_express_keeps_its_band() -> None:
    x = np.geomspace(1e-3, 1, 10_001)
    for row in muon_family.polar_express_rows(5, safety=1.02):
        x = muon_family.odd_polynomial(row, x)
    # Printed with three decimals.
    assert x.min() == pytest.approx(0.859, abs=5e-4)
    assert x.max() == pytest.approx(1.141, abs=5e-4)


SHAPES = [(4, 6), (6, 4), (5, 5), (1, 7), (7, 1)]


@pytest.mark.parametrize("resets", [(), (2,), (0, 1, 3), (1, 2, 3, 4)])
@pytest.mark.parametrize("shape", SHAPES)
def test_gram_newton_schulz_is_newton_schulz(
    shape: tuple[int, int], resets: tuple[int, ...]
) -> None:
    x = np.random.default_rng(0).standard_normal(shape)
    for rows in (matrix.JORDAN, YOU, SPEEDRUN_ROWS):
        # Fifteen products or so of matrices whose singular values are 0.08 or more of
        # the norm; without resets smaller ones would lose digits. Measured: 5e-15.
        np.testing.assert_allclose(
            muon_family.gram_newton_schulz(x, rows, resets),
            matrix.newton_schulz(x, rows),
            rtol=0,
            atol=1e-13,
        )
    assert not muon_family.gram_newton_schulz(np.zeros(shape), resets=resets).any()


def test_a_reset_of_gram_newton_schulz_forgets_rounding() -> None:
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, 4)))[0] for n in (4, 6))
    s = np.geomspace(1, 1e-4, 4)
    x = u * s @ v.T
    s /= np.linalg.norm(s)
    for row in SPEEDRUN_ROWS:
        s = muon_family.odd_polynomial(row, s)
    never, once = (
        np.abs(
            muon_family.gram_newton_schulz(x, SPEEDRUN_ROWS, resets, eps=0.0)
            - u * s @ v.T
        ).max()
        for resets in ((), (2,))
    )
    # The Gram matrix has the squares of the singular values, 1e-8 among them, to 1e-16
    # of the largest, and the recursion multiplies that. Measured: 1e-12 and 3e-14.
    assert once < 1e-13
    assert never > 5e-13


@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_steps(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(1).standard_normal(shape)
    x /= np.linalg.norm(x)
    # The second normalization is by 1 but for its rounding, which the smallest singular
    # values multiply by up to 500.
    np.testing.assert_allclose(
        muon_family.newton_schulz_steps(x, YOU),
        matrix.newton_schulz(x, YOU, eps=0.0),
        rtol=0,
        atol=1e-13,
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_scalings_bound_the_singular_values(shape: tuple[int, int]) -> None:
    x = 30 * np.random.default_rng(2).standard_normal(shape)
    aol, schatten = muon_family.aol_scaled(x), muon_family.schatten_scaled(x)
    # A few roundings: one row alone is scaled to 1 exactly.
    assert np.linalg.norm(aol, 2) <= 1 + 1e-15
    assert np.linalg.norm(schatten, 2) <= 1 + 1e-15
    s = np.linalg.svd(x, compute_uv=False)
    np.testing.assert_allclose(schatten, x / (s**4).sum() ** 0.25, rtol=0, atol=1e-15)
    # Both reach further than the Frobenius norm, and AOL scales the short side only.
    assert np.linalg.norm(schatten, 2) >= np.linalg.norm(x / np.linalg.norm(x), 2)
    wide_ratio = (aol / x) if shape[0] <= shape[1] else (aol / x).T
    np.testing.assert_allclose(wide_ratio, wide_ratio[:, :1] + 0 * wide_ratio)
    # Orthonormal rows are left alone by AOL.
    q = matrix.polar_factor(x)
    np.testing.assert_allclose(muon_family.aol_scaled(q), q, rtol=0, atol=1e-14)
    for scaled in (muon_family.aol_scaled, muon_family.schatten_scaled):
        assert not scaled(np.zeros(shape)).any()


def optax_directions(x: Array, transformation: optax.GradientTransformation) -> Array:
    """Returns the first update of a transformation of one float64 matrix."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        g = jnp.asarray(x)
        result, _ = transformation.update(g, transformation.init(g), g)
    return np.asarray(result)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("preconditioning", ["aol", "schatten"])
def test_scalings_agree_with_optax(
    shape: tuple[int, int], preconditioning: str
) -> None:
    x = np.random.default_rng(3).standard_normal(shape)
    scaled = getattr(muon_family, f"{preconditioning}_scaled")
    expected = optax_directions(
        x,
        optax.contrib.scale_by_muon(
            ns_coeffs=YOU,
            beta=0.0,
            nesterov=False,
            preconditioning=preconditioning,
        ),
    )
    # Fifteen products, and optax scales the first Gram matrix instead of forming it.
    np.testing.assert_allclose(
        muon_family.newton_schulz_steps(scaled(x), YOU), expected, rtol=0, atol=1e-13
    )


@pytest.mark.parametrize(
    ("shape_scale", "consistent_rms"), [("keller", None), ("match_adamw", 0.2)]
)
def test_muon_agrees_with_optax_without_nesterov(
    recorded: MatrixTrajectories, shape_scale: Any, consistent_rms: float | None
) -> None:
    # optax corrects the bias of the momentum. That is a factor, which the normalization
    # takes away; with Nesterov momentum it is not.
    transformation = optax.contrib.muon(
        0.02,
        ns_coeffs=YOU,
        eps=0.0,
        weight_decay=0.1,
        nesterov=False,
        consistent_rms=consistent_rms,
    )
    leaves = ("tall", "wide", "square")
    params = {leaf: as_kernel(recorded.params[leaf]).astype(float) for leaf in leaves}
    grads = {leaf: as_kernel(recorded.grads[leaf]).astype(float) for leaf in leaves}
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        update = jax.jit(transformation.update)
        w = jax.tree.map(jnp.asarray, params)
        state = transformation.init(w)
        trajectory = []
        for step in range(len(grads["tall"])):
            g = {leaf: jnp.asarray(grads[leaf][step]) for leaf in leaves}
            direction, state = update(g, state, w)
            w = optax.apply_updates(w, direction)
            trajectory.append(w)
    for leaf in leaves:
        fan_in, fan_out = params[leaf].shape
        result = matrix.muon(
            params[leaf],
            grads[leaf],
            learning_rate=0.02,
            fan_in=fan_in,
            fan_out=fan_out,
            nesterov=False,
            weight_decay=0.1,
            ns_coeffs=YOU,
            shape_scale=shape_scale,
            eps=0.0,
        )
        expected = [w[leaf] for w in trajectory]
        tolerance = FLOAT64 * np.abs(expected).max()
        np.testing.assert_allclose(result, expected, rtol=0, atol=tolerance)


# The authors' rules, evaluated in float64; for Dion those of its repository's
# dion_simple.py, whose right factor is along the inputs, and of the other versions,
# which have it along the shorter axis. `GOLDEN` has the reference, its arguments, the
# number of printed decimals, and the parameters after three steps.
Q_OF_INPUTS = [[1.0, 0.5], [-0.5, 1.0], [0.25, -1.0]]
Q_OF_OUTPUTS = [[1.0, 0.5], [-0.5, 1.0]]
GOLDEN: Mapping[str, tuple[str, Mapping[str, Any], int, Any]] = {
    "normuon": (
        "normuon",
        {},
        8,
        [[0.9911748, -0.50290653, 0.2207243], [0.46873322, 2.02793958, -1.00193254]],
    ),
    "dion_simple_rank_1": (
        "dion",
        {"q": np.array(Q_OF_INPUTS)[:, :1], "q_axis": 1, "weight_decay": 0.1},
        12,
        [
            [0.991005880436, -0.501768073815, 0.247601202761],
            [0.467147711536, 2.009160626717, -0.983512476896],
        ],
    ),
    "dion_simple_rank_2": (
        "dion",
        {"q": Q_OF_INPUTS, "q_axis": 1, "weight_decay": 0.1},
        12,
        [
            [0.98460902683, -0.488424015992, 0.216490460183],
            [0.458805368561, 2.010706645748, -0.982913558092],
        ],
    ),
    "dion_rank_1": (
        "dion",
        {"q": np.array(Q_OF_OUTPUTS)[:, :1], "weight_decay": 0.1},
        12,
        [
            [1.001217669693, -0.498969476515, 0.237132242444],
            [0.473960358572, 2.001792056717, -0.973588716401],
        ],
    ),
    "dion_rank_2": (
        "dion",
        {"q": Q_OF_OUTPUTS, "weight_decay": 0.1},
        12,
        [
            [0.989505930765, -0.492266438681, 0.214238316754],
            [0.458103001845, 2.010493437786, -0.985735298497],
        ],
    ),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str, transposed: bool) -> None:
    method, arguments, decimals, expected = GOLDEN[name]
    # The problem is (fan_out, fan_in); as a kernel its axes change names.
    params, grads = np.array(MATRIX_PARAMS), np.array(MATRIX_GRADS)
    arguments = {"output_axis": 0, **arguments}
    if transposed:
        params, grads = params.T, np.swapaxes(grads, 1, 2)
        axes = {k: 1 - v for k, v in arguments.items() if k.endswith("_axis")}
        arguments = {**arguments, **axes}
    result = getattr(muon_family, method)(
        params, grads, learning_rate=0.02, fan_in=3, fan_out=2, **arguments
    )[-1]
    # Half a unit of the last decimal; 1 % on top for numbers on the edge.
    np.testing.assert_allclose(
        result.T if transposed else result,
        expected,
        rtol=0,
        atol=0.505 * 10.0**-decimals,
    )


def test_golden_matrix_after_gram_newton_schulz() -> None:
    expected = [
        [-0.68375255, 0.25994363, 0.6611569],
        [0.69038189, 0.45611518, 0.53006467],
    ]
    # Printed with eight decimals.
    np.testing.assert_allclose(
        muon_family.gram_newton_schulz(POLAR_MATRIX, YOU, [2]),
        expected,
        rtol=0,
        atol=0.505e-8,
    )


@pytest.fixture
def kernel() -> tuple[Array, Array]:
    """Parameters (3, 5) and four gradients."""
    rng = np.random.default_rng(4)
    return rng.standard_normal((3, 5)), rng.standard_normal((4, 3, 5))


SIZES = {"fan_in": 3, "fan_out": 5}


def test_normuon_makes_the_first_update_of_all_neurons_equally_long(
    kernel: tuple[Array, Array],
) -> None:
    params, grads = kernel
    (after,) = muon_family.normuon(
        params, grads[:1], learning_rate=1.0, ns_coeffs=None, eps=0.0, **SIZES
    )
    update = params - after
    # As long as the polar factor, whose three singular values are 1, times
    # sqrt(5 / 3): 5 spread over five neurons.
    np.testing.assert_allclose((update**2).sum(axis=0), np.ones(5), rtol=1e-14)
    (after,) = muon_family.normuon(
        params, grads[:1], learning_rate=1.0, eps=0.0, rescale="rms", **SIZES
    )
    np.testing.assert_allclose(
        ((params - after) ** 2).mean(axis=0), np.full(5, 0.04), rtol=1e-14
    )


def test_normuon_of_one_neuron_is_muon(kernel: tuple[Array, Array]) -> None:
    # The mean square is one number, which the rescaling takes away.
    params, grads = kernel
    params, grads = params[:, :1], grads[:, :, :1]
    sizes = {"fan_in": 3, "fan_out": 1}
    np.testing.assert_allclose(
        muon_family.normuon(params, grads, learning_rate=0.1, **sizes),
        matrix.muon(params, grads, learning_rate=0.1, **sizes),
        rtol=0,
        # Two epsilons of 1e-10 in four steps of 0.1.
        atol=1e-10,
    )


def test_adamuon_first_takes_signs(kernel: tuple[Array, Array]) -> None:
    params, grads = kernel
    for sign in (False, True):
        (after,) = muon_family.adamuon(
            params,
            grads[:1],
            learning_rate=0.1,
            weight_decay=0.0,
            sign=sign,
            ns_coeffs=None,
            eps=0.0,
            norm_eps=0.0,
            **SIZES,
        )
        polar = matrix.polar_factor(np.sign(grads[0]) if sign else grads[0])
        np.testing.assert_allclose(
            after, params - 0.1 * 0.2 * np.sign(polar), rtol=0, atol=1e-15
        )


def test_adamuon_rescales_the_bias_correction_away(
    kernel: tuple[Array, Array],
) -> None:
    params, grads = kernel
    arguments = {"learning_rate": 0.1, "eps": 0.0, "norm_eps": 0.0, **SIZES}
    corrected, raw = (
        muon_family.adamuon(params, grads, bias_correction=correction, **arguments)
        for correction in (True, False)
    )
    np.testing.assert_allclose(corrected, raw, rtol=0, atol=1e-14)
    # Every update has a root mean square of 0.2.
    u = updates(params, raw, 0.1, 0.01)
    np.testing.assert_allclose((u**2).mean(axis=(1, 2)), np.full(4, 0.04), rtol=1e-13)


def dual_norm(x: Array, kind: str) -> float:
    """Returns the largest inner product with the ball that `norm_lmo` names."""
    fan_in, fan_out = x.shape
    return {
        "spectral": np.linalg.svd(x, compute_uv=False).sum()
        * (fan_out / fan_in) ** 0.5,
        "sign": np.abs(x).sum() / fan_in,
        "column": np.sqrt((x**2).sum(axis=1)).sum() * fan_out**0.5,
        "row": np.sqrt((x**2).sum(axis=0)).sum() / fan_in**0.5,
        "bias_rms": np.sqrt((x**2).sum()) * x.size**0.5,
    }[kind]


@pytest.mark.parametrize("kind", ["spectral", "sign", "column", "row", "bias_rms"])
def test_norm_lmo_is_furthest_in_its_ball(
    kernel: tuple[Array, Array], kind: muon_family.Norm
) -> None:
    x, directions = kernel
    arguments = {"ns_coeffs": None, "eps": 0.0, **SIZES}
    lmo = muon_family.norm_lmo(x, kind, **arguments)
    assert (x * lmo).sum() == pytest.approx(dual_norm(x, kind), rel=1e-13)
    for other in directions:
        element = muon_family.norm_lmo(other, kind, **arguments)
        assert (x * element).sum() < (x * lmo).sum()
        # In the papers' orientation the same comes out.
        np.testing.assert_allclose(
            muon_family.norm_lmo(other.T, kind, output_axis=0, **arguments).T,
            element,
            rtol=1e-13,
        )


@pytest.mark.parametrize("kind", ["spectral", "sign", "column", "row", "bias_rms"])
def test_constrained_scion_stays_in_its_ball(
    kernel: tuple[Array, Array], kind: muon_family.Norm
) -> None:
    params, grads = kernel
    arguments = {"ns_coeffs": None, "eps": 0.0, **SIZES}
    start = 3.0 * muon_family.norm_lmo(params, kind, **arguments)
    for w in muon_family.scion(
        start,
        np.tile(grads, (9, 1, 1)),
        learning_rate=0.3,
        kind=kind,
        radius=3.0,
        **arguments,
    ):
        # The norm of w is the largest of its products with what has dual norm 1, of
        # which six are tried.
        for direction in (w, start, *grads):
            limit = 3.0 * dual_norm(direction, kind)
            assert abs((w * direction).sum()) <= limit * (1 + 1e-13)


def test_unconstrained_scion_is_muon(kernel: tuple[Array, Array]) -> None:
    params, grads = kernel
    np.testing.assert_allclose(
        muon_family.scion(
            params, grads, learning_rate=0.1, b1=0.95, constrained=False, **SIZES
        ),
        matrix.muon(
            params,
            grads,
            learning_rate=0.1,
            nesterov=False,
            shape_scale="spectral",
            **SIZES,
        ),
        rtol=0,
        # The factors are multiplied in another order.
        atol=1e-15,
    )


def run_dion(params: Array, grads: Any, **arguments: Any) -> list[Array]:
    """Runs Dion without what the laws below do not hold for."""
    return muon_family.dion(
        params,
        grads,
        learning_rate=1.0,
        weight_decay=0.0,
        **{"eps": 0.0, **SIZES, **arguments},
    )


# Dion's and Muon's factor on the update.
SPECTRAL = (5 / 3) ** 0.5


def test_dion_of_full_rank_from_the_right_start_is_orthogonal(
    kernel: tuple[Array, Array],
) -> None:
    params, grads = kernel
    u, _, vh = np.linalg.svd(grads[0], full_matrices=False)
    update = SPECTRAL * matrix.polar_factor(grads[0])
    for q_axis, q in ((0, u), (1, vh.T)):
        first, second = run_dion(params, [grads[0]] * 2, q=q, q_axis=q_axis)
        # The singular vectors of the momentum stay what they are.
        np.testing.assert_allclose(params - first, update, rtol=0, atol=1e-14)
        np.testing.assert_allclose(first - second, update, rtol=0, atol=1e-14)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_dion_finds_the_largest_singular_values(
    kernel: tuple[Array, Array], rank: int
) -> None:
    params, grads = kernel
    u, _, vh = np.linalg.svd(grads[0], full_matrices=False)
    (after,) = run_dion(params, grads[:1], q=grads[1][:, :rank], power_iterations=500)
    # What is left of the others falls with the 1000th power of a ratio of two of them.
    np.testing.assert_allclose(
        params - after, SPECTRAL * u[:, :rank] @ vh[:rank], rtol=0, atol=1e-12
    )


def test_dion_keeps_what_it_has_not_used(kernel: tuple[Array, Array]) -> None:
    params, grads = kernel
    u, s, vh = np.linalg.svd(grads[0], full_matrices=False)
    momentum = grads[0] - 0.75 * s[0] * np.outer(u[:, 0], vh[0])
    # A second gradient that, together with what must be left, is the third one.
    first, second = run_dion(
        params, [grads[0], grads[2] - momentum], q=u[:, :1], b1=0.25
    )
    p = grads[2].T @ u[:, 0]
    p /= np.linalg.norm(p)
    q = grads[2] @ p
    q /= np.linalg.norm(q)
    np.testing.assert_allclose(
        first - second, SPECTRAL * np.outer(q, p), rtol=0, atol=1e-14
    )


def test_dion_does_nothing_without_a_gradient(kernel: tuple[Array, Array]) -> None:
    params, grads = kernel
    q = grads[1][:, :2]
    zero, after = run_dion(params, [np.zeros_like(params), grads[0]], q=q)
    np.testing.assert_array_equal(zero, params)
    # The columns of the right factor have become unit vectors, which changes nothing.
    (expected,) = run_dion(params, [grads[0]], q=q)
    np.testing.assert_allclose(after, expected, rtol=0, atol=1e-14)


def test_dion_puts_its_right_factor_along_the_shorter_axis(
    kernel: tuple[Array, Array],
) -> None:
    params, grads = kernel
    arguments = {"learning_rate": 1.0, "q": grads[1][:, :2], **SIZES}
    wide = muon_family.dion(params, grads, **arguments)
    tall = muon_family.dion(
        params.T, np.swapaxes(grads, 1, 2), output_axis=0, **arguments
    )
    np.testing.assert_allclose(wide, np.swapaxes(tall, 1, 2), rtol=0, atol=1e-14)
    # And along the inputs of a square matrix.
    arguments = {**arguments, "fan_out": 3}
    for output_axis in (0, 1):
        square = params[:, :3], grads[:, :, :3]
        np.testing.assert_array_equal(
            muon_family.dion(*square, output_axis=output_axis, **arguments),
            muon_family.dion(
                *square, output_axis=output_axis, q_axis=1 - output_axis, **arguments
            ),
        )


def test_qk_clip_factors() -> None:
    logits = [400.0, 100.0, 50.0, 0.0, -1000.0]
    query, key, query_rotary = muon_family.qk_clip_factors(logits)
    np.testing.assert_array_equal(query, [0.5, 1, 1, 1, 1])
    np.testing.assert_array_equal(key, query)
    np.testing.assert_array_equal(query_rotary, [0.25, 1, 1, 1, 1])
    # All of it on the keys.
    query, key, _ = muon_family.qk_clip_factors(logits, threshold=200.0, alpha=0.0)
    np.testing.assert_array_equal(query, np.ones(5))
    np.testing.assert_array_equal(key, [0.5, 1, 1, 1, 1])


@pytest.mark.parametrize("q_axis", [0, 1])
@pytest.mark.parametrize("method", ["normuon", "adamuon", "scion", "dion"])
def test_references_never_write_into_their_inputs(
    kernel: tuple[Array, Array], method: str, q_axis: int
) -> None:
    params, grads = kernel
    q = np.ones((params.shape[q_axis], 1))
    arguments = {"q": q, "q_axis": q_axis} if method == "dion" else {}
    before = params.copy(), grads.copy(), q.copy()
    reference = getattr(muon_family, method)
    result = reference(params, grads, learning_rate=0.1, **arguments, **SIZES)
    for x, y in zip(before, (params, grads, q), strict=True):
        np.testing.assert_array_equal(x, y)
    assert not any(np.shares_memory(x, params) for x in result)
    # A constant schedule is the same as a number.
    scheduled = reference(
        params, grads, learning_rate=lambda _: 0.1, **arguments, **SIZES
    )
    np.testing.assert_array_equal(scheduled, result)


@pytest.mark.parametrize("ns_coeffs", [None, YOU])
@pytest.mark.parametrize("method", ["normuon", "adamuon", "scion", "dion"])
def test_zero_gradients_change_nothing(
    kernel: tuple[Array, Array], method: str, ns_coeffs: Any
) -> None:
    params, grads = kernel
    arguments: dict[str, Any] = (
        {"q": np.ones((3, 1)), "weight_decay": 0.0}
        if method == "dion"
        else {"ns_coeffs": ns_coeffs}
    )
    if method == "scion":
        arguments["constrained"] = False
    elif method == "adamuon":
        arguments["weight_decay"] = 0.0
    result = getattr(muon_family, method)(
        params, 0 * grads, learning_rate=0.1, **arguments, **SIZES
    )
    np.testing.assert_array_equal(result, [params] * len(grads))
