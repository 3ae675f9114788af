"""MoCo with one thing wrong: each a small, clearly named change of the real code, trained for some seconds by the real loop.

For the loss doctor (a symptom people report, produced) and the break-it bench (curves of a secret breakage; which is it?).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from torch import Tensor

from tutorial_moco import pretrain as training
from tutorial_moco.images import ImageSet
from tutorial_moco.losses import contrastive_logits, info_nce
from tutorial_moco.mechanisms import Contrast, MoCo
from tutorial_moco.randomness import hash_words, permutation
from tutorial_moco.recipes import RECIPES, Recipe

EPOCHS, MONITOR = 4, 4  # of a small run, and how many times its kNN is taken


@dataclass(frozen=True)
class Breakage:
    """One thing wrong with MoCo: other settings, another mechanism, or another loss.

    Attributes:
        title: what is wrong, in a few words. why: what the curves show, and why.
        changes: fields of the recipe.
    """

    title: str
    why: str
    changes: dict[str, object] = field(default_factory=dict)
    mechanism: type[MoCo] = MoCo
    loss: Callable[..., Tensor] = info_nce


# What can go wrong ---------------------------------------------------------------------------------------------------


class EnqueuesFirst(MoCo):
    """Keys are enqueued before the logits are taken, so each query meets its own key among the negatives."""

    def contrast(self, view_q: Tensor, view_k: Tensor, index: Tensor) -> Contrast:
        q, k = self.encoder(view_q), self.encode_keys(view_k)
        self.enqueue(k)
        return Contrast(q, k, self.queue)

    def update_dictionary(self, contrast: Contrast, index: Tensor) -> None:
        pass  # done above, too early


class QueueWithoutLength(MoCo):
    """The first queue is random numbers that nobody has normalised: vectors of length sqrt(C), not 1."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.queue.mul_(math.sqrt(self.queue.shape[1]))


class PointerStays(MoCo):
    """The pointer is set back to 0 after each step: only the first N places of the queue are ever renewed."""

    def enqueue(self, keys: Tensor) -> None:
        super().enqueue(keys)
        self.pointer.zero_()


class KeysStayShuffled(MoCo):
    """Shuffling BN without the un-shuffling: a query's "own" key is another image's."""

    @torch.no_grad()
    def encode_keys(self, view: Tensor) -> Tensor:
        order = permutation(len(view), self.seed, int(self.steps), device=view.device)
        return self.key_encoder(view[order])


def temperature_multiplied(
    q: Tensor, k: Tensor, negatives: Tensor, temperature: float, exclude: Tensor | None = None
) -> Tensor:
    """InfoNCE of logits that are multiplied by tau where they should be divided."""
    return info_nce(q, k, negatives, 1 / temperature, exclude)


def exponentials_by_hand(q: Tensor, k: Tensor, negatives: Tensor, temperature: float, exclude=None) -> Tensor:
    """InfoNCE as the formula is printed: exp() of a large logit is infinite in float32, and infinite / infinite is nan."""
    e = contrastive_logits(q, k, negatives, temperature, exclude).exp()
    return -(e[:, 0] / e.sum(dim=1)).log().mean()


HEALTHY = Breakage(
    "nothing is broken", "The queue fills, and the loss rises with it; then it falls, and the features get better."
)

BREAKAGES: dict[str, Breakage] = {
    "m is 0": Breakage(
        "m is 0",
        "The key encoder jumps with every step. At first the date alone gives the own key away: it is the only fresh one. "
        "From then on the keys of the queue come from encoders that differ, and what a query learns to compare is out of date "
        "at the next step. Few own keys are found, the loss stays high, the kNN low.",
        {"m": 0.0},
    ),
    "enqueued first": Breakage(
        "enqueued first",
        "Each query meets its own key twice, in column 0 and in the queue. So there is no easy start: real keys are in the "
        "queue at the first step. The two share the softmax, so the loss cannot go under log 2; they are equal, so that the "
        "pretext accuracy is a matter of rounding. While the loss is far above log 2 the features hardly suffer: a quiet one.",
        mechanism=EnqueuesFirst,
    ),
    "tau multiplied": Breakage(
        "tau multiplied",
        "Logits lie between -tau and tau, so the softmax is flat whatever the encoder does, and the loss creeps down from "
        "log(K + 1) by hardly anything. What gradient there is pushes all negatives alike.",
        loss=temperature_multiplied,
    ),
    "pointer stays at 0": Breakage(
        "pointer stays at 0",
        "All but one batch of the queue stay the random vectors they were at the start, which are easily told from images. "
        "The real negatives are those of one batch: the loss goes no higher than log(batch + 1), and is low throughout.",
        mechanism=PointerStays,
    ),
    "no augmentation": Breakage(
        "no augmentation",
        "Query and key are the same picture. To find it among others takes no more than to compare pixels: the loss falls to "
        "nearly 0, the pretext accuracy is 100 %, and the kNN stays low, for there is no reason to learn what a picture shows.",
        {"augmentation": "none"},
    ),
    "keys stay shuffled": Breakage(
        "keys stay shuffled",
        "The key in column 0 is another image's. That question has no answer, and the best one can do is to call all keys "
        "equally similar: the loss climbs to log(K + 1), and the features get worse with every epoch.",
        {"shuffle": True},
        mechanism=KeysStayShuffled,
    ),
}
"""The bench's menu: what a secret run may have wrong, by its title."""

SYMPTOMS: dict[str, Breakage] = {
    "the loss rises first": Breakage(
        "A longer queue, and nothing is broken",
        "The queue begins with random vectors, which are easy to tell from images. As real keys replace them the task gets "
        "harder: the loss rises and the pretext accuracy falls until the queue is full. Only then can one read the curve.",
        {"K": 1024},
    ),
    "stuck at log(K + 1)": Breakage(
        "The first queue was not normalised",
        "Random vectors of length sqrt(C) have similarities far beyond 1 with every query, and the loss begins very high. The "
        "quickest way down is one direction for all images, away from them: the encoder collapses, and stays collapsed.",
        mechanism=QueueWithoutLength,
    ),
    "never below 0.69": Breakage(
        "Enqueued before the logits, on an easy task (no augmentation)",
        "Each query meets its own key twice, in column 0 and in the queue. At best the two share the softmax half and half.",
        {"augmentation": "none"},
        mechanism=EnqueuesFirst,
    ),
    "flat, just below log(K + 1)": BREAKAGES["tau multiplied"],
    "the loss is nan": Breakage(
        "exp() by hand, at a low temperature",
        "exp(cosine / 0.01) is infinite in float32 from a cosine of 0.89 on. Cross-entropy subtracts"
        " the largest logit before it exponentiates.",
        {"temperature": 0.01},
        loss=exponentials_by_hand,
    ),
    "pretext up, kNN low": BREAKAGES["no augmentation"],
    "the loss stays high": BREAKAGES["m is 0"],
}
"""The doctor's cases: a symptom, and the small change that produces it."""


# Training with it ----------------------------------------------------------------------------------------------------


def bench_recipe(images: ImageSet) -> Recipe:
    """A tiny encoder, small batches, a short queue: a run of some thousand images takes seconds."""
    return RECIPES["shapes"].replace(augmentation="shapes" if images.name == "shapes" else "small", epochs=EPOCHS)


_done: dict[tuple, training.Run] = {}  # a run that was trained once is not trained again while the notebook is open


def train(breakage: Breakage, images: ImageSet, test: ImageSet, *, progress: bool = True) -> training.Run:
    """Train the bench's recipe with a breakage, by the package's own loop; the second time at once, from memory.

    Raises:
        UsageError: the loss is not finite any more.
    """
    settings = tuple(sorted(breakage.changes.items()))
    key = (settings, breakage.mechanism, breakage.loss, images.hash, test.hash)
    if key not in _done:
        recipe = bench_recipe(images).replace(**breakage.changes)
        with patch.multiple(training, MoCo=breakage.mechanism, info_nce=breakage.loss):
            _done[key] = training.pretrain(recipe, images, test, monitor=MONITOR, dtype=torch.float32, progress=progress)
    return _done[key]


def secret(number: int) -> Breakage:
    """The breakage that belongs to a secret number; the same number is always the same one."""
    return list(BREAKAGES.values())[int(hash_words(number)) % len(BREAKAGES)]


def verdict(number: int, guess: str) -> str:
    """Whether a guess, a title in ``BREAKAGES``, is right, and why the curves look as they do."""
    if guess not in BREAKAGES:
        return f"{guess!r} is not on the menu: choose one of {', '.join(BREAKAGES)}"
    broken = secret(number)
    opening = "Right" if guess == broken.title else f"Not {guess!r}"
    return f"{opening}: {broken.title}. {broken.why}"
