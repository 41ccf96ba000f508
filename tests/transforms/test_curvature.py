"""Sophia's rule: references, refreshes, what it is given, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from tests.assertions import assert_same_types, assert_trees_close, assert_trees_equal
from tests.problems import gradients, normal_tree
from tests.references.curvature import sophia_directions

SHAPES = {"w": (3, 4), "b": (4,), "s": ()}
STEPS = 12
PARAMS = normal_tree(SHAPES, seed=0)
GRADS = gradients(SHAPES, steps=STEPS)
# Of both signs, and of sizes from which quotients come out on both sides of 1.
ESTIMATES = [
    jax.tree.map(lambda h, g: 50 * jnp.abs(g) * (h + 0.5), h, g)
    for h, g in zip(gradients(SHAPES, steps=STEPS, seed=50), GRADS, strict=True)
]


def run(tx, grads=GRADS, estimates=ESTIMATES, params=PARAMS):
    """Updates and states of every step."""
    state = tx.init(params)
    updates, states = [], []
    for g, hessian in zip(grads, estimates, strict=True):
        update, state = tx.update(g, state, params, hessian=hessian)
        updates.append(update)
        states.append(state)
    return updates, states


def one_step(g, hessian, **arguments):
    """The update of one step from g and h alone, which are not averaged."""
    tx = ox.scale_by_sophia(b1=0.0, b2=0.0, **arguments)
    return tx.update(g, tx.init(g), hessian=hessian)[0]


# By hand, reference, other libraries


def test_two_steps_by_hand():
    tx = ox.scale_by_sophia(b1=0.5, b2=0.75, gamma=2.0, update_interval=2)
    start = jnp.zeros(3)
    g, h = jnp.array([4.0, 4.0, -4.0]), jnp.array([8.0, 1.0, -8.0])
    first, state = tx.update(g, tx.init(start), hessian=h)
    # m = g/2, h/4: 2/(2·2), 2/(2·0.25) cut off, and the sign where h is negative.
    np.testing.assert_array_equal(first, [0.5, 1.0, -1.0])
    second, state = tx.update(jnp.zeros(3), state, hessian=100 * h)
    # m = g/4; h is as old as the step before.
    np.testing.assert_array_equal(second, [0.25, 1.0, -1.0])
    np.testing.assert_array_equal(state.hessian, h / 4)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"update_interval": 3, "gamma": 2.0},
        {"update_interval": 1, "b1": 0.5, "b2": 0.5, "debias": True},
        {"update_interval": 4, "first_refresh": 2, "gamma": 0.1},
        {"first_refresh": 100},
    ],
    ids=str,
)
def test_reference(arguments):
    updates, _ = run(ox.scale_by_sophia(**arguments))
    for key in SHAPES:
        expected = list(
            sophia_directions(
                [g[key] for g in GRADS], [h[key] for h in ESTIMATES], **arguments
            )
        )
        ours = np.stack([u[key] for u in updates])
        # A dozen roundings of averages, which cancel to a tenth of their terms.
        np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-6)


def test_optax():
    """Which mixes an estimate in after the step that it was made for."""
    given = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(),
        lambda g, state, params=None, *, estimate, **_: (estimate, state),
    )
    arguments = {"b1": 0.965, "b2": 0.9, "gamma": 0.5, "eps": 1e-8}
    theirs = optax.contrib.sophia(
        -1.0,
        weight_decay=0.0,
        update_interval=3,
        hessian_diagonal_fn=given,
        **arguments,
    )
    state = theirs.init(PARAMS)
    expected = []
    for g, estimate in zip(GRADS, ESTIMATES, strict=True):
        update, state = theirs.update(g, state, PARAMS, estimate=estimate)
        expected.append(update)
    ours = ox.scale_by_sophia(
        update_interval=3, first_refresh=1, debias=True, **arguments
    )
    updates, states = run(ours, estimates=[ESTIMATES[-1], *ESTIMATES[:-1]])
    # The bias correction of float32 powers, and averages as above.
    assert_trees_close(updates, expected, rtol=1e-5)
    assert_trees_close(states[-1].mu, optax.tree.get(state, "mu"), rtol=1e-6)


# Invariances and reductions


def test_no_entry_is_larger_than_one_and_many_are_smaller():
    updates, _ = run(ox.scale_by_sophia(gamma=1.0, update_interval=2))
    entries = np.abs(np.concatenate([u["w"].ravel() for u in updates]))
    assert entries.max() == 1.0
    assert 0.1 < np.mean(entries < 1.0) < 0.9


def test_the_scale_of_the_loss_does_not_matter():
    tx = ox.scale_by_sophia(gamma=1.0, update_interval=2, eps=1e-30)
    updates, _ = run(tx)
    times = [jax.tree.map(lambda x: 1024.0 * x, tree) for tree in (GRADS, ESTIMATES)]
    assert_trees_equal(run(tx, *times)[0], updates)


@pytest.mark.parametrize("arguments", [{"gamma": 0.0}, {"first_refresh": 1000}])
def test_without_curvature_it_is_the_sign_of_a_mean(arguments):
    signs = optax.chain(ox.scale_by_ema(0.96), ox.scale_by_sign())
    state = signs.init(PARAMS)
    for update, g in zip(run(ox.scale_by_sophia(**arguments))[0], GRADS, strict=True):
        expected, state = signs.update(g, state)
        assert_trees_equal(update, expected)


# When it refreshes


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({}, [0, 10]),
        ({"update_interval": 5}, [0, 5, 10]),
        ({"update_interval": 5, "first_refresh": 5}, [5, 10]),
        ({"update_interval": 4, "first_refresh": 1}, [1, 5, 9]),
        ({"update_interval": 1, "first_refresh": 11}, [11]),
    ],
    ids=str,
)
def test_steps_with_a_refresh(arguments, steps):
    tx = ox.scale_by_sophia(**arguments)
    _, states = run(tx)
    before = [tx.init(PARAMS), *states]
    changed = [
        step
        for step in range(STEPS)
        if (states[step].hessian["w"] != before[step].hessian["w"]).any()
    ]
    assert changed == steps


def cubic(params):
    return sum(jnp.sum(p**3) for p in jax.tree.leaves(params))


def six_times(params):
    """The diagonal of its Hessian."""
    return jax.tree.map(lambda p: 6.0 * p, params)


def test_a_function_is_called_in_steps_with_a_refresh_only():
    calls = []
    tx = ox.scale_by_sophia(update_interval=5)
    traces = 0

    def hessian(params):
        jax.debug.callback(lambda: calls.append(1))
        return six_times(params)

    @jax.jit
    def update(g, state):
        nonlocal traces
        traces += 1
        return tx.update(g, state, PARAMS, hessian=hessian)

    state, count = tx.init(PARAMS), []
    for g in GRADS:
        _, state = update(g, state)
        jax.effects_barrier()
        count.append(len(calls))
    assert count == [1] * 5 + [2] * 5 + [3] * 2
    assert traces == 1


def primitives(jaxpr, *, branches: bool) -> set[str]:
    """Names of the operations of a program, with those in branches or without."""
    names = set()
    for equation in jaxpr.eqns:
        names.add(equation.primitive.name)
        if equation.primitive.name == "cond" and not branches:
            continue
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    names |= primitives(inner, branches=branches)
    return names


@pytest.mark.parametrize("factory", [ox.scale_by_sophia, lambda: ox.sophia(0.1)])
def test_what_a_function_computes_is_in_one_branch(factory):
    tx = factory()

    def hessian(params):
        return ox.hutchinson(
            lambda p: sum(map(jnp.sum, map(jnp.tanh, jax.tree.leaves(p)))),
            params,
            jax.random.key(0),
        )

    def update(g, state, params):
        return tx.update(g, state, params, hessian=hessian)

    program = jax.make_jaxpr(update)(PARAMS, tx.init(PARAMS), PARAMS).jaxpr
    assert "tanh" in primitives(program, branches=True)
    assert not primitives(program, branches=False) & {"tanh", "random_bits"}
    names = [equation.primitive.name for equation in program.eqns]
    assert names.count("cond") == 1
    # A pytree needs none.
    with_tree = jax.make_jaxpr(
        lambda g, state: tx.update(g, state, PARAMS, hessian=PARAMS)
    )(PARAMS, tx.init(PARAMS))
    assert "cond" not in primitives(with_tree.jaxpr, branches=False)


@pytest.mark.parametrize("jit", [False, True])
def test_a_function_is_as_good_as_its_result(jit: bool):
    tx = ox.scale_by_sophia(update_interval=2, gamma=1.0)
    states = [tx.init(PARAMS)] * 2
    update = jax.jit(tx.update, static_argnames="hessian") if jit else tx.update
    for g in GRADS[:3]:
        ours, states[0] = update(g, states[0], PARAMS, hessian=six_times)
        expected, states[1] = tx.update(g, states[1], PARAMS, hessian=six_times(PARAMS))
        # XLA contracts a·b + c.
        assert_trees_close(ours, expected, rtol=3e-7)
        assert_same_types(states[0], states[1])


# What it is given


def test_a_pytree_is_ignored_in_other_steps():
    nan = jax.tree.map(lambda h: h * jnp.nan, ESTIMATES[0])
    tx = ox.scale_by_sophia(update_interval=5)
    sparse = [h if i % 5 == 0 else nan for i, h in enumerate(ESTIMATES)]
    assert_trees_equal(run(tx, estimates=sparse), run(tx))


@jax.tree_util.register_pytree_node_class
class CallableTree:
    """A module of a library whose modules are pytrees."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __call__(self, x):
        raise AssertionError("a pytree is not a function here")

    def tree_flatten(self):
        return (self.kernel,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_a_pytree_that_can_be_called_is_a_pytree():
    tx = ox.scale_by_sophia()
    kernel = jnp.ones(3)
    update, _ = tx.update(
        CallableTree(kernel),
        tx.init(CallableTree(kernel)),
        hessian=CallableTree(kernel),
    )
    # A plain mean over what is not clipped: 0.04 / (0.01·0.01).
    np.testing.assert_array_equal(update.kernel, jnp.ones(3))


def test_partial_functions_are_functions():
    tx = ox.scale_by_sophia()
    hessian = jax.tree_util.Partial(lambda scale, p: six_times(p), 2.0)
    ours, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, hessian=hessian)
    expected, _ = tx.update(PARAMS, tx.init(PARAMS), hessian=six_times(PARAMS))
    assert_trees_close(ours, expected, rtol=3e-7)  # compiled and not


LABELS = {"w": "sophia", "b": "other", "s": "sophia"}
GROUPS = {"other": optax.set_to_zero()}


def grouped(kind: str, tx, **options):
    if kind == "masked":
        mask = {"w": True, "b": False, "s": True}
        return optax.chain(
            optax.masked(tx, mask, **options),
            optax.masked(optax.set_to_zero(), {"w": False, "b": True, "s": False}),
        )
    return optax.partition({"sophia": tx, **GROUPS}, LABELS, **options)


@pytest.mark.parametrize("kind", ["masked", "partition"])
@pytest.mark.parametrize("options", [{}, {"mask_compatible_extra_args": True}])
def test_groups_take_their_part_of_the_pytree(kind: str, options):
    rule = ox.scale_by_sophia(update_interval=3, gamma=1.0)
    alone = [
        {key: tree[key] for key in ("w", "s")} for tree in (*GRADS[:4], *ESTIMATES[:4])
    ]
    expected, _ = run(
        rule, alone[:4], alone[4:], {key: PARAMS[key] for key in ("w", "s")}
    )
    updates, _ = run(grouped(kind, rule, **options), GRADS[:4], ESTIMATES[:4])
    for update, wanted in zip(updates, expected, strict=True):
        assert_trees_equal(update, wanted | {"b": jnp.zeros(4)})


@pytest.mark.parametrize("kind", ["masked", "partition"])
def test_groups_and_functions(kind: str):
    tx = grouped(kind, ox.scale_by_sophia(gamma=1.0))
    state = tx.init(PARAMS)
    # One that ignores its argument has the whole tree; one that takes every leaf for
    # itself needs nothing else.
    expected, _ = tx.update(GRADS[0], state, PARAMS, hessian=six_times(PARAMS))
    for hessian in (lambda _: six_times(PARAMS), six_times):
        ours, _ = tx.update(GRADS[0], state, PARAMS, hessian=hessian)
        assert_trees_close(ours, expected, rtol=3e-7)  # compiled and not
    with pytest.raises(ValueError, match=r"part of the parameters.*lambda _: estimate"):
        tx.update(GRADS[0], state, PARAMS, hessian=lambda p: {"w": p["w"] + p["b"]})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(dtype: str):
    estimates = jax.tree.map(lambda h: 1e-2 * h, ESTIMATES[0])
    narrow = [jax.tree.map(lambda x: x.astype(dtype), t) for t in (PARAMS, GRADS[0])]
    tx = ox.scale_by_sophia(gamma=1.0)
    state = tx.init(narrow[0])
    update, after = tx.update(narrow[1], state, hessian=estimates)
    assert_same_types(after, tx.init(PARAMS))
    wide = jax.tree.map(lambda x: x.astype("float32"), narrow[1])
    assert_trees_equal(update, tx.update(wide, state, hessian=estimates)[0])
    # Estimates in low precision are averaged in float32.
    rough = jax.tree.map(lambda h: h.astype(dtype), estimates)
    _, after = tx.update(narrow[1], state, hessian=rough)
    expected = jax.tree.map(lambda h: 0.01 * h.astype("float32"), rough)
    assert_trees_close(after.hessian, expected, rtol=3e-7)


# Edge cases


@pytest.mark.parametrize(
    ("g", "h", "expected"),
    [
        (0.0, 0.0, 0.0),
        (0.0, np.inf, 0.0),
        (0.0, -1.0, 0.0),
        (1e-40, 0.0, 0.0),  # a denormal, which XLA takes for 0
        (1e-13, 0.0, 0.1),
        (-1e-30, 1e-30, -1e-18),
        (3e38, 0.0, 1.0),
        (-3e38, -3e38, -1.0),
        (1e30, 1e32, 1.0),
        (1e30, 1e33, 0.1),
        (1.0, np.inf, 0.0),
        (-1.0, -np.inf, -1.0),
        (np.inf, 1.0, 1.0),
        (-np.inf, 1.0, -1.0),
        (np.inf, np.inf, np.nan),
        (np.nan, 1.0, np.nan),
        (1.0, np.nan, np.nan),
    ],
)
def test_edges(g, h, expected):
    update = one_step(jnp.float32(g), jnp.float32(h), gamma=0.01)
    np.testing.assert_allclose(update, expected, rtol=3e-7)


def test_nan_stays_in_its_entry_for_good():
    tx = ox.scale_by_sophia(update_interval=1)
    bad = jax.tree.map(lambda h: h, ESTIMATES)
    bad[1]["w"] = bad[1]["w"].at[1, 2].set(jnp.nan)
    updates, _ = run(tx, estimates=bad)
    clean, _ = run(tx)
    for step, (update, wanted) in enumerate(zip(updates, clean, strict=True)):
        is_bad = np.zeros((3, 4), bool)
        is_bad[1, 2] = step >= 1
        np.testing.assert_array_equal(np.isnan(update["w"]), is_bad)
        np.testing.assert_array_equal(update["w"][~is_bad], wanted["w"][~is_bad])


# Errors


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"b1": 1.0}, ValueError, r"scale_by_sophia: b1=1.0 .*\[0, 1\)"),
        ({"b2": -0.1}, ValueError, r"b2=-0.1 .*\[0, 1\)"),
        ({"gamma": -1.0}, ValueError, r"gamma=-1.0 .*>= 0"),
        ({"gamma": "0.01"}, TypeError, r"gamma='0.01' .*>= 0"),
        ({"eps": 0.0}, ValueError, r"eps=0.0 .*> 0"),
        ({"update_interval": 0}, ValueError, r"update_interval=0 .*>= 1"),
        ({"update_interval": 2.5}, TypeError, r"update_interval=2.5 .*integer"),
        ({"first_refresh": -1}, ValueError, r"first_refresh=-1 .*>= 0"),
        ({"debias": 1}, TypeError, r"debias=1 .*True or False"),
        ({"mu_dtype": "int32"}, TypeError, r"mu_dtype='int32' .*floating"),
        ({"nu_dtype": "int8"}, TypeError, r"nu_dtype='int8' .*floating"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, kind, message):
    with pytest.raises(kind, match=message):
        ox.scale_by_sophia(**arguments)


@pytest.mark.parametrize(
    ("hessian", "kind", "message"),
    [
        (None, TypeError, r"hessian=None.*hessian=\.\.\.\).*optaxplus\.hutchinson"),
        ({"b": PARAMS["b"]}, ValueError, "no entry for parameter 's'"),
        (PARAMS | {"w": jnp.ones((4, 3))}, ValueError, r"\(4, 3\) at 'w'.*\(3, 4\)"),
        (PARAMS | {"b": jnp.ones(4, int)}, TypeError, "dtype int32 at 'b'"),
        (lambda p: {"w": p["w"]}, ValueError, "no entry for parameter 'b'"),
        ("gnb", ValueError, "hessian, a str, has no entry .* or a function"),
    ],
    ids=["missing", "incomplete", "shape", "dtype", "function", "name"],
)
def test_bad_estimates(hessian, kind, message):
    tx = ox.scale_by_sophia()
    with pytest.raises(kind, match=message):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, hessian=hessian)


def test_functions_need_params():
    tx = ox.scale_by_sophia()
    with pytest.raises(ValueError, match=r"params=None .*hessian is a function"):
        tx.update(PARAMS, tx.init(PARAMS), hessian=six_times)
