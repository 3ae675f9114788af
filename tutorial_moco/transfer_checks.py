"""Checks of what a reader builds in the chapter on transfer; see `checks` for how they diagnose."""

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.ops import box_iou

from tutorial_moco.checks import CheckFailed, _called, _diagnose
from tutorial_moco.feature_checks import _number
from tutorial_moco.segmentation import mean_iou as package_mean_iou


def check_few_labels(yours: Callable) -> None:
    """Check ``yours(labels, share, seed)``: the numbers of a share of the images, the same share of each class.

    Raises:
        CheckFailed: names the likely mistake.
    """
    labels = torch.cat([torch.zeros(600), torch.ones(300), torch.full((100,), 2), torch.full((3,), 3)]).long()
    found = _called(yours, "few_labels", labels, 0.1, 0)
    if not isinstance(found, Tensor) or found.ndim != 1 or found.dtype.is_floating_point or found.dtype == torch.bool:
        raise CheckFailed("few_labels: it should return the numbers of images, a tensor of whole numbers (n',).")
    if len(found.unique()) < len(found):
        raise CheckFailed("few_labels: an image was drawn twice. Take the first few of a permutation of the class's images.")
    counts = labels[found].bincount(minlength=4).tolist()
    if counts == [60, 30, 10, 0]:
        raise CheckFailed("few_labels: a class of three images has none left at 10 %. Take one of each class at least.")
    if counts != [60, 30, 10, 1]:
        if len(set(counts[:3])) == 1:
            raise CheckFailed(
                f"few_labels: as many of each class, {counts}; it should be the same share: [60, 30, 10, 1] of 10 %."
            )
        raise CheckFailed(
            f"few_labels: {counts} images of four classes that have 600, 300, 100 and 3; 10 % of each is [60, 30, 10, 1]. "
            "A draw from all images at once leaves a rare class to chance: draw within each class."
        )
    if torch.equal(found.sort().values, _called(yours, "few_labels", labels, 0.1, 1).sort().values):
        raise CheckFailed("few_labels: the seed changes nothing. Other seeds have to draw other images.")
    if not torch.equal(found, _called(yours, "few_labels", labels, 0.1, 0)):
        raise CheckFailed("few_labels: the same seed draws other images the second time. Let the seed decide the draw.")
    print("[OK] few_labels draws the same share of each class, and the seed decides which")


def check_iou(yours: Callable) -> None:
    """Check ``yours(a, b)``: intersection over union of boxes (n, 4) with boxes (m, 4), x0, y0, x1, y1, as (n, m).

    Raises:
        CheckFailed: names the likely mistake.
    """
    a = torch.tensor([[0.0, 0, 10, 10], [5, 5, 15, 25], [40, 40, 50, 45]])
    b = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [2, 2, 4, 4], [60, 60, 70, 80]])
    found = _called(yours, "iou", a, b)
    if not isinstance(found, Tensor):
        raise CheckFailed(f"iou: it returns {type(found).__name__}, not a tensor. Is the `return` there?")
    area_a, area_b = ((box[:, 2:] - box[:, :2]).prod(dim=1) for box in (a, b))
    sides = torch.minimum(a[:, None, 2:], b[None, :, 2:]) - torch.maximum(a[:, None, :2], b[None, :, :2])
    inside, both = sides.clamp(min=0).prod(dim=2), area_a[:, None] + area_b[None]
    _diagnose("iou", found, box_iou(a, b), {
        "boxes that don't meet have a negative width and a negative height, and their product is positive: clamp(min=0).":
            sides.prod(dim=2) / (both - sides.prod(dim=2)),
        "what both boxes cover is counted twice below the fraction: subtract the intersection once.": inside / both,
        "the fraction is upside down.": (both - inside) / inside,
        "it is the intersection; divide it by the union.": inside,
        "divided by the first box's area; it has to be the union of both.": inside / area_a[:, None],
        "divided by the smaller box's area; it has to be the union of both.":
            inside / torch.minimum(area_a[:, None], area_b[None]),
        "it is the union's area; the intersection belongs above it.": both - inside,
    })  # fmt: skip
    print("[OK] iou agrees with torchvision.ops.box_iou")


def check_average_precision(yours: Callable) -> None:
    """Check ``yours(scores, right, there)``: average precision in percent at one threshold, over COCO's 101 recalls.

    ``scores`` and ``right``, bool, are of the detections (n,), ``there`` is the number of objects.

    Raises:
        CheckFailed: names the likely mistake.
    """
    scores = torch.tensor([0.3, 0.9, 0.55, 0.8, 0.7, 0.2, 0.6])
    right = torch.tensor([True, True, False, False, True, True, True])
    found = _number(_called(yours, "average_precision", scores, right, 8), "average_precision")
    order = scores.argsort(descending=True)
    expected = torch.tensor(_average_precision(right[order], 8))
    precision = right[order].cumsum(0) / torch.arange(1, 8)
    raw, least_first = torch.cat([precision, torch.zeros(1)]), right[order.flip(0)]
    recall = right[order].cumsum(0) / 8
    _diagnose("average_precision", found, expected, {
        "it is a share; give it in percent.": expected / 100,
        "the detections are not sorted by score: the surest comes first.": torch.tensor(_average_precision(right, 8)),
        "they are sorted the wrong way round: the surest comes first.": torch.tensor(_average_precision(least_first, 8)),
        "recall is the share of the detections; it is the share of the objects that are there.":
            torch.tensor(_average_precision(right[order], int(right.sum()))),
        "precision may rise again with recall. COCO takes the best precision at this recall or a higher one.":
            100 * raw[torch.searchsorted(recall, torch.linspace(0, 1, 101))].mean(),
        "it is the precision of all detections; it should be the mean over recalls.": 100 * right.float().mean(),
        "recalls that were never reached are left out; there the precision is 0.":
            torch.tensor(_average_precision(right[order], 8, reached=True)),
    })  # fmt: skip
    print("[OK] average_precision agrees with COCO's count")


def _average_precision(right: Tensor, there: int, reached: bool = False) -> float:
    """Of detections in order, over 101 recalls; the check of it against pycocotools is a test."""
    hits = right.cumsum(0)
    precision, recall = hits / torch.arange(1, len(hits) + 1), hits / there
    best = torch.cat([precision.flip(0).cummax(0).values.flip(0), torch.zeros(1)])
    at = torch.searchsorted(recall, torch.linspace(0, 1, 101))
    return 100 * best[at[at < len(hits)] if reached else at].mean().item()


def check_mean_iou(yours: Callable) -> None:
    """Check ``yours(truth, answer, classes)``: mean IoU in percent of int64 (H, W) against (H, W), 255 not judged.

    Raises:
        CheckFailed: names the likely mistake.
    """
    random = torch.Generator().manual_seed(2)
    truth, answer = (torch.randint(0, 4, (12, 12), generator=random) for _ in range(2))
    truth[:8, :8], answer[:7, :9], truth[0] = 0, 0, 255
    judged = truth != 255

    def each(true: Tensor, said: Tensor, first: int = 0) -> Tensor:
        pairs = [((true == c) & (said == c), (true == c) | (said == c)) for c in range(first, 4)]
        return torch.stack([both.sum() / either.sum() for both, either in pairs])

    classes = 4  # of which the last is nowhere
    right = package_mean_iou([({"semantic": truth}, {"semantic": answer})], classes)
    found = _number(_called(yours, "mean_iou", truth, answer, classes), "mean_iou")
    if found.isnan():
        raise CheckFailed("mean_iou: a class that is nowhere gives 0 / 0. It says nothing: leave it out of the mean.")
    both = (truth == answer)[judged].float().mean()
    _diagnose("mean_iou", found, torch.tensor(right), {
        "it is a share; give it in percent.": torch.tensor(right / 100),
        "it is the accuracy of the pixels, which a large ground makes high whatever is said of the objects.": 100 * both,
        "the ground is left out; it is judged like a class.": 100 * each(truth[judged], answer[judged], 1).mean(),
        "pixels marked 255 are judged; leave them out.": 100 * each(truth, answer).mean(),
        "a class that is nowhere counts as 0. It says nothing: leave it out of the mean.": torch.tensor(right * 4 / 5),
        "it is the IoU of all classes together; take it for each class, then the mean.":
            100 * (truth == answer)[judged].sum() / (2 * judged.sum() - (truth == answer)[judged].sum()),
    })  # fmt: skip
    print("[OK] mean_iou agrees with tutorial_moco.segmentation.mean_iou")
