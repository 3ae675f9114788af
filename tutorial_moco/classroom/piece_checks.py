"""Visible checks of the pieces that the bug clinic has to mend (A5); `tutorial_moco.checks` says how a check diagnoses."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from tutorial_moco import losses
from tutorial_moco.augment import two_views
from tutorial_moco.checks import CheckFailed, _called, _close, _diagnose, _tensor, _unit


def check_first_queue(yours: Callable) -> None:
    """Check ``yours(K, dim)``: random unit vectors (K, dim).

    Raises:
        CheckFailed: names the likely mistake.
    """
    found = _called(yours, "first_queue", 40, 16)
    _tensor(found, "first_queue", (40, 16))
    if _close(found.norm(dim=0), torch.ones(16)):
        raise CheckFailed("first_queue: the columns have length 1; a key is a row (dim=1).")
    if not _close(found.norm(dim=1), torch.ones(40)):
        raise CheckFailed(
            f"first_queue: the keys have length {found.norm(dim=1).mean():.1f} on average; each should have length 1."
        )
    if found.mean(dim=0).norm() > 0.6:
        raise CheckFailed("first_queue: the keys all point the same way; draw them in random directions (randn, not rand).")
    print("[OK] first_queue: random directions, length 1")


def check_views_of(yours: Callable) -> None:
    """Check ``yours(images, index, epoch)``: two independent random views of each image.

    Raises:
        CheckFailed: names the likely mistake.
    """
    images, index = (
        (torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8),
        torch.arange(8),
    )
    found = _called(yours, "views_of", images, index, 3)
    if not isinstance(found, tuple) or len(found) != 2:
        raise CheckFailed(f"views_of: return two tensors (view_q, view_k), not {type(found).__name__}.")
    view_q, view_k = found
    _tensor(view_q, "views_of", (8, 3, 32, 32))
    _tensor(view_k, "views_of", (8, 3, 32, 32))
    if _close(view_q, view_k):
        raise CheckFailed("views_of: both views are the same, so that a query finds its key by comparing pixels.")
    later = _called(yours, "views_of", images, index, 4)
    if _close(later[0], view_q):
        raise CheckFailed("views_of: the views are the same in each epoch: pass epoch=epoch.")
    _diagnose("views_of", torch.cat([view_q, view_k]), torch.cat(two_views(images, index, "shapes", epoch=3)), {
        "view_q and view_k are exchanged.": torch.cat(two_views(images, index, "shapes", epoch=3)[::-1]),
    })  # fmt: skip
    print("[OK] views_of: two views of each image, others in each epoch")


def check_logits_of(yours: Callable) -> None:
    """Check ``yours(q, k, negatives, temperature)``: logits (N, 1 + K), own key in column 0.

    Raises:
        CheckFailed: names the likely mistake.
    """
    q, k, negatives = _unit(6, 16, seed=1), _unit(6, 16, seed=2), _unit(9, 16, seed=3)
    found = _called(yours, "logits_of", q, k, negatives, 0.2)
    _tensor(found, "logits_of", (6, 10))
    similarity = losses.contrastive_logits(q, k, negatives, 1.0)
    _diagnose("logits_of", found, similarity / 0.2, {
        "the temperature multiplies; at 0.2 the logits should be five times the similarities.": similarity * 0.2,
        "the temperature is missing.": similarity,
        "the own key should be in column 0; it is in the last.": similarity.roll(-1, dims=1) / 0.2,
        "only the positive is divided by the temperature.":
            torch.cat([similarity[:, :1] / 0.2, similarity[:, 1:]], dim=1),
    })  # fmt: skip
    print("[OK] logits_of: similarities over the temperature, own key first")


def check_embed(yours: Callable) -> None:
    """Check ``yours(encoder, view)``: unit vectors from an encoder's backbone and head.

    Raises:
        CheckFailed: names the likely mistake.
    """
    encoder = nn.Module()
    torch.manual_seed(0)
    encoder.backbone, encoder.head = nn.Sequential(nn.Flatten(), nn.Linear(12, 7)), nn.Linear(7, 5)
    view = torch.randn(6, 3, 2, 2)
    found = _called(yours, "embed", encoder, view)
    _tensor(found, "embed", (6, 5))
    raw = encoder.head(encoder.backbone(view))
    _diagnose("embed", found.detach(), F.normalize(raw, dim=1).detach(), {
        "the vectors do not have length 1. The encoder can then lower the loss by making them longer.": raw.detach(),
        "they are normalised over the images (dim=0); a query is a row (dim=1).": F.normalize(raw, dim=0).detach(),
        "it is the sum that is 1 in each row, not the length.": (raw / raw.sum(dim=1, keepdim=True)).detach(),
    })  # fmt: skip
    if not found.requires_grad:
        raise CheckFailed("embed: no gradient flows back: queries need one. No torch.no_grad() here.")
    print("[OK] embed: unit vectors, with gradient")


def check_look_up(yours: Callable) -> None:
    """Check ``yours(q, k, queue, pointer, temperature) -> (logits, pointer)``: logits with the queue as it was; it then gets k.

    Raises:
        CheckFailed: names the likely mistake.
    """
    q, k, queue = _unit(4, 16, seed=1), _unit(4, 16, seed=2), _unit(10, 16, seed=3)
    mine, pointer = queue.clone(), 8
    answer = _called(yours, "look_up", q, k, mine, pointer, 0.2)
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise CheckFailed(f"look_up: return (logits, pointer), not {type(answer).__name__}.")
    written = queue.clone()
    written[(pointer + torch.arange(4)) % 10] = k
    _tensor(answer[0], "look_up", (4, 11))
    _diagnose("look_up", answer[0], losses.contrastive_logits(q, k, queue, 0.2), {
        "the keys are in the queue before the logits are made: each query meets its own key twice, in column 0 and among the "
        "negatives, and the loss cannot go under log 2.": losses.contrastive_logits(q, k, written, 0.2),
    })  # fmt: skip
    if not _close(mine, written):
        raise CheckFailed("look_up: the logits are right, but this batch's keys are not in the queue afterwards.")
    if int(answer[1]) != 2:
        raise CheckFailed(f"look_up: the pointer is {int(answer[1])}, not 2 (K = 10, 4 keys from place 8 on).")
    print("[OK] look_up: first the logits, then the queue")
