"""Trainings killed and stopped for real: the same command again ends in the same bits. `make faults` has the full counts."""

import os
import random
import signal
import time

import pytest
import torch

pytest.importorskip("resource", reason="these faults are made with signals")

from trainings import FULL, RECIPES, STEPS, begin, finish, steps_done, wait_until

from tutorial_moco.checkpoint import load_checkpoint
from tutorial_moco.stopping import AT_ONCE, Stop

KILLS = 17 if FULL else 3  # of each mechanism


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The digest of each mechanism's run that nothing disturbed."""
    return {name: finish(name, tmp_path_factory.mktemp(name)) for name in RECIPES}


@pytest.mark.parametrize("name", RECIPES)
def test_killed_at_any_point_a_run_ends_in_the_same_bits(name, whole, tmp_path, held):
    """In the first step, within an epoch, at its boundary, during the kNN or a save: wherever the moment falls."""
    draw, kills = random.Random(name), 0
    while kills < KILLS:
        out = tmp_path / str(kills)
        for at in sorted(draw.sample(range(STEPS), 2)):  # killed twice on its way
            process = begin(name, out)
            wait_until(lambda out=out, at=at, process=process: steps_done(out) >= at or not process.is_alive())
            time.sleep(draw.uniform(0, 0.01))
            process.kill()
            process.join()
            kills += process.exitcode == -signal.SIGKILL
        assert finish(name, out) == whole[name]
    told = f"{name}, one process, killed twice on its way at moments drawn from all steps"
    held("the same bits after kill -9", told, kills, kills)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_a_run_saves_the_step_it_was_at_and_loses_none(number, whole, tmp_path, held):
    process = begin("moco", tmp_path, pause=0.05)
    wait_until(lambda: steps_done(tmp_path) >= 5)
    began = time.monotonic()
    os.kill(process.pid, number)
    process.join(30)
    assert time.monotonic() - began < 5
    assert process.exitcode == {signal.SIGTERM: 143, signal.SIGINT: 1}[number]  # of a KeyboardInterrupt; the command line: 130
    done = steps_done(tmp_path)
    assert 5 <= done < STEPS
    assert load_checkpoint(tmp_path / "checkpoint.safetensors")[1]["step"] == done
    assert f"{number.name}: step {done} is done and saved" in (tmp_path / "log").read_text()
    assert finish("moco", tmp_path) == whole["moco"]
    assert f"going on from step {done}" in (tmp_path / "log").read_text()
    held("stopped, no step is lost", f"{number.name} in the middle of a run; the same bits at its end", 1, 1)


def test_a_signal_that_comes_after_obeying_is_not_lost():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs have it ignored
    try:
        with pytest.raises(KeyboardInterrupt), Stop() as stop:  # noqa: PT012 - the signal, too, has to come within
            stop.obey(torch.device("cpu"))
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_signal_ends_at_once(tmp_path):
    process = begin("moco", tmp_path, pause=20.0)
    wait_until(lambda: steps_done(tmp_path) >= 1)
    for _ in range(2):  # well apart: torchrun hands on at once what its processes have had from the terminal, too
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(1.2 * AT_ONCE)
    process.join(5)
    assert process.exitcode == -signal.SIGTERM
