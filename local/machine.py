"""Is there what cannot come from PyPI? The set-up asks this first, before anything is downloaded.

It needs Python alone:

    python3 local/machine.py yes   # with vLLM
    python3 local/machine.py no    # without: --engine hf samples
"""

import ctypes
import importlib.util
import os
import platform
import sys
from pathlib import Path

PYTHONS = (3, 11), (3, 14)  # the oldest and the newest for which the lists of packages resolve


def cores() -> int:
    """Those that this process may use; macOS does not tell, so there all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The kind of CPU, as far as the system tells."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def missing_library() -> str | None:
    """What vLLM for CPUs lacks on this machine, and what to do: one sentence; None if nothing is missing."""
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        return (
            "vLLM needs the library libnuma.so.1, and this machine lacks it: install it (Debian, Ubuntu: "
            "apt-get install libnuma1; Fedora: dnf install numactl-libs)"
        )
    return None


def problem(vllm: bool) -> str | None:
    """The first thing that is missing, and what to do; None if the set-up can begin."""
    version, (oldest, newest) = sys.version_info[:2], PYTHONS
    if not oldest <= version <= newest:
        return (
            f"this is Python {version[0]}.{version[1]}, and 3.{oldest[1]} to 3.{newest[1]} are supported: "
            f"name another one, such as make PYTHON=python3.{newest[1] - 1}"
        )
    if importlib.util.find_spec("ensurepip") is None:
        return (
            "Python's module ensurepip is missing, which makes environments: install it (Debian, Ubuntu: "
            "apt-get install python3-venv)"
        )
    missing = missing_library() if vllm else None
    return (
        missing and f"{missing}, or leave vLLM out with make VLLM=no, and transformers will sample"
    )


if __name__ == "__main__":
    found = problem(vllm=sys.argv[1:] == ["yes"])
    if found:
        sys.exit(f"error: {found}")
