"""The tables of benchmarks/README.md, from the committed results."""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# A script's own folder, also where the tests load it by its path.
sys.path.insert(0, str(Path(__file__).resolve().parent))
import convergence_report
import curvature_cost
import guide
import memory_table
import pod_tables
import storage_time
import train_gpt_seeds
import train_gpt_storage
from routing import OURS, details, misses

RESULTS = Path(__file__).parent / "results"


def read(name: str) -> dict[str, Any]:
    """A file of results."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table whose first row is its header."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def convergence() -> str:
    """Every optimizer on every task."""
    return convergence_report.markdown(convergence_report.load())


def claims() -> str:
    """What papers claim, and what was found here."""
    return guide.claims(convergence_report.load(), read("train_gpt_seeds")["trials"])


def seeds() -> str:
    """All that were tuned beside AdamW with other seeds, from the committed results."""
    found = read("train_gpt_seeds")["trials"]
    runs = [run for run in found if run["steps"] == train_gpt_seeds.STEPS]
    count = len({run["seed"] for run in runs})
    return "\n".join(
        [
            *markdown_table(train_gpt_seeds.table(runs)),
            "",
            f"The main job with {count} other seeds, each optimizer at the best of "
            "four learning rates or more: median (smallest to largest) of the last "
            f"validation loss, and of the step, of {train_gpt_seeds.STEPS}, at which a "
            "run is first as good as AdamW ever was with its seed. "
            "`python benchmarks/train_gpt_seeds.py` trains them.",
        ]
    )


def half_of_the_steps() -> str:
    """Schedules of half the length beside AdamW's, from the committed results."""
    runs = read("train_gpt_seeds")["trials"]
    full = convergence_report.load()
    short = convergence_report.load(RESULTS / "convergence_300")
    return "\n".join(
        [
            *markdown_table(train_gpt_seeds.short_runs(runs)),
            "",
            "The main job again, with warm-up and decay within these steps and "
            "learning rates that are the best of four for them, beside the lowest loss "
            "of AdamW over all its steps: median (smallest to largest) over the seeds. "
            "`python benchmarks/train_gpt_learning_rates.py --steps 600 --optimizers "
            "muon normuon adamuon soap` tunes them and `python "
            "benchmarks/train_gpt_seeds.py --steps 600 --optimizers muon normuon "
            "adamuon soap` trains them.",
            "",
            *markdown_table(convergence_report.short_runs(full, short)),
            "",
            "The same of the GPT of width 64, with seven trials for each; `python "
            "benchmarks/convergence.py --tasks small_gpt --steps 300 --optimizers muon "
            "normuon adamuon soap`.",
        ]
    )


def storage() -> str:
    """Fewer bits beside float32: losses, bytes and time, from the committed results."""
    trained = read("train_gpt_storage")
    runs = trained["trials"]
    timed = read("storage_time")
    return "\n".join(
        [
            *markdown_table(train_gpt_storage.table(runs)),
            "",
            f"The main job, {runs[0]['steps']} steps, seeds {_seeds(runs)}: last "
            "validation loss, median (smallest to largest) over the seeds, and its "
            "change from the float32 run with the same seed; parameters of every run "
            "are computed with in float32. The spread of float32 is that of seeds. "
            "Lion has the hidden matrices, AdamW the rest. `python "
            "benchmarks/train_gpt_storage.py` trains them.",
            "",
            *markdown_table(storage_time.table(timed["rows"])),
            "",
            "One step on a CPU beside the same optimizer without: of float32 for state "
            "in 8 bits, of bfloat16 weights that do not learn for the others; medians "
            f"(quartiles) of {timed['arguments']['rounds']} interleaved rounds on "
            f"{timed['threads']} threads of {timed['processor']}, bytes a parameter. "
            "`python benchmarks/storage_time.py` measures it.",
        ]
    )


def _seeds(runs: Sequence[dict[str, Any]]) -> str:
    return ", ".join(map(str, sorted({run["seed"] for run in runs})))


def memory() -> str:
    """What a model of 70 billion parameters takes with each optimizer."""
    results = read("memory_table")
    return memory_table.markdown(results)


def update_time() -> str:
    """One update beside optax and PyTorch, from its committed results."""
    results = read("update_time")
    lines = [
        "| optimizer | ms | of optax's time | of PyTorch's best | "
        "temporaries, bytes per parameter (optax) |",
        "|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        peers = row["candidates"]
        if "optax" not in peers:
            continue
        best_of_torch = row.get("ratio_to_best_torch")
        ours, theirs = (
            peers[name]["temporary_bytes_per_param"] for name in ("optaxplus", "optax")
        )
        lines.append(
            f"| {row['name']} | {peers['optaxplus']['milliseconds'][1]:.0f} | "
            f"{row['ratio_to_optax'][1]:.2f} | "
            f"{'-' if best_of_torch is None else f'{best_of_torch[1]:.2f}'} | "
            f"{ours:.2f} ({theirs:.2f}) |"
        )
    versions = results["versions"]
    lines += [
        "",
        f"{results['num_params'] / 1e6:.0f}M float32 parameters of a transformer on "
        f"{results['threads']} threads of {results['processor']}, parameters and state "
        f"donated; medians of {results['arguments']['rounds']} interleaved rounds. "
        f"jax {versions['jax']}, optax {versions['optax']}, PyTorch "
        f"{versions['torch']}, whose best is `fused` where it exists: XLA reads "
        "moments twice, once to update them and once to use them. "
        "`python benchmarks/update_time.py` measures it.",
    ]
    return "\n".join(lines)


def muon_time() -> str:
    """An update of Muon beside optax and PyTorch, with the error it buys."""
    results = read("muon_time")
    lines = [
        "| update | width | ms | of optax's time | of PyTorch's | error, d x d | "
        "error, d x 4d |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in results["models"]:
        found = model["candidates"]
        ratios = {
            (row["ours"], row["peer"]): f"{row['ratio'][1]:.2f}"
            for row in model["ratios"]
        }
        for name, entry in found.items():
            to_optax, to_torch = (
                ratios.get((name, peer), "-")
                for peer in ("optax.contrib.muon", "torch.optim.Muon")
            )
            errors = entry["polar_error"]
            lines.append(
                f"| `{name}` | {model['width']} | {entry['milliseconds'][1]:.0f} | "
                f"{to_optax} | {to_torch} | {errors['query']:.2f} | "
                f"{errors['up']:.2f} |"
            )
    versions = results["versions"]
    layers = " and ".join(str(model["layers"]) for model in results["models"])
    lines += [
        "",
        f"All hidden matrices of {layers} transformer layers on {results['threads']} "
        f"threads of {results['processor']} (bfloat16 matrix units); error: relative "
        "distance of the direction to the exact polar factor. Medians of "
        f"{results['rounds']} interleaved rounds; jax {versions['jax']}, optax "
        f"{versions['optax']} (which computes in float32), PyTorch "
        f"{versions['torch']}. `python benchmarks/muon_time.py` measures it.",
        "",
        _muon_compile_time(),
    ]
    return "\n".join(lines)


def _muon_compile_time() -> str:
    results = read("muon_compile_time")
    rounds = results["found"]["ox.muon"]
    ours, theirs = (
        statistics.median(r["lower_seconds"] + r["compile_seconds"] for r in found)
        for found in results["found"].values()
    )
    return (
        f"The compiler for {results['device']} takes {ours:.0f} s for the update of "
        f"{results['layers']} unstacked layers of width {results['width']}, "
        f"{results['ratio']:.2f} of the {theirs:.0f} s that it takes for optax's: one "
        "loop for each of two shapes, not one per matrix. Median of "
        f"{len(rounds)} rounds; `python benchmarks/muon_compile_time.py`."
    )


def orthogonality() -> str:
    """What the usual settings of Newton-Schulz reach, from the committed results."""
    results = read("orthogonality")
    sets = ["momenta, step 30", "momenta, step 1200", "random", "condition 1000"]
    lines = [
        f"| setting | work, d x d | work, d x 4d | {' | '.join(sets)} |",
        "|---" * (3 + len(sets)) + "|",
    ]
    for label, coefficients, steps, norm in (
        ("the default", "gram_newton_schulz", 5, "schatten"),
        ("`ns_steps=4`", "gram_newton_schulz", 4, "schatten"),
        ('`normalization="frobenius"`', "gram_newton_schulz", 5, "frobenius"),
        ('`ns_coeffs="polar_express"`', "polar_express", 5, "schatten"),
        ('`ns_coeffs="you"`', "you", 5, "schatten"),
        ('`ns_coeffs="turbo", ns_steps=4, normalization="aol"`', "turbo", 4, "aol"),
        ("most implementations: `jordan`, `frobenius`", "jordan", 5, "frobenius"),
    ):
        rows = [
            row
            for row in results["rows"]
            if (row["ns_coeffs"], row["ns_steps"], row["normalization"])
            == (coefficients, steps, norm)
            and row["compute_dtype"] == "bfloat16"
            and (row["method"] == "standard" or coefficients != "jordan")
        ]
        # The form that method="auto" chooses; other implementations have the standard.
        square, long = (
            min((row for row in rows if row["shape"] == shape), key=lambda r: r["work"])
            for shape in ("square", "long")
        )
        errors = " | ".join(f"{square['errors'][name]:.3f}" for name in sets)
        lines.append(f"| {label} | {square['work']:g} | {long['work']:g} | {errors} |")
    lines += [
        "",
        "Work in products of the square with the matrix; relative error of square "
        "matrices in bfloat16, root mean square: what Muon orthogonalizes in the main "
        "job, random matrices, and singular values equally spaced in the logarithm. "
        "`python benchmarks/orthogonality.py` measures all tables, forms, dtypes and "
        f"condition numbers up to 1e6 (seed {results['seed']}):",
        "",
        "![error against work and condition number](results/orthogonality.png)",
    ]
    return "\n".join(lines)


def curvature() -> str:
    """What Shampoo, SOAP and others cost beside AdamW and Muon."""
    results = read("curvature_cost")
    on_pods = read("pod_cost")
    return "\n\n".join(
        [curvature_cost.markdown(results), pod_tables.factors_table(on_pods)]
    )


def pod_cost() -> str:
    """What an update of Muon costs on a pod."""
    results = read("pod_cost")
    return pod_tables.muon_table(results)


def finetune() -> str:
    """What the fine-tuning example prints at the end, from its committed results."""
    results = read("finetune_lora")
    lines = [
        "| method | trained parameters | bytes of state | loss on the manual, before "
        "and after | on the source | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in results["runs"].items():
        new, old = (
            f"{curve[0][1]:.3f}, {curve[-1][1]:.3f}"
            for curve in (run["validation"], run["other_validation"])
        )
        lines.append(
            f"| {name} | {run['trained_parameters']:,} | {run['state_bytes']:,} | "
            f"{new} | {old} | {run['seconds']:.0f} |"
        )
    steps = results["arguments"]["steps"]
    lines += [
        "",
        f"Nats per byte on {results['device']}, seed {results['seed']}, {steps} steps, "
        f"rank {results['rank']}. Muon on B saves memory here, not loss.",
    ]
    return "\n".join(lines)


def routing_details() -> str:
    """What Muon gets of five models by kinds, from optax and from here."""
    results = read("routing")
    lines = [
        "Of the five models of the table on the first page by kinds, with the matrices "
        "that are orthogonalized; bold is what goes to the wrong optimizer, or to Muon "
        "as the wrong matrix:",
        "",
        *markdown_table(details(results)),
        "",
        "`optax.contrib.muon` takes what has two axes: also the norms of a stack, as "
        "one matrix of layers, and the biases of heads, as one of heads. With "
        "`muon_weight_dimension_numbers` it does as it is told, for every parameter by "
        "hand.",
    ]
    ours = misses(results, OURS)
    if ours:
        lines[-1] += (
            f" What `ox.muon` gets wrong here is {', '.join(ours)}, until a rule of "
            "your own says what it is."
        )
    versions = results["versions"]
    lines[-1] += (
        f" optax {versions['optax']}, flax {versions['flax']}; read from the states of "
        "the optimizers by `python benchmarks/routing.py`."
    )
    return "\n".join(lines)


BLOCKS = {
    "convergence": convergence,
    "claims": claims,
    "seeds": seeds,
    "half of the steps": half_of_the_steps,
    "storage": storage,
    "memory": memory,
    "update time": update_time,
    "muon time": muon_time,
    "orthogonality": orthogonality,
    "routing details": routing_details,
    "curvature": curvature,
    "pod cost": pod_cost,
    "finetune": finetune,
}
