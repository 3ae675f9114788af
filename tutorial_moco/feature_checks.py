"""Checks of what a reader builds in the chapters on features and on the temperature; see `checks` for how they diagnose."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tutorial_moco import evaluate
from tutorial_moco.checks import CheckFailed, _called, _diagnose, _unit
from tutorial_moco.feature_figures import push_on_negatives


def check_knn_top1(yours: Callable) -> None:
    """Check ``yours(train, train_labels, test, test_labels, k=20, temperature=0.07)`` against `evaluate.knn_top1`.

    Raises:
        CheckFailed: names the likely mistake.
    """
    data = _clusters()
    expected = torch.tensor(evaluate.knn_top1(*data, k=20, temperature=0.07))
    found = _number(_called(yours, "knn_top1", *data, 20, 0.07), "knn_top1")
    _diagnose("knn_top1", found, expected, {mistake: torch.tensor(wrong) for mistake, wrong in _knn_mistakes(*data).items()})
    print("[OK] knn_top1 agrees with tutorial_moco.evaluate.knn_top1")


def _knn_mistakes(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> dict[str, float]:
    right = evaluate.knn_top1(train, train_labels, test, test_labels, k=20, temperature=0.07)
    near, asked = F.normalize(train, dim=1), F.normalize(test, dim=1)
    least = (asked @ near.T).topk(20, dim=1, largest=False).indices
    votes = F.one_hot(train_labels[least]).sum(dim=1)
    return {
        "it is a share; give it in percent.": right / 100,
        "features are not normalised. The dot product of long vectors is not a cosine: F.normalize(..., dim=1) for both.":
            _vote(train, train_labels, test, test_labels, 20, lambda s: (s / 0.07).exp()),
        "every neighbour has one vote. A neighbour votes with weight exp(similarity / temperature).":
            _vote(near, train_labels, asked, test_labels, 20, torch.ones_like),
        "the temperature multiplies the similarity; it has to divide it.":
            _vote(near, train_labels, asked, test_labels, 20, lambda s: (s * 0.07).exp()),
        "only the nearest neighbour is asked; k of them vote.":
            evaluate.knn_top1(train, train_labels, test, test_labels, k=1),
        "the neighbours are the least similar ones. topk(k, dim=1) of the similarity takes the largest.":
            100 * (votes.argmax(dim=1) == test_labels).float().mean().item(),
        "it is the error; count those that are right.": 100 - right,
    }  # fmt: skip


def _vote(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int, weight: Callable) -> float:
    similarity, neighbours = (test @ train.T).topk(k, dim=1)
    votes = torch.zeros(len(test), int(train_labels.max()) + 1).scatter_add_(1, train_labels[neighbours], weight(similarity))
    return 100 * (votes.argmax(dim=1) == test_labels).float().mean().item()


def check_alignment(yours: Callable) -> None:
    """Check ``yours(q, k)`` against `evaluate.alignment`.

    Raises:
        CheckFailed: names the likely mistake.
    """
    q, k = _unit(40, 16, seed=1), F.normalize(_unit(40, 16, seed=1) + 0.5 * _unit(40, 16, seed=2), dim=1)
    square = (q - k).square()
    found = _number(_called(yours, "alignment", q, k), "alignment")
    _diagnose("alignment", found, torch.tensor(evaluate.alignment(q, k)), {
        "it is the mean over all numbers: sum the squares over dim=1 first, then take the mean over images.": square.mean(),
        "it is the distance; it should be the squared distance.": square.sum(dim=1).sqrt().mean(),
        "it is the sum over images; take the mean.": square.sum(),
        "it is the cosine, which is high where the distance is small: |q - k|^2 = 2 - 2 q.k.": (q * k).sum(dim=1).mean(),
        "every query meets every key: only row i of q and row i of k are of one image.": torch.cdist(q, k).square().mean(),
    })  # fmt: skip
    print("[OK] alignment agrees with tutorial_moco.evaluate.alignment")


def check_uniformity(yours: Callable) -> None:
    """Check ``yours(q)`` against `evaluate.uniformity`.

    Raises:
        CheckFailed: names the likely mistake.
    """
    q = F.normalize(_unit(40, 16, seed=1) + 0.5 * _unit(1, 16, seed=2), dim=1)
    square = torch.pdist(q).square()
    found = _number(_called(yours, "uniformity", q), "uniformity")
    _diagnose("uniformity", found, torch.tensor(evaluate.uniformity(q)), {
        "the pairs of a vector with itself are counted; their distance is 0. torch.pdist leaves them out.":
            torch.cdist(q, q).square().mul(-2).exp().mean().log(),
        "the distance is not squared: exp(-2 d^2).": square.sqrt().mul(-2).exp().mean().log(),
        "the 2 is missing: exp(-2 d^2).": square.neg().exp().mean().log(),
        "the logarithm is missing.": square.mul(-2).exp().mean(),
        "the logarithm is taken before the mean: first the mean over pairs, then the logarithm.": square.mul(-2).mean(),
        "the sign of the exponent is wrong: exp(-2 d^2).": square.mul(2).exp().mean().log(),
    })  # fmt: skip
    print("[OK] uniformity agrees with tutorial_moco.evaluate.uniformity")


def check_push(yours: Callable) -> None:
    """Check ``yours(similarity, temperature)`` against `feature_figures.push_on_negatives`, and that against autograd.

    Raises:
        CheckFailed: names the likely mistake.
    """
    similarity = (_unit(5, 8, seed=1) @ _unit(12, 8, seed=2).T).requires_grad_()
    F.cross_entropy(similarity / 0.2, torch.zeros(5, dtype=torch.long), reduction="sum").backward()
    gradient, similarity = similarity.grad[:, 1:], similarity.detach()
    if not torch.allclose(push_on_negatives(similarity, 0.2), gradient, atol=1e-6):
        raise AssertionError("push_on_negatives is not the gradient of info_nce")
    found = _called(yours, "push_on_negatives", similarity, 0.2)
    if not isinstance(found, Tensor):
        raise CheckFailed(f"push_on_negatives: it returns {type(found).__name__}, not a tensor. Is the `return` there?")
    p = (similarity / 0.2).softmax(dim=1)
    _diagnose("push_on_negatives", found, gradient, {
        "the own key is still there: leave out column 0.": p / 0.2,
        "it is the probability; the gradient on the similarity is that divided by the temperature.": p[:, 1:],
        "the softmax is over the negatives alone; the own key takes part in it.":
            (similarity[:, 1:] / 0.2).softmax(dim=1) / 0.2,
        "the temperature multiplies the similarity; it has to divide it.": (similarity * 0.2).softmax(dim=1)[:, 1:] / 0.2,
        "the softmax is over the queries (dim=0); it is over the keys of one query (dim=1).":
            (similarity / 0.2).softmax(dim=0)[:, 1:] / 0.2,
    })  # fmt: skip
    print("[OK] push_on_negatives is the gradient of info_nce on each negative")


def _clusters() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features of five unequal classes, of lengths that differ much; hard enough that every mistake has its own accuracy."""
    random = torch.Generator().manual_seed(5)
    labels = torch.randint(0, 5, (600,), generator=random)
    labels[torch.rand(600, generator=random) < 0.2] = 0
    features = torch.randn(600, 8, generator=random) + F.one_hot(labels, 8)
    features *= torch.exp(torch.randn(600, 1, generator=random))
    return features[:400], labels[:400], features[400:], labels[400:]


def _number(found, name: str) -> Tensor:
    """A float, or a tensor of one number, as a tensor."""
    if isinstance(found, Tensor) and found.numel() == 1:
        return found.detach().reshape(()).float()
    if found is ...:
        raise CheckFailed(f"{name}: there are still dots (...) in it. Fill the gaps, then run this cell again.")
    if not isinstance(found, int | float | np.number):
        kind = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise CheckFailed(f"{name}: it returns {kind}, not one number. Is the mean taken, and is the `return` there?")
    return torch.tensor(float(found))
