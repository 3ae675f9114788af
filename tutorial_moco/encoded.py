"""Images that stay encoded: for data sets larger than memory, and for views that are cropped from the whole picture.

A picture is a run of bytes in a file: all of it in a folder split/class/image, a member of a .tar, which is read where it
lies, or of one of many (WebDataset's shards: ``0001.jpg`` beside ``0001.cls``, which holds the number of its class). Threads
decode, crop and resize it whenever it is wanted; what is random in that is a function of its number, as in `augment`.
"""

from __future__ import annotations

import io
import os
import re
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tutorial_moco.archives import SECOND_SPLITS, SUFFIXES, places_in_tar, sort_out
from tutorial_moco.augment import AUGMENTATIONS, Augmentation, draws, framing
from tutorial_moco.errors import BadPicture, DataError
from tutorial_moco.pictures import rgb, told, upright

AT_ONCE = 8  # pictures of a thread's task
MARGIN = 256 / 224  # for evaluation the shorter side is brought to so many times the view's, and the centre cropped
GRAY = 128  # of a picture that cannot be decoded where that is no matter
# From heights and widths of n pictures, float32 (n,), what a view shows: boxes (n, 4), left, top, right, bottom in pixels, and
# whether it is mirrored, bool (n,).
Frame = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Tag = TypeVar("Tag")


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """Stands for uint8 images (N, 3, size, size), which are made anew each time they are asked for.

    Attributes:
        root: the folder that names start from.
        names: bytes (F,), files. places: int64 (N, 3), of each picture the number of its file, its first byte there, and how
            many it has.
        size: height and width of views, and of the images as they are evaluated, in pixels.
        skip: a picture that cannot be decoded is gray; else it ends the training, as a fault of the machine does.
        bad: those that were since the start, each with the reason; of this process.
    """

    root: Path
    names: np.ndarray
    places: Tensor
    size: int
    skip: bool = False
    bad: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self), 3, self.size, self.size

    def __getitem__(self, index: Tensor | slice) -> EncodedImages:
        """Some of them, still encoded."""
        return replace(self, places=self.places[index])

    def split(self, n: int) -> list[EncodedImages]:
        """Runs of n, the last one shorter, as of a tensor."""
        return [replace(self, places=places) for places in self.places.split(n)]

    def to(self, device: torch.device | str) -> Tensor:
        """The images as they are evaluated, with nothing random: uint8 (N, 3, size, size) on a device."""
        return self.centres().wait()[0].to(device)

    def centres(self) -> Making:
        """Begin to make the images as they are evaluated."""
        rows = torch.arange(len(self))
        return Making(self, [(rows, {0: [centre] * len(rows.split(AT_ONCE))})])

    def crops(self, index: Tensor, augmentation: str, *, seed: int, epoch: int) -> Making:
        """Begin to make the parts that views show, brought to their size: of two what `augment.two_views` takes.

        Args:
            index: int64 (2, n), numbers of the pictures that the query's view shows, and the key's; where both show the same
                ones, each is decoded once. Or (1, n), the first view alone.
        """
        frames = {
            view: [
                partial(random_frame, u, recipe) for u in draws(index[view], seed=seed, epoch=epoch, view=view).split(AT_ONCE)
            ]
            for view, recipe in enumerate(AUGMENTATIONS[augmentation][: len(index)])
        }
        jobs = (
            [(index[0], frames)] if (index == index[0]).all() else [(index[view], {view: own}) for view, own in frames.items()]
        )
        return Making(self, jobs)

    def open(self, row: int) -> Image.Image | None:
        """A picture, upright, its pixels not decoded yet; None if it is bad and that is no matter."""
        return self.sound(row, lambda: upright(Image.open(io.BytesIO(self.content(row)))))

    def content(self, row: int) -> bytes:
        """The file of a picture."""
        file, start, length = self.places[row].tolist()
        with open(self.root / os.fsdecode(self.names[file]), "rb") as stream:
            stream.seek(start)
            return stream.read(length if start else -1)  # of a folder the whole file, which may have been mended since

    def sound(self, row: int, work: Callable):
        """The work on a picture; None, and the reason kept, if it is bad and that is no matter."""
        file, start, _ = self.places[row].tolist()
        name = os.fsdecode(self.names[file]) + (f" (byte {start:,})" if start else "")
        try:
            with told(self.root, name):
                return work()
        except DataError as error:
            fault = isinstance(error.__cause__, MemoryError) or getattr(error.__cause__, "errno", None)  # of the machine
            if fault or not self.skip:
                raise BadPicture(str(error)) from error
            self.bad[name] = str(error.__cause__)
            return None

    def identity(self) -> bytes:
        """Equal for the same pictures in the same order: names, places and lengths."""
        return b"\0".join(self.names.tolist()) + self.places.numpy().astype("<i8").tobytes()

    def packed(self) -> tuple[Tensor, Tensor, dict[str, object]]:
        """What `unpacked` takes: places, names as uint8 (F, longest), and the rest."""
        names = torch.from_numpy(self.names.view(np.uint8).reshape(len(self.names), self.names.dtype.itemsize).copy())
        return self.places, names, {"root": str(self.root), "size": self.size, "skip": self.skip}

    @classmethod
    def unpacked(cls, places: Tensor, names: Tensor, *, root: str, size: int, skip: bool) -> EncodedImages:
        """What `packed` took apart."""
        return cls(Path(root), names.numpy().view(f"S{names.shape[1]}")[:, 0], places, size, skip)


def in_batches(images: Tensor | EncodedImages, n: int) -> Iterator[Tensor]:
    """Images as they are evaluated, uint8 (n, 3, H, W) at a time; encoded ones are made while the ones before are at work."""
    if isinstance(images, Tensor):
        yield from images.split(n)
        return
    for _, made in in_turn((None, part.centres()) for part in images.split(n)):
        yield made[0]


def in_turn(begun: Iterable[tuple[Tag, Making]], ahead: int = 1) -> Iterator[tuple[Tag, Tensor]]:
    """What is made, one after another, while the next ones are begun. What nobody asks for any more is cancelled."""
    making: deque[tuple[Tag, Making]] = deque()
    try:
        for one in begun:
            making.append(one)
            if len(making) > ahead:
                tag, made = making.popleft()
                yield tag, made.wait()
        while making:
            tag, made = making.popleft()
            yield tag, made.wait()
    finally:
        for _, made in making:
            made.cancel()


class Making:
    """Images that threads have begun to make.

    Args:
        images: where from.
        jobs: rows, int64 (n,), and for each view of them as many frames as there are parts of ``AT_ONCE`` rows.
    """

    def __init__(self, images: EncodedImages, jobs: list[tuple[Tensor, dict[int, list[Frame]]]]):
        n, views = len(jobs[0][0]), sum(len(frames) for _, frames in jobs)
        shape = (views, n, images.size, images.size, 3)
        self.pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self.tasks: list[Future] = []
        for rows, frames in jobs:
            for part, few in enumerate(torch.arange(n).split(AT_ONCE)):
                own = {view: parts[part] for view, parts in frames.items()}
                self.tasks.append(threads().submit(_make, images, rows[few].tolist(), own, self.pixels.numpy(), few.tolist()))

    def wait(self) -> Tensor:
        """uint8 (views, n, 3, size, size), when it is there.

        Raises:
            BadPicture: one cannot be decoded.
        """
        try:
            for task in self.tasks:
                task.result()
        finally:
            self.cancel()
        return self.pixels.permute(0, 1, 4, 2, 3)

    def cancel(self) -> None:
        """Begin no more of it."""
        for task in self.tasks:
            task.cancel()


def _make(images: EncodedImages, rows: list[int], frames: dict[int, Frame], pixels: np.ndarray, places: list[int]) -> None:
    """A thread's task: fill ``pixels[view, place]`` for each view of some pictures, each decoded once."""
    pictures = [images.open(row) for row in rows]
    width, height = torch.tensor([picture.size if picture else (1, 1) for picture in pictures], dtype=torch.float32).T
    shown = [(boxes.tolist(), flips.tolist()) for boxes, flips in (frame(height, width) for frame in frames.values())]
    for i, (row, picture, place) in enumerate(zip(rows, pictures, places, strict=True)):
        boxes = [own[i] for own, _ in shown]
        made = picture and images.sound(row, partial(cut, picture, boxes, images.size))
        for which, view in enumerate(frames):
            cropped = made[which] if made else GRAY
            pixels[view, place] = cropped[:, ::-1] if made and shown[which][1][i] else cropped


def cut(picture: Image.Image, boxes: list[list[float]], size: int) -> list[np.ndarray]:
    """Parts of a picture, each resized to uint8 (size, size, 3) by torch's antialiased bilinear filter for 8 bits.

    A JPEG is decoded at half, a quarter or an eighth of its size, which costs less, where each part then still has twice the
    pixels a side that it is brought to: of fewer, rounding its box to whole ones would be felt.
    """
    width, height = picture.size
    spare = min(min(right - left, bottom - top) for left, top, right, bottom in boxes) / (2 * size)
    if spare >= 2:
        picture.draft(None, (int(width / spare), int(height / spare)))
    whole = torch.from_numpy(np.array(rgb(picture))).permute(2, 0, 1)[None]
    x, y = whole.shape[3] / width, whole.shape[2] / height
    parts = [whole[:, :, round(b * y) : round(d * y), round(a * x) : round(c * x)] for a, b, c, d in boxes]
    resized = [F.interpolate(part, (size, size), mode="bilinear", antialias=True) for part in parts]
    return [part[0].permute(1, 2, 0).numpy() for part in resized]


def random_frame(u: Tensor, recipe: Augmentation, height: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """A `Frame` that is drawn: RandomResizedCrop and a mirror."""
    (top, left, high, wide), flip = framing(u, height, width, recipe)
    return torch.stack([left, top, left + wide, top + high], dim=1), flip


def centre(height: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """The `Frame` of evaluation: of a shorter side of 256 pixels 224 about the middle."""
    side = torch.minimum(height, width) / MARGIN
    left, top = (width - side) / 2, (height - side) / 2
    return torch.stack([left, top, left + side, top + side], dim=1), torch.zeros(len(side), dtype=torch.bool)


@cache
def threads() -> ThreadPoolExecutor:
    """As many as there are processors for this process. Pillow lets others work while it decodes; threads need no copies."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ThreadPoolExecutor(max(1, processors // int(os.environ.get("LOCAL_WORLD_SIZE", 1))), "decoding")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=threads.cache_clear)  # it has the pool, but none of its threads


# ---- which pictures there are


def landmarks(path: Path) -> Iterator[bytes]:
    """What changes when pictures come or go: names and times of the folders and archives, not of each picture.

    Raises:
        DataError: there is nothing of that name, or it cannot be read.
    """
    if not path.exists():
        raise DataError(f"no folder or archive {str(path)!r}: pictures that stay encoded need one")
    try:
        if path.is_file():
            yield f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode()
        for folder, _, files in os.walk(path, followlinks=True):
            for place in (folder, *(os.path.join(folder, file) for file in files if file.endswith(".tar"))):
                yield os.fsencode(place) + f" {os.stat(place).st_mtime_ns}".encode()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}): check its permissions") from error


def catalogue(path: Path, size: int, skip: bool) -> tuple[dict[str, tuple[EncodedImages, Tensor]], tuple[str, ...], str]:
    """All pictures of a folder or .tar: for both splits those and their labels, the classes, and a line for the user.

    Raises:
        DataError: it is compressed, holds no pictures to train on, or is damaged.
    """
    path = path.resolve()
    if not path.is_dir() and path.suffix != ".tar":
        raise DataError(f"{path} cannot be read where it lies: unpack it to a folder, or to a .tar that is not compressed")
    try:
        files, note = sort_out(path)
    except DataError:
        if path.is_dir() and (shards := sorted(path.rglob("*.tar"))):
            return _of_shards(path, shards, size, skip)
        raise
    where = {name: (start, length) for name, start, length in places_in_tar(path)} if path.is_file() else {}
    classes, found = tuple(files["train"]), {}
    for split, members in files.items():
        pairs = [(name, label) for label, c in enumerate(classes) for name in members.get(c, ())]
        if where:
            names, places = [path.name], [(0, *where[name]) for name, _ in pairs]
        else:
            names = [name for name, _ in pairs]
            places = [(i, 0, (path / name).stat().st_size) for i, name in enumerate(names)]
        images = _images(path.parent if where else path, names, places, size, skip)
        found[split] = images, torch.tensor([label for _, label in pairs], dtype=torch.int64)
    return found, classes, note


def _images(root: Path, names: list[str], places: list[tuple[int, int, int]], size: int, skip: bool) -> EncodedImages:
    encoded = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
    return EncodedImages(root, encoded, torch.tensor(places, dtype=torch.int64).view(-1, 3), size, skip)


def _of_shards(path: Path, shards: list[Path], size: int, skip: bool):
    """As `catalogue`, of WebDataset's shards; a shard's name, or its folder's, tells its split."""
    names, found = [shard.relative_to(path).as_posix() for shard in shards], defaultdict(list)
    for number, name in enumerate(names):
        words = re.split("[^a-z]+", name.lower())
        if split := next((split for split in ("train", *SECOND_SPLITS) if split in words), None):
            found[split] += [(number, *sample) for sample in _samples(path / name)]
    second = next((split for split in SECOND_SPLITS if split in found), None)
    filled = [split for split in found if found[split]]
    if "train" not in filled or second not in filled:
        told_splits = " and ".join(filled) or "no split"
        raise DataError(
            f"{path} has shards of {told_splits}: names must tell train and val, like train-0000.tar, with pictures in"
        )
    classes = tuple(str(c) for c in range(1 + max(label for split in ("train", second) for *_, label in found[split])))
    made = {}
    for split, source in ("train", "train"), ("test", second):
        images = _images(path, names, [place[:3] for place in found[source]], size, skip)
        made[split] = images, torch.tensor([label for *_, label in found[source]], dtype=torch.int64)
    return made, classes, ""


def _samples(shard: Path) -> Iterator[tuple[int, int, int]]:
    """First byte, length and class of each picture of a shard."""
    parts: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    for name, start, length in places_in_tar(shard):
        folder, _, file = name.rpartition("/")
        key, _, suffix = file.partition(".")
        parts[f"{folder}/{key}"][f".{suffix.lower()}"] = start, length
    with shard.open("rb") as stream:
        for key, own in parts.items():
            picture = next((own[suffix] for suffix in own if suffix in SUFFIXES), None)
            if picture is None:
                continue
            if ".cls" not in own:
                raise DataError(f"{shard}: {key.lstrip('/')} has no .cls beside it, with the number of its class: pack it anew")
            stream.seek(own[".cls"][0])
            told_class = stream.read(own[".cls"][1]).strip()
            if not told_class.isdigit():
                raise DataError(f"{shard}: {key.lstrip('/')}.cls holds {told_class[:20]!r}, not the number of a class")
            yield *picture, int(told_class)
