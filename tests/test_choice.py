"""Which runs does a sweep start, which does it leave alone, and when does one that waits end?"""

from collections.abc import Collection
from pathlib import Path

import pytest

from bench.files import write_json_atomically
from bench.runs import expert_folder
from slurm import sweep
from slurm.commands import ClusterUnreachable
from slurm.states import Known, Status
from slurm.sweep import Choice, Item, Sweep, jobs_of, left_to_do, make_ready, wait

BUDGET = {"unit": "images", "amount": 1000}
STALE = "stale (start it over with --only stale)"
SEE = "(see `tsbench status`)"
STATUSES = {
    "done": Status("done"),
    "planned": Status("planned"),
    "cancelled": Status("planned", kind="cancelled"),
    "queued": Status("queued", jobs=("1",)),
    "running": Status("running"),
    "requeued": Status("preempted", jobs=("2",)),
    "preempted": Status("preempted", kind="preempted"),
    "node": Status("failed", kind="node lost"),
    "code": Status("failed", kind="code"),
    "diverged": Status("diverged", kind="diverged"),
    "stale": Status("stale"),
}


def item(name: str, folder: Path = Path("runs"), num_experts: int = 0, after: str = "") -> Item:
    return Item(name, name, folder / name, num_experts, BUDGET, 1, after)


def choose(*only: str) -> Choice:
    return Sweep([item(name) for name in STATUSES], lambda run: []).choose(STATUSES, only)


def names(choice: Choice) -> set[str]:
    return {each.run_id for each in choice.start}


def test_without_a_word_what_is_not_done_and_did_nothing_wrong() -> None:
    choice = choose()
    assert names(choice) == {"planned", "cancelled", "preempted", "node"}
    assert choice.reasons == {
        "done": "done",
        "queued": "queued",
        "running": "running",
        "requeued": "preempted",
        "code": f"failed {SEE}",
        "diverged": f"diverged {SEE}",
        "stale": STALE,
    }


@pytest.mark.parametrize(
    ("only", "started"),
    [
        (["planned"], ["planned", "cancelled", "preempted"]),
        (["failed"], ["node", "code"]),
        (["stale"], ["stale"]),
        (["failed", "stale"], ["node", "code", "stale"]),
        (["diverged"], ["diverged"]),  # by its id: the same weights would diverge again
        (["code", "stale"], ["code", "stale"]),
        (["cance"], ["cancelled"]),  # the beginning of its id
        (["done", "running", "queued", "requeued"], []),  # never twice
    ],
    ids=str,
)
def test_only_what_is_named(only: list[str], started: list[str]) -> None:
    choice = choose(*only)
    assert names(choice) == set(started)
    assert {"done", "queued", "running", "requeued"} <= choice.reasons.keys()
    assert {reason for run, reason in choice.reasons.items() if run not in ("done", "queued", "running", "requeued")} == {
        "not asked for"
    }


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^'nothing' names no run of this suite: give one of planned, failed, stale, or a run"):
        choose("nothing")
    with pytest.raises(ValueError, match=r"^'d' names more than one run of this suite: .* such as done, diverged$"):
        choose("d")


def test_followers_wait_for_what_they_start_from() -> None:
    """On a cluster they are submitted by a later sweep; on one machine they take their turn."""
    of = Sweep([item("a"), item("b", after="a"), item("c", after="b"), item("d", after="elsewhere")], lambda run: [])
    planned = dict.fromkeys("abcd", Status("planned"))
    assert names(of.choose(planned)) == {"a", "d"} and of.choose(planned).reasons == {"b": "waits for a", "c": "waits for b"}
    assert names(of.choose(planned, with_followers=True)) == {"a", "b", "c", "d"}
    assert names(of.choose(planned, ["b"], with_followers=True)) == set()
    assert names(of.choose({**planned, "a": Status("done")})) == {"b", "d"}
    diverged = {**planned, "a": Status("diverged")}
    assert of.choose(diverged, with_followers=True).reasons == {"a": f"diverged {SEE}", "b": "waits for a", "c": "waits for b"}


def test_an_expert_that_is_trained_is_not_trained_again(tmp_path: Path) -> None:
    apart = item("apart", tmp_path, num_experts=3)
    for index in (0, 2):
        expert_folder(apart.folder, index).mkdir(parents=True)
        (expert_folder(apart.folder, index) / "done").touch()
    assert [work.expert for work in left_to_do(apart)] == [1]
    (job,) = jobs_of([apart], tmp_path, {"apart": 6.0})
    assert (job.name, job.expert, job.cost, job.share) == ("apart:1", 1, 2.0, pytest.approx(1 / 3))
    expert_folder(apart.folder, 1).mkdir(parents=True)
    (expert_folder(apart.folder, 1) / "done").touch()
    assert [work.expert for work in left_to_do(apart)] == [2]  # any of them puts the run together
    assert [work.expert for work in left_to_do(item("one", tmp_path))] == [None]


def test_what_is_stale_is_kept_aside_and_failures_may_try_again(tmp_path: Path) -> None:
    items = [item(name, tmp_path) for name in ("stale", "code", "planned")]
    for each in items:
        each.folder.mkdir()
        write_json_atomically(each.folder / "restarts.json", {"place": "", "count": 9})
    done: list[tuple[str, str]] = []

    def set_aside(folder: Path) -> Path:
        done.append(("aside", folder.name))
        return folder

    make_ready(items, STATUSES, lambda each: done.append(("put", each.run_id)), set_aside)
    assert done == [("aside", "stale"), ("put", "stale"), ("put", "code"), ("put", "planned")]
    assert [each.run_id for each in items if not (each.folder / "restarts.json").exists()] == ["code"]


# Waiting


class Scripted(Sweep):
    """Its runs are, look after look, what the test says; None: the cluster does not answer."""

    def __init__(self, *looks: dict[str, Status] | None) -> None:
        super().__init__([item(name) for name in next(look for look in looks if look)], lambda run: [])
        self.looks = list(looks)

    def statuses(self) -> tuple[dict[str, Status], Known]:
        look = self.looks.pop(0)
        unknown = {each.run_id: Status("planned") for each in self.items}
        return (unknown, Known({}, {}, "down", answers=False)) if look is None else (look, Known({}, {}))


def waited(
    of: Scripted, monkeypatch: pytest.MonkeyPatch, fails: Collection[int] = (), asked: Collection[str] = ()
) -> list[list[str]]:
    """What was submitted again, until nothing was left to do; submitting fails at the places given."""
    again: list[list[str]] = []

    def submit(choice: Choice, statuses: sweep.Statuses) -> None:
        again.append([each.run_id for each in choice.start])
        if len(again) - 1 in fails:
            raise ClusterUnreachable("down")

    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.0)
    wait(of, asked or [each.run_id for each in of.items], submit, lambda statuses: None)
    assert not of.looks
    return again


def test_what_the_cluster_takes_away_is_submitted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    running, lost = Status("running"), Status("failed", kind="node lost")
    of = Scripted(
        {"a": running, "b": running},
        {"a": lost, "b": Status("done")},
        {"a": Status("queued", jobs=("3",)), "b": Status("done")},
        {"a": Status("done"), "b": Status("done")},
    )
    assert waited(of, monkeypatch) == [["a"]]


def test_what_was_not_asked_for_is_neither_submitted_nor_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    of = Scripted(
        {"a": Status("running"), "b": Status("planned"), "c": Status("running")},
        {"a": Status("preempted"), "b": Status("planned"), "c": Status("running")},
        {"a": Status("done"), "b": Status("planned"), "c": Status("running")},
    )
    assert waited(of, monkeypatch, asked=["a"]) == [["a"]]


def test_what_someone_cancelled_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled = {"a": Status("planned", kind="cancelled"), "b": Status("running")}
    forgotten = {"a": Status("planned"), "b": Status("failed", kind="code")}  # the cluster remembers it for some minutes
    assert waited(Scripted({"a": Status("running"), "b": Status("running")}, cancelled, forgotten), monkeypatch) == []


def test_while_the_cluster_does_not_answer_nothing_is_submitted_and_nothing_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    of = Scripted(
        {"a": Status("running")}, None, None, {"a": Status("preempted")}, {"a": Status("preempted")}, {"a": Status("done")}
    )
    assert waited(of, monkeypatch, fails={0}) == [["a"], ["a"]]  # what could not be submitted is tried at the next look
