"""Image sets: from a name, a folder or an archive to uint8 tensors in RAM.

``load_images`` takes ``shapes`` (drawn by code), ``digits`` (scikit-learn's), ``cifar10``, ``cifar100`` or ``stl10``
(downloaded, and checked against the published md5 before anything is read), or a path. An archive is walked twice,
first to see that it is whole and safe, then to decode it. What was made is kept as one safetensors file, of which a
later start reads only the split it needs.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import math
import os
import re
import shutil
import socket
import sys
import tarfile
import tempfile
import time
import urllib.error
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from tutorial_moco.archives import ARCHIVES, Source, files_of, sort_out
from tutorial_moco.encoded import EncodedImages, catalogue, landmarks
from tutorial_moco.errors import DataError, UsageError
from tutorial_moco.pictures import rgb, told, upright
from tutorial_moco.randomness import permutation
from tutorial_moco.speed import machine_memory

DOWNLOADS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10"}  # the classes in torchvision.datasets
SHAPES = {"train": (10_000, 0), "test": (2_000, 1)}  # how many, and the seed they are drawn from
RETRIES = (1.0, 4.0)  # seconds between a download that failed and the next try
KEEP_UP_TO, FALLBACK_SIZE = 96, 64
CACHE_FORMAT = b"1"  # goes into every key: raise it when the same input would give other pixels than before

Made = dict[str, tuple["ImageSet", str]]  # for each split its images and a line about them for the user, or ""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """One split of a data set, in RAM; or its labels, and pictures that stay encoded.

    Attributes:
        name: ``shapes``, ``cifar10``, …, or the name of the file or folder.
        split: ``train``, ``test`` or, from `hold_out`, ``validation``.
        images: uint8 (N, 3, H, W), RGB in 0..255; or what stands for them, `encoded.EncodedImages`.
        labels: int64 (N,), indices into `classes`.
        classes: names, the same for all splits of a data set.
        hash: sha256 in hex over pixels and labels: two sets with equal hashes hold the same images in the same order. Of
            encoded pictures over their names, places and labels.
        factors: for ``shapes``, what each image was drawn from, tensors with N rows; else empty.
        skipped: files that could not be decoded and were left out, each with the reason.
    """

    name: str
    split: str
    images: torch.Tensor | EncodedImages
    labels: torch.Tensor
    classes: tuple[str, ...]
    hash: str
    factors: dict[str, torch.Tensor] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: torch.Tensor | slice) -> ImageSet:
        """The images at `index` (int64 (M,), bool (N,) or a slice) in that order, with a hash of their own."""
        images, labels = self.images[index], self.labels[index]
        factors = {name: factor[index] for name, factor in self.factors.items()}
        return replace(self, images=images, labels=labels, factors=factors, hash=_hash(images, labels))

    def few(self, n: int) -> ImageSet:
        """At most n of them, from all over the set, the same each time."""
        return self.take(permutation(len(self), 0)[:n])


def load_images(
    data: str | Path,
    split: str,
    *,
    image_size: int | None = None,
    view_size: int | None = None,
    on_bad_image: Literal["raise", "skip"] = "raise",
    cache: Path | None = None,
    progress: bool = True,
) -> ImageSet:
    """Load one split of a data set, from the cache if it was loaded before.

    A name goes before a path: write ``./shapes`` for a folder of that name. ``shapes`` has 10,000 images to train on
    and 2,000 to test on; ``digits`` 1,437 and 360, the last ones of the set and so by other hands. ``stl10``
    stands for its 5,000 labelled training and 8,000 test images; its 100,000 unlabelled ones are left out. A folder's
    or an archive's test split is ``test``, else ``val``, ``valid`` or ``validation``, else every 10th image of each
    class that has at least two. Transparency is dropped, EXIF orientation applied.

    Args:
        data: ``shapes``, ``digits``, ``cifar10``, ``cifar100``, ``stl10`` in any case, or the path of a folder or an archive.
        split: ``train`` or ``test``.
        image_size: height and width in pixels, at least 8 (``shapes``: 16); the shorter side is resized to it and the
            centre cropped. ``None`` keeps the size of images that are all square, equal and at most 96 pixels wide,
            and is 64 for others.
        view_size: leave the pictures of a folder or a .tar, or of a folder of WebDataset's .tar shards, encoded where they
            lie, for views of so many pixels.
        on_bad_image: what to do when a file of a folder or an archive cannot be decoded: end with its name, or leave it out
            and list it in ``skipped``; if pictures stay encoded, take a gray one in its place.
        cache: folder to keep downloads and decoded images in; by default ``$TUTORIAL_MOCO_CACHE``, else
            ``$XDG_CACHE_HOME/tutorial_moco``, else ``~/.cache/tutorial_moco``.
        progress: show a bar while decoding.

    Raises:
        DataError: the data is missing, damaged, unsafe, too large for half of the memory, or has less than two classes.
        UsageError: `split`, `image_size` or `view_size` is none of the above.
    """
    if split not in SHAPES:
        raise UsageError(f"split is {split!r}: take train or test")
    smallest = 16 if str(data).lower() == "shapes" else 8
    if image_size is not None and image_size < smallest:
        raise UsageError(f"--image-size must be at least {smallest} for {data}, not {image_size}")
    cache = Path(cache) if cache is not None else default_cache()
    if on_bad_image not in ("raise", "skip"):
        raise UsageError(f"--on-bad-image must be raise or skip, not {on_bad_image}")
    if view_size is not None:
        name, key, make = _encoded(Path(data).expanduser(), view_size, image_size, on_bad_image == "skip")
    else:
        name, key, make = _source(data, image_size, cache, progress, on_bad_image == "skip")
    safe_name = re.sub(r"[^\w.-]", "_", name)[:60]
    file = cache / f"{safe_name}-{view_size or image_size or 'own'}px-{key[:16]}.safetensors"
    found = _read_cache(file, key, split)
    if found is None:
        made = make()
        _write_cache(file, key, made)
        found = made[split]
    images, note = found
    if note:
        print(f"{name}: {note}", file=sys.stderr)
    if len(images) == 0 and images.skipped:
        raise DataError(f"{data} has no image for its {split} split that can be decoded: mend them or fetch them again")
    if len(images) == 0:
        raise DataError(f"{data} has no images for a {split} split: each of its classes has one image, bring more")
    return images


def images_or_shapes(data: str = "cifar10") -> tuple[ImageSet, ImageSet]:
    """Training and test images for a notebook: ``$TUTORIAL_MOCO_DATA`` if it is set, else ``data``, else ``shapes``.

    Where the named images cannot be had (no network, say), a sentence says so and the drawn ones take their place.
    """
    try:
        data = os.environ.get("TUTORIAL_MOCO_DATA", data)
        return load_images(data, "train"), load_images(data, "test")
    except DataError as error:
        print(f"{error}\nGoing on with images drawn by the program (shapes).")
        return load_images("shapes", "train"), load_images("shapes", "test")


def hold_out(train: ImageSet, share: float, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Split training images in two, so that choices need not be made on the test images.

    Args:
        train: the images to split.
        share: fraction of each class to hold out, above 0 and below 1; at least one image of each class is held out
            and at least one left.
        seed: the same (seed, labels) gives the same split.

    Returns:
        What is left and what was held out, each in its old order; the second has the split ``validation``.
    """
    if not 0 < share < 1:
        raise UsageError(f"share is {share}: hold out more than 0 and less than 1 of the images, such as 0.1")
    random = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(train), dtype=torch.bool)
    for label in range(len(train.classes)):
        members = (train.labels == label).nonzero().flatten()
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held[members[torch.randperm(len(members), generator=random)[: max(count, 0)]]] = True
    if not held.any():
        raise DataError(f"{train.name} has no class of two or more images, so none can be held out: bring more images")
    return train.take(~held), replace(train.take(held), split="validation")


def default_cache() -> Path:
    """The folder that downloads and decoded images are kept in when none is named."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("TUTORIAL_MOCO_CACHE") or base / "tutorial_moco").expanduser()


# ---- where images come from


def _source(data: str | Path, size: int | None, cache: Path, progress: bool, skip: bool) -> tuple[str, str, Callable[[], Made]]:
    """A data set's name, a key that changes with its content, and the function that makes both splits."""
    name, path = str(data).lower(), Path(data).expanduser()
    if name == "shapes":
        from tutorial_moco import shapes

        # Drawing takes long enough to be worth keeping; the code is the data, so a change to it draws anew.
        return name, _key([Path(shapes.__file__).read_bytes()]), lambda: _draw(size or 32)
    if name == "digits":
        import sklearn

        return name, _key([sklearn.__version__.encode()]), lambda: _digits(size or 32)
    if name in DOWNLOADS:
        import torchvision

        kind = getattr(torchvision.datasets, DOWNLOADS[name])
        return name, _key([kind.tgz_md5.encode()]), lambda: _download(kind, name, size, cache)
    if not os.path.exists(path):
        names = ", ".join(("shapes", "digits", *DOWNLOADS))
        raise DataError(f"no data set or path {str(data)!r}: take one of {names}, or the path of a folder or archive")
    if not path.is_dir() and not path.name.lower().endswith(ARCHIVES):
        raise DataError(f"{path} is neither a folder nor an archive: take one of {', '.join(ARCHIVES)}")
    try:
        key = _key(chain([b"skip"] * skip, _content(path)))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}): check its permissions") from error
    name = path.resolve().name
    return name, key, lambda: _decode_splits(path, name, size, progress, skip)


def _key(chunks: Iterable[bytes]) -> str:
    digest = hashlib.sha256(CACHE_FORMAT)
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _content(path: Path) -> Iterator[bytes]:
    """An archive's bytes; for a folder, which may be far larger, names, sizes and times of its files."""
    if path.is_dir():
        for name, file in sorted(files_of(path, ())):
            found = file.stat()
            yield os.fsencode(f"{name}\0{found.st_size}\0{found.st_mtime_ns}\n")
    else:
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                yield chunk


def _draw(size: int) -> Made:
    from tutorial_moco.shapes import SHAPE_CLASSES, draw_shapes

    made = {}
    _must_fit("shapes", sum(count for count, _ in SHAPES.values()), (3, size, size))
    for split, (count, seed) in SHAPES.items():
        images, labels, factors = draw_shapes(count, seed, size)
        made[split] = ImageSet("shapes", split, images, labels, SHAPE_CLASSES, _hash(images, labels), factors), ""
    return made


def _digits(size: int) -> Made:
    """scikit-learn's handwritten digits, 8 x 8 pixels and sixteen grays, brought to the size and to three colours."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    _must_fit("digits", 4 * len(digits.target), (3, size, size))  # they are float32 when they are brought to their size
    gray = torch.from_numpy(digits.images / 16).float()[:, None]
    images = torch.nn.functional.interpolate(gray, size=(size, size), mode="bicubic").mul(255).round().clamp(0, 255)
    images, labels = images.to(torch.uint8).expand(-1, 3, -1, -1), torch.from_numpy(digits.target).long()
    made, classes, cut = {}, tuple(str(name) for name in digits.target_names), len(labels) * 4 // 5
    for split, part in (("train", slice(cut)), ("test", slice(cut, None))):
        pixels, own = images[part].contiguous(), labels[part].clone()
        made[split] = ImageSet("digits", split, pixels, own, classes, _hash(pixels, own)), ""
    return made


def _encoded(path: Path, view_size: int, image_size: int | None, skip: bool) -> tuple[str, str, Callable[[], Made]]:
    """As `_source`: what is made and kept is the list of the pictures."""
    if image_size is not None:
        raise UsageError("--image-size is for images in memory, and --view-size for pictures that stay encoded: give one")
    if view_size < 8:
        raise UsageError(f"--view-size must be at least 8, not {view_size}")
    key, name = _key([f"{path.resolve()} {view_size} {skip}".encode(), *landmarks(path)]), path.resolve().name

    def make() -> Made:
        found, classes, note = catalogue(path, view_size, skip)
        return {
            split: (ImageSet(name, split, images, labels, classes, _hash(images, labels)), note if split == "test" else "")
            for split, (images, labels) in found.items()
        }

    return name, key, make


def _hash(images: torch.Tensor | EncodedImages, labels: torch.Tensor) -> str:
    told = images.identity() if isinstance(images, EncodedImages) else images.contiguous().numpy().reshape(-1)
    digest = hashlib.sha256(told)
    digest.update(labels.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


# ---- downloads


def _download(kind: type, name: str, size: int | None, cache: Path) -> Made:
    for pause in (*RETRIES, None):
        try:
            with _download_folder(kind, cache) as root:
                return {split: (_torchvision_split(kind, name, split, size, root), "") for split in SHAPES}
        except (OSError, RuntimeError, EOFError, http.client.HTTPException, tarfile.TarError) as error:
            # torchvision's own words for a wrong md5 don't say that the network is to blame.
            wrong = "File not found or corrupted" in str(error)
            reason = "what arrived is not the published file" if wrong else " ".join(str(error).split())
            told = f"{name} could not be downloaded ({reason})"
            if pause is None or not _may_pass(error):
                mend = f"bring {kind.url} by hand and place it in {cache}, or take --data shapes, which needs no network"
                raise DataError(f"{told}: {mend}") from error
            print(f"{told}: once more in {pause:g} s", file=sys.stderr)
            time.sleep(pause)
    raise AssertionError  # the last try returns or raises


def _may_pass(error: Exception) -> bool:
    """Whether another try may help: not where the server has no such file, or the disk no room."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500
    return getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def _download_folder(kind: type, cache: Path) -> Iterator[Path]:
    """A folder for torchvision to download and extract to, gone afterwards; only a sound archive is kept, in `cache`.

    torchvision leaves half a download and half an extraction where they happened, and takes a CIFAR folder without
    its list of class names for whole, to fail on it at every later start.
    """
    from torchvision.datasets.utils import check_integrity

    try:
        cache.mkdir(parents=True, exist_ok=True)
        root = Path(tempfile.mkdtemp(dir=cache, prefix="download-"))
    except OSError:
        root = Path(tempfile.mkdtemp(prefix="tutorial_moco-"))
    kept, timeout = cache / kind.filename, socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(60)  # a connection that has gone silent would be waited for without end
        if check_integrity(kept, kind.tgz_md5):
            shutil.copyfile(kept, root / kind.filename)
        else:
            with suppress(OSError):
                kept.unlink()
        yield root
        with suppress(OSError):
            os.replace(root / kind.filename, kept)
    finally:
        socket.setdefaulttimeout(timeout)
        shutil.rmtree(root, ignore_errors=True)


def _torchvision_split(kind: type, name: str, split: str, size: int | None, root: Path) -> ImageSet:
    if name == "stl10":
        found = kind(root, split=split, download=True)
        pixels, labels = found.data, found.labels
    else:
        found = kind(root, train=split == "train", download=True)
        pixels, labels = found.data.transpose(0, 3, 1, 2), found.targets
    if size not in (None, pixels.shape[-1]):
        resized = _room(name, len(pixels), (3, size, size))
        for row, image in enumerate(pixels):
            resized[row] = _fit(Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))), size)
        pixels = resized
    images, labels = torch.from_numpy(np.ascontiguousarray(pixels)), torch.as_tensor(labels, dtype=torch.int64)
    return ImageSet(name, split, images, labels, tuple(found.classes), _hash(images, labels))


# ---- folders and archives: their images


def _decode_splits(path: Path, title: str, size: int | None, progress: bool, skip: bool = False) -> Made:
    files, note = sort_out(path)
    names = [name for split in files.values() for members in split.values() for name in members]
    bad: dict[str, str] | None = {} if skip else None
    pixels, shrunk = _decode_all(path, title, names, size, progress, bad), size is not None
    if pixels is None:
        pixels, shrunk = _decode_all(path, title, names, FALLBACK_SIZE, progress, bad), True
    fitted = f"shorter sides are resized to {pixels.shape[-1]} pixels, centres cropped (--image-size sets it)"
    classes, made, start = tuple(files["train"]), {}, 0
    for split, line in ("train", fitted if shrunk else ""), ("test", note):
        members = [(label, name) for label, c in enumerate(classes) for name in files[split].get(c, ())]
        sound = [row for row, (_, name) in enumerate(members) if name not in (bad or ())]
        labels = torch.tensor([members[row][0] for row in sound], dtype=torch.int64)
        images = torch.from_numpy(pixels[start : start + len(members)][sound] if bad else pixels[start : start + len(members)])
        skipped = tuple(f"{name} ({bad[name]})" for _, name in members if name in (bad or ()))
        if skipped:
            line = f"{line}; " * bool(line) + f"{len(skipped)} of its {split} files skipped: {'; '.join(skipped[:3])}"
        made[split] = ImageSet(title, split, images, labels, classes, _hash(images, labels), skipped=skipped), line
        start += len(members)
    return made


def _decode_all(
    path: Path, title: str, names: list[str], size: int | None, progress: bool, bad: dict[str, str] | None = None
) -> np.ndarray | None:
    """uint8 (N, 3, S, S) in the order of `names`; with ``size=None``, None unless all are one small square.

    With a dictionary ``bad``, files that cannot be decoded go there with the reason, and their rows hold nothing.
    """
    rows, done, pixels = {name: row for row, name in enumerate(names)}, set(), None
    wanted = ((name, source) for name, source in files_of(path, rows) if name in rows)
    with tqdm(total=len(names), desc=f"decoding {title}", unit="img", leave=False, disable=not progress) as bar:
        for name, image in _in_order(lambda file: (file[0], _decoded(path, *file, size, bad)), wanted):
            if image is None:
                done.add(name)
                bar.update()
                continue
            if pixels is None:
                if size is None and not image.shape[1] == image.shape[2] <= KEEP_UP_TO:
                    return None
                pixels = _room(title, len(names), image.shape)
            if image.shape != pixels.shape[1:]:
                return None
            pixels[rows[name]] = image
            done.add(name)
            bar.update()
    if len(done) < len(names):
        raise DataError(f"{path} was changed while it was read: start again")
    if pixels is None:
        raise DataError(f"{path} has no image that can be decoded: {next(iter(bad))} cannot ({next(iter(bad.values()))})")
    return pixels


def _decoded(path: Path, name: str, source: Source, size: int | None, bad: dict[str, str] | None) -> np.ndarray | None:
    """The image; None, and the reason kept, if it is bad and that is no matter."""
    try:
        return _decode(path, name, source, size)
    except DataError as error:
        if bad is None:
            raise
        bad[name] = str(error).partition(f"{name} ")[2].rpartition(": ")[0]
        return None


def _in_order(function: Callable, items: Iterator) -> Iterator:
    """``map`` on all cores that holds only some items at a time; in batches, as one costs less than its hand-over."""
    workers, pending = os.cpu_count() or 1, deque()
    with ThreadPoolExecutor(workers) as pool:
        while batch := list(islice(items, 16)):
            pending.append(pool.submit(lambda batch: [function(item) for item in batch], batch))
            if len(pending) > 2 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


def _decode(path: Path, name: str, source: Source, size: int | None) -> np.ndarray:
    """uint8 (3, H, W), upright and RGB; with a size, (3, size, size)."""
    with told(path, name), Image.open(source) as image:
        return _fit(rgb(upright(image)), size)


def _fit(image: Image.Image, size: int | None) -> np.ndarray:
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)  # crops first, so long strips stay cheap
    return np.asarray(image).transpose(2, 0, 1)


def _room(title: str, count: int, shape: tuple[int, ...]) -> np.ndarray:
    _must_fit(title, count, shape)
    return np.empty((count, *shape), np.uint8)


def _must_fit(title: str, count: int, shape: tuple[int, ...]) -> None:
    needed = count * math.prod(shape)
    if needed > machine_memory() // 2:
        raise DataError(
            f"{title} would take {needed / 2**30:.1f} GiB as {shape[2]} x {shape[1]} pixels, over half of this "
            "machine's memory: choose a smaller --image-size"
        )


# ---- the cache


def _read_cache(file: Path, key: str, split: str) -> tuple[ImageSet, str] | None:
    if not os.path.exists(file):
        return None
    try:
        with safe_open(file, "pt") as tensors:
            record = json.loads(tensors.metadata()[split])
            if record.pop("key") != key:
                raise ValueError("it belongs to other data")
            note, classes, names = record.pop("note"), tuple(record.pop("classes")), record.pop("factors")
            record["skipped"] = tuple(record.get("skipped", ()))
            images, labels = tensors.get_tensor(f"{split}.images"), tensors.get_tensor(f"{split}.labels")
            if encoded := record.pop("encoded", None):
                images = EncodedImages.unpacked(images, tensors.get_tensor(f"{split}.names"), **encoded)
            factors = {name: tensors.get_tensor(f"{split}.factors.{name}") for name in names}
            return ImageSet(split=split, images=images, labels=labels, classes=classes, factors=factors, **record), note
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        print(f"warning: the cache file {file} is damaged ({error}) and is made anew", file=sys.stderr)
        return None


def _write_cache(file: Path, key: str, made: Made) -> None:
    tensors, records = {}, {}
    for split, (found, note) in made.items():
        images, encoded = found.images, None
        if isinstance(images, EncodedImages):
            images, tensors[f"{split}.names"], encoded = images.packed()
        tensors |= {f"{split}.images": images, f"{split}.labels": found.labels}
        tensors |= {f"{split}.factors.{name}": factor for name, factor in found.factors.items()}
        record = {
            "key": key,
            "name": found.name,
            "hash": found.hash,
            "note": note,
            "skipped": found.skipped,
            "encoded": encoded,
        }
        records[split] = json.dumps(record | {"classes": found.classes, "factors": list(found.factors)})
    unfinished = file.with_name(f".{uuid.uuid4().hex}.tmp")  # in the same folder, or it could not be moved at once
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, unfinished, metadata=records)
        with unfinished.open("r+b") as written:
            os.fsync(written.fileno())
        os.replace(unfinished, file)
    except (OSError, SafetensorError) as error:
        print(f"warning: no cache, as {file.parent} cannot be written ({error})", file=sys.stderr)
    finally:
        with suppress(OSError):
            unfinished.unlink()
