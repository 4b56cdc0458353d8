"""How much memory does a contestant need at its peak, beside what was there before it was built?

On a GPU, what PyTorch's allocator gave out. On a CPU, by how much the resident set of the process grew at most: what
earlier contestants gave back to the process, but not to the system, is used again and not seen.
"""

import gc
import math
from pathlib import Path

import torch

from bench.allocator import return_freed_memory
from bench.throughput.free import number_in

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


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
            self.before = 1024 * number_in(STATUS, "VmRSS:") if _forget_peak() else math.nan

    def peak_bytes(self) -> float:
        """NaN where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return 1024 * number_in(STATUS, "VmHWM:") - self.before


def _forget_peak() -> bool:
    try:
        CLEAR.write_text("5")  # proc(5): resets the peak resident set size
    except OSError:
        return False
    return True
