"""Peak memory of a stage, from `reset_peak_memory` to `peak_memory_mib`.

On a GPU it is the memory that torch allocated, else the resident memory of the process, which includes the model.
"""

import ctypes
from contextlib import suppress
from pathlib import Path

import torch

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""Parameters of glibc's mallopt."""


def keep_freed_memory() -> None:
    """Let this process keep freed memory up to its peak, so that no step requests zeroed pages again.

    It has no effect without glibc.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    # Older versions of glibc allow 32 MiB at most.
    if mallopt(MMAP_THRESHOLD, 1 << 30) or mallopt(MMAP_THRESHOLD, 1 << 25):
        mallopt(TRIM_THRESHOLD, (1 << 31) - 1)


def release_freed_memory() -> None:
    """Return freed memory to the system. It has no effect without glibc."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak-memory counter. On systems other than Linux it counts from the start of the process."""
    # Memory that earlier stages have freed must not count.
    release_freed_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (file := Path("/proc/self/clear_refs")).exists():
        file.write_text("5")


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory since `reset_peak_memory`, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resident_peak_mib("self")


def resident_peak_mib(process: int | str) -> float:
    """Return the peak resident memory of a process so far, in MiB.

    Args:
        process: process id, or `self`.

    Returns:
        The peak, or 0 if the process has ended.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)
