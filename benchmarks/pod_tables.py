"""README.md's tables of what `pod_cost.py` found."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from pod_cost import IMPLEMENTATIONS, LAYERS, LAYOUTS, MODELS, MUONS, WITH_FACTORS


def muon_table(document: dict[str, Any]) -> str:
    """Ratios to the bounds of Muon, of stacked and separate parameters."""
    names = ("topology", "layout", "implementation", "model")
    found = {
        tuple(row["case"][name] for name in names): row
        for row in document["rows"].values()
        if row["case"]["layers"] == LAYERS
    }
    lines = [
        "| chip | layout | update | sent, of the bound | multiplied, of the bound | "
        "temporary GB | seconds to compile |",
        "|---|---|---|---|---|---|---|",
    ]
    shown_chips = {"v5e": "TPU v5e", "h100": "H100"}
    for chip, layout, name in itertools.product(shown_chips, LAYOUTS, MUONS):
        both = [
            found.get((chip, layout, name, model), {}).get("found") for model in MODELS
        ]
        if not any(both):
            continue
        columns = _columns(
            both,
            ("times_bytes_bound", 1.0, 2),
            ("times_flops_bound", 1.0, 2),
            ("temporary_bytes", 1e9, 2),
            ("compile_seconds", 1.0, 0),
        )
        shown = IMPLEMENTATIONS[name].replace("muon", "muon`", 1)
        entries = [shown_chips[chip], layout, f"`{shown}", *columns]
        lines.append(f"| {' | '.join(entries)} |")
    versions = {k: v for row in found.values() for k, v in row["versions"].items()}
    return "\n".join(
        [
            *lines,
            "",
            "The update of the matrices of 16 layers of a llama (973M parameters in "
            "float32), stacked over layers and as separate leaves, gradients and state "
            "donated, by the compilers for TPUs and GPUs, without either. Sent: ring "
            "bytes of a chip over those of moving bfloat16 matrices to whole chips and "
            "back (replicated: of gathering the results). Multiplied: by the slowest "
            "chip, over five standard Newton-Schulz steps divided among all. "
            f"jax {versions['jax']}, libtpu {versions['libtpu']}, "
            f"jax-cuda13-plugin {versions['jax-cuda13-plugin']}, "
            f"optax {versions['optax']}; "
            "`python benchmarks/pod_cost.py` compiles them, also for TPU v5p.",
        ]
    )


def factors_table(document: dict[str, Any]) -> str:
    """Costs of methods with factors, in both kinds of step."""
    found = {
        (row["case"]["layout"], row["case"]["implementation"]): row
        for row in document["rows"].values()
        if (row["case"]["topology"], row["case"]["model"], row["case"]["layers"])
        == ("v5e", "stacked", LAYERS)
    }
    lines = [
        "| layout | update | sent, MB | TFLOP of a chip | temporary GB | "
        "seconds to compile |",
        "|---|---|---|---|---|---|",
    ]
    for layout, name in itertools.product(LAYOUTS, ["explicit", *WITH_FACTORS]):
        kinds = [name, f"{name}, refresh"] if name in WITH_FACTORS else [name]
        rows = [found.get((layout, kind), {}).get("found") for kind in kinds]
        if not any(rows) or (layout, "soap") not in found:
            continue
        columns = _columns(
            rows,
            ("wire_bytes", 1e6, 0),
            ("flops", 1e12, 2),
            ("temporary_bytes", 1e9, 2),
            ("compile_seconds", 1.0, 0),
        )
        shown = IMPLEMENTATIONS[name].partition(",")[0]
        lines.append(f"| {' | '.join([layout, f'`{shown}`', *columns])} |")
    versions = {k: v for row in found.values() for k, v in row["versions"].items()}
    return "\n".join(
        [
            *lines,
            "",
            "An update of the hidden matrices of a llama of a billion parameters, "
            "stacked over 16 layers, as in the table of Muon's below: in a step "
            "between refreshes, in one with a refresh. Sides of 8192 are cut into "
            "tiles of 2048; products are float32 (Muon's bfloat16, a sixth of the "
            "passes of the matrix unit); `shampoo` by Newton's method. "
            f"jax {versions['jax']}, libtpu {versions['libtpu']}; `python "
            "benchmarks/pod_cost.py` compiles them for a TPU v5e.",
        ]
    )


def _columns(
    rows: Sequence[dict[str, Any] | None], *numbers: tuple[str, float, int]
) -> list[str]:
    """A cell for each number (its name, unit and digits), with those of all rows."""
    return [", ".join(_number(row, *number) for row in rows) for number in numbers]


def _number(row: dict[str, Any] | None, key: str, scale: float, digits: int) -> str:
    if row is None:
        return "-"
    if "error" in row:
        return "memory" if "RESOURCE_EXHAUSTED" in row["error"] else "fails"
    return f"{row[key] / scale:.{digits}f}"
