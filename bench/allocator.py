"""Does memory that was freed on a CPU stay with the process, for what comes next?

By itself the C library gives large blocks back to the system at once, which clears every page of the next one: at S/2 and
32 images a tenth of a training step. Kept, a process holds on to the most that it ever had.
"""

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # of mallopt(3), glibc
AS_BEFORE = {MMAP_MAX: 65536, MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20}  # where glibc's own adjustment ends
KEEP_ALL = {MMAP_MAX: 0, TRIM_THRESHOLD: -1}  # no block is mapped apart, nothing is given back


def keep_freed_memory(keep: bool) -> None:
    """From now on, for the whole process; nothing happens where the C library is another."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        for parameter, value in (KEEP_ALL if keep else AS_BEFORE).items():
            library.mallopt(parameter, value)


def return_freed_memory() -> None:
    """Give the system back what the C library keeps for later, where it can."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
