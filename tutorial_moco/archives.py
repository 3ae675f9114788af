"""Folders and archives of images: which files there are, told without trusting them.

An archive is read member by member and never extracted, so a bad one can leave nothing behind; one with a member that
points outside, a link or a device is refused whole. The standard library takes some damage for the end of an archive:
what it passes over in silence is checked here.
"""

from __future__ import annotations

import gzip
import io
import lzma
import os
import re
import stat
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from tutorial_moco.errors import DataError

ARCHIVES = (".tar", ".tar.xz", ".tar.gz", ".tgz", ".zip")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pbm", ".pgm", ".ppm")
SECOND_SPLITS = ("test", "val", "valid", "validation")  # the first of these that is there is the test split
LARGEST_FILE = 1 << 29  # bytes of one image file: more than any that Pillow's own limit lets through

Source = Path | io.BytesIO | None  # where Pillow finds a file's bytes; None for a file that wasn't wanted


def files_of(path: Path, wanted: Collection[str]) -> Iterator[tuple[str, Source]]:
    """Name and source of every file in a folder or archive, in its own order; bytes are read of `wanted` files only."""
    walk = _folder_files if path.is_dir() else _zip_files if path.name.lower().endswith(".zip") else _tar_files
    with _told(path):
        yield from walk(path, wanted)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What goes wrong while a folder or an archive is walked becomes a line with the mend."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # on damaged bytes the parsers of the standard library raise almost anything
        if path.is_dir():
            raise DataError(f"{path} cannot be read ({error}): check its permissions") from error
        raise DataError(f"{path} is truncated or damaged: {error or type(error).__name__}; fetch it again") from error


def _folder_files(path: Path, wanted: Collection[str]) -> Iterator[tuple[str, Source]]:
    def fail(error: OSError) -> None:
        raise error  # os.walk would pass over a folder it may not read

    for folder, _, files in os.walk(path, onerror=fail, followlinks=True):
        for file in files:
            yield Path(folder, file).relative_to(path).as_posix(), Path(folder, file)


def _zip_files(path: Path, wanted: Collection[str]) -> Iterator[tuple[str, Source]]:
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16) - 22))  # the end record and the longest comment after it
        end = file.read()
        count = int.from_bytes(end[end.rindex(b"PK\5\6") + 10 :][:2], "little")
        # zipfile doesn't look at the count, so a damaged length in the directory could hide the entries behind it.
        if count != 0xFFFF and (len(archive.infolist()) - count) % (1 << 16):
            raise zipfile.BadZipFile(f"{len(archive.infolist())} members of {count}")
        for info in archive.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the archive was made without Unix modes
            _refuse_unsafe(path, info.filename, info.file_size, kind in (0, stat.S_IFREG, stat.S_IFDIR))
            with archive.open(info) as file:  # also for those not wanted: it compares the two copies of the name
                if not info.is_dir():
                    yield info.filename, io.BytesIO(file.read()) if info.filename in wanted else None


def _tar_files(path: Path, wanted: Collection[str]) -> Iterator[tuple[str, Source]]:
    for tar, info in _tar_members(path):
        yield info.name, io.BytesIO(tar.extractfile(info).read()) if info.name in wanted else None


def places_in_tar(path: Path) -> Iterator[tuple[str, int, int]]:
    """Of each file in a .tar that is not compressed its name, its first byte and how many it has."""
    with _told(path):
        for _, info in _tar_members(path):
            if info.issparse():
                raise DataError(f"{path} is refused: its member {info.name!r} has holes, pack it anew")
            yield info.name, info.offset_data, info.size


def _tar_members(path: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    open_stream = {".xz": lzma.open, ".gz": gzip.open, ".tgz": gzip.open}.get(path.suffix.lower(), open)
    with open_stream(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r:", tarinfo=_TarHeader) as tar:
        for info in tar:
            _refuse_unsafe(path, info.name, info.size, info.isreg() or info.isdir())
            if info.isreg():
                yield tar, info
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("the end of the archive is missing")
        while stream.read(1 << 20):  # the checksum of what was decompressed stands at the very end
            pass


class _TarHeader(tarfile.TarInfo):
    """Raises where tarfile takes a damaged or missing header for the end of the archive, which is a block of zeros."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf == bytes(tarfile.BLOCKSIZE):
                raise
            raise tarfile.ReadError(str(error)) from error
        if header.type in b"LKxgX" and header.size > 1 << 20:  # long names, which tarfile reads into memory at once
            raise tarfile.ReadError(f"a file name of {header.size} bytes")
        return header


def _refuse_unsafe(path: Path, name: str, size: int, plain: bool) -> None:
    parts = name.replace("\\", "/").split("/")
    if parts[0] == "" or re.match("[A-Za-z]:", name) or ".." in parts:
        raise DataError(f"{path} is refused: its member {name!r} points outside the archive")
    if not plain:
        raise DataError(f"{path} is refused: its member {name!r} is a link or a device, put in the file itself")
    if size > LARGEST_FILE:
        raise DataError(f"{path} is refused: its member {name!r} unpacks to {size >> 20} MiB, too large for an image")


def sort_out(path: Path) -> tuple[dict[str, dict[str, list[str]]], str]:
    """For both splits the file names of each class, and a line for the user where the test split had to be made."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, _ in files_of(path, ()):
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
        junk = any(part.startswith(".") or part == "__MACOSX" for part in parts)
        # The innermost folder named like a split that has a class and an image in it: others may lead to it.
        at = [i for i, part in enumerate(parts[:-2]) if part.lower() in ("train", *SECOND_SPLITS)]
        if at and not junk and os.path.splitext(name)[1].lower() in SUFFIXES:
            found[parts[at[-1]].lower()][parts[at[-1] + 1]].add(name)
    train = {label: sorted(names) for label, names in sorted(found["train"].items())}
    if not train:
        raise DataError(f"{path} has no images to train on: they must lie as split/class/image, like train/cat/1.png")
    if len(train) == 1:
        raise DataError(f"{path} has one class only, {next(iter(train))!r}: nothing to tell apart, add another")
    second = next((split for split in SECOND_SPLITS if split in found), None)
    if second is None:
        test = {label: names[9::10] or names[-1:] for label, names in train.items() if len(names) > 1}
        train = {label: sorted(set(names) - set(test.get(label, ()))) for label, names in train.items()}
        return {"train": train, "test": test}, "no test split, so every 10th image of each class was taken out for it"
    test = {label: sorted(names) for label, names in sorted(found[second].items())}
    if unknown := sorted(test.keys() - train.keys()):
        raise DataError(f"{path} has no training images of the class {unknown[0]!r}, which is in {second}: add some")
    return {"train": train, "test": test}, ""
