"""What a training will cost, told before it is begun: from shapes alone, nothing is computed."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tutorial_moco.encoders import Encoder, build_encoder, build_predictor
from tutorial_moco.errors import UsageError
from tutorial_moco.losses import LOGITS_AT_ONCE
from tutorial_moco.recipes import PUBLISHED, RECIPES, Recipe

# MoCo v1 with a ResNet-50: 53 h on 8 V100 for 200 epochs (arXiv 2003.04297, table 3) is 168 images a second on each.
V100 = 1_281_167 * 200 / (53 * 3600) / 8
IMAGES = {"imagenet": 1_281_167, "imagenet100": 126_689}  # to train on, by how a recipe's name begins
OTHERS = 50_000  # of CIFAR-10
BFLOAT16, FLOAT32 = 2, 4  # bytes
TIMES_FORWARD = {"moco": 4, "memory_bank": 3, "end_to_end": 6, "simclr": 6, "moco_v3": 8}  # a backward pass costs two
KEYS_SENT = {"moco": 1, "memory_bank": 1, "end_to_end": 3, "simclr": 6, "moco_v3": 2}  # of an image; a gradient back is two
VIEWS_KEPT = {"moco": 1, "memory_bank": 1, "end_to_end": 2, "simclr": 2, "moco_v3": 2}  # for the backward pass


@dataclass(frozen=True)
class Cost:
    """Of a training on W GPUs.

    Attributes:
        steps: of the whole training. hours: at ``images_per_second`` on each GPU.
        flops: of an image in a step, forward and backward, of both encoders.
        memory_bytes: of a GPU: weights, gradients, the optimizer's state, the dictionary, what the backward pass keeps, logits.
        sent_bytes: by a GPU in a step: gradients, by a ring, its keys, and the gradients of keys that are trained through.
        images_sent_bytes: what shuffling BN by sending the images would add.
    """

    steps: int
    hours: float
    images_per_second: float
    flops: float
    memory_bytes: float
    sent_bytes: float
    images_sent_bytes: float


def estimate(recipe: Recipe, n: int, gpus: int, images_per_second: float | None = None) -> Cost:
    """The cost of training on n images with W GPUs.

    Args:
        images_per_second: of one GPU; if None that of a V100 in the paper's training, in proportion to the work of an image.

    Raises:
        UsageError: the batch is not to be shared by so many.
    """
    if gpus < 1 or recipe.batch_size % (gpus * recipe.accumulate):
        raise UsageError(
            f"--gpus {gpus}: so many do not share a batch of {recipe.batch_size // recipe.accumulate}, take a divisor of it"
        )
    encoder, kept, forward = _encoder(recipe), *_of_an_image(recipe)
    views = 2 if recipe.symmetric else 1
    flops = views * TIMES_FORWARD[recipe.mechanism] * forward
    if images_per_second is None:
        images_per_second = V100 * TIMES_FORWARD["moco"] * _of_an_image(Recipe(encoder="resnet50", view_size=224))[1] / flops
    own = recipe.batch_size // (gpus * recipe.accumulate)
    trained, slow = _weights(recipe, encoder)
    states = {"sgd": 1, "lars": 1, "adamw": 2}[recipe.optimizer]
    keys = {"moco": recipe.K, "memory_bank": n}.get(recipe.mechanism, 0)
    of_batch = recipe.batch_size * (1 if recipe.mechanism == "end_to_end" else 2)  # both views are keys
    negatives = recipe.K if recipe.mechanism in ("moco", "memory_bank") else of_batch
    memory = FLOAT32 * ((2 + states) * trained + slow + keys * recipe.dim)
    rows = own * views * VIEWS_KEPT[recipe.mechanism]
    memory += rows * kept + 2 * FLOAT32 * min(rows * negatives, LOGITS_AT_ONCE)
    keys_sent = (gpus - 1) * own * recipe.accumulate * views * KEYS_SENT[recipe.mechanism]
    sent = FLOAT32 * (2 * (gpus - 1) / gpus * trained + keys_sent * recipe.dim)
    size = 3 * (recipe.view_size or 32) ** 2
    steps = recipe.epochs * (n // recipe.batch_size)
    hours = steps * recipe.batch_size / (images_per_second * gpus) / 3600
    images_sent = (gpus - 1) * own * recipe.accumulate * FLOAT32 * size
    return Cost(steps, hours, images_per_second, flops, memory, sent, images_sent)


def told(name: str, recipe: Recipe, gpus: int, n: int | None = None, images_per_second: float | None = None) -> list[str]:
    """The cost of a recipe that began as the one of this name, in lines for a person, and what does not go together in it."""
    n = n or IMAGES.get(name.partition("-")[0], OTHERS)
    cost, own = estimate(recipe, n, gpus, images_per_second), recipe.batch_size // gpus
    lines = [
        f"{name}: {recipe.mechanism} with {recipe.encoder}, {recipe.epochs} epochs of {n:,} images in batches of "
        f"{recipe.batch_size:,}, {own:,} on each of {gpus} GPUs: {cost.steps:,} steps",
    ]
    if published := PUBLISHED.get(name):
        reached = [
            f"{value} % {kind}" for value, kind in ((published.linear_top1, "linear"), (published.knn_top1, "kNN")) if value
        ]
        lines.append(f"published: {', '.join([*reached, *filter(None, [published.cost])])} ({published.source})")
        if published.otherwise:
            lines.append(f"otherwise there: {published.otherwise}")
    speed = (
        "as you say"
        if images_per_second
        else "a V100's in the MoCo papers, in proportion to the work; --images-per-second sets it"
    )
    duration = f"{cost.hours:,.1f} h" if cost.hours < 100 else f"{cost.hours / 24:,.1f} days"
    lines += [
        f"time: {duration} at {cost.images_per_second:,.0f} images/s on each ({speed})",
        f"memory: about {cost.memory_bytes / 2**30:,.1f} GiB on each, {cost.flops / 1e9:,.1f} GFLOP an image",
        f"sent by each in a step: {cost.sent_bytes / 2**20:,.1f} MiB of gradients and keys",
    ]
    if recipe.shuffle and gpus > 1:
        more = f"{cost.images_sent_bytes / 2**20:,.0f} MiB"
        lines[-1] += f"; shuffling BN by sending images, which the loader does without, would add {more}"
    return lines + [f"[WARN] {line}" for line in mismatches(name, recipe, n, gpus)]


def mismatches(name: str, recipe: Recipe, n: int, gpus: int) -> list[str]:
    """What does not go together in a recipe that began as the one of this name."""
    base, own, found = RECIPES[name], recipe.batch_size // (gpus * recipe.accumulate), []
    fitting = base.lr * recipe.batch_size / base.batch_size
    if recipe.optimizer == base.optimizer and not 0.5 <= recipe.lr / fitting <= 2:
        found.append(
            f"--lr {recipe.lr:g} with --batch-size {recipe.batch_size}: the recipe has {base.lr:g} with {base.batch_size}, "
            f"which in proportion (arXiv 1706.02677) is {fitting:.3g}"
        )
    if recipe.mechanism == "moco":
        if n < 2 * recipe.K:
            found.append(f"--K {recipe.K}: more than half of the {n:,} images, so a query meets old keys of its own image")
        if (moved := recipe.K / recipe.batch_size * (1 - recipe.m)) > 1:
            found.append(
                f"--K {recipe.K} with --batch-size {recipe.batch_size} and --m {recipe.m:g}: while a key is in the queue its "
                f"encoder is renewed {moved:.1f} times, so old keys are no match for new queries: a smaller K or an m nearer 1"
            )
        if recipe.shuffle and gpus == 1 and not recipe.norm.startswith("split"):
            found.append("--shuffle on one GPU does nothing without --norm split:8")
    if own < 16 and not recipe.encoder.startswith("vit"):
        found.append(f"{own} images on each GPU are few for BatchNorm's statistics: fewer GPUs, or a larger --batch-size")
    return found


def _encoder(recipe: Recipe) -> Encoder:
    with torch.device("meta"):  # shapes without numbers
        return build_encoder(recipe.encoder, head=recipe.head, dim=recipe.dim)


def _weights(recipe: Recipe, encoder: Encoder) -> tuple[int, int]:
    """How many are trained, and how many follow slowly."""
    count = _count(encoder)
    if recipe.mechanism == "moco_v3":
        return count + _count(build_predictor(encoder.dim, encoder.hidden)), count
    return {"moco": (count, count), "end_to_end": (2 * count, 0)}.get(recipe.mechanism, (count, 0))


def _count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def _of_an_image(recipe: Recipe) -> tuple[float, float]:
    """Of one view of an image: bytes that the backward pass needs again, in bfloat16, and operations of a forward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor.dim():
            held.append(tensor)  # so that no other gets its number
            kept[id(tensor)] = tensor.numel() * BFLOAT16
        return tensor

    held: list[torch.Tensor] = []
    encoder, B = _encoder(recipe), 8
    size = recipe.view_size or 32
    saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.device("meta"), saved, FlopCounterMode(display=False) as counter:
        encoder(torch.empty(B, 3, size, size))
    return sum(kept.values()) / B, counter.get_total_flops() / B
