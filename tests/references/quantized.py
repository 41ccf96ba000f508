"""Float64 transcription of block-wise quantization by roots, rounded in turn.

Dettmers et al., arXiv 2110.02861, section 2: one absolute maximum a block, codes for
the quotients. Every array here is a matrix whose blocks lie along its first axis.
"""

import numpy as np

from tests.references.conventions import Array


def stored(x: Array, block: int, signed: bool, step: int) -> Array:
    """What is read back after `x` was stored."""
    place = sum(np.indices(x.shape)) + step
    turns = place * 0x9E3779B9 % 2**32 / 2**32
    shift = turns - (turns >= 0.5)
    blocks = [slice(start, start + block) for start in range(0, len(x), block)]
    return np.concatenate([_stored_block(x[b], shift[b], signed) for b in blocks])


def _stored_block(x: Array, shift: Array, signed: bool) -> Array:
    scale = np.abs(x).max(axis=0)
    quotient = np.divide(np.abs(x), scale, out=np.zeros_like(x), where=scale > 0)
    sizes, exponent = (127, 2) if signed else (255, 4)
    if not signed:
        quotient = np.maximum(quotient, sizes**-4.0)
    root = sizes * quotient ** (1 / exponent)
    if signed:
        root = np.minimum(root, sizes**2 * quotient)
    code = np.rint(root + shift)
    code = np.clip(code, 0 if signed else 1, sizes)
    return np.sign(x) * (code / sizes) ** exponent * scale


def adamw8bit(
    p: Array,
    grads: list[Array],
    *,
    learning_rate: float,
    block: int,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[list[Array], Array, Array]:
    """Parameters after every step, and the moments as they are stored at the end."""
    mu = nu = np.zeros_like(p)
    result = []
    for t, g in enumerate(grads, start=1):
        mu = b1 * mu + (1 - b1) * g
        nu = b2 * nu + (1 - b2) * g**2
        step = (mu / (1 - b1**t)) / (np.sqrt(nu / (1 - b2**t)) + eps)
        p = p - learning_rate * (step + weight_decay * p)
        result.append(p)
        mu, nu = (
            stored(mu, block, True, step=t - 1),
            stored(nu, block, False, step=t - 1),
        )
    return result, mu, nu
