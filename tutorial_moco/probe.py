"""The papers' linear classification: a linear classifier on a frozen encoder, trained by SGD on random crops of each epoch.

Several learning rates in one pass: the encoder's features, which are nearly all of the cost, are the same for each.
"""

import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from tutorial_moco.augment import AUGMENTATIONS, random_view
from tutorial_moco.checkpoint import load_checkpoint, pack, save_checkpoint, unpack
from tutorial_moco.distributed import average_, highest, mine, one_for_all, rank
from tutorial_moco.encoded import EncodedImages, in_turn
from tutorial_moco.errors import UsageError
from tutorial_moco.evaluate import extract_features
from tutorial_moco.images import ImageSet
from tutorial_moco.pretrain import AHEAD, SAVE_EVERY, batches, check, check_all_agree, set_learning_rate
from tutorial_moco.recipes import Recipe
from tutorial_moco.speed import autocast
from tutorial_moco.stopping import Stop

VIEWS = "probe"  # in `augment.AUGMENTATIONS`
# Section 4.1 of the paper: a learning rate of 30, no weight decay. The epochs and the schedule are its code's (main_lincls.py).
SETTINGS = Recipe(augmentation=VIEWS, batch_size=256, epochs=100, lr=30.0, schedule="steps", weight_decay=0.0)


def probe(
    backbone: nn.Module,
    feature_dim: int,
    train: ImageSet,
    test: ImageSet,
    recipe: Recipe = SETTINGS,
    *,
    lrs: tuple[float, ...] = (SETTINGS.lr,),
    dtype: torch.dtype = torch.float32,
    out: Path | None = None,
    progress: bool = True,
) -> dict[float, float]:
    """Train a linear classifier for each learning rate, all in one pass, and judge each on all test images.

    Args:
        backbone: images (n, 3, H, W) to features (n, feature_dim), on the device where it is to work; it is not changed.
        recipe: its batch size, epochs, schedule, weight decay, augmentation and seed serve.
        lrs: learning rates. Choose among them on held-out training images.
        out: folder for a ``probe-….safetensors``, from which the same call goes on; another has another.

    Returns:
        accuracy in percent for each learning rate; nan where the classifier has exploded. Of several processes, each of which
        must call this, all have it.

    Raises:
        UsageError: every classifier has exploded; fewer images than a batch.
        DataError: ``out`` cannot be written, or holds a damaged one; processes have other images or other steps.
        KeyboardInterrupt, SystemExit: stopped, after the step at hand is finished and saved.
    """
    check(recipe, len(train), None)
    device, was_training = next(backbone.parameters()).device, backbone.training
    heads = nn.ModuleList(_fresh(feature_dim, len(train.classes)) for _ in lrs).to(device)
    groups = [{"params": list(head.parameters()), "times": lr / recipe.lr} for head, lr in zip(heads, lrs, strict=True)]
    optimizer = torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay, foreach=True)
    kept = Kept(out, {"lrs": list(lrs), "recipe": recipe.to_json(), "data_hash": train.hash, "encoder": _digest(backbone)})
    with one_for_all():
        step = kept.load(heads, optimizer)
        kept.save(heads, optimizer, step)  # what cannot be written is told now
    check_all_agree(
        ("images", "bring the same to each machine", train.hash),
        (f"steps in --out {out}", "name a folder that all machines share", step),
    )
    total, labels = recipe.epochs * (len(train) // recipe.batch_size), train.labels.to(device)
    views, caught = closing(viewed(train.images, recipe, len(train), step, device)), 0
    hidden = not progress or rank() > 0
    backbone.eval()
    bar = tqdm(total=total, initial=step, desc="linear probe", disable=hidden, file=sys.stderr)
    with Stop() as stop, bar, views as views:
        for index, view in islice(views, total - step):
            set_learning_rate(optimizer, recipe, step / total)
            for group in optimizer.param_groups:
                group["lr"] *= group["times"]
            with torch.no_grad(), autocast(device, dtype):
                features = backbone(view).float()
            optimizer.zero_grad()
            sum(F.cross_entropy(head(features), labels[index]) for head in heads).backward()  # no head knows of another
            average_([p.grad for p in heads.parameters()])
            optimizer.step()
            step += 1
            bar.update()
            (caught,) = highest(stop.caught or 0, device=device)  # all stop after the same step
            if kept.is_old():
                kept.save(heads, optimizer, step)
            if caught:
                break
        backbone.train(was_training)
        kept.save(heads, optimizer, step)
        stop.obey(device)
    return judged(backbone, heads, lrs, test, dtype)


def viewed(
    images: Tensor | EncodedImages, recipe: Recipe, n: int, step: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """From this step on: numbers of this process's images of a batch, and a random view of each."""
    augmentation, seed = AUGMENTATIONS[recipe.augmentation][0], recipe.seed
    order = ((epoch, mine(index)) for epoch, index in batches(n, recipe, step, torch.device("cpu")))
    cropped = isinstance(images, EncodedImages)
    if cropped:
        begun = ((each, images.crops(each[1][None], recipe.augmentation, seed=seed, epoch=each[0])) for each in order)
        given = ((each, crops[0]) for each, crops in in_turn(begun, AHEAD))
    else:
        given = ((each, images[each[1]]) for each in order)
    for (epoch, own), pixels in given:
        index = own.to(device)
        yield index, random_view(pixels.to(device), index, augmentation, seed=seed, epoch=epoch, view=0, cropped=cropped)


def judged(
    backbone: nn.Module, heads: nn.ModuleList, lrs: tuple[float, ...], test: ImageSet, dtype: torch.dtype
) -> dict[float, float]:
    """Accuracy of each classifier in percent."""
    features = extract_features(backbone, test.images, dtype=dtype).to(heads[0].weight.device)
    found = {}
    for lr, head in zip(lrs, heads, strict=True):
        sound = all(p.isfinite().all() for p in head.parameters())
        right = int((head(features).argmax(dim=1).cpu() == test.labels).sum())
        found[lr] = 100 * right / len(test) if sound else math.nan
    if all(map(math.isnan, found.values())):
        raise UsageError(f"the linear classifier has exploded with --lr {' '.join(f'{lr:g}' for lr in lrs)}: try a lower one")
    return found


class Kept:
    """Where the classifiers are saved: in a file whose name tells the encoder and the settings, so that others have others."""

    def __init__(self, out: Path | None, told: dict[str, object]):
        name = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:8]
        self.path, self.told, self.saved = out and out / f"probe-{name}.safetensors", told, time.monotonic()

    def load(self, heads: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Bring them to where they were; returns after how many steps that was."""
        if self.path is None or not self.path.exists():
            return 0
        tensors, state = load_checkpoint(self.path)
        unpack(tensors, heads=heads, optimizer=optimizer)
        return state["step"]

    def is_old(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self.saved > SAVE_EVERY

    def save(self, heads: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """All processes hold the same; the first one writes it."""
        self.saved = time.monotonic()
        if self.path is not None and not rank():
            save_checkpoint(self.path, pack(heads=heads, optimizer=optimizer), self.told | {"step": step})


def _fresh(inputs: int, classes: int) -> nn.Linear:
    """As the published code begins: small weights, no bias."""
    layer = nn.Linear(inputs, classes)
    nn.init.normal_(layer.weight, std=0.01, generator=torch.Generator().manual_seed(0))
    nn.init.zeros_(layer.bias)
    return layer


def _digest(net: nn.Module) -> str:
    """Of all that an encoder holds: another has another."""
    digest = hashlib.sha256()
    for tensor in net.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
