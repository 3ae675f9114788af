"""What detection and segmentation share: an encoder's layers as a trunk, views of annotated images, and a training loop.

Shapes: H x W pixels of an image, k objects in it. A target is torchvision's: ``boxes`` (k, 4), ``labels`` (k,), …
"""

import copy
import math
import re
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from tutorial_moco.encoders import SmallBackbone
from tutorial_moco.errors import DataError, UsageError
from tutorial_moco.randomness import permutation, uniform
from tutorial_moco.speed import autocast, keep_freed_memory

CROWD, DIFFICULT = 1, 2  # objects that are not judged, of COCO and of VOC
MIRROR_DRAW = 7_000_003  # keeps the draw of mirror images apart from other numbers of the same seed


# The encoder as a trunk ----------------------------------------------------------------------------------------------


def trunk(backbone: nn.Module) -> tuple[nn.Sequential, OrderedDict[str, tuple[int, int]]]:
    """A copy of the backbone's layers, one after the other and without pooling at the end; and what its stages give.

    Args:
        backbone: `SmallBackbone` or torchvision's ResNet.

    Returns:
        The layers by name, and for each stage, from fine to coarse, its channels and its stride in pixels.

    Raises:
        UsageError: another kind of network, which has no such maps.
    """
    if isinstance(backbone, SmallBackbone):
        stages = [(f"stage{number}", stage) for number, stage in enumerate(backbone.stages, 1)]
        layers = [("whitening", backbone.whitening), ("stem", backbone.stem), *stages]
    elif hasattr(backbone, "layer4"):
        stages = [(name, layer) for name, layer in backbone.named_children() if name.startswith("layer")]
        layers = [(name, layer) for name, layer in backbone.named_children() if name not in ("avgpool", "fc")]
    else:
        raise UsageError(f"{type(backbone).__name__} has no maps of several sizes: use tiny, small, wide or a ResNet")
    net = copy.deepcopy(nn.Sequential(OrderedDict(layers))).to(memory_format=torch.channels_last).train(backbone.training)
    return net, _sizes(net, [name for name, _ in stages])


@torch.no_grad()
def _sizes(net: nn.Sequential, stages: list[str]) -> OrderedDict[str, tuple[int, int]]:
    """Channels and stride of each stage, seen on a black image."""
    side, sizes, was_training = 64, OrderedDict(), net.training
    x = torch.zeros(1, 3, side, side, device=next(net.parameters()).device)
    net.eval()
    for name, layer in net.named_children():
        x = layer(x)
        if name in stages:
            sizes[name] = x.shape[1], round(side / x.shape[2])
    net.train(was_training)
    return sizes


def freeze(net: nn.Module) -> None:
    """No gradient, and BatchNorm keeps the statistics it has, whatever mode the model around it is in."""
    net.requires_grad_(False)
    for module in net.modules():
        module.train = lambda mode=True, module=module: module
        module.training = False


# Data ----------------------------------------------------------------------------------------------------------------


def mirrored(image: Tensor, target: dict[str, Tensor], other_side: Sequence[int] = ()) -> tuple[Tensor, dict[str, Tensor]]:
    """An image (3, H, W) and its target seen in a mirror, left for right.

    Args:
        other_side: for each keypoint the one that it becomes, as `mirror_order` gives it.
    """
    width, flipped = image.shape[-1], dict(target)
    for name in ("masks", "semantic"):
        if name in target:
            flipped[name] = target[name].flip(-1)
    if "boxes" in target:
        x0, y0, x1, y1 = target["boxes"].unbind(1)
        flipped["boxes"] = torch.stack([width - x1, y0, width - x0, y1], dim=1)
    if "keypoints" in target:
        points = target["keypoints"][:, list(other_side)]
        x, y, visible = points.unbind(2)
        flipped["keypoints"] = torch.stack([torch.where(visible > 0, width - x, x), y, visible], dim=2)
    return image.flip(-1), flipped


def mirror_order(names: Sequence[str]) -> list[int] | None:
    """For each keypoint the number of the one that it becomes in a mirror: of ``left_eye`` that of ``right_eye``.

    ``left`` and ``right``, or ``l`` and ``r``, count where they are words. None if a point of one side has no partner: then
    nobody knows what a mirror image should be called.
    """
    sides = {"left": "right", "right": "left", "l": "r", "r": "l"}
    words = [tuple(re.findall("[a-z0-9]+", re.sub("([a-z])([A-Z])", r"\1 \2", name).lower())) for name in names]
    partners = [tuple(sides.get(word, word) for word in name) for name in words]
    return [words.index(partner) for partner in partners] if set(partners) <= set(words) else None


class Batches:
    """Batches of an epoch, in an order and mirrored in a way that are functions of (seed, epoch); an odd rest is left out."""

    def __init__(self, data: Dataset, batch_size: int, seed: int):
        if len(data) < batch_size:
            raise UsageError(f"--batch-size must be at most the number of training images, {len(data)}, not {batch_size}")
        self.data, self.batch_size, self.seed, self.other_side = data, batch_size, seed, mirror_order(data.keypoints)
        if self.other_side is None:
            told = f"{data.name}: no mirror images, since the keypoints {', '.join(data.keypoints)} don't tell left from right"
            print(told, file=sys.stderr)

    def __len__(self) -> int:
        return len(self.data) // self.batch_size

    def epoch(self, number: int) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]:
        """Lists of uint8 images (3, H, W) and of their targets."""
        order = permutation(len(self.data), self.seed, number)[: len(self) * self.batch_size]
        flip = uniform(self.seed, number, MIRROR_DRAW, torch.arange(len(self.data))) < 0.5
        parts = order.view(-1, self.batch_size).tolist()
        loader = DataLoader(self.data, batch_sampler=parts, collate_fn=list, num_workers=0 if self.data.in_memory else 2)
        for part, examples in zip(parts, _read(loader), strict=True):
            pairs = [
                mirrored(*example, self.other_side) if flip[i] and self.other_side is not None else example
                for i, example in zip(part, examples, strict=True)
            ]
            yield [image for image, _ in pairs], [target for _, target in pairs]


def _read(loader: DataLoader) -> Iterator[list]:
    """Its batches; what is wrong with a file is told as it is, without the worker's traceback around it."""
    try:
        yield from loader
    except DataError as error:
        raise DataError(str(error).strip().splitlines()[-1].rpartition("DataError: ")[2]) from None


# Training ------------------------------------------------------------------------------------------------------------


def fit(
    model: nn.Module,
    batches: Batches,
    *,
    epochs: int,
    lr: float,
    device: torch.device,
    dtype: torch.dtype,
    weight_decay: float = 1e-4,
    title: str = "",
    progress: bool = True,
) -> float:
    """Train a model that, in training mode, returns a dictionary of losses for lists of images and targets.

    SGD with momentum 0.9; a short linear warm-up, then a cosine down to 0. Whatever has a gradient is trained.

    Returns:
        seconds of training.

    Raises:
        UsageError: the loss is not finite; the weights are those before that step.
    """
    keep_freed_memory()
    model.to(device).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=weight_decay, foreach=True)
    total = epochs * len(batches)
    warm_up, step, began = max(1, min(500, total // 10)), 0, time.perf_counter()
    with tqdm(total=total, desc=title, unit="step", disable=not progress, file=sys.stderr) as bar:
        for epoch in range(epochs):
            for images, targets in batches.epoch(epoch):
                optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / warm_up) * (1 + math.cos(math.pi * step / total)) / 2
                with autocast(device, dtype):
                    losses = model([i.to(device) / 255 for i in images], [_to(target, device) for target in targets])
                loss = sum(losses.values())
                if not math.isfinite(loss.item()):
                    raise UsageError(f"the loss is {loss.item()} at step {step + 1}: try a lower --lr")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                bar.update()
                if step % 10 == 0:
                    bar.set_postfix_str(f"loss {loss.item():.2f}", refresh=False)
    return time.perf_counter() - began


@torch.no_grad()
def answers(
    model: nn.Module, data: Dataset, *, device: torch.device, dtype: torch.dtype, batch_size: int = 16, progress: bool = True
) -> Iterator[tuple[dict, dict[str, Tensor]]]:
    """For each image of the data, in order, its target and what the model says of it, on the CPU."""
    model.to(device).eval()
    loader = DataLoader(data, batch_size=batch_size, collate_fn=list, num_workers=0 if data.in_memory else 2)
    for examples in tqdm(_read(loader), "evaluating", len(loader), disable=not progress, file=sys.stderr):
        with autocast(device, dtype):
            found = model([image.to(device) / 255 for image, _ in examples])
        for (_, target), answer in zip(examples, found, strict=True):
            yield target, _to(answer, torch.device("cpu"))


def _to(target: dict, device: torch.device) -> dict:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in target.items()}
