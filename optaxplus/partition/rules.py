"""What the parameters of real models are called, and which of their axes are a matrix.

A rule answers two questions about the parameters whose path it matches: how they are
shaped (`axes`) and what they are (`role`). The first rule that matches decides. The
default rules know the names that Flax and plain JAX code use, read evidence that lies
beside a parameter (the bias of a kernel tells a stack of layers from a convolution),
and decline the rest.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from optaxplus.numerics.matrix_axes import MatrixAxes

__all__ = ["DEFAULT_RULES", "AxesFunction", "Rule", "Siblings"]

Shape = tuple[int, ...]
Siblings = Mapping[str, Shape]
AxesFunction = Callable[[str, Shape, Siblings], MatrixAxes | None]


@dataclass(frozen=True)
class Rule:
    """Decides the matrix axes and the role of the parameters whose path it matches.

    Attributes:
      pattern: Regular expression, found anywhere (`re.search`) in the "/"-joined path
        of the parameter, such as "block_0/attn/query/kernel".
      axes: The `MatrixAxes`, or a function (path, shape, siblings) -> `MatrixAxes`,
        or None to decline. `siblings` maps names to shapes of the arrays beside the
        parameter ("bias") and of those in and beside neighbouring modules
        ("../norm/scale"), itself included; it is empty where part of the tree is
        masked away.
      role: "hidden" (weight matrices), "embedding", "head", "vector", "other",
        "frozen" (never updated), or a word of your own, which becomes the label.
      required: Whether it is an error that the pattern matches no parameter, so that
        a rule does not silently rot when a model is renamed.

    Raises:
      TypeError: If an attribute has a wrong type.
      ValueError: If the pattern is no regular expression, or the role is empty.

    Example:
      >>> from optaxplus import DEFAULT_RULES, MatrixAxes, Rule
      >>> experts = Rule(r"experts/w_in$", MatrixAxes((1,), (2,)), "hidden")
      >>> rules = (experts, *DEFAULT_RULES)
    """

    pattern: str
    axes: MatrixAxes | AxesFunction
    role: str
    required: bool = True

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"Rule: pattern={self.pattern!r} is not allowed; it must be a regular "
                f"expression ({error})."
            ) from error
        if not isinstance(self.axes, MatrixAxes) and not callable(self.axes):
            raise TypeError(
                f"Rule: axes={self.axes!r} is not allowed; it must be MatrixAxes or a "
                "function (path, shape, siblings) -> MatrixAxes | None."
            )
        if not isinstance(self.role, str) or not self.role:
            raise ValueError(
                f"Rule: role={self.role!r} is not allowed; it must be a word, such as "
                "'hidden', 'embedding', 'head', 'vector', 'other' or 'frozen'."
            )


_MATRIX = MatrixAxes((-2,), (-1,))


def _vector(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """A vector or scalar is one block."""
    return MatrixAxes((), tuple(range(len(shape)))) if len(shape) <= 1 else None


def _matrix(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(in, out)."""
    return _MATRIX if len(shape) == 2 else None


def _unnamed_matrix(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(in, out), unless it is a bias: a stack or heads that nothing decided."""
    return None if re.search(_BIAS, path) else _matrix(path, shape, siblings)


def _table(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes:
    """(*stack, in, out); the input of an embedding is one-hot over its entries."""
    return _MATRIX if len(shape) >= 2 else MatrixAxes((), tuple(range(len(shape))))


def _norm(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes:
    """(*stack, features): the scale of a norm is a vector in every layer."""
    return MatrixAxes((), (-1,)) if shape else MatrixAxes((), ())


def _stack_rank(kernel: Shape, bias: Shape) -> int | None:
    """How many leading axes of `kernel` count layers, as far as its bias tells.

    A layer's bias has the shape of the last axes of its kernel (one for a Dense or a
    convolution, two for attention heads), and a stack puts the same axis in front of
    both. None where the two shapes allow both readings, or neither.
    """
    readings = set()
    if len(bias) > len(kernel):
        return None
    if bias == kernel[len(kernel) - len(bias) :]:
        readings.add(0)
    if len(bias) >= 2 and bias[0] == kernel[0]:
        layer_kernel, layer_bias = kernel[1:], bias[1:]
        if layer_bias == layer_kernel[len(layer_kernel) - len(layer_bias) :]:
            readings.add(1)
    return readings.pop() if len(readings) == 1 else None


def _kernel(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """A kernel of rank >= 3 as its bias tells: (*stack, *in, *out).

    Without a bias, a norm with a stacked scale beside it tells a stack of matrices.
    """
    bias = siblings.get("bias")
    if len(shape) == 3 and bias is None and _is_stacked(shape, siblings):
        return MatrixAxes((1,), (2,))
    if len(shape) < 3 or not bias:
        return None
    stack = _stack_rank(shape, bias)
    if stack is None:
        return None
    first_out = len(shape) - (len(bias) - stack)
    if not stack < first_out:
        return None
    return MatrixAxes(
        tuple(range(stack, first_out)), tuple(range(first_out, len(shape)))
    )


def _bias(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """A bias of rank >= 2: heads of one layer, a stack of layers, or both."""
    if len(shape) < 2:
        return _vector(path, shape, siblings)
    if siblings.get("scale") == shape:
        return _norm(path, shape, siblings)
    if "kernel" not in siblings:
        return None
    stack = _stack_rank(siblings["kernel"], shape)
    return None if stack is None else MatrixAxes((), tuple(range(stack, len(shape))))


def _is_stacked(shape: Shape, siblings: Siblings) -> bool:
    """Whether a neighbouring norm has one scale for each of shape[0] layers."""
    return any(
        path.startswith("../") and path.endswith("/scale") and scale[:-1] == shape[:1]
        for path, scale in siblings.items()
    )


def _has_heads(siblings: Siblings) -> bool:
    """Whether query, value and out fit together as projections onto heads.

    (features, heads, head_dim) and (heads, head_dim, features) share heads and
    head_dim; two stacks of layers share their first axis. False where both readings
    are possible.
    """
    query, out = (siblings.get(f"../{name}/kernel", ()) for name in ("query", "out"))
    value = siblings.get("../value/kernel", query)
    if min(len(query), len(value), len(out)) < 3:
        return False
    fits_heads = query[-2] == out[-3] and value[-1] == out[-2]
    fits_layers = len(out) == 3 and query[0] == out[0]
    return fits_heads and not fits_layers


def _attention_bias(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(heads, head_dim), one vector; with a leading axis, a stack of them."""
    is_heads = len(shape) >= 2 and _has_heads(siblings)
    return MatrixAxes((), (-2, -1)) if is_heads else None


def _attention_in(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(features, heads, head_dim), or a stack of those."""
    is_heads = len(shape) >= 3 and _has_heads(siblings)
    return MatrixAxes((-3,), (-2, -1)) if is_heads else None


def _attention_out(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(heads, head_dim, features), or a stack of those."""
    is_heads = len(shape) >= 3 and _has_heads(siblings)
    return MatrixAxes((-3, -2), (-1,)) if is_heads else None


def _convolution(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(*window, in, out): every window position and input channel is summed over.

    Without a bias, rank 5 may be a window of three dimensions or a stack of images'
    convolutions, and is declined.
    """
    if not 3 <= len(shape) <= 4 or "bias" in siblings:
        return None
    first = 1 if _is_stacked(shape, siblings) else 0
    return MatrixAxes(tuple(range(first, len(shape) - 1)), (-1,))


def _default(pattern: str, axes: MatrixAxes | AxesFunction, role: str) -> Rule:
    return Rule(pattern, axes, role, required=False)


_BIAS = r"(^|/)(bias|b|beta)$"
_NORM = r"(^|/)(\w*norm\w*|ln(_?\w+)?)(/(weight|w))?$"
_EMBEDDING = (
    r"(^|/)(\w*embeddings?|embed|embed_tokens|emb|wte|wpe|tok_emb\w*|token_emb\w*"
    r"|pos_emb\w*|position_emb\w*|positional_emb\w*|pos\w*_table|cls|cls_token)"
    r"(/(weight|w|table))?$"
)
_HEAD = (
    r"(^|/)(lm_head|head|unembed\w*|embed_out|readout|classifier|logits\w*|output_head)"
    r"(/(kernel|weight|w))?$"
)

# Names decide the role first; shapes are read from evidence before names, because
# evidence speaks of the parameter at hand and a name of what is usual. An output head
# is known by its name alone.
DEFAULT_RULES: tuple[Rule, ...] = (
    _default(_HEAD, _table, "head"),
    _default(_EMBEDDING, _table, "embedding"),
    _default(r"(^|/)(scale|gain|gamma)$", _norm, "vector"),
    _default(_NORM, _norm, "vector"),
    _default(_BIAS, _bias, "vector"),
    _default(r"(^|/)(query|key|value)/bias$", _attention_bias, "vector"),
    _default(r"(^|/)kernel$", _kernel, "hidden"),
    _default(r"(^|/)(query|key|value)/kernel$", _attention_in, "hidden"),
    _default(r"(^|/)out/kernel$", _attention_out, "hidden"),
    _default(r"(^|/)\w*[Cc]onv\w*/kernel$", _convolution, "hidden"),
    _default(r"", _unnamed_matrix, "hidden"),
    _default(r"", _vector, "vector"),
)
