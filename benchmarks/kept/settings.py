"""What the study runs: inits, merges, suites and the cells of each part. Data only."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

PAPER: dict[str, Any] = {
    "statistic": "token", "objective": "least_energy", "null_space": "random", "protect_energy": None,
}  # fmt: skip
OWN = PAPER | {"null_space": "in_task"}
RATIO = PAPER | {"objective": "ratio"}
INITS: dict[str, dict[str, Any] | None] = {  # OSRMLoraConfig fields; None: PEFT's own A
    "plain": None,
    "random": PAPER | {"protect_rank": 0},  # orthonormal, blind to every task
    "paper": PAPER,
    "in_task": OWN | {"protect_energy": 0.9},
    "ratio": RATIO,
    # part b
    **{f"in_task p{share:g}": OWN | {"protect_energy": share} for share in (0, 0.5, 1)},
    "difference": PAPER | {"objective": "difference"},
    **{f"ratio ρ{ridge:g}": RATIO | {"ridge": ridge} for ridge in (0.01, 1.0)},
    "paper, means": PAPER | {"statistic": "mean"},  # Eq. 4
    "paper, samples": PAPER | {"statistic": "sample"},  # Eq. 2 and 3
}
MAIN = ("plain", "paper", "in_task", "ratio")

# (name in the tables, fields of a merge recipe, λ as published, λ to choose among; None: the merge has its own)
Merge = tuple[str, dict[str, Any], float | None, tuple[float, ...]]
MERGES: tuple[Merge, ...] = (
    ("average", {"method": "average"}, 1.0, (1.0,)),
    ("TA", {"method": "task_arithmetic"}, 0.3, (0.2, 0.3, 0.45, 0.6, 0.8)),
    ("TA, weights by features", {"method": "task_arithmetic", "weights": "features"}, 1.0, (1.0,)),
    ("TIES", {"method": "ties"}, 1.0, (0.5, 1.0, 1.5)),
    ("KnOTS-TIES", {"method": "ties", "space": "knots"}, 1.0, (0.5, 1.0, 1.5)),
    ("DARE", {"method": "dare"}, 0.3, (0.3,)),
    ("DARE-TIES", {"method": "dare_ties"}, 1.0, (1.0,)),
    ("Fisher", {"method": "fisher"}, 1.0, (1.0,)),
    ("RegMean", {"method": "regmean"}, 1.0, (1.0,)),
    ("EMR", {"method": "emr"}, None, ()),
    ("TSV-M", {"method": "tsv"}, 1.0, (0.5, 0.75, 1.0, 1.25)),
    ("Iso-C", {"method": "iso"}, 1.0, (0.75, 1.0, 1.5)),
    ("LoRE", {"method": "lore"}, 0.3, (0.3, 0.6)),
    ("LoRE, λ by features", {"method": "lore", "scale": "features"}, None, ()),
)
FEW = ("average", "TA", "TA, weights by features", "TIES", "RegMean", "EMR", "TSV-M", "Iso-C")
SWEPT = ("TA", "TSV-M")

SEEDS, TUNING_SEED = (42, 43, 44), 41
TUNING_TASKS = {  # classes and a regression
    "packaged": ("questions", "movie_reviews", "product_reviews"),
    "glue": ("cola", "mrpc", "stsb"),
}
RATES = (5e-4, 1e-3, 2e-3)
LOW: dict[str, dict[str, Any]] = {  # drift ≤ 0.15: small steps of A, and a large α that makes up for B's
    "minilm": {"rate": 3e-4, "scaling": 16, "epochs": 6},
    "mpnet": {"rate": 4e-4, "scaling": 4},
}
BATCH, MAX_LENGTH = 16, 48
TRAIN_ROWS, HELD_OUT = 384, 200
ROWS = {"minilm": 300, "mpnet": 160}
MODELS = {"minilm": ("query", "value"), "mpnet": ("q", "v")}  # the layers of the paper: W_Q and W_V

# Nested: the first N are the set of N tasks. Pairs of newsgroups and of Reuters topics, between two packaged tasks.
MANY = (
    "questions",
    "comp.graphics|comp.windows.x",
    "earn|acq",
    "rec.sport.baseball|rec.sport.hockey",
    "sms_spam",
    "sci.med|sci.space",
    "crude|trade",
    "alt.atheism|soc.religion.christian",
    "rec.autos|rec.motorcycles",
    "sci.crypt|talk.politics.guns",
    "money-fx|interest",
    "comp.sys.ibm.pc.hardware|comp.sys.mac.hardware",
    "sci.electronics|misc.forsale",
    "talk.politics.mideast|talk.politics.misc",
    "grain|ship",
    "comp.os.ms-windows.misc|talk.religion.misc",
)


@dataclass(frozen=True)
class Cell:
    """One set of adapters, and how it is merged.

    Attributes:
        model: a key of MODELS.
        suite: "packaged", "glue", or "many" (MANY).
        init: a key of INITS.
        rate: the learning rate; 0: the one that the tuning cells choose for this model, suite and init.
        seed: of rows, heads and order.
        tasks: how many tasks of the suite; 0: all.
        r: LoRA's rank.
        scaling: α / r: where it is large, B and with it A need to move less.
        epochs: of training.
        k: samples a task for the features.
        unknown: the other tasks are unknown: a reference corpus stands for them.
        merges: "all" (MERGES), "published" (MERGES, a choice of λ for SWEPT only), "few" (FEW, likewise), "trials"
            (trials.TRIALS), or "none" (the adapters alone, on held-out training rows).
    """

    model: str = "minilm"
    suite: str = "packaged"
    init: str = "plain"
    rate: float = 0
    seed: int = 42
    tasks: int = 0
    r: int = 8
    scaling: int = 2
    epochs: int = 3
    k: int = 100
    unknown: bool = False
    merges: str = "all"

    @property
    def key(self) -> str:
        """The cell's folder."""
        parts = [
            f"r{self.r}" * (self.r != 8),
            f"s{self.scaling}" * (self.scaling != 2),
            f"e{self.epochs}" * (self.epochs != 3),
            f"k{self.k}" * (self.k != 100),
            f"N{self.tasks}" * (self.tasks > 0),
        ]
        rate = "tuned" if self.rate == 0 else f"{self.rate:g}"
        about = " ".join([self.init, *filter(None, parts), *(["unknown"] if self.unknown else []), rate])
        about += f" {self.merges}" if self.merges in ("few", "trials") else ""
        return f"{self.model}/{self.suite}/{about}/seed{self.seed}"


def tuning(model: str, suite: str, inits: tuple[str, ...] = MAIN) -> list[Cell]:
    """The cells that choose a rate: the tuning seed, scored on training rows that were not trained on."""
    return [Cell(model, suite, init, rate, TUNING_SEED, merges="none") for rate in RATES for init in inits]


def cells(part: str) -> Iterator[Cell]:
    """The cells of a part, the most telling first."""
    model, _, suite = part.partition("-")
    inits: tuple[str, ...] = MAIN if model == "minilm" else ("plain", "paper", "ratio")
    if suite == "low":
        first, rest = (inits, ("random",)) if model == "minilm" else (("ratio", "plain"), ("paper",))
        for group in (first, rest):
            yield from (
                Cell(model, init=init, seed=seed, merges="published", **LOW[model]) for seed in SEEDS for init in group
            )
    elif model in MODELS:
        yield from tuning(model, suite, inits)
        merges = "all" if model == "minilm" else "published"
        yield from (Cell(model, suite, init, seed=seed, merges=merges) for seed in SEEDS for init in inits)
    elif part == "trials":
        for init in ("ratio", "plain"):
            yield from (Cell(init=init, seed=seed, merges="trials", **LOW["minilm"]) for seed in SEEDS)
    elif part == "many":
        for number in (16, 4, 8, 2):
            for seed in SEEDS:
                for init in ("ratio", "plain"):
                    yield Cell(suite="many", init=init, seed=seed, tasks=number, merges="few", **LOW["minilm"])
    elif part == "unknown":
        inits = ("paper", "ratio")
        yield from (
            Cell(init=init, seed=seed, unknown=True, merges="few", **LOW["minilm"]) for seed in SEEDS for init in inits
        )
    elif part == "sweeps":
        low = Cell(merges="published", **LOW["minilm"])  # the inits of minilm-low are its cells
        few = replace(low, merges="few")
        variants = [replace(low if init in (*MAIN, "random") else few, init=init) for init in INITS]
        variants += [replace(few, init=init, r=r) for r in (4, 32) for init in ("plain", "ratio")]
        variants += [replace(few, init="ratio", k=k) for k in (2, 10, 1000)]
        yield from (replace(one, seed=seed) for one in variants for seed in SEEDS)
    else:
        raise ValueError(f"no part {part!r}: choose from {', '.join(PARTS)}")


PARTS = (
    "minilm-low", "mpnet-low", "many", "trials", "minilm-packaged", "mpnet-packaged", "minilm-glue", "unknown",
    "sweeps",
)  # fmt: skip
