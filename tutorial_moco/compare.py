"""The main job: train one or several mechanisms with equal budgets, see what each has learned, and report it."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from tutorial_moco import figures
from tutorial_moco.augment import plain_view, two_views
from tutorial_moco.distributed import every, rank
from tutorial_moco.encoded import EncodedImages
from tutorial_moco.encoders import reading
from tutorial_moco.evaluate import (
    KNN_K,
    KNN_TEMPERATURE,
    evaluate_features,
    extract_features,
    knn_top1,
    knn_top1_at_size,
    nearest,
    pixel_features,
    tsne,
)
from tutorial_moco.files import write_whole
from tutorial_moco.images import ImageSet
from tutorial_moco.pretrain import Run, load_encoder, pretrain, start
from tutorial_moco.probe import probe
from tutorial_moco.provenance import provenance
from tutorial_moco.randomness import permutation
from tutorial_moco.recipes import Recipe
from tutorial_moco.report import Picture, text_table, write_report
from tutorial_moco.speed import default_device

TSNE_IMAGES = 1000
SHOWN_OF_MANY = 20_000  # training images among which neighbours are shown, where features of all are too many
HEAD = ["", "kNN %", "linear %", "images/s", "images seen", "train s", "dictionary", "peak memory"]


def compare(
    recipes: list[Recipe],
    train: ImageSet,
    test: ImageSet,
    out: Path,
    *,
    minutes: float | None = None,
    monitor: int = 5,
    baselines: bool = True,
    precision: torch.dtype | None = None,
    compile: bool = False,
) -> dict[str, object]:
    """Train each recipe, evaluate it on all test images, print a table and write ``out/report.html``.

    Args:
        recipes: of different mechanisms; every one gets the same minutes (or its own epochs).
        baselines: also evaluate raw pixels and the untrained encoder. Others as for `pretrain`.

    Returns:
        provenance, and ``results``: a dictionary for each mechanism and baseline, as written by ``--json``.
    """
    device = default_device()
    results: dict[str, dict] = {}
    features: dict[str, tuple[Tensor, Tensor]] = {}
    shown = train, test  # in the report's maps and neighbours
    if baselines:
        tell("baselines: raw pixels and an untrained encoder")
        features["untrained"] = features_of(untrained(recipes[-1], train, device), train, test)
        if not rank():  # the first process judges and reports
            results["pixels"] = {"knn_top1": knn_of_pixels(train, test)}
            results["untrained"] = evaluate_features(*features["untrained"], train, test)
    for recipe in recipes:
        folder = out / recipe.mechanism if len(recipes) > 1 else out
        run = pretrain(
            recipe, train, test, minutes=minutes, out=folder, monitor=monitor, device=device, dtype=precision, compile=compile
        )  # fmt: skip
        large, backbone = isinstance(train.images, EncodedImages), run.mechanism.encoder.backbone
        if large:  # the linear classifier is a training of its own
            accuracy = {"knn_top1": knn_top1_at_size(backbone, train, test, dtype=run.dtype)}
            shown = train.few(SHOWN_OF_MANY), test.few(TSNE_IMAGES)
        features[recipe.mechanism] = features_of(run, *shown)
        if rank():
            continue
        if not large:
            accuracy = evaluate_features(*features[recipe.mechanism], train, test)
        results[recipe.mechanism] = {
            **accuracy, **run.summary(), "losses": run.losses, "monitor": run.monitor, "recipe": dataclasses.asdict(recipe),
        }  # fmt: skip
    bad = [_bad(images) for images in (train, test)]
    if rank():
        return {}
    for images, gray in zip((train, test), bad, strict=True):
        if gray:
            tell(f"{gray} {images.split} pictures could not be decoded, and were gray")
    facts = provenance(train, device) | {"knn_k": KNN_K, "knn_temperature": KNN_TEMPERATURE}
    table = [HEAD] + [table_row(name, result) for name, result in results.items()]
    print(text_table(table))
    print(f"computed in {run.summary()['precision']}, channels_last, many tensors to an update, on {facts['hardware']}")
    write_whole(out / "result.json", (json.dumps(record(facts, results), indent=1) + "\n").encode())
    tell("drawing the report")
    report = out / "report.html"
    pictures = draw(results, features, recipes, *shown)
    write_report(report, *words(recipes, train, test, minutes), table, pictures, facts)
    print(f"\nreport: {report}")
    return record(facts, results)


def record(facts: dict, results: dict[str, dict]) -> dict[str, object]:
    """What ``--json`` writes: provenance, and a row for each mechanism or baseline."""
    return {**facts, "results": [{"mechanism": name, **result} for name, result in results.items()]}


def features_of(run: Run, train: ImageSet, test: ImageSet) -> tuple[Tensor, Tensor]:
    """Features of all training and test images by the run's query encoder."""
    backbone = run.mechanism.encoder.backbone
    return tuple(extract_features(backbone, images, dtype=run.dtype) for images in (train.images, test.images))


def untrained(recipe: Recipe, train: ImageSet, device: torch.device) -> Run:
    """A run at step 0 whose BatchNorm has seen the data, as any trained one's has: what the architecture alone is worth."""
    run = start(recipe, train, device, torch.float32)
    with torch.no_grad():
        for batch in train.images[permutation(len(train), 0)[:8000]].split(recipe.batch_size):
            run.mechanism.encoder(plain_view(batch.to(device)))
    return run


def knn_of_pixels(train: ImageSet, test: ImageSet) -> float:
    """kNN on the pixels themselves, in percent."""
    return knn_top1(pixel_features(train.images), train.labels, pixel_features(test.images), test.labels)


def table_row(name: str, result: dict) -> list[str]:
    """A result as cells under ``HEAD``; a dash where there is nothing to say."""

    def cell(field: str, form: str, scale: float = 1.0) -> str:
        return form.format(result[field] / scale) if result.get(field) is not None else "-"

    return [
        figures.TITLES[name], cell("knn_top1", "{:.1f}"), cell("linear_top1", "{:.1f}"), cell("images_per_second", "{:,.0f}"),
        cell("images_seen", "{:,.0f}"), cell("train_seconds", "{:.0f}"), cell("dictionary_bytes", "{:.1f} MiB", 2**20),
        cell("peak_memory_bytes", "{:,.0f} MiB", 2**20),
    ]  # fmt: skip


def _bad(images: ImageSet) -> int:
    """How many encoded pictures could not be decoded since the start, on any process; then all processes know them."""
    if not isinstance(images.images, EncodedImages):
        return 0
    for theirs in every(images.images.bad):
        images.images.bad.update(theirs)
    return len(images.images.bad)


def evaluate_checkpoint(
    path: Path,
    train_set: ImageSet,
    test_set: ImageSet,
    *,
    sgd: Recipe | None = None,
    lrs: tuple[float, ...] = (),
    out: Path | None = None,
) -> dict[str, object]:
    """kNN and linear probe of a checkpoint's query encoder on any images, with the recipe it was trained by.

    Args:
        sgd: train the linear classifier as the papers do, by this recipe of `probe.probe`, with each of the learning rates
            ``lrs``: ``linear_top1`` is the first one's, None if that exploded. Else a regression on the features, of images in
            memory.
        out: folder for what `probe.probe` keeps.

    Raises:
        DataError: the file is missing, damaged or no checkpoint.
    """
    encoder, recipe, state = load_encoder(path)
    device, dtype = default_device(), getattr(torch, state["dtype"])  # read in the format it was trained in
    backbone = reading(encoder.backbone, state["mean"], state["std"]).to(device)
    if sgd:
        accuracy = {"knn_top1": knn_top1_at_size(backbone, train_set, test_set, dtype=dtype)}
        found = probe(backbone, encoder.feature_dim, train_set, test_set, sgd, lrs=lrs, dtype=dtype, out=out)
        of_lr = {f"{lr:g}": None if math.isnan(top1) else top1 for lr, top1 in found.items()}  # JSON has no nan
        accuracy |= {"linear_top1": of_lr[f"{lrs[0]:g}"], "linear_top1_of_lr": of_lr}
    else:
        features = [extract_features(backbone, images.images, dtype=dtype) for images in (train_set, test_set)]
    if rank():
        return {}
    if not sgd:
        accuracy = evaluate_features(*features, train_set, test_set)
    return {**provenance(train_set, device), **accuracy, "recipe": dataclasses.asdict(recipe), "steps": state["step"]}


# The report ----------------------------------------------------------------------------------------------------------


def words(recipes: list[Recipe], train: ImageSet, test: ImageSet, minutes: float | None) -> tuple[str, str]:
    """Title and first paragraph."""
    names = [figures.TITLES[r.mechanism] for r in recipes]
    title = "Three ways to keep a dictionary" if len(recipes) == 3 else f"{' and '.join(names)} on {train.name}"
    budget = f"{minutes:g} minutes of training each" if minutes else f"{recipes[0].epochs} epochs"
    linear = "Linear: a linear classifier on the frozen features."
    if recipes[0].view_size:
        linear = "A linear classifier is a training of its own: tutorial-moco evaluate."
    lead = (
        f"{', '.join(names)}, trained without labels on {len(train):,} images of {train.name}, {budget}. "
        f"kNN: a vote of the {KNN_K} most similar training images. {linear} "
        f"Read on all {len(test):,} {test.split} images. The dictionary is what stays in memory from step to step; "
        "the peak is that of the whole process, images included."
    )
    return title, lead


def draw(
    results: dict[str, dict], features: dict[str, tuple[Tensor, Tensor]], recipes: list[Recipe], train: ImageSet, test: ImageSet
) -> list[Picture]:
    """All pictures of the report."""
    runs = [results[recipe.mechanism] for recipe in recipes]
    best = max(recipes, key=lambda recipe: results[recipe.mechanism]["knn_top1"]).mechanism
    few = permutation(len(test), 0)[:TSNE_IMAGES]
    maps = {name: tsne(both[1][few]) for name, both in features.items()}
    index, augmentation = permutation(len(train), 1)[:8], recipes[0].augmentation
    seen = train.images[index]
    if isinstance(train.images, EncodedImages):
        seen = train.images.crops(index.expand(2, -1), augmentation, seed=0, epoch=0).wait()
    view_q, view_k = two_views(seen, index, augmentation)
    queries = torch.stack([(test.labels == label).nonzero()[0, 0] for label in test.labels.unique()[:10]])
    _, places = nearest(features[best][1][queries], features[best][0], min(8, len(train)))
    chance = 100 / len(train.classes)
    return [
        Picture(
            "What each has learned",
            figures.accuracy_bars(results, chance),
            "Bars of kNN and linear test accuracy: " + "; ".join(f"{n} {r['knn_top1']:.1f} % kNN" for n, r in results.items()),
            "Solid: kNN. Pale: linear classifier. Dashed: guessing.",
        ),
        Picture(
            "What the encoders are trained on",
            figures.views(pixels_at(train, index), view_q, view_k),
            "Eight images, each above two random views of it: cropped, resized, mirrored, recoloured.",
            "A query must find the key of the same image among the keys of other images. No label is used.",
        ),
        Picture(
            "Loss",
            figures.loss_curves(runs),
            "Loss against images seen for each mechanism, with the line log(K + 1) of guessing.",
            "Losses of different K cannot be compared: each starts near its own dashed line. The queue begins with random "
            "vectors, which are easy negatives; as real keys replace them the loss may rise.",
        ),
        Picture(
            "Two accuracies",
            figures.accuracy_curves(runs),
            "Left: share of queries that find their own key. Right: kNN accuracy on classes during training.",
            f"The left one is trained for, the right one is what we want. The right one is a quick reading on {len(test):,} "
            "or fewer test images.",
        ),
        Picture(
            "A map of the test images",
            figures.tsne_maps(maps, test.labels[few], test.classes, {n: results[n]["knn_top1"] for n in maps}),
            "t-SNE maps, one for each encoder, a colour for each class.",
            "t-SNE keeps neighbours together; distances between clusters and their sizes mean little.",
        ),
        Picture(
            f"Nearest neighbours by {figures.TITLES[best]}",
            figures.retrieval(
                pixels_at(test, queries), test.labels[queries], pixels_at(train, places), train.labels[places], test.classes
            ),
            "For a test image of each class, the eight training images with the most similar features.",
            "Green frame: the same class. Orange: another one.",
        ),
    ]


def pixels_at(images: ImageSet, index: Tensor) -> Tensor:
    """uint8 (..., 3, H, W) of numbers (...), decoded if they were not."""
    return images.images[index.flatten()].to("cpu").unflatten(0, index.shape)


def tell(line: str) -> None:
    """A line on what is being done, beside the progress bars."""
    if not rank():
        print(line, file=sys.stderr, flush=True)
