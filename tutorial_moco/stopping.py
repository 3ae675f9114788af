"""Being stopped: a first Ctrl-C or SIGTERM lets the step at hand be finished and saved, a second one ends at once."""

import contextlib
import signal
import threading
import time
from types import FrameType

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

    def __exit__(self, *_) -> None:
        self._restore()

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

    def tell(self, number: float) -> None:
        """Of a signal that another process has caught; 0 is none."""
        if number and self.caught is None:
            self.caught = signal.Signals(int(number))

    def obey(self) -> None:
        """End as the signal asked, if one was caught, once all is saved.

        Raises:
            KeyboardInterrupt: after Ctrl-C; a notebook's kernel goes on. SystemExit: after SIGTERM, with status 143.
        """
        if self.caught == signal.SIGINT:
            raise KeyboardInterrupt
        if self.caught is not None:
            raise SystemExit(128 + self.caught)
