"""Which holder of a run folder is gone, so that it may be taken over, and which is not?"""

import fcntl
import os
import time
from pathlib import Path
from typing import Any

import pytest
from leases import BUSY, FOREIGN, SLURM, leave_behind, token_of

from bench.lease import hold, read

pytestmark = pytest.mark.usefixtures("outside_slurm")


GONE: dict[str, tuple[dict[str, Any], bool]] = {
    "renewed by another machine": ({**FOREIGN, "seconds_ago": 60}, False),
    "not renewed by another machine": ({**FOREIGN, "seconds_ago": 130}, True),
    "died on this machine": ({}, True),
    "before this machine was started again": ({"boot_id": "the boot before"}, False),
    "on another machine of that name": ({"boot_id": "another boot", "seconds_ago": 130}, True),
    "flock does not show": ({"flock": False}, False),
    "flock does not show, not renewed": ({"flock": False, "seconds_ago": 130}, True),
    "the job before it was requeued": ({**FOREIGN, "cluster": "big", "job": "12_3", "num_restarts": 0}, True),
    "another process of this job": ({**FOREIGN, "cluster": "big", "job": "12_3", "num_restarts": 1}, False),
    "a job of that number elsewhere": ({**FOREIGN, "cluster": "small", "job": "12_3", "num_restarts": 0}, False),
    "another job of the array": ({**FOREIGN, "cluster": "big", "job": "12_4", "num_restarts": 0}, False),
    "a job that the queue says is dead": ({**FOREIGN, "cluster": "big", "job": "7"}, True),
    "no job": (FOREIGN, False),
}


@pytest.mark.parametrize(("left", "taken_over"), GONE.values(), ids=list(GONE))
def test_only_a_holder_that_is_gone_is_taken_over(
    left: dict[str, Any], taken_over: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in zip(SLURM, ("15", "12", "3", "1", "big"), strict=True):
        monkeypatch.setenv(name, value)
    token = leave_behind(folder, **({"cluster": "", "job": "", "num_restarts": 0} | left))
    asked = []

    def is_dead(job: str) -> bool:
        asked.append(job)
        return job == "7"

    if taken_over:
        with hold(folder, is_dead):
            assert token_of(folder) != token
        assert list(folder.iterdir()) == []
    else:
        with pytest.raises(ValueError, match=BUSY), hold(folder, is_dead):
            pass
        assert token_of(folder) == token
    assert all(asked)


def test_the_clock_is_the_file_systems(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks of nodes differ."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 86400)
    leave_behind(folder, **FOREIGN)
    with pytest.raises(ValueError, match=r"renewed \d\d? s ago"), hold(folder):
        pass
    (path,) = (folder / "lease").iterdir()
    os.utime(path, (now - 130, now - 130))
    monkeypatch.setattr(time, "time", lambda: now - 86400)
    with hold(folder):
        pass


def test_reading_tells_who_and_when_and_changes_nothing(folder: Path) -> None:
    assert read(folder) is None
    token = leave_behind(folder, seconds_ago=200, **FOREIGN)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    holder = read(folder)
    assert holder is not None and holder.token == token and holder.expired and 199 < holder.renewed_seconds_ago < 260
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_one_that_died_here_holds_nothing(folder: Path) -> None:
    leave_behind(folder)
    assert read(folder) is None


def test_those_who_look_at_a_dead_lease_do_not_make_it_seem_alive(folder: Path) -> None:
    token = leave_behind(folder)
    with open(folder / "lease" / f"{token}.json") as looked_at:
        fcntl.flock(looked_at, fcntl.LOCK_SH)
        with hold(folder):
            pass


def test_a_queue_that_cannot_be_asked_leaves_everything_as_it_is(folder: Path) -> None:
    token = leave_behind(folder, **FOREIGN, job="7")

    def unreachable(_: str) -> bool:
        raise RuntimeError("no controller answers")

    with pytest.raises(RuntimeError, match="no controller answers"), hold(folder, unreachable):
        pass
    assert token_of(folder) == token and len(list(folder.iterdir())) == 1


def test_a_lease_is_new_however_long_the_queue_took_to_answer(folder: Path) -> None:
    leave_behind(folder, **FOREIGN, job="7")

    def slow(_: str) -> bool:
        (candidate,) = folder.glob(".lease-*/*.json")
        os.utime(candidate, (0, 0))
        return True

    with hold(folder, slow):
        holder = read(folder)
        assert holder is not None and not holder.expired
