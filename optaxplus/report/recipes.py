"""What is kept of a training run, said in words: for the command line and scripts.

An optimizer by its name and arguments, the formats of weights, gradients and state, and
LoRA, made into a transformation and its `MemoryReport`.
"""

import ast
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import optax

import optaxplus as ox
from optaxplus import validation
from optaxplus.custom_types import PyTree
from optaxplus.numerics.matrix_axes import MatrixAxes
from optaxplus.partition.inference import decide
from optaxplus.partition.rules import DEFAULT_RULES, Rule
from optaxplus.report.layout import lay_out
from optaxplus.report.memory import MemoryReport, memory_report
from optaxplus.report.models import abstract_params

__all__ = ["MASTERS", "OPTIMIZERS", "STATES", "WEIGHTS", "Recipe", "lora_factors"]

WEIGHTS = ("float32", "bfloat16", "float16")
"""Dtypes of parameters and gradients."""

MASTERS: Mapping[str, int] = {"float32": 32, "24bit": 24}
"""What `optaxplus.master_weights` keeps of narrow parameters, and its `bits`."""

STATES = ("8bit",)
"""What `optaxplus.quantize_state` makes of the moments."""

OPTIMIZERS: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    name: value
    for name, value in sorted(vars(ox).items())
    if inspect.isfunction(value)
    and value.__module__.startswith("optaxplus.optimizers.")
    and "learning_rate" in inspect.signature(value).parameters
}
"""Every named optimizer of this package, by its name."""

# Bytes do not depend on it.
_LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Recipe:
    """An optimizer, and in which formats it keeps what it works on.

    Attributes:
      optimizer: A name from `OPTIMIZERS`, with keyword arguments in parentheses where
        others than the defaults are meant: "adamw", "sgd(momentum=0.9)".
      weights: Dtype of the parameters, from `WEIGHTS`.
      grads: Dtype of the gradients, from `WEIGHTS`; None is that of the parameters.
      master: What `optaxplus.master_weights` keeps beside parameters in fewer than 32
        bits: "float32" or "24bit"; None is nothing.
      state: "8bit" for `optaxplus.quantize_state`; None is what the optimizer keeps.
      lora: Rank of factors beside every hidden matrix, which are trained in its place;
        None trains all parameters. The rest has neither gradients nor state, and the
        factors have the dtype of the weights.

    Raises:
      TypeError: If an argument has a wrong type.
      ValueError: If a name is not known, an argument of the optimizer is wrong, or
        there is nothing that a master could add to the weights.

    Example:
      >>> from optaxplus.report.recipes import Recipe
      >>> recipe = Recipe("adamw", weights="bfloat16", master="24bit", state="8bit")
      >>> round(recipe.report("llama-70b").bytes_per_param, 2)
      7.06
    """

    optimizer: str = "adamw"
    weights: str = "float32"
    grads: str | None = None
    master: str | None = None
    state: str | None = None
    lora: int | None = None

    def __post_init__(self) -> None:
        name = "Recipe"
        validation.check_choice(name, "weights", self.weights, WEIGHTS)
        for argument, choices in (
            ("grads", WEIGHTS),
            ("master", MASTERS),
            ("state", STATES),
        ):
            value = getattr(self, argument)
            if value is not None:
                validation.check_choice(name, argument, value, choices)
        if self.lora is not None:
            validation.check_int(name, minimum=1, lora=self.lora)
        if self.master is not None and self.weights == "float32":
            raise ValueError(
                f"{name}: master={self.master!r} is not allowed with "
                "weights='float32', which have all that it would add; make the weights "
                "'bfloat16' or 'float16'."
            )
        self.build()

    def build(
        self, rules: Sequence[Rule] = DEFAULT_RULES
    ) -> optax.GradientTransformation:
        """Makes the transformation.

        Args:
          rules: What each parameter is.

        Returns:
          The optimizer in its wrappers, `master_weights` outermost.
        """
        factory, arguments = _read_call(self.optimizer)
        known = inspect.signature(factory).parameters
        if "rules" in known:
            arguments = {"rules": rules, **arguments}
        elif "axes" in known:
            axes = partial(ox.infer_matrix_axes, rules=rules)
            arguments = {"axes": axes, **arguments}
        tx = factory(**{"learning_rate": _LEARNING_RATE, **arguments})
        if self.state is not None:
            tx = ox.quantize_state(tx, rules=rules)
        if self.master is not None:
            tx = ox.master_weights(tx, bits=MASTERS[self.master])
        return tx

    def report(
        self,
        model: str | PyTree,
        mesh: Mapping[str, int] | None = None,
        rules: Sequence[Rule] = DEFAULT_RULES,
    ) -> MemoryReport:
        """Counts what it takes to train a model so.

        Args:
          model: Name of a published model, see `optaxplus.abstract_params`; or
            parameters, of which the shapes are used: nested dictionaries for LoRA.
          mesh: Sizes of the axes of a mesh over which everything is laid out, see
            `optaxplus.report.layout.lay_out`; None is one device.
          rules: What each parameter is.

        Returns:
          The report.
        """
        if isinstance(model, str):
            params = abstract_params(model, self.weights)
        else:
            params = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, self.weights), model
            )
        base = None
        if self.lora is not None:
            base = params if mesh is None else lay_out(params, mesh, rules)
            params, rules = lora_factors(params, self.lora, rules)
        if mesh is not None:
            params = lay_out(params, mesh, rules)
        return memory_report(
            self.build(rules), params, grads_dtype=self.grads, frozen=base
        )


def lora_factors(
    params: PyTree, rank: int, rules: Sequence[Rule] = DEFAULT_RULES
) -> tuple[dict[str, Any], tuple[Rule, ...]]:
    """The factors A and B of a LoRA that adapts every hidden matrix, experts too.

    Args:
      params: Nested dictionaries of arrays or `jax.ShapeDtypeStruct`s.
      rank: Columns of A and rows of B.
      rules: What each parameter is.

    Returns:
      The factors as nested dictionaries of `jax.ShapeDtypeStruct`s, where the matrices
      are in `params`; and rules for each of them, because shapes alone do not tell a
      rank from as many layers.

    Raises:
      ValueError: If no rule decides a parameter.
    """
    factors: dict[str, Any] = {}
    own = []
    for decision in decide("lora_factors", params, rules):
        if decision.role != "hidden":
            continue
        fan_in, fan_out = (
            tuple(decision.shape[axis] for axis in group)
            for group in (decision.axes.fan_in, decision.axes.fan_out)
        )
        copies = tuple(
            size
            for axis, size in enumerate(decision.shape)
            if axis not in (*decision.axes.fan_in, *decision.axes.fan_out)
        )
        *module, last = decision.path.split("/")
        stem = "lora" if last == "kernel" else f"{last}_lora"
        node = factors
        for key in module:
            node = node.setdefault(key, {})
        for letter, role, ins, outs in (
            ("a", "other", fan_in, (rank,)),
            ("b", "hidden", (rank,), fan_out),
        ):
            key = f"{stem}_{letter}"
            node[key] = jax.ShapeDtypeStruct((*copies, *ins, *outs), decision.dtype)
            first, middle = len(copies), len(copies) + len(ins)
            own.append(
                Rule(
                    rf"^{re.escape('/'.join([*module, key]))}$",
                    MatrixAxes(
                        tuple(range(first, middle)),
                        tuple(range(middle, middle + len(outs))),
                    ),
                    role,
                )
            )
    return factors, tuple(own)


def _read_call(
    text: str,
) -> tuple[Callable[..., optax.GradientTransformation], dict[str, Any]]:
    """The factory and the keyword arguments that "sgd(momentum=0.9)" means."""
    form = "it must be a name, or a name with keyword arguments: 'sgd(momentum=0.9)'"
    if not isinstance(text, str):
        raise TypeError(f"Recipe: optimizer={text!r} is not allowed; {form}.")
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise _refusal(text, form) from error
    function, keywords = node, []
    if isinstance(node, ast.Call) and not node.args:
        function, keywords = node.func, node.keywords
    if not isinstance(function, ast.Name):
        raise _refusal(text, form)
    validation.check_choice("Recipe", "optimizer", function.id, OPTIMIZERS)
    factory = OPTIMIZERS[function.id]
    known = inspect.signature(factory).parameters
    arguments = {}
    for keyword in keywords:
        if keyword.arg not in known:
            meant = validation.did_you_mean(keyword.arg, known)
            allowed = f"arguments of {function.id} are {', '.join(map(repr, known))}"
            raise _refusal(text, allowed + meant)
        if keyword.arg in arguments:
            raise _refusal(text, f"{keyword.arg} must be given once")
        try:
            arguments[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError) as error:
            allowed = f"{keyword.arg} must be a number, a word in quotes or the like"
            raise _refusal(text, allowed) from error
    return factory, arguments


def _refusal(text: str, allowed: str) -> ValueError:
    return ValueError(f"Recipe: optimizer={text!r} is not allowed; {allowed}.")
