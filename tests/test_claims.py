"""Does each piece of work get into the queue once, whoever launches at the same time or dies in between?"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from training import PATIENCE_SECONDS, PROCESSES

from bench.files import write_json_atomically
from bench.lease import this_machine
from slurm import claims
from slurm.claims import LAUNCH_SECONDS, Claim, Work, give_up, is_in_hand, note_job, orphan, read_claim, started_at, take

NUM_LAUNCHERS, NUM_WORKS = 6, 12
NOBODY = 2**22 + 1  # no process has this id: it is above the kernel's limit
HERE, BOOT = this_machine()
US = {"pid": os.getpid(), "launcher_started": started_at(os.getpid())}


def work_in(folder: Path, name: str = "run", expert: int | None = None) -> Work:
    run = folder / name
    return Work(run, run if expert is None else run / "experts" / str(expert), expert)


def claimed(work: Work, **changes: object) -> Claim:
    """By a launcher that has died, unless the changes say otherwise."""
    by = Claim("tsbench-1", 0, HERE, NOBODY, time.time(), boot_id=BOOT, launcher_started=12345)
    claim = replace(by, **changes)  # type: ignore[arg-type]
    work.folder.mkdir(parents=True, exist_ok=True)
    write_json_atomically(work.folder / "job.json", asdict(claim))
    return claim


def take_all(works: list[Work], token: str, names: Mapping[str, str] | None = None) -> list[Work]:
    return take(works, token, lambda: names or {}, Path("logs"), Path("code"))


def test_who_takes_it_has_it(tmp_path: Path) -> None:
    works = [work_in(tmp_path, f"run{n}") for n in range(3)]
    assert take_all(works, "first") == works
    assert take_all(works, "second") == []  # the first launcher, this process, lives
    told = [read_claim(work) for work in works]
    assert [(c.token, c.index, c.pid, c.job, c.logs) for c in told if c] == [
        ("first", n, os.getpid(), "", "logs") for n in range(3)
    ]
    note_job(works[1], "first", "12_1")
    assert take_all(works, "second", {"12_1": "first"}) == []
    assert take_all(works, "second", {"13": "other"}) == [works[1]]  # its job has left the queue


def launch(folder: Path, token: str, barrier: object, results: object) -> None:
    """As a launcher does: take, submit (which takes a while), note the jobs."""
    works = [work_in(folder, f"run{n}") for n in range(NUM_WORKS)]
    barrier.wait()  # type: ignore[attr-defined]
    ours = take(works, token, lambda: queued(folder), Path("logs"), Path("code"))
    for index, work in enumerate(ours):
        (folder / "queue" / f"{token}_{index}").write_text(work.name)
    for index, work in enumerate(ours):
        note_job(work, token, f"{token}_{index}")
    results.put((token, [work.name for work in ours]))  # type: ignore[attr-defined]


def queued(folder: Path) -> dict[str, str]:
    return {path.name: path.name.partition("_")[0] for path in (folder / "queue").iterdir()}


def test_of_many_launchers_at_once_each_work_is_taken_by_one(tmp_path: Path) -> None:
    (tmp_path / "queue").mkdir()
    barrier, results = PROCESSES.Barrier(NUM_LAUNCHERS), PROCESSES.Queue()
    tokens = [f"launcher{n}" for n in range(NUM_LAUNCHERS)]
    processes = [PROCESSES.Process(target=launch, args=(tmp_path, token, barrier, results)) for token in tokens]
    for process in processes:
        process.start()
    taken = dict(results.get(timeout=PATIENCE_SECONDS) for _ in processes)
    for process in processes:
        process.join(PATIENCE_SECONDS)
        assert process.exitcode == 0
    names = [f"run{n}" for n in range(NUM_WORKS)]
    assert sorted(name for of_one in taken.values() for name in of_one) == sorted(names)
    assert len(list((tmp_path / "queue").iterdir())) == NUM_WORKS
    for name in names:
        claim = read_claim(work_in(tmp_path, name))
        assert claim is not None and (tmp_path / "queue" / claim.job).read_text() == name


def test_what_another_launcher_submits_while_we_ask_the_queue_is_its_own(tmp_path: Path) -> None:
    """Our answer does not hold its job yet, and its claim names a job already: as if that had ended."""
    work = work_in(tmp_path)
    claimed(work, job="11")  # long gone

    def ask() -> dict[str, str]:
        claimed(work, token="other", job="12")
        return {}

    assert take([work], "ours", ask, Path("logs"), Path("code")) == []
    assert take_all([work], "ours", {"12": "other"}) == []
    assert take_all([work], "ours", {}) == [work]


LONG_AGO = {"claimed": time.time() - 2 * LAUNCH_SECONDS}


@pytest.mark.parametrize(
    ("launcher", "lives"),
    [
        (US, True),
        ({**US, **LONG_AGO}, True),
        ({}, False),
        ({"pid": os.getpid()}, False),  # its id is another process's by now
        ({"host": "login2"}, True),  # cannot be told from here
        ({"host": "login2", **LONG_AGO}, False),
        ({**US, "boot_id": "another"}, True),  # a machine of the same name, or this one before it was restarted
        ({**US, "boot_id": "another", **LONG_AGO}, False),
        ({**US, "launcher_started": None}, True),
        ({**US, "launcher_started": None, **LONG_AGO}, False),
    ],
)
def test_a_launcher_that_died_before_it_submitted_blocks_nothing(
    launcher: dict[str, object], lives: bool, tmp_path: Path
) -> None:
    work = work_in(tmp_path)
    claim = claimed(work, **launcher)
    assert claim.launcher_is_alive == lives and is_in_hand(claim, {}) == lives
    assert take_all([work], "ours") == ([] if lives else [work])


def test_when_processes_started() -> None:
    """One that has ended is gone, also while nobody has asked how; an early one started before a late one."""
    assert started_at(NOBODY) == 0
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert 0 < (started_at(os.getpid()) or 0) < (started_at(child.pid) or 0)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    assert started_at(child.pid) == 0
    child.communicate()


def test_the_process_of_another_user_lives_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless /proc tells more of it."""

    def refuse(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(claims.os, "kill", refuse)
    assert claimed(work_in(tmp_path)).launcher_is_alive
    assert not claimed(work_in(tmp_path), **LONG_AGO).launcher_is_alive
    assert not claimed(work_in(tmp_path), pid=os.getpid()).launcher_is_alive


QUEUE = {"12_0": "tsbench-1", "12_3": "tsbench-1", "12_13": "tsbench-1", "14": "tsbench-2", "15_1": "another"}


@pytest.mark.parametrize(
    ("token", "index", "job"),
    [("tsbench-1", 3, "12_3"), ("tsbench-1", 1, ""), ("tsbench-2", 0, "14"), ("tsbench-2", 1, ""), ("tsbench-3", 0, "")],
)
def test_the_job_of_a_launcher_that_died_after_it_submitted_is_adopted(token: str, index: int, job: str, tmp_path: Path) -> None:
    """By the token, which is the job's name, and the place in the array; an array of one is a plain job."""
    work = work_in(tmp_path)
    claim = claimed(work, token=token, index=index)
    assert claim.job_in(QUEUE) == job
    assert take_all([work], "ours", QUEUE) == ([] if job else [work])
    if job:
        assert orphan(work, QUEUE) == replace(claim, job=job)
        note_job(work, token, job)
        assert orphan(work, QUEUE) is None  # once
        assert take_all([work], "ours", QUEUE) == []


def test_a_living_launcher_notes_its_own_jobs(tmp_path: Path) -> None:
    work = work_in(tmp_path)
    claimed(work, index=3, **US)
    assert orphan(work, QUEUE) is None and orphan(work_in(tmp_path, "no claim"), QUEUE) is None


def test_what_the_cluster_refuses_can_be_taken_again(tmp_path: Path) -> None:
    one, two = works = [work_in(tmp_path, name) for name in ("one", "two")]
    take_all(works, "ours")
    note_job(two, "ours", "12")
    for work in works:
        give_up(work, "another")
        give_up(work, "ours")
    assert read_claim(one) is None
    assert read_claim(two) is not None  # the cluster has it
    with pytest.raises(AssertionError, match="the claim of two was taken away"):
        note_job(two, "another", "13")


def test_experts_are_claimed_one_by_one(tmp_path: Path) -> None:
    works = [work_in(tmp_path, expert=index) for index in range(2)]
    assert take_all(works[:1], "first") == works[:1] and take_all(works, "second") == works[1:]
    assert [work.name for work in works] == ["run:0", "run:1"]
    assert json.loads((tmp_path / "run" / "experts" / "1" / "job.json").read_text())["index"] == 0


def test_a_record_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    work = work_in(tmp_path)
    work.folder.mkdir()
    write_json_atomically(work.folder / "job.json", {"job": "12"})
    with pytest.raises(ValueError, match=r"^[^\n]*job.json is no job record: delete it, once `squeue` shows no job[^\n]*$"):
        read_claim(work)
