"""Small encoders and their features through a training, for the notebooks: ``python -m benchmarks.snapshots``.

For each run ``data/RUN.safetensors`` (a checkpoint without the optimizer, matrices in float16) and
``data/RUN-features.safetensors`` (features of the same test images at some moments), read with `results.load_run` and
`results.load_features`. Labels are in them, images are not. A run whose files are there is not trained again.
"""

import dataclasses
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from benchmarks.plan import with_mechanism
from tutorial_moco import speed
from tutorial_moco.checkpoint import halved, load_checkpoint, pack, save_checkpoint
from tutorial_moco.cli import exit_status, parse
from tutorial_moco.compare import untrained
from tutorial_moco.errors import DataError, UsageError
from tutorial_moco.evaluate import extract_features, knn_top1
from tutorial_moco.images import ImageSet, load_images
from tutorial_moco.pretrain import Run, batches, check, set_learning_rate, start, train_step
from tutorial_moco.provenance import provenance
from tutorial_moco.randomness import permutation
from tutorial_moco.recipes import RECIPES, Recipe
from tutorial_moco.report import text_table

IMAGES = 1000  # test images whose features are kept
MOST = 12_000_000  # bytes that all files together should not exceed
QUEUE = ("encoder", "queue", "born")


@dataclass(frozen=True)
class Snapshot:
    """What is kept of a run: about how many moments, and which parts of the mechanism at the end."""

    recipe: Recipe
    moments: int
    parts: tuple[str, ...] = ("encoder",)


@dataclass(frozen=True)
class Flags:
    """Train what the notebooks read: encoders, and features of test images through the training. Goes on run by run."""

    data: str = "cifar10"  # cifar10, a folder split/class/image, or an archive of one; moco-shapes always has drawn images
    epochs: int | None = None  # passes over the images; the recipes' if left out
    out: Path = Path("data")  # folder of the files


def snapshots(n: int) -> dict[str, Snapshot]:
    """The runs by name, for n training images. MoCo's come with most moments, since t-SNE slides through them."""
    base = RECIPES["small"]
    return {
        "moco": Snapshot(base, 10, (*QUEUE, "key_encoder")),
        "moco-mlp": Snapshot(base.replace(head="mlp"), 5, QUEUE),
        "end_to_end": Snapshot(with_mechanism(base, "end_to_end", n), 5),
        "memory_bank": Snapshot(with_mechanism(base, "memory_bank", n), 5),
        "moco-shapes": Snapshot(RECIPES["shapes"], 8, (*QUEUE, "key_encoder")),
    }


def make(flags: Flags) -> str:
    """Train what is not there yet; returns the last line to print."""
    try:
        flags.out.mkdir(parents=True, exist_ok=True)  # told now, not after the first training
    except OSError as error:
        raise UsageError(f"--out {flags.out} could not be made: {error.strerror or error}") from error
    sets = {name: (load_images(name, "train"), load_images(name, "test")) for name in (flags.data, "shapes")}
    table, total = [["file", "MB"]], 0
    for name, snapshot in snapshots(len(sets[flags.data][0])).items():
        train, test = sets["shapes" if name.endswith("-shapes") else flags.data]
        epochs = {} if flags.epochs is None else {"epochs": flags.epochs}
        snapshot = dataclasses.replace(snapshot, recipe=snapshot.recipe.replace(**epochs))
        files = [flags.out / f"{name}.safetensors", flags.out / f"{name}-features.safetensors"]
        if all(holds(path, snapshot.recipe, train.hash) for path in files):
            print(f"{name}: is there", file=sys.stderr)
        else:
            train_and_save(name, snapshot, train, test, *files)
        table += [[path.name, f"{path.stat().st_size / 1e6:.2f}"] for path in files]
        total += sum(path.stat().st_size for path in files)
    print(text_table(table))
    return f"{total / 1e6:.2f} MB in {flags.out}, " + (f"OVER the {MOST / 1e6:g}" if total > MOST else f"within {MOST / 1e6:g}")


def holds(path: Path, recipe: Recipe, data_hash: str) -> bool:
    """Whether a file is there and of this recipe and these images."""
    try:
        facts = load_checkpoint(path)[1]
    except DataError:
        return False
    return facts.get("data_hash") == data_hash and Recipe.from_json(facts["recipe"]) == recipe


def train_and_save(name: str, snapshot: Snapshot, train: ImageSet, test: ImageSet, weights: Path, features: Path) -> None:
    """Train a run, reading features at its moments, and write both files."""
    recipe, index = snapshot.recipe, permutation(len(test), 0)[:IMAGES]
    check(recipe, len(train), None)
    few, device = test.take(index), speed.default_device()
    speed.keep_freed_memory()
    run = start(recipe, train, device)
    facts = provenance(train, device) | {"recipe": recipe.to_json(), "classes": train.classes}
    before, epochs = untrained(recipe, train, device), moments(recipe.epochs, snapshot.moments)
    taken = [read(before.mechanism.encoder.backbone, train, few, before.dtype)]
    for _ in training(run, train, epochs[1:], name):
        taken.append(read(run.mechanism.encoder.backbone, train, few, run.dtype))
    kept, knn = zip(*taken, strict=True)
    tensors = {"features": torch.stack(kept).half(), "labels": few.labels, "index": index}
    save_checkpoint(features, tensors, {**facts, "epochs": epochs, "knn": knn})
    dtype = str(run.dtype).removeprefix("torch.")
    ended = {"dtype": dtype, "step": run.step, "seconds": run.seconds, "knn_top1": knn[-1]}
    save_checkpoint(weights, parts_of(run, snapshot.parts), facts | ended)


def moments(epochs: int, most: int) -> list[int]:
    """At most so many moments of a training, in epochs: 0, and then ever further apart, since most is learned early."""
    return [0, *sorted({round(epoch) for epoch in np.geomspace(1, epochs, most - 1)})]


def training(run: Run, train: ImageSet, epochs: list[int], name: str) -> Iterator[int]:
    """Train, and pause at the end of each of these epochs."""
    recipe, steps = run.recipe, len(train) // run.recipe.batch_size
    images, total = train.images.to(run.device), recipe.epochs * steps
    with tqdm(total=total, unit="step", desc=f"{name:12}") as bar:
        for epoch, index in islice(batches(len(train), recipe, 0, run.device), total):
            set_learning_rate(run.optimizer, recipe, run.step / total)
            began = time.perf_counter()
            train_step(run, images[index], index, epoch)
            run.seconds += time.perf_counter() - began
            bar.update()
            if run.step % steps == 0 and run.step // steps in epochs:
                bar.set_postfix_str("reading features")
                yield run.step // steps
                bar.set_postfix_str("")


def read(backbone: nn.Module, train: ImageSet, few: ImageSet, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Features (n, D) of the few test images, and their kNN accuracy against all training images."""
    known, features = (extract_features(backbone, images.images, dtype=dtype) for images in (train, few))
    return features, knn_top1(known, train.labels, features, few.labels)


def parts_of(run: Run, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """Parts of the mechanism under the names that any checkpoint has, so that ``tutorial-moco evaluate`` reads them too.

    Matrices in float16, which halves the file; what is short (norms, biases, ages) stays as exact as it is.
    """
    tensors = {name: tensor for name, tensor in pack(mechanism=run.mechanism).items() if name.split(".")[1] in parts}
    return halved(tensors)


def main() -> int:
    """Make the snapshots; returns the exit status: 0 done, 2 wrong usage, 3 bad or missing data, 130 interrupted."""
    return exit_status(
        "snapshots",
        lambda: print(make(parse(Flags, sys.argv[1:], "python -m benchmarks.snapshots"))),
        "begins with the run it was at",
    )


if __name__ == "__main__":
    sys.exit(main())
