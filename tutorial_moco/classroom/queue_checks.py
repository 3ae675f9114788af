"""Visible checks of the queue (A2); `tutorial_moco.checks` says how a check diagnoses."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tutorial_moco.checks import CheckFailed, _called, _close, _diagnose, _Points, _tensor, _unit
from tutorial_moco.feature_checks import _number
from tutorial_moco.mechanisms import MoCo


def check_oldest(yours: Callable) -> None:
    """Check ``yours(K, batch)``: steps since the oldest key of a full queue was written.

    Raises:
        CheckFailed: names the likely mistake.
    """
    for K, batch in ((12, 4), (10, 4), (3, 8)):
        found = _number(_called(yours, "oldest", K, batch), "oldest").item()
        if found != math.ceil(K / batch):
            likely = (
                "round up: some keys of the first of those batches are still there." if found in (K // batch, K / batch)
                else "count steps, not keys." if found == K
                else "the newest key was written one step ago: its age is 1." if found == math.ceil(K / batch) - 1
                else "how many batches does it take to overwrite all K keys?"
            )  # fmt: skip
            raise CheckFailed(f"oldest: for K={K} and batches of {batch} it is {math.ceil(K / batch)}, not {found:g}: {likely}")
    print("[OK] oldest: no key of a queue is older than that")


def check_ages(yours: Callable) -> None:
    """Check ``yours(K, batch, steps)``: the age of the key at each place of the ring, int (K,), -1 where none was written.

    Raises:
        CheckFailed: names the likely mistake.
    """
    for K, batch, steps in ((8, 4, 3), (7, 3, 2), (7, 3, 9), (5, 8, 2), (4, 2, 0)):
        expected = ring_ages(K, batch, steps)
        found = _called(yours, "ages", K, batch, steps)
        found = torch.as_tensor(found) if isinstance(found, list | tuple | np.ndarray) else found
        _tensor(found, "ages", (K,))
        where = f" (K={K}, batches of {batch}, {steps} steps)"
        written = expected >= 0
        _diagnose("ages", found.float(), expected.float(), {
            f"they are one too small: the newest key was written one step ago, so its age is 1.{where}":
                torch.where(written, expected - 1, -1).float(),
            f"places that have never been written should be -1.{where}": torch.where(written, expected, 0).float(),
            f"places that have never been written should be -1, not {steps}.{where}":
                torch.where(written, expected, steps).float(),
            f"it is the step of the writing; the age is the steps since then.{where}":
                torch.where(written, steps - expected, -1).float(),
            f"after the last place comes place 0 (% K); without it the ring is written once and never again.{where}":
                _ages_without_wrap(K, batch, steps).float(),
        })  # fmt: skip
    print("[OK] ages: the ring, for any K, any batch and any number of steps")


def ring_ages(K: int, batch: int, steps: int) -> Tensor:
    """The age of the key at each place of a ring, int64 (K,), by the package; see `MoCo.ages`."""
    moco = MoCo(_Points(1), K)
    for _ in range(steps):
        moco.enqueue(torch.zeros(batch, 1))
    return moco.ages()


def ring_rows(K: int, batches: list[Tensor]) -> tuple[list[Tensor | None], int]:
    """The rows of a ring after these batches, None where none was written, and the pointer; by a plain list."""
    rows, place = [None] * K, 0
    for batch in batches:
        for key in batch:
            rows[place], place = key, (place + 1) % K
    return rows, place


def _ages_without_wrap(K: int, batch: int, steps: int) -> Tensor:
    born = torch.full((K,), -1)
    for step in range(steps):
        born[step * batch : (step + 1) * batch] = step
    return torch.where(born < 0, -1, steps - born)


def check_queue(yours: type) -> None:
    """Check a class ``yours(K, dim)`` with ``enqueue(keys)``, ``state()`` and ``load(state)``: a queue that survives a stop.

    Raises:
        CheckFailed: names the likely mistake.
    """
    first = _called(yours, "Queue", 7, 4)
    keys = getattr(first, "keys", None)
    if not isinstance(keys, Tensor) or keys.shape != (7, 4):
        raise CheckFailed("Queue: queue.keys should be a tensor of shape (K, dim).")
    if not _close(keys.norm(dim=1), torch.ones(7)):
        raise CheckFailed(
            "Queue: the first keys do not have length 1. Random vectors of another length have similarities far beyond 1, and "
            "the loss starts very high or gets stuck at log(K + 1)."
        )
    if (keys[0] - keys[1]).abs().max() < 1e-6:
        raise CheckFailed("Queue: the first keys are all the same. Draw them at random.")
    batches = _unit(9, 4, seed=1).split(3)
    for batch in batches[:2]:
        _called(first.enqueue, "Queue.enqueue", batch)
    second = _called(yours, "Queue", 7, 4)
    for batch in batches:
        before = second.keys.clone()
        _called(second.enqueue, "Queue.enqueue", batch)
        if torch.equal(second.keys, before):
            raise CheckFailed("Queue.enqueue: queue.keys is unchanged after it.")
    if not _close(second.keys, torch.stack(ring_rows(7, batches)[0])):
        raise CheckFailed(
            "Queue.enqueue: after three batches of 3 the ring of 7 does not hold the last 7 keys at their places."
        )
    state = _called(first.state, "Queue.state")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckFailed("Queue.state: return a dict of tensors, which is what a checkpoint can hold.")
    state = {name: value.clone() for name, value in state.items()}
    second = _called(yours, "Queue", 7, 4)
    _called(second.load, "Queue.load", state)
    if not _close(second.keys, first.keys):
        raise CheckFailed("Queue.load: after load(state) the keys are not those that were saved: the queue is lost on resume.")
    for queue in (first, second):
        _called(queue.enqueue, "Queue.enqueue", batches[2])
    if not _close(second.keys, first.keys):
        raise CheckFailed(
            "Queue.load: the keys come back, but the next batch goes to other places than it would have gone: the pointer is "
            "lost on resume. Save it with the keys."
        )
    print("[OK] Queue: saved and loaded, it goes on as if nothing had happened")
