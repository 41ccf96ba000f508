"""What is specific to StableAdamW, Adan, ADOPT and AdEMAMix."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from optaxplus import MatrixAxes
from tests.assertions import assert_trees_close, assert_trees_equal
from tests.problems import gradients, normal_tree
from tests.references.golden import GOLDEN_CASES, GoldenCase
from tests.trajectories import follow, follow_in_float64, updates_at

SHAPES = {"w": (3, 4), "b": (4,)}
PARAMS = normal_tree(SHAPES, seed=0)
TREES = gradients(SHAPES, steps=5)
GRADS = jax.tree.map(lambda *g: jnp.stack(g), *TREES)
ZEROS = jax.tree.map(jnp.zeros_like, GRADS)
MASK = {"w": True, "b": False}
ALL = [ox.stable_adamw, ox.adan, ox.adopt, ox.ademamix]
DECOUPLED = [ox.adan, ox.adopt, ox.ademamix]

# Algorithm 1 of ADOPT with its annealed divisor is not here.
GOLDEN = [
    case
    for case in GOLDEN_CASES
    if case.method in {make.__name__ for make in ALL} and case.name != "adopt"
]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.name)
def test_golden_numbers(case: GoldenCase):
    tx = getattr(ox, case.method)(**case.arguments)
    trajectory = follow_in_float64(tx, case.params, case.grads)
    # Half a unit of the last decimal printed; float64 itself errs by 1e-15, and the
    # authors' shift of the rates of AdEMAMix has no part without a warm-up.
    atol = 0.505 * 10.0**-case.decimals
    np.testing.assert_allclose(trajectory[-1], case.expected, rtol=0, atol=atol)


CHAINS = {
    "stable_adamw": (
        ox.stable_adamw(0.1, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.3, mask=MASK),
        ox.scale_by_stable_adam(0.8, 0.9, eps=1e-3, weight_decay=0.3, mask=MASK),
        ox.descend(0.1),
    ),
    "adan": (
        ox.adan(0.1, b1=0.8, b2=0.7, b3=0.6, eps=1e-3, weight_decay=0.3, mask=MASK),
        ox.scale_by_adan(0.8, 0.7, 0.6, eps=1e-3),
        ox.descend(0.1, 0.3, mask=MASK, decay="proximal"),
    ),
    "adopt": (
        ox.adopt(0.1, b1=0.8, b2=0.7, eps=1e-3, clip=False),
        ox.scale_by_adopt(0.8, 0.7, eps=1e-3, clip=False),
        ox.descend(0.1),
    ),
    "ademamix": (
        ox.ademamix(
            0.1,
            b1=0.8,
            b2=0.7,
            b3=0.95,
            alpha=4.0,
            eps=1e-3,
            alpha_warmup=3,
            b3_warmup=2,
            weight_decay=0.3,
            mask=MASK,
            decay="cautious",
        ),
        ox.scale_by_ademamix(
            0.8, 0.7, 0.95, alpha=4.0, eps=1e-3, alpha_warmup=3, b3_warmup=2
        ),
        ox.descend(0.1, 0.3, mask=MASK, decay="cautious"),
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_every_argument_reaches_its_link(name: str):
    tx, *links = CHAINS[name]
    ours, theirs = (follow(t, PARAMS, GRADS)[0] for t in (tx, optax.chain(*links)))
    # The same operations; fusion may order them differently.
    assert_trees_close(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (ox.adopt(0.1), optax.contrib.adopt(0.1)),
        (ox.ademamix(0.1, alpha=5.0), optax.contrib.ademamix(0.1)),
        (
            ox.ademamix(0.1, alpha=5.0, weight_decay=0.3),
            optax.contrib.ademamix(0.1, weight_decay=0.3),
        ),
    ],
    ids=["adopt", "ademamix", "ademamix_decay"],
)
def test_optax(ours, theirs):
    # optax forms 1 - 0.999**t in float32, an error of 3e-5 of the first steps of 0.1.
    assert_trees_close(
        follow(ours, PARAMS, GRADS)[0], follow(theirs, PARAMS, GRADS)[0], rtol=1e-5
    )


def test_ademamix_without_the_slow_mean_is_adamw():
    # The same operations; fusion may order them differently.
    assert_trees_close(
        follow(ox.ademamix(0.1, alpha=0.0, weight_decay=0.3), PARAMS, GRADS)[0],
        follow(ox.adamw(0.1, weight_decay=0.3), PARAMS, GRADS)[0],
        rtol=1e-6,
    )


# Weight decay


def decayed(tx) -> list:
    """Every leaf of the parameters after five steps without a gradient, over p."""
    params, _ = follow(tx, PARAMS, ZEROS)
    ratios = jax.tree.map(lambda after, p: after / p, params, PARAMS)
    return [np.asarray(ratio).reshape(5, -1) for ratio in jax.tree.leaves(ratios)]


@pytest.mark.parametrize("make", [ox.stable_adamw, ox.ademamix])
def test_decay_is_decoupled(make):
    expected = 0.95 ** np.arange(1, 6)[:, None]
    for ratio in decayed(make(0.1, weight_decay=0.5)):
        # Decay by 1 - 0.1·0.5 a step whatever the moments; float32 roundings.
        np.testing.assert_allclose(ratio, expected + 0 * ratio, rtol=1e-6)


def test_decay_of_adan_is_proximal():
    expected = 1.05 ** -np.arange(1.0, 6.0)[:, None]
    for ratio in decayed(ox.adan(0.1, weight_decay=0.5)):
        # Float32 roundings.
        np.testing.assert_allclose(ratio, expected + 0 * ratio, rtol=1e-6)


@pytest.mark.parametrize(
    ("weight_decay", "factors"),
    [
        (0.5, [1, 0.95, 0.95, 0.95, 0.95]),
        # A schedule counts the first step too.
        (lambda step: 0.5 * step, [1, 0.95, 0.9, 0.85, 0.8]),
    ],
)
def test_decay_of_adopt_starts_in_the_second_step(weight_decay, factors):
    expected = np.cumprod(factors)[:, None]
    for ratio in decayed(ox.adopt(0.1, weight_decay=weight_decay)):
        # Float32 roundings.
        np.testing.assert_allclose(ratio, expected + 0 * ratio, rtol=1e-6)


@pytest.mark.parametrize("decay", ["decoupled", "independent", "cautious", "proximal"])
def test_first_step_of_adopt_moves_nothing(decay: str):
    tx = ox.adopt(0.1, weight_decay=0.5, decay=decay)
    updates, _ = tx.update(TREES[0], tx.init(PARAMS), PARAMS)
    assert all((u == 0).all() for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("make", DECOUPLED)
def test_independent_decay_and_schedules(make):
    tx = make(
        0.0,
        weight_decay=lambda step: jnp.where(step == 2, 0.25, 0.0),
        decay="independent",
    )
    expected = np.array([1, 1, 0.75, 0.75, 0.75])[:, None]
    for ratio in decayed(tx):
        # Powers of two are exact, but for a rounding of 3/4·p and its quotient by p.
        np.testing.assert_allclose(ratio, expected + 0 * ratio, rtol=3e-7)


def test_shocks_shorten_the_decay_of_stable_adamw():
    # Of the slice that has one: the axes reach the link.
    stack = jnp.ones((2, 2, 3))
    grads = jnp.stack([stack, stack * jnp.asarray([1.0, 100.0]).reshape(2, 1, 1)])

    def second_update(weight_decay: float):
        axes = MatrixAxes((1,), (2,))
        tx = ox.stable_adamw(0.1, weight_decay=weight_decay, axes=axes)
        return updates_at(tx, stack, grads)[1, :, 0, 0]

    decay = second_update(0.5) - second_update(0.0)
    second_moment = (0.99 * 0.01 + 0.01 * 100**2) / (1 - 0.99**2)
    # Float32 roundings of a difference of numbers of about 0.1.
    np.testing.assert_allclose(
        decay, [-0.05, -0.05 / (100 / second_moment**0.5)], rtol=1e-5
    )


@pytest.mark.parametrize("make", ALL)
def test_params_are_needed_for_decay_alone(make):
    tx = make(0.1, weight_decay=0.0)
    updates, _ = tx.update(TREES[0], tx.init(PARAMS))
    assert_trees_equal(updates, tx.update(TREES[0], tx.init(PARAMS), PARAMS)[0])
    tx = make(0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match=f"{make.__name__}: params=None is not"):
        tx.update(TREES[0], tx.init(PARAMS))


# Errors


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"learning_rate": -0.1}, "{}: learning_rate=-0.1 is not allowed"),
        (TypeError, {"learning_rate": None}, "{}: learning_rate=None is not allowed"),
        (ValueError, {"weight_decay": -0.1}, "{}: weight_decay=-0.1 .* >= 0"),
        (TypeError, {"weight_decay": "0.1"}, "{}: weight_decay='0.1' is not allowed"),
        (ValueError, {"b1": 1.0}, r"{}: b1=1.0 is not allowed; .* \[0, 1\)"),
        (ValueError, {"b2": -0.1}, "{}: b2=-0.1 is not allowed"),
        (ValueError, {"eps": 0.0}, "{}: eps=0.0 is not allowed; .* > 0"),
        (TypeError, {"mu_dtype": "int8"}, "{}: mu_dtype='int8' is not allowed"),
        (TypeError, {"nu_dtype": None}, "{}: nu_dtype=None is not allowed"),
    ],
)
def test_wrong_arguments_are_refused(make, error, arguments, message: str):
    # Named by the optimizer or by the link that takes the argument.
    name = rf"(scale_by_)?{make.__name__.removesuffix('w')}w?"
    with pytest.raises(error, match=message.format(name)):
        make(**{"learning_rate": 0.1, **arguments})


@pytest.mark.parametrize("make", DECOUPLED)
def test_unknown_forms_of_decay_are_refused(make):
    with pytest.raises(ValueError, match=r"decay='l2' is not allowed; .* 'decoupled'"):
        make(0.1, decay="l2")


@pytest.mark.parametrize("make", ALL)
def test_masks_that_do_not_fit_are_refused(make):
    tx = make(0.1, weight_decay=0.1, mask={"w": True})
    with pytest.raises(ValueError, match="mask is not a prefix"):
        tx.update(TREES[0], tx.init(PARAMS), PARAMS)
