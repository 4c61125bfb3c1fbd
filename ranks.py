"""The processes of a run: which rank this is, what ranks tell one another, how all of them stop together.

torch is imported where it is needed: config.py imports this file, and a wrong option must not wait for torch.
"""

import datetime
import os
import signal
import time
import weakref
from collections.abc import Callable

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
LOCAL_RANK, LOCAL_WORLD = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class InputError(ValueError):
    """Something the user gave is wrong. The message is one sentence that says what, and what to do."""


def join():
    """Meets the other ranks. Returns this rank's torch.device."""
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", LOCAL_RANK) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    elif WORLD == 1:
        return device
    if WORLD > 1:
        store, _, _ = next(rendezvous("env://"))
        if WORLD == LOCAL_WORLD:  # torchrun hands the store of ranks that are gone to those it starts in their place
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    else:  # a group of one, so that one GPU takes the path of many
        store = dist.HashStore()
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=RANK, world_size=WORLD,
                            timeout=datetime.timedelta(hours=12))  # one rank may judge while the others wait
    # At exit, after vLLM: it cleans up in a finalizer of its own, which still needs the group. The newest come first.
    weakref.finalize(join, lambda: dist.is_initialized() and dist.destroy_process_group())
    return device


def gather(local: list) -> list:
    """Every rank's items of a list that was dealt out in turn, in the order of that list. Some ranks may have none."""
    if WORLD == 1:
        return local
    import torch.distributed as dist

    lists = [None] * WORLD
    dist.all_gather_object(lists, local)
    return [items[i] for i in range(max(map(len, lists))) for items in lists if i < len(items)]


def on_rank_0(work: Callable) -> None:
    """work() on rank 0. All ranks wait for it, and raise OSError or InputError if it did."""
    failed = None
    if RANK == 0:
        try:
            work()
        except (OSError, InputError) as error:
            failed = (InputError if isinstance(error, InputError) else OSError), str(error)
    if failed := gather([failed])[0]:
        raise failed[0](failed[1])


# SIGTERM and SIGINT end a run in order: all ranks at the same point, so that its state can be saved.

AGAIN = 2.0  # seconds: whoever signals a whole job reaches a rank twice, by torchrun, too, and means it once

_signals: list[tuple[int, float]] = []  # the first that this rank has got: number and time
_working = False  # in `interruptible`


class Stop(BaseException):
    """Raised on all ranks alike. No Exception: rewards may catch those."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.code = 128 + number  # what a shell makes of it


def catch_signals() -> None:
    """From now on the first signal is kept for `check_signals`, and a second one ends the process at once."""
    def handler(number: int, frame) -> None:
        if _signals and time.monotonic() - _signals[0][1] >= AGAIN:
            os._exit(128 + number)
        if not _signals:
            _signals.append((number, time.monotonic()))
            if _working:
                raise Stop(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


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
    if number := max(gather([_signals[0][0] if _signals else 0])):
        raise Stop(number)
