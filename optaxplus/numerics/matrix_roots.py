"""Inverse roots and eigenbases of symmetric positive semi-definite matrices.

Inverse p-th roots A^(-1/p), where eigenvalues do not go below ε·‖A‖, of the Frobenius
norm, in one of two ways:

    eigh      A = Q·diag(λ)·Qᵀ,  Q·diag(max(λ, ε·‖A‖)^(-1/p))·Qᵀ
    newton    the coupled iteration, of products alone, for A + ε·‖A‖·I:
              M₀ = z·A,  X₀ = z^(1/p)·I,  z = (p + 1)/(2·‖A‖)
              T = ((p + 1)·I - M)/p;  X <- X·T;  M <- Tᵖ·M         X -> A^(-1/p)

Eigenbases, by decomposition or by a step of orthogonal iteration from a basis that is
near already: the columns in descending order of qᵢᵀ·A·qᵢ, then Q <- qr(A·Q + τ·‖A‖₂·Q).
The compiler for TPUs takes minutes for a decomposition of 2048 columns, as it unrolls
its blocks. There QR goes through panels in a loop, and the first eigenbasis comes from
iterations alone (`by_platform`).

What a sum of G·Gᵀ knows of directions that G never had is rounding error, another one
on every machine. Its inverse root would be larger than all others: ε is above it. Its
eigenvectors would be any: those below τ are chosen by the coordinates (`eigenbasis`)
and stay as they are in an iteration.

Sources: Guo and Higham, A Schur-Newton method for the matrix p-th root and its inverse
(2006), equation 3.6, the coupled form of Iannazzo; Anil et al., Scalable second order
optimization for deep learning, arXiv 2002.09018, on ε relative to the matrix; Vyas et
al., SOAP, arXiv 2409.11321, Algorithm 4 on the orthogonal iteration.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optaxplus import validation
from optaxplus.numerics.explicit_axes import left_to_compiler
from optaxplus.numerics.hyperparameters import Scalar
from optaxplus.numerics.newton_schulz import largest_entry, power_of_two
from optaxplus.numerics.norms import or_one
from optaxplus.numerics.products import product

__all__ = [
    "ROOT_METHODS",
    "by_platform",
    "diagonal_of_second_moment",
    "eigenbasis",
    "in_groups",
    "inverse_root",
    "iterated_eigenbasis",
    "next_eigenbasis",
    "orthonormal",
    "second_moment",
]

ROOT_METHODS = ("eigh", "newton")

# Steps of Newton's iteration from where it converges quadratically, 1 - 1/p, to the
# last digit of float64.
_QUADRATIC_STEPS = 7

# Iterations from the identity that leave a few percent of the matrix off the diagonal,
# even where eigenvalues are as near to each other as those of noise.
_FIRST_ITERATIONS = 32

# Columns of a panel: the width of the units of TPUs.
_PANEL_WIDTH = 128


def second_moment(x: jax.Array) -> jax.Array:
    """x·xᵀ of (..., m, n), as if no entry were above 2^50 where one is (float32).

    The direction of such a matrix counts, its size does not; squares do not overflow.
    """
    x = _bounded(x)
    return product(x, x.mT)


def diagonal_of_second_moment(x: jax.Array) -> jax.Array:
    """The diagonal of `second_moment`, as a column (..., m, 1)."""
    return jnp.sum(jnp.square(_bounded(x)), axis=-1, keepdims=True)


def _bounded(x: jax.Array) -> jax.Array:
    limit = 2.0 ** (jnp.finfo(x.dtype).maxexp // 2 - 14)
    largest = largest_entry(x)
    return x * jnp.where(largest > limit, limit / largest, 1.0)


def inverse_root(
    x: jax.Array, order: int, *, eps: Scalar = 1e-6, method: str = "eigh"
) -> jax.Array:
    """Approximates x^(-1/order) for symmetric positive semi-definite matrices.

    Args:
      x: Shape (..., n, n), real floating point; symmetric, eigenvalues >= 0 up to
        rounding. Leading axes are a batch.
      order: p >= 1. Static.
      eps: Smallest eigenvalue relative to the Frobenius norm; "eigh" raises smaller
        ones to it, "newton" adds it to all. >= 0; near the rounding of the dtype,
        1.2e-7 for float32, or below it, roots of singular matrices depend on rounding.
        Static for "newton", which does as many steps as it asks for.
      method: "eigh", by eigenvalues, or "newton", by products, which accelerators are
        made for. With both the error grows with the condition number, in float32 to
        about a hundredth of the largest entry at eps=1e-6 and order 4, a
        twentieth at order 1. Static.

    Returns:
      The roots, in the shape and dtype of `x` (float32 for narrower ones). A zero
      matrix gives zeros, one with a NaN or an infinity NaN throughout.

    Raises:
      TypeError: If `x` is not real floating point, or an argument has a wrong type.
      ValueError: If `x` is no batch of square matrices, or an argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxplus.numerics import inverse_root
      >>> print(inverse_root(jnp.diag(jnp.array([16.0, 81.0])), 4, eps=0.0).round(3))
      [[0.5   0.   ]
       [0.    0.333]]

    References:
      Guo and Higham (2006), equation 3.6 ("newton"); Anil et al., arXiv 2002.09018, on
      the relative eps.
    """
    name = "inverse_root"
    validation.check_int(name, minimum=1, order=order)
    validation.check_choice(name, "method", method, ROOT_METHODS)
    validation.check_non_negative(name, eps=eps)
    if method == "newton":
        validation.check_static_margin(name, eps=eps)
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        kind = f"dtype {x.dtype}" if hasattr(x, "dtype") else f"type {type(x).__name__}"
        raise TypeError(
            f"{name}: x of {kind} is not allowed; it must be real floating point."
        )
    if x.ndim < 2 or x.shape[-1] != x.shape[-2]:
        raise ValueError(
            f"{name}: x of shape {x.shape} is not allowed; its last two axes must be "
            "those of a square matrix."
        )
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if not x.size:
        return wide
    function = _root_by_eigenvalues if method == "eigh" else _root_by_products
    (root,) = left_to_compiler(lambda x: (_scaled(function, x, order, eps),), wide)
    return root


def _scaled(function: Callable, x: jax.Array, order: int, eps: Scalar) -> jax.Array:
    """function(x/‖x‖, order, eps), scaled back; what to do where there is no norm."""
    largest = largest_entry(x)
    is_finite = jnp.isfinite(largest)
    # The reciprocal of what is above 2^126 is no normal number.
    scale = jnp.maximum(power_of_two(largest), jnp.finfo(x.dtype).tiny)
    y = jnp.where(is_finite, x * scale, 0.0)
    norm = jnp.linalg.norm(y, axis=(-2, -1), keepdims=True)
    unit = jnp.where(norm > 0, y / or_one(norm), _identity(x))
    root = function(unit, order, eps)
    # Two powers, as the product of both numbers may be out of range.
    root = root * scale ** (1 / order) * or_one(norm) ** (-1 / order)
    return jnp.where(is_finite, jnp.where(norm > 0, root, 0.0), jnp.nan)


def _identity(x: jax.Array) -> jax.Array:
    identity = jnp.eye(x.shape[-1], dtype=x.dtype)
    return identity.reshape((1,) * (x.ndim - 2) + identity.shape)


def _root_by_eigenvalues(x: jax.Array, order: int, eps: Scalar) -> jax.Array:
    values, vectors = jnp.linalg.eigh(x)
    # Without eps, what rounding made 0 or less counts as rounding.
    values = jnp.maximum(values, jnp.maximum(eps, jnp.finfo(x.dtype).eps))
    return product(vectors * values[..., None, :] ** (-1 / order), vectors.mT)


def _root_by_products(x: jax.Array, order: int, eps: float) -> jax.Array:
    identity = _identity(x)
    least = max(eps, float(jnp.finfo(x.dtype).eps))
    shift = (order + 1) / (2 * (1 + least))
    # T multiplies small eigenvalues by 1 + 1/p.
    growth = order * math.log1p(1 / order)
    steps = math.ceil(math.log(1 / least) / growth) + _QUADRATIC_STEPS

    def step(_: int, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        m, root = pair
        t = ((order + 1) * identity - m) / order
        return product(_power(t, order), m), product(root, t)

    start = shift * (x + least * identity), shift ** (1 / order) * identity + 0 * x
    _, root = lax.fori_loop(0, steps, step, start)
    return (root + root.mT) / 2


def _power(x: jax.Array, exponent: int) -> jax.Array:
    """x^exponent, by squaring."""
    if exponent == 1:
        return x
    half = _power(x, exponent // 2)
    square = product(half, half)
    return product(square, x) if exponent % 2 else square


def eigenbasis(x: jax.Array) -> jax.Array:
    """Eigenvectors of symmetric matrices as columns, largest eigenvalues first.

    Those of eigenvalues that are 0 up to rounding are the eigenvectors of diag(1, …, ½)
    in the space that is left to them; of a zero matrix, the identity.

    Args:
      x: Shape (..., n, n), float32 or float64, eigenvalues >= 0. NaN and infinities
        give NaN.
    """
    if not x.size:
        return x
    is_finite = jnp.isfinite(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True))
    values, vectors = _descending(jnp.where(is_finite, x, 0.0))
    is_known = (values > _rounding(x) * values[..., :1])[..., None, :]
    known = jnp.where(is_known, vectors, 0.0)
    span = product(known, known.mT)
    rest = _identity(x) - span
    ramp = jnp.linspace(1.0, 0.5, x.shape[-1], dtype=x.dtype)
    ramp = ramp.reshape((1,) * (x.ndim - 1) + ramp.shape)
    _, others = _descending(2.0 * span + product(rest * ramp, rest))
    return jnp.where(is_finite, jnp.where(is_known, vectors, others), jnp.nan)


def _descending(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, vectors = jnp.linalg.eigh(x)
    return jnp.flip(values, axis=-1), jnp.flip(vectors, axis=-1)


def _rounding(x: jax.Array) -> float:
    """τ: what rounding makes of a zero eigenvalue, relative to the largest."""
    return 4 * math.sqrt(x.shape[-1]) * float(jnp.finfo(x.dtype).eps)


def next_eigenbasis(
    x: jax.Array, basis: jax.Array, *, by_panels: bool = False
) -> tuple[jax.Array, jax.Array]:
    """One orthogonal iteration: (a basis nearer to that of `eigenbasis`, order).

    Args:
      x: Shape (..., n, n), symmetric, eigenvalues >= 0.
      basis: The same shape: orthonormal columns.
      by_panels: Whether QR goes through panels in a loop, for TPUs.

    Returns:
      The new basis and, of shape (..., n), which column of the old one each of its
      columns comes from.
    """
    if not x.size:
        return basis, jnp.zeros(x.shape[:-1], jnp.int32)
    # Decompositions of accelerators add up squares of these squares of gradients.
    x = x * power_of_two(largest_entry(x))
    turned = product(x, basis)
    values = jnp.sum(basis * turned, axis=-2, keepdims=True)
    largest = jnp.max(values, axis=-1, keepdims=True)
    turned += _rounding(x) * jnp.where(largest > 0, largest, 1.0) * basis
    order = jnp.argsort(values, axis=-1, descending=True)
    columns = jnp.take_along_axis(turned, order, axis=-1)
    columns = orthonormal(columns) if by_panels else jnp.linalg.qr(columns)[0]
    return columns, order[..., 0, :]


def iterated_eigenbasis(x: jax.Array) -> jax.Array:
    """Nearly `eigenbasis`, by orthogonal iterations from the identity; for TPUs.

    Args:
      x: Shape (..., n, n), symmetric, eigenvalues >= 0. NaN and infinities give NaN.
    """

    def step(_: int, basis: jax.Array) -> jax.Array:
        return next_eigenbasis(x, basis, by_panels=True)[0]

    return lax.fori_loop(0, _FIRST_ITERATIONS, step, _identity(x) + 0.0 * x)


def orthonormal(x: jax.Array, width: int = _PANEL_WIDTH) -> jax.Array:
    """Q of the QR decomposition, up to signs, by a program of the size of a panel.

    Block Gram-Schmidt, every panel twice: the second time what the first left of the
    earlier columns is relative to columns of length 1, so that Q is orthogonal up to
    rounding for condition numbers up to 1/eps (Barlow and Smoktunowicz,
    Reorthogonalized block classical Gram-Schmidt, Numerische Mathematik 123, 2013).

    Args:
      x: Shape (..., m, n), m >= n, of full rank, with squares that do not underflow.
      width: Columns of a panel.
    """
    if not x.size:
        return x
    n = x.shape[-1]
    width = min(width, n)
    # Zeros beside the last panel, whose columns of Q are cut off again.
    missing = -n % width
    x = jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, missing)])

    def add_panel(index: int, q: jax.Array) -> jax.Array:
        def project(_: int, panel: jax.Array) -> jax.Array:
            # The columns of q from this panel on are zero.
            return jnp.linalg.qr(panel - product(q, product(q.mT, panel)))[0]

        panel = lax.dynamic_slice_in_dim(x, index * width, width, axis=-1)
        panel = lax.fori_loop(0, 2, project, panel)
        return lax.dynamic_update_slice_in_dim(q, panel, index * width, axis=-1)

    q = lax.fori_loop(0, x.shape[-1] // width, add_panel, jnp.zeros_like(x))
    return q[..., :n]


def in_groups(
    function: Callable[..., tuple[jax.Array, ...]], *lists: Sequence[jax.Array]
) -> list[tuple[jax.Array, ...]]:
    """Calls `function` with batches of matrices, all of one shape at once.

    Decompositions take long to compile on accelerators; those of one shape share one.

    Args:
      function: Maps arrays (count, m, n), one of each list, to arrays (count, ...).
      *lists: Arrays (..., m, n), in every list with the same leading axes.

    Returns:
      What `function` returns for each entry of the lists, in their batch axes.
    """
    groups: dict[Any, list[int]] = {}
    for index, entries in enumerate(zip(*lists, strict=True)):
        kind = tuple((x.shape[-2:], x.dtype) for x in entries)
        groups.setdefault(kind, []).append(index)
    results: list[tuple[jax.Array, ...]] = [()] * len(lists[0])
    for members in groups.values():
        batches = [lists[0][index].shape[:-2] for index in members]
        stacks = [
            jnp.concatenate(
                [
                    xs[i].reshape(math.prod(b), *xs[i].shape[-2:])
                    for i, b in zip(members, batches, strict=True)
                ]
            )
            for xs in lists
        ]
        ends = list(itertools.accumulate(map(math.prod, batches)))[:-1]
        parts = [jnp.split(y, ends) for y in function(*stacks)]
        for index, batch, *own in zip(members, batches, *parts, strict=True):
            results[index] = tuple(y.reshape(batch + y.shape[1:]) for y in own)
    return results


def by_platform(
    function: Callable[..., tuple[jax.Array, ...]],
    on_tpus: Callable[..., tuple[jax.Array, ...]] | None = None,
) -> Callable[..., tuple[jax.Array, ...]]:
    """`function` of stacks, as each platform can run it.

    On CPUs of one entry after the other: jaxlib 0.10 hands a batch of decompositions to
    threads that may all be waiting, for the threads of another batch or in collectives,
    and waits with them for ever.

    Args:
      function: Maps arrays (count, ...) to arrays (count, ...).
      on_tpus: What takes its place on TPUs; None: `function` itself.
    """

    def in_turn(*stacks: jax.Array) -> tuple[jax.Array, ...]:
        if not len(stacks[0]):
            return function(*stacks)
        return lax.map(
            lambda xs: tuple(y[0] for y in function(*(x[None] for x in xs))), stacks
        )

    others = {} if on_tpus is None else {"tpu": on_tpus}
    return lambda *stacks: lax.platform_dependent(
        *stacks, cpu=in_turn, **others, default=function
    )
