"""How a parameter of one layer is a matrix: functions of path, shape and neighbours.

Each takes (path, shape, siblings), as the `axes` of an `optaxplus.Rule` does, and
returns `MatrixAxes`, or None where nothing beside the parameter decides. Shapes are
those of one layer: axes that count layers have been taken off.
"""

import re
from collections.abc import Callable

from optaxplus.numerics.matrix_axes import MatrixAxes
from optaxplus.partition import names
from optaxplus.partition.stacks import (
    Shape,
    Siblings,
    fits_as_heads,
    lora_partner,
    readings_by_bias,
    weight_order,
)

__all__ = [
    "AxesFunction",
    "Undecided",
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
    "head",
    "kernel",
    "last_axis",
    "lora_a",
    "lora_b",
    "matrix",
    "norm",
    "one_channel",
    "patches",
    "pointwise",
    "routed",
    "router",
    "table",
    "thin",
    "torch_one_channel",
    "torch_weight",
    "vector",
    "whole",
]

AxesFunction = Callable[[str, Shape, Siblings], MatrixAxes | None]

_IN_OUT = MatrixAxes((-2,), (-1,))


class Undecided(Exception):
    """The name says what a parameter is, but nothing how it is shaped.

    No later rule may take it for something else.
    """


# By rank alone


def vector(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """A vector or scalar is one block."""
    return _whole(shape) if len(shape) <= 1 else None


def matrix(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(in, out)."""
    return _IN_OUT if len(shape) == 2 else None


def table(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(*copies, in, out); the input of an embedding is one-hot over its entries.

    What has a bias is a layer under the name of a table.
    """
    is_array_of_module = re.search(names.WEIGHT_OR_W, path)
    if is_array_of_module and ("bias" in siblings or "b" in siblings):
        return None
    return _IN_OUT if len(shape) >= 2 else _whole(shape)


def head(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(*copies, in, out), or as the bias tells."""
    by_bias = None
    if re.search(names.KERNEL, path):
        by_bias = kernel(path, shape, siblings)
    elif re.search(names.WEIGHT, path):
        by_bias = torch_weight(path, shape, siblings)
    if by_bias is None and len(shape) >= 3 and "bias" in siblings:
        raise Undecided
    return by_bias or (_IN_OUT if len(shape) >= 2 else _whole(shape))


def first_axis_in(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(in, *out), such as (vocabulary, layers, features) or (rank, heads, head_dim)."""
    return MatrixAxes((0,), tuple(range(1, len(shape)))) if len(shape) >= 2 else None


def thin(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(1, 1, ..., n): a vector that broadcasts."""
    return _whole(shape) if len(shape) >= 3 and {*shape[:-1]} == {1} else None


def whole(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes:
    """One vector, whatever the rank."""
    return _whole(shape)


def last_axis(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes:
    """(*copies, features): one vector each."""
    return MatrixAxes((), (-1,)) if shape else _whole(shape)


def norm(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """The scale of a norm, whose bias, if any, has its shape.

    A `weight` of two axes without such a bias may be that of a layer called norm.
    """
    is_bare = not re.search(names.WEIGHT_OR_W, path)
    beside = siblings.get("bias", siblings.get("b", shape if is_bare else None))
    if len(shape) <= 1 or beside == shape:
        return last_axis(path, shape, siblings)
    if beside is None:
        raise Undecided
    return None


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
    beside = siblings.get("bias")
    own = weight_order(shape, beside)
    orders = {own} if own else siblings.around.weight_orders
    if orders == {"out_in"}:
        return MatrixAxes(tuple(range(1, len(shape))), (0,))
    return _by_bias(shape, beside) if beside and own else None


def torch_one_channel(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(out, 1, *window), as `one_channel` in the order of Equinox."""
    is_single = len(shape) >= 3 and shape[1] == 1
    return torch_weight(path, shape, siblings) if is_single else None


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
    name = "w" if path.endswith("b") else "kernel"
    if name not in siblings:
        return None
    readings = readings_by_bias(siblings[name], shape)
    if len(readings) == 1:
        return MatrixAxes((), tuple(range(readings.pop(), len(shape))))
    return _whole(shape) if fits_as_heads(f"{module}/{name}", siblings) else None


def _fused_beside(module: str, siblings: Siblings) -> MatrixAxes | None:
    """The axes of a weight of this module that is several side by side."""
    for name in ("kernel", "weight", "w", "weight_hh"):
        path = f"{module}/{name}"
        for pattern, function in (
            (names.FUSED, fused_projections),
            (names.GATES, fused_gates),
        ):
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


def fused_projections(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """Query, key and value.

    (features, 3, ...) has an axis that counts them. (features, 3·features), or
    PyTorch's transpose of it, is three matrices side by side under the names that
    public code uses so; other names and widths tell neither how many heads key and
    value have nor whether heads are interleaved, and are declined.
    """
    if len(shape) == 2 and re.search(names.FUSED_THIRDS, path):
        for fan_in, fan_out in ((0, 1), (1, 0)):
            if shape[fan_out] == 3 * shape[fan_in]:
                return MatrixAxes((fan_in,), (fan_out,), (shape[fan_in],) * 3)
    beside = siblings.get("bias", siblings.get("b", shape[1:]))
    is_counted = len(shape) in (3, 4) and shape[1:2] == (3,) != shape[2:3]
    if len(shape) < 3 or len(beside) == 1 or re.search(names.CONVOLUTION, path):
        return None
    if is_counted and beside == shape[1:]:
        return MatrixAxes((0,), tuple(range(2, len(shape))))
    raise Undecided


def fused_gates(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """The gates of an LSTM (four) or a GRU (three), side by side.

    The kernel of the recurrence, (hidden, gates·hidden) or its transpose, tells how
    many there are, if the kernel of the input is as wide.
    """
    name = path.rpartition("/")[2]
    halves = {
        "kernel": ("../dense_i/kernel", "../dense_h/kernel"),
        "weight_ih": ("weight_ih", "weight_hh"),
        "weight_hh": ("weight_ih", "weight_hh"),
        "w_i": ("w_i", "w_h"),
        "w_h": ("w_i", "w_h"),
    }[name]
    first, recurrent = (siblings.get(half, ()) for half in halves)
    fan_in, fan_out = (1, 0) if name.startswith("weight") else (0, 1)
    if not len(shape) == len(first) == len(recurrent) == 2:
        return None
    hidden, width = recurrent[fan_in], recurrent[fan_out]
    if width not in (3 * hidden, 4 * hidden) or first[fan_out] != width:
        return None
    return MatrixAxes((fan_in,), (fan_out,), (hidden,) * (width // hidden))


# Convolutions


def convolution(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(*window, in, out): every window position and input channel is summed over.

    From rank 4 on one of the first two axes may count layers instead. It does not where
    something in the same block has neither, or where a window of two is square.
    """
    beside = siblings.get("b" if path.endswith("/w") else "bias", shape[-1:])
    if not 3 <= len(shape) <= 5 or beside not in (shape[-1:], shape[-2:-1]):
        return None
    is_square = len(shape) == 4 and shape[0] == shape[1]
    if not (len(shape) == 3 or is_square or siblings.is_single(path)):
        return None
    # Haiku, and Flax with transpose_kernel=True, keep (*window, out, in).
    is_transposed = re.search(r"[Tt]ranspose|deconv|(^|/)up", path)
    if is_transposed and (beside != shape[-1:] or path.endswith("transpose/w")):
        return MatrixAxes((*range(len(shape) - 2), len(shape) - 1), (-2,))
    return MatrixAxes(tuple(range(len(shape) - 1)), (-1,))


def pointwise(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(1, ..., 1, in, out), a matrix whatever the ones count."""
    is_single = len(shape) >= 3 and {*shape[:-2]} == {1}
    return _IN_OUT if is_single and "bias" not in siblings else None


def one_channel(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(*window, 1, out): a depthwise convolution, or one that reads a grey image."""
    if len(shape) < 3 or shape[-2] != 1:
        return None
    if re.search(names.CONVOLUTION, path):
        return kernel(path, shape, siblings) or convolution(path, shape, siblings)
    is_window = siblings.get("bias") == shape[-1:]
    return kernel(path, shape, siblings) if is_window else None


def patches(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """A dense or convolutional layer that reads patches of an image."""
    if len(shape) == 2:
        return _IN_OUT
    if path.endswith("weight"):
        return torch_weight(path, shape, siblings)
    return kernel(path, shape, siblings) or convolution(path, shape, siblings)


# Experts and their routers


def expert(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(*copies, in, out)."""
    return _IN_OUT if len(shape) >= 3 else None


def expert_bias(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(*copies, out)."""
    return MatrixAxes((), (-1,)) if len(shape) == 2 else None


def router(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(in, experts)."""
    if len(shape) >= 3:
        raise Undecided
    return matrix(path, shape, siblings)


def routed(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(experts, in, out), where a router to as many stands in the same block."""
    if len(shape) != 3:
        return None
    module = path.rpartition("/")[0].rpartition("/")[2]
    places = ("router", "router/kernel", "router/w", "w_router", "router/weight")
    routers = (
        siblings.get(f"../{module}/{place}", siblings.get(place, ()))
        for place in places
    )
    return _IN_OUT if any(other[1:] == shape[:1] for other in routers) else None


def gate_of_experts(path: str, shape: Shape, siblings: Siblings) -> MatrixAxes | None:
    """(in, experts), where kernels (experts, in, out) stand beside it, or as many."""
    if len(shape) != 2:
        return None
    around = siblings.around
    is_stack = shape[::-1] in around.first_two_axes
    return _IN_OUT if is_stack or around.experts_apart == shape[1] else None


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
