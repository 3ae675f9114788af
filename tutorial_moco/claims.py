"""What the papers claim, and how rows decide on it. A claim is that a measure is larger in some runs than in others.

The words of docs/RESULTS.md are here too, beside the claims they are about. Every figure in them is cited or computed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from tutorial_moco import evidence
from tutorial_moco.errors import DataError
from tutorial_moco.figures import TITLES
from tutorial_moco.results import (
    Measure,
    chance_top1,
    difference_and_interval,
    field,
    of_experiment,
    pretext_accuracy,
    step_memory,
    step_ms,
    values,
)

CAME_OUT, DID_NOT, TOO_SMALL, NOT_MEASURED = VERDICTS = ("came out", "did not", "too small to tell", "not measured yet")
V1 = "[1911.05722](https://arxiv.org/abs/1911.05722)"
V2 = "[2003.04297](https://arxiv.org/abs/2003.04297)"
NOTEBOOK = "the authors' notebook moco_cifar10_demo (CIFAR-10, ResNet-18)"

# What is compared: its title, how many decimals it has, and how it is read from a row.
MEASURES: dict[str, tuple[str, int, Measure]] = {
    "linear": ("linear, %", 1, field("linear_top1")),
    "kNN": ("kNN, %", 1, field("knn_top1")),
    "pretext": ("own key found, %", 1, pretext_accuracy),
    "memory": ("memory of the steps, MiB", 0, step_memory),
    "time": ("time of a step, ms", 0, step_ms),
    "cosine": ("cosine of the oldest keys", 3, lambda row: row["drift"][-1]["cosine"] if row["drift"] else None),
}
ACCURACIES = ("linear", "kNN")

Side = tuple[str, dict[str, object]]  # runs: what they are called, and the settings they are known by


@dataclass(frozen=True)
class Claim:
    """That each measure is larger in the runs of one side than in those of the other; with ``within``, that they are level."""

    says: str
    there: str  # the paper's figures, cited
    larger: Side
    smaller: Side
    measures: tuple[str, ...] = ACCURACIES
    within: float | None = None  # how far apart level may be


@dataclass(frozen=True)
class Finding:
    """What the rows say about a claim in one measure: a value for each run of either side."""

    claim: Claim
    measure: str
    larger: list[float]
    smaller: list[float]

    @property
    def difference(self) -> tuple[float, float]:
        """Of the means, and half the width of its 95 % interval: NaN of one seed."""
        return difference_and_interval(self.larger, self.smaller)

    @property
    def seeds(self) -> int:
        """Of the side that has fewer."""
        return min(len(self.larger), len(self.smaller))

    @property
    def verdict(self) -> str:
        """Came out or did not if the whole interval says so, with at least two seeds; else too small to tell."""
        if not self.seeds:
            return NOT_MEASURED
        difference, half = self.difference
        low, high = difference - half, difference + half
        bottom, top = (0, float("inf")) if self.claim.within is None else (-self.claim.within, self.claim.within)
        if bottom < low and high < top:
            return CAME_OUT
        return DID_NOT if high < bottom or low > top else TOO_SMALL  # comparisons with NaN are False


@dataclass(frozen=True)
class Section:
    """An experiment on the page."""

    experiment: str
    title: str
    question: str
    pictures: tuple[tuple[str, Callable[..., Figure], str], ...]  # name, function of the rows, what one sees
    claims: tuple[Claim, ...] = ()
    otherwise: str = ""  # said where a claim did not come out: why it may be so at this scale


def findings(section: Section, rows: Sequence[dict]) -> list[list[Finding]]:
    """For each claim of a section what the rows say, measure by measure."""
    try:
        rows = of_experiment(rows, section.experiment)
    except DataError:  # which is told in the picture's place
        rows = []
    return [[found(claim, measure, rows) for measure in claim.measures] for claim in section.claims]


def found(claim: Claim, measure: str, rows: Sequence[dict]) -> Finding:
    """Both sides of a claim in one measure. A training that broke down is worth as much as guessing."""
    read, chance = MEASURES[measure][2], chance_top1(rows)

    def worth(row: dict) -> float | None:
        return chance if row["failed"] and measure in ACCURACIES else read(row)

    def side(settings: dict[str, object]) -> list[float]:
        return values([row for row in rows if all(row[name] == value for name, value in settings.items())], worth)

    return Finding(claim, measure, side(claim.larger[1]), side(claim.smaller[1]))


# The page ------------------------------------------------------------------------------------------------------------

FEWEST, FEW, MANY = 64, 1024, 16384  # keys in a dictionary: from a thousandth of CIFAR-10's images to a third


def at(mechanism: str, K: int) -> Side:
    """The runs of a mechanism with K negatives."""
    return f"{TITLES[mechanism]}, K = {K:,}", {"mechanism": mechanism, "K": K}


SECTIONS = (
    Section(
        "reference",
        "Is it the MoCo of the authors' notebook?",
        "The recipe is that of their CIFAR-10 notebook, whose loss and kNN are known at eleven epochs. The losses can be laid "
        "over each other. The accuracies can be only in part: the notebook reads them of keys, not of features, and on the "
        "original images. The line under the picture says which images these are, "
        "docs/LOG.md how much of a gap is the reading.",
        (("reference", evidence.reference_curve, "Loss and kNN through 200 epochs, and the notebook's own as hollow dots."),),
    ),
    Section(
        "ceilings",
        "The scoreboard",
        "From guessing to training with labels: where do the three mechanisms stand? Above the last line no label was used.",
        (("scoreboard", evidence.scoreboard, "Dots of kNN and linear accuracy from raw pixels to training with labels."),),
    ),
    Section(
        "K",
        "Does a larger dictionary help, and which mechanism is best?",
        "All three get as many images to see. MoCo and the memory bank keep their batch; end-to-end has its negatives from "
        "the batch, so its batch grows with K, and ends at K = 1,024, as in the paper.",
        (
            ("K", evidence.accuracy_against_K, "kNN and linear accuracy against K, a line for each mechanism."),
            (
                "paper-K",
                lambda rows: evidence.paper_K(),
                "The paper's Figure 3: MoCo above the memory bank, both rising with K.",
            ),
        ),
        (
            Claim(
                f"MoCo gains from a larger dictionary (K from {FEWEST} to {FEW:,})",
                f"54.7 with K = 256, 0.02 % of the images, 60.6 with 65,536, 5 %, linear ({V1}, Figure 3)",
                at("moco", FEW),
                at("moco", FEWEST),
            ),
            Claim(
                f"MoCo still gains where the dictionary is large (K from {FEW:,} to {MANY:,})",
                f"59.0 with K = 4,096, 60.6 with 65,536, linear ({V1}, section 4.1)",
                at("moco", MANY),
                at("moco", FEW),
            ),
            Claim(
                f"A memory bank gains from a larger dictionary (K from {FEWEST} to {MANY:,})",
                f"all three mechanisms do; the bank reaches 58.0 with K = 65,536, linear ({V1}, section 4.1)",
                at("memory_bank", MANY),
                at("memory_bank", FEWEST),
            ),
            Claim(
                f"MoCo is better than the memory bank at the same K ({FEW:,})",
                f"54.7 and 50.0 with K = 256, 57.3 and 54.1 with 1,024, linear, read off ({V1}, Figure 3)",
                at("moco", FEW),
                at("memory_bank", FEW),
            ),
            Claim(
                f"MoCo is better than the memory bank at the same K ({MANY:,})",
                f"60.6 and 58.0 with K = 65,536, linear ({V1}, section 4.1)",
                at("moco", MANY),
                at("memory_bank", MANY),
            ),
            Claim(
                "End-to-end is level with MoCo while K is small (K = 256; within 2 points)",
                f"“performs similarly” ({V1}, section 4.1)",
                at("end_to_end", 256),
                at("moco", 256),
                within=2.0,
            ),
        ),
        f"On ImageNet a queue of 65,536 keys holds {65536 / 1281167:.0%} of the images, and a training has a million steps. "
        "Here one of {largest_K:,} keys holds {share:.0%} of the images, and a training has {steps:,} steps: old keys come "
        "from an encoder that knew far less, and with few classes more of the negatives are of the query's own. The bank "
        "renews each of its keys once an epoch, of which there are {epochs}. End-to-end with a large batch makes few steps.",
    ),
    Section(
        "m",
        "How slow should the key encoder be?",
        "m = 0 copies the encoder after each step; m = 1 leaves the key encoder at its random start.",
        (("m", evidence.accuracy_against_m, "Accuracy against m beside the paper's table, which peaks at m = 0.999."),),
        (
            Claim(
                "A key encoder that follows slowly is better than none that does (m = 0)",
                f"with m = 0 the loss does not converge ({V1}, section 4.1)",
                ("m = 0.99", {"m": 0.99}),
                ("m = 0", {"m": 0.0}),
            ),
            Claim(
                "A slow key encoder is better than a quick one",
                f"57.8 with m = 0.99, 55.2 with 0.9, linear ({V1}, section 4.1)",
                ("m = 0.99", {"m": 0.99}),
                ("m = 0.9", {"m": 0.9}),
            ),
            Claim(
                "A key encoder slower still is better still",
                f"59.0 with m = 0.999, 57.8 with 0.99, linear ({V1}, section 4.1)",
                ("m = 0.999", {"m": 0.999}),
                ("m = 0.99", {"m": 0.99}),
            ),
        ),
        "m = 0.999 averages over a thousand steps. On ImageNet that is a fifth of an epoch; here the whole training has "
        "{steps:,} steps, and a key encoder that slow lags behind for a good part of it. With m = 0 the loss stays high and "
        "does not diverge: the queue is eight steps deep.",
    ),
    Section(
        "drift",
        "Do stored keys go stale?",
        "Each key in the dictionary is set beside the key that the same view would get now, half-way through a training. The "
        "paper argues with this consistency and does not show it. A bank's key is a running mean over visits and is encoded "
        "by the query encoder, so its cosine is lower for two reasons besides age.",
        (
            (
                "drift",
                evidence.drift,
                "Cosine of stored keys with their views encoded now, falling with age; slower for larger m.",
            ),
        ),
        (
            Claim(
                "The slower the key encoder, the fresher the oldest keys",
                f"argued, no figure ({V1}, section 3.2)",
                ("queue, m = 0.999", {"mechanism": "moco", "m": 0.999}),
                ("queue, m = 0.9", {"mechanism": "moco", "m": 0.9}),
                ("cosine",),
            ),
            Claim(
                "A queue's oldest keys are fresher than a bank's",
                f"argued, no figure ({V1}, sections 3.2 and 4.1)",
                ("queue, m = 0.99", {"mechanism": "moco", "m": 0.99}),
                ("bank", {"mechanism": "memory_bank"}),
                ("cosine",),
            ),
        ),
    ),
    Section(
        "temperature",
        "Which temperature, for which head?",
        "The linear head is MoCo v1's, the MLP v2's. Either is thrown away after training; the features are read below it.",
        (("temperature", evidence.accuracy_against_temperature, "Accuracy against tau for both heads, and the table of v2."),),
        (
            Claim(
                "With an MLP head the features are better",
                f"66.2 and 59.0 with tau = 0.2, linear ({V2}, “MLP head”)",
                ("MLP, tau = 0.2", {"head": "mlp", "temperature": 0.2}),
                ("linear head, tau = 0.2", {"head": "linear", "temperature": 0.2}),
            ),
            Claim(
                "An MLP head wants a higher temperature",
                f"66.2 with tau = 0.2, 62.9 with 0.07, linear ({V2}, “MLP head”)",
                ("MLP, tau = 0.2", {"head": "mlp", "temperature": 0.2}),
                ("MLP, tau = 0.07", {"head": "mlp", "temperature": 0.07}),
            ),
            Claim(
                "A linear head wants a low temperature",
                f"60.6 with tau = 0.07, 59.0 with 0.2, linear ({V2}, “MLP head”)",
                ("linear head, tau = 0.07", {"head": "linear", "temperature": 0.07}),
                ("linear head, tau = 0.2", {"head": "linear", "temperature": 0.2}),
            ),
        ),
        "An MLP has to be learned too, here in {steps:,} steps and there in a million; and its hidden layer is as wide as the "
        "features, there 2,048.",
    ),
    Section(
        "shuffling_bn",
        "Does BatchNorm leak?",
        "If BatchNorm takes its statistics over parts of a batch, as on several GPUs, a query can tell its own key by the "
        "statistics they share. Shuffling the keys between the parts takes that hint away. One machine can show it.",
        (
            (
                "shuffling_bn",
                evidence.shuffling_bn,
                "For each way to normalise, how often the own key is found, and the kNN accuracy.",
            ),
        ),
        (
            Claim(
                "Without shuffling, queries find their keys more easily",
                f"over 99.9 % without shuffling ({V1}, appendix A.9)",
                ("32 parts", {"norm": "split:32", "shuffle": False}),
                ("32 parts, shuffled", {"norm": "split:32", "shuffle": True}),
                ("pretext",),
            ),
            Claim(
                "Without shuffling, the features are worse",
                f"kNN falls soon ({V1}, Figure A.1)",
                ("32 parts, shuffled", {"norm": "split:32", "shuffle": True}),
                ("32 parts", {"norm": "split:32", "shuffle": False}),
                ("kNN", "linear"),
            ),
        ),
        "The leak is something that has to be found and then exploited; the paper's curves part over 80 epochs, and here there "
        "are {epochs}.",
    ),
    Section(
        "symmetric",
        "Should each view be query and key?",
        "A symmetric step has twice the queries for twice the compute. So it is compared twice.",
        (("symmetric", evidence.symmetric, "Bars of kNN and linear accuracy, asymmetric and symmetric."),),
        (
            Claim(
                "At equal epochs symmetric is better",
                f"85.3 and 82.6 after 200 epochs, kNN, {NOTEBOOK}",
                ("symmetric", {"symmetric": True}),
                ("asymmetric", {"symmetric": False, "note": None}),
                ("kNN", "linear"),
            ),
            Claim(
                "At equal compute asymmetric is better",
                f"86.3 after 400 epochs, 85.3 symmetric after 200, kNN, {NOTEBOOK}",
                ("asymmetric, twice the epochs", {"symmetric": False, "note": "the compute of the symmetric run"}),
                ("symmetric", {"symmetric": True}),
                ("kNN", "linear"),
            ),
        ),
    ),
    Section(
        "loss",
        "InfoNCE or NCE?",
        "InfoNCE asks which of K + 1 keys is the query's. NCE asks of each key by itself whether it is.",
        (("loss", evidence.losses, "Bars of kNN and linear accuracy for both losses, with a queue and with a bank."),),
        (
            Claim(
                "InfoNCE is better for MoCo",
                "about 2 points, linear ([HobbitLong/CMC#23](https://github.com/HobbitLong/CMC/issues/23))",
                ("InfoNCE", {"mechanism": "moco", "loss": "info_nce"}),
                ("NCE", {"mechanism": "moco", "loss": "nce"}),
            ),
            Claim(
                "InfoNCE is better for a memory bank",
                f"58.0 with InfoNCE and K = 65,536, 54.3 with NCE and K = 4,096, linear ({V1}, footnote 2)",
                ("InfoNCE", {"mechanism": "memory_bank", "loss": "info_nce"}),
                ("NCE", {"mechanism": "memory_bank", "loss": "nce"}),
            ),
        ),
    ),
    Section(
        "data_size",
        "Do more images help?",
        "The paper went from a million curated images to a billion of Instagram's. In small: a tenth of the images, and a "
        "draw in which the last class has a hundredth of the first one's, each with as many images seen.",
        (("data_size", evidence.data_size, "Bars of accuracy: all images, a tenth of them, a long-tailed draw."),),
        (
            Claim(
                "More different images help",
                f"55.9 from ImageNet-1M, 57.2 from Instagram-1B, detection AP on VOC ({V1}, Table 2)",
                ("all images", {"share": 1.0, "long_tail": False}),
                ("a tenth", {"share": 0.1}),
            ),
        ),
    ),
    Section(
        "cost",
        "What do the mechanisms cost?",
        "Memory is what the steps took beyond what the process held before them, each measured in a process of its own. The "
        "dictionary is in what it held before; its size follows from a formula, which the count confirms.",
        (
            (
                "cost",
                evidence.cost,
                "Memory and time of a step against batch and K; end-to-end rises with K because its batch does.",
            ),
        ),
        (
            Claim(
                "At the same batch a step of end-to-end costs more",
                f"7.4 and 5.0 GB a GPU, 65 and 53 hours, batch 256 ({V2}, Table 3)",
                ("end-to-end, batch 256", {"mechanism": "end_to_end", "batch_size": 256}),
                ("MoCo, batch 256, K = 4,096", {"mechanism": "moco", "batch_size": 256, "K": 4096}),
                ("memory", "time"),
            ),
            Claim(
                "A large K costs end-to-end its memory; a queue has four times as many keys for less",
                f"93 GB a GPU at batch 4,096 (an estimate), 5.0 GB with a queue ({V2}, Table 3)",
                ("end-to-end, K = 1,023", {"mechanism": "end_to_end", "batch_size": 1024}),
                ("MoCo, batch 256, K = 4,096", {"mechanism": "moco", "batch_size": 256, "K": 4096}),
                ("memory",),
            ),
        ),
    ),
)
