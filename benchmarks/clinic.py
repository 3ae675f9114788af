"""The runs of the bug clinic (assignment A5): ``python -m benchmarks.clinic`` writes ``data/study-clinic.jsonl``.

Eight trainings of a tiny encoder on the drawn images, each with one bug, and a healthy one; for each the curves, and vital
signs measured in the middle. A row has a patient's number and not the bug: which is which stands here and in the hidden tests.
"""

import json
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tutorial_moco import breakages, speed
from tutorial_moco import pretrain as training
from tutorial_moco.augment import two_views
from tutorial_moco.breakages import BREAKAGES, HEALTHY, SYMPTOMS, Breakage
from tutorial_moco.classroom.step_checks import weights_of
from tutorial_moco.cli import exit_status, parse
from tutorial_moco.files import make_folder, write_whole
from tutorial_moco.images import ImageSet, load_images
from tutorial_moco.mechanisms import Contrast, MoCo
from tutorial_moco.pretrain import Run
from tutorial_moco.provenance import provenance
from tutorial_moco.recipes import Recipe


@dataclass(frozen=True)
class Flags:
    """Train the patients of the bug clinic on the drawn images: about three minutes on two cores."""

    out: Path = Path("data/study-clinic.jsonl")  # file of the rows


class FollowsBackwards(MoCo):
    """theta_k <- (1 - m) theta_k + m theta_q: with m near 1 the key encoder jumps with each step."""

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        torch._foreach_lerp_(list(self.key_encoder.parameters()), list(self.encoder.parameters()), self.m)


class WithoutLength(MoCo):
    """Queries are what the head gives: nobody has divided them by their length. (With such keys, too, the loss is soon nan.)"""

    def contrast(self, view_q: Tensor, view_k: Tensor, index: Tensor) -> Contrast:
        return Contrast(self.encoder.head(self.encoder.backbone(view_q)).float(), self.encode_keys(view_k), self.queue)


PATIENTS: dict[int, Breakage] = {
    0: HEALTHY,
    1: SYMPTOMS["stuck at log(K + 1)"],  # the first queue was not normalised
    2: BREAKAGES["no augmentation"],
    3: Breakage("the momentum update is the wrong way round", "", mechanism=FollowsBackwards),
    4: BREAKAGES["tau multiplied"],
    5: BREAKAGES["keys stay shuffled"],
    6: Breakage("queries are not normalised", "", mechanism=WithoutLength),
    7: BREAKAGES["pointer stays at 0"],
    8: BREAKAGES["enqueued first"],
}


def row_of(number: int, images: ImageSet, test: ImageSet) -> dict[str, object]:
    """Train a patient and measure it."""
    patient = PATIENTS[number]
    recipe = breakages.bench_recipe(images).replace(**patient.changes)
    with patch.multiple(training, MoCo=patient.mechanism, info_nce=patient.loss):
        signs = vital_signs(half_trained(recipe, images), images)
        run = training.pretrain(recipe, images, test, monitor=breakages.MONITOR, dtype=torch.float32, progress=False)
    return {
        "experiment": "clinic", "patient": number, "K": recipe.K, "batch_size": recipe.batch_size,
        "temperature": recipe.temperature, "m": recipe.m,
        "losses": [{name: round(point[name], 4) for name in ("step", "loss", "pretext_accuracy", "K")} for point in run.losses],
        "monitor": [{name: round(point[name], 2) for name in ("step", "knn_top1")} for point in run.monitor],
        "signs": {name: round(value, 4) for name, value in signs.items()},
        "seconds": round(run.seconds, 1), **provenance(images, run.device),
    }  # fmt: skip


def half_trained(recipe: Recipe, images: ImageSet) -> Run:
    """The run in the middle: at its end the learning rate is 0, and f_k has caught up with f_q."""
    run = training.start(recipe, images, torch.device("cpu"), torch.float32)
    total = recipe.epochs * (len(images) // recipe.batch_size)
    for epoch, index in islice(training.batches(len(images), recipe, 0, run.device), total // 2):
        training.set_learning_rate(run.optimizer, recipe, run.step / total)
        training.train_step(run, images.images[index], index, epoch)
    return run


@torch.no_grad()
def vital_signs(run: Run, images: ImageSet) -> dict[str, float]:
    """What one can measure of a MoCo without reading its code."""
    moco, index = run.mechanism, torch.arange(256)
    view_q, view_k = two_views(images.images[index], index, run.recipe.augmentation, epoch=99)
    q, k = moco.encoder(view_q), moco.key_encoder(view_k)
    asked = moco.contrast(view_q, view_k, index).q
    weights, theirs = (weights_of(module) for module in (moco.encoder, moco.key_encoder))
    steps = -(-moco.K // run.recipe.batch_size)
    renewed = (moco.born >= 0) & (moco.ages() <= steps)
    return {
        "length of the queries that the loss sees": asked.norm(dim=1).mean().item(),
        "cosine of two views of an image": (q * k).sum(dim=1).mean().item(),
        "cosine of two images": (k @ k.T)[~torch.eye(256, dtype=torch.bool)].mean().item(),
        f"share of the queue that was renewed in the last {steps} steps": renewed.float().mean().item(),
        "distance of f_k from f_q, relative": ((weights - theirs).norm() / weights.norm()).item(),
    }


def run(flags: Flags) -> None:
    """Record all patients."""
    make_folder(flags.out.parent)
    speed.keep_freed_memory()
    images, test = load_images("shapes", "train"), load_images("shapes", "test")
    rows = [row_of(number, images, test) for number in tqdm(PATIENTS, unit="patient")]
    write_whole(flags.out, "".join(json.dumps(row) + "\n" for row in rows).encode())
    print(f"{len(rows)} rows in {flags.out}")


def main() -> int:
    """Returns the exit status."""
    return exit_status("clinic", lambda: run(parse(Flags, sys.argv[1:], "python -m benchmarks.clinic")), "begins anew")


if __name__ == "__main__":
    sys.exit(main())
