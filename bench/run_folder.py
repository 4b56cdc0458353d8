"""What does a run leave in its folder, and how is the folder kept from harm?"""

import io
import itertools
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import checkpoint
from bench.arrays import read_trajectory
from bench.distributed import World
from bench.files import write_bytes_atomically, write_json_atomically
from bench.heldout import probe_of
from bench.journal import Diverged
from bench.lease import CANDIDATES, Held, Lease, LeaseLost, hold
from bench.prepare import prepare_folder
from bench.runs import expert_folders, read_run, read_samples
from bench.trainer import Interrupted, Trainer

OWN_JSON = ("provenance.json", "progress.json", "failure.json", "summary.json", "eval.json")
OWN = (  # patterns of all that a run writes
    *("config.yaml", *OWN_JSON, "metrics.jsonl", "diagnostics.npz", "curve.json", "samples.npz", "samples.npz.partial", ".*.tmp"),
    *("trajectory.npz", "log.txt", "lock", "done", "checkpoints/step-*", "checkpoints/.tmp*"),
    *("job.json", "restarts.json", ".claim"),
    *("snapshots/images-*.npz", "snapshots/weights-*.safetensors", "snapshots/.*.tmp"),
)


def clear(folder: Path) -> None:
    """Remove what a run has written; its folders too, unless they hold something else. ValueError while it is worked on."""
    with locked(folder):
        for place in expert_folders(folder).values():
            clear(place)
        for pattern in OWN:
            for path in folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in (*folder.glob(CANDIDATES), *folder.glob("parts")):
            shutil.rmtree(path)
    for emptied in (folder / "checkpoints", folder / "snapshots", folder / "experts", folder):
        if emptied.is_dir() and not any(emptied.iterdir()):
            emptied.rmdir()


@contextmanager
def locked(folder: Path, is_dead: Callable[[str], bool] | None = None) -> Iterator[Lease]:
    """Hold the run folder; ValueError if another process, here or on another machine, holds it. See `bench.lease.hold`."""
    with hold(folder, is_dead) as lease:
        yield lease


def guarded(lease: Lease, should_stop: Callable[[], bool]) -> Callable[[], bool]:
    """`should_stop`, which raises LeaseLost once another process may hold the run."""

    def should_stop_or_has_lost_it() -> bool:
        if lease.lost:
            lease.check()
        return should_stop()

    return should_stop_or_has_lost_it


def set_aside(folder: Path) -> Path:
    """Keep a run folder under another name in `set_aside` beside it, so that the run can start over; its new place."""
    shelf = folder.parent / "set_aside"
    shelf.mkdir(exist_ok=True)
    with locked(folder):
        code = str(read_run(folder).provenance.get("code_hash", "unknown"))
        names = (f"{folder.name}-{code}" + (f"-{n}" if n else "") for n in itertools.count())
        place = next(path for path in (shelf / name for name in names) if not path.exists())
        folder.rename(place)
    shutil.rmtree(place / "lease", ignore_errors=True)  # ours, which could not be found to be removed
    return place


@contextmanager
def held(trainer: Trainer, folder: Path, is_dead: Callable[[str], bool] | None) -> Iterator[None]:
    """Hold and prepare the folder; inside, the trainer stops at once if another process takes it over."""
    world, should_stop = trainer.world, trainer.should_stop
    with ExitStack() as stack:
        refusal: Held | None = None
        with world.together():
            if world.is_main:
                try:
                    ours = stack.enter_context(locked(folder, is_dead))
                except Held as error:  # no failure, and all are to know that
                    refusal = error
                else:
                    prepare_folder(trainer.config, folder, world.size)
                    (folder / "failure.json").unlink(missing_ok=True)
                    trainer.should_stop = guarded(ours, should_stop)
        if world.decide(refusal is not None, torch.device("cpu")):
            raise refusal or Held(f"rank 0 cannot begin run {folder.name}: see its message")
        yield


@contextmanager
def left_cause(folder: Path, world: World) -> Iterator[None]:
    """Whatever fails inside leaves `failure.json`: whether the run `failed` or `diverged`, and why in one sentence."""
    try:
        yield
    except (Interrupted, LeaseLost, Held):  # no failure; and what is another's now is not written to
        raise
    except Exception as error:
        known = isinstance(error, Diverged | ValueError)  # its message says it all
        state = "diverged" if isinstance(error, Diverged) else "failed"
        cause = str(error) if known else f"{type(error).__name__}: {error}"
        with suppress(OSError):  # a full disk, say: the error that is on its way up tells more
            if world.is_main:
                write_json_atomically(folder / "failure.json", {"state": state, "cause": cause})
        raise


def summary_of(trainer: Trainer, initial_flops: float) -> dict[str, Any]:
    """What `summary.json` holds: size and cost of a finished training."""
    seconds = trainer.device_seconds / trainer.world.size
    if trainer.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(trainer.device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
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


def read_back(folder: Path, scored: bool = True) -> None:
    """Every artefact is there and can be read; only then is a run done. ValueError names the one that cannot."""
    run = read_run(folder)
    found = {
        "summary.json": len(run.summary),
        "provenance.json": len(run.provenance),
        "metrics.jsonl": len(run.metrics),
        "diagnostics.npz": len(run.diagnostics),
    }
    if scored:
        found |= {
            "eval.json": len(run.evaluations),
            "samples.npz": len(samples) if (samples := read_samples(folder)) is not None else 0,
            "trajectory.npz": len(trajectory.images) if (trajectory := read_trajectory(folder)) is not None else 0,
        }
    if empty := [name for name, size in found.items() if not size]:
        raise ValueError(f"{', '.join(empty)} in {folder} is missing or empty: delete the folder and train the run again")
    for path in checkpoint.list_checkpoints(folder / "checkpoints"):
        checkpoint.load(path)
