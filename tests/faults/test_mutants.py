"""The code is broken on purpose, a promise at a time, and that promise's test has to fail. `make faults` tries all."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
FULL = bool(os.environ.get("TUTORIAL_MOCO_FAULTS"))


class Mutation(NamedTuple):
    """A promise, how it is broken in words and in the code, and the test that has to see it."""

    promise: str
    what: str
    file: str
    code: str
    instead: str
    test: str


STOPS, FILES = "tests/faults/test_stops.py", "tests/faults/test_files.py"
KILLED = f"{STOPS}::test_killed_at_any_point_a_run_ends_in_the_same_bits[moco]"
TOGETHER = "tests/test_distributed.py::test_processes_hold_the_same_bits_and_train_as_one_does"
MUTATIONS = [
    Mutation(
        "a save is whole or was not", "the bytes are not brought to the disk", "files.py",
        "os.fsync(file.fileno())", "pass", f"{FILES}::test_a_rename_is_brought_to_the_disk_after_the_bytes_it_names",
    ),
    Mutation(
        "a save is whole or was not", "what was written is not read back", "files.py",
        "if temporary.read_bytes() != content:", "if False:",
        f"{FILES}::test_what_was_read_back_otherwise_than_it_was_written_does_not_take_the_name",
    ),
    Mutation(
        "what is not finite changes nothing", "BatchNorm's statistics are not put back", "pretrain.py",
        "        run.undo.restore()\n", "        pass\n",
        "tests/test_pretrain.py::test_a_loss_or_gradient_that_is_not_finite_leaves_all_as_it_was",
    ),
    Mutation(
        "what is not finite changes nothing", "the gradient is not looked at", "pretrain.py",
        "if not math.isfinite(norm):", "if False:",
        "tests/test_pretrain.py::test_a_loss_or_gradient_that_is_not_finite_leaves_all_as_it_was",
    ),
    Mutation(
        "a save is whole or was not", "the file is written in its place", "files.py",
        "os.replace(temporary, path)", "path.write_bytes(content)",
        f"{FILES}::test_a_limit_on_the_size_of_files_leaves_the_old_checkpoint_and_is_told",
    ),
    Mutation(
        "damage is found before it is parsed", "the seal is not compared", "checkpoint.py",
        "if digest.hexdigest().encode() != told:", "if False:",
        f"{FILES}::test_flipped_and_cut_off_bytes_are_found_before_anything_is_parsed",
    ),
    Mutation(
        "no file is run", "published checkpoints are read with their pickles", "official.py",
        'map_location="cpu", weights_only=True', 'map_location="cpu", weights_only=False',
        "tests/faults/test_hostile.py::test_no_file_is_run_by_who_reads_it",
    ),
    Mutation(
        "the same bits after kill -9", "the optimizer's momentum is not put back", "pretrain.py",
        "unpack(tensors, mechanism=run.mechanism, optimizer=run.optimizer)", "unpack(tensors, mechanism=run.mechanism)", KILLED,
    ),
    Mutation(
        "the same bits after kill -9", "the queue's pointer is not saved", "mechanisms.py",
        "self.register_buffer(name, torch.zeros((), dtype=torch.int64))",
        'self.register_buffer(name, torch.zeros((), dtype=torch.int64), persistent=name != "pointer")', KILLED,
    ),
    Mutation(
        "the same bits after kill -9", "the order of images begins anew", "pretrain.py",
        "in batches(n, recipe, run.step, run.device):", "in batches(n, recipe, 0, run.device):", KILLED,
    ),
    Mutation(
        "stopped, no step is lost", "a signal is caught and forgotten", "pretrain.py",
        "if done >= 1 or caught:", "if done >= 1:", f"{STOPS}::test_stopped_a_run_saves_the_step_it_was_at_and_loses_none",
    ),
    Mutation(
        "stopped, no step is lost", "a process ends before the others have saved", "stopping.py",
        "(caught,) = highest(self.caught or 0, device=device)", "caught = self.caught",
        "tests/faults/test_processes.py::test_stopped_all_processes_end_after_the_same_step_and_none_is_lost[SIGTERM-rank 1]",
    ),
    Mutation(
        "stopped, no step is lost", "Jupyter's interrupt is not caught", "stopping.py",
        "for number in (signal.SIGINT, signal.SIGTERM) if here", "for number in (signal.SIGTERM,) if here",
        "tests/faults/test_jupyter.py",
    ),
    Mutation(
        "the number of processes may change", "keys stay in their shuffled order", "mechanisms.py",
        "mine(gather(keys)[torch.argsort(order)])", "mine(gather(keys))",
        "tests/test_distributed.py::test_shuffling_by_the_loader_is_shuffling_by_sending_images[2]",
    ),
    Mutation(
        "the number of processes may change", "each process enqueues its own keys alone", "mechanisms.py",
        "self.enqueue(gather_views(contrast.k, len(index)))", "self.enqueue(contrast.k)", f"{TOGETHER}[moco-2]",
    ),
    Mutation(
        "the number of processes may change", "BatchNorm's statistics differ from process to process", "distributed.py",
        "    dist.all_reduce(flat)\n", "", f"{TOGETHER}[moco-2]",
    ),
    Mutation(
        "the number of processes may change", "gathered keys have no gradient", "distributed.py",
        "_Gather.apply(rows)", "_Gather.apply(rows).detach()", f"{TOGETHER}[end_to_end-2]",
    ),
    Mutation(
        "no process waits for one that is lost", "nobody listens for the others", "distributed.py",
        "if lost := self.verdict or self.silent(2.5 * BEAT if alarmed else self.silence):", "if lost := False:",
        "tests/faults/test_processes.py::test_a_frozen_process_is_named_and_the_others_end[1]",
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The code and its tests, to be broken."""
    here = tmp_path_factory.mktemp("mutants")
    for folder in ("tutorial_moco", "tests"):
        shutil.copytree(ROOT / folder, here / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", here)
    return here


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what.replace(" ", "_"))
def test_what_is_to_be_broken_is_there_once(mutation):
    assert (ROOT / "tutorial_moco" / mutation.file).read_text().count(mutation.code) == 1


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutation", MUTATIONS if FULL else MUTATIONS[:4], ids=lambda m: m.what.replace(" ", "_"))
def test_broken_code_fails_its_test(mutation, copy, held):
    path = copy / "tutorial_moco" / mutation.file
    sound = path.read_text()
    assert sound.count(mutation.code) == 1
    environment = {name: value for name, value in os.environ.items() if name != "TUTORIAL_MOCO_FAULTS"}
    environment["PYTHONPATH"] = str(copy)  # so that programs which a test starts are broken, too
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", mutation.test]

    def tried():
        return subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True)

    if FULL:  # else the whole of the tests runs the sound code anyhow
        done = tried()
        assert done.returncode == 0, f"it fails without being broken\n{done.stdout}"
    try:
        path.write_text(sound.replace(mutation.code, mutation.instead))
        done = tried()
    finally:
        path.write_text(sound)
    assert done.returncode == 1, done.stdout  # 1: a test has failed; others: none was found, or pytest itself
    assert "FAILED" in done.stdout
    held("each promise's test can fail", "code broken on purpose, listed below", 1, 1)
