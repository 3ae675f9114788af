"""Pictures that tests write: folders as a data set has them."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def write_two_classes(root: Path, pictures: Iterable[Image.Image], suffix: str = "png") -> Path:
    """train/a and train/b, by turns."""
    for number, picture in enumerate(pictures):
        place = root / "train" / "ab"[number % 2] / f"{number:02}.{suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        picture.save(place)
    return root


def as_pictures(images) -> list[Image.Image]:
    """Of uint8 (N, 3, H, W)."""
    return [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in images]


def random_pictures(n: int, height: int, width: int) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(n)]
