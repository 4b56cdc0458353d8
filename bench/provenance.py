"""Which code, on which machine, made a number?"""

import ast
import hashlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.files import read_json

ROOT = Path(__file__).resolve().parent.parent
PRESENTATION = {
    *("__main__", "cli", "demo", "progress", "result_commands", "sweeps", "sweep_views", "launch", "planning", "memory", "suite"),
    *("arrays", "data_commands", "encode", "files", "lease", "prepare", "trained", "provenance", "runs", "stopping"),
    *("figures", "keep", "plan", "plots", "published", "report", "show", "statistics", "tables", "throughput", "tidy", "watch"),
}  # modules of bench that change no number
LIBRARIES = ("torch", "timm", "torch-fidelity", "numpy", "scipy", "scikit-learn")


SLURM = {  # what is kept of a job's environment
    "job_id": "SLURM_JOB_ID",
    "array_job_id": "SLURM_ARRAY_JOB_ID",
    "array_task_id": "SLURM_ARRAY_TASK_ID",
    "restart_count": "SLURM_RESTART_COUNT",
    "nodes": "SLURM_JOB_NODELIST",
    "cluster": "SLURM_CLUSTER_NAME",
}


def code_hash() -> str:
    """A hash of the files that can change a run's numbers: methods, and what trains, samples and scores them."""
    return _read_code()[0]


def code_files() -> dict[str, str]:
    """Relative path -> short hash of exactly the files behind `code_hash`."""
    return dict(_read_code()[1])


def code_difference(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What happened to each file that is not the same, by path; both arguments as from `code_files`."""
    changed = {path: "changed" for path in before.keys() & now.keys() if before[path] != now[path]}
    removed, added = dict.fromkeys(before.keys() - now.keys(), "removed"), dict.fromkeys(now.keys() - before.keys(), "added")
    return [f"{path} {what}" for path, what in sorted((changed | removed | added).items())]


def imported_methods(module: str) -> set[str]:
    """A module of `methods`, and those of them that it imports, and they in turn."""
    found, to_read = {module}, [module]
    while to_read:
        new = {name for name in _imports(to_read.pop()) if name.startswith("methods.") and _file_of(name).is_file()} - found
        found |= new
        to_read += sorted(new)
    return found


def _imports(module: str) -> Iterator[str]:
    """All that could be modules in a module's import statements, wherever in it."""
    for node in ast.walk(ast.parse(_file_of(module).read_text())) if _file_of(module).is_file() else ():
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def _file_of(module: str) -> Path:
    return ROOT / f"{module.replace('.', '/')}.py"


def provenance(device: str, threads: int, world_size: int) -> dict[str, Any]:
    """What is stored beside every run. What does not apply, such as `slurm` on a laptop or `driver` on a CPU, is None."""
    version = version_of(ROOT)
    return {
        "commit": version["commit"],
        "dirty": version["dirty"],
        "snapshot": snapshot_of(ROOT).get("hash"),
        "code_hash": code_hash(),
        "python": platform.python_version(),
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
        "platform": _platform(),
        "host": platform.node(),
        "node": os.environ.get("SLURMD_NODENAME", platform.node()),
        "slurm": {key: os.environ.get(variable) for key, variable in SLURM.items()},
        "device": device_name(device),
        **gpu_versions(device),
        "cpu_count": os.cpu_count(),
        "threads": threads,
        "world_size": world_size,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "code_files": code_files(),
        "diff": version["diff"],
    }


def _platform() -> str:
    """As `platform.platform()`, which starts a process for it: for a moment a cluster would count the job's memory twice."""
    system = os.uname()
    return f"{system.sysname}-{system.release}-{system.machine}-with-{''.join(platform.libc_ver())}"


def version_of(root: Path) -> dict[str, Any]:
    """`commit`, `dirty` and `diff` (against the commit, with the names of new files; "" if clean) of a tree of this code.

    A snapshot knows them of the tree that it was taken from. All are None where git does not track the tree.
    """
    keys = ("commit", "dirty", "diff")
    if snapshot := snapshot_of(root):
        return {key: snapshot.get(key) for key in keys}
    tracked = _git(root, "ls-files", "--error-unmatch", "bench/__init__.py")  # else git knows a repository around it
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    diff = _git(root, "diff", "--no-color", "--no-ext-diff", "--no-textconv", "HEAD")
    if tracked is None or commit is None or diff is None:
        return dict.fromkeys(keys)
    new = (_git(root, "ls-files", "--others", "--exclude-standard") or "").splitlines()
    diff = "".join(f"new file: {name}\n" for name in new) + diff  # git apply skips what comes before a diff
    return {"commit": commit.strip(), "dirty": bool(diff), "diff": diff}


def snapshot_of(root: Path) -> dict[str, Any]:
    """What `snapshot.json` says where the tree is a snapshot (`slurm.snapshot`); else empty."""
    snapshot: dict[str, Any] = read_json(root / "snapshot.json", dict)
    return snapshot


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


def gpu_versions(device: str) -> dict[str, str | None]:
    """`driver`, `cuda` and `cudnn` on a GPU; None each on a CPU."""
    if not device.startswith("cuda"):
        return {"driver": None, "cuda": None, "cudnn": None}
    import torch

    drivers = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or ""
    cudnn = torch.backends.cudnn.version()
    return {
        "driver": next(iter(drivers.split()), None),  # one line for each GPU
        "cuda": torch.version.cuda,
        "cudnn": None if cudnn is None else str(cudnn),
    }


@lru_cache(maxsize=1)
def _read_code() -> tuple[str, dict[str, str]]:
    """Hash of all, and of each. Read once, so that the hash is of the files listed, whatever is edited meanwhile."""
    digest, files = hashlib.sha256(), {}
    for path in sorted(
        [*(ROOT / "methods").rglob("*.py"), *(ROOT / "bench").rglob("*.py"), *(ROOT / "bench").rglob("*.safetensors")]
    ):
        relative = path.relative_to(ROOT)
        if relative.parts[0] == "bench" and PRESENTATION & {part.removesuffix(".py") for part in relative.parts[1:]}:
            continue
        content = path.read_bytes()
        digest.update(f"{relative.as_posix()}\n".encode() + content)
        files[relative.as_posix()] = hashlib.sha256(content).hexdigest()[:12]
    return digest.hexdigest()[:12], files


def _git(root: Path, *arguments: str) -> str | None:
    """A git command's output; None outside a git checkout."""
    return _output("git", "--no-optional-locks", "-C", str(root), *arguments)


def _output(*command: str) -> str | None:
    """What a command prints; None if it is not installed or fails. Bytes that are no text, as a diff can hold, are escaped."""
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.decode(errors="backslashreplace") if done.returncode == 0 else None
