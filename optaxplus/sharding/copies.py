"""Devices that hold the same: how they share the work out, and get all results.

The matrices of a layout are dealt to the copies in turn, as cards, and those left when
one of them has its share to the others. So a share is taken from a few parameters at a
time, and shares are put together again a few matrices at a time: no device ever holds
the matrices of the whole network twice.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxplus.numerics.polar import concatenated

__all__ = ["all_shares", "sent_for_all_shares", "share_of_copy"]

# Bytes of one all-gather.
_GATHERED = 2**28


def share_of_copy(
    parts: list[jax.Array], sizes: np.ndarray, copies: tuple[str, ...]
) -> jax.Array:
    """The matrices that one copy takes care of, padded to the largest share.

    Args:
      parts: Arrays (count, m, n), the same on all copies.
      sizes: How many of their matrices each copy takes.
      copies: The mesh axes along which the copies lie.
    """
    copy = lax.axis_index(copies)
    rounds = int(sizes.min())
    taken, left = _cut(parts, len(sizes), rounds * len(sizes))
    shares = []
    for some in taken:
        by_round = some.reshape(-1, len(sizes), *some.shape[1:])
        shares.append(lax.dynamic_index_in_dim(by_round, copy, 1, keepdims=False))
    if left:
        table = np.zeros((len(sizes), int(sizes.max()) - rounds), np.int32)
        for position, (turn, owner) in enumerate(_last_rounds(sizes)):
            table[owner, turn - rounds] = position
        shares.append(concatenated(left)[jnp.asarray(table)[copy]])
    return jnp.concatenate(shares)


def all_shares(
    share: jax.Array, sizes: np.ndarray, copies: tuple[str, ...]
) -> jax.Array:
    """All matrices, in the order of the parameters; inverse of `share_of_copy`."""
    rounds = int(sizes.min())
    # Without the barrier XLA gathers what `share` is converted to.
    share = lax.optimization_barrier(share)
    at_once = max(1, _GATHERED // (len(sizes) * share[0].nbytes))
    parts: list[jax.Array] = []
    for start in range(0, rounds, at_once):
        some = _after(parts, share[start : min(start + at_once, rounds)])
        some = lax.all_gather(some, copies, axis=1)
        parts.append(some.reshape(-1, *share.shape[1:]))
    for turn in range(rounds, len(share)):
        owners = np.flatnonzero(sizes > turn)
        some = _after(parts, share[turn])
        if _are_few(owners, sizes):
            mine = jnp.asarray(owners) == lax.axis_index(copies)
            zeros = jnp.zeros_like(some)
            some = jnp.where(mine[:, None, None], some, zeros)
            parts.append(lax.psum(some, copies))
        else:
            parts.append(lax.all_gather(some, copies)[owners])
    return jnp.concatenate(parts)


def sent_for_all_shares(sizes: np.ndarray) -> float:
    """How many matrices a copy sends in `all_shares`, in rings."""
    sent = float(sizes.min()) * (len(sizes) - 1)
    for turn in range(sizes.min(), sizes.max()):
        owners = np.flatnonzero(sizes > turn)
        moved = 2 * len(owners) if _are_few(owners, sizes) else len(sizes)
        sent += moved * (len(sizes) - 1) / len(sizes)
    return sent


def _are_few(owners: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether a sum of what they have and zeros is less to send than what all have."""
    return 2 * len(owners) < len(sizes)


def _after(parts: list[jax.Array], x: jax.Array) -> jax.Array:
    """x, once the last of the parts is there, so that not all are made at once."""
    if parts:
        x, parts[-1] = lax.optimization_barrier((x, parts[-1]))
    return x


def _cut(
    parts: list[jax.Array], multiple: int, total: int
) -> tuple[list[jax.Array], list[jax.Array]]:
    """The first `total` matrices, in arrays of multiples of `multiple`, and the rest.

    As few parameters together as make a multiple.
    """
    taken: list[jax.Array] = []
    left: list[jax.Array] = []
    pending: list[jax.Array] = []
    for part in parts:
        wanted = total - sum(map(len, taken + pending))
        if wanted:
            pending.append(part[:wanted])
        if len(part) > wanted:
            left.append(part[wanted:])
        if pending and sum(map(len, pending)) % multiple == 0:
            taken.append(concatenated(pending))
            pending = []
    return taken, left


def _last_rounds(sizes: np.ndarray) -> list[tuple[int, int]]:
    """(round, copy) of the matrices that are left when one copy has its share."""
    return [
        (turn, copy)
        for turn in range(int(sizes.min()), int(sizes.max()))
        for copy in range(len(sizes))
        if sizes[copy] > turn
    ]
