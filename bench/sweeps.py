"""What do `tsbench sweep`, `status`, `logs` and `cancel` do? They lead from a suite's name to `slurm.sweep`.

Runs of all suites lie in one folder (results/runs), by their ids: two suites that share a run share its result.
"""

import argparse
import glob
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live

if TYPE_CHECKING:  # imports are made where they are needed, so that help and refusals come at once
    from bench.suite import SuiteRun
    from slurm.claims import Work
    from slurm.states import Known, Status
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
    sweep.add_argument("--cluster", choices=CLUSTERS, required=True, help="where: on Slurm, as processes here, in this one")
    sweep.add_argument(
        "--profile", default="local", help="a file of slurm/clusters, or a path: what jobs ask for (default local)"
    )
    sweep.add_argument("--dry-run", action="store_true", help="show runs, costs and the batch script; start nothing")
    sweep.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="WHICH",
        help="planned, failed, stale (kept aside, and begun anew), or ids of runs",
    )
    sweep.add_argument("--wait", action="store_true", help="on Slurm: stay, and submit again what the cluster takes away")
    sweep.add_argument("--workers", type=int, help="with --cluster local: processes at a time (default: one per processor)")
    sweep.set_defaults(run=run_sweep, resumable=True)

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
    _takes_suite(cancel, "; or a run's id, its beginning, or its folder")
    cancel.set_defaults(run=run_cancel)


def _takes_suite(parser: argparse.ArgumentParser, or_run: str = "") -> None:
    parser.add_argument("suite", metavar="SUITE", help=f"a suite of bench/suites, or the path of a YAML file{or_run}")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings for all runs, as they were given to sweep")
    parser.add_argument("--runs", type=Path, default=RUNS, help=f"folder of runs (default {RUNS})")


def run_sweep(parsed: argparse.Namespace) -> int:
    """Exit code 1 if a run that was asked for is not done in the end; on a cluster without --wait that is not known yet."""
    from bench.launch import Launch
    from bench.planning import plan_runs
    from bench.sweep_views import plan_table
    from slurm.profile import load_profile

    if parsed.workers is not None and parsed.workers < 1:
        raise ValueError(f"--workers is {parsed.workers}: give at least 1")
    if parsed.workers is not None and parsed.cluster != "local":
        raise ValueError(f"--workers is for --cluster local, not {parsed.cluster}: leave it out")
    if parsed.wait and parsed.cluster != "slurm":
        raise ValueError(f"--wait is for --cluster slurm, and {parsed.cluster} waits in any case: leave it out")
    settings = [*parsed.settings, *(word for word in parsed.only if "=" in word)]  # --only takes all the words that follow
    only = [word for word in parsed.only if "=" not in word]
    profile = load_profile(parsed.profile)
    on_slurm = parsed.cluster == "slurm"
    of_profile = [f"system.device={profile.device}"] if on_slurm else []
    runs, sweep = make_sweep(parsed.suite, [*settings, *of_profile], parsed.runs)
    planned = plan_runs(runs, profile.world_size if on_slurm else 1, only_look=parsed.dry_run)
    results = parsed.runs.absolute().parent
    launch = Launch(parsed.suite, _as_typed(parsed, settings), planned, sweep, profile, results, _console())
    statuses, known = sweep.statuses()
    choice = sweep.choose(statuses, only, with_followers=not on_slurm)
    if not known.answers and not parsed.dry_run:
        _refuse_to_start_over(choice, statuses, known.warning)
    _warn(known)
    if parsed.dry_run:
        launch.console.print(plan_table(planned, statuses, choice, profile))
        if on_slurm and choice.start:
            script, num_arrays = launch.first_batch_script(choice)
            of = f" of the first of {num_arrays} arrays" if num_arrays > 1 else ""
            print(f"\nThe batch script{of} (TOKEN and CODE-HASH are filled in when it is submitted):\n\n{script}", end="")
        return 0
    for reason, count in Counter(choice.reasons.values()).items():
        launch.console.print(f"{count} of {len(sweep.items)} runs: {reason}", highlight=False)
    with _in_one_sentence():
        if on_slurm:
            return launch.on_slurm(choice, statuses, stay=parsed.wait)
        if parsed.cluster == "local":
            return launch.side_by_side(choice, statuses, parsed.workers)
        return launch.in_this_process(choice, statuses)


def _refuse_to_start_over(choice: "Choice", statuses: "Mapping[str, Status]", why: str) -> None:
    """ValueError if, of a stale run, a job may be queued that cannot be seen: it would go on in the new folder by other code."""
    from slurm.claims import read_claim

    stale = [item for item in choice.start if statuses[item.run_id].state == "stale"]
    given = [item.run_id for item in stale if any(read_claim(work) is not None for work in item.works)]
    if given:
        raise ValueError(
            f"{', '.join(given[:3])} cannot start over: a job that was submitted before may still be queued, and {why}; "
            "try again when the cluster answers, or delete job.json in the run's folder if you know that no job is left"
        )


def run_status(parsed: argparse.Namespace) -> int:
    from bench.sweep_views import Changes, print_status, status_view

    _, sweep = make_sweep(parsed.suite, parsed.settings, parsed.runs)
    console = _console()
    statuses, known = sweep.statuses()
    with (
        Live(console=console, auto_refresh=False, transient=True)
        if parsed.watch and console.is_terminal
        else nullcontext() as live
    ):
        changes = Changes(sweep, console)
        while parsed.watch and (not known.answers or any(status.in_hand for status in statuses.values())):
            live.update(status_view(sweep, statuses), refresh=True) if live else changes(statuses)
            time.sleep(WATCH_SECONDS)
            statuses, known = sweep.statuses()
    print_status(console, sweep, statuses, _as_typed(parsed, parsed.settings))
    _warn(known)
    return 0


def run_logs(parsed: argparse.Namespace) -> int:
    from slurm.claims import read_claim
    from slurm.submit import output_of

    name, _, expert = parsed.name.partition(":")
    if expert and not expert.isdigit():
        raise ValueError(f"{parsed.name!r} names expert {expert!r}: give its number, as in {name}:2")
    folder = find_run(parsed.runs, name)
    works = [work for work in works_in(folder) if not expert or work.expert == int(expert)]
    claims = [claim for work in works if (claim := read_claim(work)) is not None and claim.job]
    files = [*(path for claim in claims for path in output_of(claim.job, claim.logs)), folder / "log.txt"]
    files = [path for path in files if path.is_file()]
    if not files:
        raise ValueError(f"no job of {parsed.name} has printed anything here yet: see `tsbench status`")
    for path in files:
        lines = path.read_text(errors="replace").splitlines()
        print(f"==> {path} <==")
        print("\n".join(lines[-parsed.lines :] if parsed.lines > 0 else lines))
    return 0


def run_cancel(parsed: argparse.Namespace) -> int:
    """Exit code 1 if there may be jobs, and the cluster that has them does not answer."""
    from bench.sweep_views import count_of
    from slurm import queue
    from slurm.claims import read_claim
    from slurm.local import end_process
    from slurm.states import ask_cluster

    if is_suite(parsed.suite):
        _, sweep = make_sweep(parsed.suite, parsed.settings, parsed.runs)
        works = [work for item in sweep.items for work in item.works]
    else:
        works = works_in(find_run(parsed.runs, parsed.suite, "a suite, "))
    known = ask_cluster(works)
    names = {job: live.name for job, live in known.live.items()}
    jobs = [job for work in works if (claim := read_claim(work)) is not None and (job := claim.job_in(names)) in known.live]
    with _in_one_sentence():
        queue.cancel(jobs)
    ended = [work for work in works if end_process(work.folder)]
    print(f"cancelled {count_of(len(jobs), 'job')}, ended {count_of(len(ended), 'process', 'processes')} on this machine")
    if not known.answers:
        print(f"tsbench: jobs could not be cancelled: {known.warning}", file=sys.stderr)
        return 1
    _warn(known)
    return 0


def make_sweep(name: str, settings: list[str], runs_folder: Path) -> "tuple[list[SuiteRun], Sweep]":
    """The runs of a suite in each of their groups, and each once as the launcher sees it; ValueError in one sentence if one
    cannot be."""
    from bench import job
    from bench.suite import load_suite, suite_runs
    from slurm.sweep import Item, Sweep

    check_folder(runs_folder)
    in_groups = suite_runs(load_suite(name), settings, job.make_config)
    runs = {run.config.run_id: run for run in in_groups}
    items = [
        Item(
            run_id=run_id,
            label=run.config.label or run.config.method,
            folder=runs_folder.absolute() / run_id,
            num_experts=job.num_separate_experts(run.config),
            budget=asdict(run.config.budget),
            threads=run.config.train.threads,
            after=run.starts_from,
            evaluation=asdict(run.config.evaluation),
        )
        for run_id, run in runs.items()
    ]
    return in_groups, Sweep(items, job.difference_of)


def check_folder(runs_folder: Path) -> None:
    """Nothing is there yet, or a folder."""
    if runs_folder.exists() and not runs_folder.is_dir():
        raise ValueError(f"--runs is {runs_folder}, which is a file: give a folder")


def is_suite(name: str) -> bool:
    from bench.suite import FOLDER

    return name.endswith((".yaml", ".yml")) or (FOLDER / f"{name}.yaml").exists()


def find_run(runs_folder: Path, name: str, also: str = "") -> Path:
    """A run's folder, by path, id or the beginning of its id. `also`: what else the user could have given."""
    check_folder(runs_folder)
    if name and (Path(name) / "config.yaml").is_file():
        return Path(name).absolute()
    found = sorted(path.parent for path in runs_folder.glob(f"{glob.escape(name)}*/config.yaml")) if name else []
    if len(found) != 1:
        some = f" ({', '.join(path.name for path in found[:3])})" if found else ""
        raise ValueError(
            f"{name!r} names {len(found) or 'no'} runs in {runs_folder}{some}: give {also}one run's id, or its folder"
        )
    return found[0].absolute()


def works_in(folder: Path) -> "list[Work]":
    """What jobs may work on in a run's folder."""
    from bench.runs import expert_folders
    from slurm.claims import Work

    return [Work(folder, folder), *(Work(folder, place, index) for index, place in expert_folders(folder).items())]


@contextmanager
def _in_one_sentence() -> Iterator[None]:
    """A cluster that stops to answer is no fault of ours."""
    from slurm.queue import ClusterUnreachable

    try:
        yield
    except ClusterUnreachable as error:
        raise ValueError(str(error)) from None


def _warn(known: "Known") -> None:
    if known.warning:
        print(f"warning: {known.warning}", file=sys.stderr)


def _as_typed(parsed: argparse.Namespace, settings: list[str]) -> str:
    """Suite, settings and runs folder, for a command line."""
    folder = [] if parsed.runs == RUNS else ["--runs", str(parsed.runs)]
    return shlex.join([parsed.suite, *settings, *folder])


def _console() -> Console:
    """As wide as its content where nobody looks: a file or a pipe has no width."""
    return Console() if sys.stdout.isatty() else Console(width=1000)
