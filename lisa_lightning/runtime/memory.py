"""The most memory that a stage takes: on a GPU what torch allocated, else what the process held, the model included."""

import ctypes
from contextlib import suppress
from pathlib import Path

import torch

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of glibc's mallopt


def keep_freed_memory() -> None:
    """Let this process keep what it frees, up to its peak, instead of asking for zeroed pages again every step."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # not glibc
        return
    if mallopt(MMAP_THRESHOLD, 1 << 30) or mallopt(MMAP_THRESHOLD, 1 << 25):  # older versions allow 32 MiB at most
        mallopt(TRIM_THRESHOLD, (1 << 31) - 1)


def release_freed_memory() -> None:
    """Give back to the system what this process has freed and kept."""
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def watch(device: torch.device) -> None:
    """Let the peak start anew; where the system can't (not Linux), it goes on from the process's start."""
    release_freed_memory()  # what earlier stages left behind isn't this one's
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (file := Path("/proc/self/clear_refs")).exists():
        file.write_text("5")


def peak_mib(device: torch.device) -> float:
    """The peak since `watch`, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resident_peak_mib("self")


def resident_peak_mib(process: int | str) -> float:
    """Peak resident memory so far of a process (an id or `self`); 0 where it has just ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)
