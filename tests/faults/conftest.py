"""The table of promises: each fault test says how often it tried, and how often the promise held; `make faults` writes it."""

import datetime
from pathlib import Path

import pytest
from trainings import FULL

PAGE = Path(__file__).parents[2] / "docs" / "RELIABILITY.md"
ELSEWHERE = {  # promise: the best test of it that we found in other projects
    "the same bits after kill -9": "Composer: final checkpoints equal, mid-epoch and at the boundary, 1 and 2 processes",
    "a save is whole or was not": "Lightning: written beside and moved, without fsync",
    "damage is found before it is parsed": "none found",
    "no file is run": "Composer: a marker file must not appear",
    "stopped, no step is lost": "Lightning: simulated signal, exit 143",
    "no process waits for one that is lost": "none found",
    "any configuration trains or is told in a line": "none found",
}
HEAD = """# What is promised when things go wrong, and how it was tried

Written by `make faults` (the full counts; `make test` has a short form of each). Every fault is real: processes are killed,
disks are full, bytes are flipped. Where a tool is missing the test is skipped, and its line is not here.

{about}

| promise | how it was tried | held | best test found elsewhere |
|---|---|---|---|
"""
_rows: list[tuple[str, str, int, int]] = []


@pytest.fixture
def held():
    """``held(promise, how, n, of)``: the promise was kept in n of so many trials."""

    def note(promise: str, how: str, n: int, of: int) -> None:
        assert promise in ELSEWHERE
        _rows.append((promise, how, n, of))
        assert n == of

    return note


def pytest_sessionfinish(session, exitstatus):
    if FULL and exitstatus == 0 and _rows:
        import torch

        from tutorial_moco.provenance import git_commit, hardware

        about = f"{datetime.date.today()}, commit {git_commit()}, {hardware(torch.device('cpu'))}, torch {torch.__version__}."
        lines = [
            f"| {promise} | {how} | {n} of {of} | {ELSEWHERE[promise]} |"
            for promise, how, n, of in sorted(_rows, key=lambda row: list(ELSEWHERE).index(row[0]))
        ]
        PAGE.write_text(HEAD.format(about=about) + "\n".join(lines) + "\n")
