"""Arrays that the compiler is to shard as it shards others, whatever it decides."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.extend.mlir.dialects import sdy
from jax.interpreters import ad, batching, mlir

__all__ = ["lying_as"]


def lying_as(x: jax.Array, like: jax.Array) -> jax.Array:
    """x, which the compiler is to shard as it shards `like`, of the same shape.

    A hint for arrays on Auto mesh axes, where nothing in the program tells how they
    lie: a sharding group of Shardy, the partitioner of JAX. Without Shardy
    (`jax_use_shardy_partitioner=False`) it is x.
    """
    return _lying_as.bind(x, jax.lax.stop_gradient(like))


# JAX before 0.12 can say so, by jax.experimental.shard_alike.
_lying_as = Primitive("lying_as")


@_lying_as.def_impl
def _impl(x: jax.Array, like: jax.Array) -> jax.Array:
    del like
    return x


@_lying_as.def_abstract_eval
def _abstract_eval(x: Any, like: Any) -> Any:
    del like
    return x


def _lower(ctx: Any, x: Any, like: Any) -> Sequence[Any]:
    if getattr(jax.config, "jax_use_shardy_partitioner", True):
        # The next free number of this program, the same whenever it is lowered.
        group = ctx.module_context.new_channel()
        sdy.sharding_group(x, group)
        sdy.sharding_group(like, group)
    return [x]


def _jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    x, like = primals
    tangent, _ = tangents
    y = _lying_as.bind(x, like)
    if isinstance(tangent, ad.Zero):
        return y, tangent
    return y, _lying_as.bind(tangent, like)


def _transpose(cotangent: Any, x: Any, like: Any) -> tuple[Any, None]:
    del x
    if isinstance(cotangent, ad.Zero):
        return cotangent, None
    return _lying_as.bind(cotangent, like), None


def _batch(args: Sequence[Any], dims: Sequence[int | None]) -> tuple[Any, int]:
    # The new axis in front of both.
    size = next(
        x.shape[dim] for x, dim in zip(args, dims, strict=True) if dim is not None
    )
    moved = [
        jnp.broadcast_to(x, (size, *x.shape))
        if dim is None
        else jnp.moveaxis(x, dim, 0)
        for x, dim in zip(args, dims, strict=True)
    ]
    return _lying_as.bind(*moved), 0


# Not cached: arrays of one shape would all be of the first one's group.
mlir.register_lowering(_lying_as, _lower, cacheable=False)
ad.primitive_jvps[_lying_as] = _jvp
ad.primitive_transposes[_lying_as] = _transpose
batching.primitive_batchers[_lying_as] = _batch
