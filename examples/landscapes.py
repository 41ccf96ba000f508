"""Test problems whose minima are known: functions of a point, and of two matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Of the quadratic: its condition number, and the angle of its valley to the x axis.
CURVATURES = (1.0, 100.0)
ANGLE = np.pi / 6
# Of the matrix problem: the size of the entries that it starts from. Small, so that
# every singular value has to be learned.
START_SCALE = 0.03


@dataclass(frozen=True)
class Plane:
    """A function of a point in the plane, which is one parameter, a vector.

    Attributes:
        title: What it is.
        loss: (…, 2) -> (…).
        start: Where every optimizer begins, (2,).
        minimum: The only point, (2,), with a loss of 0.
        frame: Lowest and highest x, lowest and highest y of a picture.
    """

    title: str
    loss: Callable[[jax.Array], jax.Array]
    start: jax.Array
    minimum: np.ndarray
    frame: tuple[float, float, float, float]

    def surface(self, points: int = 241) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x, y and the loss in every point of a grid over the frame."""
        x = np.linspace(*self.frame[:2], points, dtype=np.float32)
        y = np.linspace(*self.frame[2:], points, dtype=np.float32)
        grid = jnp.stack(jnp.meshgrid(x, y), axis=-1)
        return x, y, np.asarray(self.loss(grid))


@dataclass(frozen=True)
class Factorization:
    """‖A·B - M‖² / ‖M‖², of two matrices A and B: the parameters "left" and "right".

    Attributes:
        target: M, (size, size), of a rank that A·B can have.
        start: Small random A and B.
    """

    target: np.ndarray
    start: dict[str, jax.Array]
    title = "matrix factorization"

    def loss(self, params: dict[str, jax.Array]) -> jax.Array:
        """The squared error, relative to the size of M."""
        target = jnp.asarray(self.target, params["left"].dtype)
        error = params["left"] @ params["right"] - target
        return jnp.sum(jnp.square(error)) / jnp.sum(jnp.square(target))

    @property
    def rank(self) -> int:
        """Rank of M, and the longest that A·B can have."""
        return self.start["left"].shape[1]

    def singular_values(self, params: dict[str, Any]) -> np.ndarray:
        """Those of A·B that can be other than 0, the largest first; nan of nan."""
        with np.errstate(invalid="ignore"):
            product = np.float64(params["left"]) @ np.float64(params["right"])
        finite = np.isfinite(product).all((-2, -1))[..., None]
        # LAPACK refuses what is not finite.
        product = np.where(finite[..., None], product, 0.0)
        values = np.linalg.svd(product, compute_uv=False)[..., : self.rank]
        return np.where(finite, values, np.nan)


def rosenbrock(point: jax.Array) -> jax.Array:
    """(1 - x)² + 100·(y - x²)²: a valley that bends, hardly falls, and has steep walls.

    Rosenbrock, The Computer Journal 3 (1960).
    """
    x, y = point[..., 0], point[..., 1]
    return jnp.square(1 - x) + 100 * jnp.square(y - jnp.square(x))


def beale(point: jax.Array) -> jax.Array:
    """A plateau between steep walls, with a valley that leads to (3, 0.5).

    Beale, On an iterative method for finding a local minimum (1958).
    """
    x, y = point[..., 0], point[..., 1]
    return sum(
        jnp.square(constant - x * (1 - y**power))
        for power, constant in enumerate((1.5, 2.25, 2.625), start=1)
    )


def quadratic(point: jax.Array) -> jax.Array:
    """A straight valley, askew, a hundred times as curved across as along.

    Askew, because methods that scale every coordinate for itself would see none along
    the axes.
    """
    x, y = point[..., 0], point[..., 1]
    along = np.cos(ANGLE) * x + np.sin(ANGLE) * y
    across = np.cos(ANGLE) * y - np.sin(ANGLE) * x
    flat, steep = CURVATURES
    return 0.5 * (flat * jnp.square(along) + steep * jnp.square(across))


def factorization(
    seed: int, *, size: int = 32, rank: int = 16, condition: float = 1000.0
) -> Factorization:
    """A matrix with singular values from 1 to 1 / condition, to be factorized.

    Gradient descent learns them one after the other, as each grows the faster the
    larger it is; an orthogonalized step moves all of them alike.

    Args:
        seed: Of the singular vectors, and of the start.
        size: Rows and columns of the matrix.
        rank: Its rank.
        condition: Its largest singular value over its smallest.
    """
    generator = np.random.default_rng(seed)
    left, right = (
        np.linalg.qr(generator.standard_normal((size, rank)))[0] for _ in range(2)
    )
    values = np.geomspace(1.0, 1.0 / condition, rank)
    start = {
        name: jnp.asarray(
            START_SCALE * generator.standard_normal(shape), dtype=jnp.float32
        )
        for name, shape in {"left": (size, rank), "right": (rank, size)}.items()
    }
    return Factorization(left * values @ right.T, start)


PLANES = {
    "rosenbrock": Plane(
        "Rosenbrock",
        rosenbrock,
        jnp.array([-1.2, 1.0]),
        np.array([1.0, 1.0]),
        (-2.0, 3.0, -1.5, 3.5),
    ),
    "beale": Plane(
        "Beale",
        beale,
        jnp.array([1.0, 1.0]),
        np.array([3.0, 0.5]),
        (0.5, 4.0, -1.25, 1.25),
    ),
    "quadratic": Plane(
        "ill-conditioned quadratic",
        quadratic,
        jnp.array([-4.0, 3.0]),
        np.array([0.0, 0.0]),
        (-5.5, 3.5, -5.5, 3.5),
    ),
}
