"""What is written into a run's folder before it begins: its configuration, and who begins it?"""

import warnings
from pathlib import Path
from typing import Any

from bench.config import RunConfig, content_hash, scientific_part
from bench.files import read_yaml, write_json_atomically, write_text_atomically
from bench.provenance import provenance
from bench.runs import Run

OF_SESSION = (
    *("started", "commit", "dirty", "code_hash", "snapshot", "host", "node", "slurm", "device", "driver", "world_size"),
    *("libraries", "command"),
)


def place_config(config: RunConfig, folder: Path) -> None:
    """Make the run known: its folder, with its configuration. ValueError if it cannot be written or holds another run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "config.yaml").exists():
            there = read_yaml(folder / "config.yaml")
            scientific = scientific_part(there)
            if content_hash(scientific) != content_hash(config.scientific):
                other = f"{there.get('method')}-{content_hash(scientific)}"
                raise ValueError(f"{folder} holds another run ({other}, not {config.run_id}): choose another folder")
        write_text_atomically(folder / "config.yaml", config.to_yaml())
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}): choose a folder that can be written") from None


def prepare_folder(config: RunConfig, folder: Path, world_size: int = 1) -> None:
    """As `place_config`, with the provenance of this process, which begins or goes on with the run."""
    place_config(config, folder)
    try:
        for leftover in (*folder.glob(".*.tmp"), *folder.glob("snapshots/.*.tmp")):  # of a process killed while it wrote
            leftover.unlink()
        if not ((folder / "done").exists() and (folder / "provenance.json").exists()):
            write_json_atomically(folder / "provenance.json", _add_session(folder, config, world_size))
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}): choose a folder that can be written") from None


def _add_session(folder: Path, config: RunConfig, world_size: int) -> dict[str, Any]:
    """The provenance of this process, with all sessions whose work the run's checkpoints hold."""
    now = provenance(config.system.device, config.train.threads, world_size)
    begun = any((folder / "checkpoints").glob("step-*"))
    before = Run(folder).provenance.get("sessions", []) if begun else []
    session = {key: now[key] for key in OF_SESSION}
    hashes = list(dict.fromkeys(each["code_hash"] for each in [*before, session]))
    if len(hashes) > 1:
        others = ", ".join(hashes[:-1])
        warnings.warn(f"run {folder.name} was begun by other code ({others}) and goes on with {hashes[-1]}", stacklevel=2)
    return {**now, "code_hash": "+".join(hashes), "sessions": [*before, session]}
