"""Pictures that tests write: folders as a data set has them; and how fast the chapters' sliders draw theirs."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
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


BUDGET = 0.15  # seconds of one core for a slider's redraw, a promise of ours; measured on two cores: 0.03 to 0.06


def in_time(draws: Sequence[Callable[[], object]]) -> list:
    """What each draws, all asserted to be drawn in time.

    The seconds are this thread's own, whatever else the machine does. One that does much else is slow by itself: the best of
    three goes counts.
    """
    best = float("inf")
    for _ in range(3):
        drawn, seconds = [], []
        for draw in draws:
            began = time.thread_time()
            drawn.append(draw())
            seconds.append(time.thread_time() - began)
        best = min(best, statistics.median(seconds))
        if best < BUDGET:
            return drawn
    raise AssertionError(f"a redraw takes {1000 * best:.0f} ms")
