"""Fixtures that more than one file of tests needs; and the table of promises, which `make faults` writes."""

import datetime
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def html():
    """The folder of the book's pages, built once. A warning of Sphinx is an error."""
    pytest.importorskip("myst_nb", reason="the book's builder is not installed: pip install -e '.[book]'")
    done = subprocess.run([sys.executable, "book/build.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ROOT / "build" / "book" / "html"


# ---- promises: each fault test says how often it tried, and how often the promise held

PAGE = ROOT / "docs" / "RELIABILITY.md"
ELSEWHERE = {  # promise: the best test of it that we found in other projects
    "the same bits after kill -9": "Composer: final checkpoints equal, mid-epoch and at the boundary, 1 and 2 processes",
    "a save is whole or was not": "Lightning: written beside and moved, without fsync",
    "damage is found before it is parsed": "none found",
    "no file is run": "Composer: a marker file must not appear",
    "stopped, no step is lost": "Lightning: simulated signal, exit 143",
    "no process waits for one that is lost": "torchelastic's tests of its agent",
    "the number of processes may change": "Composer: elastic resumption",
    "what is not finite changes nothing": "torchtitan: a loss that is not finite ends the training",
    "a bad picture is named or left out": "none found",
    "a download is whole, or leaves nothing": "none found",
    "nothing grows": "none found",
    "any configuration trains or is told in a line": "none found",
    "each promise's test can fail": "none found",
}
HEAD = """# What is promised when things go wrong, and how it was tried

Written by `make faults` (the full counts; `make test` has a short form of each). Every fault is real: processes are killed,
disks are full, bytes are flipped. All of it on processors, with gloo; none on several GPUs, with NCCL. Two "hosts" are network
namespaces of one machine, and the cable between them is virtual. Where a tool is missing the test is skipped, and its line
is not here.

{about}

| promise | how it was tried | held | best test found elsewhere |
|---|---|---|---|
"""
MUTANTS = """
# How it is known that a test can fail

For these promises the code is broken on purpose, and the test has to see it.

| promise | what is broken | by whom it is seen |
|---|---|---|
"""
_kept, _tried = Counter(), Counter()


@pytest.fixture
def held():
    """``held(promise, how, n, of)``: the promise was kept in n of so many trials."""

    def note(promise: str, how: str, n: int, of: int) -> None:
        assert promise in ELSEWHERE
        _kept[promise, how] += n
        _tried[promise, how] += of
        assert n == of

    return note


def pytest_sessionfinish(session, exitstatus):
    all_of_them = {promise for promise, _ in _tried} == set(ELSEWHERE)  # a part of the tests writes no page
    if os.environ.get("TUTORIAL_MOCO_FAULTS") and exitstatus == 0 and all_of_them:
        import torch
        from test_mutants import MUTATIONS

        from tutorial_moco.provenance import git_commit, hardware

        about = f"{datetime.date.today()}, commit {git_commit()}, {hardware(torch.device('cpu'))}, torch {torch.__version__}."
        rows = sorted(_tried, key=lambda row: list(ELSEWHERE).index(row[0]))
        lines = [f"| {row[0]} | {row[1]} | {_kept[row]} of {_tried[row]} | {ELSEWHERE[row[0]]} |\n" for row in rows]
        broken = [f"| {m.promise} | {m.what} | `{m.test}` |\n" for m in MUTATIONS]
        PAGE.write_text(HEAD.format(about=about) + "".join(lines) + MUTANTS + "".join(broken))
