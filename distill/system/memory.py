"""Memory of this machine and of this process, and the errors by which it runs out."""

from __future__ import annotations

import contextlib
import gc
import sys
from pathlib import Path

import psutil

STATUS = Path("/proc/self/status")
_CONTAINER = Path("/sys/fs/cgroup/memory.max")
_SIGNS = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def memory_of_host(container: Path = _CONTAINER) -> int:
    """Return the physical memory in bytes, or the container's limit where that is lower."""
    physical = int(psutil.virtual_memory().total)
    with contextlib.suppress(OSError, ValueError):  # no such file, or `max`
        return min(physical, int(container.read_text(encoding="ascii")))
    return physical


def available_memory() -> int:
    """Return the bytes that programs can have without swapping."""
    return min(int(psutil.virtual_memory().available), memory_of_host())


def held_memory() -> int:
    """Return the bytes that this process holds now."""
    return int(psutil.Process().memory_info().rss)


def peak_memory(status: Path = STATUS) -> int | None:
    """Return the most bytes that this process held: on Linux since `reset_peak_memory`, elsewhere since it began.

    psutil does not tell Linux's peak, which can be reset, so it is read here.
    """
    with contextlib.suppress(OSError, ValueError):
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    try:
        import resource
    except ImportError:  # Windows
        return getattr(psutil.Process().memory_info(), "peak_wset", None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def reset_peak_memory() -> None:
    """Reset the peak to the memory held now, if the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def free_memory() -> None:
    """Give back the memory of objects that nothing refers to any more but each other, as a trainer and its model do."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that a tensor found no room, on a card or on the host."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
