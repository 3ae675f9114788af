"""Files under real faults: killed while saving, a full disk, a size limit, flipped bytes. `make faults` has the full counts."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from trainings import FULL

from tutorial_moco import checkpoint
from tutorial_moco.checkpoint import load_checkpoint, previous_of, save_checkpoint
from tutorial_moco.errors import DataError

KILLS, FLIPS, CUTS, LIMITS = (200, 1000, 100, 60) if FULL else (20, 200, 30, 12)
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="these faults are made with fork and signals")


def content(number, n=4000):
    """Tensors that tell which save they are of."""
    return {"weight": torch.full((n,), float(number)), "step": torch.tensor(number)}


def is_whole(path):
    """The number of the save whose every byte is there."""
    tensors, state = load_checkpoint(path)
    assert tensors["weight"].unique().tolist() == [state["step"]] == [int(tensors["step"])]
    return state["step"]


def in_child(work):
    """Run it in a copy of this process, which ends with it; returns its number, and a pipe with the DataError it ended in."""
    told, tell = os.pipe()
    child = os.fork()
    if child:
        os.close(tell)
        return child, os.fdopen(told)
    status = 0
    try:
        work()
    except DataError as error:
        os.write(tell, str(error).encode())
        status = error.exit_status
    except BaseException:
        status = 99
    os._exit(status)


def test_killed_while_saving_there_is_always_a_whole_checkpoint_and_it_is_the_last_or_the_one_before(tmp_path, held):
    path, draw = tmp_path / "checkpoint.safetensors", random.Random(0)
    save_checkpoint(path, content(0), {"step": 0}, keep_previous=True)
    reached, parts = 0, 0
    for _ in range(KILLS):
        begin = is_whole(path) + 1

        def save_on(begin=begin):
            for number in range(begin, begin + 10_000):
                save_checkpoint(path, content(number), {"step": number}, keep_previous=True)

        child, told = in_child(save_on)
        time.sleep(draw.uniform(0.002, 0.03))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        told.close()
        now = is_whole(path)
        assert now >= begin - 1
        if previous_of(path).exists():
            assert is_whole(previous_of(path)) in (now - 1, now)
        reached, parts = now, parts + any(file.suffix == ".part" for file in tmp_path.iterdir())
    assert reached > KILLS / 2  # it did save
    assert parts > 0  # and was hit in the middle of it
    told = f"kill -9 while saving without pause, {parts} times in the middle of a file"
    held("a save is whole or was not", told, KILLS, KILLS)


def test_a_limit_on_the_size_of_files_leaves_the_old_checkpoint_and_is_told(tmp_path, held):
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, content(1), {"step": 1})
    size = path.stat().st_size

    def save(most):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        save_checkpoint(path, content(2), {"step": 2}, keep_previous=True)

    for i in range(LIMITS):
        child, pipe = in_child(lambda most=size * i // LIMITS: save(most))
        with pipe:
            told = pipe.read()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == DataError.exit_status
        assert f"{path} could not be written ({size:,} bytes needed, " in told
        assert "free): File too large" in told
        assert is_whole(path) == 1
        assert [file.name for file in tmp_path.iterdir()] == [path.name]
    child, pipe = in_child(lambda: save(size))
    pipe.close()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [is_whole(path), is_whole(previous_of(path))] == [2, 1]
    held("a save is whole or was not", "a limit on the size of files, swept over the file", LIMITS, LIMITS)


FILL = """
import sys
from pathlib import Path
import torch
from tutorial_moco.checkpoint import load_checkpoint, save_checkpoint
from tutorial_moco.errors import DataError
path = Path(sys.argv[1]) / "checkpoint.safetensors"
try:
    for number in range(1, 100):
        save_checkpoint(path, {"weight": torch.zeros(20_000 * number)}, {"step": number}, keep_previous=True)
except DataError as error:
    print(load_checkpoint(path)[1]["step"], sorted(file.name for file in path.parent.iterdir()), error)
"""


def test_a_full_disk_leaves_the_last_checkpoint_and_tells_the_bytes_needed_and_free(tmp_path, held):
    """A file system in memory of one megabyte, in a namespace of its own."""
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=1m none {tmp_path}"
    tried = subprocess.run([*command, mount], capture_output=True, text=True) if shutil.which("unshare") else None
    if tried is None or tried.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {tried.stderr.strip() if tried else 'no unshare'}")
    run = subprocess.run(
        [*command, f'{mount} && exec "$@"', "sh", sys.executable, "-c", FILL, str(tmp_path)], capture_output=True, text=True
    )
    step, _, rest = run.stdout.partition(" ")
    assert int(step) >= 3, run.stderr
    assert "checkpoint-previous.safetensors', 'checkpoint.safetensors'] " in rest
    assert "bytes needed, " in rest
    assert "free): No space left on device" in rest
    held("a save is whole or was not", "a file system of one megabyte, saved to until it is full", 1, 1)


def test_flipped_and_cut_off_bytes_are_found_before_anything_is_parsed(tmp_path, monkeypatch, held):
    path, draw = tmp_path / "checkpoint.safetensors", random.Random(1)
    save_checkpoint(path, content(7, n=300), {"step": 7, "recipe": "x" * 300})
    whole = path.read_bytes()
    parsed = []
    monkeypatch.setattr(checkpoint, "safe_open", lambda *_, **__: parsed.append(1))
    damaged = []
    for _ in range(FLIPS):
        at = draw.randrange(len(whole))
        damaged.append(whole[:at] + bytes([whole[at] ^ draw.randrange(1, 256)]) + whole[at + 1 :])
    damaged += [whole[: draw.randrange(len(whole))] for _ in range(CUTS)]
    damaged += [whole + b"x", whole[:8] + b" " + whole[8:], b"\xff" * 8 + whole[8:], b""]
    for number, data in enumerate(damaged):
        path.write_bytes(data)
        with pytest.raises(DataError, match="damaged"):
            load_checkpoint(path)
        assert not parsed, number
    held("damage is found before it is parsed", f"{FLIPS} flipped bytes, {CUTS} cuts, odd headers", len(damaged), len(damaged))


def test_what_was_read_back_otherwise_than_it_was_written_does_not_take_the_name(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, content(1), {"step": 1})
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda self: b"what a bad disk says")
    with pytest.raises(DataError, match="what was read back is not what was written"):
        save_checkpoint(path, content(2), {"step": 2})
    assert is_whole(path) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_rename_is_brought_to_the_disk_after_the_bytes_it_names(tmp_path, monkeypatch):
    order = []
    real = {name: getattr(os, name) for name in ("fsync", "replace")}
    is_folder = lambda handle: os.path.isdir(f"/proc/self/fd/{handle}")  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda fd: order.append("folder" if is_folder(fd) else "file") or real["fsync"](fd))
    monkeypatch.setattr(os, "replace", lambda *names: order.append("rename") or real["replace"](*names))
    save_checkpoint(tmp_path / "checkpoint.safetensors", content(1), {"step": 1})
    assert order == ["file", "rename", "folder"]
