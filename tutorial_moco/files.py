"""Writing a file in one move."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from tutorial_moco.errors import DataError


def write_whole(path: Path, content: bytes | bytearray, previous: Path | None = None) -> None:
    """Write a file so that a crash, a kill or a full disk leaves either the old file or the new one, never a part.

    The new one is written beside it, brought to the disk, read back, and only then takes the name; that, too, is brought to the
    disk.

    Args:
        previous: a name under which the old file stays, if there is one.

    Raises:
        DataError: the disk refused, or gave back other bytes; the message names the path, the bytes needed and those free.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if temporary.read_bytes() != content:
            raise OSError("what was read back is not what was written")
        if previous is not None and path.exists():
            keep(path, previous)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        needed = f"{len(content):,} bytes needed{_free(path.parent)}"
        raise DataError(f"{path} could not be written ({needed}): {error.strerror or error}") from error


def make_folder(folder: Path) -> None:
    """Make a folder, if it is not there, and see that it can be written: before hours are spent on what is to go there.

    Raises:
        DataError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror or error}") from error


def keep(path: Path, previous: Path) -> None:
    """Give a file a second name in the same folder, in one move: at no moment is there neither."""
    temporary = previous.with_name(previous.name + ".part")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without links
        shutil.copyfile(path, temporary)
    os.replace(temporary, previous)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk: without it a power cut can undo a rename."""
    if os.name == "nt":  # where a folder cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _free(folder: Path) -> str:
    try:
        return f", {shutil.disk_usage(folder).free:,} free"
    except OSError:
        return ""
