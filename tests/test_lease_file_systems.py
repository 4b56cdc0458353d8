"""Does a lease hold where the disk is full, flock is missing or an answer is lost?"""

import errno
import fcntl
import os
from pathlib import Path
from typing import IO

import pytest
from leases import BUSY, leave_behind

from bench import lease
from bench.lease import hold, read

pytestmark = pytest.mark.usefixtures("outside_slurm")


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
