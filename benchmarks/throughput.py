"""Images per second of training MoCo: written the usual way, with lightly's parts, with ours, and what the encoder allows.

The four train the same architecture with the same batch size and K from the same images in RAM. They are measured one at a
time and in turns, so that what else happens on the machine meets all alike. Each is a loop that yields after every step.
"""

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from tqdm.auto import tqdm

from tutorial_moco import speed
from tutorial_moco.augment import MEAN, STD, plain_view, two_views
from tutorial_moco.cli import parse, write_json
from tutorial_moco.encoders import Encoder, build_encoder
from tutorial_moco.errors import DataError, UsageError
from tutorial_moco.images import load_images
from tutorial_moco.pretrain import Run, batches, check, start, train_step
from tutorial_moco.provenance import hardware, provenance
from tutorial_moco.recipes import RECIPES, Recipe
from tutorial_moco.report import text_table

BARS = {"usual": 4.0, "limit": 0.85}  # what ours is to reach, as a multiple of each
WORKERS = 2
PREFETCHED = 2 * WORKERS  # batches that a DataLoader's workers prepare ahead


@dataclass(frozen=True)
class Flags:
    """Images per second of training MoCo the usual way, with lightly, with tutorial_moco, and what the encoder allows."""

    data: str = "shapes"  # shapes, cifar10, cifar100, stl10, a folder split/class/image, or an archive of one
    encoder: Literal["tiny", "small", "wide", "resnet18", "resnet50"] = "small"  # the architecture that all four train
    batch_size: int = 256  # images of a step
    K: int = 4096  # keys in the queue: a multiple of --batch-size, as the usual way needs it
    rounds: int = 5  # how many times each is measured, in turns
    seconds: float = 6.0  # how long each is measured in a round, after its warm-up
    json: Path | None = None  # also write the result, with where it comes from, to this file


class Pictures(Dataset):
    """Images uint8 (N, H, W, 3), handed out as torchvision's CIFAR10 does: as a PIL image, transformed for each view."""

    def __init__(self, pixels: np.ndarray, views: list[Callable]):
        self.pixels, self.views = pixels, views

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> list[Tensor]:
        picture = Image.fromarray(self.pixels[i])
        return [view(picture) for view in self.views]


def loaded(pixels: np.ndarray, views: list[Callable], batch_size: int, device: torch.device) -> Iterator[list[Tensor]]:
    """Two views of batch after batch, without end, from a DataLoader."""
    loader = DataLoader(
        Pictures(pixels, views), batch_size, shuffle=True, drop_last=True, num_workers=WORKERS, persistent_workers=True,
        pin_memory=device.type == "cuda", multiprocessing_context="fork" if sys.platform == "linux" else None,
    )  # fmt: skip
    while True:
        for batch in loader:
            yield [view.to(device) for view in batch]


def usual_view(size: int) -> transforms.Compose:
    """The transforms of the official CIFAR-10 notebook, from torchvision."""
    jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    crop, flip = transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()
    ending = [transforms.RandomGrayscale(p=0.2), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    return transforms.Compose([crop, flip, jitter, *ending])


def plain_encoder(recipe: Recipe, pixels: np.ndarray, device: torch.device) -> Encoder:
    """The recipe's encoder in PyTorch's ordinary (contiguous) memory format."""
    sample = plain_view(torch.from_numpy(pixels[:1000]).permute(0, 3, 1, 2))
    encoder = build_encoder(recipe.encoder, head=recipe.head, dim=recipe.dim, norm=recipe.norm, images=sample)
    return encoder.to(device, memory_format=torch.contiguous_format)


def usual(recipe: Recipe, pixels: np.ndarray, device: torch.device) -> Iterator[None]:
    """MoCo as most repositories write it, in float32: image by image in loader workers, parameter by parameter in the EMA."""
    encoder = plain_encoder(recipe, pixels, device)
    key_encoder = deepcopy(encoder).requires_grad_(False)
    queue, pointer = F.normalize(torch.randn(recipe.dim, recipe.K, device=device), dim=0), 0
    optimizer = torch.optim.SGD(encoder.parameters(), recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay, foreach=False)
    for view_q, view_k in loaded(pixels, [usual_view(pixels.shape[1])] * 2, recipe.batch_size, device):
        q = encoder(view_q)
        with torch.no_grad():
            for key, query in zip(key_encoder.parameters(), encoder.parameters(), strict=True):
                key.data = key.data * recipe.m + query.data * (1 - recipe.m)
            k = key_encoder(view_k)
        positive = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
        negatives = torch.einsum("nc,ck->nk", q, queue.clone().detach())
        logits = torch.cat([positive, negatives], dim=1) / recipe.temperature
        loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue[:, pointer : pointer + len(k)] = k.T
        pointer = (pointer + len(k)) % recipe.K
        yield


def lightly(recipe: Recipe, pixels: np.ndarray, device: torch.device) -> Iterator[None]:
    """lightly's transform, loss and EMA, put together as in its own example of MoCo, in float32 with the same loader."""
    from lightly.loss import NTXentLoss
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.transforms.moco_transform import MoCoV2Transform

    encoder = plain_encoder(recipe, pixels, device)
    key_encoder = deepcopy(encoder)
    deactivate_requires_grad(key_encoder)
    criterion = NTXentLoss(recipe.temperature, memory_bank_size=(recipe.K, recipe.dim)).to(device)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=recipe.lr)
    transform = MoCoV2Transform(input_size=pixels.shape[1], gaussian_blur=0.0)  # no blur, as in the other ways
    for view_q, view_k in loaded(pixels, transform.transforms, recipe.batch_size, device):
        update_momentum(encoder, key_encoder, m=recipe.m)
        loss = criterion(encoder(view_q), key_encoder(view_k).detach())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


def ours(run: Run, images: Tensor) -> Iterator[None]:
    """This package's training loop, in the number format that it has chosen."""
    for epoch, index in batches(len(images), run.recipe, 0, run.device):
        train_step(run, images.index_select(0, index), index, epoch)
        yield


def limit(run: Run, images: Tensor) -> Iterator[None]:
    """The forward and backward passes of a step alone: views that are already there, no queue, no update."""
    encoder, key_encoder = deepcopy(run.mechanism.encoder), deepcopy(run.mechanism.key_encoder)
    index = torch.arange(run.recipe.batch_size, device=run.device)
    view_q, view_k = two_views(images[index], index, run.recipe.augmentation)
    while True:
        encoder.zero_grad()
        with speed.autocast(run.device, run.dtype):
            q = encoder(view_q)
            with torch.no_grad():
                k = key_encoder(view_k)
        (q * k).sum().backward()
        yield


def measure(steps: Iterator, count: int, device: torch.device, seconds: float, warm_up: int = 2) -> float:
    """How many of the ``count`` things that a step does are done per second, over at least ``seconds``."""
    for _ in range(warm_up):
        next(steps)
    speed.synchronize(device)
    done, begin = 0, time.perf_counter()
    while (spent := time.perf_counter() - begin) < seconds or done == 0:
        next(steps)
        speed.synchronize(device)
        done += count
    return done / spent


@contextmanager
def child(way: Callable, recipe: Recipe, pixels: np.ndarray, device: torch.device) -> Iterator:
    """A pipe to a process of its own for this way, since `keep_freed_memory` helps whatever else its process does."""
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    process = context.Process(target=serve, args=(way, recipe, pixels, str(device), end))
    process.start()
    end.close()
    try:
        yield pipe
    finally:
        pipe.close()  # which ends the process
        process.join()


def serve(way: Callable, recipe: Recipe, pixels: np.ndarray, device_name: str, pipe) -> None:
    """In the child: say "" when the first step is done, or why it can't be; then answer seconds with images per second."""
    device = torch.device(device_name)
    steps = way(recipe, pixels, device)
    with suppress(EOFError, KeyboardInterrupt):
        try:
            next(steps)
        except ImportError as error:
            return pipe.send(f"it cannot be imported ({error})")
        pipe.send("")
        while seconds := pipe.recv():
            # What the workers had ready while others were measured is used up before the clock starts.
            rate = measure(steps, recipe.batch_size, device, seconds, warm_up=PREFETCHED + 2)
            time.sleep(min(5.0, PREFETCHED * recipe.batch_size / rate))  # they fill up again, and then rest
            pipe.send(rate)


def ask(pipe, seconds: float) -> float:
    """Images per second of a child's way."""
    pipe.send(seconds)
    return pipe.recv()


def measure_in_turns(ways: dict[str, Callable[[float], float]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Images per second of each way in each round; every other round backwards, so that a steady drift cancels."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    turns = [name for number in range(rounds) for name in list(ways)[:: -1 if number % 2 else 1]]
    for name in (bar := tqdm(turns, bar_format="{desc:8} |{bar:24}| {n}/{total}")):
        bar.set_description_str(name)
        rates[name].append(ways[name](seconds))
    return rates


def augmentation_cost(recipe: Recipe, images: Tensor, pixels: np.ndarray, seconds: float) -> dict[str, float]:
    """Microseconds for one view: torchvision's on one PIL image at a time, ours on a batch with one thread and with all."""
    images, threads = images[: recipe.batch_size], torch.get_num_threads()
    index = torch.arange(len(images), device=images.device)
    pictures = Pictures(pixels[: recipe.batch_size], [usual_view(pixels.shape[1])])
    one_by_one = iter(lambda: [pictures[i] for i in range(len(pictures))], None)
    whole_batch = iter(lambda: two_views(images, index, recipe.augmentation), None)
    costs = {"torchvision": 1e6 / measure(one_by_one, len(pictures), images.device, seconds)}
    for name, number in ("ours_one_thread", 1), ("ours", threads):
        torch.set_num_threads(number)
        costs[name] = 1e6 / measure(whole_batch, 2 * len(images), images.device, seconds)
    return costs


def benchmark(flags: Flags) -> dict[str, object]:
    """Measure all ways and return what ``--json`` writes."""
    if flags.batch_size < 1 or flags.K % flags.batch_size or min(flags.rounds, flags.seconds) <= 0:
        raise UsageError("--K must be a multiple of --batch-size, --rounds and --seconds above 0")
    recipe = RECIPES["small"].replace(encoder=flags.encoder, batch_size=flags.batch_size, K=flags.K)
    train, device, began = load_images(flags.data, "train"), speed.default_device(), time.perf_counter()
    check(recipe, len(train), None)
    print(f"{hardware(device)}; torch {torch.__version__}", flush=True)
    pixels = train.images.permute(0, 2, 3, 1).contiguous().numpy()
    speed.keep_freed_memory()
    run, images = start(recipe, train, device), train.images.to(device)  # first, since it measures the number format
    with ExitStack() as stack:
        pipes = {way.__name__: stack.enter_context(child(way, recipe, pixels, device)) for way in (usual, lightly)}
        skipped = {name: reason for name, pipe in pipes.items() if (reason := pipe.recv())}
        print(*(f"{name} is skipped: {reason}\n" for name, reason in skipped.items()), sep="", end="", flush=True)
        ways = {name: partial(ask, pipe) for name, pipe in pipes.items() if name not in skipped}
        for way in (ours, limit):
            ways[way.__name__] = partial(measure, way(run, images), recipe.batch_size, device)
        speed.reset_peak_memory(device)
        rates = measure_in_turns(ways, flags.rounds, flags.seconds)
    return {
        **provenance(train, device), "seed": recipe.seed, "encoder": flags.encoder, "batch_size": flags.batch_size,
        "K": flags.K, "precision": str(run.dtype).removeprefix("torch."), "skipped": skipped,
        "lightly": None if skipped else version("lightly"), **ratios(rates), "images_per_second_of_rounds": rates,
        "images_per_second": {name: median(found) for name, found in rates.items()},
        "peak_memory_bytes": speed.peak_memory_bytes(device), "wall_seconds": time.perf_counter() - began,
        "augmentation_microseconds": augmentation_cost(recipe, images, pixels, min(2.0, flags.seconds)),
    }  # fmt: skip


def ratios(rates: dict[str, list[float]]) -> dict[str, float]:
    """``ratio_NAME``, how many times as fast ours is: the median over rounds of the ratio in one round, with min and max."""
    found = {}
    for name in [name for name in rates if name != "ours"]:
        each = [a / b for a, b in zip(rates["ours"], rates[name], strict=True)]
        found |= {f"ratio_{name}": median(each), f"ratio_{name}_min": min(each), f"ratio_{name}_max": max(each)}
    return found


def tables(result: dict) -> str:
    """The speed of each way, and the cost of augmentation alone."""
    rows, speeds = [["", "images/s", "of the limit", "ours is", "min", "max", "precision"]], result["images_per_second"]
    for name, rate in speeds.items():
        compared = [f"{result[key]:.2f}x" if (key := f"ratio_{name}{end}") in result else "" for end in ("", "_min", "_max")]
        precision = result["precision"] if name in ("ours", "limit") else "float32"
        rows.append([name, f"{rate:,.0f}", f"{rate / speeds['limit']:.2f}", *compared, precision])
    names = ("torchvision on PIL images, one process", "ours on a batch, one thread", "ours on a batch, all threads")
    costs = [[name, f"{cost:.0f}"] for name, cost in zip(names, result["augmentation_microseconds"].values(), strict=True)]
    return f"\n{text_table(rows)}\n\n{text_table([['augmentation of a view', 'µs'], *costs])}\n"


def verdict(result: dict) -> str:
    """One line: are the bars met?"""
    bars = {name: f"bar {bar}: {'met' if result[f'ratio_{name}'] >= bar else 'not met'}" for name, bar in BARS.items()}
    beside = f"{result['ratio_usual']:.2f}x the usual way ({bars['usual']}) and {result['ratio_limit']:.2f} of the limit"
    return f"verdict: ours is {beside} ({bars['limit']}) on {result['hardware']}, {result['precision']}"


def main() -> int:
    """Run the benchmark; returns the exit status: 0 done, 2 wrong usage, 3 bad or missing data."""
    try:
        flags = parse(Flags, sys.argv[1:], "python -m benchmarks.throughput")
        result = benchmark(flags)
        print(tables(result))
        if flags.json:
            write_json(flags.json, result)
        print(verdict(result))
    except (UsageError, DataError) as error:
        print(f"throughput: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
