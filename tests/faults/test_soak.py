"""A long training of small steps with evaluations and saves: nothing grows. `make faults` takes 20,000 steps."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from ranks import PROCESSES, random_images
from trainings import FULL, RECIPES

from tutorial_moco import pretrain as training

STEPS = 20_000 if FULL else 1_000


def soak(out: Path, answers) -> None:
    """Train, and look at this process each hundredth part of the way: resident MiB, open files, children."""
    import torch

    torch.set_num_threads(1)
    step, found = training.train_step, []

    def watched(run, *rest):
        answer = step(run, *rest)
        if run.step % (STEPS // 100) == 0:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            found.append((run.step, resident, len(os.listdir("/proc/self/fd")), len(children)))
        return answer

    training.train_step, training.SAVE_EVERY = watched, 0.5
    recipe = RECIPES["moco"].replace(epochs=STEPS // 4)
    training.pretrain(
        recipe,
        random_images(side=8),
        random_images(20, side=8),
        monitor=20,
        out=out,
        device=torch.device("cpu"),
        dtype=torch.float32,
        progress=False,
    )
    answers.put(found)


@pytest.mark.skipif(sys.platform != "linux", reason="memory and open files are read from /proc")
@pytest.mark.timeout(900)
def test_nothing_grows(tmp_path, held):
    answers = PROCESSES.SimpleQueue()
    process = PROCESSES.Process(target=soak, args=(tmp_path, answers))
    process.start()
    steps, resident, files, children = np.array(answers.get()).T
    process.join(30)
    late = steps > STEPS / 4  # before, memory that is kept fills up
    slope = np.polyfit(steps[late] / 1000, resident[late], 1)[0]
    assert len(steps) == 100
    assert slope < 1.0 if FULL else slope < 10.0  # MiB in 1,000 steps; so few say less
    assert np.ptp(files[late]) <= 1  # a save may be at work
    assert children.max() == 0
    held("nothing grows", f"{STEPS:,} steps with 20 evaluations and a save each 0.5 s: {slope:.2f} MiB in 1,000 steps", 1, 1)
