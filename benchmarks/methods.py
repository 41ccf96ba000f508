"""What the README says of every optimizer: the paper, when to use it, when not."""

from dataclasses import dataclass

import optax

import optaxplus as ox


@dataclass(frozen=True)
class Method:
    """A row of the README's table.

    Attributes:
        name: The call, as it stands in code.
        make: The transformation whose state is measured.
        paper: Where it comes from, in Markdown.
        when: When to use it.
        unless: When not.
    """

    name: str
    make: optax.GradientTransformation
    paper: str
    when: str
    unless: str


def arxiv(*identifiers: str) -> str:
    """Links to papers on arXiv."""
    return ", ".join(
        f"[arXiv {identifier}](https://arxiv.org/abs/{identifier})"
        for identifier in identifiers
    )


METHODS = (
    Method(
        "sgd",
        ox.sgd(0.1),
        "Robbins and Monro 1951",
        "convex problems; no memory to spare",
        "transformers",
    ),
    Method(
        "sgd(momentum=0.9)",
        ox.sgd(0.1, momentum=0.9),
        "Polyak 1964; Nesterov 1983",
        "convolutional networks with a tuned schedule",
        "transformers",
    ),
    Method(
        "adagrad",
        ox.adagrad(0.1),
        "[JMLR 12 (2011)](https://jmlr.org/papers/v12/duchi11a.html)",
        "sparse features, online convex problems",
        "long runs: its steps only shrink",
    ),
    Method(
        "rmsprop",
        ox.rmsprop(0.1),
        "Tieleman and Hinton 2012",
        "recurrent networks, reinforcement learning",
        "a default: AdamW adds momentum and a bias correction",
    ),
    Method(
        "adam",
        ox.adam(0.1),
        arxiv("1412.6980"),
        "small problems without weight decay",
        "regularised models: AdamW",
    ),
    Method(
        "adamw",
        ox.adamw(0.1),
        arxiv("1711.05101"),
        "the safe default; what everything else is compared with",
        "memory is short, or matrices dominate and Muon fits",
    ),
    Method(
        "adamw8bit",
        ox.adamw8bit(0.1),
        arxiv("2110.02861"),
        "AdamW where its state does not fit",
        "models whose parameters are small, or mostly embeddings",
    ),
    Method(
        "amsgrad",
        ox.amsgrad(0.1),
        arxiv("1904.09237"),
        "Adam does not settle: rare, large gradients",
        "memory counts: 4 bytes more, seldom better",
    ),
    Method(
        "nadam",
        ox.nadam(0.1),
        "[Dozat 2016](https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ)",
        "a cheap trial beside AdamW, in short runs most of all",
        "large models of language: no advantage published",
    ),
    Method(
        "radam",
        ox.radam(0.1),
        arxiv("1908.03265"),
        "Adam without choosing a warm-up",
        "gradients much larger than 1: its first steps are plain momentum",
    ),
    Method(
        "ranger",
        ox.ranger(0.1),
        arxiv("1908.03265", "1907.08610", "2004.01461"),
        "vision models with little tuning",
        "memory counts: 12 bytes",
    ),
    Method(
        "stable_adamw",
        ox.stable_adamw(0.1),
        arxiv("2304.13013"),
        "loss spikes in low precision; instead of gradient clipping",
        "runs that never spike",
    ),
    Method(
        "adan",
        ox.adan(0.1),
        arxiv("2208.06677"),
        "vision transformers at large learning rates",
        "memory counts: 16 bytes",
    ),
    Method(
        "adopt",
        ox.adopt(0.1),
        arxiv("2411.02853"),
        "Adam diverges at the b2 that the noise asks for",
        "very short runs: a first step that only looks",
    ),
    Method(
        "ademamix",
        ox.ademamix(0.1),
        arxiv("2409.03137"),
        "long language-model runs, with both warm-ups",
        "runs below ten thousand steps; changing data",
    ),
    Method(
        "adam_mini",
        ox.adam_mini(0.1),
        arxiv("2406.16793"),
        "AdamW's learning rates with half its state",
        "models whose heads and neurons are not visible in the shapes",
    ),
    Method(
        "mars",
        ox.mars(0.1),
        arxiv("2411.10438"),
        "noisy gradients of small batches",
        "memory counts: 12 bytes",
    ),
    Method(
        "sophia",
        ox.sophia(0.1),
        arxiv("2305.14342"),
        "losses whose curvature differs much between entries",
        "a default: the speed-runs of modded-nanogpt saw no gain over Adam",
    ),
    Method(
        "lion",
        ox.lion(0.1),
        arxiv("2302.06675"),
        "half of AdamW's state; learning rate 3 to 10 times smaller",
        "small batches: the sign of noise is noise",
    ),
    Method(
        "lion8bit",
        ox.lion8bit(0.1),
        arxiv("2302.06675", "2110.02861"),
        "Lion in an eighth of AdamW's state",
        "as Lion; models whose parameters are small",
    ),
    Method(
        "signum",
        ox.signum(0.1),
        arxiv("1802.04434"),
        "the simplest sign method, a baseline for Lion",
        "small batches",
    ),
    Method(
        "lars",
        ox.lars(0.1),
        arxiv("1708.03888"),
        "convolutional networks with very large batches",
        "ordinary batches, transformers",
    ),
    Method(
        "lamb",
        ox.lamb(0.1),
        arxiv("1904.00962"),
        "transformers with very large batches",
        "ordinary batches: AdamW",
    ),
    Method(
        "adafactor",
        ox.adafactor(0.1),
        arxiv("1804.04235"),
        "almost no state; steps relative to the parameters",
        "memory is not the limit",
    ),
    Method(
        "came",
        ox.came(0.1),
        arxiv("2307.02047"),
        "Adafactor's memory plus momentum, for fine-tuning and large batches",
        "the second moment of AdamW is affordable",
    ),
    Method(
        "muon",
        ox.muon(0.1),
        "[Jordan et al. 2024](https://kellerjordan.github.io/posts/muon), "
        + arxiv("2502.16982"),
        "transformers; AdamW for what is not a hidden matrix",
        "models without large matrices",
    ),
    Method(
        "normuon",
        ox.normuon(0.1),
        arxiv("2510.05491"),
        "Muon whose neurons learn at one pace",
        "models without large matrices",
    ),
    Method(
        "adamuon",
        ox.adamuon(0.1),
        arxiv("2507.11005"),
        "Muon with a second moment for every entry",
        "AdamW's 8 bytes are too many",
    ),
    Method(
        "scion",
        ox.scion(0.1),
        arxiv("2502.07529"),
        "Muon without AdamW: 4 bytes everywhere, weights bounded by layer, learning "
        "rates meant to carry over from narrow models",
        "radii cannot be tuned on a small model; fine-tuning of weights outside the "
        "balls",
    ),
    Method(
        "dion(rank_fraction=0.25)",
        ox.dion(0.1, rank_fraction=0.25),
        arxiv("2504.05295"),
        "updates of low rank, what they miss kept for later",
        "speed: on CPUs its QR takes longer than all of Muon's products",
    ),
    Method(
        "shampoo",
        ox.shampoo(0.1, max_dim=4096),
        arxiv("1802.09568", "2309.06497"),
        "matrices whose rows and columns are correlated; AdamW's learning rates",
        "memory counts, or a simpler method of its kind will do: Muon",
    ),
    Method(
        "soap",
        ox.soap(0.1),
        arxiv("2409.11321"),
        "the fewest steps: half of AdamW's in the main job, and the lowest loss",
        "memory counts; a QR decomposition of both sides every ten steps is too much",
    ),
    Method(
        "kron",
        ox.kron(0.1),
        arxiv("1512.04202", "2402.11858"),
        "ill-conditioned problems: rows and columns whitened, mixtures included",
        "memory counts: factors of both sides; the first 500 steps refresh every time",
    ),
    Method(
        "apollo(rank=1)",
        ox.apollo(0.1, rank=1, scaling="tensor", scale=128.0),
        arxiv("2412.05270"),
        "no state to speak of for matrices: APOLLO-Mini; rank=256 with a factor for "
        "each channel is APOLLO",
        "AdamW's or Muon's state is affordable: it has no momentum",
    ),
)

# Around an optimizer or a direction; the state beside that of what is inside.
WRAPPERS = (
    Method(
        "qk_clip",
        optax.identity(),
        arxiv("2507.20534"),
        "attention logits that grow under Muon; called on the parameters after the "
        "step",
        "models that normalise queries and keys: nothing to clip",
    ),
    Method(
        "lookahead",
        ox.lookahead(ox.sgd(0.1)),
        arxiv("1907.08610"),
        "steadier training at large learning rates; slow weights to evaluate",
        "memory counts",
    ),
    Method(
        "cautious",
        ox.cautious(optax.identity()),
        arxiv("2411.16085"),
        "any rule with momentum, at its own learning rate",
        "rules whose direction is the gradient: nothing disagrees",
    ),
    Method(
        "accumulate",
        ox.accumulate(ox.sgd(0.1), every_k=2),
        "-",
        "batches that do not fit; expensive rules, which run once per batch",
        "batches that fit",
    ),
    Method(
        "with_metrics",
        ox.with_metrics(ox.sgd(0.1)),
        "-",
        "norms of gradient, update and parameters in the state, per label: "
        "`ox.metrics(state)`",
        "every microsecond counts: three more reductions of each parameter",
    ),
)

# Good as they are in optax and tested to work with what is here.
FROM_OPTAX = (
    ("optax.contrib.prodigy", arxiv("2306.06101"), "a learning rate of its own"),
    ("optax.contrib.dadapt_adamw", arxiv("2301.07733"), "a learning rate of its own"),
    (
        "optax.contrib.schedule_free",
        arxiv("2405.15682"),
        "around any optimizer: no schedule to choose",
    ),
    ("optax.contrib.sam", arxiv("2010.01412"), "around any optimizer: flat minima"),
    ("optax.contrib.mechanize", arxiv("2306.00144"), "around any optimizer: its scale"),
    ("optax.contrib.momo", arxiv("2305.07583"), "step lengths from the loss"),
    ("optax.contrib.galore", arxiv("2403.03507"), "AdamW in a low-rank space"),
)
