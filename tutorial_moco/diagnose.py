"""What is in the dictionary: how far each stored key is from what the encoder would say of the same view today."""

from copy import deepcopy
from itertools import islice

import torch
from torch import Tensor

from tutorial_moco.augment import two_views
from tutorial_moco.errors import UsageError
from tutorial_moco.mechanisms import Mechanism, MemoryBank, MoCo
from tutorial_moco.pretrain import Run, batches
from tutorial_moco.speed import autocast, products_in


@torch.no_grad()
def key_drift(run: Run, images: Tensor) -> tuple[Tensor, Tensor]:
    """Age of each stored key, and its cosine with the same view of the same image encoded now.

    MoCo's keys are encoded by the key encoder, the memory bank's by the encoder; a bank's key is a running mean over
    visits and is compared with the view of its last visit. Nothing has to be recorded for this during training: batches,
    views and the order of shuffling BN are functions of the seed and the step. Each view is encoded in the batch it came
    in, with that batch's statistics and in the run's number format, by a copy: the run stays as it is.

    Args:
        run: of moco or memory_bank. images: the uint8 (n, 3, H, W) that it was trained on.

    Returns:
        ages in steps, int64 (n',), 1 for the newest, and cosines, float32 (n',), of the n' keys that have been written.

    Raises:
        UsageError: the mechanism keeps no keys from step to step, or these are not the run's images.
    """
    if len(images) != run.n:
        raise UsageError(f"images must be the {run.n} that the run was trained on, not {len(images)}")
    mechanism = deepcopy(run.mechanism).train()
    if isinstance(mechanism, MoCo):
        stored, (born, row) = mechanism.queue, rows_of_queue(mechanism, run.recipe.batch_size)
    elif isinstance(mechanism, MemoryBank):
        stored, (born, row) = mechanism.bank, rows_of_bank(run)
    else:
        raise UsageError(f"--mechanism {run.recipe.mechanism} keeps no keys from step to step: use moco or memory_bank")
    cosines = torch.zeros(len(stored), device=run.device)
    for step in born[born >= 0].unique().tolist():
        keys = encode_again(run, mechanism, images, step)
        here = born == step
        cosines[here] = (stored[here] * keys[row[here]]).sum(dim=1)
    written = born >= 0
    return (run.step - born)[written].cpu(), cosines[written].cpu()


def rows_of_queue(mechanism: MoCo, batch_size: int) -> tuple[Tensor, Tensor]:
    """For each place of the queue the step its key was written at, -1 if none was, and the key's row among that step's keys."""
    keys = batch_size * (2 if mechanism.symmetric else 1)  # of a step
    first = max(0, keys - mechanism.K)  # what does not fit is not written
    place = torch.arange(mechanism.K, device=mechanism.born.device)
    return mechanism.born, first + (place - mechanism.born * keys - first) % mechanism.K  # row r is at (step * keys + r) % K


def rows_of_bank(run: Run) -> tuple[Tensor, Tensor]:
    """For each image the step of its last visit, -1 if there was none, and its row in that batch."""
    born = torch.full((run.n,), -1, device=run.device)
    row = torch.zeros_like(born)
    for step, (_, index) in enumerate(islice(batches(run.n, run.recipe, 0, run.device), run.step)):
        born[index], row[index] = step, torch.arange(len(index), device=run.device)
    return born, row


def encode_again(run: Run, mechanism: Mechanism, images: Tensor, step: int) -> Tensor:
    """The keys (N, C), of both views (2N, C) if symmetric, that a step would write if its batch came now."""
    recipe = run.recipe
    epoch, index = next(batches(run.n, recipe, step, run.device))
    batch = images[index.to(images.device)].to(run.device)
    mechanism.steps.fill_(step)  # decides the order of shuffling BN
    with products_in(run.dtype):
        view_q, view_k = two_views(batch, index, recipe.augmentation, seed=recipe.seed, epoch=epoch)
        with autocast(run.device, run.dtype):
            contrast = mechanism.contrast(view_q, view_k, index)
    return contrast.k if isinstance(mechanism, MoCo) else contrast.q
