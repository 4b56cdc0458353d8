"""Is one kept posted on runs side by side: bars on a terminal, a line when a run is done elsewhere?"""

import io
from pathlib import Path

import pytest
from rich.console import Console

from bench.config import BudgetConfig, RunConfig
from bench.files import write_json_atomically
from bench.watch import ALL_SHOWN, Watch, default_workers
from slurm.local import Job

BUDGET = BudgetConfig("images", 1000)


class Scripted(Job):
    """Runs or is over as the test says; what it has done is in its folder."""

    is_running = is_over = False

    @property
    def running(self) -> bool:
        return self.is_running

    @property
    def finished(self) -> bool:
        return self.is_over

    def failure(self) -> str:
        return "" if (self.folder / "done").exists() else "no luck"


def scripted(folder: Path, seed: int = 0, expert: int | None = None, share: float = 1.0) -> Scripted:
    config = RunConfig(method="dense", seed=seed, budget=BUDGET)
    (folder / config.run_id).mkdir(exist_ok=True)
    return Scripted(folder / config.run_id, f"Run {seed}", threads=1, expert=expert, share=share)


def watch_of(jobs: list[Scripted], terminal: bool = True, with_names: bool = False) -> Watch:
    configs = [RunConfig(method="dense", seed=seed, budget=BUDGET) for seed in range(len(jobs))]
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    return Watch(configs, list(jobs), console, with_names)


def shown(watch: Watch) -> list[tuple[str, float, bool]]:
    return [(task.fields["state"], task.completed, task.visible) for task in watch.bars.tasks]


def test_a_bar_follows_the_folder(tmp_path: Path) -> None:
    (job,) = jobs = [scripted(tmp_path)]
    watch = watch_of(jobs)
    states = []
    for images, running in ((0, False), (0, True), (250, True), (1000, True)):
        job.is_running = running
        write_json_atomically(job.folder / "progress.json", {"images_seen": images})
        watch(list(jobs))
        states += shown(watch)
    job.is_running, job.is_over = False, True
    watch(list(jobs))
    states += shown(watch)
    (job.folder / "done").touch()
    watch(list(jobs))
    states += shown(watch)
    assert [(state, completed) for state, completed, _ in states] == [
        *(("waiting", 0), ("training", 0), ("training", 0.25), ("scoring", 1.0), ("failed", 1.0), ("done", 1.0)),
    ]


def test_an_expert_has_its_share_of_the_budget(tmp_path: Path) -> None:
    (job,) = jobs = [scripted(tmp_path, expert=1, share=0.5)]
    job.is_running = True
    job.place.mkdir(parents=True)
    write_json_atomically(job.place / "progress.json", {"images_seen": 250})
    watch = watch_of(jobs, with_names=True)
    watch(list(jobs))
    assert shown(watch) == [("training", 0.5, True)]
    assert watch.bars.tasks[0].description == f"Run 0 ({job.folder.name}:1)"


def test_of_many_runs_those_that_run_are_shown(tmp_path: Path) -> None:
    jobs = [scripted(tmp_path, seed) for seed in range(ALL_SHOWN + 1)]
    jobs[3].is_running = True
    watch = watch_of(jobs)
    watch(list(jobs))
    assert [index for index, (_, _, visible) in enumerate(shown(watch)) if visible] == [3]
    few = watch_of(jobs[:ALL_SHOWN])
    few(list(jobs[:ALL_SHOWN]))
    assert all(visible for _, _, visible in shown(few))


@pytest.mark.parametrize("terminal", [False, True])
def test_elsewhere_a_line_says_when_a_run_is_over_and_no_more(terminal: bool, tmp_path: Path) -> None:
    good, bad = jobs = [scripted(tmp_path, seed) for seed in range(2)]
    with watch_of(jobs, terminal) as watch:
        for over in ((), (bad,), (bad, good), (bad, good)):
            for each in over:
                each.is_over = True
            (good.folder / "done").touch()
            watch(list(jobs))
    printed = watch.console.file.getvalue()  # type: ignore[attr-defined]
    assert terminal or printed == "Run 1: failed\nRun 0: done\n"
    assert ("\x1b[" in printed) == terminal


def test_as_many_workers_as_processors_have_threads_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(6)), raising=False)
    assert [default_workers(threads) for threads in (1, 2, 4, 12)] == [6, 3, 1, 1]
