"""How do the runs of a suite start: as jobs of a cluster, side by side on this machine, or one by one in this process?"""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bench import job
from bench.journal import Diverged
from bench.planning import PlannedRun
from bench.provenance import ROOT
from bench.run_folder import set_aside
from bench.sweep_views import Changes, print_status
from bench.watch import Watch, default_workers
from slurm import queue
from slurm.local import run_side_by_side
from slurm.profile import Profile
from slurm.snapshot import take_snapshot
from slurm.states import changed_files
from slurm.submit import adopt_orphans, batch_script
from slurm.sweep import Choice, Statuses, Sweep, jobs_of, left_to_do, make_ready, start_on_slurm, wait


@dataclass(frozen=True)
class Launch:
    """One `tsbench sweep`: what it starts, and where."""

    suite: str  # name or path
    command: str  # it and its settings, as they are typed
    planned: list[PlannedRun]
    sweep: Sweep
    profile: Profile
    results: Path  # absolute; its `runs` holds the run folders
    console: Console

    @property
    def logs(self) -> Path:
        return self.results / "jobs" / Path(self.suite).name.removesuffix(".yaml")  # PAPER.TABLE has a dot of its own

    def make_ready(self, choice: Choice, statuses: Statuses) -> Path:
        """Run folders with their configurations, and a snapshot of the code; its folder."""
        configs = {each.config.run_id: each.config for each in self.planned}
        make_ready(choice.start, statuses, lambda item: job.place_config(configs[item.run_id], item.folder), self._set_aside)
        return take_snapshot(ROOT, self.results / "code")

    def _set_aside(self, folder: Path) -> None:
        """Unless another launch has done so since we looked: what is there now may be its new run."""
        if changed_files(folder, self.sweep.difference):
            set_aside(folder)

    def first_batch_script(self, choice: Choice) -> tuple[str, int]:
        """Of the first array as it would be handed to Slurm, and how many arrays there are."""
        num_jobs, most = sum(len(left_to_do(item)) for item in choice.start), self.profile.max_array_elements
        snapshot = self.results / "code" / "CODE-HASH"
        return batch_script(self.profile, "tsbench-TOKEN", self.logs, snapshot, min(num_jobs, most)), -(-num_jobs // most)

    def on_slurm(self, choice: Choice, statuses: Statuses, stay: bool) -> int:
        """Submit, and end or `stay` until nothing is left to do; the exit code."""
        here, why = queue.cluster_is_here()
        if not here:
            raise ValueError(
                f"there is no Slurm cluster here ({why}): run this on a login node, start one with slurm/local_cluster.sh, look "
                "at the plan with --dry-run, or use --cluster local"
            )
        adopt_orphans((work for item in self.sweep.items for work in item.works), job.work_on, self.profile)
        if choice.start:
            self._submit(choice, statuses)
        if not stay:
            self.console.print(
                f"See `tsbench status {self.command}`; the same sweep again takes up what the cluster takes away.", soft_wrap=True
            )
            return 0
        wait(self.sweep, choice.asked(statuses), self._submit, Changes(self.sweep, self.console))
        return self._outcome(choice)

    def side_by_side(self, choice: Choice, statuses: Statuses, workers: int | None) -> int:
        """As processes on this machine; the exit code."""
        if choice.start:
            snapshot = self.make_ready(choice, statuses)
            hours = {each.config.run_id: each.device_hours(1.0) for each in self.planned}
            jobs = jobs_of(choice.start, snapshot, hours)
            workers = workers or default_workers(max(item.threads for item in choice.start))
            with Watch(tuple(each.config for each in self.planned), jobs, self.console, with_names=True) as watch:
                failures = run_side_by_side(jobs, workers, watch)
            for run, cause in failures.items():
                tell_failure(run, cause)
        return self._outcome(choice)

    def in_this_process(self, choice: Choice, statuses: Statuses) -> int:
        """One after the other; the exit code."""
        self.make_ready(choice, statuses)
        for item in choice.start:
            self.console.print(f"{item.run_id} ({item.label})", highlight=False)
            try:
                job.work_on(item.folder)
            except (ValueError, Diverged) as error:  # the others go on; the run's folder holds the cause
                tell_failure(item.run_id, str(error))
        return self._outcome(choice)

    def _submit(self, choice: Choice, statuses: Statuses) -> None:
        snapshot = self.make_ready(choice, statuses)
        jobs = start_on_slurm(choice.start, job.work_on, self.profile, snapshot, self.logs)
        for array, count in Counter(name.partition("_")[0] for name in jobs.values()).items():
            self.console.print(f"submitted job {array}" + (f", an array of {count}" if count > 1 else ""), highlight=False)

    def _outcome(self, choice: Choice) -> int:
        """The exit code, after a table of the runs: whether all that were asked for are done."""
        statuses, _ = self.sweep.statuses()
        print_status(self.console, self.sweep, statuses, self.command)
        return 0 if all(statuses[run_id].state == "done" for run_id in choice.asked(statuses)) else 1


def tell_failure(run: str, cause: str) -> None:
    print(f"tsbench: run {run} failed: {cause}", file=sys.stderr)
