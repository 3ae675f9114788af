"""A short training to be killed, stopped and started again: in a process of its own that starts quickly, or by torchrun."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # torchrun runs this file as a program

from ranks import hash_of, random_images, start

from tutorial_moco import cli, distributed
from tutorial_moco import pretrain as training
from tutorial_moco.recipes import Recipe

FULL = bool(os.environ.get("TUTORIAL_MOCO_FAULTS"))  # the full counts
STEPS = 60
STARTED: list[tuple[subprocess.Popen, Path]] = []  # by `torchrun`
RECIPES = {
    name: Recipe(
        mechanism=name, encoder="tiny", dim=8, K=20, m=0.9, shuffle=name == "moco", batch_size=16, epochs=STEPS // 4, lr=0.05
    )
    for name in ("moco", "memory_bank", "end_to_end")
}


def begin(name: str, out: Path, pause: float = 0.0):
    """Start a training, or go on with it; it ends with its digest in out/digest-0."""
    return begin_ranks(1, name, out, pause)[0]


def begin_ranks(W: int, name: str, out: Path, pause: float = 0.0) -> list:
    """The same as W processes, without torchrun, which takes some seconds to start."""
    return start(W, _train, [(name, out, pause)] * W)


def finish(name: str, out: Path, W: int = 1) -> str:
    """Go on with a training to its end, and take its digest, which is the same for all its processes."""
    for process in begin_ranks(W, name, out):
        process.join(60)
        assert process.exitcode == 0, f"{out / 'log'}: {(out / 'log').read_text()}"
    (digest,) = {(out / f"digest-{r}").read_text() for r in range(W)}
    return digest


def torchrun(W: int, name: str, out: Path, pause: float = 0.0, *, saving: float = 0.0, silence: float = 60, how=(), inside=()):
    """The same by torchrun, as W processes; what all say is in out/log.

    Args:
        saving: seconds that a save takes longer. how: torchrun's own flags. inside: words of a command that runs it.
    """
    out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TUTORIAL_MOCO_SILENCE": str(silence)}
    where = how or ("--standalone", "--nproc-per-node", str(W))
    words = [*inside, sys.executable, "-m", "torch.distributed.run", *where, __file__, name, str(out), str(pause), str(saving)]
    with open(out / "log", "a") as log:
        run = subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)
    STARTED.append((run, out))
    return run


def end_all() -> None:
    """Kill what `torchrun` has started and a test that failed has left, frozen ones too."""
    while STARTED:
        run, out = STARTED.pop()
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            for process in processes_of(out):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)


def processes_of(out: Path) -> list[int]:
    """The process numbers of the ranks, in their order, as far as they have begun a step."""
    return [int(path.read_text().split()[1]) for path in sorted(out.glob("steps-*")) if path.suffix != ".part"]


def steps_done(out: Path, r: int = 0) -> int:
    """Steps that rank r of the training says it has finished."""
    path = out / f"steps-{r}"
    return int(path.read_text().split()[0]) if path.exists() else 0


def wait_until(holds, seconds: float = 30.0) -> None:
    """Look again and again whether it holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.002)


def _train(name: str, out: Path, pause: float) -> None:
    out.mkdir(parents=True, exist_ok=True)
    log = open(out / "log", "a", buffering=1)  # noqa: SIM115 - for as long as the process lives
    sys.stderr = sys.stdout = log
    with distributed.processes():
        train(name, out, pause)


def train(name: str, out: Path, pause: float, saving: float = 0.0) -> None:
    """The training, with a pause after each step and before each save, and its digest."""
    torch.set_num_threads(1)
    step, told_in = training.train_step, f"steps-{distributed.rank()}"
    save = training.save_checkpoint

    def told(run, *rest):
        found = step(run, *rest)
        handle = os.open(out / f"{told_in}.part", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.write(handle, f"{run.step} {os.getpid()}".encode())
        os.close(handle)
        os.replace(out / f"{told_in}.part", out / told_in)
        time.sleep(pause)
        return found

    def slowly(*what, **how):
        time.sleep(saving)
        save(*what, **how)

    training.train_step, training.save_checkpoint = told, slowly
    run = training.pretrain(
        RECIPES[name], random_images(side=8), random_images(20, side=8), monitor=8, out=out, device=torch.device("cpu"),
        dtype=torch.float32, progress=False,
    )  # fmt: skip
    records = [[point[field] for field in ("step", "loss", "pretext_accuracy", "filled")] for point in run.losses]
    records.append([point["knn_top1"] for point in run.monitor])
    digest = f"{hash_of(run.mechanism, optimizer=run.optimizer)} {run.step} {records}"
    (out / f"digest-{distributed.rank()}").write_text(digest)


def main() -> int:
    """One of torchrun's processes."""

    def work() -> None:
        with cli.joined("pretrain"):
            train(sys.argv[1], Path(sys.argv[2]), *map(float, sys.argv[3:]))

    try:
        return cli.exit_status("tutorial-moco", work, "goes on from the last checkpoint")
    finally:
        (Path(sys.argv[2]) / f"ended-{os.environ['RANK']}").touch()


if __name__ == "__main__":
    sys.exit(main())
