"""What hidden tests are written with: inputs from a secret seed, points for each test, and a reason for each point lost.

    exam = Exam("info_nce")
    with exam.test(2, "other sizes and temperatures"):
        q, k, negatives = exam.unit(5, 12), exam.unit(5, 12), exam.unit(40, 12)
        exam.equal(info_nce(q, k, negatives, 0.1), losses.info_nce(q, k, negatives, 0.1))
    exam.points

A test that fails costs its own points and no others. Nothing of a test is shown but its aim and the reason; numbers are taken
out of what an exception says, so that inputs and expected values stay hidden but for a size or a setting that a hint names. The
last line gives nbgrader the points (it takes a number for partial credit).
"""

import contextlib
import hashlib
import io
import os
import re
import sys
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tutorial_moco.checks import PATIENCE, TimeLimit, time_limit

SECRET = os.environ.pop("TUTORIAL_MOCO_SECRET", "")  # not for graded code; who digs finds their own (docs/TEACHING.md)
SECONDS = 10.0  # of a test; an endless loop costs this test and no other
LONGEST = 300  # characters of a reason
NUMBER = re.compile(r"[-+]?\d[\d.e+-]*")

_allclose, _isfinite = torch.allclose, torch.isfinite  # as they are before any student's code has run


class Exam:
    """The hidden tests of one cell.

    Args:
        name: of what is tested; with the secret it decides all inputs.
        seconds: a test that takes longer is stopped.
    """

    def __init__(self, name: str, *, seconds: float = SECONDS):
        self.seconds, self.points, self.possible = seconds, 0.0, 0.0
        digest = hashlib.sha256(f"{SECRET}/{name}".encode()).digest()
        self.random = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    @contextlib.contextmanager
    def test(self, points: float, aim: str) -> Iterator[None]:
        """One test: run the body; its points are given if nothing is raised, and the aim is printed with what came of it."""
        self.possible += points
        reason = None
        try:
            with _silent(), time_limit(self.seconds):
                yield
        except TimeLimit:
            reason = f"still running after {self.seconds * PATIENCE:g} s. Is there a loop without end?"
        except NotImplementedError:
            reason = "not written yet."
        except AssertionError as error:
            reason = str(error) or "the answer is not right."
        except MemoryError:
            reason = "it asks for more memory than there is."
        except (Exception, SystemExit) as error:
            gaps = "ellipsis" in str(error)
            reason = (
                "there are still dots (...) in it."
                if gaps
                else f"it stopped with {type(error).__name__}: {NUMBER.sub('…', ' '.join(str(error).split()))}"
            )
        self.points += points if reason is None else 0
        mark = f"[{points:g} of {points:g}]" if reason is None else f"[0 of {points:g}]"
        print(f"{mark} {aim}" + (f": {reason[:LONGEST]}" if reason else ""))

    def equal(self, found, expected, hint: str = "", *, tolerance: float = 1e-4) -> None:
        """Fail unless ``found`` has the type, shape and values of ``expected``; ``hint`` says what a difference may mean."""
        if isinstance(expected, Tensor):
            assert isinstance(found, Tensor), f"it returns {type(found).__name__}, not a tensor."
            assert found.shape == expected.shape, f"the shape is {tuple(found.shape)}, not {tuple(expected.shape)}."
            assert bool(_isfinite(found.detach().double()).all()) or not bool(_isfinite(expected.double()).all()), (
                "the answer is not finite (inf or nan)."
            )
            same = _allclose(found.detach().double(), expected.detach().double(), atol=tolerance, rtol=tolerance)
        elif isinstance(expected, bool | str | list | tuple | dict):
            same = type(found) is type(expected) and found == expected
        else:
            number = found.item() if isinstance(found, Tensor) and found.numel() == 1 else found
            assert type(number) in (int, float) or isinstance(number, np.number), (
                f"it returns {type(found).__name__}, not a number."
            )
            same = (
                abs(number - expected) <= tolerance * max(1.0, abs(expected))
                if abs(expected) < float("inf")
                else number == expected
            )
        assert same, f"the answer is not right. {hint}".strip()

    # Inputs ----------------------------------------------------------------------------------------------------------

    def unit(self, n: int, dim: int) -> Tensor:
        """n random unit vectors, (n, dim)."""
        return F.normalize(self.normal(n, dim), dim=1)

    def normal(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(*shape, generator=self.random)

    def integer(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.random))

    def number(self, low: float, high: float) -> float:
        """A number from low to high."""
        return low + (high - low) * float(torch.rand((), generator=self.random))


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Nothing that graded code prints or displays comes through: a displayed number would be taken for points."""
    hook, sys.displayhook = sys.displayhook, lambda value: None
    try:
        with contextlib.redirect_stdout(_Sink()), contextlib.redirect_stderr(_Sink()):
            yield
    finally:
        sys.displayhook = hook


class _Sink(io.TextIOBase):
    """Takes what graded code prints, and keeps nothing of it."""

    def write(self, text: str) -> int:
        return len(text)
