"""Are runs trained side by side on one machine, each on its own, and is what fails named?"""

import os
import re
import sys
import time
from pathlib import Path

import pytest
from command import TINY

from bench import job
from bench.files import read_json, write_json_atomically
from slurm import local
from slurm.local import Job, run_side_by_side


def make_job(folder: Path, name: str, *settings: str, cost: float = 0.0) -> Job:
    """A run folder with its configuration, as the demo prepares it."""
    config = job.make_config({"method": name}, [*TINY, *settings])
    job.prepare_folder(config, folder / config.run_id)
    return Job(folder / config.run_id, name, threads=1, cost=cost)


class Scripted(Job):
    """A job whose process does what the test says, in place of training."""

    def start(self) -> None:
        script = (self.folder / "script.py").read_text()
        command, sys.executable = sys.executable, str(self.folder / "python")
        try:
            Path(sys.executable).write_text(f"#!{command}\n{script}")
            os.chmod(sys.executable, 0o755)
            super().start()
        finally:
            sys.executable = command


def scripted(folder: Path, name: str, script: str, cost: float = 0.0) -> Scripted:
    path = folder / name
    path.mkdir()
    (path / "config.yaml").write_text("{method: dense, seed: 0, budget: {}, diffusion: {}}\n")
    (path / "script.py").write_text(f"import pathlib, sys, time\nfolder = pathlib.Path({str(path)!r})\n{script}\n")
    return Scripted(path, name, threads=3, cost=cost)


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "POLL_SECONDS", 0.02)


FINISH = "(folder / 'done').touch()"


def test_two_real_runs_of_which_one_diverges(tmp_path: Path) -> None:
    """Its cause is told from its folder, and the other is finished."""
    bad = make_job(tmp_path, "dense", "train.lr=1e30")
    good = make_job(tmp_path, "dtr")
    failures = run_side_by_side([bad, good], 2, lambda jobs: None)
    assert set(failures) == {bad.folder.name}
    assert re.match(r"loss term 'mse' is (nan|inf) at step 1, for timesteps \d", failures[bad.folder.name])
    assert (good.folder / "done").exists() and good.progress()["images_seen"] == 64
    assert "tsbench: training diverged" in (bad.folder / "log.txt").read_text()
    assert job.is_scored(job.read_config(good.folder), good.folder)


@pytest.mark.parametrize(
    ("script", "cause"),
    [
        ("import os; os.kill(os.getpid(), 9)", "its process was ended by signal 9"),
        ("print('first'); print('the disk is on fire', file=sys.stderr); sys.exit(4)", "the disk is on fire"),
        ("sys.exit(7)", "its process ended with code 7"),
        ('(folder / \'failure.json\').write_text(\'{"state": "failed", "cause": "no luck"}\'); sys.exit(1)', "no luck"),
        ("pass", "its process ended with code 0"),
    ],
)
def test_a_failure_is_named_and_stops_no_other(script: str, cause: str, tmp_path: Path) -> None:
    jobs = [scripted(tmp_path, "bad", script, cost=2), scripted(tmp_path, "good", FINISH, cost=1)]
    assert run_side_by_side(jobs, 1, lambda jobs: None) == {"bad": cause}
    assert all(each.finished and not each.running for each in jobs) and not jobs[1].failure()


def test_the_costliest_start_first_and_never_more_than_there_are_workers(tmp_path: Path) -> None:
    """Each goes on until it has been seen to run."""
    script = f"while not (folder / 'seen').exists():\n    time.sleep(0.01)\n{FINISH}"
    jobs = [scripted(tmp_path, str(cost), script, cost=cost) for cost in (1, 5, 3, 2, 4)]
    at_once: list[int] = []
    order: list[float] = []

    def watch(jobs: list[Job]) -> None:
        running = {each.cost: each.folder for each in jobs if each.running}
        at_once.append(len(running))
        order.extend(cost for cost in sorted(running, reverse=True) if cost not in order)
        for folder in running.values():
            (folder / "seen").touch()

    assert not run_side_by_side(jobs, 2, watch)
    assert at_once[0] == max(at_once) == 2 and at_once[-1] == 0
    assert order == [5, 4, 3, 2, 1]


def test_each_process_gets_its_threads_and_its_log(tmp_path: Path) -> None:
    script = f"import os; print(os.environ['OMP_NUM_THREADS'], os.environ['MKL_NUM_THREADS'], sys.argv[1:]); {FINISH}"
    each = scripted(tmp_path, "run", script)
    assert not run_side_by_side([each], 1, lambda jobs: None)
    assert (each.folder / "log.txt").read_text() == f"3 3 ['-m', 'bench', 'train', '{each.folder}']\n"


def test_progress_comes_from_the_folder(tmp_path: Path) -> None:
    each = scripted(tmp_path, "run", FINISH)
    assert each.progress() == {} and not each.running and not each.finished
    write_json_atomically(each.folder / "progress.json", {"images_seen": 320})
    assert each.progress()["images_seen"] == 320


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_ends_the_children(error: type[BaseException], tmp_path: Path) -> None:
    """They are asked politely: what they had to tidy is tidied before we go on."""
    polite = (
        "import signal\n"
        "def end(*_):\n    (folder / 'tidied').touch(); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end); (folder / 'ready').touch(); time.sleep(3600)"
    )
    jobs = [scripted(tmp_path, name, polite) for name in ("one", "two", "three")]

    def watch(jobs: list[Job]) -> None:
        if sum((each.folder / "ready").exists() for each in jobs) == 2:
            raise error

    started = time.monotonic()
    with pytest.raises(error):
        run_side_by_side(jobs, 2, watch)
    assert time.monotonic() - started < 600
    assert [each.finished for each in jobs] == [True, True, False] and jobs[2].process is None
    assert [(each.folder / "tidied").exists() for each in jobs] == [True, True, False]
    assert read_json(jobs[0].folder / "failure.json", dict) == {}
