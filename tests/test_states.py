"""Is every state of a run told from its folder and from what the cluster says, and nothing else?"""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from claimed import BUDGET, JOB, claim, claimed_run, ended, live, no_difference, status

from bench import lease
from bench.files import write_json_atomically
from bench.runs import expert_folder
from slurm import states
from slurm.claims import Work, started_at
from slurm.states import Known, Status, status_of

TRACEBACK = "Traceback (most recent call last):"
HELD = {"host": "elsewhere", "boot_id": "b", "node": "n9", "pid": 7, "cluster": "", "job": "", "num_restarts": 0, "flock": False}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return claimed_run(tmp_path)


def begin(place: Path, images_seen: int = 250) -> None:
    """As training leaves it after that many images, in 100 seconds."""
    (place / "checkpoints").mkdir(parents=True)
    (place / "checkpoints" / "step-00000008.safetensors").touch()
    write_json_atomically(place / "progress.json", {"images_seen": images_seen, "device_seconds": 100.0, "time": 0.0})


def hold(place: Path, seconds_ago: float = 0.0) -> None:
    (place / "lease").mkdir()
    file = place / "lease" / "t.json"
    file.write_text(json.dumps({"token": "t", "taken": "2030-01-01T00:00:00Z", **HELD}))
    os.utime(file, (time.time() - seconds_ago,) * 2)


def test_nothing_is_there_yet(tmp_path: Path) -> None:
    assert status(tmp_path / "nothing") == Status("planned")


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (Known(live("PENDING", "Resources"), {}), Status("queued", "Resources; goes on from 25%", 0.25, jobs=(JOB,))),
        (Known(live("PENDING"), ended("REQUEUED")), Status("queued", "goes on from 25%", 0.25, jobs=(JOB,))),
        (Known(live("PENDING"), ended("PREEMPTED")), Status("preempted", "goes on from 25%", 0.25, jobs=(JOB,))),
        (Known(live("RUNNING"), ended("PREEMPTED")), Status("running", "", 0.25, 300.0, (JOB,))),
        (Known(live("COMPLETING"), {}), Status("running", "", 0.25, 300.0, (JOB,))),
        (Known({}, ended("PREEMPTED")), Status("preempted", "job 12_3 was preempted", 0.25, kind="preempted")),
        (Known({}, ended("CANCELLED")), Status("planned", "job 12_3 was cancelled", 0.25, kind="cancelled")),
        (Known({}, ended("TIMEOUT")), Status("failed", "job 12_3 reached its time limit of 20 minutes", 0.25, kind="time limit")),
        (Known({}, ended("NODE_FAIL")), Status("failed", "job 12_3 lost its node n1", 0.25, kind="node lost")),
        (Known({}, ended("COMPLETED")), Status("planned", "job 12_3 stopped early", 0.25)),
        (Known({}, {}), Status("planned", "job 12_3 is not known to the cluster any more", 0.25)),
        (Known({}, {}, answers=False), Status("planned", "was given to job 12_3 of a cluster that cannot be asked", 0.25)),
    ],
    ids=lambda value: value.state if isinstance(value, Status) else "",
)
def test_what_the_cluster_says_of_a_run_that_has_begun(known: Known, expected: Status, folder: Path) -> None:
    begin(folder)
    assert status(folder, known) == expected


def test_failures_are_named_and_told_apart(folder: Path) -> None:
    """Out of memory, killed, and by its code's own fault: only the last two words come from what it wrote."""
    (folder / "12_3_0_log.err").write_text("Traceback (most recent call last):\n  x\nKeyError: 'lost'\n")
    told = {
        state: status(folder, Known({}, ended(state, **changes)))
        for state, changes in (("OUT_OF_MEMORY", {}), ("FAILED", {}), ("NODE_FAIL", {"nodes": ""}))
    }
    assert told["OUT_OF_MEMORY"].kind == "memory" and not told["OUT_OF_MEMORY"].resumable
    assert told["FAILED"].kind == "code" and told["FAILED"].detail.endswith("exit code 1: KeyError: 'lost'")
    assert not told["FAILED"].resumable and told["NODE_FAIL"].resumable
    killed = status(folder, Known({}, ended("FAILED", exit_code=0, signal=9)))
    assert killed.kind == "killed" and killed.resumable and "KeyError" not in killed.detail


@pytest.mark.parametrize(("state", "kind"), [("failed", "code"), ("diverged", "diverged")])
def test_what_the_run_says_itself_counts_more_than_how_its_job_ended(state: str, kind: str, folder: Path) -> None:
    write_json_atomically(folder / "failure.json", {"state": state, "cause": "loss is nan"})
    assert status(folder, Known({}, ended("FAILED"))) == Status(state, "loss is nan", kind=kind)
    assert status(folder, Known(live("RUNNING"), {})).state == "running"  # it is being tried again


GLOO = "[/x/gloo/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:55521: Connection reset by peer."
STOPS = "rank 0 stops because rank 2 failed: "


@pytest.mark.parametrize(
    ("cause", "raised"),
    [
        (f"RuntimeError: {GLOO}", f"RuntimeError: {GLOO}"),
        ("DistBackendError: NCCL error in: x.cpp", "torch.distributed.DistBackendError: NCCL error in: x.cpp"),
        (f"{STOPS}RuntimeError: {GLOO}", f"ValueError: {STOPS}RuntimeError: {GLOO}"),
    ],
    ids=["gloo", "nccl", "together"],
)
def test_what_tells_only_of_another_rank_is_no_cause(cause: str, raised: str, folder: Path) -> None:
    """Then how the job ended tells more, and what the rank that failed first has written, whichever it is."""
    write_json_atomically(folder / "failure.json", {"state": "failed", "cause": cause})
    assert status(folder, Known({}, ended("NODE_FAIL"))).kind == "node lost"
    assert status(folder, Known({}, ended("FAILED", exit_code=0, signal=9))).kind == "killed"
    errors = {rank: [f"[rank{rank}]: {line}" for line in (TRACEBACK, "  File x", raised)] for rank in (0, 1, 3)}
    errors[2] = ["[rank2]: " + TRACEBACK, "[rank2]:   File y", "[rank2]: bench.Damaged: no such image"]
    for rank, lines in errors.items():
        (folder / f"12_3_{rank}_log.err").write_text("\n".join(lines) + "\n")
    told = status(folder, Known({}, ended("FAILED")))
    assert told.kind == "code" and told.detail == "job 12_3 failed with exit code 1: bench.Damaged: no such image"


def test_what_the_first_rank_to_fail_has_said_is_the_cause_and_the_lines_are_its_own(folder: Path) -> None:
    said = f"{STOPS}no such image"
    write_json_atomically(folder / "failure.json", {"state": "failed", "cause": said})
    assert status(folder, Known({}, ended("FAILED"))) == Status("failed", said, kind="code")
    for rank, raised in enumerate([said, said.replace("rank 0", "rank 1"), "no such image", said.replace("rank 0", "rank 3")]):
        errors = (TRACEBACK, f"  File {rank}", f"ValueError: {raised}")
        (folder / f"12_3_{rank}_log.err").write_text("".join(f"[rank{rank}]: {line}\n" for line in errors))
    told = status(folder, Known({}, ended("FAILED")))
    assert told.detail == said and told.lines == ("  File 2", "ValueError: no such image")


def test_a_job_that_is_being_submitted_and_one_whose_launcher_died(folder: Path) -> None:
    host, boot_id = lease.this_machine()
    here = {"job": "", "host": host, "boot_id": boot_id, "launcher_started": started_at(os.getpid())}
    claim(folder, **here)
    assert status(folder) == Status("queued", "being submitted")
    claim(folder, **here, pid=2**22 + 1)
    assert status(folder) == Status("planned")
    assert status(folder, Known(live("PENDING"), {})) == Status("queued", "", jobs=(JOB,))  # it had come to submitting
    assert status(folder, Known(live("PENDING", name="another"), {})) == Status("planned")


def test_a_process_that_holds_the_run(folder: Path) -> None:
    begin(folder)
    hold(folder)
    assert status(folder, Known({}, ended("FAILED"))) == Status("running", "", 0.25, 300.0)
    os.utime(folder / "lease" / "t.json", (0, 0))
    assert status(folder, Known({}, ended("NODE_FAIL"))).state == "failed"
    assert lease.EXPIRE_SECONDS < 1000


def test_sampling_has_no_time_left_to_tell(folder: Path) -> None:
    begin(folder, images_seen=1000)
    hold(folder)
    write_json_atomically(folder / "curve.json", [{}, {}])
    assert status(folder) == Status("running", "sampling and scoring (2 of its curve)", 1.0)


def test_seconds_left_are_of_all_ranks_together(folder: Path) -> None:
    begin(folder)
    hold(folder)
    write_json_atomically(folder / "provenance.json", {"world_size": 4})
    assert status(folder).seconds_left == 75.0


def record(**protocol: Any) -> dict[str, Any]:
    return {
        "protocol_hash": "aa",
        "protocol": {"seed": 0, "steps": "50", "reference": "train", **protocol},
        "n": 1,
        "metrics": {},
    }


def test_done_is_what_is_scored_as_it_should_be(folder: Path) -> None:
    begin(folder, images_seen=1000)
    write_json_atomically(folder / "eval.json", [record(), record(seed=3)])
    (folder / "done").touch()
    for seed, state in ((0, "done"), (3, "done"), (4, "planned")):
        assert status(folder, evaluation={"seed": seed, "steps": "50", "reference": ""}).state == state
    assert status(folder, evaluation={"seed": 0, "reference": "a/file.npz"}).state == "planned"
    assert status(folder) == Status("done", fraction=1.0)  # by any scores
    hold(folder)
    assert status(folder, evaluation={"seed": 4, "reference": ""}).state == "running"
    assert status(folder, evaluation={"seed": 0, "reference": ""}).state == "done"


def test_what_other_code_has_made_is_stale_with_the_difference(folder: Path) -> None:
    changed = [f"bench/{name}.py changed" for name in "abcde"]
    detail = "made by other code: bench/a.py changed, bench/b.py changed, bench/c.py changed and 2 more"
    assert status(folder, difference=lambda run: changed).state == "planned"  # nothing was made yet
    begin(folder)
    assert status(folder, difference=lambda run: changed) == Status("stale", detail, 0.25, changed=tuple(changed))
    assert status(folder, Known(live("RUNNING"), {}), lambda run: changed).state == "running"
    write_json_atomically(folder / "eval.json", [record()])
    (folder / "done").touch()
    assert status(folder, difference=lambda run: changed) == Status("stale", detail, 1.0, changed=tuple(changed))


# Experts in jobs of their own


def of_experts(folder: Path, known: Known = states.NOTHING, difference: states.CodeDifference = no_difference) -> Status:
    return status_of([Work(folder, expert_folder(folder, i), i) for i in range(2)], known, difference, BUDGET)


def test_a_run_is_as_far_as_its_experts_together(folder: Path) -> None:
    first, second = (expert_folder(folder, index) for index in range(2))
    (folder / "job.json").unlink()
    begin(first, 250)
    begin(second, 500)
    claim(first)
    (second / "done").touch()
    assert of_experts(folder, Known(live("RUNNING"), {})) == Status("running", "", 0.75, jobs=(JOB,))
    assert of_experts(folder, Known(live("PENDING"), {})) == Status("queued", "goes on from 75%", 0.75, jobs=(JOB,))
    assert of_experts(folder, Known({}, ended("TIMEOUT"))).kind == "time limit"
    write_json_atomically(first / "failure.json", {"state": "diverged", "cause": "loss is nan"})
    assert of_experts(folder) == Status("diverged", "expert 0: loss is nan", 0.75, kind="diverged")
    (first / "failure.json").unlink()
    (first / "done").touch()
    assert of_experts(folder, Known({}, ended("COMPLETED"))) == Status("planned", "goes on from 75%", 0.75)  # to be assembled


def test_one_expert_by_other_code_makes_the_run_stale(folder: Path) -> None:
    """Before they are assembled, only the experts know by which code they were made."""
    begin(expert_folder(folder, 1))
    told = of_experts(folder, difference=lambda run: ["bench/a.py changed"] if run.path.name == "1" else [])
    assert told.state == "stale" and told.changed == ("bench/a.py changed",)
