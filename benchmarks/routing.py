"""Which parameters does Muon get, from optax and from here, in the same five models?

Muon is for hidden weight matrices, one for each layer and expert; embeddings, output
heads, routers, norms and biases belong to AdamW. `optax.contrib.muon` and `ox.muon`
split five Flax models, both with their defaults, and what they do is compared with what
every parameter is.

    python benchmarks/routing.py          # written to --out
    python benchmarks/routing.py --small  # small models, only printed

Everything is abstract, so the models have the sizes of their names.

What makes the comparison fair:

- The models are Flax's own modules under the names that their sources use.
- What a parameter is (`MODELS`) was written down by hand for these models, from what
  the forward pass does with it and without a look at the rules of any optimizer.
- Which optimizer takes a parameter is read from the state that the real optimizer has
  for it: a second moment is Adam's, a momentum without one Muon's. Which matrices Muon
  makes of it are for optax those of `MuonDimensionNumbers()`, its default, and for us
  those of `ox.infer_matrix_axes`; a test has both update small models, and finds the
  polar factors of these matrices.
- optax can be told the axes of every parameter, `muon_weight_dimension_numbers`, and
  then does with it what it is told. That is work for the user, and not compared.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import optax
from flax import linen, nnx

import optaxplus as ox
from optaxplus.report.tables import format_table

# The folder that has `examples`, and a script's own, also where tests load it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from routing_models import Llama, LlamaConfig, ResNet, ViT

from examples.gpt import GPT, GPTConfig

RESULTS = Path(__file__).parent / "results" / "routing.json"
OPTAX, OURS = "optax.contrib.muon", "optaxplus.muon"
EMBEDDINGS, HEAD, NORMS = "embeddings", "output head", "norms and biases"
ATTENTION, MLP, EXPERTS = "attention", "MLP", "experts"
CONVOLUTIONS, ROUTER = "convolutions", "router"
KINDS = (EMBEDDINGS, HEAD, ATTENTION, MLP, CONVOLUTIONS, EXPERTS, ROUTER, NORMS)

Axes = tuple[int, ...]


@dataclass(frozen=True)
class Truth:
    """What the parameters are whose path matches, and the matrices to be made of them.

    Attributes:
        kind: What they are.
        pattern: Regular expression; every parameter of a model matches exactly one.
        fan_in: Axes that the forward product sums over, counted from the end; empty
            for what is no hidden weight matrix.
        fan_out: Axes of its outputs. Those that are left count layers and experts,
            every one of which is a matrix of its own.
    """

    kind: str
    pattern: str
    fan_in: Axes = ()
    fan_out: Axes = ()


@dataclass(frozen=True)
class Model:
    """A model at two sizes.

    Attributes:
        name: What the table calls it.
        form: In which of Flax's two, and whether its blocks are stacked.
        build: Its abstract parameters for given sizes.
        sizes: Those of its name.
        small: Those for tests.
        truth: What its parameters are.
    """

    name: str
    form: str
    build: Callable[..., Any]
    sizes: dict[str, Any]
    small: dict[str, Any]
    truth: tuple[Truth, ...]


@dataclass(frozen=True)
class Route:
    """Where a parameter goes: "Adam", or "Muon" and the axes of its matrices there."""

    optimizer: str
    fan_in: Axes = ()
    fan_out: Axes = ()


def linen_params(model: linen.Module) -> Any:
    """The abstract parameters of a linen model over tokens."""
    tokens = jax.ShapeDtypeStruct((1, 8), "int32")
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


def nnx_params(model: Callable[..., nnx.Module], **sizes: Any) -> Any:
    """The abstract parameters of an NNX model, as `nnx.Optimizer` passes them."""
    abstract = nnx.eval_shape(lambda: model(**sizes, rngs=nnx.Rngs(0)))
    return nnx.state(abstract, nnx.Param)


def llama(**sizes: Any) -> Any:
    """The abstract parameters of a LLaMA or a Mixtral."""
    return linen_params(Llama(LlamaConfig(**sizes)))


SMALL_LLAMA = dict(
    width=12, depth=3, heads=4, kv_heads=2, head_size=5, mlp=20, vocabulary=31
)
LLAMA = dict(width=4096, depth=32, heads=32, kv_heads=8, head_size=128, mlp=14336)
DECODER = (
    Truth(EMBEDDINGS, r"^embed_tokens/embedding$"),
    Truth(HEAD, r"^lm_head/kernel$"),
    Truth(ATTENTION, r"/[qkv]_proj/kernel$", (-3,), (-2, -1)),
    Truth(ATTENTION, r"/o_proj/kernel$", (-3, -2), (-1,)),
    Truth(NORMS, r"norm/scale$"),
)

MODELS = (
    Model(
        "GPT-2 small",
        "linen",
        lambda **sizes: linen_params(GPT(GPTConfig(**sizes))),
        dict(width=768, depth=12, head_size=64, context=1024, vocabulary=50257),
        dict(width=12, depth=2, head_size=4, context=9, vocabulary=31),
        (
            Truth(EMBEDDINGS, r"^(token|position)_embedding/embedding$"),
            Truth(HEAD, r"^lm_head/kernel$"),
            Truth(ATTENTION, r"/(query|key|value)/kernel$", (-3,), (-2, -1)),
            Truth(ATTENTION, r"/out/kernel$", (-3, -2), (-1,)),
            Truth(MLP, r"/mlp/(up|down)/kernel$", (-2,), (-1,)),
            Truth(NORMS, r"norm/(scale|bias)$"),
        ),
    ),
    Model(
        "LLaMA 3 8B",
        "linen, a scan over blocks",
        llama,
        LLAMA | {"vocabulary": 128256},
        SMALL_LLAMA,
        (*DECODER, Truth(MLP, r"/(gate|up|down)_proj/kernel$", (-2,), (-1,))),
    ),
    Model(
        "Mixtral 8x7B",
        "linen, a scan over blocks",
        llama,
        LLAMA | {"vocabulary": 32000, "experts": 8},
        SMALL_LLAMA | {"experts": 7},
        (
            *DECODER,
            Truth(EXPERTS, r"/MoeBlock_0/(wi_0|wi_1|wo)$", (-2,), (-1,)),
            Truth(ROUTER, r"/MoeBlock_0/gate/kernel$"),
        ),
    ),
    Model(
        "ViT-B/16",
        "NNX",
        lambda **sizes: nnx_params(ViT, **sizes),
        dict(
            width=768, depth=12, heads=12, mlp=3072, image=224, patch=16, classes=1000
        ),
        dict(width=12, depth=2, heads=3, mlp=20, image=8, patch=4, classes=17),
        (
            Truth(EMBEDDINGS, r"^(position_embeddings|cls_token)$"),
            Truth(EMBEDDINGS, r"^patch_embeddings/kernel$"),
            Truth(HEAD, r"^classifier/kernel$"),
            Truth(ATTENTION, r"/attn/(query|key|value)/kernel$", (-3,), (-2, -1)),
            Truth(ATTENTION, r"/attn/out/kernel$", (-3, -2), (-1,)),
            Truth(MLP, r"/mlp/layers/\d/kernel$", (-2,), (-1,)),
            Truth(NORMS, r"/bias$|norm\d?/scale$"),
        ),
    ),
    Model(
        "ResNet-50",
        "NNX",
        lambda **sizes: nnx_params(ResNet, **sizes),
        dict(width=64, blocks=(3, 4, 6, 3), classes=1000),
        dict(width=4, blocks=(1, 2), classes=17),
        (
            Truth(CONVOLUTIONS, r"/conv\d?/kernel$", (-4, -3, -2), (-1,)),
            Truth(HEAD, r"^fc/kernel$"),
            Truth(NORMS, r"bn\d?/(scale|bias)$|^fc/bias$"),
        ),
    ),
)


def optimizers() -> dict[str, optax.GradientTransformation]:
    """What is compared."""
    return {OPTAX: optax.contrib.muon(1e-3), OURS: ox.muon(1e-3)}


def takers(tx: optax.GradientTransformation, params: Any) -> list[str]:
    """Who takes every parameter, "Muon" or "Adam", as the optimizer's state tells."""
    state = jax.eval_shape(tx.init, params)
    momentum, second = (_held(state, field) for field in ("mu", "nu"))
    if not all(momentum):
        raise ValueError("a parameter has no moment")
    return ["Adam" if has_second else "Muon" for has_second in second]


def _held(state: Any, field: str) -> list[bool]:
    """Whether any of the moments of this name has an entry for each parameter."""
    moments = [
        [
            not isinstance(leaf, optax.MaskedNode)
            for leaf in jax.tree.leaves(
                moment, is_leaf=lambda node: isinstance(node, optax.MaskedNode)
            )
        ]
        for _, moment in optax.tree.get_all_with_path(state, field)
    ]
    return [any(column) for column in zip(*moments, strict=True)]


def routes(params: Any) -> dict[str, list[Route]]:
    """Where each library sends every parameter."""
    everything = optimizers()
    default = optax.contrib.MuonDimensionNumbers()
    matrix = Route("Muon", _axes(default.reduction_axis), _axes(default.output_axis))
    theirs = [
        matrix if taker == "Muon" else Route(taker)
        for taker in takers(everything[OPTAX], params)
    ]
    ours = []
    rows = ox.explain_routing(params).rows
    for row, taker in zip(rows, takers(everything[OURS], params), strict=True):
        if (taker == "Muon") != (row.label == "muon") or row.axes.splits:
            raise ValueError(f"{row.path}: {taker} has it, and not as {row}")
        matrix = Route(taker, row.axes.fan_in, row.axes.fan_out)
        ours.append(matrix if taker == "Muon" else Route(taker))
    return {OPTAX: theirs, OURS: ours}


def _axes(axes: Sequence[int] | int) -> Axes:
    return (axes,) if isinstance(axes, int) else tuple(axes)


def verdict(truth: Truth, route: Route, shape: Sequence[int]) -> str:
    """What is to be said of it: "right", or what happens instead.

    "to Adam" and "wrong matrix" are said of hidden weight matrices, "to Muon" of what
    is none. The order in which axes are flattened changes nothing.
    """
    if not truth.fan_in:
        return "right" if route.optimizer == "Adam" else "to Muon"
    if route.optimizer == "Adam":
        return "to Adam"
    wanted, got = (
        [{axis % len(shape) for axis in axes} for axes in (of.fan_in, of.fan_out)]
        for of in (truth, route)
    )
    return "right" if wanted == got else "wrong matrix"


def truth_of(model: Model, path: str) -> Truth:
    """The one entry that speaks of a parameter."""
    found = [truth for truth in model.truth if re.search(truth.pattern, path)]
    if len(found) != 1:
        raise ValueError(f"{model.name}: {path} matches {len(found)} entries")
    return found[0]


def follow(model: Model, sizes: dict[str, Any]) -> dict[str, Any]:
    """What is reported of a model.

    Parameters that differ only in the numbers in their paths, and with which all
    happens alike, share an entry.
    """
    params = model.build(**sizes)
    followed = routes(params)
    rows: dict[str, dict[str, Any]] = {}
    for index, parameter in enumerate(ox.explain_routing(params).rows):
        truth = truth_of(model, parameter.path)
        row: dict[str, Any] = {
            "path": re.sub(r"\d+", "#", parameter.path),
            "shape": list(parameter.shape),
            "kind": truth.kind,
            "hidden": bool(truth.fan_in),
        }
        for library, all_routes in followed.items():
            route = all_routes[index]
            row[library] = {
                "optimizer": route.optimizer,
                "matrices": matrices(route, parameter.shape),
                "verdict": verdict(truth, route, parameter.shape),
            }
        row = rows.setdefault(json.dumps(row), row | {"count": 0})
        row["count"] += 1
    entries = list(rows.values())
    return {
        "name": model.name,
        "form": model.form,
        "sizes": sizes,
        "num_params": sum(map(size, entries)),
        "totals": {library: totals(entries, library) for library in followed},
        "parameters": entries,
    }


def matrices(route: Route, shape: Sequence[int]) -> list[int] | None:
    """[how many, rows, columns] of what Muon makes of one parameter."""
    if route.optimizer == "Adam":
        return None
    rows, columns = (
        math.prod(shape[axis] for axis in axes)
        for axes in (route.fan_in, route.fan_out)
    )
    return [math.prod(shape) // (rows * columns), rows, columns]


def size(row: dict[str, Any]) -> int:
    """Number of scalars in all parameters of an entry."""
    return row["count"] * math.prod(row["shape"])


def totals(rows: Iterable[dict[str, Any]], library: str) -> dict[str, int]:
    """Numbers of scalars, by what they are and what happens to them."""
    words = "hidden", "right matrix", "wrong matrix", "to Adam", "others", "to Muon"
    counts: dict[str, int] = dict.fromkeys(words, 0)
    for row in rows:
        word = row[library]["verdict"]
        counts["hidden" if row["hidden"] else "others"] += size(row)
        if word != "right":
            counts[word] += size(row)
        elif row["hidden"]:
            counts["right matrix"] += size(row)
    return counts


def run(small: bool = False) -> dict[str, Any]:
    """The whole benchmark, as it is written to the results."""
    names = ("jax", "flax", "optax")
    return {
        "versions": {
            "python": platform.python_version(),
            "optaxplus": ox.__version__,
            **{name: metadata.version(name) for name in names},
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "models": [
            follow(model, model.small if small else model.sizes) for model in MODELS
        ],
    }


# Tables


def summary(results: dict[str, Any]) -> list[list[str]]:
    """A header and a row for every model: what Muon gets of what it should get."""
    to_muon = ("to Muon by optax", "by optaxplus")
    lines = [["model", "hidden weight matrices", *to_muon, "everything else", *to_muon]]
    for model in results["models"]:
        theirs, ours = (model["totals"][library] for library in (OPTAX, OURS))
        lines.append(
            [
                f"{model['name']} ({model['form']})",
                amount(theirs["hidden"]),
                *(share(it["right matrix"], it["hidden"]) for it in (theirs, ours)),
                amount(theirs["others"]),
                *(share(it["to Muon"], it["others"]) for it in (theirs, ours)),
            ]
        )
    return lines


def details(results: dict[str, Any]) -> list[list[str]]:
    """A header and a row for every model and kind; what should not be is bold."""
    lines = [["model", "kind", "parameters", OPTAX, OURS]]
    for model in results["models"]:
        kinds: dict[str, list[dict[str, Any]]] = {}
        for row in model["parameters"]:
            kinds.setdefault(row["kind"], []).append(row)
        for kind in sorted(kinds, key=KINDS.index):
            rows = kinds[kind]
            lines.append(
                [
                    model["name"],
                    kind,
                    amount(sum(map(size, rows))),
                    destination(rows, OPTAX, "Adam"),
                    destination(rows, OURS, "AdamW"),
                ]
            )
    return lines


def destination(rows: Iterable[dict[str, Any]], library: str, adam: str) -> str:
    """Where the parameters of one kind go, the larger part first."""
    parts: dict[tuple[bool, bool], list[dict[str, Any]]] = {}
    for row in rows:
        part = row[library]["optimizer"] == "Muon", row[library]["verdict"] == "right"
        parts.setdefault(part, []).append(row)
    texts = []
    for (to_muon, is_right), those in sorted(
        parts.items(), key=lambda part: -sum(map(size, part[1]))
    ):
        text = f"Muon, {views(those, library)}" if to_muon else adam
        texts.append(text if is_right else f"**{text}**")
    return "; ".join(texts)


def views(rows: Iterable[dict[str, Any]], library: str) -> str:
    """Matrices as "24 x (768 -> 3072)", those first that hold most."""
    made: dict[tuple[int, ...], int] = {}
    for row in rows:
        copies, *matrix = row[library]["matrices"]
        made[tuple(matrix)] = made.get(tuple(matrix), 0) + copies * row["count"]
    ordered = sorted(made, key=lambda matrix: -made[matrix] * math.prod(matrix))
    texts = [
        f"{made[rows, columns]} x ({rows} -> {columns})"
        for rows, columns in ordered[:2]
    ]
    return ", ".join(texts + ["…"] * (len(ordered) > 2))


def amount(count: int) -> str:
    """A number of parameters as "124M"."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g}{unit}"
    return str(count)


def share(part: int, whole: int) -> str:
    """A part in percent; nothing and everything are never rounded to."""
    if part in (0, whole):
        return "100 %" if part else "none"
    return f"{min(max(100 * part / whole, 0.1), 99.9):.3g} %"


def misses(results: dict[str, Any], library: str) -> list[str]:
    """What a library sends where it does not belong, with the numbers left out."""
    return [
        f"`{row['path']}` of {model['name']} ({row['kind']})"
        for model in results["models"]
        for row in model["parameters"]
        if row[library]["verdict"] != "right"
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="models of a few numbers")
    parser.add_argument(
        "--out",
        type=Path,
        help="where to write the results; a run at full size is written to "
        f"results/{RESULTS.name}, a small one only printed",
    )
    options = parser.parse_args()
    results = run(options.small)
    out = options.out or (None if options.small else RESULTS)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    for header, *lines in (summary(results), details(results)):
        print(format_table(header, lines), end="\n\n")
    print("Bold: not where it belongs, or as a wrong matrix.")


if __name__ == "__main__":
    main()
