"""Which optimizer for what, and what papers claim, beside what was measured here."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

# A script's own folder, also where the tests load it by its path.
sys.path.insert(0, str(Path(__file__).resolve().parent))
import convergence
import convergence_report
import train_gpt_seeds
from methods import arxiv

MAIN_JOB = "main job: GPT, width 128"


@dataclass(frozen=True)
class Choice:
    """A row of the guide.

    Attributes:
        situation: What a reader has, or wants.
        code: What to take.
        names: Of the measured optimizers that speak for it.
    """

    situation: str
    code: str
    names: tuple[str, ...]


CHOICES = (
    Choice("a baseline, or no wish to choose", "`adamw`", ("adamw",)),
    Choice(
        "hidden matrices: transformers, convolutions; half of AdamW's state for them",
        "`muon`, `normuon`",
        ("muon", "normuon"),
    ),
    Choice("a transformer, and AdamW's state is affordable", "`adamuon`", ("adamuon",)),
    Choice(
        "both sides of a matrix whitened, where memory and matrix work cost little",
        "`soap`, `kron`",
        ("soap", "kron"),
    ),
    Choice("AdamW's state, but fewer steps in a short run", "`nadam`", ("nadam",)),
    Choice(
        "half of AdamW's state for everything, at some loss in a short run",
        "`adam_mini`, `lion`",
        ("adam_mini", "lion"),
    ),
    Choice(
        "AdamW in a quarter of its state, but for what is small or an embedding",
        "`adamw8bit`",
        ("adamw8bit",),
    ),
    Choice(
        "next to no state for matrices",
        "`adafactor`, `apollo(rank=1)`",
        ("adafactor", "apollo_mini"),
    ),
)


@dataclass(frozen=True)
class Claim:
    """A published figure.

    Attributes:
        name: Of the optimizer here.
        text: What its authors found.
        setting: With what.
        source: Where, in Markdown.
    """

    name: str
    text: str
    setting: str
    source: str


CLAIMS = (
    Claim(
        "muon",
        "the record of a speed-run 1.35 times as fast as with AdamW",
        "124M parameters, FineWeb",
        "[KellerJordan/Muon](https://github.com/KellerJordan/Muon)",
    ),
    Claim(
        "muon",
        "AdamW's loss with 52 % of its training FLOPs",
        "scaling laws at compute-optimal lengths",
        arxiv("2502.16982"),
    ),
    Claim(
        "normuon",
        "21.74 % more efficient than Adam, 11.31 % than Muon",
        "1.1B parameters",
        arxiv("2510.05491"),
    ),
    Claim(
        "adamuon",
        "more than 40 % more efficient than Adam",
        "large models of language",
        arxiv("2507.11005"),
    ),
    Claim(
        "soap",
        "over 40 % fewer steps and 35 % less time than AdamW",
        "360M and 660M parameters, large batches",
        arxiv("2409.11321"),
    ),
    Claim("sophia", "half of Adam's steps", "GPT of 125M to 770M", arxiv("2305.14342")),
    Claim(
        "ademamix",
        "101B tokens as good as 197B with AdamW",
        "1.3B parameters",
        arxiv("2409.03137"),
    ),
    Claim(
        "adam_mini",
        "on par with AdamW in half of its state",
        "Llama 2 7B and others",
        arxiv("2406.16793"),
    ),
    Claim(
        "apollo_mini",
        "AdamW's quality or better with the state of SGD",
        "pre-training of LLaMA",
        arxiv("2412.05270"),
    ),
    Claim(
        "adamw8bit",
        "AdamW's quality in a quarter of its state, nothing tuned anew",
        "1.5B parameters, GLUE, ImageNet and others",
        arxiv("2110.02861"),
    ),
    Claim(
        "lion",
        "as good as AdamW or better on language",
        "models of language",
        arxiv("2302.06675"),
    ),
)


def steps_by_task(
    documents: Mapping[str, dict[str, Any]], main_job: list[dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """Title of a task -> optimizer -> share of the steps until AdamW's best."""
    full = [run for run in main_job if run["steps"] == train_gpt_seeds.STEPS]
    found = {
        MAIN_JOB: {
            line["optimizer"]: line["steps_to_adamw_best"][1] / train_gpt_seeds.STEPS
            for line in train_gpt_seeds.summary(full)
        }
    }
    for document in documents.values():
        found[document["job"]["title"]] = _shares(document)
    return found


def _shares(document: dict[str, Any]) -> dict[str, float]:
    return {
        row.optimizer: median(row.steps) / document["job"]["steps"]
        for row in convergence_report.rows(document)
    }


def markdown(
    documents: Mapping[str, dict[str, Any]], main_job: list[dict[str, Any]]
) -> str:
    """The table of the first page."""
    tasks = steps_by_task(documents, main_job)
    lines = [
        f"| you have, or want | take | {' | '.join(tasks)} |",
        "|---|---|" + "---|" * len(tasks),
    ]
    for choice in CHOICES:
        measured = (
            ", ".join(_share(task.get(name)) for name in choice.names)
            for task in tasks.values()
        )
        lines.append(f"| {choice.situation} | {choice.code} | {' | '.join(measured)} |")
    lines += [
        "",
        "The share of AdamW's steps until its best loss is reached, median of three "
        "seeds; every optimizer at its own best learning rate, of seven, and of four "
        "or more in the main job, where fewer were tuned. Losses were looked at "
        f"{convergence.VALIDATIONS} times a run (main job: "
        f"{train_gpt_seeds.train_gpt.VALIDATIONS}), so shares are that coarse.",
    ]
    return "\n".join(lines)


def everywhere(documents: Mapping[str, dict[str, Any]]) -> str:
    """Which optimizers are as good as AdamW on every task, on none, or in more time."""
    slower = {
        document["job"]["title"]: [
            f"`{row.optimizer}`"
            for row in convergence_report.rows(document)
            if row.time is not None
            and 1 < row.time * median(row.steps) / document["job"]["steps"] < math.inf
        ]
        for document in documents.values()
    }
    shares = [_shares(document) for document in documents.values()]
    names = sorted(set.union(*map(set, shares)) - {train_gpt_seeds.BASELINE})
    reached = {
        name: [not math.isinf(task.get(name, math.inf)) for task in shares]
        for name in names
    }

    def listed(condition: Callable[[list[bool]], bool]) -> str:
        return ", ".join(f"`{name}`" for name in names if condition(reached[name]))

    return (
        f"Of {len(names)} optimizers beside AdamW in these {len(shares)} tasks, these "
        f"reach its best loss within its steps on all: {listed(all)}. These on none: "
        f"{listed(lambda found: not any(found))}. On the way to that loss these take "
        "longer than AdamW's whole run, in no more steps: "
        + "; ".join(
            f"{', '.join(x) or 'none'} ({title})" for title, x in slower.items()
        )
        + "."
    )


def claims(
    documents: Mapping[str, dict[str, Any]], main_job: list[dict[str, Any]]
) -> str:
    """The table of published figures beside ours."""
    tasks = steps_by_task(documents, main_job)
    lines = [
        f"| optimizer | claim | with | source | {' | '.join(tasks)} |",
        "|---|---|---|---|" + "---|" * len(tasks),
    ]
    for claim in CLAIMS:
        here = (_share(task.get(claim.name)) for task in tasks.values())
        lines.append(
            f"| `{claim.name}` | {claim.text} | {claim.setting} | {claim.source} | "
            f"{' | '.join(here)} |"
        )
    lines += [
        "",
        "Here: the share of AdamW's steps until its best loss is reached, as above. "
        "Ours are small networks and short runs, theirs long runs of large ones; "
        "neither says much of the other. An independent comparison, with equal tuning "
        f"({arxiv('2509.02046')}), finds that the fastest are all "
        "matrix-based, 1.4 times as fast as AdamW at 0.1B parameters and 1.1 times "
        "at 1.2B.",
    ]
    return "\n".join(lines)


def _share(share: float | None) -> str:
    if share is None:
        return "-"
    return "never" if math.isinf(share) else f"{100 * share:.0f} %"
