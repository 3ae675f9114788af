"""What the study runs: an experiment is a function from a base recipe and the labels to its jobs. Nothing here trains."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tutorial_moco.errors import UsageError
from tutorial_moco.randomness import permutation
from tutorial_moco.recipes import RECIPES, TRANSFORMER, Recipe

BASES = {
    "small": RECIPES["small"],
    "tiny": RECIPES["small"].replace(encoder="tiny"),
    "resnet18": RECIPES["cifar10-resnet18"],  # the official notebook's
}
KS = (16, 64, 256, 1024, 4096, 16384)
END_TO_END_UP_TO = 1024  # the paper's end-to-end ended there too, for want of memory
DRIFT_K = 16384  # keys old enough to compare with the bank's
IMBALANCE = 100  # images of the first class for one of the last
DRAW = 1_000_003  # keeps the draw of images apart from the orders of epochs, which are functions of (seed, epoch)


@dataclass(frozen=True)
class Job:
    """One run of the study."""

    recipe: Recipe
    kind: Literal["pretrain", "masked", "check", "drift", "cost", "supervised", "untrained", "pixels"] = "pretrain"
    share: float = 1.0  # of the training images
    long_tail: bool = False
    note: str | None = None
    n: int = 0  # images it trains on: `plan` counts them
    experiment: str = ""  # `plan` names it

    def identity(self, data_hash: str) -> dict[str, object]:
        """What its row is known by beside the experiment: two jobs that agree in this are one training."""
        how = {"kind": self.kind, "n": self.n, "share": self.share, "long_tail": self.long_tail, "data_hash": data_hash}
        # An encoder that no mechanism trained is called by what it is.
        other = {"mechanism": self.kind} if self.kind in ("masked", "supervised", "untrained", "pixels") else {}
        return how | dataclasses.asdict(self.recipe) | other


def plan(base: Recipe, labels: Tensor, seeds: int, only: Sequence[str] = ()) -> list[Job]:
    """The jobs in the order they run: all experiments with seed 0, then with seed 1, so that a part is already a picture.

    Args:
        labels: int64 (n,), of the training images. only: names in ``EXPERIMENTS``; all if empty.
    """
    jobs = (
        dataclasses.replace(job, experiment=name, n=job.n or len(draw(labels, job)))
        for seed in range(seeds)
        for name in only or EXPERIMENTS
        for job in EXPERIMENTS[name](base.replace(seed=seed), labels)
    )
    return list(dict.fromkeys(jobs))  # of few images a bank has the same K twice


def chosen(only: str) -> list[str]:
    """Names of experiments, separated by commas."""
    names = [name.strip() for name in only.split(",") if name.strip()]
    for name in names:
        if name not in EXPERIMENTS:
            raise UsageError(f"--only {name} is not known: choose of {', '.join(EXPERIMENTS)}")
    return names


def draw(labels: Tensor, job: Job) -> Tensor:
    """The numbers of the images a job trains on, int64 (n',): all in order, or a draw that is a function of the seed.

    A long tail keeps all of class 0 and ever fewer of the next ones, on an exponential down to 1 in ``IMBALANCE``.
    """
    if job.share == 1 and not job.long_tail:
        return torch.arange(len(labels))
    order = permutation(len(labels), job.recipe.seed, DRAW)
    if job.long_tail:
        counts = labels.bincount()
        tail = IMBALANCE ** -torch.linspace(0, 1, len(counts), dtype=torch.float64)
        members = [order[labels[order] == c][: max(1, round(float(counts[c] * tail[c])))] for c in range(len(counts))]
        return torch.cat(members)
    return order[: round(job.share * len(labels))]


def with_mechanism(base: Recipe, mechanism: str, n: int, **changes) -> Recipe:
    """The base recipe with another mechanism for n images, without MoCo's options.

    A split BatchNorm that was shuffled falls away with them, since it leaks unless shuffled. A memory bank has no more
    than n - 1 negatives to give.
    """
    recipe = base.replace(**changes)
    if mechanism == "moco":
        return recipe
    K = min(recipe.K, n - 1) if mechanism == "memory_bank" else recipe.K
    norm = "batch" if recipe.shuffle else recipe.norm
    return recipe.replace(mechanism=mechanism, K=K, norm=norm, shuffle=False, symmetric=False)


def version_3(base: Recipe, n: int, **changes) -> Recipe:
    """MoCo v3 with the base recipe's rest."""
    return with_mechanism(base, "moco_v3", n, head="mlp3", temperature=0.2, augmentation="v3", **changes)


# The experiments -----------------------------------------------------------------------------------------------------


def negatives(base: Recipe, labels: Tensor) -> list[Job]:
    """Figure 3. End-to-end takes its negatives from the batch, so its K decides the batch, and that the learning rate."""
    n = len(labels)
    kept = [Job(with_mechanism(base, mechanism, n, K=K)) for mechanism in ("moco", "memory_bank") for K in KS]
    note = "batch of K + 1, learning rate scaled linearly with the batch"
    in_batch = [
        Job(with_mechanism(base, "end_to_end", n, K=K, batch_size=K + 1, lr=base.lr * (K + 1) / base.batch_size), note=note)
        for K in KS
        if K <= END_TO_END_UP_TO
    ]
    return kept + in_batch


def momentum(base: Recipe, labels: Tensor) -> list[Job]:
    """From a key encoder that is the encoder (0) to one that never learns (1)."""
    return [Job(base.replace(m=m)) for m in (0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 1.0)]


def temperature(base: Recipe, labels: Tensor) -> list[Job]:
    """tau, with the head of MoCo v1 and that of v2."""
    taus = (0.05, 0.07, 0.1, 0.2, 0.3, 0.5)
    return [Job(base.replace(temperature=tau, head=head)) for head in ("linear", "mlp") for tau in taus]


def shuffling_bn(base: Recipe, labels: Tensor) -> list[Job]:
    """Statistics of the whole batch, of parts (they leak), of shuffled parts, and none of other images.

    The parts are small, 4 images of the batch of 128 that the small encoder has: the fewer images share their statistics, the
    sooner the leak is found, and our trainings are short.
    """
    norms = (("batch", False), ("split:32", False), ("split:32", True), ("group", False))
    return [Job(base.replace(norm=norm, shuffle=shuffle)) for norm, shuffle in norms]


def symmetric(base: Recipe, labels: Tensor) -> list[Job]:
    """A symmetric step encodes twice as much: the third has its compute, the first its epochs."""
    return [
        Job(base.replace(symmetric=False)),
        Job(base.replace(symmetric=True)),
        Job(base.replace(symmetric=False, epochs=2 * base.epochs), note="the compute of the symmetric run"),
    ]


def reference(base: Recipe, labels: Tensor) -> list[Job]:
    """The official notebook's two trainings, whose curve is known; of its encoder only."""
    return [Job(base), Job(base.replace(symmetric=True))] if base.encoder == "resnet18" else []


def losses(base: Recipe, labels: Tensor) -> list[Job]:
    """InfoNCE and NCE, each with a queue and with a bank."""
    mechanisms = ("moco", "memory_bank")
    return [Job(with_mechanism(base, name, len(labels), loss=loss)) for name in mechanisms for loss in ("info_nce", "nce")]


def data_size(base: Recipe, labels: Tensor) -> list[Job]:
    """The paper's question of 1M against 1B images, in small: as many images seen, from fewer different ones."""

    def as_many_seen(job: Job) -> Job:
        steps = base.epochs * (len(labels) // base.batch_size)
        epochs = round(steps / max(1, len(draw(labels, job)) // base.batch_size))
        return dataclasses.replace(job, recipe=base.replace(epochs=epochs))

    return [Job(base), as_many_seen(Job(base, share=0.1)), as_many_seen(Job(base, long_tail=True))]


def cost(base: Recipe, labels: Tensor) -> list[Job]:
    """Memory and time of a step; trains nothing to speak of."""
    n, batches = len(labels), (64, 256, 1024)
    kept = [
        Job(with_mechanism(base, mechanism, n, batch_size=batch, K=K), "cost")
        for mechanism in ("moco", "memory_bank")
        for batch in batches
        for K in (256, 4096, 65536)
    ]
    return kept + [Job(with_mechanism(base, "end_to_end", n, batch_size=batch, K=batch - 1), "cost") for batch in batches]


def drift(base: Recipe, labels: Tensor) -> list[Job]:
    """Queues long enough for old keys, beside the bank."""
    recipes = [base.replace(m=m, K=DRIFT_K) for m in (0.9, 0.99, 0.999)] + [with_mechanism(base, "memory_bank", len(labels))]
    return [Job(recipe, "drift", note="stopped half-way, at half the learning rate") for recipe in recipes]


def ceilings(base: Recipe, labels: Tensor) -> list[Job]:
    """What the encoder reaches with labels, and what it is worth untrained and without it."""
    pixels = [Job(base, "pixels")] if base.seed == 0 else []  # no chance is in them
    return [Job(base, "supervised"), Job(base, "untrained"), *pixels]


def versions(base: Recipe, labels: Tensor) -> list[Job]:
    """From v1 to v2, a switch at a time as in the v2 paper's table; then its kin; then v3's transformer and a painter.

    v1's crops and colours with the small recipe's rest; v2's temperature comes with its head, as there.
    """
    v1 = base.replace(augmentation="v1", schedule="steps")
    mlp = {"head": "mlp", "temperature": 0.2}
    v2 = v1.replace(augmentation="v2", schedule="cosine", **mlp)
    n = len(labels)
    v3 = version_3(base, n)
    v3_vit, v3_vit_learned = (version_3(base, n, encoder=name, **TRANSFORMER) for name in ("vit", "vit-learned"))
    return [
        Job(v1), Job(v1.replace(**mlp)), Job(v1.replace(augmentation="v2")), Job(v1.replace(augmentation="v2", **mlp)), Job(v2),
        Job(v2.replace(epochs=4 * base.epochs)), Job(with_mechanism(v2, "simclr", n)), Job(v3), Job(v3_vit),
        Job(v3_vit_learned), Job(v3_vit_learned, "masked"), Job(v3_vit, "untrained"), Job(v3_vit, "supervised"),
    ]  # fmt: skip


def check(base: Recipe, labels: Tensor) -> list[Job]:
    """Seconds on drawn images, for a test that runs it again; always the same, whatever the study is of."""
    from tutorial_moco.images import SHAPES

    return [Job(RECIPES["shapes"].replace(epochs=2), "check", n=SHAPES["train"][0])] if base.seed == 0 else []


EXPERIMENTS: dict[str, Callable[[Recipe, Tensor], list[Job]]] = {
    "check": check,
    "reference": reference,
    "K": negatives,
    "m": momentum,
    "temperature": temperature,
    "shuffling_bn": shuffling_bn,
    "symmetric": symmetric,
    "loss": losses,
    "data_size": data_size,
    "cost": cost,
    "drift": drift,
    "ceilings": ceilings,
    "versions": versions,
}
