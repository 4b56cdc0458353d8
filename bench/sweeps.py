"""What do `tsbench sweep`, `status`, `logs` and `cancel` do? They lead from a suite's name to `slurm.sweep`.

Runs of all suites lie in one folder (results/runs), by their ids: two suites that share a run share its result.
"""

import argparse
import glob
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live

if TYPE_CHECKING:  # imports are made where they are needed, so that help and refusals come at once
    from bench.planning import PlannedRun
    from bench.suite import SuiteRun
    from slurm.claims import Work
    from slurm.profile import Profile
    from slurm.states import Status
    from slurm.sweep import Choice, Sweep

RUNS = Path("results/runs")
CLUSTERS = ("slurm", "local", "inline")
WATCH_SECONDS = 5.0


def add_parsers(commands: Any) -> None:
    """The commands, for `bench.cli`."""
    sweep = commands.add_parser(
        "sweep",
        help="start what is not done of a suite: on a Slurm cluster, or on this machine",
        description="Start every run of a suite that is not done: as jobs of a Slurm cluster (then this command may end and the "
        "laptop be closed), as processes on this machine, or one after the other in this process. "
        "The same command takes up what was interrupted.",
    )
    _takes_suite(sweep)
    sweep.add_argument("--cluster", choices=CLUSTERS, required=True, help="where the runs go")
    sweep.add_argument(
        "--profile", default="local", help="a file of slurm/clusters, or a path: what jobs ask for (default local)"
    )
    sweep.add_argument("--dry-run", action="store_true", help="show runs, costs and the batch script; start nothing")
    sweep.add_argument(
        "--only", nargs="+", default=[], metavar="WHICH", help="planned, failed, stale (these start over), or ids of runs"
    )
    sweep.add_argument("--wait", action="store_true", help="on Slurm: stay, and submit again what the cluster takes away")
    sweep.add_argument("--workers", type=int, help="with --cluster local: processes at a time (default: one per processor)")
    sweep.set_defaults(run=run_sweep)

    status = commands.add_parser("status", help="how far each run of a suite is", description="How far each run of a suite is.")
    _takes_suite(status)
    status.add_argument("--watch", action="store_true", help="again and again, until nothing runs")
    status.set_defaults(run=run_status)

    logs = commands.add_parser("logs", help="what a run's last job has printed", description="What a run's last job has printed.")
    logs.add_argument("name", metavar="RUN", help="a run's id, its beginning, or its folder; RUN:2 for its expert 2")
    logs.add_argument("--lines", type=int, default=40, help="of each file, from the end (default 40; 0: all)")
    logs.add_argument("--runs", type=Path, default=RUNS, help=f"folder of runs (default {RUNS})")
    logs.set_defaults(run=run_logs)

    cancel = commands.add_parser(
        "cancel",
        help="take a suite's jobs, or one run's, off the cluster or this machine",
        description="Take the jobs of a suite, or of one run, off the cluster, and end its processes on this machine. "
        "They save first; a sweep takes them up again.",
    )
    _takes_suite(cancel, "SUITE|RUN")
    cancel.set_defaults(run=run_cancel)


def _takes_suite(parser: argparse.ArgumentParser, name: str = "SUITE") -> None:
    parser.add_argument("suite", metavar=name, help="a suite of bench/suites, or the path of a YAML file")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings for all runs, as they were given to sweep")
    parser.add_argument("--runs", type=Path, default=RUNS, help=f"folder of runs (default {RUNS})")


@dataclass(frozen=True)
class Launch:
    """One `tsbench sweep`: what it was given, and what came of it."""

    parsed: argparse.Namespace
    profile: "Profile"
    planned: "list[PlannedRun]"
    sweep: "Sweep"
    console: Console

    @property
    def results(self) -> Path:
        return Path(self.parsed.runs).absolute().parent

    @property
    def logs(self) -> Path:
        return self.results / "jobs" / Path(self.parsed.suite).stem

    def choose(self, statuses: "Mapping[str, Status]") -> "Choice":
        return self.sweep.choose(statuses, self.parsed.only, with_followers=self.parsed.cluster != "slurm")

    def make_ready(self, choice: "Choice", statuses: "Mapping[str, Status]") -> Path:
        """Run folders with their configurations, and a snapshot of the code; its folder."""
        from bench import job
        from bench.provenance import ROOT
        from bench.run_folder import set_aside
        from slurm.snapshot import take_snapshot
        from slurm.sweep import make_ready

        configs = {each.config.run_id: each.config for each in self.planned}
        make_ready(choice.start, statuses, lambda item: job.place_config(configs[item.run_id], item.folder), set_aside)
        return take_snapshot(ROOT, self.results / "code")

    def batch_script(self, choice: "Choice") -> str:
        """As it would be handed to Slurm, for the first array."""
        from slurm.submit import batch_script

        count = min(sum(len(item.works) for item in choice.start), self.profile.max_array_elements)
        return batch_script(self.profile, "tsbench-TOKEN", self.logs, self.results / "code" / "CODE-HASH", count)

    def outcome(self) -> int:
        """The exit code, after a table of the runs."""
        from bench.sweep_views import status_table

        statuses, _ = self.sweep.statuses()
        self.console.print(status_table(self.sweep, statuses))
        return 0 if all(status.state == "done" for status in statuses.values()) else 1


def run_sweep(parsed: argparse.Namespace) -> int:
    from bench.planning import plan_runs
    from bench.sweep_views import plan_table
    from slurm.profile import load_profile

    if parsed.workers is not None and parsed.workers < 1:
        raise ValueError(f"--workers is {parsed.workers}: give at least 1")
    profile = load_profile(parsed.profile)
    on_slurm = parsed.cluster == "slurm"
    settings = [*parsed.settings, f"system.device={profile.device}"] if on_slurm else parsed.settings
    runs, sweep = make_sweep(parsed.suite, settings, parsed.runs)
    planned = plan_runs(runs, profile.world_size if on_slurm else 1)
    launch = Launch(parsed, profile, planned, sweep, _console())
    statuses, known = sweep.statuses()
    choice = launch.choose(statuses)
    if parsed.dry_run:
        launch.console.print(plan_table(planned, statuses, choice, profile))
        if on_slurm and choice.start:
            print(f"\n{launch.batch_script(choice)}", end="")
        return 0
    if known.warning:
        print(f"warning: {known.warning}", file=sys.stderr)
    for reason, count in Counter(choice.reasons.values()).items():
        launch.console.print(f"{count} of {len(planned)} runs: {reason}")
    return {"slurm": _on_slurm, "local": _side_by_side, "inline": _in_this_process}[parsed.cluster](launch, statuses, choice)


def _on_slurm(launch: Launch, statuses: "Mapping[str, Status]", choice: "Choice") -> int:
    from bench import job
    from bench.sweep_views import Changes
    from slurm import queue
    from slurm.sweep import start_on_slurm, wait

    here, why = queue.cluster_is_here()
    if not here:
        raise ValueError(
            f"there is no Slurm cluster here ({why}): run this on a login node, start one with slurm/local_cluster.sh, look at "
            "the plan with --dry-run, or use --cluster local"
        )

    def start(choice: "Choice", statuses: "Mapping[str, Status]") -> None:
        snapshot = launch.make_ready(choice, statuses)
        jobs = start_on_slurm(choice.start, job.work_on, launch.profile, snapshot, launch.logs)
        for array, count in Counter(name.partition("_")[0] for name in jobs.values()).items():
            launch.console.print(f"submitted job {array}: {count} {'job' if count == 1 else 'jobs'}")

    if choice.start:
        start(choice, statuses)
    given = " ".join([launch.parsed.suite, *launch.parsed.settings])
    if not launch.parsed.wait:
        launch.console.print(f"See `tsbench status {given}`; the same sweep again takes up what the cluster takes away.")
        return 0
    wait(launch.sweep, start, Changes(launch.sweep, launch.console))
    return launch.outcome()


def _side_by_side(launch: Launch, statuses: "Mapping[str, Status]", choice: "Choice") -> int:
    from bench.watch import Watch, default_workers
    from slurm.local import run_side_by_side
    from slurm.sweep import jobs_of

    if choice.start:
        snapshot = launch.make_ready(choice, statuses)
        workers = launch.parsed.workers or default_workers(max(item.threads for item in choice.start))
        hours = {each.config.run_id: each.device_hours(1.0) for each in launch.planned}
        jobs = jobs_of(choice.start, snapshot, hours)
        with Watch(tuple(each.config for each in launch.planned), jobs, launch.console, with_names=True) as watch:
            run_side_by_side(jobs, workers, watch)
    return launch.outcome()


def _in_this_process(launch: Launch, statuses: "Mapping[str, Status]", choice: "Choice") -> int:
    from bench import job
    from bench.journal import Diverged

    launch.make_ready(choice, statuses)
    for item in choice.start:
        launch.console.print(f"{item.run_id} ({item.label})")
        try:
            job.work_on(item.folder)
        except (ValueError, Diverged) as error:  # the others go on; the run's folder holds the cause
            print(f"tsbench: run {item.run_id} failed: {error}", file=sys.stderr)
    return launch.outcome()


def run_status(parsed: argparse.Namespace) -> int:
    from bench.sweep_views import status_table

    _, sweep = make_sweep(parsed.suite, parsed.settings, parsed.runs)
    console = _console()
    statuses, known = sweep.statuses()
    if parsed.watch and console.is_terminal:
        with Live(status_table(sweep, statuses), console=console, auto_refresh=False) as live:
            while any(status.state in ("queued", "running", "preempted") for status in statuses.values()):
                time.sleep(WATCH_SECONDS)
                statuses, known = sweep.statuses()
                live.update(status_table(sweep, statuses), refresh=True)
    else:
        console.print(status_table(sweep, statuses))
    if known.warning:
        print(f"warning: {known.warning}", file=sys.stderr)
    return 0


def run_logs(parsed: argparse.Namespace) -> int:
    from bench.runs import expert_folder
    from slurm.claims import Work, read_claim
    from slurm.submit import output_of

    name, _, expert = parsed.name.partition(":")
    if expert and not expert.isdigit():
        raise ValueError(f"{parsed.name!r} names expert {expert!r}: give its number, as in {name}:2")
    folder = find_run(parsed.runs, name)
    place = expert_folder(folder, int(expert)) if expert else folder
    claim = read_claim(Work(folder, place, int(expert) if expert else None)) if place.is_dir() else None
    files = [*(output_of(claim.job, claim.logs) if claim is not None and claim.job else []), folder / "log.txt"]
    files = [path for path in files if path.is_file()]
    if not files:
        raise ValueError(f"{place} tells of no job that has printed anything yet: see `tsbench status`")
    for path in files:
        lines = path.read_text(errors="replace").splitlines()
        print(f"==> {path} <==")
        print("\n".join(lines[-parsed.lines :] if parsed.lines > 0 else lines))
    return 0


def run_cancel(parsed: argparse.Namespace) -> int:
    from slurm import queue
    from slurm.claims import read_claim
    from slurm.local import end_process
    from slurm.states import ask_cluster

    if is_suite(parsed.suite):
        _, sweep = make_sweep(parsed.suite, parsed.settings, parsed.runs)
        works = [work for item in sweep.items for work in item.works]
    else:
        works = works_in(find_run(parsed.runs, parsed.suite))
    known = ask_cluster(works)
    names = {job: live.name for job, live in known.live.items()}
    jobs = [job for work in works if (claim := read_claim(work)) is not None and (job := claim.job_in(names)) in known.live]
    queue.cancel(jobs)
    ended = [work for work in works if end_process(work.folder)]
    print(f"cancelled {len(jobs)} jobs, ended {len(ended)} processes on this machine")
    return 0


def make_sweep(name: str, settings: list[str], runs_folder: Path) -> "tuple[list[SuiteRun], Sweep]":
    """The runs of a suite, each once, as the launcher sees them; ValueError in one sentence if one cannot be."""
    from bench import job
    from bench.suite import load_suite, suite_runs
    from slurm.sweep import Item, Sweep

    runs = {run.config.run_id: run for run in suite_runs(load_suite(name), settings, job.make_config)}
    items = [
        Item(
            run_id=run_id,
            label=run.config.label or run.config.method,
            folder=runs_folder.absolute() / run_id,
            num_experts=job.num_separate_experts(run.config),
            budget=asdict(run.config.budget),
            threads=run.config.train.threads,
            after=run.starts_from,
        )
        for run_id, run in runs.items()
    ]
    return list(runs.values()), Sweep(items, job.difference_of)


def is_suite(name: str) -> bool:
    from bench.suite import FOLDER

    return name.endswith((".yaml", ".yml")) or (FOLDER / f"{name}.yaml").exists()


def find_run(runs_folder: Path, name: str) -> Path:
    """A run's folder, by path, id or the beginning of its id."""
    if (Path(name) / "config.yaml").is_file():
        return Path(name).absolute()
    found = sorted(path.parent for path in runs_folder.glob(f"{glob.escape(name)}*/config.yaml"))
    if len(found) != 1:
        some = f" ({', '.join(path.name for path in found[:3])})" if found else ""
        raise ValueError(f"{name!r} names {len(found)} runs in {runs_folder}{some}: give one run's id, or its folder")
    return found[0].absolute()


def works_in(folder: Path) -> "list[Work]":
    """What jobs may work on in a run's folder."""
    from bench.runs import expert_folders
    from slurm.claims import Work

    return [Work(folder, folder), *(Work(folder, place, index) for index, place in expert_folders(folder).items())]


def _console() -> Console:
    """As wide as its content where nobody looks: a file or a pipe has no width."""
    return Console() if sys.stdout.isatty() else Console(width=200)
