"""Estimates of the diagonal of a Hessian: right on average, spread as they should be.

Statistical tests have fixed seeds. Means of N estimates are compared within five
standard errors, which a right estimator misses once in 1.7 million; that this is narrow
enough to show a wrong one is asserted beside it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optaxplus as ox
from tests.assertions import assert_same_types, assert_trees_close, assert_trees_equal
from tests.selection import mostly

RNG = np.random.default_rng(4)
KEY = jax.random.key(3)
DISTRIBUTIONS = ("normal", "rademacher")


def compiled(estimator, *static_names):
    """The estimator as one program: op by op there would be hundreds of small ones."""
    return jax.jit(
        estimator,
        static_argnums=0,
        static_argnames=static_names,
        compiler_options={"xla_backend_optimization_level": 0},
    )


hutchinson = compiled(ox.hutchinson, "distribution")
gauss_newton_bartlett = compiled(ox.gauss_newton_bartlett)


def means_and_errors(estimate, number: int):
    """Mean, variance and standard error of the mean of estimates with other keys."""
    samples = jax.jit(jax.vmap(estimate))(jax.random.split(KEY, number))
    samples = np.asarray(samples, np.float64)
    variance = samples.var(axis=0)
    return samples.mean(axis=0), variance, np.sqrt(variance / number)


# Hutchinson

# Symmetric, with diagonal entries of both signs and others about as large.
HESSIAN = RNG.standard_normal((6, 6)) + np.diag([3.0, -2.0, 4.0, 5.0, -3.0, 2.0])
HESSIAN = ((HESSIAN + HESSIAN.T) / 2).astype(np.float32)
DIAGONAL = np.diag(HESSIAN)
POINT = {"a": jnp.zeros((2, 2)), "b": jnp.ones(2)}


def flat(tree):
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


def quadratic(params):
    x = flat(params)
    return 0.5 * x @ HESSIAN @ x + jnp.sum(x)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_hutchinson_is_right_on_average(distribution: str):
    mean, variance, error = means_and_errors(
        lambda key: flat(
            ox.hutchinson(quadratic, POINT, key, distribution=distribution)
        ),
        20_000,
    )
    np.testing.assert_array_less(np.abs(mean - DIAGONAL), 5 * error)
    # What is 10 % off, or belongs to another entry, would show.
    assert (5 * error < 0.07 * np.abs(DIAGONAL)).all()
    expected = np.sum(HESSIAN**2, axis=1) - DIAGONAL**2
    if distribution == "normal":
        expected = expected + 2 * DIAGONAL**2
    # The kurtosis is 15 at most, that of u², so that a variance is known to 3 %.
    np.testing.assert_allclose(variance, expected, rtol=0.15)


def test_signs_are_exact_where_the_hessian_is_diagonal():
    def loss(params):
        return sum(jnp.sum(jnp.sin(p)) for p in jax.tree.leaves(params))

    params = {"w": jnp.linspace(-2, 2, 12).reshape(3, 4), "b": jnp.float32(0.3)}
    for key in jax.random.split(KEY, 3):
        ours = hutchinson(loss, params, key, distribution="rademacher")
        # Float32 sines.
        assert_trees_close(ours, jax.tree.map(lambda p: -jnp.sin(p), params), rtol=1e-6)


def test_optax_draws_the_same_signs():
    tx = optax.contrib.hutchinson_estimator_diag_hessian(KEY)
    theirs, _ = tx.update(POINT, tx.init(POINT), POINT, obj_fn=quadratic)
    _, subkey = jax.random.split(KEY)
    ours = hutchinson(quadratic, POINT, subkey, distribution="rademacher")
    assert_trees_close(ours, theirs, rtol=1e-6)  # two programs


# Gauss, Newton, Bartlett

X = RNG.standard_normal((7, 3)).astype(np.float32)
WEIGHTS = {
    "w": jnp.asarray(RNG.standard_normal((3, 4)), jnp.float32),
    "b": jnp.zeros(4),
}


def logits_fn(params, x=X):
    return x @ params["w"] + params["b"]


def exact_gauss_newton(params, x=X):
    """The diagonal of mean_b JᵀSJ with S = diag(p) - ppᵀ, J the Jacobian of logits."""
    p = np.asarray(jax.nn.softmax(logits_fn(params, x)), np.float64)
    spread = p * (1 - p)
    return {
        "w": np.einsum("bi,bo->io", np.asarray(x, np.float64) ** 2, spread) / len(x),
        "b": spread.mean(axis=0),
    }


def test_gauss_newton_bartlett_is_right_on_average():
    mean, _, error = means_and_errors(
        lambda key: flat(ox.gauss_newton_bartlett(logits_fn, WEIGHTS, key)), 40_000
    )
    exact = flat(exact_gauss_newton(WEIGHTS))
    np.testing.assert_array_less(np.abs(mean - exact), 5 * error)
    # B - 1 in the place of B, 14 % less, would show, as would a label of the data.
    assert (5 * error < 0.08 * exact).all()


def test_it_is_the_hessian_of_a_linear_model():
    """The exact diagonal above, by automatic differentiation."""

    def loss(w):
        logits = logits_fn(WEIGHTS | {"w": w})
        return -jnp.mean(jax.nn.log_softmax(logits)[:, 0])

    hessian = jax.jit(jax.hessian(loss))(WEIGHTS["w"]).reshape(12, 12)
    exact = exact_gauss_newton(WEIGHTS)["w"].ravel()
    # Float32 second derivatives.
    np.testing.assert_allclose(np.diag(hessian), exact, rtol=1e-5)


def test_leading_axes_are_terms_of_the_mean():
    x = np.tile(X, (2, 1))[:12]
    plain = gauss_newton_bartlett(lambda p: logits_fn(p, x), WEIGHTS, KEY)
    shaped = gauss_newton_bartlett(
        lambda p: logits_fn(p, x.reshape(3, 4, 3)), WEIGHTS, KEY
    )
    assert_trees_close(shaped, plain, rtol=1e-6)  # sums in another order


@pytest.mark.slow
def test_one_term_needs_no_leading_axes():
    one = gauss_newton_bartlett(lambda p: logits_fn(p, X[0]), WEIGHTS, KEY)
    single = gauss_newton_bartlett(lambda p: logits_fn(p, X[:1]), WEIGHTS, KEY)
    assert_trees_close(one, single, rtol=1e-6)  # two programs


def test_batch_size_is_the_factor():
    plain = gauss_newton_bartlett(logits_fn, WEIGHTS, KEY)
    for size in (70, 70.0, np.float32(70)):
        ours = gauss_newton_bartlett(logits_fn, WEIGHTS, KEY, batch_size=size)
        # The square of a root.
        assert_trees_close(ours, jax.tree.map(lambda h: 10 * h, plain), rtol=1e-6)


def test_padding_is_left_out():
    padded = np.concatenate([X, 100 * X[:3]])
    where = jnp.arange(10) < 7
    ours = gauss_newton_bartlett(
        lambda p: logits_fn(p, padded), WEIGHTS, KEY, where=where
    )
    # Random bits depend on the index alone, so that the first labels are the same.
    plain = gauss_newton_bartlett(logits_fn, WEIGHTS, KEY)
    assert_trees_close(ours, plain, rtol=1e-6)
    none = gauss_newton_bartlett(logits_fn, WEIGHTS, KEY, where=jnp.zeros(7, bool))
    assert_trees_equal(none, jax.tree.map(jnp.zeros_like, WEIGHTS))


def test_extreme_logits_are_finite():
    logits = jnp.array([[1e4, -1e4, 0.0], [-jnp.inf, 0.0, 0.0]])
    ours = gauss_newton_bartlett(lambda p: logits * p, jnp.float32(1.0), KEY)
    assert not np.isnan(
        gauss_newton_bartlett(lambda p: logits[:1] * p, jnp.float32(1.0), KEY)
    )
    # A forbidden class multiplied by a parameter has no derivative.
    assert np.isnan(ours)
    masked = gauss_newton_bartlett(
        lambda p: jnp.where(jnp.isinf(logits), -jnp.inf, p), jnp.float32(1.0), KEY
    )
    assert np.isfinite(masked)


# Trees


def hutchinson_of_squares(f, params, key):
    return ox.hutchinson(lambda p: jnp.mean(f(p) ** 2), params, key)


ESTIMATORS = {
    "hutchinson": compiled(hutchinson_of_squares),
    "gauss_newton_bartlett": gauss_newton_bartlett,
}
each_estimator = pytest.mark.parametrize(
    "estimate", ESTIMATORS.values(), ids=ESTIMATORS
)


@each_estimator
def test_key_decides(estimate):
    plain = estimate(logits_fn, WEIGHTS, KEY)
    assert_trees_equal(estimate(logits_fn, WEIGHTS, KEY), plain)
    other = estimate(logits_fn, WEIGHTS, jax.random.key(9))
    assert (other["w"] != plain["w"]).any()
    # Keys of the old kind too.
    old = estimate(logits_fn, WEIGHTS, jax.random.key_data(KEY))
    assert_trees_equal(old, plain)


@each_estimator
@pytest.mark.parametrize("dtype", mostly(["bfloat16"], ["bfloat16", "float16"]))
def test_low_precision_parameters(estimate, dtype: str):
    narrow = jax.tree.map(lambda p: p.astype(dtype), WEIGHTS)

    def logits(params):
        assert params["w"].dtype == dtype
        return logits_fn(params, X.astype(dtype))

    ours = estimate(logits, narrow, KEY)
    assert_same_types(ours, jax.eval_shape(lambda: WEIGHTS))
    # The same labels, or a direction rounded to that dtype, and products in it.
    wide = estimate(logits_fn, jax.tree.map(lambda p: p.astype("float32"), narrow), KEY)
    assert_trees_close(ours, wide, rtol=0.05)


@each_estimator
def test_float64(estimate):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: np.asarray(p, np.float64), WEIGHTS)
        ours = estimate(logits_fn, params, KEY)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(ours)} == {"float64"}


@each_estimator
def test_other_leaves_are_zero_and_nodes_stay(estimate):
    others = {
        "table": jnp.arange(3),
        "key": jax.random.key(1),
        "none": None,
        "masked": optax.MaskedNode(),
        "flag": jnp.array(True),
    }
    ours = estimate(logits_fn, WEIGHTS | others, KEY)
    assert_trees_equal({k: ours[k] for k in WEIGHTS}, estimate(logits_fn, WEIGHTS, KEY))
    assert ours["none"] is None and ours["masked"] == optax.MaskedNode()
    for name, shape in {"table": (3,), "key": (), "flag": ()}.items():
        assert_trees_equal(ours[name], jnp.zeros(shape))


@each_estimator
def test_boxes_of_linen(estimate):
    init = nn.with_partitioning(nn.initializers.normal(0.1), (None, "model"))
    model = nn.Dense(4, kernel_init=init)
    params = model.init(KEY, X)
    ours = estimate(lambda p: model.apply(p, X), params, KEY)
    assert_same_types(ours, params)
    plain = nn.meta.unbox(params)
    expected = estimate(lambda p: model.apply(p, X), plain, KEY)
    # Two programs.
    assert_trees_close(nn.meta.unbox(ours), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "estimate",
    [
        pytest.param(ESTIMATORS["hutchinson"], id="hutchinson", marks=pytest.mark.slow),
        pytest.param(gauss_newton_bartlett, id="gauss_newton_bartlett"),
    ],
)
def test_states_of_nnx(estimate):
    model = nnx.Sequential(
        nnx.Linear(3, 5, rngs=nnx.Rngs(0)),
        nnx.BatchNorm(5, rngs=nnx.Rngs(0)),
        nnx.Linear(5, 4, rngs=nnx.Rngs(1)),
    )
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def logits(params):
        # A copy, because the statistics of the batch change.
        return nnx.merge(graphdef, params, rest, copy=True)(X)

    ours = estimate(logits, params, KEY)
    assert jax.tree.structure(ours) == jax.tree.structure(params)
    pure = nnx.as_pure(params)
    assert_trees_close(
        nnx.as_pure(ours), estimate(logits, pure, KEY), rtol=1e-5
    )  # two programs


@each_estimator
def test_shardings_in_types(estimate):
    """Parameters of which every device has a part, and so of the classes."""
    specs = {"w": P(None, "data"), "b": P("data")}
    devices = jax.devices()[:2]
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Explicit,), devices=devices)
    plain = estimate(logits_fn, WEIGHTS, KEY)
    with jax.set_mesh(mesh):
        placed = {key: jax.device_put(WEIGHTS[key], specs[key]) for key in specs}
        ours = estimate(logits_fn, placed, KEY)
    assert {key: x.sharding.spec for key, x in ours.items()} == specs
    # Sums go over the devices in another order.
    assert_trees_close(jax.device_get(ours), jax.device_get(plain), rtol=1e-5)


@pytest.mark.slow
def test_op_by_op():
    assert_trees_close(
        ox.gauss_newton_bartlett(logits_fn, WEIGHTS, KEY, batch_size=7),
        gauss_newton_bartlett(logits_fn, WEIGHTS, KEY),
        rtol=1e-5,
    )


def test_a_tree_without_numbers():
    assert hutchinson(lambda p: jnp.float32(0.0), {}, KEY) == {}
    assert gauss_newton_bartlett(lambda p: jnp.zeros(3), {}, KEY) == {}


# Errors


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: ox.hutchinson(quadratic, POINT, KEY, distribution="uniform"),
            ValueError,
            r"hutchinson: distribution='uniform' .*'normal', 'rademacher'",
        ),
        (
            lambda: ox.hutchinson(lambda p: flat(p), POINT, KEY),
            TypeError,
            r"hutchinson: loss_fn returned an array .*\(6,\).*real scalar",
        ),
        (
            lambda: ox.hutchinson(lambda p: (quadratic(p), {}), POINT, KEY),
            TypeError,
            r"loss_fn returned a tuple.*real scalar",
        ),
        (
            lambda: ox.hutchinson(
                quadratic, {"a": {"z": jnp.ones(2, "complex64")}}, KEY
            ),
            TypeError,
            r"hutchinson: parameter 'a/z' of dtype complex64.*real",
        ),
        (
            lambda: ox.gauss_newton_bartlett(
                logits_fn, {"z": jnp.ones(2, "complex64")}, KEY
            ),
            TypeError,
            r"gauss_newton_bartlett: parameter 'z' of dtype complex64.*real",
        ),
        (
            lambda: ox.gauss_newton_bartlett(quadratic, POINT, KEY),
            TypeError,
            r"logits_fn returned an array .*\(\), .*\(\.\.\., classes\)",
        ),
        (
            lambda: ox.gauss_newton_bartlett(lambda p: jnp.arange(3), WEIGHTS, KEY),
            TypeError,
            r"logits_fn returned an array of dtype int32.*real array",
        ),
        (
            lambda: ox.gauss_newton_bartlett(logits_fn, WEIGHTS, KEY, batch_size=0),
            ValueError,
            r"gauss_newton_bartlett: batch_size=0 .*> 0",
        ),
        (
            lambda: ox.gauss_newton_bartlett(
                logits_fn, WEIGHTS, KEY, where=jnp.ones(7)
            ),
            TypeError,
            r"where=an array of dtype float32 .*bool",
        ),
        (
            lambda: ox.gauss_newton_bartlett(logits_fn, WEIGHTS, KEY, where=[True] * 7),
            TypeError,
            r"where=a list .*array of bools",
        ),
        (
            lambda: ox.gauss_newton_bartlett(logits_fn, WEIGHTS, None),
            TypeError,
            r"gauss_newton_bartlett: key=None .*random key",
        ),
        (
            lambda: ox.hutchinson(quadratic, POINT, jax.random.split(KEY)),
            TypeError,
            r"hutchinson: key=(.|\n)* one random key",
        ),
        (
            lambda: ox.gauss_newton_bartlett(
                logits_fn, WEIGHTS, KEY, where=jnp.ones((7, 4), bool)
            ),
            ValueError,
            r"where of shape \(7, 4\) .*\(7,\)",
        ),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
