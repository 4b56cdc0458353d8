"""Does one process at most work on a run folder, whatever is killed, paused or forked, and however many try?"""

import contextlib
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from leases import BUSY, FOREIGN, PATIENCE_SECONDS, ROOT, leave_behind, token_of, wait_until, wait_until_renewed

from bench import lease
from bench.lease import hold, read

# Processes that are killed, paused and forked

PRELUDE = """
import os, subprocess, sys, time
from pathlib import Path
from bench import lease
folder, host, lease.RENEW_SECONDS, lease.EXPIRE_SECONDS = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
if host:
    lease.this_machine = lambda: (host, host)
"""
UNTIL_ASKED = """
with lease.hold(folder) as held:
    print("held", flush=True)
    sys.stdin.readline()
    print(held.lost, flush=True)
"""


@contextlib.contextmanager
def process(script: str, folder: Path, host: str = "", renew: float = 15, expire: float = 120) -> Iterator[subprocess.Popen[str]]:
    """A process that has said that it is ready."""
    command = [sys.executable, "-c", PRELUDE + script, str(folder), host, str(renew), str(expire)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        try:
            assert said(running) == "held"
            yield running
        finally:
            running.send_signal(signal.SIGCONT)
            running.kill()


def said(running: subprocess.Popen[str]) -> str:
    assert running.stdout is not None
    return running.stdout.readline().strip()


def ask(running: subprocess.Popen[str]) -> str:
    assert running.stdin is not None
    running.stdin.write("\n")
    running.stdin.flush()
    return said(running)


def test_a_killed_process_of_this_machine_is_taken_over_at_once(folder: Path) -> None:
    with process(UNTIL_ASKED, folder) as holder:
        with pytest.raises(ValueError, match=rf"process {holder.pid} on"), hold(folder):
            pass
        holder.kill()
        holder.wait()
        with hold(folder):
            pass
    assert list(folder.iterdir()) == []


def test_a_killed_process_of_another_machine_is_taken_over_when_its_lease_has_expired(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with process(UNTIL_ASKED, folder, "n4", renew=0.1) as holder:
        path = folder / "lease" / f"{token_of(folder)}.json"
        wait_until_renewed(path, times=2)
        holder.kill()
        holder.wait()
        os.utime(path)
        renewed = path.stat().st_mtime
        with pytest.raises(ValueError, match=BUSY), hold(folder):
            pass
        monkeypatch.setattr(lease, "EXPIRE_SECONDS", 1.5)
        wait_until(lambda: can_be_held(folder))
        assert time.time() - renewed > 1.5


def can_be_held(folder: Path) -> bool:
    with contextlib.suppress(ValueError), hold(folder):
        return True
    return False


CHILDREN = {  # they say when they are there
    "forked": "if os.fork() == 0: print('ready', flush=True), time.sleep(3600)",
    "another program": "subprocess.Popen(['sh', '-c', 'echo ready; exec sleep 3600'], close_fds=False)",
    "leaves by the same way": "if os.fork() == 0: "
    "held.leave(), held.lost or os.killpg(0, 9), print('ready', flush=True), time.sleep(3600)",
}


@pytest.mark.parametrize("child", CHILDREN.values(), ids=list(CHILDREN))
def test_a_child_keeps_no_lease(child: str, folder: Path) -> None:
    """As data loader workers that outlive their parent."""
    script = (
        f"os.setpgid(0, 0)\nwith lease.hold(folder) as held:\n    print('held', flush=True)\n    {child}\n    time.sleep(3600)\n"
    )
    with process(script, folder, renew=0.1) as holder:
        try:
            assert said(holder) == "ready"
            with pytest.raises(ValueError, match=rf"process {holder.pid} on"), hold(folder):
                pass
            holder.kill()
            holder.wait()
            os.killpg(holder.pid, 0)  # its child lives
            with hold(folder):
                token = token_of(folder)
                time.sleep(0.3)
                assert token_of(folder) == token
        finally:
            os.killpg(holder.pid, signal.SIGKILL)


def test_a_paused_process_of_this_machine_keeps_its_lease(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "EXPIRE_SECONDS", 0.2)
    with process(UNTIL_ASKED, folder, renew=0.05, expire=0.2) as holder:
        holder.send_signal(signal.SIGSTOP)
        time.sleep(1.2)
        with pytest.raises(ValueError, match=r"renewed [1-9]\d* s ago"), hold(folder):
            pass
        holder.send_signal(signal.SIGCONT)
        assert ask(holder) == "False"


def test_a_process_that_was_paused_too_long_stops(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "EXPIRE_SECONDS", 0.5)
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)
    with process(UNTIL_ASKED, folder, "n4", renew=60, expire=0.5) as paused:
        paused.send_signal(signal.SIGSTOP)
        wait_until(lambda: (holder := read(folder)) is not None and holder.expired)
        with hold(folder) as held:
            monkeypatch.setattr(lease, "EXPIRE_SECONDS", 600.0)  # ours, however slow this machine is
            token = token_of(folder)
            paused.send_signal(signal.SIGCONT)
            assert ask(paused) == "True"
            assert paused.wait() == 0
            assert token_of(folder) == token
            held.check()


def test_a_process_that_was_paused_and_not_taken_over_goes_on(folder: Path) -> None:
    with process(UNTIL_ASKED, folder, "n4", renew=60, expire=0.2) as paused:
        paused.send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        paused.send_signal(signal.SIGCONT)
        assert ask(paused) == "False"


# Many at once

NUM_TAKERS = 8
NUM_ROUNDS = 25
NUM_TURNS = 40


def another_machine(number: int) -> None:
    """This process is on a machine of its own, which flock does not reach."""
    lease.this_machine = lambda: (f"n{number}", f"boot {number}")
    fcntl.flock = lambda *_: None  # type: ignore[assignment]


def take_once_a_round(number: int, machines: bool, folder: Path, barrier: Any, outcomes: Any) -> None:
    """Take a run with all others at once; the winner keeps it until all have tried. Tells the rounds that it has won."""
    if machines:
        another_machine(number)
    for index in range(NUM_ROUNDS):
        barrier.wait()
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(hold(folder / str(index)))
                outcomes.put(index)
            except ValueError as refusal:
                assert BUSY in str(refusal), refusal
            barrier.wait()


def take_in_turn(number: int, machines: bool, folder: Path, barrier: Any, outcomes: Any) -> None:
    """Take a run again and again, and leave it, or end as if killed: its flock is freed, its file stays."""
    if machines:
        another_machine(number)
    barrier.wait()
    end, num_taken = time.monotonic() + PATIENCE_SECONDS, 0
    while num_taken < NUM_TURNS:
        assert time.monotonic() < end, f"{num_taken} turns in {PATIENCE_SECONDS} s"
        try:
            with hold(folder) as held:
                os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
                time.sleep(0.001)
                os.unlink(folder / "inside")
                num_taken += 1
                if num_taken % 2 and not machines:
                    lease.HELD.discard(held)
                    held.disown()
        except ValueError as refusal:
            assert BUSY in str(refusal), refusal
    outcomes.put(num_taken)


def together(work: Callable[..., None], machines: bool, folder: Path) -> list[Any]:
    """What NUM_TAKERS processes say that do this at once."""
    spawn = multiprocessing.get_context("spawn")
    barrier, outcomes = spawn.Barrier(NUM_TAKERS, timeout=PATIENCE_SECONDS), spawn.SimpleQueue()
    takers = [spawn.Process(target=work, args=(number, machines, folder, barrier, outcomes)) for number in range(NUM_TAKERS)]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join()
    assert [taker.exitcode for taker in takers] == [0] * NUM_TAKERS
    said = []
    while not outcomes.empty():
        said.append(outcomes.get())
    return said


LEFT_BEHIND: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "free": (None, True),
    "expired": ({**FOREIGN, "seconds_ago": 130}, True),
    "died here": ({}, False),
}


@pytest.mark.parametrize(("left", "machines"), LEFT_BEHIND.values(), ids=list(LEFT_BEHIND))
def test_of_many_takers_one_wins(left: dict[str, Any] | None, machines: bool, folder: Path) -> None:
    for index in range(NUM_ROUNDS if left is not None else 0):
        leave_behind(folder / str(index), **(left or {}))
    assert sorted(together(take_once_a_round, machines, folder)) == list(range(NUM_ROUNDS))
    assert all(list(run.iterdir()) == [] for run in folder.iterdir())


@pytest.mark.parametrize("machines", [True, False], ids=["many machines", "one machine"])
def test_never_two_at_once(machines: bool, folder: Path) -> None:
    outcomes = together(take_in_turn, machines, folder)
    assert outcomes == [NUM_TURNS] * NUM_TAKERS
