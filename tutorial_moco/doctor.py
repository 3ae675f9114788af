"""Is everything here that the chapters need? Each answer is one line: [OK], or [FAIL] with what to do."""

import importlib
import os
import platform
import shutil
from collections.abc import Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tutorial_moco.errors import DataError

ROOM = 2 * 2**30  # bytes for CIFAR-10, its decoded images and some runs
MEMINFO = Path("/proc/meminfo")  # Linux has it
MEMORY = 4 * 2**30  # bytes that training the small encoder on CIFAR-10 takes at most, with room to spare


def diagnose(data: str | None = None) -> Iterator[tuple[bool, str]]:
    """Whether each thing is well, and a line that says what was found and, where it is not, the mend.

    Args:
        data: the images to look for; if left out those of the chapters, ``$TUTORIAL_MOCO_DATA`` or else CIFAR-10.
    """
    data = data or os.environ.get("TUTORIAL_MOCO_DATA", "cifar10")
    for what, check in {
        "torch": _torch, "the sliders": _widgets, "memory": _memory, "the disk": _disk, "the images": partial(_images, data),
        "the measured runs": _rows,
    }.items():  # fmt: skip
        try:
            yield check()
        except Exception as error:  # without torch, say, hardly anything can be asked; each answer is one line all the same
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            yield False, f"{what}: it could not be looked at ({reason}); mend what is named above first"


def report(data: str | None = None) -> list[tuple[bool, str]]:
    """Print the diagnosis as it comes, and return it."""
    found = []
    for well, line in diagnose(data):
        print(f"[{'OK' if well else 'FAIL'}] {line}", flush=True)
        found.append((well, line))
    return found


def _torch() -> tuple[bool, str]:
    try:
        import torch
        import torchvision

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)  # fails where the two do not belong together
    except (ImportError, RuntimeError, OSError) as error:  # OSError: a shared library is missing
        mend = "install both together: pip install --force-reinstall torch torchvision"
        return False, f"torch and torchvision do not work together ({str(error).splitlines()[0]}); {mend}"
    from tutorial_moco.provenance import hardware
    from tutorial_moco.speed import default_device

    versions = f"Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}"
    return True, f"{versions}, on {hardware(default_device())}"


def _widgets() -> tuple[bool, str]:
    try:
        importlib.import_module("ipywidgets")
        return True, f"ipywidgets {version('ipywidgets')}: if a slider does not show, reload the page once"
    except (ImportError, PackageNotFoundError):
        return False, "ipywidgets is missing, and with it every slider; pip install ipywidgets, then restart the kernel"


def _memory() -> tuple[bool, str]:
    if not MEMINFO.exists():
        return True, "memory: not asked on this system; 4 GB free are enough"
    free = next(int(line.split()[1]) * 1024 for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable"))
    if free < MEMORY:
        mend = "close other programs, or set TUTORIAL_MOCO_DATA=shapes"
        return False, f"{free / 2**30:.1f} GB of memory are free, 4 are wanted; {mend}"
    return True, f"{free / 2**30:.1f} GB of memory free"


def _disk() -> tuple[bool, str]:
    from tutorial_moco.images import default_cache

    place = default_cache()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < ROOM:
        return False, f"{free / 2**30:.1f} GB of disk are free, 2 are wanted; set TUTORIAL_MOCO_CACHE to a folder with room"
    return True, f"{free / 2**30:.0f} GB of disk free"


def _images(data: str) -> tuple[bool, str]:
    from tutorial_moco.images import load_images

    try:
        train = load_images(data, "train", progress=False)
    except DataError as error:
        return False, f"{error}. The chapters go on with images drawn by the program"
    return True, f"{train.name}: {len(train):,} training images of {train.images.shape[-1]} pixels"


def _rows() -> tuple[bool, str]:
    from tutorial_moco.results import load_rows

    try:
        rows = load_rows()
    except DataError as error:
        return False, str(error)
    return True, f"{len(rows)} measured runs to draw from"
