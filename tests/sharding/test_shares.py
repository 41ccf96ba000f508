"""What all devices have, and each does a share of."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from optaxplus.numerics.matrix_roots import by_platform, in_groups
from optaxplus.sharding.owners import shared
from tests.numerics.symmetric import compiled, equations
from tests.sharding.meshes import make_mesh

BOTH = {"fsdp": 4, "tensor": 2}


def shapes_in(function: Any, *arrays: Any, kind: str) -> list[tuple[int, ...]]:
    """Of the operands of all primitives of one kind."""
    found = equations(jax.make_jaxpr(function)(*arrays).jaxpr)
    return [e.invars[0].aval.shape for e in found if e.primitive.name == kind]


def spread(function: Any, copies: tuple[str, ...]) -> Any:
    """`shared` within a shard_map that has everything on every device."""
    mesh = make_mesh(AxisType.Auto, **BOTH)
    return jax.shard_map(
        shared(function, copies),
        mesh=mesh,
        in_specs=P(),
        out_specs=P(),
        check_vma=False,
    )


def qr(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    q, r = jnp.linalg.qr(x + y)
    return q, jnp.sum(r, axis=-1)


each_copies = pytest.mark.parametrize(
    ("copies", "devices"), [(("fsdp", "tensor"), 8), (("fsdp",), 4), (("tensor",), 2)]
)


@each_copies
@pytest.mark.parametrize("count", [1, 8, 11])
def test_each_device_does_its_share(
    copies: tuple[str, ...], devices: int, count: int
) -> None:
    x = np.random.default_rng(count).standard_normal((2, count, 4, 4)).astype("float32")
    function = spread(qr, copies)
    share = -(-count // devices)
    assert shapes_in(function, *x, kind="qr") == [(share, 4, 4)]
    gathered = shapes_in(function, *x, kind="all_gather")
    assert gathered == [(share, 4, 4), (share, 4)]


@each_copies
def test_work_is_shared_before_it_is_done_in_turn(
    copies: tuple[str, ...], devices: int
) -> None:
    x = jnp.ones((11, 4, 4))
    share = -(-11 // devices)

    def groups(x: jax.Array) -> tuple[jax.Array, ...]:
        function = by_platform(lambda x: tuple(jnp.linalg.qr(x)))
        return in_groups(shared(function, copies), [x])[0]

    mesh = make_mesh(AxisType.Auto, **BOTH)
    function = jax.shard_map(
        groups, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
    )
    found = list(equations(jax.make_jaxpr(function)(x).jaxpr))
    # A device goes through its share, in which it waits for no other.
    loops = [e.params for e in found if e.primitive.name == "scan"]
    assert [loop["length"] for loop in loops] == [share]
    for loop in loops:
        kinds = {e.primitive.name for e in equations(loop["jaxpr"].jaxpr)}
        assert "qr" in kinds
        assert "all_gather" not in kinds


@pytest.mark.parametrize("copies", [("fsdp", "tensor"), ("tensor",)])
def test_shares_are_put_together(copies: tuple[str, ...]) -> None:
    x, y = np.random.default_rng(0).standard_normal((2, 11, 4, 4)).astype("float32")
    results = compiled(spread(qr, copies), x, y)
    # A decomposition of the same numbers, one at a time.
    for actual, wanted in zip(results, jax.jit(qr)(x, y), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=4e-6)


def test_nothing_to_share() -> None:
    x = jnp.zeros((0, 4, 4))
    q, r = compiled(spread(qr, ("fsdp",)), x, x)
    assert q.shape == (0, 4, 4)
    assert r.shape == (0, 4)


def test_without_copies_it_is_the_function() -> None:
    assert shared(qr, ()) is qr
