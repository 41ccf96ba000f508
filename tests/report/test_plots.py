"""Figures: what is drawn of which data, the same bytes, no trace in matplotlib."""

import subprocess
import sys
from itertools import combinations

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

import optaxplus as ox
from optaxplus.report import plots

STEPS = np.arange(0, 50, 10)
LOSSES = {"adamw": [5, 4, 3, 2, 1.5], "muon": [[5, 3, 2, 1, 0.5], [6, 4, 3, 2, 1]]}
GRID = np.linspace(-2, 2, 30)
BOWL = (GRID, GRID, GRID**2 + 4 * GRID[:, None] ** 2)
PATHS = {"sgd": [[1, 1], [0.5, -0.5], [0.1, 0.1]], "lion": [[1, 1], [0, 0], [0, 0.1]]}
MATRIX = np.random.default_rng(0).standard_normal((8, 6))
BYTES = {"adamw": {"params": 4e9, "state": 8e9}, "sgd": {"params": 4e9}}

CALLS = {
    "loss_curves": lambda **k: plots.loss_curves(LOSSES, STEPS, **k),
    "trajectories": lambda **k: plots.trajectories(BOWL, PATHS, minima=[0, 0], **k),
    "singular_values": lambda **k: plots.singular_values({"before": MATRIX}, **k),
    "memory_bars": lambda **k: plots.memory_bars(BYTES, **k),
}
each_plot = pytest.mark.parametrize("name", CALLS)


def lines_of(figure):
    return {line.get_label(): line for line in figure.axes[0].lines}


# What all have in common


@each_plot
@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_same_data_give_the_same_bytes(name, ending, tmp_path):
    files = [tmp_path / f"{number}.{ending}" for number in range(2)]
    assert isinstance(CALLS[name](path=files[0]), Figure)
    with matplotlib.rc_context({"svg.hashsalt": "other", "font.size": 20}):
        CALLS[name](path=str(files[1]))
    first, second = (file.read_bytes() for file in files)
    assert first == second
    # A year in the metadata would be a date.
    assert not any(word in first for word in (b"CreationDate", b"dc:date", b"tIME"))
    assert len(first) > 3000


@each_plot
def test_nothing_global_changes(name, tmp_path):
    with matplotlib.rc_context({"axes.grid": True, "lines.linewidth": 7}):
        before = dict(matplotlib.rcParams)
        figure = CALLS[name](path=tmp_path / "a.png", title="Title")
        assert dict(matplotlib.rcParams) == before
    assert figure.axes[0].get_title() == "Title"
    with pytest.raises(ValueError, match="path"):
        CALLS[name](path="a.gif")
    assert dict(matplotlib.rcParams) != before


def test_pyplot_is_not_imported():
    code = (
        "import sys; from optaxplus.report import plots; "
        "assert 'matplotlib' not in sys.modules; plots.loss_curves({'a': [1, 2]}); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@each_plot
def test_axes_of_the_caller_are_drawn_into(name, tmp_path):
    figure = Figure()
    left, right = figure.subfigures(1, 2)
    ax = right.subplots()
    assert CALLS[name](ax=ax, path=tmp_path / "a.png") is figure
    assert ax.has_data()
    assert not left.axes
    assert (tmp_path / "a.png").exists()


@each_plot
def test_every_axis_says_what_it_shows(name):
    axes = CALLS[name]().axes[0]
    assert axes.get_xlabel()
    assert axes.get_ylabel() or [text.get_text() for text in axes.get_yticklabels()]


@each_plot
def test_a_legend_can_be_left_out(name):
    def legends(figure):
        return [*figure.legends, *filter(None, [figure.axes[0].get_legend()])]

    assert len(legends(CALLS[name]())) == 1
    assert not legends(CALLS[name](legend=False))
    with pytest.raises(TypeError, match=f"{name}: legend='no' is not allowed"):
        CALLS[name](legend="no")


@each_plot
def test_without_matplotlib_the_extra_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=rf"{name}: .*pip install optaxplus\[plot\]"):
        CALLS[name]()


def test_what_a_broken_matplotlib_lacks_is_said_as_it_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(ModuleNotFoundError, match=r"matplotlib\.style"):
        CALLS["memory_bars"]()


def test_curves_differ_without_colour():
    losses = {f"optimizer {number}": [1, 2] for number in range(30)}
    lines = plots.loss_curves(losses).axes[0].lines
    looks = [
        (line.get_linestyle(), line._dash_pattern, line.get_marker()) for line in lines
    ]
    assert all(a != b for a, b in combinations(looks, 2))


def test_bars_differ_without_colour():
    parts = {f"part {number}": 1.0 for number in range(8)}
    bars = plots.memory_bars({"all": parts}).axes[0].patches
    assert len({bar.get_hatch() for bar in bars}) == 8


def test_names_are_text():
    label = "$a$ of $b$"
    figure = plots.loss_curves({label: [1, 2]})
    text = figure.axes[0].get_legend().get_texts()[0]
    assert text.get_text() == r"\$a\$ of \$b\$"
    figure.draw_without_rendering()


# Losses


def test_losses_and_their_spread():
    figure = plots.loss_curves(LOSSES, STEPS, reference={"best": 1.5}, ylabel="nats")
    lines = lines_of(figure)
    muon = lines["muon (median, range of 2 runs)"]
    np.testing.assert_array_equal(lines["adamw"].get_xdata(), STEPS)
    np.testing.assert_array_equal(lines["adamw"].get_ydata(), LOSSES["adamw"])
    np.testing.assert_array_equal(muon.get_ydata(), [5.5, 3.5, 2.5, 1.5, 0.75])
    assert list(lines["best"].get_ydata()) == [1.5, 1.5]
    (band,) = figure.axes[0].collections
    (outline,) = band.get_paths()
    corners = {tuple(point) for point in outline.vertices}
    assert {(10, 3), (10, 4), (40, 0.5), (40, 1)} <= corners


@pytest.mark.parametrize("dtype", ["int32", "float16", "bfloat16", "float32"])
def test_numbers_of_any_kind(dtype):
    losses = jnp.array([4, 2, 1], dtype)
    line = plots.loss_curves({"a": losses}, {"a": losses}).axes[0].lines[0]
    np.testing.assert_array_equal(line.get_xydata(), [[4, 4], [2, 2], [1, 1]])


def test_steps_by_name():
    steps = {"a": [0, 1, 2], "b": [5, 9]}
    lines = lines_of(plots.loss_curves({"a": [3, 2, 1], "b": [1, 2]}, steps))
    assert {name: list(line.get_xdata()) for name, line in lines.items()} == steps
    (line,) = plots.loss_curves({"a": [3, 2, 1]}).axes[0].lines
    assert list(line.get_xdata()) == [0, 1, 2]


def test_the_first_losses_may_be_cropped():
    losses = {"a": [100, 3, 2, 2, 1]}
    assert plots.loss_curves(losses).axes[0].get_ylim()[1] > 100
    low, high = plots.loss_curves(losses, crop_start=0.2).axes[0].get_ylim()
    assert 0 < low < 1 < 3 < high < 4


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("losses", [[1, 1], [0, 0], [-1, -1], [np.nan, np.nan]])
def test_losses_that_leave_nothing_to_scale(log, losses, tmp_path):
    plots.loss_curves({"a": losses}, log=log, path=tmp_path / "a.png")


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([2.0, 2.1], {"2", "2.1"}),
        ([2.0, 4.5], {"2", "3", "4"}),
        ([2.0, 150.0], {"2", "5", "10", "20", "50", "100"}),
    ],
)
def test_a_logarithmic_axis_has_numbers(losses, expected):
    figure = plots.loss_curves({"a": losses}, log=True)
    figure.draw_without_rendering()
    assert figure.axes[0].get_yscale() == "log"
    ticks = figure.axes[0].yaxis.get_ticklabels(which="both")
    low, high = figure.axes[0].get_ylim()
    shown = {text.get_text() for text in ticks if low < text.get_position()[1] < high}
    assert expected <= shown
    assert len(shown) <= 9


def test_runs_that_diverge_are_not_forgotten():
    runs = [[3, 2, 1], [4, 3, 2], [5, np.nan, np.inf]]
    figure = plots.loss_curves(
        {"one": [3, np.inf, np.nan], "some": runs}, [0, 100, 200]
    )
    one, some = figure.axes[0].lines
    assert one.get_label() == "one (not finite from 100)"
    assert some.get_label() == "some (median, range of 3 runs, 1 not finite)"
    np.testing.assert_array_equal(one.get_ydata(), [3, np.nan, np.nan])
    # Those that diverge are the worst.
    np.testing.assert_array_equal(some.get_ydata(), [4, 3, 2])


# Trajectories


def test_paths_are_drawn_from_their_start_to_their_end():
    figure = plots.trajectories(BOWL, PATHS, minima=[[0, 0]], value_label="f")
    lines = lines_of(figure)
    np.testing.assert_array_equal(lines["sgd"].get_xydata(), PATHS["sgd"])
    np.testing.assert_array_equal(lines["_sgd end"].get_xydata(), PATHS["sgd"][-1:])
    np.testing.assert_array_equal(lines["_start"].get_xydata(), [[1, 1]])
    assert lines["sgd"].get_markevery() == [1, 2]
    np.testing.assert_array_equal(lines["_minimum"].get_xydata(), [[0, 0]])
    axes, bar = figure.axes
    assert len(plots.trajectories(BOWL, PATHS, colorbar=False).axes) == 1
    assert (*axes.get_xlim(), *axes.get_ylim()) == (-2, 2, -2, 2)
    assert bar.get_ylabel() == "f"


def test_paths_that_leave_or_diverge_say_so(tmp_path):
    far = [[1, 1], [1e30, -1e30]]
    broken = [[1, 1], [0, 1], [np.nan, 1], [np.inf, 0]]
    gap = [[1, 1], [np.nan, 1], [0, 0]]
    paths = {"far": far, "broken": broken, "none": [[np.nan, np.nan]], "gap": gap}
    figure = plots.trajectories(BOWL, paths, path=tmp_path / "a.svg")
    assert {"far (ends outside)", "broken (not finite from 2)"} <= lines_of(
        figure
    ).keys()
    assert "none (not finite from 0)" in lines_of(figure)
    assert "gap (not finite in 1 of 3 points)" in lines_of(figure)


def test_rows_of_the_surface_are_y():
    x, y = np.array([0.0, 1, 2]), np.array([10.0, 20])
    values = x + 100 * y[:, None]
    figure = plots.trajectories((x, y, values), {"a": [[1, 15]]})
    # The lowest level begins at the lowest row.
    assert (*figure.axes[0].get_xlim(), *figure.axes[0].get_ylim()) == (0, 2, 10, 20)


@pytest.mark.parametrize("shift", [-3.0, 0.0, 1e-9])
def test_functions_below_zero_and_with_holes(shift, tmp_path):
    # An odd number of points, so that 0 is one of them.
    x = y = np.linspace(-2, 2, 31)
    values = x**2 + 4 * y[:, None] ** 2
    assert values.min() == 0
    holes = np.where(values > 15, np.nan, values + shift)
    path = tmp_path / "a.png"
    figure = plots.trajectories((x, y, holes), {"a": [[1, 1]]}, path=path)
    levels = figure.axes[0].collections[0].levels
    assert len(levels) > 5
    assert (levels[0] < 0) == (shift < 0)


# Singular values


def test_singular_values_of_matrices_and_as_given():
    exact = np.linalg.svd(MATRIX, compute_uv=False)
    figure = plots.singular_values({"matrix": MATRIX, "given": exact[::-1]})
    for line in figure.axes[0].lines:
        np.testing.assert_allclose(line.get_ydata(), exact)
        assert list(line.get_xdata()) == [1, 2, 3, 4, 5, 6]
    assert figure.axes[0].get_yscale() == "log"


def test_values_that_are_zero_are_counted():
    low_rank = np.outer(np.arange(1, 5), np.arange(1, 4))
    figure = plots.singular_values({"a": low_rank, "b": np.zeros((2, 2)), "c": [1, 2]})
    labels = list(lines_of(figure))
    assert labels == ["a (2 of 3 are 0, or nearly)", "b (2 of 2 are 0, or nearly)", "c"]
    low, high = figure.axes[0].get_ylim()
    assert 0.1 < low < 1 < 20 < high


# Memory


def test_bars_are_stacked_and_summed():
    figure = plots.memory_bars(BYTES)
    bars = [(bar.get_x(), bar.get_width()) for bar in figure.axes[0].patches]
    assert bars == [(0, 4e9), (0, 4e9), (4e9, 8e9), (4e9, 0)]
    texts = [text.get_text().strip() for text in figure.axes[0].texts]
    assert texts == ["4 GB", "4 GB", "8 GB", "12 GB", "4 GB"]
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert names == ["adamw", "sgd"]


def test_reports_of_memory():
    params = {"dense": {"kernel": jnp.ones((16, 8))}}
    report = ox.memory_report(ox.adamw(0.1), params, grads_dtype="bfloat16")
    figure = plots.memory_bars({"adamw": report})
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert widths == [report.params, report.grads, report.state]
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert labels == ["parameters", "gradients", "optimizer state"]


def test_no_bytes_at_all(tmp_path):
    plots.memory_bars({"none": {"state": 0}}, path=tmp_path / "a.png")


# What is refused

WRONG = [
    (plots.loss_curves, ([1, 2],), TypeError, "losses has the type list"),
    (
        plots.loss_curves,
        ({},),
        ValueError,
        "losses={} is not allowed; there is nothing",
    ),
    (plots.loss_curves, ({"a": []},), ValueError, r"losses\['a'\] has shape \(0,\)"),
    (plots.loss_curves, ({"a": 1.0},), ValueError, r"losses\['a'\] has shape \(\)"),
    (
        plots.loss_curves,
        ({"a": [[1], [1, 2]]},),
        ValueError,
        r"losses\['a'\] is ragged",
    ),
    (plots.loss_curves, ({"a": ["1"]},), TypeError, r"losses\['a'\] has the dtype <U1"),
    (plots.loss_curves, ({"a": [1, None]},), TypeError, "the dtype object"),
    (plots.loss_curves, ({"a": [1j]},), TypeError, "the dtype complex128"),
    (plots.loss_curves, ({"_a": [1]},), ValueError, r"losses\['_a'\] is not allowed"),
    (plots.loss_curves, ({"a": [1]}, [0, 1]), ValueError, r"steps has shape \(2,\)"),
    (
        plots.loss_curves,
        ({"a": [1]}, [np.nan]),
        ValueError,
        "1 of its 1 numbers are not",
    ),
    (
        plots.loss_curves,
        ({"a": [1]}, {"b": [1]}),
        ValueError,
        r"names \['b'\], .*\['a'\]",
    ),
    (
        plots.loss_curves,
        ({"a": [1]}, {"a": [1, 2]}),
        ValueError,
        r"steps\['a'\] has shape \(2,\), .*losses\['a'\] has 1 points",
    ),
    (plots.trajectories, (BOWL, {}), ValueError, "iterates={} is not allowed"),
    (plots.trajectories, (BOWL, {"a": [1, 2]}), ValueError, r"shape \(2,\)"),
    (plots.trajectories, (BOWL, {"a": [[1, 2, 3]]}), ValueError, r"shape \(1, 3\)"),
    (plots.trajectories, (BOWL[:2], PATHS), TypeError, "surface .*three arrays"),
    (
        plots.trajectories,
        ((GRID[::-1], GRID, BOWL[2]), PATHS),
        ValueError,
        r"surface\[0\] is not allowed.* each larger",
    ),
    (
        plots.trajectories,
        ((GRID, GRID[1:], BOWL[2]), PATHS),
        ValueError,
        r"surface\[2\] has shape \(30, 30\).*must be \(29, 30\)",
    ),
    (
        plots.trajectories,
        ((GRID, GRID, np.ones((30, 30))), PATHS),
        ValueError,
        r"surface\[2\] is not allowed; it has no two finite values",
    ),
    (plots.singular_values, ({},), ValueError, "matrices={} is not allowed"),
    (plots.singular_values, ({"a": [1, -1]},), ValueError, "has -1 in it"),
    (plots.singular_values, ({"a": [[np.nan]]},), ValueError, "are not finite"),
    (plots.singular_values, ({"a": np.ones((2, 2, 2))},), ValueError, r"\(2, 2, 2\)"),
    (plots.memory_bars, ({},), ValueError, "memory={} is not allowed"),
    (plots.memory_bars, ({"a": 1},), TypeError, r"memory\['a'\] has the type int"),
    (plots.memory_bars, ({"a": {}},), ValueError, r"memory\['a'\]={} is not allowed"),
    (plots.memory_bars, ({"a": {"b": -1}},), ValueError, r"memory\['a'\]\['b'\]=-1"),
    (plots.memory_bars, ({"a": {"b": "1"}},), TypeError, r"memory\['a'\]\['b'\]='1'"),
]


@pytest.mark.parametrize(("plot", "arguments", "kind", "message"), WRONG)
def test_refuses(plot, arguments, kind, message):
    with pytest.raises(kind, match=f"^{plot.__name__}: .*{message}"):
        plot(*arguments)


def test_refuses_options():
    with pytest.raises(ValueError, match=r"loss_curves: crop_start=1 is not allowed"):
        plots.loss_curves(LOSSES, crop_start=1)
    with pytest.raises(TypeError, match="loss_curves: log=1 is not allowed"):
        plots.loss_curves(LOSSES, log=1)
    with pytest.raises(ValueError, match=r"reference\['a'\] .*1 of its 1 numbers"):
        plots.loss_curves(LOSSES, reference={"a": np.inf})
    with pytest.raises(ValueError, match=r"trajectories: minima has shape \(1, 3\)"):
        plots.trajectories(BOWL, PATHS, minima=[0, 0, 0])
    for call in CALLS.values():
        with pytest.raises(TypeError, match="ax='left' is not allowed"):
            call(ax="left")
        with pytest.raises(ValueError, match=r"path='a.gif' .*\.png, \.svg, \.pdf"):
            call(path="a.gif")
