"""Visible checks of a step and a training (A4); `tutorial_moco.checks` says how a check diagnoses."""

import math
from collections.abc import Callable
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutorial_moco import losses
from tutorial_moco.augment import two_views
from tutorial_moco.checks import CheckFailed, _called, _close, _diagnose, _info_nce_mistakes, _tensor


def check_keys_of(yours: Callable) -> None:
    """Check ``yours(f_k, view, order)``: keys without gradient, encoded in another order and returned in the view's.

    Raises:
        CheckFailed: names the likely mistake.
    """
    torch.manual_seed(0)
    f_k = nn.Sequential(nn.Flatten(), nn.Linear(12, 8))
    seen = []
    f_k.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    view, order = torch.randn(6, 3, 2, 2), torch.tensor([2, 0, 5, 1, 4, 3])
    with torch.no_grad():
        right = F.normalize(f_k(view), dim=1)
    seen.clear()
    found = _called(yours, "keys_of", f_k, view.clone(), order.clone())
    _tensor(found, "keys_of", (6, 8))
    if found.requires_grad:
        raise CheckFailed("keys_of: the keys carry a gradient. Algorithm 1 detaches them: put it under torch.no_grad().")
    with torch.no_grad():
        plain = f_k(view)
    _diagnose("keys_of", found, right, {
        "the keys do not have length 1: F.normalize(..., dim=1).": plain,
        "the keys are still in the shuffled order, so row i is another image's key. Undo it: torch.argsort(order).":
            right[order],
        "the order was applied twice, which does not undo it. The inverse of a permutation is torch.argsort(order).":
            right[order][order],
        "they are normalised over the images (dim=0); each key is a row (dim=1).": F.normalize(plain, dim=0),
    })  # fmt: skip
    if not any(torch.equal(images, view[order]) for images in seen):
        raise CheckFailed(
            "keys_of: the keys are right, but f_k has not seen the images in the given order: f_k(view[order]). On several "
            "GPUs the order decides with which images a key shares its BatchNorm statistics; that is what shuffling is for."
        )
    print("[OK] keys_of: shuffled on the way in, in order on the way out, without gradient")


def check_step(yours: Callable) -> None:
    """Check ``yours(f_q, f_k, queue, pointer, view_q, view_k, optimizer, m, temperature) -> (loss, pointer)``: Algorithm 1.

    Runs four steps beside a reference; K is no multiple of the batch.

    Raises:
        CheckFailed: names the first thing that differs, and the likely mistake.
    """
    mine, theirs = StepBench(), StepBench()
    for step in range(1, 5):
        mistakes = theirs.mistakes(step)
        _called(lambda bench=mine, step=step: bench.run(yours, step), "moco_step")
        theirs.run(reference_step, step)
        mine.compare(theirs, step, "moco_step", mistakes)
    print("[OK] moco_step: loss, encoders, queue and pointer agree with the reference in each of 4 steps")


class StepBench:
    """A linear encoder on 2x2 pixels, a key encoder, a queue of K that wraps around, and views for a few steps."""

    def __init__(self, K: int = 10, N: int = 4, m: float = 0.7, temperature: float = 0.2, seed: int = 0, momentum: float = 0.0):
        self.random = torch.Generator().manual_seed(seed)
        self.f_q, self.f_k = (nn.Sequential(nn.Flatten(), nn.Linear(12, 8)) for _ in range(2))
        with torch.no_grad():
            for parameter in self.f_q.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=self.random))
        self.f_k.load_state_dict(self.f_q.state_dict())
        for parameter in self.f_k.parameters():
            parameter.requires_grad_(False)
        self.queue = F.normalize(torch.randn(K, 8, generator=self.random), dim=1)
        self.pointer, self.loss, self.m, self.temperature, self.N = 0, math.nan, m, temperature, N
        self.optimizer = torch.optim.SGD(self.f_q.parameters(), lr=0.5, momentum=momentum)
        self.seed = seed

    def run(self, step_function: Callable, step: int) -> None:
        """One step with the views of this number."""
        self.before = weights_of(self.f_q), weights_of(self.f_k)
        answer = step_function(
            self.f_q, self.f_k, self.queue, self.pointer, *self.views(step), self.optimizer, self.m, self.temperature
        )
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise CheckFailed(f"moco_step: return (loss, pointer), not {type(answer).__name__}.")
        self.loss, self.pointer = float(answer[0]), int(answer[1])

    def views(self, step: int) -> list[Tensor]:
        """Two views (N, 3, 2, 2) for the step of this number."""
        random = torch.Generator().manual_seed(1000 * (self.seed + 1) + step)
        return [torch.randn(self.N, 3, 2, 2, generator=random) for _ in range(2)]

    @torch.no_grad()
    def mistakes(self, step: int) -> dict[str, float]:
        """What the loss of the coming step would be with one known mistake each."""
        raw_q, raw_k = (encoder(view) for encoder, view in zip((self.f_q, self.f_k), self.views(step), strict=True))
        q, k = F.normalize(raw_q, dim=1), F.normalize(raw_k, dim=1)
        written, tau = self.queue.clone(), self.temperature
        written[(self.pointer + torch.arange(self.N)) % len(written)] = k
        losses_with = {
            "this step's keys are in the queue before the loss is computed. Each query then meets its own key twice.":
                losses.info_nce(q, k, written, tau),
            "q and k are not normalised.": losses.info_nce(raw_q, raw_k, self.queue, tau),
            "k is made by f_q. Keys are f_k's.":
                losses.info_nce(q, F.normalize(self.f_q(self.views(step)[1]), dim=1), self.queue, tau),
        }  # fmt: skip
        return {what: loss.item() for what, loss in losses_with.items()} | {
            what: loss.item() for what, loss in _info_nce_mistakes(q, k, self.queue, tau).items()
        }

    def compare(self, right: "StepBench", step: int, name: str, mistakes: dict[str, float] | None = None) -> None:
        """Fail with the first thing that differs from the reference, in the order in which a step makes them."""

        def differ(a, b):
            return not _close(torch.as_tensor(a, dtype=torch.float32), torch.as_tensor(b, dtype=torch.float32))

        where = f"{name}, step {step}: "
        if differ(self.loss, right.loss):
            for what, loss in (mistakes or {}).items():
                if not differ(self.loss, loss):
                    raise CheckFailed(where + what)
            raise CheckFailed(
                where + f"the loss is {self.loss:.4f}, not {right.loss:.4f}. Are q and k normalised, the logits divided by the "
                "temperature, the own key in column 0 and the labels 0? Are the negatives the queue as it was before this step?"
            )
        if differ(weights_of(self.f_q), weights_of(right.f_q)):
            raise CheckFailed(
                where
                + "the loss is right, but f_q moved otherwise. zero_grad, backward and step, once each, in this order?"
                + (" Does the momentum update touch f_q?" if step == 1 else "")
            )
        if differ(found := weights_of(self.f_k), weights_of(right.f_k)):
            q, (q_before, k_before), m = weights_of(right.f_q), right.before, right.m
            known = {
                "it is a copy of f_q": q,
                "it has not moved (does the momentum update come after the optimizer's step?)": k_before,
                "the momentum update is the wrong way round": m * q + (1 - m) * k_before,
                "it follows f_q as it was before the optimizer's step": m * k_before + (1 - m) * q_before,
            }
            fits = (what for what, wrong in known.items() if not differ(found, wrong))
            likely = next(fits, "it is not m theta_k + (1 - m) theta_q")
            raise CheckFailed(where + f"f_q is right and f_k is not: {likely}.")
        if differ(self.queue, right.queue):
            raise CheckFailed(
                where + "the queue differs. This step's keys (not queries) go to the N places from the pointer on, in place, "
                "and after the last place comes place 0."
            )
        if self.pointer != right.pointer:
            raise CheckFailed(where + f"the pointer is {self.pointer}, not {right.pointer}: (pointer + N) % K.")


def check_train(yours: Callable) -> None:
    """Check ``yours(images, steps, seed) -> (encoder, losses)`` on 512 images and 12 steps, a step being 64 images.

    It has to call ``two_views`` and ``moco_step`` by these names: what it gives to them is looked at.

    Raises:
        CheckFailed: names the first thing that is not as the task says.
    """
    images = (torch.rand(512, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    draws, steps, names = [], [], yours.__globals__ if hasattr(yours, "__globals__") else {}
    start = {}

    def views(images, index, augmentation, *more, **options):
        draws.append((index.tolist(), options.get("epoch", 0), augmentation))
        return two_views(images, index, augmentation, *more, **options)

    def step(f_q, f_k, queue, pointer, view_q, view_k, optimizer, m, temperature):
        if not steps:
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            start.update(
                lengths=queue.norm(dim=1), K=len(queue), copy=f_k is not f_q and _close(weights_of(f_k), weights_of(f_q)),
                shared=f_k is f_q, held=held == {id(parameter) for parameter in f_q.parameters()}, weights=weights_of(f_q),
            )  # fmt: skip
        steps.append((pointer, optimizer.param_groups[0]["lr"], m, temperature))
        return reference_step(f_q, f_k, queue, pointer, view_q, view_k, optimizer, m, temperature)

    def fail(what: str) -> None:
        raise CheckFailed(f"train: {what}")

    with patch.dict(names, {name: spy for name, spy in (("two_views", views), ("moco_step", step)) if name in names}):
        answer = _called(yours, "train", images, 12, 5)
    if not isinstance(answer, tuple) or len(answer) != 2 or not isinstance(answer[0], nn.Module):
        fail(f"return (encoder, losses), not {type(answer).__name__}.")
    encoder, curve = answer
    if not isinstance(curve, list):
        fail(f"12 steps should give a list of 12 losses, not {type(curve).__name__}.")
    if len(curve) != 12 or not all(isinstance(loss, float) for loss in curve):
        kinds = " and ".join(sorted({type(loss).__name__ for loss in curve})) or "none"
        fail(f"12 steps should give a list of 12 losses, each a float; yours has {len(curve)}: {kinds}.")
    if (len(draws), len(steps)) != (12, 12):
        fail(
            "12 steps should call two_views and moco_step 12 times, by these names; "
            f"yours called them {len(draws)} and {len(steps)} times."
        )
    if any(len(index) != 64 for index, _, _ in draws):
        fail(f"a step has 64 images, and one of yours has {next(len(i) for i, _, _ in draws if len(i) != 64)}.")
    if len({number for index, _, _ in draws[:8] for number in index}) != 512:
        fail("in the first 8 steps each of the 512 images should come once; some came twice, others not at all.")
    if [index for index, _, _ in draws[:4]] == [index for index, _, _ in draws[8:]] or draws[0][0] == list(range(64)):
        fail("the order is the same in each epoch. Draw a new one: torch.randperm.")
    if draws[0][1] == draws[8][1]:
        fail("two_views gets the same epoch in the second round, so each image is cropped as before: pass epoch=epoch.")
    if draws[0][2] != "shapes":
        fail(f"the views should be those of 'shapes', not {draws[0][2]!r}.")
    if start["shared"]:
        fail("f_k *is* f_q. A copy is wanted: deepcopy.")
    if not start["copy"]:
        fail("f_k does not start as a copy of f_q.")
    if not start["held"]:
        fail("the optimizer should hold the parameters of f_q, all of them and no others.")
    if start["K"] != 256 or not _close(start["lengths"], torch.ones(start["K"])):
        fail("the first queue should be 256 random vectors of length 1.")
    if [pointer for pointer, *_ in steps[:5]] != [0, 64, 128, 192, 0]:
        fail(f"the pointer does not go on: {[int(pointer) for pointer, *_ in steps[:5]]}. Pass on what moco_step returned.")
    rates = torch.tensor([rate for _, rate, *_ in steps])
    expected = torch.tensor([0.12 * 0.5 * (1 + math.cos(math.pi * number / 12)) for number in range(12)])
    if not _close(rates, expected):
        fail(f"the learning rate should fall from 0.12 along a cosine; yours goes from {rates[0]:.3f} to {rates[-1]:.3f}.")
    if {(m, temperature) for *_, m, temperature in steps} != {(0.99, 0.1)}:
        fail("m should be 0.99 and the temperature 0.1.")
    if _close(start["weights"], weights_of(encoder)):
        fail("the encoder that is returned has not moved. Is it f_q?")
    print("[OK] train: the right images, views, queue, copy, optimizer and learning rate")


def weights_of(module: nn.Module) -> Tensor:
    """All parameters of a module as one vector."""
    # torch.nn.utils.parameters_to_vector wants contiguous weights, and ours are channels_last.
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def reference_step(f_q, f_k, queue, pointer, view_q, view_k, optimizer, m, temperature) -> tuple[float, int]:
    """Algorithm 1 on plain modules, by the package's loss."""
    q = F.normalize(f_q(view_q), dim=1)
    with torch.no_grad():
        k = F.normalize(f_k(view_k), dim=1)
    loss = losses.info_nce(q, k, queue, temperature)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for theta_k, theta_q in zip(f_k.parameters(), f_q.parameters(), strict=True):
            theta_k.lerp_(theta_q, 1 - m)
        rows, last = (pointer + torch.arange(len(k))) % len(queue), slice(-len(queue), None)
        queue[rows[last]] = k[last]
    return loss.item(), (pointer + len(k)) % len(queue)
