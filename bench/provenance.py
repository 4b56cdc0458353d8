"""Which code, on which machine, made a number?"""

import hashlib
import os
import platform
import subprocess
import sys
import time
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PRESENTATION = {
    "__main__",
    "arrays",
    "cli",
    "demo",
    "figures",
    "files",
    "plots",
    "progress",
    "provenance",
    "runs",
    "show",
    "suite",
    "tables",
}  # modules of bench that change no number
LIBRARIES = ("torch", "timm", "torch-fidelity", "numpy", "scipy", "scikit-learn")


@lru_cache(maxsize=1)
def code_hash() -> str:
    """A hash of the files that can change a run's numbers: methods, and what trains, samples and scores them."""
    digest = hashlib.sha256()
    for path in sorted(
        [*(ROOT / "methods").rglob("*.py"), *(ROOT / "bench").rglob("*.py"), *(ROOT / "bench").rglob("*.safetensors")]
    ):
        relative = path.relative_to(ROOT)
        if relative.parts[0] == "bench" and PRESENTATION & {part.removesuffix(".py") for part in relative.parts[1:]}:
            continue
        digest.update(f"{relative.as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def provenance(device: str, threads: int, world_size: int) -> dict[str, Any]:
    """What is stored beside every run."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if (status := _git("status", "--porcelain")) is None else bool(status),
        "code_hash": code_hash(),
        "python": platform.python_version(),
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
        "platform": platform.platform(),
        "host": platform.node(),
        "device": device_name(device),
        "cpu_count": os.cpu_count(),
        "threads": threads,
        "world_size": world_size,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def device_name(device: str) -> str:
    """The name of the accelerator, or of the processor."""
    if device.startswith("cuda"):
        import torch

        return str(torch.cuda.get_device_name(device))
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    """A git command's output, None outside a git checkout."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
