"""Where a number comes from: what every result of this package carries beside its figures."""

import datetime
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

import tutorial_moco
from tutorial_moco.images import ImageSet


def provenance(data: ImageSet, device: torch.device) -> dict[str, object]:
    """Version, commit, command, date, hardware, torch, the data's name and hash, and which of its files were left out."""
    return {
        "version": tutorial_moco.__version__,
        "commit": git_commit(),
        "command": shlex.join(_without_folders(sys.argv)),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "hardware": hardware(device),
        "torch": torch.__version__,
        "data": data.name,
        "data_hash": data.hash,
        **({"skipped": skipped} if (skipped := _skipped(data)) else {}),
    }


def _without_folders(words: list[str]) -> list[str]:
    """A command whose absolute paths are names alone, behind ``--flag=`` too: the folders of a machine are nobody else's."""

    def named(word: str) -> str:
        flag, equals, path = word.rpartition("=")
        return flag + equals + (Path(path).name if os.path.isabs(path) else path)

    return [Path(words[0]).name, *map(named, words[1:])]


def _skipped(data) -> list[str]:
    """Files that were left out when they were decoded, before the training or in it; annotated images have no such list."""
    gone = getattr(getattr(data, "images", None), "bad", {})
    return [*getattr(data, "skipped", ()), *(f"{name} ({reason})" for name, reason in gone.items())]


def git_commit() -> str | None:
    """The checkout's commit, ``+`` behind it if files of code differ from it; None outside a checkout.

    data/ is left out: a row that is added there makes no other row another's work. A package that was installed somewhere
    in another project's checkout is none of that project's files.
    """
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        commit = _git("rev-parse", "--short=12", "HEAD").strip()
        return commit + "+" * bool(_git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)data"))
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*words: str) -> str:
    """What git answers, asked in this package's folder."""
    here = Path(__file__).parent
    return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True, timeout=10).stdout


def hardware(device: torch.device) -> str:
    """The processor, its cores and what they multiply in; the GPU's name where one is used."""
    cpu = f"{_cpu_name()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return f"{torch.cuda.get_device_name(device)}; {cpu}" if device.type == "cuda" else cpu


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
