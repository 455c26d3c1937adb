"""A timer for asyncio that is good to some tens of microseconds: epoll alone waits in whole milliseconds.

What remains is what an idle machine takes to wake up. The timer learns it and goes off earlier by as much.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
from collections.abc import Callable

_CLOCK_MONOTONIC = 1
_ABSOLUTE = 1  # TFD_TIMER_ABSTIME
LONGEST_LEAD = 0.0003
LEARNING_RATE = 0.1


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _TimerSpec(ctypes.Structure):
    _fields_ = (("interval", _TimeSpec), ("value", _TimeSpec))


class PreciseTimer:
    """Calls `callback` once at a time of the running loop's clock, give or take `lead`. `close` it in the end.

    Linux has timers as file descriptors (Python knows them from 3.13 on); elsewhere the loop's own timer has to do.
    """

    def __init__(self, callback: Callable[[], None]) -> None:
        self.lead = 0.0
        self._callback = callback
        self._armed = 0.0
        self._loop = asyncio.get_running_loop()
        self._handle: asyncio.TimerHandle | None = None
        self._library = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
        self._descriptor = self._make_descriptor()
        if self._descriptor >= 0:
            self._loop.add_reader(self._descriptor, self._fired)

    def at(self, when: float) -> None:
        """Call back at `when`; an earlier order is forgotten."""
        if self._descriptor >= 0:
            self._armed = when - self.lead
            self._set_descriptor(self._armed)
            return
        if self._handle is not None:
            self._handle.cancel()
        self._handle = self._loop.call_at(when, self._callback)

    def close(self) -> None:
        """Call nobody any more; closing twice is allowed."""
        if self._handle is not None:
            self._handle.cancel()
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def _fired(self) -> None:
        try:
            os.read(self._descriptor, 8)
        except BlockingIOError:
            return  # set anew between the wake-up and now
        late = min(LONGEST_LEAD, self._loop.time() - self._armed)
        self.lead += LEARNING_RATE * (late - self.lead)
        self._callback()

    def _make_descriptor(self) -> int:
        """Make a timer; -1 where the C library has none."""
        create = getattr(self._library, "timerfd_create", None)
        return int(create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)) if create is not None else -1

    def _set_descriptor(self, when: float) -> None:
        assert self._library is not None
        nanoseconds = max(1, round(when * 1e9))  # 0 would switch the timer off
        spec = _TimerSpec(_TimeSpec(0, 0), _TimeSpec(nanoseconds // 10**9, nanoseconds % 10**9))
        if self._library.timerfd_settime(self._descriptor, _ABSOLUTE, ctypes.byref(spec), None) != 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime failed")
