"""A GPU that is not there: tensors with a shape and a dtype but no numbers, and an account of them.

For tools/simulate.py. It is written for torch 2.13: much of what it changes has no public name.
"""

import contextlib
import functools
import gc
import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.fsdp._fully_shard import _fsdp_init
from torch.distributed.tensor import DTensor
from torch.utils import backend_registration as backend
from torch.utils._pytree import tree_leaves

ROOT, GIB = Path(__file__).parent.parent, 2**30
# By the name of what one of `entries` calls.
PHASES = {
    "_wrapped_call_impl": "forward",
    "backward": "backward",
    "optimizer_step": "step",
}
NO_KERNEL = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "lift_fresh",
    "unsafe_view",
    "wait_tensor",
    "device",
    "detach",
    "alias",
}


class Stream:
    """And event: there is nothing to wait for."""

    device_type, device_index, stream_id = 20, 0, 0
    device = property(lambda self: torch.device("gpu", 0))

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: self


class Device(backend._DummyBackendModule):  # torch.gpu, as FSDP2 and autocast ask it
    Stream, Event, current_stream = Stream, Stream, staticmethod(Stream)
    stream = staticmethod(contextlib.nullcontext)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])


@dataclass
class Block:
    """The memory of a tensor and its views."""

    kind: str
    size: int
    born: int  # at which event
    died: float = float("inf")
    host: Tensor | None = None  # what the host has copied there


@functools.cache
def source(file: str) -> tuple[str | None, bool]:
    """The file's name if it is the project's, and whether it is one of FSDP2's."""
    path = Path(file)
    return path.name if path.parent == ROOT else None, path.parent.name == "_fully_shard"


class GPU(FakeTensorMode):
    """The device "gpu", rank 0's. The host's tensors stay real. It changes torch."""

    avoid_device_init = True  # a property of FakeTensorMode

    def __init__(self, lm, entries: list[Callable]):
        """lm: the model, without memory. entries: the functions whose calls are the phases."""
        super().__init__(allow_non_fake_inputs=True)
        self.shapes = {tuple(sorted(parameter.shape)) for parameter in lm.parameters()}
        self.words = lm.config.vocab_size
        self.entries = {entry.__code__ for entry in entries}
        self.phase, self.events, self.now = "load", 0, 0
        self.held: dict[int, Block] = {}  # by storage
        self.reset()
        backend._setup_privateuseone_for_python_backend("gpu", Device())
        self.library = torch.library.Library("aten", "IMPL")  # its kernel lives as long as it does
        # As CUDA has it. Without it autograd puts six operations together, which keep more..

        self.library.impl("silu_backward", lambda grad, x: torch.empty_like(x), "PrivateUse1")
        torch.autograd.set_multithreading_enabled(False)  # no thread for a device that is not there
        torch.accelerator.current_stream = Device.current_stream
        _fsdp_init._move_states_to_device = lambda *_: None  # buffers, which policy.load moves
        # The project takes it for a CUDA device.
        FakeTensor.is_cuda = property(lambda x: x.device.type == "gpu")
        FakeTensor.tolist = lambda x: self.read(x)
        resize = torch.UntypedStorage.resize_

        def resized(storage, size: int) -> None:  # so FSDP2 gives up what it has gathered
            resize(storage, size)
            if id(storage) in self.held:
                self.hold(storage, self.held[id(storage)].kind)

        torch.UntypedStorage.resize_ = resized

    def reset(self) -> None:
        """Counts begin anew; what is held stays."""
        gc.collect()
        self.log, self.peak, self.peaked = [*self.held.values()], self.now, self.events
        self.counts = defaultdict(Counter)

    # Memory

    def allocate(self, kind: str, size: int) -> Block:
        self.events, self.now = self.events + 1, self.now + size
        self.log.append(block := Block(kind, size, self.events))
        if self.now > self.peak:
            self.peak, self.peaked = self.now, self.events
        return block

    def free(self, block: Block) -> None:
        self.events, self.now = self.events + 1, self.now - block.size
        block.died = self.events

    def hold(self, storage, kind: str) -> Block:
        """A storage that may be new, or have another size than before."""
        key = id(storage)
        if key not in self.held:
            weakref.finalize(storage, lambda: self.free(self.held.pop(key)))
        elif self.held[key].size == storage.nbytes():
            return self.held[key]
        else:
            self.free(self.held[key])
        self.held[key] = self.allocate(kind, storage.nbytes())
        return self.held[key]

    def name(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """What these are, and have been since the last reset."""
        for x in tensors:
            local = x.to_local() if isinstance(x, DTensor) else x
            self.held[id(local.untyped_storage())].kind = kind

    def by_kind(self, event: int) -> dict[str, float]:
        """GiB held after that event."""
        sizes = Counter()
        for block in self.log:
            sizes[block.kind] += block.size * (block.born <= event < block.died)
        return {kind: size / GIB for kind, size in sizes.most_common() if size}

    # Operations

    def where(self) -> tuple[str, str | None, bool]:
        """What the host is doing: the phase, the project's line, and whether FSDP2 is at work."""
        line, sharding, callee = None, False, ""
        frame = sys._getframe(2)
        while frame:
            code = frame.f_code
            file, of_fsdp = source(code.co_filename)
            if file and not line:
                line = f"{file}:{frame.f_lineno}"
            sharding = sharding or of_fsdp
            if code in self.entries:
                return PHASES.get(callee, "rest"), line, sharding
            if code.co_name != "<listcomp>":
                callee = code.co_name
            frame = frame.f_back
        return self.phase, line, sharding

    def read(self, x: Tensor):
        """.item() and .tolist(): the host waits, and gets made-up numbers."""
        self.counts["reads"][self.where()[1]] += x.is_cuda
        return torch.ones(x.shape, dtype=x.dtype).tolist()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, leaves = kwargs or {}, tree_leaves((args, kwargs))
        given = [x for x in leaves if isinstance(x, Tensor)]
        if all(type(x) in (Tensor, nn.Parameter) for x in given) and not any(
            isinstance(x, torch.device) and x.type == "gpu" for x in leaves
        ):
            return func(*args, **kwargs)  # the host's own
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.read(given[0])
        out = super().__torch_dispatch__(func, types, args, kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if out is not NotImplemented and any(x.device.type == "gpu" for x in given + made):
            self.record(func, given, made)
        return out

    def record(self, func, given: list[Tensor], made: list[Tensor]) -> None:
        """Counts an operation, and what it made."""
        phase, line, sharding = self.where()
        for x in made:
            if x.device.type == "gpu":
                block = self.hold(x.untyped_storage(), self.kind(x, phase, sharding))
        name = func.__name__.split(".")[0].strip("_")
        if func.is_view or name in NO_KERNEL:
            return
        counts = self.counts
        counts["launches"][phase] += 1
        if name in ("to_copy", "copy") and any(x.device.type == "cpu" for x in given + made):
            if made[0].device.type == "cpu":
                counts["reads"][line] += 1
            else:
                block.host = given[-1]
                counts["copies"][line] += 1
                counts["copies_behind_a_forward"][line] += counts["launches"]["forward"] > 0
        elif name.startswith("varlen_attn"):
            self.compute(self.attend(given, "backward" in name), phase, given[1].dtype)
        elif name in ("mm", "addmm", "bmm", "baddbmm"):
            summed = given[-1].shape[-2]  # rows of the last factor
            self.compute(2 * made[0].numel() * summed, phase, given[1].dtype)
        elif func.namespace in ("c10d", "_c10d_functional"):
            counts["collectives"][name] += 1
            counts["collectives_gib"][name] += max(x.nbytes for x in given + made) / GIB

    def kind(self, x: Tensor, phase: str, sharding: bool) -> str:
        """What a new tensor holds. "gathered": weights on their way, and their gradients."""
        if phase not in ("forward", "backward"):
            return "rest"
        if sharding or tuple(sorted(x.shape)) in self.shapes:
            return "gathered"
        return "logits" if self.words in x.shape else "activations"

    def compute(self, flops: int, phase: str, dtype: torch.dtype) -> None:
        self.counts["tflop"][phase] += flops / 1e12
        self.counts["tflop_in"][str(dtype).removeprefix("torch.")] += flops / 1e12

    def attend(self, given: list[Tensor], backward: bool) -> int:
        """Operations by (query, key) pairs; by torch's own count each query sees all keys.

        And what FlashAttention 2 takes for its backward: the gradients of keys and values for each
        query head, and sums in float32."""
        tokens, heads, width = given[0].shape
        copied = [self.held[id(x.untyped_storage())].host for x in given]
        # Only where queries and keys end was copied from the host.
        queries, keys = (ends.diff().tolist() for ends in copied if ends is not None)
        if backward:
            sums = 4 * (tokens + 128 * len(queries)) * heads * (width + 1)
            if given[2].shape[1] < heads:
                sums += 4 * sum(keys) * heads * width
            self.free(self.allocate("activations", sums))
        pairs = 0
        for q, k in zip(queries, keys, strict=True):  # aligned at the end
            pairs += q * (k - q) + q * (q + 1) // 2
        return (10 if backward else 4) * pairs * heads * width
