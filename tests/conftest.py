"""Fixtures that more than one file of tests needs."""

import subprocess
import sys
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
