"""How a parameter of one layer is a matrix: functions of path, shape and neighbours.

Each takes (path, shape, siblings), as the `axes` of an `optaxplus.Rule` does, and
returns `MatrixAxes`, or None where nothing beside the parameter decides. Shapes are
those of one layer: axes that count layers have been taken off.
"""

import re
from collections.abc import Callable

from optaxplus.numerics.matrix_axes import MatrixAxes
from optaxplus.partition.stacks import (
    Shape,
    Siblings,
    fits_as_heads,
    lora_partner,
    readings_by_bias,
)

__all__ = [
    "CONVOLUTION",
    "FUSED",
    "GATES",
    "AxesFunction",
    "attention_in",
    "attention_out",
    "bias",
    "convolution",
    "einsum_gates",
    "einsum_in",
    "einsum_out",
    "expert",
    "expert_bias",
    "first_axis_in",
    "fused_gates",
    "fused_projections",
    "gate_of_experts",
    "kernel",
    "last_axis",
    "lora_a",
    "lora_b",
    "matrix",
    "one_channel",
    "patches",
    "pointwise",
    "routed",
    "table",
    "torch_weight",
    "vector",
    "whole",
]

AxesFunction = Callable[[str, Shape, Siblings], MatrixAxes | None]

_IN_OUT = MatrixAxes((-2,), (-1,))


# By rank alone


def vector(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """A vector or scalar is one block."""
    return _whole(shape) if len(shape) <= 1 else None


def matrix(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(in, out)."""
    return _IN_OUT if len(shape) == 2 else None


def table(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes:
    """(*copies, in, out); the input of an embedding is one-hot over its entries."""
    return _IN_OUT if len(shape) >= 2 else _whole(shape)


def first_axis_in(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(in, *out), such as (vocabulary, layers, features) or (rank, heads, head_dim)."""
    return MatrixAxes((0,), tuple(range(1, len(shape)))) if len(shape) >= 2 else None


def whole(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes:
    """One vector, whatever the rank."""
    return _whole(shape)


def last_axis(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes:
    """(*copies, features): one vector each."""
    return MatrixAxes((), (-1,)) if shape else _whole(shape)


def _whole(shape: Shape) -> MatrixAxes:
    return MatrixAxes((), tuple(range(len(shape))))


# By the bias beside a weight


def kernel(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """A kernel of rank >= 3 as its bias tells: (*in, *out), or a stack of those."""
    name = path.rpartition("/")[2]
    beside = siblings.get("b" if name == "w" else "bias")
    return _by_bias(shape, beside) if len(shape) >= 3 and beside else None


def _by_bias(weight: Shape, bias: Shape) -> MatrixAxes | None:
    readings = readings_by_bias(weight, bias)
    if len(readings) != 1:
        return None
    stack = readings.pop()
    first_out = len(weight) - (len(bias) - stack)
    if not stack < first_out:
        return None
    return MatrixAxes(
        tuple(range(stack, first_out)), tuple(range(first_out, len(weight)))
    )


def torch_weight(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """A `weight` as biases tell: (in, out), or (out, in, *window) as in Equinox.

    Its own bias, or else those in the neighbourhood, if they agree. None where they fit
    both, as that of a square matrix does.
    """
    if len(shape) < 2:
        return None
    orders = {_order(shape, siblings.get("bias"))}
    if orders == {None}:
        orders = {
            _order(other, siblings.get(f"{name.removesuffix('weight')}bias"))
            for name, other in siblings.items()
            if name.endswith("/weight")
        } - {None}
    if orders == {"out_in"}:
        return MatrixAxes(tuple(range(1, len(shape))), (0,))
    beside = siblings.get("bias")
    return _by_bias(shape, beside) if beside and orders == {"in_out"} else None


def _order(weight: Shape, bias: Shape | None) -> str | None:
    """Which way round a weight is by its bias; None if none, or if both fit."""
    if not bias or len(weight) < 2:
        return None
    is_first = bias[0] == weight[0] and all(size == 1 for size in bias[1:])
    out_in = is_first and len(bias) < len(weight)
    in_out = _by_bias(weight, bias) is not None
    if out_in == in_out:
        return None
    return "out_in" if out_in else "in_out"


def bias(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """One vector a layer: split as its weight is, or of several axes, as heads are."""
    module = path.rpartition("/")[0]
    fused = _fused_beside(module, siblings)
    if fused is not None and shape == (sum(fused.splits),):
        return MatrixAxes((), (0,), fused.splits)
    if fused is not None and not fused.splits:
        return MatrixAxes((), tuple(range(1, len(shape))))
    if sum(size > 1 for size in shape) <= 1:
        return _whole(shape)
    if siblings.get("scale") == shape:
        return last_axis(path, shape, siblings)
    if "kernel" not in siblings:
        return None
    readings = readings_by_bias(siblings["kernel"], shape)
    if len(readings) == 1:
        return MatrixAxes((), tuple(range(readings.pop(), len(shape))))
    return _whole(shape) if fits_as_heads(f"{module}/kernel", siblings) else None


def _fused_beside(module: str, siblings: Siblings) -> MatrixAxes | None:
    """The axes of a weight of this module that is several side by side."""
    for name in ("kernel", "weight", "w", "weight_hh"):
        path = f"{module}/{name}"
        for pattern, function in ((FUSED, fused_projections), (GATES, fused_gates)):
            if name in siblings and re.search(pattern, path):
                fused = function(path, siblings[name], siblings)
                if fused is not None:
                    return fused
    return None


# Attention


def attention_in(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(features, heads, head_dim), where the output projection beside it agrees."""
    is_heads = len(shape) >= 3 and fits_as_heads(path, siblings)
    return MatrixAxes((-3,), (-2, -1)) if is_heads else None


def attention_out(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(heads, head_dim, features), where the projections beside it agree."""
    is_heads = len(shape) >= 3 and fits_as_heads(path, siblings)
    return MatrixAxes((-3, -2), (-1,)) if is_heads else None


def einsum_in(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(*copies, heads, features, head_dim), Gemma's order."""
    return MatrixAxes((-2,), (-3, -1)) if len(shape) >= 3 else None


def einsum_out(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(heads, head_dim, features)."""
    return MatrixAxes((-3, -2), (-1,)) if len(shape) >= 3 else None


def einsum_gates(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(*copies, in, out) or (*copies, out, in), Gemma's gate and up projection.

    The kernel (out, in) of the way down beside it tells.
    """
    down = siblings.get("linear") or siblings.get("../linear/w", ())
    if len(shape) < 3:
        return None
    return MatrixAxes((-1,), (-2,)) if down[-2:] == shape[-2:] else _IN_OUT


# Several matrices stored side by side

# Known to be query | key | value, each as wide as the input.
_THIRDS = r"(^|/)(c_attn|qkv|Wqkv|to_qkv)(/(kernel|weight|w))?$|(^|/)in_proj_weight$"
FUSED = rf"{_THIRDS}|(^|/)\w*(qkv|query_key_value)\w*(/(kernel|weight|w))?$"
GATES = r"(^|/)(dense_[ih]/kernel|weight_[ih]h|w_[ih])$"


def fused_projections(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """Query, key and value.

    (features, 3, ...) has an axis that counts them. (features, 3·features), or
    PyTorch's transpose of it, is three matrices side by side under the names that
    public code uses so; other names and widths tell neither how many heads key and
    value have nor whether heads are interleaved, and are declined.
    """
    if len(shape) == 2 and re.search(_THIRDS, path):
        for fan_in, fan_out in ((0, 1), (1, 0)):
            if shape[fan_out] == 3 * shape[fan_in]:
                return MatrixAxes((fan_in,), (fan_out,), (shape[fan_in],) * 3)
    if len(shape) >= 3 and shape[1] == 3 != shape[2]:
        return MatrixAxes((0,), tuple(range(2, len(shape))))
    return None


def fused_gates(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """The gates of an LSTM (four) or a GRU (three), side by side.

    The kernel of the recurrence, (hidden, gates·hidden) or its transpose, tells how
    many there are.
    """
    name = path.rpartition("/")[2]
    recurrent = {
        "kernel": "../dense_h/kernel",
        "weight_ih": "weight_hh",
        "w_i": "w_h",
    }.get(name, name)
    fan_in, fan_out = (1, 0) if name.startswith("weight") else (0, 1)
    beside = siblings.get(recurrent, ())
    if len(shape) != 2 or len(beside) != 2:
        return None
    hidden, width = beside[fan_in], beside[fan_out]
    if width not in (3 * hidden, 4 * hidden) or shape[fan_out] != width:
        return None
    return MatrixAxes((fan_in,), (fan_out,), (hidden,) * (width // hidden))


# Convolutions

CONVOLUTION = (
    r"(^|/)(?!Vmap)(\w*[Cc]onv(?!Local)|stem|downsample|shortcut|depthwise)\w*"
    r"/(kernel|w)$"
)


def convolution(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(*window, in, out): every window position and input channel is summed over.

    From rank 4 on the first axis may count layers instead. It does not where the window
    is square, or where something beside it begins with another axis.
    """
    if not 3 <= len(shape) <= 5:
        return None
    is_square = len({*shape[:-2]}) == 1
    is_apart = any(
        name.startswith("../") and other[:1] != shape[:1]
        for name, other in siblings.items()
    )
    if len(shape) == 3 or is_square or is_apart:
        return MatrixAxes(tuple(range(len(shape) - 1)), (-1,))
    return None


def pointwise(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(1, ..., 1, in, out), a matrix whatever the ones count."""
    return _IN_OUT if len(shape) >= 3 and {*shape[:-2]} == {1} else None


def one_channel(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(*window, 1, out): a depthwise convolution, or one that reads a grey image."""
    if len(shape) < 3 or shape[-2] != 1:
        return None
    by_bias = kernel(path, shape, siblings)
    if by_bias or not re.search(CONVOLUTION, path):
        return by_bias
    return convolution(path, shape, siblings)


def patches(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """A dense or convolutional layer that reads patches of an image."""
    if len(shape) == 2:
        return _IN_OUT
    by_bias = kernel(path, shape, siblings)
    return by_bias if by_bias else convolution(path, shape, siblings)


# Experts and their routers


def expert(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(*copies, in, out)."""
    return _IN_OUT if len(shape) >= 3 else None


def expert_bias(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(*copies, out)."""
    return MatrixAxes((), (-1,)) if len(shape) == 2 else None


def routed(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(experts, in, out), where a router to as many stands in the same block."""
    module = path.rpartition("/")[0].rpartition("/")[2]
    is_routed = len(shape) == 3 and any(
        re.fullmatch(rf"(\.\./{re.escape(module)}/)?(w_)?router(/\w+)?", name)
        and other[1:] == shape[:1]
        for name, other in siblings.items()
    )
    return _IN_OUT if is_routed else None


def gate_of_experts(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(in, experts), where kernels (experts, in, out) stand beside it."""
    is_router = len(shape) == 2 and any(
        len(other) == 3 and other[:2] == shape[::-1] for other in siblings.values()
    )
    return _IN_OUT if is_router else None


# Low-rank factors


def lora_a(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(*in, rank) beside B (rank, *out), or both with copies in front."""
    stack = _lora_copies(shape, lora_partner(path, siblings))
    if stack is None:
        return None
    return MatrixAxes(tuple(range(stack, len(shape) - 1)), (-1,))


def lora_b(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(rank, *out) beside A (*in, rank), or both with copies in front."""
    stack = _lora_copies(lora_partner(path, siblings), shape)
    if stack is None and len(shape) != 2:
        return None
    first_out = (stack or 0) + 1
    return MatrixAxes((first_out - 1,), tuple(range(first_out, len(shape))))


def _lora_copies(a: Shape, b: Shape) -> int | None:
    """How many leading axes of both factors count copies: 0, 1 or undecided."""
    if len(a) == 2 and len(b) in (0, 2):
        return 0
    readings = set()
    if a[-1:] == b[:1] != ():
        readings.add(0)
    if len(a) >= 3 and len(b) >= 3 and a[0] == b[0] and a[-1] == b[1]:
        readings.add(1)
    return readings.pop() if len(readings) == 1 else None
