"""One run of the study, and the row it makes. What is run and in which order: `benchmarks.plan` and `benchmarks.study`."""

import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from copy import deepcopy
from itertools import islice
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.plan import Job, draw
from tutorial_moco import speed
from tutorial_moco.compare import knn_of_pixels, untrained
from tutorial_moco.diagnose import key_drift
from tutorial_moco.errors import UsageError
from tutorial_moco.evaluate import extract_features, knn_top1, linear_top1, notebooks_knn_top1
from tutorial_moco.evidence import NOTEBOOK_CURVE
from tutorial_moco.images import ImageSet
from tutorial_moco.masked import pretrain_masked
from tutorial_moco.pretrain import Run, batches, check, pretrain, set_learning_rate, start, train_step
from tutorial_moco.provenance import provenance
from tutorial_moco.recipes import Recipe
from tutorial_moco.supervised import classifier, top1, train_classifier

CURVE_POINTS = 100  # of the loss curve, of some thousands: all rows together are to stay small
DRIFT_BINS = 40
COST_WARM_UP, COST_STEPS = 2, 8

# Every row has all of these; null where a kind of run has no such thing.
MEASURED = (
    "knn_top1", "knn_top1_notebook", "linear_top1", "supervised_top1", "steps", "images_seen", "train_seconds",
    "images_per_second", "seconds_per_step", "peak_memory_bytes", "memory_before_bytes", "dictionary_bytes",
    "dictionary_bytes_formula", "precision", "final_loss", "final_pretext_accuracy", "failed", "losses", "monitor", "drift",
)  # fmt: skip


def measure(job: Job, train: ImageSet, test: ImageSet) -> dict[str, object]:
    """Run a job and return its row. A training that breaks down is a result too: ``failed`` says how, the accuracies are null.

    Features are always read with all training images, also where the encoder has seen only some of them.
    """
    exact = job.kind == "check"  # float32 on one thread of the processor, so that any machine can have the same figures
    device = torch.device("cpu") if exact else speed.default_device()
    began = time.perf_counter()
    part = train if job.n == len(train) else train.take(draw(train.labels, job))
    with threads(1 if exact else torch.get_num_threads()):
        facts = provenance(train, device)
        try:
            found = MEASURES[job.kind](job, part, train, test, device)
        except (UsageError, torch.OutOfMemoryError) as error:
            found = {"failed": str(error).splitlines()[0]}
    row = {"experiment": job.experiment, "note": job.note, **job.identity(train.hash), **dict.fromkeys(MEASURED), **found}
    return row | {"wall_seconds": round(time.perf_counter() - began, 1)} | facts


def pretrained(job: Job, part: ImageSet, train: ImageSet, test: ImageSet, device: torch.device) -> dict:
    """Pre-train and read the features."""
    watched, dtype = (None, torch.float32) if job.kind == "check" else (test, None)
    on_gpu = device.type == "cuda"
    monitor = [e for e in NOTEBOOK_CURVE if e < job.recipe.epochs] + [job.recipe.epochs] if on_gpu else 5
    run = pretrain(
        job.recipe, part, watched, monitor=monitor, device=device, dtype=dtype, compile=on_gpu, progress=False
    )  # fmt: skip
    last, encoder = run.losses[-1], run.mechanism.encoder
    return {
        **run.summary(), **accuracies(encoder.backbone, train, test, run.dtype, encoder.head),
        "final_loss": last["loss"], "final_pretext_accuracy": last["pretext_accuracy"],
        "losses": thinned(run.losses), "monitor": rounded(run.monitor),
    }  # fmt: skip


def drifted(job: Job, part: ImageSet, train: ImageSet, test: ImageSet, device: torch.device) -> dict:
    """How far stored keys are off, half-way through the schedule: at its end the learning rate is 0 and no key drifts."""
    recipe, n = job.recipe, len(part)
    check(recipe, n, None)
    speed.keep_freed_memory()
    speed.reset_peak_memory(device)
    run, images = start(recipe, part, device), part.images.to(device)
    total, began = recipe.epochs * (n // recipe.batch_size), time.perf_counter()
    for epoch, index in islice(batches(n, recipe, 0, device), max(1, total // 2)):
        set_learning_rate(run.optimizer, recipe, run.step / total)
        train_step(run, images[index], index, epoch)
    run.seconds, run.peak_memory_bytes = time.perf_counter() - began, speed.peak_memory_bytes(device)
    return run.summary() | {"drift": drift_by_age(run, part.images)}


def supervised(job: Job, part: ImageSet, train: ImageSet, test: ImageSet, device: torch.device) -> dict:
    """The same encoder, optimizer, schedule and views, trained with labels: cross-entropy of a linear layer on the backbone."""
    recipe, n = job.recipe, len(part)
    check(recipe, n, None)
    speed.reset_peak_memory(device)
    run = start(recipe, part, device)  # for the same first weights and number format
    encoder = run.mechanism.encoder
    net = classifier(encoder.backbone, encoder.feature_dim, len(part.classes))
    curve, seconds = train_classifier(net, recipe, part, run.dtype)
    seen, peak = curve[-1]["images_seen"], speed.peak_memory_bytes(device)
    return {
        **accuracies(net[0], train, test, run.dtype), "supervised_top1": top1(net, test, run.dtype),
        "steps": len(curve), "images_seen": seen, "train_seconds": round(seconds, 2),
        "images_per_second": round(seen / seconds, 1), "peak_memory_bytes": peak,
        "precision": str(run.dtype).removeprefix("torch."), "final_loss": curve[-1]["loss"], "losses": thinned(curve),
    }  # fmt: skip


def masked(job: Job, part: ImageSet, train: ImageSet, test: ImageSet, device: torch.device) -> dict:
    """The transformer trained by painting hidden patches."""
    speed.reset_peak_memory(device)
    encoder, _, found = pretrain_masked(job.recipe, part, progress=False)
    peak, dtype, losses = speed.peak_memory_bytes(device), getattr(torch, found["precision"]), found.pop("losses")
    return {
        **found, **accuracies(encoder.backbone, train, test, dtype), "peak_memory_bytes": peak,
        "final_loss": losses[-1]["loss"], "losses": thinned(losses),
    }  # fmt: skip


def fresh(job: Job, part: ImageSet, train: ImageSet, test: ImageSet, device: torch.device) -> dict:
    """The encoder before any training."""
    encoder = untrained(job.recipe, train, device).mechanism.encoder
    return accuracies(encoder.backbone, train, test, torch.float32) | {"steps": 0, "images_seen": 0}


def pixels(job: Job, part: ImageSet, train: ImageSet, test: ImageSet, device: torch.device) -> dict:
    """No encoder at all."""
    return {"knn_top1": knn_of_pixels(train, test)}


def cost(job: Job, part: ImageSet, train: ImageSet, test: ImageSet, device: torch.device) -> dict:
    """Memory and time of a few steps, in a process of its own, since a process's peak is that of all it ever did."""
    check(job.recipe, len(part), None)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        told = job.recipe, part.images.numpy(), str(device), torch.get_num_threads()
        try:
            return pool.submit(cost_of_steps, *told).result()
        except BrokenProcessPool:
            raise UsageError("its process was ended from outside, most likely for want of memory") from None


def cost_of_steps(recipe: Recipe, pixels: np.ndarray, device_name: str, threads: int) -> dict:
    """In the child: train a few steps on images uint8 (n, 3, H, W)."""
    torch.set_num_threads(threads)
    speed.keep_freed_memory()
    device, n = torch.device(device_name), len(pixels)
    train = ImageSet("", "train", torch.from_numpy(pixels), torch.zeros(n, dtype=torch.int64), ("",), "")
    run, images = start(recipe, train, device), train.images.to(device)
    speed.reset_peak_memory(device)
    before, seconds = speed.peak_memory_bytes(device), []
    for epoch, index in islice(batches(n, recipe, 0, device), COST_WARM_UP + COST_STEPS):
        began = time.perf_counter()
        train_step(run, images[index], index, epoch)
        speed.synchronize(device)
        seconds.append(time.perf_counter() - began)
    step = median(seconds[COST_WARM_UP:])
    keys = {"moco": recipe.K, "memory_bank": n}.get(recipe.mechanism, 0)
    return {
        "steps": run.step, "images_seen": run.images_seen, "seconds_per_step": step, "train_seconds": round(sum(seconds), 2),
        "images_per_second": round(recipe.batch_size / step, 1), "peak_memory_bytes": speed.peak_memory_bytes(device),
        "memory_before_bytes": before, "dictionary_bytes": run.mechanism.dictionary_bytes,
        "dictionary_bytes_formula": keys * recipe.dim * 4, "precision": str(run.dtype).removeprefix("torch."),
    }  # fmt: skip


MEASURES: dict[str, Callable[..., dict]] = {
    "pretrain": pretrained,
    "check": pretrained,
    "masked": masked,
    "drift": drifted,
    "cost": cost,
    "supervised": supervised,
    "untrained": fresh,
    "pixels": pixels,
}


def accuracies(
    backbone: nn.Module, train: ImageSet, test: ImageSet, dtype: torch.dtype, head: nn.Module | None = None
) -> dict[str, float]:
    """kNN and linear probe; with the head that made keys of these features also the official notebook's kNN."""
    features = [extract_features(backbone, images.images, dtype=dtype) for images in (train, test)]
    data = features[0], train.labels, features[1], test.labels
    found = {"knn_top1": knn_top1(*data), "linear_top1": linear_top1(*data)}
    return found if head is None else found | {"knn_top1_notebook": notebooks_knn_top1(deepcopy(head).cpu(), *data)}


def drift_by_age(run: Run, images: Tensor) -> list[dict]:
    """`key_drift` in at most ``DRIFT_BINS`` bins of equal width in age."""
    ages, cosines = key_drift(run, images)
    width = math.ceil(int(ages.max()) / DRIFT_BINS)
    bins = []
    for number in ((ages - 1) // width).unique().tolist():
        here = (ages - 1) // width == number
        mean, sd = cosines[here].mean().item(), cosines[here].std(correction=0).item()
        bins.append({"age": ages[here].float().mean().item(), "cosine": mean, "sd": sd, "count": int(here.sum())})
    return rounded(bins)


def thinned(curve: list[dict]) -> list[dict]:
    """About ``CURVE_POINTS`` points of a curve, the first and the last among them."""
    every = math.ceil(len(curve) / CURVE_POINTS)
    return rounded(curve[::every] + curve[-1:] * ((len(curve) - 1) % every > 0))


def rounded(points: list[dict]) -> list[dict]:
    """Five digits, which no picture can tell from more."""
    return [{name: float(f"{v:.5g}") if isinstance(v, float) else v for name, v in point.items()} for point in points]


@contextmanager
def threads(number: int):
    """Context with this many threads of the processor."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
