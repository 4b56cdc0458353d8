"""How do the jobs of experts become the run that one job would have trained?

The same bytes of weights, averages, optimiser's state and held-out losses; times are summed, as are the images and
seconds that crashes undid. Each file is written at once, the checkpoint last, and assembling again gives the same.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.checkpoint import Checkpoint
from bench.curve import keep_weights, kept_weights, load_weights
from bench.experts import check_same, final_checkpoint
from bench.files import read_json, write_json_atomically, write_text_atomically
from bench.heldout import bin_rows, joined_items
from bench.intervals import steps_per_interval
from bench.learning_rate import lr_factor
from bench.method import load_exactly
from bench.run_folder import summary_of
from bench.runs import Run, expert_folder, read_metric_rows
from bench.trainer import Trainer
from bench.training_state import take, tensors_of


def assemble(trainer: Trainer) -> None:
    """Make `trainer` (of all experts, untrained, in the run's folder) what joint training would have made it, and save that.

    The caller holds the folder; rank 0 does this, and all ranks have it then. Done again, it leaves the same. ValueError if an
    expert is not at its end, belongs to another run, or was not trained from the same weights.
    """
    with trainer.world.together():
        if trainer.world.is_main:
            _join(trainer)
    trainer.save()
    trainer.restore()
    trainer.flush()


def _join(trainer: Trainer) -> None:
    """All but the checkpoint, which makes it a run that is trained."""
    folder = trainer.folder
    assert folder is not None
    places = [expert_folder(folder, interval.index) for interval in trainer.method.intervals]
    for place in places:
        check_same(trainer.config, place)
    rows = joined_rows(trainer, [read_metric_rows(place) for place in places])
    start = {name: tensor.detach().cpu().clone() for name, tensor in tensors_of(trainer).items()}
    final = _joined_checkpoint(trainer, start, places)
    _join_curve(trainer, start, places, {row["step"]: row for row in rows})
    write_text_atomically(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    _join_provenance(folder, places)
    take(trainer, final)


def summary_of_jobs(trainer: Trainer, initial_flops: float) -> dict[str, Any]:
    """What `summary.json` holds of an assembled run: costs are sums, memory is the most that any job took, and images per
    second are those of the jobs one after the other.
    """
    assert trainer.folder is not None
    jobs = [read_json(expert_folder(trainer.folder, i.index) / "summary.json", dict) for i in trainer.method.intervals]
    seconds = sum(job["images_seen"] / job["train_images_per_second"] for job in jobs if job["train_images_per_second"])
    return {
        **summary_of(trainer, initial_flops),
        "train_images_per_second": trainer.images_seen / seconds if seconds else None,
        "peak_memory_bytes": max(job["peak_memory_bytes"] for job in jobs),
    }


def joined_rows(trainer: Trainer, of_experts: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The lines that one job of all experts would have written, from those of the experts' jobs."""
    seconds = [0.0] * len(of_experts)
    by_step: dict[int, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: {"train": [], "heldout items": []})
    for index, row in ((index, row) for index, rows in enumerate(of_experts) for row in rows):
        by_step[row["step"]][row["kind"]].append({**row, "expert": index})
    joined: list[dict[str, Any]] = []
    for step, told in sorted(by_step.items()):
        for row in (*told["train"], *told["heldout items"]):
            seconds[row.pop("expert")] = row["device_seconds"]
        place = _place(trainer, step, sum(seconds))
        train = [{**row, **place, "lr": _lr_before(trainer, step)} for row in told["train"]]
        items = joined_items(trainer.heldout, told["heldout items"]) if told["heldout items"] else None
        heldout = [{"kind": "heldout", **place, **row} for row in bin_rows(trainer.heldout, items)] if items is not None else []
        in_window = step % trainer.config.system.log_every  # then only the end of training writes what is left of it
        joined += heldout + train if in_window else train + heldout
    return joined


def _place(trainer: Trainer, step: int, device_seconds: float) -> dict[str, Any]:
    batch_size = trainer.config.train.batch_size
    return {
        "step": step,
        "images_seen": step * batch_size,
        "train_flops": step * trainer.cost.train_flops(batch_size, trainer.num_passes),
        "device_seconds": round(device_seconds, 3),
    }


def _lr_before(trainer: Trainer, step: int) -> float:
    """Of the last of `step` steps, whichever expert took it."""
    images = (step - 1) * trainer.config.train.batch_size
    return trainer.base_lrs[0] * lr_factor(trainer.config.train, trainer.budget.progress(step - 1, 0.0), images)


def _joined_checkpoint(trainer: Trainer, start: Mapping[str, Tensor], places: list[Path]) -> Checkpoint:
    tensors, counters = Joined(start), []
    for index, place in enumerate(places):  # one after the other: each holds the untrained copies of all the others, too
        found = final_checkpoint(trainer, place)
        tensors.add(index, found.tensors)
        counters.append(found.counters)
    updates = [sum(of_jobs) for of_jobs in zip(*(c["updates"] for c in counters), strict=True)]
    assert updates == steps_per_interval(trainer.budget.num_steps or 0, trainer.method.intervals, trainer.config.seed)
    summed = {
        "updates": updates,
        "device_seconds": sum(c["device_seconds"] for c in counters),
        "lost": {unit: sum(c["lost"][unit] for c in counters) for unit in counters[0]["lost"]},
        "ema_images_seen": {name: sum(c["ema_images_seen"][name] for c in counters) for name in counters[0]["ema_images_seen"]},
    }
    return Checkpoint(tensors.merged, {**counters[0], **summed})


class Joined:
    """Tensors that jobs have changed, each its own, on top of those that all of them began with."""

    def __init__(self, start: Mapping[str, Tensor]) -> None:
        self.start, self.merged = start, dict(start)
        self.changed_by: dict[str, int] = {}

    def add(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """ValueError if a job changed what another has changed: then they did not begin with the same."""
        if missing := sorted(self.start.keys() - tensors.keys()):
            raise ValueError(f"expert {index} has left no {', '.join(missing[:5])}: delete the run folder to train again")
        for name, tensor in tensors.items():
            if name in self.start and _same_bytes(tensor, self.start[name]):
                continue
            if name in self.changed_by:
                raise ValueError(
                    f"experts {self.changed_by[name]} and {index} have both changed {name}, as jobs that began with different "
                    "weights do: delete the run folder to train again"
                )
            self.changed_by[name] = index
            self.merged[name] = tensor


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    """Nought and minus nought differ."""
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _join_curve(trainer: Trainer, start: Mapping[str, Tensor], places: list[Path], at_step: Mapping[int, dict[str, Any]]) -> None:
    """The weights that were kept on the way, at the places where all jobs have kept theirs."""
    assert trainer.folder is not None
    weights = {name.removeprefix("model."): tensor for name, tensor in start.items() if name.startswith("model.")}
    names = set.intersection(*({path.name for path in kept_weights(place)} for place in places))
    for name in sorted(names):
        joined = Joined(weights)
        for index, place in enumerate(places):
            kept, where = load_weights(place / "snapshots" / name)
            joined.add(index, kept)
        load_exactly(trainer.method, joined.merged, name)
        place_of_all = {key: at_step[where["step"]][key] for key in _place(trainer, 0, 0.0)}
        keep_weights(trainer.folder, trainer.method, place_of_all)


def _join_provenance(folder: Path, places: Iterable[Path]) -> None:
    """The sessions of all jobs, and all code that has trained what the run now holds."""
    own = Run(folder).provenance
    sessions = [{**session, "expert": int(place.name)} for place in places for session in Run(place).provenance["sessions"]]
    sessions += [session for session in own["sessions"] if "expert" not in session]
    code_hash = "+".join(dict.fromkeys(session["code_hash"] for session in sessions))
    write_json_atomically(folder / "provenance.json", {**own, "code_hash": code_hash, "sessions": sessions})
