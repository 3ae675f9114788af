"""Being stopped: a first Ctrl-C or SIGTERM lets the step at hand be finished and saved, a second one ends at once."""

import contextlib
import math
import signal
import sys
import threading
import time
from types import FrameType

import torch

from tutorial_moco.distributed import highest, rank, world

AT_ONCE = 1.0  # seconds: torchrun passes on the Ctrl-C that its processes have had from the terminal, too


class Stop(contextlib.AbstractContextManager):
    """Catches SIGINT and SIGTERM while it is entered; ``caught`` is the signal that came, or None.

    Outside the main thread, where Python allows no handlers, it catches nothing.
    """

    caught: signal.Signals | None = None

    def __enter__(self) -> "Stop":
        here = threading.current_thread() is threading.main_thread()
        self._before = {number: signal.signal(number, self._catch) for number in (signal.SIGINT, signal.SIGTERM) if here}
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        self._restore()
        if kind is None and self.caught is not None:  # it came after `obey` had asked
            signal.raise_signal(self.caught)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _catch(self, number: int, _frame: FrameType | None) -> None:
        if self.caught is None:
            self.caught, self._when = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._when > AT_ONCE:
            self._restore()
            signal.raise_signal(number)

    def obey(self, device: torch.device, saved: str = "") -> None:
        """End as the signal asked, if any process has caught one; to be called by all once all is saved, before leaving.

        Of several processes none ends before all are here: as soon as one has ended, torchrun signals the others, and would
        end the one that is still saving. From here on they take no notice of signals, for good: they are about to end.

        Args:
            saved: what the first process is to say then.

        Raises:
            KeyboardInterrupt: after Ctrl-C; a notebook's kernel goes on. SystemExit: after SIGTERM, with status 143.
        """
        self._when = math.inf  # no further signal is a second one
        (caught,) = highest(self.caught or 0, device=device)
        if not caught:
            return
        self.caught = signal.Signals(int(caught))
        if saved and not rank():
            print(f"\n{self.caught.name}: {saved}", file=sys.stderr)
        if world() > 1:
            for number in self._before:
                signal.signal(number, signal.SIG_IGN)
            self._before = {}
        if self.caught == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.caught)
