"""The losses: pure functions of tensors, and what K means in each.

A query q should be similar to its key k (the positive) and dissimilar to the other keys (the negatives). All vectors have
length 1, so a dot product is a cosine. Shapes: N queries, C dimensions, K negatives.

- `info_nce`: which of 1 + K keys is mine? K is the number of negatives, a choice (MoCo, equation 1).
- `nce`: is this key mine or noise? K binary questions for each query; the normaliser Z has to be estimated (Wu et al. 2018).
- `full_softmax`: which of *all* images is mine? No choice of K: it is the number of images less one.
- `nt_xent`: InfoNCE in which a batch serves as its own dictionary, K = 2N - 2 (SimCLR).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 1 << 24  # 64 MiB of them, and as much again for their gradient


def contrastive_logits(q: Tensor, k: Tensor, negatives: Tensor, temperature: float, exclude: Tensor | None = None) -> Tensor:
    """Similarities of each query with its own key (column 0) and with the negatives, divided by the temperature.

    Args:
        q, k: unit vectors, (N, C). negatives: unit vectors (K, C), the same for all queries.
        temperature: tau > 0.
        exclude: bool (N, K), True where a "negative" is the query's own key; that logit becomes -inf.

    Returns:
        float32 (N, 1 + K).
    """
    q = q.float() / temperature  # here, where it costs N x C divisions and not N x (1 + K)
    return torch.cat([(q * k).sum(dim=1, keepdim=True), _others(q, negatives, exclude)], dim=1)


def _others(q: Tensor, negatives: Tensor, exclude: Tensor | None) -> Tensor:
    """q.k of the negatives, (N, K); of one that is excluded -inf."""
    logits = q @ negatives.T
    return logits if exclude is None else logits.masked_fill(exclude, -torch.inf)


def _parts(q: Tensor, negatives: Tensor, exclude: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    """The negatives, and who is excluded of them, in parts of at most ``LOGITS_AT_ONCE`` logits."""
    at_once = max(1, LOGITS_AT_ONCE // len(q))
    parts = negatives.split(at_once)
    return list(zip(parts, [None] * len(parts) if exclude is None else exclude.split(at_once, dim=1), strict=True))


def info_nce(q: Tensor, k: Tensor, negatives: Tensor, temperature: float, exclude: Tensor | None = None) -> Tensor:
    """InfoNCE: -log( exp(q.k+ / tau) / sum_i exp(q.k_i / tau) ), the mean over queries (MoCo, equation 1).

    A (1 + K)-way classification in which the right answer is always class 0, so the labels are all zero. Guessing costs
    log(K + 1). Arguments as in `contrastive_logits`; returns a scalar. Of more than ``LOGITS_AT_ONCE`` logits a part at a time
    is held, and is computed once more in the backward pass: memory does not grow with K beyond that.

    >>> q = torch.eye(4)[:2]
    >>> info_nce(q, q, negatives=torch.eye(4)[2:], temperature=1.0)  # log(1 + 2 / e)
    tensor(0.5514)
    """
    parts = _parts(q, negatives, exclude)
    if len(parts) == 1:
        logits = contrastive_logits(q, k, negatives, temperature, exclude)
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))
    q = q.float() / temperature
    positive = (q * k).sum(dim=1)
    how = {"use_reentrant": False, "preserve_rng_state": False}  # the newer kind; nothing is drawn
    sums = [checkpoint(_log_sum_exp, q, *part, **how) for part in parts]
    return (torch.logsumexp(torch.stack([positive, *sums]), dim=0) - positive).mean()


def _log_sum_exp(q: Tensor, negatives: Tensor, exclude: Tensor | None) -> Tensor:
    """log of the sum of exp(q.k) over negatives that are not excluded, (N,); of none -inf."""
    return torch.logsumexp(_others(q, negatives, exclude), dim=1)


def nce(
    q: Tensor, k: Tensor, negatives: Tensor, temperature: float, n: int, log_z: Tensor | float, exclude: Tensor | None = None
) -> Tensor:
    """Noise-contrastive estimation: own key or one of K drawn uniformly from n images? (Wu et al. 2018, equations 5 to 7).

    With p = exp(q.k / tau) / Z, the model of "image i is this one", and noise 1 / n, the probability of "own" is
    p / (p + K / n). The loss is the binary cross-entropy of the own key and of the K noise keys, summed, mean over queries.

    Args:
        n: number of images the negatives are drawn from.
        log_z: log Z, as `estimate_log_z` gives it for these queries and keys. A mean over steps lags behind where keys change
            quickly, as in a fresh queue: all noise looks like the own key until it has followed (docs/LOG.md).
        Others as in `contrastive_logits`.
    """
    logits = contrastive_logits(q, k, negatives, temperature) - log_z
    log_odds = logits - math.log(len(negatives) / n)  # log( p / (K / n) )
    own, noise = F.softplus(-log_odds[:, 0]), F.softplus(log_odds[:, 1:])
    if exclude is not None:
        noise = noise.masked_fill(exclude, 0.0)
    return (own + noise.sum(dim=1)).mean()


@torch.no_grad()
def estimate_log_z(q: Tensor, negatives: Tensor, temperature: float, n: int) -> Tensor:
    """log of Z = n * mean of exp(q.k / tau) over a sample of keys: the normaliser in `nce` (Wu et al. 2018, equation 8)."""
    similarity = (q @ negatives.T).float() / temperature
    return torch.logsumexp(similarity.flatten(), dim=0) - math.log(similarity.numel()) + math.log(n)


def full_softmax(q: Tensor, bank: Tensor, index: Tensor, temperature: float) -> Tensor:
    """Non-parametric softmax over all n images (Wu et al. 2018, equation 2); InfoNCE with K = n - 1.

    Args:
        q: (N, C). bank: unit vectors of all images, (n, C). index: int64 (N,), each query's row in the bank.
    """
    return F.cross_entropy((q @ bank.T).float() / temperature, index)


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss over two views (arXiv 2002.05709, equation 1): every view asks, all other views of the batch answer.

    Args:
        z1, z2: unit vectors (N, C), row i of both from the same image.
    """
    z = torch.cat([z1, z2])
    N = len(z1)
    similarity = (z @ z.T).float() / temperature
    similarity.fill_diagonal_(-torch.inf)
    partner = torch.arange(2 * N, device=z.device).roll(N)
    return F.cross_entropy(similarity, partner)


@torch.no_grad()
def pretext_accuracy(q: Tensor, k: Tensor, negatives: Tensor, exclude: Tensor | None = None) -> float:
    """Share of queries, in percent, whose own key is the most similar of all 1 + K: the task InfoNCE trains for."""
    q = q.float()
    nearest = torch.stack([_others(q, *part).amax(dim=1) for part in _parts(q, negatives, exclude)]).amax(dim=0)
    # A tie is no success: a collapsed encoder finds all keys equally similar.
    return 100 * ((q * k).sum(dim=1) > nearest).float().mean().item()
