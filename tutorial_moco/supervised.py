"""Training with labels: the ceiling that the mechanisms are measured against, and fine-tuning."""

import math
import sys
import time
from itertools import islice

import torch
import torch.nn.functional as F
from sklearn.pipeline import Pipeline
from torch import nn
from tqdm.auto import tqdm

from tutorial_moco import speed
from tutorial_moco.augment import AUGMENTATIONS, random_view
from tutorial_moco.errors import UsageError
from tutorial_moco.evaluate import extract_features
from tutorial_moco.images import ImageSet
from tutorial_moco.pretrain import batches, build_optimizer, check, set_learning_rate
from tutorial_moco.recipes import Recipe


def classifier(backbone: nn.Module, feature_dim: int, classes: int) -> nn.Sequential:
    """The backbone and a linear layer: images (B, 3, H, W) to logits (B, classes)."""
    return nn.Sequential(backbone, nn.Linear(feature_dim, classes).to(next(backbone.parameters()).device))


@torch.no_grad()
def begin_with_probe(layer: nn.Linear, probe: Pipeline) -> None:
    """Give a layer (D, classes) the logits of a `linear_probe`, its standardising folded in."""
    scaler, regression = probe[0], probe[-1]
    weight = torch.from_numpy(regression.coef_ / scaler.scale_)
    bias = torch.from_numpy(regression.intercept_) - weight @ torch.from_numpy(scaler.mean_)
    if len(weight) == 1:  # of two classes scikit-learn keeps the odds alone
        weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)


def train_classifier(
    net: nn.Sequential, recipe: Recipe, train: ImageSet, dtype: torch.dtype, *, progress: bool = False
) -> tuple[list[dict[str, float]], float]:
    """Train a `classifier` by cross-entropy, with the batches, views, optimizer and schedule that pre-training has.

    Args:
        net: on the device where it is to be trained. recipe: its batch size, epochs, optimizer and first view serve.

    Returns:
        A point of the loss curve for each step, and seconds of training.

    Raises:
        UsageError: fewer images than a batch; the loss is not finite, and then the weights are those before that step.
    """
    check(recipe.replace(mechanism="moco"), len(train), None)  # a memory bank's K may be more than a few labelled images
    speed.keep_freed_memory()
    device, optimizer = next(net.parameters()).device, build_optimizer(recipe, net)
    images, labels = train.images.to(device), train.labels.to(device)
    total, curve, began = recipe.epochs * (len(train) // recipe.batch_size), [], time.perf_counter()
    steps = islice(batches(len(train), recipe, 0, device), total)
    for step, (epoch, index) in enumerate(tqdm(steps, "labels", total, disable=not progress, file=sys.stderr), 1):
        set_learning_rate(optimizer, recipe, (step - 1) / total)
        with speed.products_in(dtype):
            augmentation = AUGMENTATIONS[recipe.augmentation][0]
            view = random_view(images[index], index, augmentation, seed=recipe.seed, epoch=epoch, view=0)
            with speed.autocast(device, dtype):
                logits = net(view)
        loss = F.cross_entropy(logits.float(), labels[index])
        if not math.isfinite(loss.item()):
            raise UsageError(f"the loss is {loss.item()} at step {step}: try a lower --lr")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append({"step": step, "images_seen": step * recipe.batch_size, "loss": loss.item()})
    return curve, time.perf_counter() - began


def top1(net: nn.Module, test: ImageSet, dtype: torch.dtype) -> float:
    """Accuracy of a classifier's answers, in percent."""
    answers = extract_features(net, test.images, dtype=dtype).argmax(dim=1)
    return 100 * int((answers == test.labels).sum()) / len(test)
