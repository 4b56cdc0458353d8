"""Who gets a run folder, who is refused, and who learns that it is another's now?"""

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from leases import BUSY, PATIENCE_SECONDS, ROOT, SLURM, leave_behind, token_of, wait_until, wait_until_renewed

from bench import lease
from bench.lease import LeaseLost, hold, read

pytestmark = pytest.mark.usefixtures("outside_slurm")


HERE = lease.this_machine()


def be(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """From now on this process is on that machine."""
    monkeypatch.setattr(lease, "this_machine", lambda: (host, f"boot of {host}"))


# Holding and leaving


def test_a_run_is_held_once_and_nothing_is_left_of_it(folder: Path) -> None:
    with hold(folder) as held:
        holder = read(folder)
        assert holder is not None and holder.pid == os.getpid() and (holder.host, holder.boot_id) == HERE
        assert holder.flock and not holder.expired and 0 <= holder.renewed_seconds_ago < 60
        before = {path.name for path in folder.rglob("*")}
        with (
            pytest.raises(ValueError, match=rf"^run abc {BUSY} \(process {os.getpid()} on .*, renewed \d+ s ago\): wait"),
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
        with pytest.raises(ValueError, match=r"\(job 12_3 on n4, renewed \d+ s ago\)"), hold(folder):
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
    others = set(threading.enumerate())
    with hold(folder):
        path = folder / "lease" / f"{token_of(folder)}.json"
        wait_until_renewed(path, times=2)
        (keeper,) = set(threading.enumerate()) - others
    path.parent.mkdir()
    path.touch()  # whoever renews would go on
    keeper.join(PATIENCE_SECONDS)
    assert not keeper.is_alive()


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
    now = [0.0]
    monkeypatch.setattr(lease, "time", SimpleNamespace(**{**vars(time), "monotonic": lambda: now[0]}))

    def cut_off(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with hold(folder) as held:
        now[0] = 100.0
        wait_until_renewed(folder / "lease" / f"{token_of(folder)}.json", times=3)
        monkeypatch.setattr(os, "utime", cut_off)
        now[0] = 100.0 + lease.EXPIRE_SECONDS
        held.check()
        now[0] += 1
        wait_until(lambda: held.lost)
