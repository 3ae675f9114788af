"""Checks for what a reader has built by hand: right or not, and if not, which known mistake it behaves like.

Each check runs the reader's function and the package's on random inputs. If they differ, it compares the answer with those of
functions that hold one real, published mistake each; the one that agrees names the mistake. So a message is a diagnosis
and not a guess, and a test makes every check meet every one of its mistakes.
"""

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from tutorial_moco import losses
from tutorial_moco.mechanisms import MoCo

SECONDS = 30.0  # that a reader's function may take for one call
PATIENCE = float(os.environ.get("TUTORIAL_MOCO_PATIENCE", "1"))  # times as much on a slow machine


READ = {  # chapter and section, by the name that a message begins with
    "softmax": "01, From similarities to a loss",
    "info_nce": "01, From similarities to a loss",
    "nce": "01, Three losses, and what $K$ means in each",
    "gradient": "01, What the temperature does",
    "effective_negatives": "01, What the temperature does",
    "enqueue": "02, A ring",
    "oldest": "02, How old is a key?",
    "ages": "02, How old is a key?",
    "Queue": "02, What is in the queue before anything is?",
    "momentum_update": "03, The update",
    "ema": "03, A filter",
    "half_life": "03, A filter",
    "similarity_by_age": "03, The staleness laboratory",
    "keys_of": "04, Shuffling BN, and the leak it mends",
    "moco_step": "04, Rung three: write it, and see every shape (15 minutes)",
    "train": "04, Train it",
    "first_queue": "02, The bug: a start that was not normalised",
    "views_of": "01, A question that needs no labels",
    "logits_of": "01, From similarities to a loss",
    "embed": "01, From similarities to a loss",
    "look_up": "04, Rung one: order the lines (8 minutes)",
    "few_labels": "08, 1. A hundred labels",
    "iou": "08, 2. Where is it?",
    "average_precision": "08, 2. Where is it?",
    "mean_iou": "08, 3. Which pixels are it?",
    "rate": "09, 1. Three switches",
    "v3_loss": "09, 2. v3 lets the queue go",
    "masked_loss": "09, 3. The last paragraph of the first paper",
    "hours": "10, 1. How long?",
    "fixed_bytes": "10, 2. What has to fit",
    "rows_of": "10, 4. Several processes that train as one",
    "shuffled_keys": "10, 4. Several processes that train as one",
}


class CheckFailed(AssertionError):
    """What the check found, in a line or two, and where to read."""

    def __init__(self, message: str):
        place = READ.get(re.split(r"[:,. (]", message)[0], "").replace("$", "")
        super().__init__(f"{message} Read: chapter {place}." if place else message)

    def _render_traceback_(self) -> list[str]:
        """What Jupyter shows in place of a traceback: the line alone (IPython looks for this method)."""
        return [f"[not yet] {self}"]


def check_info_nce(yours: Callable) -> None:
    """Check ``yours(q, k, negatives, temperature)``, the InfoNCE of chapter 01, against `losses.info_nce`.

    Raises:
        CheckFailed: names the likely mistake.
    """
    q, k, negatives = _unit(6, 16, seed=1), _unit(6, 16, seed=2), _unit(9, 16, seed=3)
    expected = losses.info_nce(q, k, negatives, 0.2)
    found = _called(yours, "info_nce", q, k, negatives, 0.2)
    _tensor(found, "info_nce", ())
    _diagnose("info_nce", found, expected, _info_nce_mistakes(q, k, negatives, 0.2))
    huge = _called(yours, "info_nce", q, q, -q, 1e-3)
    if not torch.isfinite(huge):
        raise CheckFailed(
            "info_nce: right for ordinary logits, but not finite at temperature 0.001. exp() of large numbers overflows: "
            "let F.cross_entropy or torch.logsumexp take the exponentials."
        )
    print("[OK] info_nce agrees with tutorial_moco.losses.info_nce")


def _info_nce_mistakes(q: Tensor, k: Tensor, negatives: Tensor, temperature: float) -> dict[str, Tensor]:
    positive, others = (q * k).sum(dim=1, keepdim=True), q @ negatives.T
    logits = torch.cat([positive, others], dim=1)
    zeros = torch.zeros(len(q), dtype=torch.long)
    return {
        "the temperature multiplies the logits; it has to divide them.": F.cross_entropy(logits * temperature, zeros),
        "the logits are not divided by the temperature.": F.cross_entropy(logits, zeros),
        "only the positive is divided by the temperature.":
            F.cross_entropy(torch.cat([positive / temperature, others], dim=1), zeros),
        "the own key is missing below the fraction: the sum runs over the positive and the negatives (1 + K terms).":
            (torch.logsumexp(others / temperature, dim=1) - positive[:, 0] / temperature).mean(),
        "the labels are wrong. The own key is in column 0, so every label is 0, not the row's number.":
            F.cross_entropy(logits / temperature, torch.arange(len(q))),
        "the own key is in the last column, but the label says column 0 (or the other way round).":
            F.cross_entropy(torch.cat([others, positive], dim=1) / temperature, zeros),
        "the sign is wrong: the loss is minus the logarithm.": -F.cross_entropy(logits / temperature, zeros),
        "the losses of the queries are added up; take their mean.": len(q) * F.cross_entropy(logits / temperature, zeros),
        "all queries are compared with all keys as positives: q @ k.T, where each query has one key, (q * k).sum(dim=1).":
            F.cross_entropy(torch.cat([q @ k.T, others], dim=1) / temperature, zeros),
    }  # fmt: skip


def check_enqueue(yours: Callable) -> None:
    """Check ``yours(queue, pointer, keys) -> pointer``, which writes keys (N, C) over the oldest of queue (K, C) in place.

    Raises:
        CheckFailed: names the likely mistake.
    """
    for K, sizes in ((8, (4, 4, 4)), (7, (3, 3, 3, 3)), (5, (7, 2))):
        keys = list(_unit(sum(sizes), 4, seed=K).split(sizes))
        right = [_ring(K, keys[: n + 1]) for n in range(len(keys))]
        queue, pointer = _unit(K, 4, seed=0), 0
        for step, batch in enumerate(keys):
            before = queue.clone()
            pointer = _called(yours, f"enqueue (K={K}, a batch of {len(batch)})", queue, pointer, batch)
            if pointer is None:
                raise CheckFailed("enqueue: it returns nothing. Return the new pointer, the place of the oldest key.")
            found = _place(pointer)
            expected, place = right[step]
            if torch.equal(queue, before):
                raise CheckFailed("enqueue: the queue is unchanged. Write into it in place: queue[...] = keys.")
            if not torch.equal(queue, expected):
                raise CheckFailed(
                    f"enqueue: {_enqueue_mistake(queue, expected, before, batch)} (K={K}, a batch of {len(batch)})"
                )
            if found != place:
                raise CheckFailed(
                    f"enqueue: the keys are in place but the pointer is {found}, not {place} (K={K}, a batch of "
                    f"{len(batch)}). After the last place comes place 0: (pointer + N) % K."
                )
    print("[OK] enqueue behaves as MoCo.enqueue does, for any K and any batch")


def _place(pointer) -> int:
    """A pointer as a number, be it one or a tensor of one."""
    try:
        return int(pointer)
    except (TypeError, ValueError, RuntimeError):
        kind = type(pointer).__name__
        raise CheckFailed(
            f"enqueue: it returns a {kind}, not a place. Return the new pointer alone: the queue is written in place."
        ) from None


def _ring(K: int, batches: list[Tensor]) -> tuple[Tensor, int]:
    """The queue (K, C) and its pointer after these batches, by the package."""
    moco = MoCo(_Points(batches[0].shape[1]), K, 0.9)
    moco.queue.copy_(_unit(K, batches[0].shape[1], seed=0))
    for keys in batches:
        moco.enqueue(keys)
    return moco.queue, int(moco.pointer)


def _enqueue_mistake(queue: Tensor, expected: Tensor, before: Tensor, keys: Tensor) -> str:
    K, N = len(queue), len(keys)
    if N <= K and torch.equal(queue, torch.cat([keys, before])[:K]):
        return "the new keys are put in front and the rest moved along. A ring moves nothing: write at the pointer."
    if N <= K and torch.equal(queue[:N], keys) and not torch.equal(expected[:N], keys):
        return "it always writes at place 0. Write at the pointer, or only the first N places are ever renewed."
    if (queue != expected).any(dim=1).sum() < min(N, K):
        return "the wrap-around is wrong: keys that do not fit at the end go on at place 0, none is dropped."
    return "other places than the oldest were overwritten. The pointer stands at the oldest; write N places from there."


def check_momentum_update(yours: Callable) -> None:
    """Check ``yours(encoder, key_encoder, m)``, which moves the key encoder's parameters in place (equation 2).

    Raises:
        CheckFailed: names the likely mistake.
    """
    encoder, key_encoder, m = _Points(4), _Points(4), 0.9
    with torch.no_grad():
        for number, parameter in enumerate([*encoder.parameters(), *key_encoder.parameters()]):
            parameter.copy_(_unit(*parameter.shape, seed=number) if parameter.ndim == 2 else torch.full_like(parameter, number))
    q, k = (parameters_to_vector(one.parameters()).detach() for one in (encoder, key_encoder))
    _called(yours, "momentum_update", encoder, key_encoder, m)
    if not torch.equal(parameters_to_vector(encoder.parameters()), q):
        raise CheckFailed(
            "momentum_update: the query encoder has moved. Only the key encoder follows; the optimizer moves f_q."
        )
    if any(parameter.grad_fn is not None for parameter in key_encoder.parameters()):
        raise CheckFailed("momentum_update: the update is part of the gradient's graph. Put it under torch.no_grad().")
    weights = encoder.weight.numel()  # they come first in the vectors, the biases after them
    _diagnose("momentum_update", parameters_to_vector(key_encoder.parameters()).detach(), m * k + (1 - m) * q, {
        "it is the wrong way round: with m near 1 the key encoder keeps most of itself, m * theta_k + (1 - m) * theta_q.":
            m * q + (1 - m) * k,
        "nothing has changed. Change the parameters in place (p.mul_(m).add_(...)); `p = ...` only renames.": k,
        "it copies the query encoder: that is m = 0.": q,
        "theta_k is added without being scaled by m.": k + (1 - m) * q,
        "only the first parameter has moved. Go through all of them, biases too: no `break` or `return` inside the loop.":
            torch.cat([(m * k + (1 - m) * q)[:weights], k[weights:]]),
    })  # fmt: skip
    print("[OK] momentum_update is equation 2, as MoCo.update_key_encoder")


def compare(**pairs: tuple[Tensor, Tensor]) -> None:
    """Print for each name whether your tensor and the package's are equal, and the largest difference.

    >>> compare(q=(q, contrast.q), k=(k, contrast.k))

    Raises:
        CheckFailed: names the first tensor that differs by more than 1e-5, or whose shape differs.
    """
    first = None
    for name, (mine, theirs) in pairs.items():
        mine, theirs = torch.as_tensor(mine).detach().float(), torch.as_tensor(theirs).detach().float()
        if mine.shape != theirs.shape:
            print(f"{name:12} shapes differ: {tuple(mine.shape)}, not {tuple(theirs.shape)}")
            first = first or name
            continue
        difference = (mine - theirs).abs().max().item()
        verdict = "equal" if difference == 0 else "close" if difference <= 1e-5 else "DIFFERENT"
        print(f"{name:12} {verdict:9} largest difference {difference:.1e}   shape {tuple(mine.shape)}")
        first = first or (name if verdict == "DIFFERENT" else None)
    if first:
        raise CheckFailed(f"{first} is the first that differs: the mistake is in the line that makes {first}, or before it.")


class TimeLimit(BaseException):
    """The time is up. Not an Exception, so that a reader's own ``except Exception`` doesn't swallow it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeLimit` in the body after so many seconds, where the system can (not on Windows, and in the main thread)."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise TimeLimit

    before = signal.signal(signal.SIGALRM, stop)
    outer = signal.setitimer(signal.ITIMER_REAL, seconds * PATIENCE, 1.0)  # then each second, should the code catch everything
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *outer)
        signal.signal(signal.SIGALRM, before)


# What the checks are made of -----------------------------------------------------------------------------------------


class _Points(nn.Linear):
    """The smallest encoder: a linear map of points."""

    def __init__(self, dim: int):
        super().__init__(dim, dim)
        self.dim = dim


def _unit(n: int, dim: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def _called(yours: Callable, name: str, *arguments):
    """What the reader's function returns; an unwritten one and an exception are told in a line."""
    try:
        # Warnings are no failure, but nbgrader takes any stderr for one.
        with contextlib.redirect_stderr(sys.stdout), time_limit(SECONDS):
            answer = yours(*arguments)
    except TimeLimit:
        raise CheckFailed(f"{name}: still running after {SECONDS * PATIENCE:g} s. Is there a loop without end?") from None
    except NotImplementedError:
        raise CheckFailed(f"{name}: not written yet. Fill the gap, then run this cell again.") from None
    except CheckFailed:  # what calls the reader's function has found something
        raise
    except Exception as error:
        if "ellipsis" in str(error):
            raise CheckFailed(f"{name}: there are still dots (...) in it. Fill the gaps, then run this cell again.") from None
        raise CheckFailed(f"{name} stopped with {type(error).__name__}: {error}") from error
    if answer is ...:
        raise CheckFailed(f"{name}: not written yet. Replace the dots, then run this cell again.")
    return answer


def _tensor(found, name: str, shape: tuple[int, ...]) -> None:
    if not isinstance(found, Tensor):
        raise CheckFailed(f"{name}: it returns {type(found).__name__}, not a tensor. Is the `return` there?")
    if tuple(found.shape) != shape:
        raise CheckFailed(
            f"{name}: the shape is {tuple(found.shape)}, not {shape}." + (" Take the mean." if shape == () else "")
        )


def _diagnose(name: str, found: Tensor, expected: Tensor, mistakes: dict[str, Tensor]) -> None:
    """Nothing if found is right; else the mistake that gives the same answer, or how far off it is."""
    if _close(found, expected):
        return
    if found.shape != expected.shape and not any(_close(found, wrong) for wrong in mistakes.values()):
        raise CheckFailed(f"{name}: the shape is {tuple(found.shape)}, not {tuple(expected.shape)}.")
    for mistake, wrong in mistakes.items():
        if not _close(wrong, expected) and _close(found, wrong):
            raise CheckFailed(f"{name}: {mistake}")
    raise CheckFailed(
        f"{name}: off by {(found - expected).abs().max():.2g}, and it is none of the usual mistakes. Print the shapes of every "
        "intermediate, then compare with the formula term by term."
    )


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=1e-4, rtol=1e-4)
