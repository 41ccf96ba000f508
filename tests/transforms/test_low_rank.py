"""APOLLO: the authors' runs, its reference, projections, limiter, invariances."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from optaxplus import MatrixAxes
from tests.assertions import assert_finite, assert_trees_close, assert_trees_equal
from tests.references.low_rank import apollo
from tests.references.test_low_rank import CASES, PATH
from tests.trajectories import follow_in_float64
from tests.transforms.apollo_runs import MINI, STACK, follow, gradients, start
from tests.transforms.projections import projection

SHAPES = [(8, 12), (12, 8), (8, 8)]
# Updates as the reference has them.
AS_UPDATES = {"learning_rate": -1.0}
NO_LIMIT = {"max_norm_growth": None}
# float32: a few dozen roundings of 6e-8; products by P cancel.
FLOAT32 = 1e-5


def reference(grads, *, rank=256, update_interval=200, seed=0, **arguments):
    """Updates of the reference with the library's projections."""
    side = min(grads[0].shape)

    def of_step(step):
        return projection(
            rank, side, step=step, update_interval=update_interval, seed=seed
        )

    zeros = np.zeros(grads[0].shape)
    trajectory = apollo(zeros, grads, of_step, **AS_UPDATES, **arguments)
    return np.diff(trajectory, axis=0, prepend=zeros[None])


# Agreement


@pytest.mark.parametrize(
    ("name", "leaf"),
    [
        ("channel", "square"),
        ("channel", "tall"),
        ("channel_decay", "wide"),
        ("mini", "wide"),
        *(
            pytest.param(name, "wide", marks=pytest.mark.slow)
            for name in ("channel", "channel_unlimited", "mini_front")
        ),
    ],
)
def test_authors(name: str, leaf: str, monkeypatch):
    """Their runs, with their projections in the place of ours."""
    with np.load(PATH) as file:
        recorded = {key: file[key] for key in file.files}
    case = json.loads(str(recorded["description"]))["cases"][name]
    table = recorded[f"{name}/{leaf}/projections"][::4]

    def theirs(seed, interval, rank, side):
        assert table.shape[1:] == (rank, side)
        return jnp.asarray(table)[interval]

    monkeypatch.setattr("optaxplus.transforms.low_rank._projection", theirs)
    start = recorded[f"params/{leaf}"].T
    arguments = {k: v for k, v in CASES[name].items() if k != "weight_decay"}
    decay = CASES[name].get("weight_decay", 0.0)
    tx = optax.chain(
        ox.scale_by_apollo(
            rank=case["group"]["rank"],
            update_interval=4,
            axes=MatrixAxes((0,), (1,)),
            **arguments,
        ),
        ox.descend(0.01, decay),
    )
    grads = np.swapaxes(recorded[f"grads/{leaf}"], 1, 2)
    found = follow_in_float64(tx, start, grads) - start
    moved = np.swapaxes(recorded[f"{name}/{leaf}"], 1, 2) - start
    # Their 1e-8 beside norms of 0.01 and more; they decay what the step has made, which
    # is 0.01·0.1 of every step less.
    rtol = 2e-3 if decay else 1e-5
    np.testing.assert_allclose(found, moved, rtol=0, atol=rtol * np.abs(moved).max())


@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        ((8, 12), {"rank": 3, "update_interval": 2}),
        ((12, 8), {"rank": 100, "b1": 0.5, "b2": 0.9, "eps": 0.1}),
        ((8, 12), {"rank": 2, "max_norm_growth": 1.5, "scale": 4.0, "seed": 3}),
        ((8, 8), {"rank": 2, **NO_LIMIT}),
        ((8, 12), {**MINI, "update_interval": 3}),
    ],
    ids=str,
)
def test_reference(shape, arguments):
    grads = gradients(shape, steps=6)
    updates, _ = follow(grads, axes=STACK, **arguments)
    expected = reference(grads, **arguments)
    for update, theirs in zip(updates, expected, strict=True):
        assert_trees_close(update, theirs, rtol=FLOAT32)


# Projections


def test_projections_are_normal():
    every = {"update_interval": 1}
    entries = projection(16, 256, **every) * np.sqrt(16)
    # 4096 numbers: standard errors 0.016 of the mean, 0.022 of the variance.
    assert abs(entries.mean()) < 0.06
    assert abs(entries.var() - 1) < 0.08
    # Lengths stay on average: E‖P·x‖² = ‖x‖².
    x = np.linspace(-1, 1, 256)
    ratios = [
        np.sum((projection(16, 256, step=step, **every) @ x) ** 2) / np.sum(x**2)
        for step in range(20)
    ]
    # 320 squares.
    assert abs(np.mean(ratios) - 1) < 0.25


def test_projections_change_with_every_interval_and_never_within():
    matrices = [projection(2, 8, step=step, update_interval=3) for step in range(9)]
    for step in range(1, 9):
        is_same = np.array_equal(matrices[step], matrices[step - 1])
        assert is_same == (step % 3 != 0)
    assert not np.array_equal(matrices[0], matrices[3])
    assert not np.array_equal(matrices[0], projection(2, 8, seed=1))


def test_a_new_projection_is_no_new_program():
    traces = 0
    tx = ox.scale_by_apollo(0.0, rank=2, update_interval=2, axes=STACK)

    @jax.jit
    def update(g, state):
        nonlocal traces
        traces += 1
        return tx.update(g, state)

    g = jnp.eye(6)
    state, moments = tx.init(g), []
    for _ in range(4):
        _, state = update(g, state)
        moments.append(np.asarray(state.mu))
    assert traces == 1
    assert_trees_equal(moments[0], moments[1])
    assert np.abs(moments[2] - moments[1]).max() > 0.1
    assert_trees_equal(moments[3], moments[2])


def test_moments_outlive_the_projection():
    grads = gradients((4, 6), steps=2)
    _, (before, after) = follow(grads, rank=2, update_interval=1, axes=STACK)
    r = projection(2, 4, step=1, update_interval=1) @ grads[1]
    assert_trees_close(after.mu, 0.9 * before.mu + 0.1 * r, rtol=FLOAT32)
    assert_trees_close(after.nu, 0.999 * before.nu + 0.001 * r**2, rtol=FLOAT32)


def test_matrices_with_equal_shorter_sides_share_a_projection():
    shapes = {"a": (4, 6), "b": {"c": (9, 4), "d": (2, 4, 5)}}
    grads = gradients(shapes, steps=1)
    _, (state,) = follow(grads, rank=2, axes=STACK)
    p = projection(2, 4)
    expected = jax.tree.map(
        lambda g: 0.1 * p @ (g.T if g.shape == (9, 4) else g), grads[0]
    )
    assert_trees_close(state.mu, expected, rtol=FLOAT32)


# What the update is


@pytest.mark.parametrize(
    ("shape", "scaling"), [((8, 12), "channel"), ((12, 8), "tensor")]
)
def test_constant_gradient(shape, scaling: str):
    """Adam's steps are signs, so R becomes a matrix of signs."""
    (g,) = gradients(shape, steps=1)
    arguments = {"eps": 0.0, "rank": 3, "scaling": scaling, "axes": STACK, **NO_LIMIT}
    updates, _ = follow([g] * 4, **arguments)
    wide = g.T if shape[0] > shape[1] else g
    r = projection(3, 8) @ wide
    if scaling == "channel":
        expected = np.sqrt(3) * wide / np.linalg.norm(r, axis=0)
    else:
        expected = np.sqrt(r.size) * wide / np.linalg.norm(r)
    for update in updates:
        turned = update.T if shape[0] > shape[1] else update
        assert_trees_close(turned, expected, rtol=FLOAT32)


@pytest.mark.parametrize("shape", [(12, 8), (8, 8)])
def test_every_channel_goes_along_its_gradient(shape):
    updates, _ = follow(gradients(shape, steps=3), rank=2, axes=STACK)
    g = gradients(shape, steps=3)[-1]
    # Channels are fan_out unless that is the shorter side.
    ratios = updates[-1] / g
    ratios = ratios.T if shape[0] > shape[1] else ratios
    assert (ratios > 0).all()
    np.testing.assert_allclose(
        ratios, np.broadcast_to(ratios[:1], ratios.shape), rtol=1e-5
    )
    assert np.ptp(ratios[0]) > 0.1 * ratios.max()


def test_one_factor_for_a_matrix():
    grads = gradients((4, 6), steps=3)
    updates, _ = follow(grads, axes=STACK, **MINI)
    ratios = updates[-1] / grads[-1]
    np.testing.assert_allclose(ratios, ratios[0, 0], rtol=1e-5)


# Limiter


def test_the_limiter_holds_growth_and_nothing_else():
    g = gradients((4, 6), steps=1)[0]
    # Growth, a fall, growth out of it, at 2 a step.
    grads = [np.float32(size) * g for size in (1, 1e4, 1e4, 1e-3, 1e4, 1e4)]
    arguments = {"rank": 2, "eps": 1.0, "b1": 0.0, "b2": 0.0, "axes": STACK}
    free, _ = follow(grads, **arguments, **NO_LIMIT)
    held, states = follow(grads, **arguments, max_norm_growth=2.0)
    norms = [float(state.last_norm[0, 0]) for state in states]
    limited = [False, True, True, False, True, True]
    last = None
    for ours, theirs, norm, is_limited in zip(held, free, norms, limited, strict=True):
        # No bias correction where nothing is averaged.
        np.testing.assert_allclose(np.linalg.norm(ours), norm, rtol=1e-6)
        if is_limited:
            assert last is not None
            np.testing.assert_allclose(norm, 2 * last, rtol=1e-6)
            size = np.linalg.norm(theirs)
            assert norm < size
            assert_trees_close(ours, theirs * norm / size, rtol=FLOAT32)
        else:
            assert_trees_equal(ours, theirs)
        last = norm


def test_zero_gradients_leave_the_limiter_alone():
    g = gradients((4, 6), steps=1)[0]
    zeros = np.zeros_like(g)
    arguments = {"rank": 2, "axes": STACK}
    updates, states = follow([zeros, g, zeros, g], **arguments)
    assert_trees_equal(updates[0], zeros)
    assert_trees_equal(updates[2], zeros)
    # The first one that is not zero is not limited.
    free, _ = follow([zeros, g], **arguments, **NO_LIMIT)
    assert_trees_equal(updates[1], free[1])
    assert_trees_equal(states[2].last_norm, states[1].last_norm)
    growth = float(states[3].last_norm[0, 0] / states[1].last_norm[0, 0])
    assert growth <= 1.01 * (1 + 1e-6)
    assert_finite(updates)


# Invariances


@pytest.mark.parametrize("size", [2.0**-40, 2.0**40, 1e-12, 1e12])
def test_scale_of_gradients_does_not_matter(size: float):
    grads = gradients((8, 12), steps=3)
    arguments = {"eps": 0.0, "axes": STACK, "rank": 3}
    scaled, _ = follow([g * np.float32(size) for g in grads], **arguments)
    plain, _ = follow(grads, **arguments)
    for ours, theirs in zip(scaled, plain, strict=True):
        # A power of 2 changes no rounding but those of roots.
        assert_trees_close(ours, theirs, rtol=FLOAT32)


@pytest.mark.parametrize(
    ("shape", "arguments"), [((8, 12), {"rank": 3}), ((8, 8), MINI)]
)
def test_channels_may_be_permuted_and_change_their_signs(shape, arguments):
    grads = gradients(shape, steps=3)
    rng = np.random.default_rng(0)
    order = rng.permutation(shape[1])
    signs = np.float32(rng.choice([-1, 1], shape[1]))
    plain, _ = follow(grads, axes=STACK, **arguments)
    moved, _ = follow([g[:, order] * signs for g in grads], axes=STACK, **arguments)
    for ours, theirs in zip(moved, plain, strict=True):
        # Norms of matrices are sums in another order.
        assert_trees_close(ours, theirs[:, order] * signs, rtol=FLOAT32)


@pytest.mark.parametrize("shape", [(8, 12), (8, 8)])
def test_transpose(shape):
    grads = gradients(shape, steps=3)
    expected, _ = follow(grads, rank=3, axes=MatrixAxes((0,), (1,)))
    turned, _ = follow([g.T for g in grads], rank=3, axes=MatrixAxes((1,), (0,)))
    for ours, theirs in zip(turned, expected, strict=True):
        assert_trees_close(ours, theirs.T, rtol=FLOAT32)


def test_heads_are_flattened():
    arguments = {"rank": 2}
    grads = gradients((4, 2, 3), steps=3)
    heads, _ = follow(grads, axes=MatrixAxes((0,), (1, 2)), **arguments)
    flat, _ = follow([g.reshape(4, 6) for g in grads], axes=STACK, **arguments)
    for ours, theirs in zip(heads, flat, strict=True):
        assert_trees_close(ours.reshape(4, 6), theirs, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "arguments"), [((3, 8, 5), {"rank": 2}), ((3, 5, 8), MINI)], ids=str
)
def test_stack_is_its_slices(shape, arguments):
    sizes = np.float32([1e-9, 1.0, 1e9]).reshape(3, 1, 1)
    grads = [g * sizes for g in gradients(shape, steps=3)]
    updates, states = follow(grads, axes=STACK, **arguments)
    moved, _ = follow(
        [np.moveaxis(g, 0, 1) for g in grads], axes=MatrixAxes((0,), (2,)), **arguments
    )
    for index in range(3):
        expected, after = follow([g[index] for g in grads], axes=STACK, **arguments)
        for step in range(3):
            # The same operations on each slice.
            assert_trees_close(updates[step][index], expected[step], rtol=1e-6)
            assert_trees_close(moved[step][:, index], expected[step], rtol=1e-6)
        for ours, theirs in zip(states[-1][1:], after[-1][1:], strict=True):
            assert_trees_close(ours[index], theirs, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "axes", "moments"),
    [
        # (4, 2) has its channels on fan_in, (4, 7) on fan_out.
        ((3, 4, 9), MatrixAxes((1,), (2,), splits=(2, 7)), (3, 3, 4 + 7)),
        ((9, 4), MatrixAxes((1,), (0,), splits=(2, 7)), (3, 4 + 7)),
    ],
)
def test_splits_are_matrices_of_their_own(shape, axes: MatrixAxes, moments):
    grads = gradients(shape, steps=3)
    updates, states = follow(grads, rank=3, axes=axes)
    assert states[-1].mu.shape == states[-1].nu.shape == moments
    axis = axes.fan_out[0]
    plain = MatrixAxes(axes.fan_in, axes.fan_out)
    for part in (0, 1):
        parts = [np.split(g, [2], axis)[part] for g in grads]
        expected, after = follow(parts, rank=3, axes=plain)
        rows, channels = after[-1].mu.shape[-2:]
        side = slice(channels) if part == 0 else slice(-channels, None)
        for name in ("mu", "nu"):
            stored = getattr(states[-1], name)[..., side]
            # The same operations on each split.
            assert_trees_close(
                stored[..., :rows, :], getattr(after[-1], name), rtol=1e-6
            )
            assert not stored[..., rows:, :].any()
        for ours, theirs in zip(updates, expected, strict=True):
            assert_trees_close(np.split(ours, [2], axis)[part], theirs, rtol=1e-6)


def test_a_row_is_projected_by_a_number():
    (g,) = gradients((1, 5), steps=1)
    (update,), _ = follow([g], b1=0.0, eps=0.0, axes=STACK)
    # u = g·|sign(p·g)| / |p·g|.
    expected = np.sign(g) / np.abs(projection(1, 1))
    assert_trees_close(update, expected, rtol=FLOAT32)
    (turned,), _ = follow([g.T], b1=0.0, eps=0.0, axes=STACK)
    assert_trees_close(turned, expected.T, rtol=FLOAT32)


def test_start_has_the_rank_of_the_shorter_side_at_most():
    for shape in SHAPES:
        state = start(np.ones(shape, np.float32), rank=100, axes=STACK)
        assert state.mu.shape == (8, max(shape))
