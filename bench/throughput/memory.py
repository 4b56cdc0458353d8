"""How much memory does a contestant need at its peak, beside what was there before it was built?

On a GPU, what PyTorch's allocator gave out. On a CPU, by how much the resident set of the process grew at most: what
earlier contestants gave back to the process, but not to the system, is used again and not seen.
"""

import ctypes
import gc
import math
import re
from pathlib import Path

import torch

STATUS, CLEAR, MACHINE = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/meminfo")


class Memory:
    """From its making on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            self.kind = "allocated on the GPU"
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.before: float = torch.cuda.memory_allocated(device)
        else:
            self.kind = "growth of the resident set"
            return_freed_memory()
            self.before = _bytes_in(STATUS, "VmRSS") if _forget_peak() else math.nan

    def expect(self, num_bytes: float) -> None:
        """MemoryError where a CPU has not as much left: the system would end the process. A GPU says so itself."""
        free = free_bytes(self.device)
        if num_bytes > free:
            raise MemoryError(f"it needs about {num_bytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")

    def peak_bytes(self) -> float:
        """NaN where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return _bytes_in(STATUS, "VmHWM") - self.before


def free_bytes(device: torch.device) -> float:
    """Before the system ends processes; of a GPU infinite, as it refuses what does not fit, and nothing is lost."""
    if device.type != "cpu":
        return math.inf
    gc.collect()
    return_freed_memory()
    free = _bytes_in(MACHINE, "MemAvailable")
    return math.inf if math.isnan(free) else free


def return_freed_memory() -> None:
    """Give the system back what the C library keeps for later, where it can."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def _forget_peak() -> bool:
    try:
        CLEAR.write_text("5")  # proc(5): resets the peak resident set size
    except OSError:
        return False
    return True


def _bytes_in(path: Path, name: str) -> float:
    found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(), re.MULTILINE) if path.exists() else None
    return int(found.group(1)) * 1024.0 if found else math.nan
