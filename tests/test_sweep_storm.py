"""Do twelve runs come through a storm of signals and requeues: all done, none twice at a time, what is lost counted?"""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from itertools import cycle
from pathlib import Path

import pytest
from sweeping import LOOK_SECONDS, MIDDLE, SIX, TinySuite, images_seen, tasks_of

from bench import checkpoint, lease
from bench.runs import read_run
from slurm.states import Status

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

MOST_STRIKES = 30
STORM_SECONDS = 1800.0  # it takes two minutes on an idle machine


class Storm:
    """Disturbs the jobs of a sweep, and counts by itself what the runs lose."""

    def __init__(self, suite: TinySuite, seed: int) -> None:
        self.suite, self.random = suite, random.Random(seed)
        self.kinds, self.struck = cycle(["kill", "warn", "kill", "requeue"]), Counter[str]()
        self.lost: dict[Path, dict[bytes, int]] = {folder: {} for folder in suite.run_folders()}  # by heartbeat: images

    def strike(self, jobs: Mapping[Path, str]) -> None:
        """Kill a run's process, warn it as before a time limit, or have its job queued again: any, or one that trains now."""
        training = [folder for folder in jobs if unsaved_images(folder)]
        folder = self.random.choice(training if training and self.random.random() < 0.7 else [*jobs])
        job, what = jobs[folder], next(self.kinds)
        tasks = tasks_of(job)
        with suppress(ProcessLookupError, RuntimeError):  # it is over by now, or not yet wholly there
            if what == "kill":
                for task in tasks:
                    os.kill(task, signal.SIGKILL)
            elif what == "warn":  # left alone, scancel tries for half a minute with a job that is just starting
                self.suite.cluster.run("timeout", "2", "scancel", "--signal=USR2", job)
            else:
                self.suite.cluster.run("scontrol", "requeue", job)
            self.struck[what] += bool(tasks)

    def count_losses(self, statuses: Mapping[str, Status]) -> None:
        """Of runs that nobody works on just now: once for each heartbeat that was their last."""
        for folder, lost in self.lost.items():
            heartbeat = folder / "progress.json"
            if statuses[folder.name].state != "running" and heartbeat.exists() and lease.read(folder) is None:
                lost[heartbeat.read_bytes()] = unsaved_images(folder)


def unsaved_images(folder: Path) -> int:
    """What a run's heartbeat tells more than its checkpoint."""
    found = checkpoint.load_latest(folder / "checkpoints")
    return images_seen(folder) - (8 * found.counters["steps_done"] if found else 0)


def test_twelve_runs_come_through_a_storm(tiny_suite: TinySuite) -> None:
    tiny_suite.write(*SIX, grid={"seed": [0, 1]}, **MIDDLE)
    tiny_suite.write_profile(restarts_without_progress=MOST_STRIKES)
    storm, deadline = Storm(tiny_suite, seed=0), time.monotonic() + STORM_SECONDS
    statuses = tiny_suite.statuses()
    while any(status.state != "done" for status in statuses.values()):
        assert time.monotonic() < deadline, statuses
        assert not {run_id: s for run_id, s in statuses.items() if s.state == "failed" and s.kind != "killed"}
        assert not {each.state for each in statuses.values()} & {"diverged", "stale"}, statuses
        storm.count_losses(statuses)
        if any(status.state in ("planned", "failed") for status in statuses.values()):
            tiny_suite.sweep()
        running = {run_id: each for run_id, each in statuses.items() if each.state == "running" and each.jobs}
        if running and storm.struck.total() < MOST_STRIKES:
            storm.strike({tiny_suite.runs / run_id: each.jobs[0] for run_id, each in running.items()})
        time.sleep(LOOK_SECONDS)
        statuses = tiny_suite.statuses()
    assert len(storm.struck) == 3 and storm.struck.total() >= 6  # of each kind; how many there is time for, the machine decides
    counted = {folder: sum(lost.values()) for folder, lost in storm.lost.items()}
    assert {folder: read_run(folder).summary["lost_images"] for folder in counted} == counted
    tiny_suite.assert_one_at_a_time()
    tiny_suite.assert_as_undisturbed()
