"""Several processes under torchrun: stopped, killed, frozen, cut off. `make faults` has the full counts."""

import os
import random
import shutil
import signal
import subprocess
import time

import pytest

pytest.importorskip("resource", reason="these faults are made with signals")

from trainings import FULL, RECIPES, STEPS, begin_ranks, end_all, finish, processes_of, steps_done, torchrun, wait_until

from tutorial_moco.checkpoint import load_checkpoint

LONG = "it takes half a minute: make faults tries it"
KILLS = 17 if FULL else 1  # of each mechanism


def ended(run, out, seconds=60.0) -> int:
    """Wait for torchrun's end; returns its status."""
    try:
        return run.wait(seconds)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)


def finished(W, name, out) -> str:
    """Go on to the end; the digest of all processes, which has to be one."""
    run = torchrun(W, name, out)
    assert ended(run, out) == 0, (out / "log").read_text()
    (digest,) = {path.read_text() for path in out.glob("digest-*")}
    return digest


@pytest.fixture(autouse=True)
def nobody_is_left():
    yield
    end_all()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The digest of each mechanism's run of two processes that nothing disturbed."""
    return {name: finish(name, tmp_path_factory.mktemp(name), W=2) for name in RECIPES}


def begun(out, at, pause=0.05, **how):
    """A training of two processes that has finished so many steps."""
    run = torchrun(2, "moco", out, pause, **how)
    wait_until(lambda: (steps_done(out) >= at and len(processes_of(out)) == 2) or run.poll() is not None, 60)
    assert run.poll() is None, (out / "log").read_text()
    return run


@pytest.mark.parametrize(
    ("number", "whom"),
    [(signal.SIGTERM, "rank 1"), *([(signal.SIGTERM, "torchrun"), (signal.SIGINT, "all, as Ctrl-C does")] if FULL else [])],
    ids=lambda one: getattr(one, "name", one),
)
def test_stopped_all_processes_end_after_the_same_step_and_none_is_lost(number, whom, whole, tmp_path, held):
    run = begun(tmp_path, 5, saving=1.0 if whom == "rank 1" else 0.0)
    began = time.monotonic()
    if whom == "rank 1":
        os.kill(processes_of(tmp_path)[1], number)
    elif whom == "torchrun":
        run.send_signal(number)
    else:
        os.killpg(run.pid, number)
    assert ended(run, tmp_path) != 0
    assert time.monotonic() - began < 15
    said, done = (tmp_path / "log").read_text(), steps_done(tmp_path)
    assert 5 <= done == steps_done(tmp_path, 1) < STEPS
    assert said.count(f"{number.name}: step {done} is done and saved") == 1
    if whom == "rank 1":
        assert said.count("exitcode  : 143") == 2, said
        saved, left = (os.stat(tmp_path / name).st_mtime for name in ("checkpoint.safetensors", "ended-1"))
        assert saved < left  # as soon as one has ended, torchrun ends the others: none while the first one saves
    assert load_checkpoint(tmp_path / "checkpoint.safetensors")[1]["step"] == done
    assert finished(2, "moco", tmp_path) == whole["moco"]
    assert (tmp_path / "log").read_text().count(f"going on from step {done}") == 1
    held("stopped, no step is lost", f"two processes, {number.name} to {whom}; the same bits at their end", 1, 1)


@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_killed_at_any_point_end_in_the_same_bits(name, whole, tmp_path, held):
    draw, kills = random.Random(name), 0
    while kills < KILLS:
        out, at = tmp_path / str(kills), draw.randrange(STEPS)
        ranks = begin_ranks(2, name, out)
        wait_until(lambda out=out, at=at, ranks=ranks: steps_done(out) >= at or not ranks[0].is_alive())
        for process in draw.sample(ranks, 2):  # as where a machine is taken away: not in the same moment
            time.sleep(draw.uniform(0, 0.01))
            process.kill()
        for process in ranks:
            process.join()
        kills += ranks[0].exitcode == -signal.SIGKILL
        assert finish(name, out, W=2) == whole[name]
    held("the same bits after kill -9", f"{name}, two processes, killed at moments drawn from all steps", kills, kills)


def test_a_killed_process_is_named_and_the_same_command_ends_in_the_same_bits(whole, tmp_path, held):
    run = begun(tmp_path, 20)
    os.kill(processes_of(tmp_path)[1], signal.SIGKILL)
    assert ended(run, tmp_path) != 0
    said = (tmp_path / "log").read_text()
    assert "process 1 has not been heard of for" in said, said
    assert "; the same command goes on from the last checkpoint" in said
    assert finished(2, "moco", tmp_path) == whole["moco"]
    held("no process waits for one that is lost", "one of two killed: named; the same command ends in the same bits", 1, 1)


def test_of_four_the_killed_one_is_named_by_all_and_no_other_is(tmp_path, held):
    ranks = begin_ranks(4, "moco", tmp_path, 0.05)
    wait_until(lambda: steps_done(tmp_path) >= 5)
    ranks[2].kill()
    for process in ranks:
        process.join(30)
    assert ranks[2].exitcode == -signal.SIGKILL
    assert {ranks[r].exitcode for r in (0, 1, 3)} <= {1, 4}  # 1: of the traceback; the command line makes it 4
    said = (tmp_path / "log").read_text()
    assert said.count(": process 2 has not been heard of for") == 3, said
    assert "process 1 has not" not in said
    assert "process 3 has not" not in said
    held("no process waits for one that is lost", "one of four killed: named by the three others", 1, 1)


@pytest.mark.skipif(not FULL, reason=LONG)
def test_torchrun_starts_a_killed_process_again_and_ends_in_the_same_bits(whole, tmp_path, held):
    run = begun(tmp_path, 20, how=("--standalone", "--nproc-per-node", "2", "--max-restarts", "1"))
    os.kill(processes_of(tmp_path)[1], signal.SIGKILL)
    assert ended(run, tmp_path, 120) == 0, (tmp_path / "log").read_text()
    assert {path.read_text() for path in tmp_path.glob("digest-*")} == {whole["moco"]}
    held("no process waits for one that is lost", "one of two killed, started again by --max-restarts 1; the same bits", 1, 1)


@pytest.mark.parametrize("r", [0, 1] if FULL else [1])
def test_a_frozen_process_is_named_and_the_others_end(r, tmp_path, held):
    run = begun(tmp_path, 5, silence=5)
    frozen = processes_of(tmp_path)[r]
    os.kill(frozen, signal.SIGSTOP)
    began = time.monotonic()
    wait_until(lambda: "has not been heard of" in (tmp_path / "log").read_text(), 30)
    took = time.monotonic() - began
    os.kill(frozen, signal.SIGKILL)  # torchrun itself would take half a minute to do so
    assert ended(run, tmp_path) != 0
    assert f"(process {1 - r}): process {r} has not been heard of" in (tmp_path / "log").read_text()
    assert took < 5 + 5
    held("no process waits for one that is lost", f"rank {r} of two frozen, 5 s allowed: named after {took:.0f} s", 1, 1)


# ---- two "hosts": network namespaces joined by a cable


def run_ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts():
    """Two network namespaces with a cable between them: (name, address) of each."""
    if shutil.which("ip") is None:
        pytest.skip("two hosts need the program ip (iproute2)")
    names = [f"moco{os.getpid()}{end}" for end in "ab"]
    addresses = ["10.213.7.1", "10.213.7.2"]
    try:
        try:
            for name in names:
                run_ip("netns", "add", name)
            run_ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
            for name, address in zip(names, addresses, strict=True):
                run_ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
                for link in ("cable", "lo"):
                    run_ip("-n", name, "link", "set", link, "up")
                run_ip("netns", "exec", name, "true")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"two hosts need network namespaces: {error.stderr.strip()}")
        yield list(zip(names, addresses, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def on_both(hosts, folder, pause=0.0, restarts=0, **how):
    """A training of two processes, one on each host, with a folder that both share; the two torchruns."""
    meet = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "moco",
            "--rdzv-endpoint", f"{hosts[0][1]}:29411", "--max-restarts", str(restarts))  # fmt: skip
    return [
        torchrun(
            2, "moco", folder, pause, **how,
            how=(*meet, "--local-addr", address, "--rdzv-conf", f"is_host={address == hosts[0][1]}"),
            inside=("ip", "netns", "exec", name, "env", "GLOO_SOCKET_IFNAME=cable"),
        )
        for name, address in hosts
    ]  # fmt: skip


def test_two_hosts_train_as_two_processes_of_one_do(hosts, whole, tmp_path, held):
    for run in on_both(hosts, tmp_path):
        assert ended(run, tmp_path) == 0, (tmp_path / "log").read_text()
    assert {path.read_text() for path in tmp_path.glob("digest-*")} == {whole["moco"]}
    held("the number of processes may change", "two hosts, one process each: the bits of two processes on one", 1, 1)


@pytest.mark.skipif(not FULL, reason=LONG)
def test_two_hosts_start_again_and_end_in_the_same_bits(hosts, whole, tmp_path, held):
    runs = on_both(hosts, tmp_path, 0.05, restarts=2, silence=5)
    wait_until(lambda: steps_done(tmp_path) >= 20 and len(processes_of(tmp_path)) == 2, 60)
    os.kill(processes_of(tmp_path)[1], signal.SIGKILL)
    for run in runs:
        assert ended(run, tmp_path, 180) == 0, (tmp_path / "log").read_text()
    assert {path.read_text() for path in tmp_path.glob("digest-*")} == {whole["moco"]}
    told = "two hosts, the process of one killed, both started again by --max-restarts; the same bits"
    held("no process waits for one that is lost", told, 1, 1)


@pytest.mark.skipif(not FULL, reason=LONG)
def test_a_cut_cable_is_told_on_both_sides(hosts, whole, tmp_path, held):
    runs = on_both(hosts, tmp_path, 0.05, silence=5)
    wait_until(lambda: steps_done(tmp_path) >= 5, 60)
    run_ip("-n", hosts[1][0], "link", "set", "cable", "down")
    began = time.monotonic()
    said = [f"(process {r}): process {1 - r} has not been heard of" for r in (0, 1)]
    wait_until(lambda: all(line in (tmp_path / "log").read_text() for line in said), 30)
    took = time.monotonic() - began
    for run in runs:
        os.killpg(run.pid, signal.SIGKILL)  # the torchruns wait longer for each other
    held("no process waits for one that is lost", f"two hosts, the cable cut, 5 s allowed: told after {took:.0f} s", 1, 1)
    assert finished(2, "moco", tmp_path) == whole["moco"]
