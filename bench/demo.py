"""How does a suite become a table and figures on one machine? What `tsbench demo` does."""

import os
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench import job
from bench.config import RunConfig
from bench.data import load_data
from bench.evaluate import floor_scores, protocol_of
from bench.files import read_json, write_json_atomically
from bench.flops import measure
from bench.runs import run_state
from bench.suite import suite_configs
from slurm.local import Job, run_side_by_side


def run_suite(suite: dict[str, Any], out: Path, overrides: list[str], workers: int, console: Console) -> dict[str, str]:
    """Train and score every run of a suite that is not done already; run -> cause for those that failed."""
    configs = suite_configs(suite, overrides, job.make_config)
    write_floor(configs, out)
    jobs = []
    for config in configs:
        folder = out / "runs" / config.run_id
        with job.locked(folder):
            job.prepare_folder(config, folder)
        data = load_data(config.data)
        image_shape = (data.channels, data.input_size, data.input_size)
        cost = measure(job.build_method(config, data), image_shape, data.num_classes)
        label = config.label or config.method
        jobs.append(Job(folder, label, config.train.threads, cost.train_flops(config.train.batch_size)))
    reused = [each for each in jobs if run_state(each.folder) == "done"]
    if reused:
        console.print(f"{len(reused)} of {len(jobs)} runs are done already and are used as they are (--fresh starts over).")
    return run_side_by_side(jobs, workers, Watch(configs, jobs, console))


def write_floor(configs: list[RunConfig], out: Path) -> None:
    """`floor.json`: real data against real data, under the protocol of the suite's first run."""
    data = load_data(configs[0].data)
    protocol = protocol_of(configs[0].evaluation, data)
    if read_json(out / "floor.json", dict).get("protocol_hash") == protocol.hash:
        return
    metrics = floor_scores(protocol, data)
    record = {"protocol_hash": protocol.hash, "protocol": protocol.content, "n": protocol.num_samples, "metrics": metrics}
    out.mkdir(parents=True, exist_ok=True)
    write_json_atomically(out / "floor.json", record)


class Watch:
    """Shows a bar per run on a terminal; elsewhere one line when a run is done."""

    def __init__(self, configs: list[RunConfig], jobs: list[Job], console: Console) -> None:
        self.console = console
        columns = (
            TextColumn("{task.description:<14}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[state]:<8}"),
        )
        self.bars = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
        budgets = {config.run_id: config.budget.amount for config in configs}
        self.tasks: dict[str, TaskID] = {}
        for each in jobs:
            total = budgets[each.folder.name]
            self.tasks[each.folder.name] = self.bars.add_task(each.label, total=total, start=False, state="waiting")
        self.announced: set[str] = {each.folder.name for each in jobs if run_state(each.folder) == "done"}
        self.live = Live(self.bars, console=console, refresh_per_second=2) if console.is_terminal else None
        if self.live:
            self.live.start()

    def __call__(self, jobs: list[Job]) -> None:
        for each in jobs:
            name, task = each.folder.name, self.tasks[each.folder.name]
            if each.running and not self.bars.tasks[task].started:
                self.bars.start_task(task)
            state = "training" if each.running else "waiting"
            if each.finished:
                state = "failed" if each.failure() else "done"
            seen = each.images_seen()
            total = self.bars.tasks[task].total or 1
            if each.running and seen >= total:
                state = "scoring"
            self.bars.update(task, completed=seen, state=state)
            if each.finished and name not in self.announced:
                self.announced.add(name)
                if not self.live:
                    self.console.print(f"{each.label}: {state}")
        if self.live and not any(each.running for each in jobs) and all(each.finished for each in jobs):
            self.live.stop()


def start_over(out: Path) -> None:
    """Remove what an earlier demo wrote, and nothing else."""
    for name in ("runs", "figures"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("results.csv", "table.md", "table.tex", "floor.json"):
        (out / name).unlink(missing_ok=True)


def default_workers(threads: int) -> int:
    """As many runs at once as this process has processors for."""
    return max(1, len(os.sched_getaffinity(0)) // threads)
