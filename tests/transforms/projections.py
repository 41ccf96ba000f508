"""What APOLLO projects by, found out from outside."""

import jax
import numpy as np

import optaxplus as ox
from tests.transforms.apollo_runs import STACK, follow, start

__all__ = ["projection"]


def projection(
    rank: int,
    side: int,
    *,
    step: int = 0,
    update_interval: int = 200,
    seed: int = 0,
    compiled: bool = True,
) -> np.ndarray:
    """P, shape (rank, side), float32: what becomes of an identity.

    Args:
        rank: of the projection; not more than side is used.
        side: the shorter side of a matrix.
        step: finished updates before.
        update_interval: see `optaxplus.scale_by_apollo`; as seed, compiled anew.
        seed: ibidem.
        compiled: whether as a compiled update has it, or one that runs op by op, whose
            random numbers are rounded differently.
    """
    arguments = {
        "b1": 0.0,
        "rank": min(rank, side),
        "update_interval": update_interval,
        "seed": seed,
        "axes": STACK,
    }
    identity = np.eye(side, dtype=np.float32)
    with jax.enable_x64(False):
        if not compiled:
            tx = ox.scale_by_apollo(**arguments)
            state = tx.init(identity)
            state = state._replace(count=state.count + step)
            return np.asarray(tx.update(identity, state)[1].mu)
        state = start(identity, **arguments)
        state = state._replace(count=state.count + np.int32(step))
        # The first moment without memory is the projected gradient.
        _, (state,) = follow([identity], state=state, **arguments)
    return state.mu
