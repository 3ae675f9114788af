"""One picture file, whatever it is: opened without trusting it, upright, in red, green and blue."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from tutorial_moco.errors import DataError

ORIENTATION = 0x0112  # EXIF's number for how the camera was held


@contextmanager
def told(path: Path, name: str) -> Iterator[None]:
    """What Pillow raises over the picture ``name`` of a folder or an archive becomes a line with the mend."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: {name} is larger than Pillow decodes ({error}): shrink it or take it out") from error
    except Exception as error:  # on damaged bytes Pillow's decoders raise almost anything
        raise DataError(f"{path}: {name} cannot be decoded ({error}): mend it or take it out") from error


def upright(image: Image.Image) -> Image.Image:
    """A picture as the camera saw it; if it was upright, no pixel has been decoded yet."""
    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or float("inf")):
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
    if image.getexif().get(ORIENTATION, 1) != 1:
        ImageOps.exif_transpose(image, in_place=True)
    return image


def rgb(image: Image.Image) -> Image.Image:
    """Red, green and blue of 8 bits; transparency is dropped."""
    if image.mode.startswith("I"):  # 16 bits of gray, which Pillow would clip to 8 instead of scaling
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")
