"""A short training to be killed, stopped and started again, in a process of its own that starts quickly."""

import hashlib
import multiprocessing
import os
import sys
import time
from pathlib import Path

import torch

from tutorial_moco import pretrain as training
from tutorial_moco.checkpoint import pack
from tutorial_moco.images import ImageSet
from tutorial_moco.recipes import Recipe

FULL = bool(os.environ.get("TUTORIAL_MOCO_FAULTS"))  # the full counts
STEPS = 60
RECIPES = {
    name: Recipe(mechanism=name, encoder="tiny", dim=8, K=20, m=0.9, batch_size=16, epochs=STEPS // 4, lr=0.05)
    for name in ("moco", "memory_bank", "end_to_end")
}
PROCESSES = multiprocessing.get_context("forkserver")  # torch is imported once, and each training is a fork of that
PROCESSES.set_forkserver_preload(["tutorial_moco.pretrain"])


def images(n: int = 64) -> ImageSet:
    pixels = torch.randint(0, 256, (n, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ImageSet("random", "train", pixels, torch.arange(n) % 2, ("even", "odd"), "hash of these")


def begin(name: str, out: Path, pause: float = 0.0):
    """Start a training, or go on with it; it ends with its digest in out/digest."""
    process = PROCESSES.Process(target=_train, args=(name, out, pause))
    process.start()
    return process


def finish(name: str, out: Path) -> str:
    """Go on with a training to its end, and take its digest."""
    process = begin(name, out)
    process.join(60)
    assert process.exitcode == 0, f"{out / 'log'}: {(out / 'log').read_text()}"
    return (out / "digest").read_text()


def steps_done(out: Path) -> int:
    """Steps that the training says it has finished."""
    path = out / "steps"
    return int(path.read_text() or 0) if path.exists() else 0


def _train(name: str, out: Path, pause: float) -> None:
    out.mkdir(parents=True, exist_ok=True)
    log = open(out / "log", "a", buffering=1)  # noqa: SIM115 - for as long as the process lives
    sys.stderr = sys.stdout = log
    torch.set_num_threads(1)
    step = training.train_step

    def told(run, *rest):
        found = step(run, *rest)
        handle = os.open(out / "steps.part", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.write(handle, str(run.step).encode())
        os.close(handle)
        os.replace(out / "steps.part", out / "steps")
        time.sleep(pause)
        return found

    training.train_step = told
    run = training.pretrain(
        RECIPES[name], images(), images(20), monitor=8, out=out, device=torch.device("cpu"), dtype=torch.float32, progress=False
    )
    digest = hashlib.sha256()
    for key, tensor in sorted(pack(mechanism=run.mechanism, optimizer=run.optimizer).items()):
        digest.update(key.encode() + tensor.contiguous().numpy().tobytes())
    records = [[point[field] for field in ("step", "loss", "pretext_accuracy", "filled")] for point in run.losses]
    records.append([point["knn_top1"] for point in run.monitor])
    digest.update(repr([run.step, records]).encode())
    (out / "digest").write_text(digest.hexdigest())
