"""How is the state of a sharded run kept, and how does it become an ordinary run's?

A checkpoint is a folder into which each rank writes its parts (torch.distributed.checkpoint, as safetensors of about a
gigabyte), with the counters and digests of them and of every file. It gets its name when all is written; the last two are
kept, one that any rank finds damaged is passed over by all with a warning, another number of ranks can read it, and loading
executes nothing. At the end of training the weights and averages are gathered, one tensor at a time, into a checkpoint as
`bench.checkpoint` writes them.
"""

import errno
import json
import os
import shutil
import struct
import warnings
from collections.abc import Iterable, Mapping
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from bench.checkpoint import KEPT, digest_of, take_in
from bench.config import RunConfig
from bench.data.source import hash_file
from bench.distributed import World, local, whole
from bench.files import read_text, write_json_atomically
from bench.training_state import counters_of, optimizer_entries, take_counters, tensors_of

if TYPE_CHECKING:
    from bench.trainer import Trainer

SUFFIX = ".sharded"
FILE_BYTES = 1_000_000_000  # of a rank's part in each of its files: the library holds a file three times while it writes it
DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"},
}  # as safetensors calls them


def check(config: RunConfig, folder: Path, world: World) -> None:
    """ValueError in one sentence if the run in this folder was begun in the other way, or cannot be sharded."""
    sharded = config.system.shard == "full"
    if sharded and config.train.init_from:
        raise ValueError("system.shard is full, and train.init_from starts from a whole network: set one of them to its default")
    if sharded and config.evaluation.curve_every:
        raise ValueError(
            "system.shard is full, and evaluation.curve_every scores weights on the way, which are not gathered before the end: "
            "set evaluation.curve_every=0"
        )
    if sharded and world.size == 1:
        raise ValueError(
            "system.shard is full, but there is only one rank to hold the parts: start more (a profile with tasks_per_node, or "
            "torchrun), or set system.shard=none"
        )
    begun_sharded, begun_whole = bool(list_checkpoints(folder)), any(folder.glob("checkpoints/step-*.safetensors"))
    if (begun_whole and sharded and not begun_sharded) or (begun_sharded and not sharded):
        begun_with = "full" if begun_sharded else "none"
        raise ValueError(f"run {folder.name} was begun with system.shard={begun_with}: go on so, or delete its folder")


def list_checkpoints(folder: Path) -> list[Path]:
    """Of the run in that folder, oldest first."""
    return sorted(folder.glob(f"checkpoints/step-*{SUFFIX}"))


def save(trainer: "Trainer") -> None:
    """Write the state after the trainer's step and remove all but the last two. All ranks take part."""
    assert trainer.folder is not None
    world, path = trainer.world, trainer.folder / "checkpoints" / f"step-{trainer.steps_done:09d}{SUFFIX}"
    temporary = path.parent / f".tmp-{path.name}"
    with world.together():
        if world.is_main:
            for leftover in path.parent.glob(".tmp*"):  # of processes killed while they wrote
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            temporary.mkdir(parents=True)
    saved = _saved(tensors_of(trainer))
    files = file_numbers(saved, FILE_BYTES)
    writer = dcp.HuggingFaceStorageWriter(str(temporary), fqn_to_index_mapping=files, save_distributed=True)
    try:
        dcp.save(saved, storage_writer=writer)
    except CheckpointException as error:  # of whichever rank; on all
        raise OSError(errno.EIO, _first_failure(error), str(temporary)) from None
    with world.together():
        listed = _names(temporary)
    names = sorted({*chain(*world.of_all(listed))})  # a folder on the network may show a rank an old list
    with world.together():
        own = _digests(temporary, names, world)
    digests = _merged(world.of_all(own))
    with world.together():
        if world.is_main:
            counters = counters_of(trainer)
            record = {"counters": counters, "digest": digest_of(counters).hexdigest(), "digests": digests}
            write_json_atomically(temporary / "counters.json", record)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(temporary, path)
            there = list_checkpoints(trainer.folder)
            kept = [other for other in there if other <= path][-KEPT:]
            for other in there:
                if other not in kept:
                    shutil.rmtree(other)


def file_numbers(tensors: Mapping[str, Tensor], file_bytes: int) -> dict[str, int]:
    """Name -> which of a rank's files, from 1 on, takes its part: a file gets what begins in its `file_bytes` of all parts in
    a row. Rank 0, whose parts are the largest, says it for all.
    """
    sizes = [local(tensor).nbytes for tensor in tensors.values()]
    ends = accumulate(sizes)
    return {name: 1 + (end - size) // file_bytes for name, size, end in zip(tensors, sizes, ends, strict=True)}


def load_latest(trainer: "Trainer") -> dict[str, Any] | None:
    """Be where the newest checkpoint was made that all ranks find sound; its counters, None if there is none. All take part.

    ValueError if there are some and all are damaged, or if it is of another network.
    """
    assert trainer.folder is not None
    world, folder = trainer.world, trainer.folder / "checkpoints"
    listed = world.of_all([path.name for path in list_checkpoints(trainer.folder)])
    for name in sorted({name for of_rank in listed for name in of_rank}, reverse=True):
        counters = _counters_if_sound(folder / name, world)
        if counters is not None:
            _load(trainer, folder / name)
            take_counters(trainer, counters)
            return counters
        message = (
            f"checkpoint {folder / name} is damaged (not on every rank do its contents match its checksums): it is passed over"
        )
        warnings.warn(message, stacklevel=2)
    if any(listed):
        raise ValueError(f"every checkpoint in {folder} is damaged: delete that folder to train from the start")
    return None


def gather(trainer: "Trainer") -> Path:
    """Leave an ordinary checkpoint without the optimiser's state, which an ordinary trainer restores. All ranks take part."""
    assert trainer.folder is not None
    tensors = {name: tensor for name, tensor in tensors_of(trainer).items() if not name.startswith("optimizer.")}
    path = trainer.folder / "checkpoints" / f"step-{trainer.steps_done:09d}.safetensors"
    write_whole(path, tensors, counters_of(trainer), trainer.world)
    return path


def write_whole(path: Path, tensors: Mapping[str, Tensor], counters: dict[str, Any], world: World) -> None:
    """As `bench.checkpoint.save` writes them; no rank ever holds more than its parts and one tensor."""
    names, temporary = sorted(tensors), path.with_suffix(".tmp")
    unknown = "0" * 64  # the digest's place: it is known when all is written
    header: dict[str, Any] = {"__metadata__": {"counters": json.dumps(counters, sort_keys=True), "digest": unknown}}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = digest_of(counters)
    with world.together():
        file = open(temporary, "wb") if world.is_main else None  # noqa: SIM115
        if file:
            file.write(struct.pack("<Q", len(text)) + text)
    try:
        for name in names:
            tensor = whole(tensors[name].detach()).cpu().contiguous()
            with world.together():
                if file:
                    file.write(take_in(digest, name, tensor))
        with world.together():
            if file:
                file.seek(8 + text.index(unknown.encode()))
                file.write(digest.hexdigest().encode())
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
    finally:
        if file:
            file.close()
            temporary.unlink(missing_ok=True)


def take_whole(trainer: "Trainer", path: Path) -> None:
    """Be, only to be scored, where an ordinary checkpoint was made, one tensor after the other. All ranks take part."""
    assert trainer.only_scored
    with trainer.world.together(), safe_open(path, framework="pt") as file:
        there = set(file.keys())
        for name, tensor in tensors_of(trainer).items():
            average = f"ema.{name.removeprefix('model.')}"
            tensor.copy_(file.get_tensor(average if average in there else name))
        take_counters(trainer, json.loads(file.metadata()["counters"]))


def _load(trainer: "Trainer", path: Path) -> None:
    reader = dcp.HuggingFaceStorageReader(str(path))
    with trainer.world.together():
        there = reader.read_metadata().state_dict_metadata
    present = tensors_of(trainer) | optimizer_entries(trainer, there)
    saved = _saved(present)
    unfit = sorted(saved.keys() ^ there.keys()) + [n for n in saved.keys() & there.keys() if saved[n].shape != there[n].size]  # type: ignore[union-attr]
    if unfit:
        raise ValueError(f"the checkpoint {path} does not fit the network ({', '.join(unfit[:5])}): give one of the same sizes")
    dcp.load(saved, storage_reader=reader)


def _saved(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The same storage; what has no dimension gets one, which the format needs."""
    return {name: tensor.view(1) if tensor.dim() == 0 else tensor for name, tensor in tensors.items()}


def _counters_if_sound(path: Path, world: World) -> dict[str, Any] | None:
    """None unless every rank finds the same files, as they were recorded. All judge by what all have found, and so agree."""
    found = world.of_all(_found(path, world))
    record, names, _ = found[0]
    if any(each[:2] != (record, names) for each in found):
        return None
    try:
        kept = json.loads(record)
        sound = kept["digest"] == digest_of(kept["counters"]).hexdigest()
        return kept["counters"] if sound and kept["digests"] == _merged(digests for _, _, digests in found) else None
    except (json.JSONDecodeError, KeyError, TypeError):
        return None


def _found(path: Path, world: World) -> tuple[str, list[str], dict[str, str]]:
    """What this rank can read of a checkpoint: its record (as text, in which NaN is NaN), its files, the digests of a share."""
    try:
        names = _names(path)
        return read_text(path / "counters.json"), names, _digests(path, names, world)
    except (OSError, ValueError):
        return "", [], {}


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def _digests(folder: Path, names: list[str], world: World) -> dict[str, str]:
    """File -> SHA-256 for this rank's share of the files."""
    return {name: hash_file(folder / name) for name in names[world.rank :: world.size]}


def _merged(of_ranks: Iterable[dict[str, str]]) -> dict[str, str]:
    return {name: digest for of_rank in of_ranks for name, digest in of_rank.items()}


def _first_failure(error: CheckpointException) -> str:
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {cause}"
