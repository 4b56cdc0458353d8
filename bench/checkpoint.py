"""How is a run's state kept so that no crash can lose or damage it?

One safetensors file per checkpoint (tensors, and the counters as JSON in its header) with a digest of its contents,
written under a temporary name, flushed and renamed. The last two are kept; a damaged one is passed over with a
warning. Loading executes nothing.
"""

import errno
import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bench.distributed import World

KEPT = 2
ALONE = World()


class Checkpoint(NamedTuple):
    tensors: dict[str, Tensor]
    counters: dict[str, Any]
    digest: str = ""  # of both, as the file has it


def save(folder: Path, step: int, tensors: dict[str, Tensor], counters: dict[str, Any]) -> Path:
    """Write the state after `step` steps and remove all but the last two.

    Ones of later steps go too: the run was resumed from before them, as they were damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in (*folder.glob("*.tmp"), *folder.glob(".tmp*")):  # ours or safetensors', of a process killed while it wrote
        leftover.unlink()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"counters": json.dumps(counters, sort_keys=True), "digest": _digest(tensors, counters)}
    path = folder / f"step-{step:09d}.safetensors"
    temporary = path.with_suffix(".tmp")
    try:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # its message holds the system's, of a full disk say
            raise OSError(errno.EIO, str(error), str(temporary)) from None
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    there = list_checkpoints(folder)
    kept = [other for other in there if other <= path][-KEPT:]
    for other in there:
        if other not in kept:
            other.unlink()
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob("step-*.safetensors"))


def load(path: Path) -> Checkpoint:
    """Read one checkpoint; ValueError in one sentence if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        counters = json.loads(metadata["counters"])
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"checkpoint {path} cannot be read ({_short(error)}): delete it and resume from the one before"
        ) from None
    digest = _digest(tensors, counters)
    if digest != metadata.get("digest"):
        raise ValueError(f"checkpoint {path} is damaged (its contents do not match its checksum): delete it and resume")
    return Checkpoint(tensors, counters, digest)


def load_latest(folder: Path, world: World = ALONE) -> Checkpoint | None:
    """The newest sound checkpoint, None if there is none at all; ValueError if there are some and all are damaged.

    On several ranks, which all take part, it is the newest that all of them can load, with the same contents on each.
    """
    with world.together():
        own = [path.name for path in list_checkpoints(folder)]
    names = {name for of_rank in world.of_all(own) for name in of_rank}
    messages: list[str] = []
    for name in sorted(names, reverse=True):
        with world.together():
            found = _sound_or_why_not(folder / name)
        digests = world.of_all(found.digest if isinstance(found, Checkpoint) else None)
        if isinstance(found, Checkpoint) and set(digests) == {found.digest}:
            for message in messages:
                warnings.warn(message, stacklevel=2)
            return found
        elsewhere = f"checkpoint {folder / name} is damaged, missing or another one on some of the ranks: it is passed over"
        messages.append(elsewhere if isinstance(found, Checkpoint) else found)
        del found  # two may be more than the memory holds
    if messages and world.size > 1:
        for message in messages:
            warnings.warn(message, stacklevel=2)
        raise ValueError(
            f"no checkpoint in {folder} is sound on all of the {world.size} ranks: see that all find the same files there, or "
            "delete that folder to train from the start"
        )
    if messages:
        raise ValueError(f"every checkpoint in {folder} is damaged: delete that folder to train from the start")
    return None


def _sound_or_why_not(path: Path) -> Checkpoint | str:
    try:
        return load(path)
    except ValueError as error:
        return str(error)


def _digest(tensors: dict[str, Tensor], counters: dict[str, Any]) -> str:
    digest = digest_of(counters)
    for name in sorted(tensors):
        take_in(digest, name, tensors[name])
    return digest.hexdigest()


def digest_of(counters: dict[str, Any]) -> "hashlib._Hash":
    """A checkpoint's digest, before its tensors are taken in by the order of their names."""
    return hashlib.sha256(json.dumps(counters, sort_keys=True).encode())


def take_in(digest: "hashlib._Hash", name: str, tensor: Tensor) -> memoryview:
    """The tensor's bytes. It must be contiguous, and on the CPU."""
    content = tensor.reshape(-1).view(torch.uint8).numpy().data
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(content)
    return content


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
