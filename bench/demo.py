"""How does a suite become finished runs on one machine? What `tsbench demo` does."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import job
from bench.config import RunConfig
from bench.data import load_data
from bench.evaluate import EvalProtocol, floor_scores, protocol_of, why_no_floor
from bench.files import make_folder, read_json, write_json_atomically
from bench.pixels import pixels_needed, pixels_of
from bench.run_folder import clear, locked
from bench.suite import suite_configs
from bench.watch import Watch
from slurm.local import Job, run_side_by_side


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
    evaluation = configs[0].evaluation
    return Plan(out, tuple(configs), step_flops, protocol_of(evaluation, pixels_needed(evaluation, load_data(configs[0].data))))


def run_plan(plan: Plan, workers: int, console: Console) -> dict[str, str]:
    """Train and score every run that is not done already; run -> cause for those that failed."""
    write_floor(plan.out, plan.configs[0])
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


def write_floor(folder: Path, config: RunConfig) -> None:
    """`floor.json`: real data against real data, by the protocol of a run; without one, why, to stderr."""
    pixels = pixels_of(config.evaluation, load_data(config.data))
    if pixels is None:  # some of the suite's runs were scored with an autoencoder that it does not name itself
        print("no floor: the suite's data are latents, and it names no evaluation.autoencoder", file=sys.stderr)
        return
    path, protocol = folder / "floor.json", protocol_of(config.evaluation, pixels)
    if read_json(path, dict).get("protocol_hash") == protocol.hash:
        return
    if why := why_no_floor(protocol, pixels):
        print(f"no floor: {why}", file=sys.stderr)
        return
    metrics = floor_scores(protocol, pixels)
    make_folder(folder)
    record = {"protocol_hash": protocol.hash, "protocol": protocol.content, "n": protocol.num_samples, "metrics": metrics}
    write_json_atomically(path, record)


def start_over(plan: Plan) -> None:
    """Remove what the plan's runs have written, and nothing else; ValueError if one of them is being worked on."""
    there = [folder for folder in plan.folders if folder.is_dir()]
    for folder in there:
        with locked(folder):
            pass
    for folder in there:
        clear(folder)
