"""How much memory is left, of the machine and of the control groups that this process is in?

A control group is what Slurm's --mem and containers set limits with: beyond one the system ends processes, however much
of the machine is free.
"""

import gc
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from bench.allocator import return_freed_memory

MACHINE, MEMBERSHIP, MOUNT = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


class Names(NamedTuple):
    """Of a group's files."""

    limit: str
    used: str
    reclaimable: str  # the line of memory.stat: files that were read, and that the system lets go first


V1 = Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = Names("memory.max", "memory.current", "inactive_file")


def free_bytes(device: torch.device) -> float:
    """Before the system ends processes; of a GPU infinite, as it refuses what does not fit, and nothing is lost."""
    if device.type != "cpu":
        return math.inf
    gc.collect()
    return_freed_memory()
    free = number_in(MACHINE, "MemAvailable:") * 1024
    return min(math.inf if math.isnan(free) else free, *free_in_groups(MEMBERSHIP, MOUNT), math.inf)


def free_in_groups(membership: Path, mount: Path) -> Iterator[float]:
    """Of this process's group and of all around it, where they have a limit: cgroups(7), both versions."""
    for line in membership.read_text().splitlines() if membership.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        names, root = (V1, mount / "memory") if controllers else (V2, mount)
        own = root / path.lstrip("/")
        for group in (own, *own.parents):
            limit = group / names.limit
            if group.is_relative_to(root) and limit.exists() and limit.read_text().strip() != "max":
                used = int((group / names.used).read_text()) - number_in(group / "memory.stat", names.reclaimable)
                yield int(limit.read_text()) - used


def number_in(path: Path, name: str) -> float:
    """What a line says after a name; NaN if there is none."""
    found = re.search(rf"^{name}\s+(\d+)", path.read_text(), re.MULTILINE) if path.exists() else None
    return float(found.group(1)) if found else math.nan
