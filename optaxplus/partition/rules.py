"""What the parameters of real models are called, and which of their axes are a matrix.

A rule answers two questions about the parameters whose path it matches: how they are
shaped (`axes`) and what they are (`role`). The first rule that matches decides. The
default rules know the names that Flax and plain JAX code use, read evidence that lies
beside a parameter (the bias of a kernel tells a stack of layers from a convolution),
and decline the rest.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optaxplus import validation
from optaxplus.numerics.matrix_axes import MatrixAxes
from optaxplus.partition import layouts, names
from optaxplus.partition.layouts import AxesFunction

__all__ = [
    "DEFAULT_RULES",
    "LORA_RULES",
    "InStack",
    "Rule",
    "check_rules",
    "stacked",
]


@dataclass(frozen=True)
class Rule:
    """Decides the matrix axes and the role of the parameters whose path it matches.

    Attributes:
      pattern: Regular expression, found anywhere (`re.search`) in the "/"-joined path
        of the parameter, such as "block_0/attn/query/kernel".
      axes: The `MatrixAxes` of the whole shape (negative axes serve a stack as well as
        one layer; of what is frozen any will do, such as `MatrixAxes((), ())`), or a
        function (path, shape, siblings) that returns them, or None to leave the
        parameter to the next rule. `siblings` maps the arrays beside the parameter
        ("bias") and those below its module's parent ("../norm/scale",
        "../mlp/up/kernel") to their shapes, itself included; it is empty where part of
        the tree is masked away.
      role: "hidden" (weight matrices), "embedding", "head", "vector", "other",
        "frozen" (never updated), or a word of your own, which becomes the label.
      required: Whether it is an error that the pattern matches no parameter, so that
        a rule does not silently rot when a model is renamed.
      name: What tables call the rule; the pattern if empty.
      per_layer: Whether `axes` speaks of one layer: the axes that count layers, as far
        as the shapes of the whole tree prove them, are taken off the shapes that it is
        asked about and count as copies. Otherwise it speaks of the whole shape.

    Raises:
      TypeError: If an attribute has a wrong type.
      ValueError: If the pattern is no regular expression, or the role is empty.

    Example:
      >>> from optaxplus import DEFAULT_RULES, MatrixAxes, Rule
      >>> experts = Rule(r"experts/w_in$", MatrixAxes((1,), (2,)), "hidden")
      >>> rules = (experts, *DEFAULT_RULES)
    """

    pattern: str
    axes: "MatrixAxes | AxesFunction | InStack"
    role: str
    required: bool = True
    name: str = ""
    per_layer: bool = False

    def __post_init__(self):
        try:
            re.search(self.pattern, "")
        except (re.error, TypeError) as error:
            raise ValueError(
                f"Rule: pattern={self.pattern!r} is not allowed; it must be a regular "
                f"expression ({error})."
            ) from error
        if not (isinstance(self.axes, MatrixAxes | InStack) or callable(self.axes)):
            raise TypeError(
                f"Rule: axes={self.axes!r} is not allowed; it must be MatrixAxes or a "
                "function (path, shape, siblings) -> MatrixAxes | None."
            )
        if not isinstance(self.role, str) or not self.role:
            raise ValueError(
                f"Rule: role={self.role!r} is not allowed; it must be a word, such as "
                "'hidden', 'embedding', 'head', 'vector', 'other' or 'frozen'."
            )
        validation.check_flag("Rule", required=self.required, per_layer=self.per_layer)

    def describe(self) -> str:
        """What tables call it: name or pattern, after that of the stack it is for."""
        if isinstance(self.axes, InStack):
            return f"stacked {self.pattern}: {self.axes.rule.describe()}"
        return self.name or self.pattern or "(any)"


@dataclass(frozen=True)
class InStack:
    """As the `axes` of a rule: asks another rule about one layer of a stack.

    Attributes:
      rule: The rule that is asked.
      axis: The axis that counts layers.
    """

    rule: Rule
    axis: int


def check_rules(function: str, rules: Any) -> tuple[Rule, ...]:
    """Refuses anything but a sequence of rules, and returns it as a tuple."""
    if not isinstance(rules, Sequence) or isinstance(rules, str):
        raise TypeError(
            f"{function}: rules={rules!r} is not allowed; it must be a sequence of "
            "Rule, such as (*mine, *ox.DEFAULT_RULES)."
        )
    for index, rule in enumerate(rules):
        if isinstance(rule, Sequence) and not isinstance(rule, str):
            raise TypeError(
                f"{function}: rules[{index}] is a {type(rule).__name__}, which is not "
                "allowed; every entry must be a Rule. Put a star before it: "
                "(*ox.stacked(...), *ox.DEFAULT_RULES)."
            )
        if not isinstance(rule, Rule):
            raise TypeError(
                f"{function}: rules={rule!r} is not allowed; every entry must be a "
                "Rule, as in (*mine, *ox.DEFAULT_RULES)."
            )
    return tuple(rules)


class _NamedRules(tuple[Rule, ...]):
    """Rules under a name, which is how they are printed in signatures."""

    name: str

    def __new__(cls, name: str, rules: Sequence[Rule]):
        self = super().__new__(cls, rules)
        self.name = name
        return self

    def __repr__(self) -> str:
        return f"ox.{self.name}"

    def __reduce__(self):
        return type(self), (self.name, tuple(self))


def _default(name: str, pattern: str, axes: AxesFunction, role: str) -> Rule:
    return Rule(pattern, axes, role, required=False, name=name, per_layer=True)


# Names decide the role of what is no hidden matrix. Shapes are read from what lies
# beside a parameter (its bias, the projections of its attention block) before names,
# because evidence speaks of the parameter at hand and a name of what is usual.
DEFAULT_RULES: tuple[Rule, ...] = _NamedRules(
    "DEFAULT_RULES",
    (
        _default("output head", names.HEAD, layouts.head, "head"),
        _default("table", names.LAYER_EMBEDDING, layouts.first_axis_in, "embedding"),
        _default("table", names.EMBEDDING, layouts.table, "embedding"),
        _default("patches", names.PATCHES, layouts.patches, "embedding"),
        _default("LoRA A", names.LORA_A, layouts.lora_a, "other"),
        _default("LoRA B", names.LORA_B, layouts.lora_b, "hidden"),
        _default("router", names.ROUTER, layouts.router, "other"),
        _default("router", r"(^|/)gate(/kernel)?$", layouts.gate_of_experts, "other"),
        _default("elementwise", names.ELEMENTWISE, layouts.whole, "vector"),
        _default("scale", names.SCALE, layouts.last_axis, "vector"),
        _default("norm", names.NORM, layouts.norm, "vector"),
        _default("bias", names.BIAS, layouts.bias, "vector"),
        _default("experts", names.EXPERT_BIAS, layouts.expert_bias, "vector"),
        _default("heads", names.ATTENTION_IN, layouts.attention_in, "hidden"),
        _default("heads", names.ATTENTION_OUT, layouts.attention_out, "hidden"),
        _default("one channel", names.KERNEL, layouts.one_channel, "other"),
        _default("one channel", names.WEIGHT, layouts.torch_one_channel, "other"),
        _default("fused", names.FUSED, layouts.fused_projections, "hidden"),
        _default("gates", names.GATES, layouts.fused_gates, "hidden"),
        _default("kernel by bias", names.KERNEL, layouts.kernel, "hidden"),
        _default("weight by bias", names.WEIGHT, layouts.torch_weight, "hidden"),
        _default("einsum", names.EINSUM_IN, layouts.einsum_in, "hidden"),
        _default("einsum", names.EINSUM_OUT, layouts.einsum_out, "hidden"),
        _default("einsum", names.EINSUM_GATES, layouts.einsum_gates, "hidden"),
        _default("latent heads", names.LATENT, layouts.first_axis_in, "hidden"),
        _default("convolution", names.CONVOLUTION, layouts.convolution, "hidden"),
        _default("convolution", names.KERNEL, layouts.pointwise, "hidden"),
        _default("experts", names.EXPERT, layouts.expert, "hidden"),
        _default("experts", names.UNNAMED, layouts.routed, "hidden"),
        _default("thin", names.UNNAMED_ARRAY, layouts.thin, "vector"),
        _default("any matrix", names.UNNAMED, layouts.matrix, "hidden"),
        _default("any vector", r"", layouts.vector, "vector"),
    ),
)
"""What most optimizers here take for `rules`: names of Flax, NNX, Haiku, Equinox and
plain JAX. None of them is required to match."""

LORA_RULES: tuple[Rule, ...] = _NamedRules(
    "LORA_RULES",
    (
        Rule(names.LORA_A, layouts.lora_a, "other", name="LoRA A", per_layer=True),
        Rule(names.LORA_B, layouts.lora_b, "hidden", name="LoRA B", per_layer=True),
        _default("base", names.LORA_BASE, layouts.whole, "frozen"),
    ),
)
"""For low-rank adapters, in the place of `DEFAULT_RULES`: factors B are "hidden",
factors A "other", everything else is "frozen". It is an error if there are no
factors."""


def stacked(
    pattern: str, axis: int = 0, rules: Sequence[Rule] = DEFAULT_RULES
) -> tuple[Rule, ...]:
    """Rules for parameters with an axis of layers, decided as if it were not there.

    For stacks made by `nn.scan`, `nnx.scan` or `vmap` whose shapes do not prove it: the
    axis counts copies, and `rules` are asked about the shape of one layer. Stacks of
    stacks: `stacked(outer, rules=stacked(inner))`.

    Args:
      pattern: Regular expression, found anywhere in the path of the parameters that are
        stacked, such as r"^layers/". It is an error if it matches none.
      axis: The axis that counts layers, >= 0. MaxText and T5X scan along 1.
      rules: What is asked about one layer.

    Returns:
      One rule for each of `rules`, to stand in front: `(*stacked(r"^layers/"),
      *DEFAULT_RULES)`.

    Raises:
      TypeError: If an argument has a wrong type.
      ValueError: If an argument is out of range; when the rules are used, if a
        parameter under the pattern has no such axis, or those of one module have it in
        different sizes.

    Example:
      >>> import jax, optaxplus as ox
      >>> params = {"layers": {"up": jax.ShapeDtypeStruct((12, 64, 256), "float32")}}
      >>> rules = (*ox.stacked(r"^layers/"), *ox.DEFAULT_RULES)
      >>> ox.infer_matrix_axes(params, rules)["layers"]["up"]
      MatrixAxes(fan_in=(1,), fan_out=(2,), splits=())
    """
    validation.check_int("stacked", axis=axis, minimum=0)
    return tuple(
        Rule(pattern, InStack(rule, axis), rule.role)
        for rule in check_rules("stacked", rules)
    )
