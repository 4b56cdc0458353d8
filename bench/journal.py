"""Which numbers does training leave behind, and where?

`metrics.jsonl` gets one line per trained interval and window of steps, and one per timestep bin of the held-out loss;
`snapshots/` what a method shows of itself over training; `progress.json` is a heartbeat. A resumed run first rewinds
them to its checkpoint, so no line appears twice.
"""

import json
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.intervals import Interval
from bench.method import Diagnostics
from bench.runs import write_json_atomically


class Diverged(RuntimeError):
    """A loss is not finite. The message names the term, the step and the timesteps."""


class Record:
    """One optimiser step, left on the device until it is looked at."""

    def __init__(self, interval: Interval, step: int, losses: dict[str, Tensor], samples: dict[str, Tensor], t: Tensor) -> None:
        self.interval, self.step, self.losses, self.samples, self.t = interval, step, losses, samples, t

    def check(self) -> None:
        for name, per_sample in self.samples.items():
            bad = ~torch.isfinite(per_sample)
            if bad.any():
                listed = ", ".join(f"{t:g}" for t in self.t[bad].tolist()[:10])
                raise Diverged(f"loss term {name!r} is {per_sample[bad][0]:g} at step {self.step} for timesteps {listed}")
        for name, loss in self.losses.items():
            if not torch.isfinite(loss):
                listed = ", ".join(f"{t:g}" for t in self.t.tolist()[:10])
                raise Diverged(f"{name!r} is {loss:g} at step {self.step}, a batch of {len(self.t)} timesteps: {listed} ...")


class Journal:
    """Writes into `folder`; without one, only checks."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.pending: list[Record] = []
        self.num_checked = 0

    def record(self, record: Record) -> None:
        self.pending.append(record)

    def check_finite(self) -> None:
        """Raise Diverged at the first step since the last check whose numbers are not finite."""
        for record in self.pending[self.num_checked :]:
            record.check()
        self.num_checked = len(self.pending)

    def flush(self, place: dict[str, Any], lr: float) -> float:
        """Write one line per interval for the steps since the last flush; returns their mean loss."""
        by_interval: dict[Interval, list[Record]] = defaultdict(list)
        for record in self.pending:
            by_interval[record.interval].append(record)
        losses = []
        for interval, records in sorted(by_interval.items()):
            names = records[0].losses
            means = {name: float(torch.stack([r.losses[name] for r in records]).mean()) for name in names}
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
        for path in sorted(self.folder.glob("snapshots/images-*.npz")) if self.folder else []:
            with np.load(path, allow_pickle=False) as arrays:
                found[int(path.stem.removeprefix("images-"))] = dict(arrays)
        return found

    def heartbeat(self, place: dict[str, Any]) -> None:
        """How far the run is, for whoever watches, and to tell after a crash what it undid."""
        if self.folder:
            write_json_atomically(self.folder / "progress.json", {**place, "time": time.time()})

    def last_heartbeat(self) -> dict[str, Any] | None:
        path = self.folder / "progress.json" if self.folder else None
        return json.loads(path.read_text()) if path and path.exists() else None

    def position(self) -> dict[str, int]:
        """Where the journal stands, for `rewind`."""
        path = self.folder / "metrics.jsonl" if self.folder else None
        latest = max(self.snapshots(), default=-1)
        return {"metrics_bytes": path.stat().st_size if path and path.exists() else 0, "latest_snapshot": latest}

    def rewind(self, position: dict[str, int] | None) -> None:
        """Drop what was written after a checkpoint (None: everything)."""
        if self.folder is None:
            return
        position = position or {"metrics_bytes": 0, "latest_snapshot": -1}
        path = self.folder / "metrics.jsonl"
        if path.exists():
            with open(path, "rb+") as file:
                file.truncate(position["metrics_bytes"])
        for snapshot in self.folder.glob("snapshots/images-*.npz"):
            if int(snapshot.stem.removeprefix("images-")) > position["latest_snapshot"]:
                snapshot.unlink()
