"""Visible checks of the losses (A1); `tutorial_moco.checks` says how a check diagnoses."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tutorial_moco import losses
from tutorial_moco.checks import CheckFailed, _called, _diagnose, _tensor, _unit
from tutorial_moco.feature_figures import effective_negatives


def check_softmax(yours: Callable) -> None:
    """Check ``yours(logits)``, the softmax of each row of logits (N, M).

    Raises:
        CheckFailed: names the likely mistake.
    """
    logits = 3 * _unit(5, 7, seed=1)
    found = _called(yours, "softmax", logits.clone())
    _tensor(found, "softmax", (5, 7))
    e = logits.exp()
    _diagnose("softmax", found, logits.softmax(dim=1), {
        "each column sums to 1; each row should (dim=1): a row is one query, and its shares are over the keys.":
            logits.softmax(dim=0),
        "all shares together sum to 1; each row should.": e / e.sum(),
        "the exponentials are not divided by their sum.": e,
        "it is the logarithm of the softmax.": logits.log_softmax(dim=1),
        "the logits are divided by their sum; their exponentials should be.": logits / logits.sum(dim=1, keepdim=True),
    })  # fmt: skip
    if not torch.isfinite(_called(yours, "softmax", torch.tensor([[1000.0, 999.0]]))).all():
        raise CheckFailed(
            "softmax: right for ordinary logits, but not finite for logits of 1000. exp(1000) is infinite in float32: subtract "
            "each row's largest logit first, which changes nothing, since it cancels in the fraction."
        )
    print("[OK] softmax: each row sums to 1, also for large logits")


def check_nce(yours: Callable) -> None:
    """Check ``yours(q, k, negatives, temperature, n, log_z)`` against `losses.nce`.

    Raises:
        CheckFailed: names the likely mistake.
    """
    q, k, negatives, n, log_z = _unit(6, 16, seed=1), _unit(6, 16, seed=2), _unit(9, 16, seed=3), 50, 2.5
    found = _called(yours, "nce", q, k, negatives, 0.2, n, log_z)
    _tensor(found, "nce", ())
    own, others, noise = (q * k).sum(dim=1) / 0.2, q @ negatives.T / 0.2, math.log(9 / 50)

    def total(own: Tensor, others: Tensor) -> Tensor:
        return (F.softplus(-own) + F.softplus(others).sum(dim=1)).mean()

    a, b = own - log_z - noise, others - log_z - noise  # the right log odds
    _diagnose("nce", found, losses.nce(q, k, negatives, 0.2, n, log_z), {
        "the terms of the noise keys are averaged; they are summed: K binary questions for each query.":
            (F.softplus(-a) + F.softplus(b).mean(dim=1)).mean(),
        "log Z is missing: p = exp(q.k / tau) / Z.": total(a + log_z, b + log_z),
        "log Z is added; exp(q.k / tau) is divided by Z.": total(a + 2 * log_z, b + 2 * log_z),
        "the odds are p / (K / n); it looks as if n / K was taken.": total(a + 2 * noise, b + 2 * noise),
        "the share of noise is missing: the odds are p / (K / n), not p.": total(a + noise, b + noise),
        "the noise is 1 / n; K of them are drawn, so it is K / n.": total(a + math.log(9), b + math.log(9)),
        "own and noise are exchanged: the own key should be called own, the noise keys noise.": total(-a, -b),
        "the noise keys are missing: only the own key is asked about.": F.softplus(-a).mean(),
        "the own key is missing: only the noise keys are asked about.": F.softplus(b).sum(dim=1).mean(),
        "the temperature multiplies; it has to divide.":
            total(own * 0.04 - log_z - noise, others * 0.04 - log_z - noise),
        "it is the sum over the queries; take their mean.": 6 * total(a, b),
        "it is InfoNCE. NCE asks K + 1 separate questions, own or noise, and not one: which of them.":
            losses.info_nce(q, k, negatives, 0.2),
    })  # fmt: skip
    if not torch.isfinite(_called(yours, "nce", q, q, -q, 0.005, n, log_z)):
        raise CheckFailed(
            "nce: right for ordinary logits, but not finite at temperature 0.005. F.softplus is log(1 + exp(a)), safely."
        )
    print("[OK] nce agrees with tutorial_moco.losses.nce")


def check_gradient(yours: Callable) -> None:
    """Check ``yours(similarity, temperature)``: gradient of the InfoNCE loss on similarities (N, 1 + K), own key in column 0.

    Raises:
        CheckFailed: names the likely mistake.
    """
    similarity = (_unit(5, 8, seed=1) @ _unit(12, 8, seed=2).T).requires_grad_()
    F.cross_entropy(similarity / 0.2, torch.zeros(5, dtype=torch.long)).backward()
    gradient, similarity = similarity.grad, similarity.detach()
    found = _called(yours, "gradient", similarity.clone(), 0.2)
    _tensor(found, "gradient", (5, 12))
    p = (similarity / 0.2).softmax(dim=1)
    own = F.one_hot(torch.zeros(5, dtype=torch.long), 12)
    _diagnose("gradient", found.detach(), gradient, {
        "it is the gradient on the logits; the similarities are divided by tau on the way, so divide by tau once more.":
            (p - own) / 5,
        "it is the gradient of the sum over queries; of the mean it is 1 / N of that.": (p - own) / 0.2,
        "1 / N and 1 / tau are both missing.": p - own,
        "the own key is pushed away like the others: subtract 1 in column 0.": p / 0.2 / 5,
        "the sign is wrong: a similarity whose gradient is positive is made smaller.": (own - p) / 0.2 / 5,
        "it is multiplied by tau; the chain rule divides.": (p - own) * 0.2 / 5,
        "the softmax is taken without the temperature.": (similarity.softmax(dim=1) - own) / 0.2 / 5,
    })  # fmt: skip
    print("[OK] gradient is what autograd finds")


def check_effective_negatives(yours: Callable) -> None:
    """Check ``yours(similarity, temperature)``: how many negatives the push of each query is really on, (N,).

    Raises:
        CheckFailed: names the likely mistake.
    """
    similarity = _unit(5, 8, seed=1) @ _unit(12, 8, seed=2).T
    found = _called(yours, "effective_negatives", similarity.clone(), 0.2)
    _tensor(found, "effective_negatives", (5,))
    logits = similarity / 0.2
    p, everything = logits[:, 1:].softmax(dim=1), logits.softmax(dim=1)
    entropy = -(p * p.log()).sum(dim=1)
    _diagnose("effective_negatives", found, effective_negatives(p), {
        "the own key is counted; leave out column 0 before the softmax.":
            (-(everything * everything.log()).sum(dim=1)).exp(),
        "the shares of the negatives do not sum to 1: take the softmax over the negatives alone.":
            (-(everything[:, 1:] * everything[:, 1:].log()).sum(dim=1)).exp(),
        "it is the entropy; its exponential is the number.": entropy,
        "the sign of the entropy is wrong.": (-entropy).exp(),
        "the temperature is missing.": effective_negatives(similarity[:, 1:].softmax(dim=1)),
        "the temperature multiplies; it has to divide.": effective_negatives((similarity[:, 1:] * 0.2).softmax(dim=1)),
        "it counts them all: the number is exp of the entropy of their shares.": torch.full((5,), 11.0),
    })  # fmt: skip
    print("[OK] effective_negatives: from 1, where one gets all of the push, to K, where all are alike")
