"""Checks of what a reader builds in the chapter on MoCo's versions; see `checks` for how they diagnose."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tutorial_moco.checks import _called, _diagnose, _tensor, _unit
from tutorial_moco.feature_checks import _number

DONE = (0.0, 0.25, 0.5, 0.59, 0.61, 0.75, 0.79, 0.81, 0.9, 1.0)  # shares of a training, on both sides of each drop


def check_rate(yours: Callable) -> None:
    """Check ``yours(done, schedule)``: the learning rate, of a first one of 1, by "steps" (v1) or by "cosine" (v2).

    Raises:
        CheckFailed: names the likely mistake.
    """
    done = torch.tensor(DONE, dtype=torch.float64)
    wave = torch.cos(math.pi * done)
    first, second = (done >= 0.6).double(), (done >= 0.8).double()
    for schedule, expected, mistakes in (
        ("steps", 0.1 ** (first + second), {
            "with the steps it drops once only; a second tenth is taken at 0.8.": 0.1**first,
            "with the steps the first drop, at 0.6, is missing.": 0.1**second,
            "with the steps it grows; a drop multiplies by 0.1.": 10 ** (first + second),
            "with the steps a tenth is subtracted; multiply by 0.1.": 1 - 0.1 * (first + second),
        }),
        ("cosine", 0.5 * (1 + wave), {
            "the cosine begins at 2: the half in front is missing.": 1 + wave,
            "the cosine goes below 0: add 1 to it, and halve the sum.": wave,
            "the cosine rises; it should fall from 1 to 0.": 0.5 * (1 - wave),
            "the pi in the cosine is missing: cos(pi * done) goes from 1 to -1, cos(done) hardly falls.":
                0.5 * (1 + torch.cos(done)),
            "the cosine comes back up: half a wave is cos(pi * done), a whole one cos(2 pi * done).":
                0.5 * (1 + torch.cos(2 * math.pi * done)),
            "a quarter of a wave, cos(pi / 2 * done), falls fast at the end; v2 takes half a wave, which ends gently.":
                torch.cos(math.pi / 2 * done),
        }),
    ):  # fmt: skip
        answers = [_number(_called(yours, "rate", share, schedule), f"rate: for {schedule}") for share in DONE]
        _diagnose("rate", torch.stack(answers), expected.float(), mistakes)
    print("[OK] rate follows both schedules, as tutorial_moco.pretrain.set_learning_rate does")


def check_v3_loss(yours: Callable) -> None:
    """Check ``yours(q1, q2, k1, k2, temperature)``: MoCo v3's loss of queries and keys (N, C) of two views.

    Raises:
        CheckFailed: names the likely mistake.
    """
    q1, q2, k1, k2 = (_unit(6, 16, seed=number) for number in range(4))
    own, t = torch.arange(6), 0.2

    def one(q: Tensor, k: Tensor, scale: float = 1 / t, labels: Tensor = own) -> Tensor:
        return F.cross_entropy(q @ k.T * scale, labels)

    def all_others(q: Tensor, k: Tensor, rest: Tensor) -> Tensor:
        return F.cross_entropy(q @ torch.cat([k, rest]).T / t, own)

    expected = (one(q1, k2) + one(q2, k1)) / 2
    found = _called(yours, "v3_loss", q1, q2, k1, k2, t)
    _tensor(found, "v3_loss", ())
    _diagnose("v3_loss", found, expected, {
        "a query is compared with keys of its own view; its key is the other view's: q1 with k2, q2 with k1.":
            (one(q1, k1) + one(q2, k2)) / 2,
        "the labels are zeros. Here the own key of row i is in column i: torch.arange(len(q1)).":
            (one(q1, k2, labels=0 * own) + one(q2, k1, labels=0 * own)) / 2,
        "the two losses are added up; take their mean.": 2 * expected,
        "only the first view is a query; each view is query once and key once.": one(q1, k2),
        "only the second view is a query; each view is query once and key once.": one(q2, k1),
        "the logits are not divided by the temperature.": (one(q1, k2, 1.0) + one(q2, k1, 1.0)) / 2,
        "the temperature multiplies the logits; it has to divide them.": (one(q1, k2, t) + one(q2, k1, t)) / 2,
        "rows and columns are changed: a row is a query, q @ k.T, and the softmax runs over its keys.":
            (one(k2, q1) + one(k1, q2)) / 2,
        "the keys of the query's own view are among the negatives; v3 compares with the other view alone.":
            (all_others(q1, k2, k1) + all_others(q2, k1, k2)) / 2,
        "2 times the temperature is in it; it only scales the learning rate, and is left out here.": 2 * t * expected,
        "2 times the temperature is in it and the two are added up, as in the published code; that only scales the learning "
        "rate, and is left out here.": 4 * t * expected,
    })  # fmt: skip
    print("[OK] v3_loss is the mean of both directions, as tutorial_moco.mechanisms.MoCoV3 has it")


def check_masked_loss(yours: Callable) -> None:
    """Check ``yours(painted, images, hidden)``: the mean squared error of painted patches (N, 64, 48), the hidden ones alone.

    Images are (N, 3, 32, 32), patches of 4 pixels row by row, hidden bool (N, 64); each patch has its mean taken out and is
    divided by its spread.

    Raises:
        CheckFailed: names the likely mistake.
    """
    random = torch.Generator().manual_seed(3)
    images = torch.randn(3, 3, 32, 32, generator=random) * torch.linspace(0.2, 2, 32) + 0.5
    painted = torch.randn(3, 64, 48, generator=random)
    hidden = torch.rand(3, 64, generator=random) < 0.75

    def error(patches: Tensor, mean: bool = True, spread: bool = True) -> Tensor:
        center = patches.mean(dim=2, keepdim=True) if mean else 0.0
        width = patches.std(dim=2, keepdim=True) + 1e-3 if spread else 1.0
        return (painted - (patches - center) / width).square().mean(dim=2)

    patches = F.unfold(images, 4, stride=4).transpose(1, 2)
    found = _called(yours, "masked_loss", painted, images, hidden)
    _tensor(found, "masked_loss", ())
    colour_last = patches.reshape(3, 64, 3, 16).transpose(2, 3).reshape(3, 64, 48)
    by_columns = F.unfold(images.transpose(2, 3), 4, stride=4).transpose(1, 2)
    right = error(patches)
    _diagnose("masked_loss", found, right[hidden].mean(), {
        "all patches are judged. What was seen is no riddle: take the hidden ones alone.": right.mean(),
        "the patches that were seen are judged; take the hidden ones.": right[~hidden].mean(),
        "the hidden ones are added up and divided by all; divide by the number of hidden ones.": (right * hidden).mean(),
        "the errors are added up; take their mean.": right[hidden].sum(),
        "the targets are the patches as they are: take out each one's mean and divide by its spread.":
            error(patches, mean=False, spread=False)[hidden].mean(),
        "the mean is taken out of each patch, but it is not divided by its spread.":
            error(patches, spread=False)[hidden].mean(),
        "the numbers within a patch are in another order: all of a colour, then all of the next (F.unfold has it so).":
            error(colour_last)[hidden].mean(),
        "the patches are taken column by column; row by row is the order of `painted`.": error(by_columns)[hidden].mean(),
    })  # fmt: skip
    print("[OK] masked_loss judges hidden patches alone, as tutorial_moco.masked.MaskedAutoencoder.loss does")
