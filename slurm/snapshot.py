"""Which code does a queued job run? That of a snapshot, taken when it was submitted: editing changes nothing that is queued.

A snapshot is a folder named by the hash of what is in it, and of the commit and the uncommitted changes that it was taken
from. Taking the same twice gives the same folder. It holds `snapshot.json`, from which provenance is told (`bench.provenance`).
"""

import hashlib
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.config import content_hash
from bench.files import make_folder, write_json_atomically
from bench.provenance import code_difference, snapshot_of, version_of

PACKAGES = ("bench", "methods", "slurm")
ENDINGS = (".py", ".yaml", ".safetensors", ".sh")


def take_snapshot(source: Path, store: Path) -> Path:
    """The code of `source` (a repository, or where it is installed) as `store/HASH`, read-only; from a snapshot, that snapshot.

    Several may take one at once. ValueError in one sentence if it cannot be written, or if the one that is there was changed.
    """
    if (source / "snapshot.json").exists():
        _refuse_if_changed(source)
        return source
    contents = {name: (source / name).read_bytes() for name in _list_files(source)}
    if not any(name.startswith("bench/") for name in contents):
        raise ValueError(f"{source} holds no code of timestep-bench: give the repository, or the folder that it is installed in")
    record = {**version_of(source), "files": {name: _file_hash(content) for name, content in contents.items()}}
    target = store.resolve() / content_hash(record, 16)
    if not target.exists():
        make_folder(target.parent)
        try:
            _write(contents, record, target)
        except OSError as error:
            raise ValueError(f"cannot write to {store} ({error.strerror}): choose a folder that can be written") from None
    _refuse_if_changed(target)
    return target


def _list_files(root: Path) -> list[str]:
    """What a job needs, as relative names."""
    found = [path for package in PACKAGES for path in (root / package).rglob("*") if path.suffix in ENDINGS and path.is_file()]
    project = [path for path in [root / "pyproject.toml"] if path.is_file()]  # not where it is installed
    return sorted(path.relative_to(root).as_posix() for path in found + project)


def _write(contents: Mapping[str, bytes], record: Mapping[str, Any], target: Path) -> None:
    """Under a temporary name, then renamed: a snapshot that can be seen is complete."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        for name, content in contents.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            path.chmod(0o555 if path.suffix == ".sh" else 0o444)
        made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        write_json_atomically(temporary / "snapshot.json", {"hash": target.name, "made": made, **record})
        (temporary / "snapshot.json").chmod(0o444)
        temporary.chmod(0o755)  # mkdtemp's is closed to others, also to other members of a project
        temporary.rename(target)
    except OSError:
        if not target.is_dir():  # else another process took the same at the same time, and was first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refuse_if_changed(folder: Path) -> None:
    """ValueError naming what differs. It is not mended: jobs that are queued or running may have been given it."""
    snapshot = snapshot_of(folder)
    now = {name: _file_hash((folder / name).read_bytes()) for name in _list_files(folder)}
    record = {key: snapshot.get(key) for key in ("commit", "dirty", "diff", "files")}
    differences = code_difference(record["files"] or {}, now)
    if not differences and content_hash(record, 16) != snapshot.get("hash"):
        differences = ["snapshot.json changed"]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(
            f"the code snapshot {folder} is damaged ({', '.join(differences[:3])}{more}): "
            "cancel the jobs that were given it, delete it and submit again"
        )


def _file_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
