"""What grows with size: ``python -m benchmarks.scale --data PICTURES``. A step against K, batch, processes; pictures to views.

Decoding and augmenting is measured beside torchvision's usual pipeline, each in a process of its own on one core, in turns.
"""

import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_jpeg
from tqdm.auto import tqdm

from benchmarks.measures import cost_of_steps
from benchmarks.throughput import measure
from tutorial_moco import speed
from tutorial_moco.augment import MEAN, STD, two_views
from tutorial_moco.cli import exit_status, parse, write_json
from tutorial_moco.cost import estimate
from tutorial_moco.distributed import processes, rank
from tutorial_moco.errors import UsageError
from tutorial_moco.images import ImageSet, load_images
from tutorial_moco.pretrain import AHEAD, pretrain
from tutorial_moco.provenance import provenance
from tutorial_moco.recipes import RECIPES
from tutorial_moco.report import text_table

BAR = 3.0  # decoding and augmenting: ours as a multiple of the usual pipeline
KEYS = tuple(4**power for power in range(5, 11))  # 1,024 to 1,048,576
BATCHES = (64, 128, 256, 512, 1024)
ROOT = Path(__file__).parent.parent
FEW = 8  # pictures of a batch of the usual pipeline; it makes them one by one
FEW_DECODED = 100  # pictures that decoders are compared by
SOME = 32  # of ours
RECIPE = RECIPES["small"].replace(batch_size=256)
LARGE = RECIPES["imagenet-moco-v2"]


@dataclass(frozen=True)
class Flags:
    """A step against K, batch and processes; bytes sent; pictures to views beside torchvision's usual pipeline."""

    data: str = ""  # a folder or .tar of large pictures, such as some of ImageNet's; without it none are decoded
    only: str = ""  # pictures, training, keys, batches, processes, bytes, separated by commas; all if left out
    processes: tuple[int, ...] = (1, 2, 4)  # that share a training
    rounds: int = 5  # how many times pictures are decoded each way, in turns
    seconds: float = 4.0  # of decoding in a round, and of training on each number of processes
    json: Path | None = None  # also write the result, with where it comes from, to this file


# Pictures ------------------------------------------------------------------------------------------------------------


class PillowBlur:
    """Pillow's Gaussian blur of a random width, as in the published code: approximate, and quicker than torchvision's."""

    def __call__(self, picture: Image.Image) -> Image.Image:
        return picture.filter(ImageFilter.GaussianBlur(float(torch.empty(()).uniform_(0.1, 2.0))))


def usual_view(size: int, blur: Callable) -> transforms.Compose:
    """MoCo v2's view of a picture by torchvision."""
    jitter = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
    some = [transforms.RandomApply([jitter], 0.8), transforms.RandomGrayscale(0.2), transforms.RandomApply([blur], 0.5)]
    ending = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    return transforms.Compose([transforms.RandomResizedCrop(size, scale=(0.2, 1.0)), *some, *ending])


def usual(pictures: ImageSet, blur: Callable) -> Iterator[Tensor]:
    """Two views of one picture after another, from its bytes, decoded once."""
    images, view = pictures.images, usual_view(pictures.images.size, blur)
    for first in count(step=FEW):
        with_views = []
        for row in range(first, first + FEW):
            picture = Image.open(io.BytesIO(images.content(row % len(images)))).convert("RGB")
            with_views.append(torch.stack([view(picture), view(picture)]))
        yield torch.stack(with_views)


def by_torchvision_alone(pictures: ImageSet) -> Iterator[Tensor]:
    """With torchvision's own blur, of as many pixels as SimCLR's."""
    return usual(pictures, transforms.GaussianBlur(23, (0.1, 2.0)))


def with_pillows_blur(pictures: ImageSet) -> Iterator[Tensor]:
    return usual(pictures, PillowBlur())


def ours(pictures: ImageSet) -> Iterator[tuple[Tensor, Tensor]]:
    """Two views of a batch of pictures after another."""
    speed.keep_freed_memory()  # as a training does
    images = pictures.images
    for epoch in count():
        for index in torch.arange(len(images)).split(SOME):
            crops = images.crops(index.expand(2, -1), "v2", seed=0, epoch=epoch).wait()
            yield two_views(crops, index, "v2", epoch=epoch)


def crops_alone(pictures: ImageSet) -> Iterator[Tensor]:
    """Of ours what is done on the processor where the training is on a GPU."""
    images = pictures.images
    for epoch in count():
        for index in torch.arange(len(images)).split(SOME):
            yield images.crops(index.expand(2, -1), "v2", seed=0, epoch=epoch).wait()


def decoded(pictures: ImageSet, decoder: Callable[[bytes], object]) -> Iterator[None]:
    """Whole pictures, one after another, by a decoder alone."""
    images = pictures.images
    contents = [images.content(row) for row in range(min(FEW_DECODED, len(images)))]
    for number in count():
        decoder(contents[number % len(contents)])
        yield


def by_pillow(content: bytes) -> object:
    return Image.open(io.BytesIO(content)).convert("RGB")


def by_torchvision(content: bytes) -> Tensor:
    return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)


def by_simplejpeg(content: bytes) -> object:
    import simplejpeg  # is not installed by anything here

    return simplejpeg.decode_jpeg(content)


DECODERS = {"Pillow": by_pillow, "torchvision.io": by_torchvision, "simplejpeg": by_simplejpeg}


def on_one_core(way: Callable, data: str, number: int, seconds: float) -> float:
    """In a child: pictures a second, of which each is shown in two views."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [sorted(os.sched_getaffinity(0))[0]])
    torch.set_num_threads(1)
    pictures = load_images(data, "train", view_size=LARGE.view_size, progress=False)
    return measure(way(pictures), number, torch.device("cpu"), seconds)


def decoders(flags: Flags) -> dict[str, float]:
    """Pictures a second and core that each decoder opens; those that are installed."""
    found = {}
    for name, decoder in DECODERS.items():
        with suppress(ImportError), ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            way = partial(decoded, decoder=decoder)
            found[name] = pool.submit(on_one_core, way, flags.data, 1, flags.seconds).result()
    return found


def decode(flags: Flags) -> dict[str, object]:
    """Pictures a second and core of each way, and the ratio, with its least and largest in a round."""
    ways = {
        "torchvision": (by_torchvision_alone, FEW), "pillow_blur": (with_pillows_blur, FEW), "ours": (ours, SOME),
        "crops_alone": (crops_alone, SOME),
    }  # fmt: skip
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in tqdm(range(flags.rounds), "pictures"):
        for name in list(ways)[:: -1 if number % 2 else 1]:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                way, batch = ways[name]
                rates[name].append(pool.submit(on_one_core, way, flags.data, batch, flags.seconds).result())
    found = {"view_size": LARGE.view_size, "pictures_per_second_and_core": {name: median(of) for name, of in rates.items()}}
    for way, field in ("torchvision", "ratio_usual"), ("pillow_blur", "ratio_pillow_blur"):
        each = [a / b for a, b in zip(rates["ours"], rates[way], strict=True)]
        found |= {field: median(each), f"{field}_min": min(each), f"{field}_max": max(each)}
    return {**found, "decoders": decoders(flags)}


def training(flags: Flags) -> dict[str, object]:
    """The recipe for ImageNet with smaller batches, from pictures to weights, as `pretrain` does it."""
    batch = 256 if torch.cuda.is_available() else 8
    recipe = LARGE.replace(batch_size=batch, lr=LARGE.lr * batch / LARGE.batch_size, shuffle=False)
    pictures = load_images(flags.data, "train", view_size=recipe.view_size, progress=False)
    pretrain(recipe, pictures, minutes=flags.seconds / 60, progress=False)  # warms up
    summary = pretrain(recipe, pictures, minutes=5 * flags.seconds / 60, progress=False).summary()
    names = ("images_per_second", "data_stall_percent", "peak_memory_bytes", "steps", "precision")
    return {"encoder": recipe.encoder, "batch_size": batch, **{name: summary[name] for name in names}}


# A step --------------------------------------------------------------------------------------------------------------


def step(pixels, **changes) -> dict[str, object]:
    """Time and memory of a step, in a process of its own."""
    recipe, device = RECIPE.replace(**changes), str(speed.default_device())
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(cost_of_steps, recipe, pixels, device, torch.get_num_threads()).result()
    names = ("seconds_per_step", "images_per_second", "peak_memory_bytes", "dictionary_bytes", "precision")
    return {**changes, **{name: found[name] for name in names}}


def together(W: int, threads: int, seconds: float) -> dict[str, object]:
    """A training that torchrun shares out to W processes with so many threads each."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        work = f"from benchmarks.scale import share; share({seconds}, {str(result)!r})"
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(W), "--no-python"]
        done = subprocess.run(
            [*words, sys.executable, "-c", work], env=os.environ | {"OMP_NUM_THREADS": str(threads)}, cwd=ROOT,
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise UsageError(f"{W} processes did not train together: {(done.stderr.strip() or 'no word').splitlines()[-1]}")
        row = json.loads(result.read_text())
    return {"processes": W, "threads": threads, "images_per_second": row["images_per_second"], "precision": row["precision"]}


def share(seconds: float, result: str) -> None:
    """In each process: train; the first one writes what came of it."""
    with processes():
        run = pretrain(RECIPE, load_images("shapes", "train", progress=False), minutes=seconds / 60, progress=False)
        if not rank():
            Path(result).write_text(json.dumps(run.summary()))


def sent(W: int) -> dict[str, float]:
    """Bytes that a process of W sends in a step of MoCo v2 on ImageNet, and what sending images to shuffle BN would add."""
    cost = estimate(replace(LARGE, batch_size=32 * W), 1_281_167, W)
    return {"processes": W, "batch_size": 32 * W, "sent_bytes": cost.sent_bytes, "images_sent_bytes": cost.images_sent_bytes}


PARTS = ("pictures", "training", "keys", "batches", "processes", "bytes")


def benchmark(flags: Flags) -> dict[str, object]:
    """Measure what is asked for; returns what ``--json`` writes."""
    of_pictures = {"pictures", "training"}
    parts = flags.only.split(",") if flags.only else [part for part in PARTS if flags.data or part not in of_pictures]
    if unknown := set(parts) - set(PARTS):
        raise UsageError(f"--only {min(unknown)} is not known: choose of {', '.join(PARTS)}")
    if of_pictures & set(parts) and not flags.data:
        raise UsageError("pictures and training need --data, a folder or .tar of large pictures")
    if min(flags.rounds, flags.seconds, *flags.processes) <= 0:
        raise UsageError("--rounds, --seconds and --processes must be above 0")
    train, began, threads = load_images("shapes", "train", progress=False), time.perf_counter(), torch.get_num_threads()
    pixels, found = train.images[: 2 * max(BATCHES)].numpy(), {}
    if "pictures" in parts:
        found["pictures"] = decode(flags)
    if "training" in parts:
        found["training"] = training(flags)
    if "keys" in parts:
        found["keys"] = [step(pixels, K=K) for K in tqdm(KEYS, "keys")]
    if "batches" in parts:
        found["batches"] = [step(pixels, batch_size=B) for B in tqdm(BATCHES, "batches")]
    if "processes" in parts:
        seconds = 5 * flags.seconds
        found["processes"] = [
            together(1, threads, seconds),
            *(together(W, 1, seconds) for W in tqdm(flags.processes, "processes")),
        ]
    if "bytes" in parts:
        found["bytes"] = [sent(W) for W in (2, 8, 64)]
    return {**provenance(train, speed.default_device()), "ahead": AHEAD, **found, "wall_seconds": time.perf_counter() - began}


def tables(result: dict) -> str:
    """What was measured, for a person."""
    parts = []
    if pictures := result.get("pictures"):
        rows = [["two views of a picture", "pictures/s and core"]]
        names = ("torchvision", "torchvision, with Pillow's blur", "ours", "ours, decoded and cropped alone")
        rows += [
            [name, f"{rate:,.0f}"] for name, rate in zip(names, pictures["pictures_per_second_and_core"].values(), strict=True)
        ]
        rows += [[f"decoding alone, {name}", f"{rate:,.0f}"] for name, rate in pictures["decoders"].items()]
        parts.append(rows)
    if found := result.get("training"):
        head = ["the recipe for ImageNet", "batch", "images/s", "waiting for images", "peak memory"]
        parts.append([head, [
            found["encoder"], str(found["batch_size"]), f"{found['images_per_second']:,.1f}",
            f"{found['data_stall_percent']} %", f"{found['peak_memory_bytes'] / 2**20:,.0f} MiB",
        ]])  # fmt: skip
    for name, title in ("keys", "K"), ("batches", "batch"):
        field = {"keys": "K", "batches": "batch_size"}[name]
        if found := result.get(name):
            head = [title, "ms a step", "images/s", "dictionary", "peak memory"]
            parts.append([head] + [
                [f"{row[field]:,}", f"{1000 * row['seconds_per_step']:,.0f}", f"{row['images_per_second']:,.0f}",
                 f"{row['dictionary_bytes'] / 2**20:,.1f} MiB", f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB"] for row in found
            ])  # fmt: skip
    if found := result.get("processes"):
        alone = next((row["images_per_second"] for row in found[1:] if row["processes"] == 1), found[0]["images_per_second"])
        parts.append([["processes", "threads of each", "images/s", "of one process with one thread"]] + [
            [str(row["processes"]), str(row["threads"]), f"{row['images_per_second']:,.0f}",
             f"{row['images_per_second'] / alone:.2f}x"] for row in found
        ])  # fmt: skip
    if found := result.get("bytes"):
        parts.append([["processes", "batch", "sent by each in a step", "more if images were sent"]] + [
            [str(row["processes"]), f"{row['batch_size']:,}", f"{row['sent_bytes'] / 2**20:,.0f} MiB",
             f"{row['images_sent_bytes'] / 2**20:,.0f} MiB"] for row in found
        ])  # fmt: skip
    return "\n\n".join(text_table(rows) for rows in parts)


def verdict(result: dict) -> str:
    """One line: is the bar met?"""
    if "pictures" not in result:
        return "verdict: no pictures were decoded (--data)"
    ratio = result["pictures"]["ratio_usual"]
    met = "met" if ratio >= BAR else "not met"
    rate = result["pictures"]["pictures_per_second_and_core"]["ours"]
    pillow = result["pictures"]["ratio_pillow_blur"]
    beside = f"{ratio:.2f}x torchvision's (bar {BAR:g}: {met}), {pillow:.2f}x that with Pillow's blur,"
    return f"verdict: {rate:,.0f} pictures/s and core to two views, {beside} on {result['hardware']}"


def run(flags: Flags) -> None:
    """Measure, print, write."""
    result = benchmark(flags)
    print(f"\n{tables(result)}\n")
    if flags.json:
        write_json(flags.json, result)
    print(verdict(result))


def main() -> int:
    """Run the benchmark; returns the exit status: 0 done, 2 wrong usage, 3 bad or missing data."""
    return exit_status("scale", lambda: run(parse(Flags, sys.argv[1:], "python -m benchmarks.scale")), "begins anew")


if __name__ == "__main__":
    sys.exit(main())
