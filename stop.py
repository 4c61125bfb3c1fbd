"""SIGTERM and SIGINT end a run in order: all ranks at the same point, so that its state can be saved."""

import os
import signal
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

AGAIN = 2.0  # seconds: whoever signals a whole job reaches a rank twice, by torchrun, too, and means it once

_signals: list[tuple[int, float]] = []  # the first that this rank has got: number and time
_working = False  # in `interruptible`


class Stop(BaseException):
    """Raised on all ranks alike. No Exception: rewards may catch those."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.code = 128 + number  # what a shell makes of it


def catch_signals() -> None:
    """From now on the first signal is kept for `check`, and a second one ends the process at once."""
    def handler(number: int, frame) -> None:
        if _signals and time.monotonic() - _signals[0][1] >= AGAIN:
            os._exit(128 + number)
        if not _signals:
            _signals.append((number, time.monotonic()))
            if _working:
                raise Stop(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def interruptible(work: Callable, at_once: bool = True):
    """work(), which a signal breaks off: then the result is None, and the next `check` raises. Only for work whose
    result can be thrown away. at_once: without collectives, in which other ranks would wait for this one."""
    global _working
    try:
        _working = at_once
        return None if at_once and _signals else work()
    except Stop:
        return None
    finally:
        _working = False


def check(group: dist.ProcessGroup | None = None) -> None:
    """Raises Stop on all ranks, or those of a group, if one of them has got a signal. All of them must call it."""
    number = torch.tensor(_signals[0][0] if _signals else 0)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(number, dist.ReduceOp.MAX, group)
    if number:
        raise Stop(int(number))
