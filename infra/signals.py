"""SIGTERM and SIGINT (Ctrl-C) end a run in good order: all ranks stop at the same point, so that
the state of the run can be saved.

A signal only leaves a note on the rank that gets it. At certain points all ranks ask each other for
notes (`check_signals`), and if there is one, all of them raise Stop.

Python runs a signal's handler between two instructions of the main thread, hence not while that
thread waits in a library for minutes: in a save, or for another rank. Two things cannot wait for
this. The user is told at once that the signal has arrived, and a second signal ends the process at
once. A thread of its own does both; signals reach it through a pipe.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable

from infra.ranks import RANK, gather

# Within these seconds a second signal counts as the first: a signal to a whole job reaches a rank
# twice, by itself and through torchrun.
AGAIN = 2.0
STOPPING = (
    b"\nstopping, and saving the state; a second signal (Ctrl-C again) ends the run at "
    b"once, without saving\n"
)
CAUGHT = signal.SIGTERM, signal.SIGINT
_signals: list[int] = []  # the note: the first signal that this rank got
_working = False  # within `interruptible`


class Stop(BaseException):
    """Raised on all ranks alike. It is no Exception, since rewards may catch those."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.code = 128 + number  # what a shell makes of it


def catch_signals() -> None:
    """From now on `check_signals` sees the first signal, and a second one ends the process."""

    def keep(number: int, frame) -> None:
        if not _signals:
            _signals.append(number)
            if _working:
                raise Stop(number)

    for number in CAUGHT:
        signal.signal(number, keep)
    arrived, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)  # a signal's number is written there the moment it arrives
    threading.Thread(target=watch_signals, args=(arrived,), daemon=True, name="signals").start()
    # A child process begins with our handler. Signals are blocked until it has replaced that.
    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, CAUGHT),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, CAUGHT),
        after_in_child=leave_signals,
    )


def watch_signals(arrived: int) -> None:
    """The thread: says, on rank 0, that the first signal has arrived, and ends the process when a
    second one does. arrived: the pipe from which the numbers of signals are read."""
    first = None
    while True:
        (number,) = os.read(arrived, 1)
        if number not in CAUGHT:  # Python writes every signal that has a handler into the pipe
            continue
        if first is None:
            first = time.monotonic()
            if RANK == 0:
                with contextlib.suppress(OSError):  # the terminal may be gone
                    os.write(2, STOPPING)
        elif time.monotonic() - first >= AGAIN:
            os._exit(128 + number)


def leave_signals() -> None:
    """In a process that a reward has forked: a signal ends it, and does not concern the run."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, CAUGHT)


def interruptible(work: Callable):
    """work(), or None if a signal breaks it off; the next `check_signals` then raises.

    Only for work whose result can be thrown away, and that waits for no other rank: a rank that
    breaks off would leave the others waiting.
    """
    global _working
    try:
        _working = True
        return None if _signals else work()
    except Stop:
        return None
    finally:
        _working = False


def check_signals() -> None:
    """Raises Stop on all ranks if one of them got a signal. All ranks must call it."""
    own = _signals[0] if _signals else 0
    number = max(gather([own]))
    if number:
        raise Stop(number)
