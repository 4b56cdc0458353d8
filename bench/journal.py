"""Which numbers does training leave behind, and where?

`metrics.jsonl` gets one line per trained interval and window of steps, and one per timestep bin of the held-out loss;
`snapshots/` what a method shows of itself over training; `progress.json` is a heartbeat. A resumed run first rewinds
them to its checkpoint, so no line appears twice.
"""

import json
import math
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.curve import WEIGHTS
from bench.distributed import World
from bench.files import read_json, write_json_atomically
from bench.intervals import Interval
from bench.method import Diagnostics

SNAPSHOTS = "snapshots/images-*.npz"
NAMED = 20  # timesteps that a message lists


class Diverged(RuntimeError):
    """A loss is not finite: which term, at which step, for which timesteps (different ones, ascending)."""

    def __init__(self, term: str, value: float, step: int, timesteps: list[float], whole_batch: bool) -> None:
        self.term, self.value, self.step, self.timesteps = term, value, step, timesteps
        listed = ", ".join(f"{t:g}" for t in timesteps[:NAMED])
        more = f" and {len(timesteps) - NAMED} more" if len(timesteps) > NAMED else ""
        where = "a batch of timesteps" if whole_batch else "for timesteps"
        super().__init__(f"loss term {term!r} is {value:g} at step {step}, {where} {listed}{more}")


class Record:
    """What an optimiser step trained of one interval, left on the device until it is looked at. Losses are those of all ranks,
    samples this rank's, of all that it trained in the step.
    """

    def __init__(self, interval: Interval, step: int, losses: dict[str, Tensor], samples: dict[str, Tensor], t: Tensor) -> None:
        self.interval, self.step, self.samples, self.t = interval, step, samples, t
        self.losses = {name: loss.float() for name, loss in losses.items()}

    def unfit(self) -> list[str]:
        """The losses that are not finite."""
        return [name for name, loss in self.losses.items() if not torch.isfinite(loss)]

    def diverged(self, world: World) -> Diverged:
        """With the same message on all ranks: the first term with samples that are not finite names them, anything else (a
        penalty, the gradient's norm) the whole batch.
        """
        t, unfit = world.gather(self.t), self.unfit()[0]
        for name, own in self.samples.items():
            per_sample = world.gather(own)
            bad = ~torch.isfinite(per_sample)
            if bad.any():
                return Diverged(name, float(per_sample[bad][0]), self.step, t[bad].unique().tolist(), whole_batch=False)
        return Diverged(unfit, float(self.losses[unfit]), self.step, t.unique().tolist(), whole_batch=True)


class Journal:
    """Writes into `folder`; without one, only checks."""

    def __init__(self, folder: Path | None, world: World) -> None:
        self.folder, self.world = folder, world
        self.pending: list[Record] = []
        self.num_checked = 0

    def record(self, record: Record) -> None:
        self.pending.append(record)

    def check_finite(self) -> None:
        """Raise Diverged at the first step since the last check whose numbers are not finite."""
        fresh = self.pending[self.num_checked :]
        losses = [loss for record in fresh for loss in record.losses.values()]
        if losses and not torch.stack(losses).isfinite().all():  # all at once: each look at a number waits for the device
            bad = [record for record in fresh if record.unfit()]
            of_step = [record for record in bad if record.step == bad[0].step]
            # of its intervals the one whose own loss it is: the gradient's norm, which is bad with it, is of all
            raise min(of_step, key=lambda record: record.unfit() == ["grad_norm"]).diverged(self.world)
        self.num_checked = len(self.pending)

    def flush(self, place: dict[str, Any], lr: float) -> float:
        """Write one line per interval for the steps since the last flush; returns their mean loss.

        `num_steps` is how often they drew the interval: steps, or parts of steps where one trains several intervals.
        """
        by_interval: dict[Interval, list[Record]] = defaultdict(list)
        for record in self.pending:
            by_interval[record.interval].append(record)
        losses = []
        for interval, records in sorted(by_interval.items()):
            names = records[0].losses
            device = records[-1].t.device  # those that came out of a checkpoint are on the CPU
            means = {name: float(torch.stack([r.losses[name].to(device) for r in records]).mean()) for name in names}
            edges = {"interval": interval.index, "start": interval.start, "stop": interval.stop}
            self.write({"kind": "train", **place, **edges, "num_steps": len(records), **means, "lr": lr})
            losses += [means["loss"]] * len(records)
        self.pending, self.num_checked = [], 0
        return sum(losses) / len(losses) if losses else math.nan

    def write(self, row: dict[str, Any]) -> None:
        if self.folder:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")

    def snapshot(self, images_seen: int, diagnostics: Diagnostics) -> None:
        """Keep what a method shows of itself at this point of training."""
        if self.folder and diagnostics:
            (self.folder / "snapshots").mkdir(exist_ok=True)
            arrays = {name: array for name, (_, array) in diagnostics.items()}
            np.savez_compressed(self.folder / "snapshots" / f"images-{images_seen:012d}.npz", **arrays)  # type: ignore[arg-type]

    def snapshots(self) -> dict[int, dict[str, np.ndarray]]:
        """Images seen -> arrays by name, oldest first."""
        found: dict[int, dict[str, np.ndarray]] = {}
        for path in sorted(self.folder.glob(SNAPSHOTS)) if self.folder else []:
            with np.load(path, allow_pickle=False) as arrays:
                found[_images_of(path)] = dict(arrays)
        return found

    def heartbeat(self, place: dict[str, Any]) -> None:
        """How far the run is, for whoever watches, and to tell after a crash what it undid."""
        if self.folder:
            write_json_atomically(self.folder / "progress.json", {**place, "time": time.time()})

    def last_heartbeat(self) -> dict[str, Any] | None:
        return read_json(self.folder / "progress.json", dict) or None if self.folder else None

    def position(self) -> dict[str, Any]:
        """Where the journal stands, for `rewind`: what was written is on disk, as the checkpoint that holds this will be, and
        the (checked) records that no line tells of yet are in it.
        """
        pending = [
            {"interval": list(r.interval), "step": r.step, "losses": {name: float(loss) for name, loss in r.losses.items()}}
            for r in self.pending
        ]
        position: dict[str, Any] = {"metrics_bytes": 0, "latest_snapshot": -1, "pending": pending}
        if self.folder is None:
            return position
        path = self.folder / "metrics.jsonl"
        if path.exists():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
                position["metrics_bytes"] = file.seek(0, os.SEEK_END)
        for snapshot in (*self.folder.glob(SNAPSHOTS), *self.folder.glob(WEIGHTS)):
            position["latest_snapshot"] = max(position["latest_snapshot"], _images_of(snapshot))
        return position

    def rewind(self, position: dict[str, Any] | None) -> None:
        """Drop what was written after a checkpoint (None: everything); ValueError if something from before it is gone."""
        if self.folder is None:
            return
        position = position or {"metrics_bytes": 0, "latest_snapshot": -1, "pending": []}
        self.pending = [_record(of_step) for of_step in position["pending"]]
        self.num_checked = len(self.pending)
        path = self.folder / "metrics.jsonl"
        size = path.stat().st_size if path.exists() else 0
        if size < position["metrics_bytes"]:
            raise ValueError(f"{path} lost lines that its checkpoint knows of: delete the run folder to train again")
        if size:
            with open(path, "rb+") as file:
                file.truncate(position["metrics_bytes"])
        for snapshot in (*self.folder.glob(SNAPSHOTS), *self.folder.glob(WEIGHTS)):
            if _images_of(snapshot) > position["latest_snapshot"]:
                snapshot.unlink()


def _record(of_step: dict[str, Any]) -> Record:
    """As it comes out of a checkpoint: checked, so without its samples."""
    losses = {name: torch.tensor(loss) for name, loss in of_step["losses"].items()}
    return Record(Interval(*of_step["interval"]), of_step["step"], losses, {}, torch.empty(0))


def _images_of(snapshot: Path) -> int:
    """In the file's name, after what it holds."""
    return int(snapshot.stem.rpartition("-")[2])
