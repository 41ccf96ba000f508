"""What is assumed, and what the compiler is told, where nothing says how arrays lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxplus as ox
from optaxplus.sharding.alike import lying_as
from optaxplus.sharding.layouts import guessed_specs
from tests.sharding.meshes import make_mesh

M = ox.MatrixAxes
TWO = M((0,), (1,))
FSDP = {"fsdp": 8}
BOTH = {"fsdp": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("shapes", "axes", "mesh", "expected"),
    [
        pytest.param(
            [(64, 64), (64, 16), (64, 16), (64, 256), (256, 64)],
            [TWO] * 5,
            BOTH,
            [P("fsdp", "tensor")] * 4 + [P("tensor", "fsdp")],
            id="keys narrower than the network",
        ),
        pytest.param(
            [(6, 64, 16), (6, 16, 64)],
            [M((1,), (2,))] * 2,
            FSDP,
            [P(None, None, "fsdp"), P(None, "fsdp", None)],
            id="the shorter side where no size is commonest",
        ),
        pytest.param(
            [(64, 4, 16), (4, 16, 64)],
            [M((0,), (1, 2)), M((0, 1), (2,))],
            BOTH,
            [P("fsdp", "tensor", None), P("tensor", None, "fsdp")],
            id="heads",
        ),
        pytest.param([(64, 12)], [TWO], FSDP, [P("fsdp", None)], id="what divides"),
        pytest.param([(7, 9)], [TWO], FSDP, [P(None, None)], id="nothing divides"),
        pytest.param(
            [(64, 64)], [TWO], {"fsdp": 2, "tensor": 2, "more": 2},
            [P(("fsdp", "more"), "tensor")],
            id="three axes",
        ),
        pytest.param([], [], FSDP, [], id="nothing"),
        pytest.param([(0, 8)], [TWO], FSDP, [P("fsdp", None)], id="empty"),
    ],
)  # fmt: skip
def test_the_width_of_the_network_is_sharded_first(
    shapes, axes, mesh, expected
) -> None:
    found = guessed_specs(shapes, axes, mesh)
    assert [tuple(P(*s)) for s in found] == [tuple(P(*s)) for s in expected]


@pytest.fixture
def like():
    mesh = make_mesh(AxisType.Auto, fsdp=8)
    return jax.device_put(jnp.zeros((16, 8)), NamedSharding(mesh, P(None, "fsdp")))


def test_lying_as_another_array(like) -> None:
    x = jnp.arange(128.0).reshape(16, 8)
    y = jax.jit(lambda x, like: lying_as(2 * x, like))(x, like)
    assert y.sharding.is_equivalent_to(like.sharding, 2)
    np.testing.assert_array_equal(y, 2 * x)
    # Outside of a compiled program everything lies already.
    np.testing.assert_array_equal(lying_as(x, like), x)


def test_each_array_lies_as_its_own(like) -> None:
    mesh = like.sharding.mesh
    rows = jax.device_put(like, NamedSharding(mesh, P("fsdp")))
    both = jax.jit(lambda x, *likes: [lying_as(2 * x, like) for like in likes])
    y, z = both(jnp.ones_like(like), like, rows)
    assert y.sharding.is_equivalent_to(like.sharding, 2)
    assert z.sharding.is_equivalent_to(rows.sharding, 2)


def test_a_program_is_the_same_whenever_it_is_made(like) -> None:
    def text() -> str:
        # A function of its own, of which nothing is cached.
        twice = jax.jit(lambda x, like: lying_as(x, like) + lying_as(2 * x, like))
        return twice.lower(like, like).as_text()

    assert "sharding_group" in (first := text())
    assert text() == first


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f])
def test_lying_alike_under_transformations(jit, like) -> None:
    x = jnp.arange(128.0).reshape(16, 8)
    square = lambda x, like: lying_as(x * x, like)  # noqa: E731
    y, tangent = jit(lambda x: jax.jvp(lambda x: square(x, like), (x,), (x,)))(x)
    np.testing.assert_array_equal(tangent, 2 * y)
    gradients = jax.grad(lambda x, like: square(x, like).sum(), (0, 1))
    by_x, by_like = jit(gradients)(x, like)
    np.testing.assert_array_equal(by_x, 2 * x)
    np.testing.assert_array_equal(by_like, jnp.zeros_like(like))
    xs, likes = jnp.stack([x, 2 * x], 1), jnp.stack([like, like])
    for given, dim in ((like, None), (likes, 0)):
        batched = jax.vmap(square, in_axes=(1, dim), out_axes=2)
        np.testing.assert_array_equal(jit(batched)(xs, given)[..., 1], 4 * y)
    over = jax.vmap(square, in_axes=(None, 0))
    np.testing.assert_array_equal(jit(over)(x, likes)[1], y)


def test_without_shardy_arrays_lie_as_they_do(like) -> None:
    x = jnp.arange(128.0).reshape(16, 8)
    given = jax.config.jax_use_shardy_partitioner  # pyright: ignore[reportAttributeAccessIssue]
    try:
        jax.config.update("jax_use_shardy_partitioner", False)
        y = jax.jit(lambda x, like: lying_as(3 * x, like))(x, like)
    finally:
        jax.config.update("jax_use_shardy_partitioner", given)
    np.testing.assert_array_equal(y, 3 * x)
