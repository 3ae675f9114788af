"""Checks of what a reader builds in the chapter on ImageNet and many GPUs; see `checks` for how they diagnose."""

from collections.abc import Callable

import torch
from torch import Tensor

from tutorial_moco.checks import _called, _diagnose, _tensor
from tutorial_moco.feature_checks import _number

IMAGES, EPOCHS, RATE, GPUS = 1_000_000, 200, 150.0, 8
WEIGHTS, K, C = 25_000_000, 65_536, 128


def check_hours(yours: Callable) -> None:
    """Check ``yours(images, epochs, per_second, gpus)``: how long a training takes.

    Raises:
        CheckFailed: names the likely mistake.
    """
    seconds = torch.tensor(IMAGES * EPOCHS / RATE / GPUS)
    _diagnose("hours", _number(_called(yours, "hours", IMAGES, EPOCHS, RATE, GPUS), "hours"), seconds / 3600, {
        "these are seconds; an hour has 3600.": seconds,
        "these are minutes; an hour has 3600 seconds.": seconds / 60,
        "these are days.": seconds / 86400,
        "the GPUs share the work: divide by how many there are.": seconds / 3600 * GPUS,
        "more GPUs take longer: divide by how many there are.": seconds / 3600 * GPUS**2,
        "that is one epoch; there are more.": seconds / 3600 / EPOCHS,
    })  # fmt: skip
    print("[OK] hours, as tutorial_moco.cost counts them")


def check_fixed_bytes(yours: Callable) -> None:
    """Check ``yours(weights, K, C)``: bytes of a MoCo that do not depend on the batch.

    Raises:
        CheckFailed: names the likely mistake.
    """
    all_of_it, queue = 4 * (4 * WEIGHTS + K * C), 4 * K * C
    found = _number(_called(yours, "fixed_bytes", WEIGHTS, K, C), "fixed_bytes")
    _diagnose("fixed_bytes", found, torch.tensor(float(all_of_it)), {
        "one copy of the weights is missing. There are four numbers a weight: itself, its gradient, its momentum in the "
        "optimizer, and its slow copy in the key encoder.": torch.tensor(float(all_of_it - 4 * WEIGHTS)),
        "two copies of the weights are missing: gradient, momentum or the key encoder's.":
            torch.tensor(float(all_of_it - 8 * WEIGHTS)),
        "the weights alone are counted once; there are their gradients, momenta and slow copies, too.":
            torch.tensor(float(4 * WEIGHTS + queue)),
        "the key encoder has no gradient and no momentum, so there are four numbers a weight, not six.":
            torch.tensor(float(all_of_it + 8 * WEIGHTS)),
        "the queue is missing.": torch.tensor(float(all_of_it - queue)),
        "the queue has K keys of C numbers, not K numbers.": torch.tensor(float(16 * WEIGHTS + 4 * K)),
        "these are numbers; a float32 has four bytes.": torch.tensor(float(all_of_it / 4)),
    })  # fmt: skip
    print("[OK] fixed_bytes: weights, gradients, momenta, slow copies, and the queue")


def check_rows(yours: Callable) -> None:
    """Check ``yours(index, r, W)``: process r's rows of a batch.

    Raises:
        CheckFailed: names the likely mistake.
    """
    index, W = torch.randperm(24, generator=torch.Generator().manual_seed(0)), 4
    for r in (2, 0, 1, 3):  # at 2 every mistake has rows of its own
        found = _called(yours, "rows_of", index, r, W)
        _tensor(found, "rows_of", (6,))
        _diagnose("rows_of", found, index[6 * r : 6 * r + 6], {
            "every W-th row is taken, beginning at r. That shares them out, too, but here neighbours stay together: a process "
            "has the rows r B / W to (r + 1) B / W.": index[r::W],
            "the processes are counted from 1; they begin at 0.": index.roll(6)[6 * r : 6 * r + 6],
            "these are places in the batch, not the numbers of its images.": torch.arange(6 * r, 6 * r + 6),
            "each process has the first rows.": index[:6],
        })  # fmt: skip
    print("[OK] rows_of, as tutorial_moco.distributed.mine")


def check_shuffled_keys(yours: Callable) -> None:
    """Check ``yours(encode, images, order, W)``: keys (B, C) in the batch's order, made in parts of a shuffled batch.

    Raises:
        CheckFailed: names the likely mistake.
    """
    random, W = torch.Generator().manual_seed(0), 4
    images, order = torch.randn(12, 5, generator=random), torch.randperm(12, generator=random)

    def encode(part: Tensor) -> Tensor:
        """Like BatchNorm, it depends on who else is in the part."""
        return part - part.mean(dim=0)

    def in_parts(rows: Tensor) -> Tensor:
        return torch.cat([encode(part) for part in rows.chunk(W)])

    right = in_parts(images[order])[order.argsort()]
    found = _called(yours, "shuffled_keys", encode, images, order, W)
    _tensor(found, "shuffled_keys", (12, 5))
    _diagnose("shuffled_keys", found, right, {
        "the keys stay in their shuffled order, so a query is compared with another image's key: bring them back with "
        "order.argsort().": in_parts(images[order]),
        "the keys are brought back with order itself, which shuffles them once more; its inverse is order.argsort().":
            in_parts(images[order])[order],
        "the images are not shuffled, only cut in parts.": in_parts(images),
        "the batch is encoded as a whole; each process sees a part, and has BatchNorm's statistics of that part alone.":
            encode(images),
        "the images are shuffled by the inverse of the order, and the keys by the order.":
            in_parts(images[order.argsort()])[order],
    })  # fmt: skip
    print("[OK] shuffled_keys: each key in its place, made among strangers")
