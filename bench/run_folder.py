"""What does a run leave in its folder, and how is the folder kept from harm?"""

import fcntl
import io
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import checkpoint
from bench.files import write_bytes_atomically, write_json_atomically
from bench.heldout import probe_of
from bench.runs import read_run, read_samples
from bench.trainer import Trainer

OWN_JSON = ("provenance.json", "progress.json", "failure.json", "summary.json", "eval.json")
OWN = (  # patterns of all that a run writes
    *("config.yaml", *OWN_JSON, "metrics.jsonl", "diagnostics.npz", "samples.npz", "samples.npz.partial", ".*.tmp"),
    *("log.txt", "lock", "done", "checkpoints/step-*", "checkpoints/.tmp*", "snapshots/images-*.npz"),
)


def clear(folder: Path) -> None:
    """Remove what a run has written; its folders too, unless they hold something else. ValueError while it is worked on."""
    with locked(folder):
        for pattern in OWN:
            for path in folder.glob(pattern):
                path.unlink()
    for emptied in (folder / "checkpoints", folder / "snapshots", folder):
        if emptied.is_dir() and not any(emptied.iterdir()):
            emptied.rmdir()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder; ValueError if another process on this machine holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "w")  # noqa: SIM115  (held until the end of the block)
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}): choose a folder that can be written") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"run {folder.name} is being worked on by another process: wait for it or stop it first") from None
        yield


def leave_cause(folder: Path, state: str, cause: str) -> None:
    """`failure.json`: why a run `failed` or `diverged`, in one sentence."""
    with suppress(OSError):  # a full disk, say: the error that is on its way up tells more
        write_json_atomically(folder / "failure.json", {"state": state, "cause": cause})


def summary_of(trainer: Trainer, initial_flops: float) -> dict[str, Any]:
    """What `summary.json` holds: size and cost of a finished training."""
    seconds = trainer.device_seconds / trainer.world.size
    on_gpu = trainer.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    batch = trainer.config.train.batch_size
    return {
        "stored_parameters": sum(p.numel() for p in trainer.method.parameters()),
        "active_parameters": trainer.method.num_active_parameters(),
        "forward_macs_per_image": trainer.cost.forward_macs_per_image,
        "train_flops": trainer.train_flops,
        "images_seen": trainer.images_seen,
        "num_steps": trainer.steps_done,
        "updates_per_parameter_set": sorted({images // batch for images in trainer.ema.images_seen.values()}),
        "train_images_per_second": trainer.images_seen / seconds if seconds else None,
        "device_seconds": trainer.device_seconds,
        "lost_images": trainer.lost["images"],
        "lost_device_seconds": trainer.lost["device_seconds"],
        "peak_memory_bytes": peak,
        "initial_flops": None if initial_flops != initial_flops else initial_flops,
        "num_intervals": len(trainer.method.intervals),
    }


def write_diagnostics(trainer: Trainer, folder: Path) -> None:
    """`diagnostics.npz`: what the trained method shows of itself, and what it showed over training."""
    shown = trainer.method.diagnostics(probe_of(trainer.heldout, trainer.objective, trainer.device))
    intervals = np.array([[i.start, i.stop] for i in trainer.method.intervals])
    shown["intervals"] = (("interval", "edge"), intervals)
    arrays: dict[str, np.ndarray] = {}
    snapshots = trainer.journal.snapshots()
    for name, (axes, array) in shown.items():
        arrays[name] = array
        arrays[f"{name}/axes"] = np.array(axes)
        history = [of_point[name] for of_point in snapshots.values() if name in of_point]
        if len(history) == len(snapshots) > 0 and not all(np.array_equal(point, array) for point in history):
            arrays[f"{name}/history"] = np.stack(history)
    arrays["history/images_seen"] = np.array(list(snapshots))
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
    write_bytes_atomically(folder / "diagnostics.npz", content.getvalue())


def read_back(folder: Path) -> None:
    """Every artefact is there and can be read; only then is a run done. ValueError names the one that cannot."""
    run = read_run(folder)
    found = {
        "summary.json": len(run.summary),
        "eval.json": len(run.evaluations),
        "provenance.json": len(run.provenance),
        "metrics.jsonl": len(run.metrics),
        "diagnostics.npz": len(run.diagnostics),
        "samples.npz": len(samples) if (samples := read_samples(folder)) is not None else 0,
    }
    if empty := [name for name, size in found.items() if not size]:
        raise ValueError(f"{', '.join(empty)} in {folder} is missing or empty: delete the folder and train the run again")
    for path in checkpoint.list_checkpoints(folder / "checkpoints"):
        checkpoint.load(path)
