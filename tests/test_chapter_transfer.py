"""Chapter 08: what it builds by hand agrees with the package, torchvision and pycocotools; its checks name the mistake."""

import pytest
import torch
from torchvision.ops import box_iou

from notebooks import checks_as_tests, functions_of
from tutorial_moco import transfer
from tutorial_moco.detection import average_precision
from tutorial_moco.segmentation import mean_iou
from tutorial_moco.transfer_checks import check_average_precision, check_few_labels, check_iou, check_mean_iou


@pytest.fixture(scope="module")
def book():
    return functions_of("08_transfer.ipynb")


def test_what_the_chapter_builds_agrees(book):
    random = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 30, 2, 2, generator=random).sort(dim=2).values.flatten(2) * 40
    torch.testing.assert_close(book["iou"](*corners), box_iou(*corners))
    truth, answer = torch.randint(0, 5, (2, 20, 20), generator=random)
    truth[0] = 255
    pair = {"semantic": truth}, {"semantic": answer}
    assert book["mean_iou"](truth, answer, 5) == pytest.approx(mean_iou([pair], 5))
    labels = torch.arange(1000) % 7
    for share in (0.01, 0.3):
        mine, theirs = (of(labels, share, 3) for of in (book["few_labels"], transfer.few_labels))
        assert torch.equal(labels[mine].bincount(), labels[theirs].bincount())


@pytest.mark.parametrize("seed", range(8))
def test_average_precision_by_hand_is_pycocotools_count(book, seed):
    """Objects apart from each other, so that which detection is right needs no matching; numbers of them of which no share
    but all is one of COCO's recalls, where rounding would decide."""
    random = torch.Generator().manual_seed(seed)
    there = (3, 7, 9, 11)[seed % 4]
    places = 20.0 * torch.arange(12)
    right = torch.rand(12, generator=random) < 0.6
    right[there:] = False
    scores = torch.rand(12, generator=random)
    objects = torch.stack([places, torch.zeros(12), places + 10, torch.full((12,), 10.0)], dim=1)
    found = torch.where(right[:, None], objects, objects + torch.tensor([0.0, 50, 0, 50]))
    ones = torch.ones(12, dtype=torch.int64)
    truth = {"boxes": objects[:there], "labels": ones[:there], "area": 100.0 * ones[:there], "iscrowd": 0 * ones[:there]}
    answer = {"boxes": found, "labels": ones, "scores": scores}
    theirs = average_precision([(truth, answer)], ["boxes"])["ap50_boxes"]
    assert float(book["average_precision"](scores, right, there)) == pytest.approx(theirs, abs=1e-4)


# Checks --------------------------------------------------------------------------------------------------------------


def drawn(of_class, order=lambda n, seed: torch.randperm(n, generator=torch.Generator().manual_seed(seed))):
    """A draw of so many of each class."""

    def few_labels(labels, share, seed):
        members = [(labels == c).nonzero().flatten() for c in range(4)]
        return torch.cat([own[order(len(own), seed)[: of_class(len(own), share)]] for own in members])

    return few_labels


def first(n, seed):
    return torch.arange(n)


WRONG_DRAWS = {
    "as many of each class": drawn(lambda n, share: 10),
    "leaves a rare class to chance": lambda labels, share, seed: torch.arange(100),
    "drawn twice": lambda labels, share, seed: torch.zeros(100, dtype=torch.int64),
    "has none left": drawn(lambda n, share: round(n * share)),
    "seed changes nothing": drawn(lambda n, share: max(1, round(n * share)), first),
    "the second time": drawn(lambda n, share: max(1, round(n * share)), lambda n, seed: torch.randperm(n)),
    "numbers of images": lambda labels, share, seed: labels < 1,
}
areas = lambda box: (box[:, 2:] - box[:, :2]).prod(dim=1)  # noqa: E731


def sides(a, b):
    return torch.minimum(a[:, None, 2:], b[None, :, 2:]) - torch.maximum(a[:, None, :2], b[None, :, :2])


def inside(a, b):
    return sides(a, b).clamp(min=0).prod(dim=2)


def both(a, b):
    return areas(a)[:, None] + areas(b)[None]


WRONG_IOUS = {
    "clamp": lambda a, b: sides(a, b).prod(dim=2) / (both(a, b) - sides(a, b).prod(dim=2)),
    "counted twice": lambda a, b: inside(a, b) / both(a, b),
    "upside down": lambda a, b: (both(a, b) - inside(a, b)) / inside(a, b),
    "divide it by the union": inside,
    "first box's area": lambda a, b: inside(a, b) / areas(a)[:, None],
    "smaller box's area": lambda a, b: inside(a, b) / torch.minimum(areas(a)[:, None], areas(b)[None]),
    "intersection belongs above": lambda a, b: both(a, b) - inside(a, b),
    "not a tensor": lambda a, b: None,
}


def precision_by_recall(descending=True, envelope=True, by_objects=True, reached=False, scale=100.0, order=True):
    def wrong(scores, right, there):
        right = right[scores.argsort(descending=descending)] if order else right
        hits = right.cumsum(0)
        precision, recall = hits / torch.arange(1, len(hits) + 1), hits / (there if by_objects else right.sum())
        best = precision.flip(0).cummax(0).values.flip(0) if envelope else precision
        at = torch.searchsorted(recall, torch.linspace(0, 1, 101))
        return scale * torch.cat([best, torch.zeros(1)])[at[at < len(hits)] if reached else at].mean()

    return wrong


WRONG_PRECISIONS = {
    "in percent": precision_by_recall(scale=1.0),
    "not sorted": precision_by_recall(order=False),
    "wrong way round": precision_by_recall(descending=False),
    "share of the objects": precision_by_recall(by_objects=False),
    "at this recall or a higher one": precision_by_recall(envelope=False),
    "precision of all detections": lambda scores, right, there: 100 * right.float().mean(),
    "never reached": precision_by_recall(reached=True),
}


def iou_of(classes, ignore=255, scale=100.0, nowhere_is_0=False):
    def wrong(truth, answer, _):
        judged = truth != ignore
        true, said = truth[judged], answer[judged]
        each = [((true == c) & (said == c)).sum() / ((true == c) | (said == c)).sum() for c in classes]
        return scale * (torch.stack(each).nan_to_num() if nowhere_is_0 else torch.stack(each)).mean()

    return wrong


def of_all_together(truth, answer, _):
    right, judged = (truth == answer)[truth != 255].sum(), (truth != 255).sum()
    return 100 * right / (2 * judged - right)


WRONG_MEANS = {
    "in percent": iou_of(range(4), scale=1.0),
    "accuracy of the pixels": lambda truth, answer, _: 100 * (truth == answer)[truth != 255].float().mean(),
    "ground is left out": iou_of(range(1, 4)),
    "255 are judged": iou_of(range(4), ignore=-1),
    "for each class": of_all_together,
    "gives 0 / 0": iou_of(range(5)),
    "nowhere counts as 0": iou_of(range(5), nowhere_is_0=True),
}
CHECKS = {
    "few_labels": (check_few_labels, WRONG_DRAWS, drawn(lambda n, share: max(1, round(n * share)))),
    "iou": (check_iou, WRONG_IOUS, box_iou),
    "average_precision": (check_average_precision, WRONG_PRECISIONS, precision_by_recall()),
    "mean_iou": (check_mean_iou, WRONG_MEANS, iou_of(range(4))),
}

test_a_check_passes_what_is_right, test_a_check_names_the_mistake = checks_as_tests(CHECKS, "08")
