"""Writing a file in one move."""

import contextlib
import os
from pathlib import Path

from tutorial_moco.errors import DataError


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a crash or a full disk leaves either the old file or the new one, never a part.

    Raises:
        DataError: the disk refused; the message names the path.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise DataError(f"{path} could not be written ({len(content):,} bytes): {error.strerror or error}") from error
