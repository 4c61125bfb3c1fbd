"""SIGTERM and SIGINT end a run in order, all ranks at the same point, so that its state can be saved."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable

from infra.ranks import RANK, gather

AGAIN = 2.0  # seconds: whoever signals a whole job reaches a rank twice, by torchrun, too, and means it once
STOPPING = (
    b"\nstopping, and saving the state; a second signal (Ctrl-C again) ends the run at "
    b"once, without saving\n"
)
CAUGHT = signal.SIGTERM, signal.SIGINT
_signals: list[int] = []  # the first that this rank has got
_working = False  # in `interruptible`


class Stop(BaseException):
    """Raised on all ranks alike. No Exception: rewards may catch those."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.code = 128 + number  # what a shell makes of it


def catch_signals() -> None:
    """From now on the first signal is kept for `check_signals`, and a second one ends the process.

    The main thread may be in one call of a library for long, waiting for other ranks, say. Python
    runs `keep` only after it. What has to happen at once happens in a thread, `watch_signals`.
    """

    def keep(number: int, frame) -> None:
        if not _signals:
            _signals.append(number)
            if _working:
                raise Stop(number)

    for number in CAUGHT:
        signal.signal(number, keep)
    arrived, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)  # each signal's number is written there when it arrives
    threading.Thread(target=watch_signals, args=(arrived,), daemon=True, name="signals").start()
    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, CAUGHT),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, CAUGHT),
        after_in_child=leave_signals,
    )


def watch_signals(arrived: int) -> None:
    """Says that the first signal has arrived, on rank 0. Ends the process when a second one does.
    arrived: the pipe that has their numbers."""
    first = None
    while True:
        (number,) = os.read(arrived, 1)
        if number not in CAUGHT:  # others with a handler in Python
            continue
        if first is None:
            first = time.monotonic()
            if RANK == 0:
                with contextlib.suppress(OSError):  # the terminal is gone
                    os.write(2, STOPPING)
        elif time.monotonic() - first >= AGAIN:
            os._exit(128 + number)


def leave_signals() -> None:
    """In a process that a reward forks: a signal to it ends it, and is not one to the run."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, CAUGHT)


def interruptible(work: Callable):
    """work(), which a signal breaks off: then the result is None, and the next `check_signals` raises. Only for work
    whose result can be thrown away, and without collectives, in which other ranks would wait for this one."""
    global _working
    try:
        _working = True
        return None if _signals else work()
    except Stop:
        return None
    finally:
        _working = False


def check_signals() -> None:
    """Raises Stop on all ranks if one of them has got a signal. All must call it."""
    if number := max(gather(_signals[:1] or [0])):
        raise Stop(number)
