"""Who gets a run folder, who is refused, and who learns that it is another's now?"""

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import pytest
from leases import BUSY, FOREIGN, ROOT, leave_behind, token_of, wait_until

from bench import lease
from bench.lease import LeaseLost, hold, read

HERE = lease.this_machine()
SLURM = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "SLURM_CLUSTER_NAME")


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SLURM, "SLURMD_NODENAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "abc"


def be(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """From now on this process is on that machine."""
    monkeypatch.setattr(lease, "this_machine", lambda: (host, f"boot of {host}"))


# Holding and leaving


def test_a_run_is_held_once_and_nothing_is_left_of_it(folder: Path) -> None:
    with hold(folder) as held:
        holder = read(folder)
        assert holder is not None and holder.pid == os.getpid() and (holder.host, holder.boot_id) == HERE
        assert holder.flock and not holder.expired and 0 <= holder.renewed_seconds_ago < 5
        before = {path.name for path in folder.rglob("*")}
        with (
            pytest.raises(ValueError, match=rf"^run abc {BUSY} \(process {os.getpid()} on .*, renewed \d s ago\): wait"),
            hold(folder),
        ):
            pass
        assert {path.name for path in folder.rglob("*")} == before
        assert not held.lost
        held.check()
    assert list(folder.iterdir()) == [] and read(folder) is None
    with hold(folder):
        pass


def test_an_error_inside_leaves_the_run_too(folder: Path) -> None:
    with pytest.raises(ZeroDivisionError), hold(folder):
        _ = 1 / 0
    assert list(folder.iterdir()) == []


def test_the_holder_is_named_as_slurm_names_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = ("15", "12", "3", "2", "big")
    for name, value in zip(SLURM, values, strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURMD_NODENAME", "n4")
    with hold(folder):
        holder = read(folder)
        assert holder is not None and (holder.job, holder.num_restarts, holder.cluster) == ("12_3", 2, "big")
        with pytest.raises(ValueError, match=r"\(job 12_3 on n4, renewed 0 s ago\)"), hold(folder):
            pass
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID")
    assert lease.this_process().job == "15"


def test_a_lease_stays_where_it_is_when_the_process_goes_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with hold(Path("abc")) as held:
        monkeypatch.chdir("/")
        held.check()
    assert list((tmp_path / "abc").iterdir()) == []


def test_a_lease_is_renewed_and_only_while_it_is_held(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)
    with hold(folder):
        path = folder / "lease" / f"{token_of(folder)}.json"
        for _ in range(2):
            os.utime(path, (0, 0))
            wait_until(lambda: path.stat().st_mtime > 0)
    path.parent.mkdir()
    path.touch()
    os.utime(path, (0, 0))
    time.sleep(0.3)
    assert path.stat().st_mtime == 0


def test_a_full_disk_loses_no_lease(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with hold(folder) as held, monkeypatch.context() as disk:
        for name in ("open", "mkdir", "rename", "write"):
            disk.setattr(os, name, full)
        disk.setattr("builtins.open", full)
        held.check()
        assert not held.lost
    with monkeypatch.context() as disk:
        disk.setattr("builtins.open", full)
        with pytest.raises(ValueError, match=r"cannot write to .* \(No space left on device\): choose"), hold(folder):
            pass
    assert list(folder.iterdir()) == []


def test_clearing_a_run_removes_what_killed_takers_left(folder: Path) -> None:
    from bench.run_folder import clear, locked  # with torch, which the processes below need not wait for

    leave_behind(folder)
    (folder / ".lease-0123").mkdir()
    (folder / ".lease-0123" / "0123.json").write_text("")
    with locked(folder) as held:
        held.check()
        with pytest.raises(ValueError, match=BUSY):
            clear(folder)
    clear(folder)
    assert not folder.exists()


def test_a_laptop_reads_leases_without_torch() -> None:
    code = "import sys, bench.lease; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def test_what_cannot_be_a_run_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="cannot write to"), hold(folder):
            pass


def test_files_that_are_no_lease_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RETRY_SECONDS", 0.001)
    (folder / "lease").mkdir(parents=True)
    (folder / "lease" / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"lease holds other files than a lease: delete it"), hold(folder):
        pass
    (folder / "lease" / "half.json").write_text('{"token": ')
    with pytest.raises(ValueError, match=r"half\.json is damaged: delete it"), hold(folder):
        pass
    assert {path.name for path in folder.iterdir()} == {"lease"}


# Who is gone, and who is not


GONE: dict[str, tuple[dict[str, Any], bool]] = {
    "renewed by another machine": ({**FOREIGN, "seconds_ago": 110}, False),
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
    with pytest.raises(ValueError, match="renewed 5 s ago"), hold(folder):
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


# File systems that differ


def test_where_flock_is_missing_time_tells(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    for absent in (missing, lambda *_: None):  # refused; or granted to everyone
        with monkeypatch.context() as disk:
            disk.setattr(fcntl, "flock", absent)
            with hold(folder):
                holder = read(folder)
                assert holder is not None and not holder.flock
                with pytest.raises(ValueError, match=BUSY), hold(folder):
                    pass
                disk.setattr(lease, "EXPIRE_SECONDS", -1.0)
                with hold(folder):
                    pass


def test_flock_that_cannot_be_looked_at_is_not_taken_for_free(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_behind(folder)

    def missing(file: IO[str], how: int) -> None:
        if how & fcntl.LOCK_SH:
            raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", missing)
    with pytest.raises(ValueError, match=BUSY), hold(folder):
        pass


def test_where_no_folder_is_renamed_over_an_empty_one_a_lease_is_taken_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def strict(source: Path, target: Path) -> None:
        if target.exists():
            raise OSError(errno.EEXIST, "File exists")
        rename(source, target)

    monkeypatch.setattr(os, "rename", strict)
    leave_behind(folder)
    with hold(folder):
        pass
    (folder / "lease").mkdir()
    with hold(folder):
        pass


def test_an_answer_that_nfs_has_lost_is_no_refusal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def answer_lost(source: Path, target: Path) -> None:
        rename(source, target)
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(os, "rename", answer_lost)
    with hold(folder) as held:
        held.check()


# Being taken over


def test_who_is_taken_over_learns_it_and_harms_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    be(monkeypatch, "n1")
    with hold(folder) as old:
        be(monkeypatch, "n2")
        with hold(folder, lambda job: job == "7") as new:
            token = token_of(folder)
            wait_until(lambda: old.lost)
            with pytest.raises(LeaseLost, match="run abc has been taken over"):
                old.check()
            old.leave()
            assert token_of(folder) == token and not new.lost
            new.check()
            assert not any(path.name.startswith(".") for path in folder.iterdir())


def test_a_check_asks_the_file_system_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    be(monkeypatch, "n1")
    with hold(folder) as old:
        be(monkeypatch, "n2")
        with hold(folder, lambda _: True):
            with pytest.raises(LeaseLost):
                old.check()
            assert old.lost


def test_a_lease_that_cannot_be_renewed_is_lost_when_others_may_take_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    utime = os.utime

    def cut_off(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with hold(folder) as held:
        monkeypatch.setattr(os, "utime", cut_off)
        held.check()
        monkeypatch.setattr(os, "utime", utime)
        held.check()
        monkeypatch.setattr(os, "utime", cut_off)
        monkeypatch.setattr(lease, "EXPIRE_SECONDS", 0.05)
        time.sleep(0.1)
        assert held.lost
        monkeypatch.setattr(os, "utime", utime)
        assert held.lost


def test_a_failing_renewal_counts_from_the_last_that_worked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(lease, "EXPIRE_SECONDS", 1.0)

    def cut_off(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with hold(folder) as held:
        time.sleep(1.2)
        monkeypatch.setattr(os, "utime", cut_off)
        held.check()
        wait_until(lambda: held.lost)
