"""What features are worth on other tasks: an encoder, pre-trained or fresh, is the start of another training.

The paper's point (section 4.2). Whatever the start, the task's recipe is the same, so that only the start is compared.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from tutorial_moco.annotated import Annotated
from tutorial_moco.augment import MEAN, STD, plain_view
from tutorial_moco.checkpoint import halved, load_checkpoint, pack, save_checkpoint, single, unpack
from tutorial_moco.dense import Batches, answers, fit
from tutorial_moco.detection import average_precision, build_detector
from tutorial_moco.encoders import build_encoder, reading
from tutorial_moco.errors import DataError
from tutorial_moco.evaluate import extract_features, linear_probe, linear_top1
from tutorial_moco.images import ImageSet
from tutorial_moco.pretrain import load_encoder
from tutorial_moco.randomness import permutation
from tutorial_moco.recipes import RECIPES, TRANSFORMER, Recipe
from tutorial_moco.results import find
from tutorial_moco.segmentation import Segmenter, mean_iou
from tutorial_moco.speed import choose_precision, default_device
from tutorial_moco.supervised import begin_with_probe, classifier, top1, train_classifier

FRESH = "none"  # in place of a checkpoint
VIEWS = {"shapes": "shapes", "digits": "none"}  # of fine-tuning, where not photographs': a mirrored digit is another sign
SEEN = 64  # batches that the BatchNorm of fresh weights sees
FEW = 5_000_003  # keeps the draw of labelled images apart from the orders of epochs
# How each task is trained at classroom scale: epochs for all images, batch, learning rate. How they were chosen: docs/LOG.md.
SETTINGS = {"classify": (5, 64, 0.1), "detect": (8, 8, 0.02), "keypoints": (8, 8, 0.02), "segment": (16, 8, 0.2)}


@dataclass(frozen=True)
class Start:
    """An encoder to start from: its backbone, the length of its features, and the recipe it was made by.

    ``mean`` and ``std`` are those of the images as it takes them.
    """

    name: str
    backbone: nn.Module
    feature_dim: int
    recipe: Recipe
    steps: int = 0  # it was trained
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD


def load_start(checkpoint: str | Path, images: Tensor, *, encoder: str = "small", seed: int = 0) -> Start:
    """The query encoder of a checkpoint, or a fresh one.

    Args:
        checkpoint: the file of a run, or ``none``. images: float32 (n, 3, H, W), normalised, for a fresh encoder's first layer.
        encoder: which, if fresh; a checkpoint knows its own. seed: of the fresh weights. Their BatchNorm then sees the images,
            as any trained one's has: else frozen features would be of another scale at each layer.

    Raises:
        DataError: the file is missing, damaged or no checkpoint.
    """
    if str(checkpoint) == FRESH:
        recipe = RECIPES["small"].replace(encoder=encoder, seed=seed)
        torch.manual_seed(seed)
        made = build_encoder(encoder, images=images)
        with torch.no_grad():
            for part in islice(cycle(images.split(128)), SEEN):
                made(part)
        return Start(FRESH, made.backbone, made.feature_dim, recipe)
    made, recipe, state = load_encoder(Path(checkpoint))
    return Start(str(checkpoint), made.backbone, made.feature_dim, recipe, state["step"], state["mean"], state["std"])


# Classification ------------------------------------------------------------------------------------------------------


def few_labels(labels: Tensor, share: float, seed: int) -> Tensor:
    """The numbers of a share of the images, int64 (n',): the same share of each class, at least one; drawn by the seed."""
    order = permutation(len(labels), seed, FEW)
    members = [order[labels[order] == c] for c in range(int(labels.max()) + 1)]
    return torch.cat([own[: max(1, round(share * len(own)))] for own in members]).sort().values


def classify(
    start: Start,
    train: ImageSet,
    test: ImageSet,
    *,
    share: float = 1.0,
    how: Literal["linear", "fine_tuned"] = "linear",
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, object]:
    """Classify with a share of the labels: a linear classifier on frozen features, or the whole encoder trained on.

    Fine-tuning begins with the linear classifier that was found on the frozen features: from a random layer the first steps
    would spoil them (arXiv 2202.10054). BatchNorm's statistics are taken anew before that: by those of other images some
    features hardly vary, the classifier makes up for it with huge weights, and the first steps explode. Fresh weights have no
    classifier worth beginning with. Fewer images are seen more often, ``epochs / sqrt(share)`` times, since they need fewer
    steps but not so few.

    Args:
        share: of the training images, in (0, 1]. epochs, batch_size, lr: of fine-tuning; ``SETTINGS`` if None.

    Returns:
        ``labels``, the number of images; ``linear_top1`` or ``fine_tuned_top1`` in percent; ``seconds`` of fine-tuning.
    """
    part = train if share == 1 else train.take(few_labels(train.labels, share, seed))
    device = default_device()
    backbone = reading(deepcopy(start.backbone).to(device), start.mean, start.std)
    if how == "linear":
        known, asked = (extract_features(backbone, images.images) for images in (part, test))
        return {"labels": len(part), "linear_top1": linear_top1(known, part.labels, asked, test.labels)}
    usual = SETTINGS["classify"]
    passes, batch = round((epochs or usual[0]) / share**0.5), min(batch_size or usual[1], len(part))
    views = VIEWS.get(train.name, "small")  # of the task, whatever the start was trained on
    usually = TRANSFORMER if start.recipe.encoder.startswith("vit") else {"lr": usual[2], "warmup": 0.1}
    how = {"epochs": passes, "batch_size": batch, "seed": seed, "augmentation": views, **usually, **({"lr": lr} if lr else {})}
    recipe = Recipe(encoder=start.recipe.encoder, **how)  # of the start only what it is, not how it was trained
    torch.manual_seed(seed)
    net = classifier(backbone, start.feature_dim, len(train.classes))
    if start.steps:
        update_bn((plain_view(few).to(device) for few in part.images.tensor_split(math.ceil(len(part) / 256))), backbone)
        begin_with_probe(net[1], linear_probe(extract_features(backbone, part.images), part.labels))
    net.train()
    dtype = choose_precision(net, plain_view(train.images[:128]).to(device))
    _, seconds = train_classifier(net, recipe, part, dtype, progress=progress)
    return {"labels": len(part), "fine_tuned_top1": top1(net, test, dtype), "seconds": round(seconds, 1)}


# Detection, keypoints, segmentation ----------------------------------------------------------------------------------


@dataclass
class Trained:
    """A model of a dense task, what it reached, and how long that took."""

    model: nn.Module
    how: dict[str, object]  # it was built, for `load_trained`
    result: dict[str, float]
    seconds: float
    dtype: torch.dtype


def build(backbone: nn.Module, task: str, classes: int, *, kind: str = "", **how) -> nn.Module:
    """A fresh model of a dense task around a copy of the backbone: `detection.build_detector` or `segmentation.Segmenter`."""
    if task == "segment":
        return Segmenter(backbone, classes, **how)
    return build_detector(backbone, kind, classes, **how)


def save_trained(path: Path, trained: Trained, facts: dict[str, object], *, half: bool = False) -> None:
    """Write a model, how it was built and the facts; ``half``: its matrices in float16."""
    tensors = pack(model=trained.model)
    save_checkpoint(path, halved(tensors) if half else tensors, {**facts, "how": trained.how, "result": trained.result})


def shipped(name: str) -> Path:
    """Where a model of the chapter is: ``detect-moco``, ``detect-untrained``, ``segment-moco``, …

    Raises:
        DataError: there is none of that name.
    """
    return find(f"{name}.safetensors", "transfer")


def load_trained(path: Path) -> tuple[nn.Module, dict[str, object]]:
    """The model that `save_trained` wrote, in eval mode, float32, on the CPU; and its facts.

    Raises:
        DataError: the file is missing or damaged, or holds no such model.
    """
    tensors, facts = load_checkpoint(path)
    if "how" not in facts:
        raise DataError(f"{path} holds no model of a dense task: give one that transfer wrote")
    how = dict(facts["how"])
    model = build(build_encoder(how.pop("encoder"), norm=how.pop("norm", "batch")).backbone, **how)
    unpack(single(tensors), model=model)
    return model.eval(), facts


def dense(
    start: Start,
    task: Literal["detect", "keypoints", "segment"],
    train: Annotated,
    test: Annotated,
    *,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    neck: Literal["fpn", "c4"] = "fpn",
    image_size: int | None = None,
    frozen: bool = False,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    keep: Callable[[Trained], None] = lambda trained: None,
    progress: bool = True,
) -> Trained:
    """Train a detector or a segmenter from this start, and judge it on all test images.

    Args:
        task: ``detect`` (boxes, and masks where the data has them), ``keypoints`` (and boxes) or ``segment``.
        epochs, batch_size, lr: ``SETTINGS`` if None. dtype: number format of the layers; measured and chosen if None.
        keep: is given the trained model before it is judged, so that nothing that fails then can lose it.
        Others as for `detection.build_detector`.

    Returns:
        with ``ap_boxes``, ``ap50_boxes``, ``ap75_boxes``, and so for masks and keypoints; or ``miou``; in percent.
    """
    usual = SETTINGS[task]
    epochs, batch_size, lr = epochs or usual[0], batch_size or usual[1], lr or usual[2]
    kinds = {"detect": ["boxes", "masks"] if train.has_masks else ["boxes"], "keypoints": ["boxes", "keypoints"], "segment": []}
    how = {"task": task, "classes": len(train.classes), "frozen": frozen, "image_size": image_size}
    how |= {"mean": start.mean, "std": start.std}
    if task != "segment":
        how |= {"kind": kinds[task][-1], "keypoints": len(train.keypoints), "neck": neck}
    torch.manual_seed(seed)
    model = build(start.backbone, **how)
    device = default_device()
    dtype = dtype or choose_precision(start.backbone.to(device), torch.zeros(batch_size, 3, 96, 96, device=device))
    seconds = fit(
        model, Batches(train, batch_size, seed), epochs=epochs, lr=lr, device=device, dtype=dtype, title=task, progress=progress
    )
    encoder = {"encoder": start.recipe.encoder, "norm": start.recipe.norm}
    trained = Trained(model, encoder | how, {}, round(seconds, 1), dtype)
    keep(trained)
    pairs = answers(model, test, device=device, dtype=dtype, batch_size=batch_size, progress=progress)
    result = (
        {"miou": mean_iou(pairs, len(train.classes))} if task == "segment" else average_precision(pairs, kinds[task])
    )  # fmt: skip
    return replace(trained, result=result)
