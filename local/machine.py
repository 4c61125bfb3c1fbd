"""Does this machine have what cannot come from PyPI? The set-up asks before it downloads anything.

It needs nothing except Python:

    python3 local/machine.py yes   # with vLLM
    python3 local/machine.py no    # without: --engine hf samples
"""

import ctypes
import importlib.util
import os
import platform
import sys
from pathlib import Path

# The Python versions that the lists of packages support.
OLDEST, NEWEST = (3, 11), (3, 14)


def cores() -> int:
    """How many cores this process may use. On macOS, which does not tell, how many there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """The kind of CPU, as far as the system tells."""
    file = Path("/proc/cpuinfo")
    for line in file.read_text().splitlines() if file.exists() else []:
        key, _, value = line.partition(":")
        if key.startswith("model name"):
            return value.strip()
    return platform.machine()


def missing_library() -> str | None:
    """A sentence: what vLLM for CPUs lacks on this machine, and what to do. None if nothing is
    missing."""
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        return (
            "vLLM needs the library libnuma.so.1, and this machine lacks it: install it (Debian, "
            "Ubuntu: apt-get install libnuma1; Fedora: dnf install numactl-libs)"
        )
    return None


def problem(vllm: bool) -> str | None:
    """A sentence: the first thing that is missing, and what to do. None if the set-up can begin.
    vllm: whether it is wanted."""
    major, minor = sys.version_info[:2]
    if not OLDEST <= (major, minor) <= NEWEST:
        (_, oldest), (_, newest) = OLDEST, NEWEST
        return (
            f"this is Python {major}.{minor}, and 3.{oldest} to 3.{newest} are supported: "
            f"name another one, such as make PYTHON=python3.{newest - 1}"
        )
    if importlib.util.find_spec("ensurepip") is None:
        return (
            "Python's module ensurepip is missing, which makes environments: install it (Debian, "
            "Ubuntu: apt-get install python3-venv)"
        )
    if vllm and (missing := missing_library()):
        return f"{missing}, or leave vLLM out with make VLLM=no, and transformers will sample"
    return None


if __name__ == "__main__":
    sentence = problem(vllm=sys.argv[1:] == ["yes"])
    if sentence:
        sys.exit(f"error: {sentence}")
