"""Writes the tables and figures of README.md from the package and from results.

python benchmarks/readme.py           # rewrites the marked blocks
python benchmarks/readme.py --check   # fails if that would change anything
"""

import argparse
import json
import re
import sys
from pathlib import Path

import jax
import optax

import optaxplus as ox

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MATRIX = {"dense": {"kernel": jax.ShapeDtypeStruct((4096, 4096), "float32")}}

# Name, transformation, paper, when to use it. State is measured on a hidden matrix.
METHODS: tuple[tuple[str, optax.GradientTransformation, str, str], ...] = (
    (
        "`sgd`",
        ox.sgd(0.1),
        "Robbins and Monro 1951",
        "convolutional networks, convex problems",
    ),
    (
        "`sgd(momentum=0.9)`",
        ox.sgd(0.1, momentum=0.9),
        "Polyak 1964; Nesterov 1983",
        "the same, faster",
    ),
    (
        "`adam`",
        ox.adam(0.1),
        "[arXiv 1412.6980](https://arxiv.org/abs/1412.6980)",
        "without weight decay; `amsgrad`, `nesterov` by argument",
    ),
    (
        "`adamw`",
        ox.adamw(0.1),
        "[arXiv 1711.05101](https://arxiv.org/abs/1711.05101)",
        "the safe default for transformers",
    ),
    (
        "`lion`",
        ox.lion(0.1),
        "[arXiv 2302.06675](https://arxiv.org/abs/2302.06675)",
        "half of AdamW's state; learning rate 3 to 10 times smaller",
    ),
    (
        "`lars`",
        ox.lars(0.1),
        "[arXiv 1708.03888](https://arxiv.org/abs/1708.03888)",
        "convolutional networks with very large batches",
    ),
    (
        "`lamb`",
        ox.lamb(0.1),
        "[arXiv 1904.00962](https://arxiv.org/abs/1904.00962)",
        "transformers with very large batches",
    ),
    (
        "`adafactor`",
        ox.adafactor(0.1),
        "[arXiv 1804.04235](https://arxiv.org/abs/1804.04235)",
        "almost no state; steps relative to the parameters",
    ),
    (
        "`muon`",
        ox.muon(0.1),
        "[Jordan et al. 2024](https://kellerjordan.github.io/posts/muon), "
        "[arXiv 2502.16982](https://arxiv.org/abs/2502.16982)",
        "transformers; AdamW for what is not a hidden matrix",
    ),
)


def methods_table() -> str:
    """One row per named optimizer, with the measured bytes of state."""
    lines = [
        "| optimizer | paper | state, bytes per parameter | when |",
        "|---|---|---|---|",
    ]
    for name, tx, paper, when in METHODS:
        report = ox.memory_report(tx, MATRIX)
        per_param = report.state / report.num_params
        lines.append(f"| {name} | {paper} | {per_param:.3g} | {when} |")
    lines += [
        "",
        "State of a 4096 x 4096 hidden weight matrix in float32. The transformations "
        "behind them, for chains of your own:",
        "`scale_by_momentum`, `scale_by_ema`, `scale_by_adam`, `scale_by_sign`, "
        "`scale_by_lion`, `trust_ratio`, `scale_by_param_rms`, `factored_rms`, "
        "`clip_update_rms`, `clip_by_global_norm`, `orthogonalize_via_newton_schulz`, "
        "`scale_by_matrix_shape`, `chain_in_float32`, `route`.",
    ]
    return "\n".join(lines)


def main_job() -> str:
    """What the example prints at the end, from its committed results."""
    results = json.loads((RESULTS / "train_gpt.json").read_text("utf-8"))
    runs = results["runs"]
    lines = [
        "| optimizer | learning rate | final validation loss | "
        "steps to AdamW's best | seconds |",
        "|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        steps, loss = run["validation"][-1]
        reached = run["steps_to_adamw_best"]
        lines.append(
            f"| {name} | {run['learning_rate']:g} | {loss:.4f} | "
            f"{'not reached' if reached is None else reached} of {steps} | "
            f"{run['seconds']:.0f} |"
        )
    arguments = results["arguments"]
    lines += [
        "",
        f"Validation loss in nats per byte on {results['device']}, seed "
        f"{results['seed']}, width {arguments['width']}; both optimizers at the "
        "learning rate that a sweep of equally many trials found best "
        "(`benchmarks/results/train_gpt_learning_rates.json`).",
    ]
    return "\n".join(lines)


BLOCKS = {"methods": methods_table, "main job": main_job}


def render(readme: str) -> str:
    """The README with every marked block written anew."""
    for name, write in BLOCKS.items():
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if len(pattern.findall(readme)) != 1:
            raise ValueError(f"README.md: the block {name!r} must occur exactly once")
        block = f"{begin}\n{write()}\n{end}"
        readme = pattern.sub(lambda _, block=block: block, readme)
    return readme


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args()
    path = ROOT / "README.md"
    readme = path.read_text("utf-8")
    rendered = render(readme)
    if options.check:
        sys.exit(
            f"{path.name} is stale: run {Path(__file__).name}"
            if rendered != readme
            else 0
        )
    path.write_text(rendered, "utf-8")


if __name__ == "__main__":
    main()
