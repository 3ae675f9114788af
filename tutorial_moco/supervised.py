"""Training with labels: the ceiling that the mechanisms are measured against, and fine-tuning."""

import torch
import torch.nn.functional as F
from sklearn.pipeline import Pipeline
from torch import Tensor, nn

from tutorial_moco import speed
from tutorial_moco.augment import AUGMENTATIONS, random_view
from tutorial_moco.evaluate import extract_features
from tutorial_moco.images import ImageSet
from tutorial_moco.pretrain import check, descend
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
    device, augmentation = next(net.parameters()).device, AUGMENTATIONS[recipe.augmentation][0]
    images, labels = train.images.to(device), train.labels.to(device)

    def loss_of(epoch: int, index: Tensor) -> Tensor:
        with speed.products_in(dtype):
            view = random_view(images[index], index, augmentation, seed=recipe.seed, epoch=epoch, view=0)
            with speed.autocast(device, dtype):
                logits = net(view)
        return F.cross_entropy(logits.float(), labels[index])

    return descend(net, recipe, len(train), loss_of, dtype=dtype, title="labels", progress=progress)


def top1(net: nn.Module, test: ImageSet, dtype: torch.dtype) -> float:
    """Accuracy of a classifier's answers, in percent."""
    answers = extract_features(net, test.images, dtype=dtype).argmax(dim=1)
    return 100 * int((answers == test.labels).sum()) / len(test)
