"""A hard limit on the seconds that something may take."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class OutOfTime(BaseException):
    """The time is over. No `Exception`: what is stopped must not take it for its own failure."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises `OutOfTime` in the block once the seconds are over, after the C call of that moment.

    Only in the main thread of a system with interval timers; elsewhere nothing happens.
    """
    possible = hasattr(signal, "setitimer") and seconds < math.inf
    if not possible or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    # 0 would switch the timer off. Again each second: an exception in a destructor is swallowed.
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
