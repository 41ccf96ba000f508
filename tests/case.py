"""What a row of the table of cases says of a transformation."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import optax

import optaxplus as ox
from tests import problems
from tests.references.conventions import Array, LearningRate

# (params, grads, learning_rate, is_matrix) of one block -> parameters after each step.
Oracle = Callable[[Array, Array, LearningRate, bool], list[Array]]


def _nothing(p: Array, learning_rate: float, role: str) -> Array:
    return np.zeros_like(p)


@dataclass(frozen=True)
class Case:
    """One transformation with its arguments, and what is to be expected of it.

    Attributes:
        name: Unique.
        factory: The exported factory.
        kwargs: Its arguments, without the learning rate.
        learning_rate: For the descent, at its start; None for a link, which has none.
        remaining_loss: Largest share of the loss that the descent may leave in a leaf.
        static_args: What `optax.inject_hyperparams` must leave alone.
        needs_params: Whether `update` does.
        complex_supported: Whether parameters may be complex.
        matrix_only: Whether every parameter has to be a matrix.
        silent_steps: How many first steps move nothing.
        scope: What a NaN in one coordinate of the gradient reaches at most: that
            coordinate, its matrix or vector, or the whole tree.
        rtol: How much of an update float32 rounding may change, relative to its
            largest entry. The default: a dozen roundings of 6e-8, some amplified.
        multiplies_matrices: Whether it iterates by products of matrices, whose
            rounding errors are larger than those of elementwise rules.
        zero_gradient: (parameter, learning rate, role) -> first update when the
            gradient is 0.
        oracle: Float64 reference of one block. For named optimizers.
        torch: Recorded PyTorch runs that the row reproduces, with the learning rate
            where it is not the recorded one.
        bfloat16_rtol: How far a trajectory in bfloat16 may be from the reference,
            relative to its largest entry.
        torch_rtol: Agreement with them, relative to the largest entry. The default is
            for ten steps in float64, from which the start is subtracted.
        twin: Learning rate -> the optax transformation that does the same.
        branches: State -> which branches it shows to have been taken, by name.
        by_default: Whether tests that compile something for every row run it without
            `-m slow`; not where it compiles much that another row, or a test of its
            own, compiles too.
        is_wide: Whether it emits float32 whatever the gradient's dtype; None: as links
            do, and named optimizers do not.
    """

    name: str
    factory: Callable[..., optax.GradientTransformation]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float | None = None
    remaining_loss: float = 0.3
    static_args: tuple[str, ...] = ()
    needs_params: bool = False
    complex_supported: bool = True
    matrix_only: bool = False
    silent_steps: int = 0
    scope: Literal["element", "block", "tree"] = "element"
    rtol: float = 4e-6
    multiplies_matrices: bool = False
    zero_gradient: Callable[[Array, float, str], Array] = _nothing
    oracle: Oracle | None = None
    torch: Mapping[str, Callable[[Any], Any] | None] = field(default_factory=dict)
    bfloat16_rtol: float = 2e-2
    torch_rtol: float = 1e-9
    twin: Callable[[Any], optax.GradientTransformation] | None = None
    branches: Callable[[Any], Mapping[str, bool]] | None = None
    by_default: bool = True
    is_wide: bool | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def is_link(self) -> bool:
        """Whether it is a link of chains rather than a named optimizer."""
        return self.learning_rate is None

    @property
    def emits_float32(self) -> bool:
        """Whether updates are float32 whatever the gradient's dtype."""
        return self.is_link if self.is_wide is None else self.is_wide

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The signature of the factory."""
        return inspect.signature(self.factory).parameters

    @property
    def shapes(self) -> Mapping[str, Any]:
        """A tree that reaches every branch."""
        return problems.MATRIX_SHAPES if self.matrix_only else problems.MIXED_SHAPES

    @property
    def odd_shapes(self) -> Mapping[str, Any]:
        """Every degenerate shape that the row takes."""
        return problems.ODD_MATRIX_SHAPES if self.matrix_only else problems.ODD_SHAPES

    def arguments(self, learning_rate: Any = None, **overrides: Any) -> dict[str, Any]:
        """Keyword arguments of the factory, learning rate included."""
        arguments = {**self.kwargs, **overrides}
        if self.is_link:
            return arguments
        rate = self.learning_rate if learning_rate is None else learning_rate
        return {"learning_rate": rate, **arguments}

    def make(
        self, learning_rate: Any = None, **overrides: Any
    ) -> optax.GradientTransformation:
        """The transformation of the row."""
        return self.factory(**self.arguments(learning_rate, **overrides))

    def with_axes(self, axes: Mapping[str, ox.MatrixAxes]) -> dict[str, Any]:
        """Arguments that tell the row how the leaves of a flat dict are matrices."""
        if "axes" in self.parameters:
            return {"axes": dict(axes)}
        if "rules" in self.parameters:
            return {
                "rules": tuple(
                    ox.Rule(
                        f"^{key}$", entry, "hidden" if entry.is_matrix else "vector"
                    )
                    for key, entry in axes.items()
                )
            }
        return {}
