"""How does a suite become finished runs on one machine? What `tsbench demo` does."""

import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench import job
from bench.config import RunConfig
from bench.data import load_data
from bench.evaluate import EvalProtocol, floor_scores, protocol_of
from bench.files import make_folder, read_json, write_json_atomically
from bench.run_folder import clear, locked
from bench.suite import suite_configs
from slurm.local import Job, run_side_by_side

SPENT = {"images": "images_seen", "train_flops": "train_flops", "device_seconds": "device_seconds"}  # unit: in progress.json


@dataclass(frozen=True)
class Plan:
    """The runs of a suite in a folder. Making one writes nothing and refuses what is not allowed."""

    out: Path
    configs: tuple[RunConfig, ...]
    step_flops: tuple[float, ...]  # of each run: the costliest starts first
    protocol: EvalProtocol  # of the first run: what the floor is measured by

    @property
    def folders(self) -> list[Path]:
        return [self.out / "runs" / config.run_id for config in self.configs]

    @property
    def protocol_hash(self) -> str:
        return self.protocol.hash


def make_plan(suite: dict[str, Any], out: Path, overrides: list[str]) -> Plan:
    """ValueError in one sentence if a run of the suite is not possible."""
    configs = suite_configs(suite, overrides, job.make_config)
    step_flops = tuple(job.check(config).train_flops(config.train.batch_size) for config in configs)
    return Plan(out, tuple(configs), step_flops, protocol_of(configs[0].evaluation, load_data(configs[0].data)))


def run_plan(plan: Plan, workers: int, console: Console) -> dict[str, str]:
    """Train and score every run that is not done already; run -> cause for those that failed."""
    write_floor(plan)
    jobs, num_reused = [], 0
    for config, folder, flops in zip(plan.configs, plan.folders, plan.step_flops, strict=True):
        if job.is_scored(config, folder):
            num_reused += 1
            continue
        with locked(folder):
            job.prepare_folder(config, folder)
        jobs.append(Job(folder, config.label or config.method, config.train.threads, flops))
    if num_reused:
        console.print(f"{num_reused} of {len(plan.configs)} runs are done and are used as they are (--fresh starts over).")
    with Watch(plan.configs, jobs, console) as watch:
        return run_side_by_side(jobs, workers, watch)


def write_floor(plan: Plan) -> None:
    """`floor.json`: real data against real data."""
    path, protocol = plan.out / "floor.json", plan.protocol
    if read_json(path, dict).get("protocol_hash") == protocol.hash:
        return
    metrics = floor_scores(protocol, load_data(plan.configs[0].data))
    make_folder(plan.out)
    record = {"protocol_hash": protocol.hash, "protocol": protocol.content, "n": protocol.num_samples, "metrics": metrics}
    write_json_atomically(path, record)


class Watch:
    """Shows a bar per run on a terminal; elsewhere one line when a run is done. Use as a context, call with the jobs."""

    def __init__(self, configs: tuple[RunConfig, ...], jobs: list[Job], console: Console) -> None:
        self.console = console
        columns = (
            TextColumn("{task.description:<14}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[state]:<8}"),
        )
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        self.bars = Progress(*columns, *times, console=console, refresh_per_second=2, disable=not console.is_terminal)
        budgets = {config.run_id: config.budget for config in configs}
        self.budgets = {each.folder.name: budgets[each.folder.name] for each in jobs}
        self.tasks: dict[str, TaskID] = {
            each.folder.name: self.bars.add_task(each.label, total=1.0, start=False, state="waiting") for each in jobs
        }
        self.announced: set[str] = set()

    def __call__(self, jobs: list[Job]) -> None:
        for each in jobs:
            name, task = each.folder.name, self.tasks[each.folder.name]
            if each.running and not self.bars.tasks[task].started:
                self.bars.start_task(task)
            budget = self.budgets[name]
            spent = each.progress().get(SPENT[budget.unit], 0) / budget.amount
            state = "waiting"
            if each.running:
                state = "scoring" if spent >= 1 else "training"
            elif each.finished:
                state = "failed" if each.failure() else "done"
                self.bars.stop_task(task)
            self.bars.update(task, completed=min(spent, 1.0), state=state)
            if each.finished and name not in self.announced:
                self.announced.add(name)
                if not self.console.is_terminal:
                    self.console.print(f"{each.label}: {state}")

    def __enter__(self) -> "Watch":
        self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bars.stop()


def start_over(plan: Plan) -> None:
    """Remove what the plan's runs have written, and nothing else; ValueError if one of them is being worked on."""
    there = [folder for folder in plan.folders if folder.is_dir()]
    for folder in there:
        with locked(folder):
            pass
    for folder in there:
        clear(folder)


def default_workers(threads: int) -> int:
    """As many runs at once as this process has processors for."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, processors // threads)
