"""Can experts train in jobs of their own, and is it told how far they are?"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from apart import APART, AVERAGED, assembled, train_apart, trainer_of
from command import TINY, Outcome, assert_refused, contents, train, tsbench
from training import Crash, crash_after, differing, rows, saved, tiny_config, tiny_data, tiny_trainer

from bench import checkpoint, experts
from bench.distributed import World
from bench.files import read_json
from bench.job import build_method
from bench.run_folder import clear, left_cause, locked
from bench.runs import LEFT_BY_EXPERT, Run, expert_folder, expert_states, run_state
from bench.tidy import tidy
from bench.trainer import Trainer

# What can be trained apart


def test_what_cannot_be_trained_apart_is_refused(tmp_path: Path) -> None:
    data = tiny_data()

    def check(name: str, *settings: str, **shown: object) -> None:
        config = tiny_config(name, APART, *settings)
        method = build_method(config, data)
        method.diagnostics = lambda probe=None: shown  # type: ignore[method-assign]
        experts.check(config, method)

    check("multi_expert")
    check("multi_expert", "budget.unit=train_flops")
    for name in ("remix_dit", "dense"):
        with pytest.raises(ValueError, match="the intervals of this method share parameters: set it to together"):
            check(name)
    with pytest.raises(ValueError, match=r"cannot share a budget of device_seconds: choose budget\.unit=images"):
        check("multi_expert", "budget.unit=device_seconds")
    with pytest.raises(ValueError, match=r"over training \(routing\) takes all of its experts at once"):
        check("multi_expert", routing=(("expert",), np.zeros(3)))
    with pytest.raises(ValueError, match=r"^system.experts is 'jobs': choose one of together, separate_jobs$"):
        tiny_config("multi_expert", "system.experts=jobs")
    assert tiny_config("multi_expert", APART).run_id == tiny_config("multi_expert").run_id


def test_a_run_goes_on_as_it_was_begun(tmp_path: Path) -> None:
    apart = train_apart(tmp_path / "apart", *AVERAGED)
    separate, joint = tiny_config("multi_expert", APART, *AVERAGED), tiny_config("multi_expert", *AVERAGED)
    for config in (separate, joint):
        experts.check_folder(config, tmp_path / "new")
    experts.check_folder(separate, apart)
    with pytest.raises(ValueError, match=r"was begun with system\.experts=separate_jobs: go on so"):
        experts.check_folder(joint, apart)
    with pytest.raises(ValueError, match="holds another run"):
        experts.check_folder(tiny_config("multi_expert", APART), apart)
    crash_after(tiny_trainer("multi_expert", *AVERAGED, folder=tmp_path / "joint"), 7)
    experts.check_folder(joint, tmp_path / "joint")
    with pytest.raises(ValueError, match=r"was begun with system\.experts=together: go on so"):
        experts.check_folder(separate, tmp_path / "joint")
    (tmp_path / "joint" / "done").touch()
    experts.check_folder(separate, tmp_path / "joint")  # nothing is left to train


def test_done_is_left_last_and_only_when_all_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = trainer_of(tmp_path, 0)
    monkeypatch.setattr(checkpoint, "load", lambda path: checkpoint.Checkpoint({}, {"steps_done": 11}))
    with pytest.raises(ValueError, match="step 11 of 12"):
        experts.train_expert(job)
    monkeypatch.undo()
    assert not (job.folder / "done").exists() and not experts.is_trained(tmp_path, 0)
    experts.train_expert(trainer_of(tmp_path, 0))
    assert experts.is_trained(tmp_path, 0) and not experts.all_done(tmp_path, 2)
    before = saved(job.folder), rows(job.folder)
    for name in LEFT_BY_EXPERT:
        content = (job.folder / name).read_bytes()
        (job.folder / name).unlink()
        assert not experts.is_trained(tmp_path, 0)
        (job.folder / name).write_bytes(content)
    experts.train_expert(trainer_of(tmp_path, 0))  # again: nothing changes
    assert not differing(before[0][0], saved(job.folder)[0]) and before[1] == rows(job.folder)
    assert experts.all_done(tmp_path, 1)


# States


def test_a_run_is_done_when_its_experts_are_assembled_and_failed_when_one_has_failed(tmp_path: Path) -> None:
    assert run_state(tmp_path) == "planned" and expert_states(tmp_path) == {}
    experts.train_expert(trainer_of(tmp_path, 0))
    assert Run(tmp_path).state == "planned" and expert_states(tmp_path) == {0: "done"}
    assert Run(tmp_path).config["method"] == "multi_expert" and Run(tmp_path).images_seen == 32
    crash_after(trainer_of(tmp_path, 1), 4)
    assert run_state(tmp_path) == "running" and Run(tmp_path).images_seen == 56
    assert tidy([Run(tmp_path)])["value"].tolist() == [56]
    with pytest.raises(Crash), left_cause(expert_folder(tmp_path, 1), World()):
        raise Crash("no more memory")
    trainer_of(tmp_path, 2)
    assert expert_states(tmp_path) == {0: "done", 1: "failed", 2: "planned"}
    assert run_state(tmp_path) == "failed" and Run(tmp_path).failure == "expert 1: Crash: no more memory"
    (expert_folder(tmp_path, 1) / "failure.json").unlink()  # as a new attempt does
    for index in (1, 2):
        experts.train_expert(trainer_of(tmp_path, index))
    assert run_state(tmp_path) == "planned" and not Run(tmp_path).failure
    assembled(tmp_path)
    assert run_state(tmp_path) == "running" and Run(tmp_path).images_seen == 96
    (tmp_path / "done").touch()
    assert run_state(tmp_path) == "done"


def test_clearing_a_run_clears_its_experts(tmp_path: Path) -> None:
    folder = train_apart(tmp_path / "run")
    (expert_folder(folder, 1) / "mine.txt").write_text("mine")
    with locked(expert_folder(folder, 2)), pytest.raises(ValueError, match="being worked on"):
        clear(folder)
    clear(folder)
    assert [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()] == ["experts/1/mine.txt"]
    (expert_folder(folder, 1) / "mine.txt").unlink()
    clear(folder)
    assert not folder.exists()


# As the command runs them

SETTINGS = [*TINY, "method=multi_expert", "options.experts=3", "budget.amount=192"]


def tell(folder: Path) -> dict[str, Any]:
    """What a finished run came to."""
    (record,) = Run(folder).evaluations
    return {key: record[key] for key in ("n", "metrics", "heldout_loss")} | {"samples": (folder / "samples.npz").read_bytes()}


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that one job has trained. Read only."""
    return train(tmp_path_factory.mktemp("joint"), *SETTINGS)


def command(runs: Path, *more: str) -> Outcome:
    return tsbench("train", "--runs", runs, *SETTINGS, APART, *more)


def test_the_command_trains_each_in_turn_and_puts_the_run_together(joint: Path, tmp_path: Path) -> None:
    outcome = command(tmp_path)
    assert outcome.code == 0, outcome.err
    run = tmp_path / joint.name
    assert tell(run) == tell(joint) and rows(run) == rows(joint)
    assert run_state(run) == "done" and set(expert_states(run).values()) == {"done"}
    before = contents(run)
    assert command(tmp_path).code == 0 and tsbench("train", run, "--expert", "1").code == 0
    assert contents(run) == before
    (run / "summary.json").unlink()  # it is put together anew
    assert tsbench("train", run).code == 0 and tell(run) == tell(joint)
    assert read_json(run / "summary.json", dict) == json.loads(before["summary.json"])


def test_whichever_expert_comes_last_puts_the_run_together(joint: Path, tmp_path: Path) -> None:
    run = tmp_path / joint.name
    for expert in ("2", "0", "1"):
        assert run_state(run) == "planned"
        outcome = command(tmp_path, "--expert", expert)
        assert outcome.code == 0, outcome.err
    assert run_state(run) == "done" and tell(run) == tell(joint)
    assert [session.get("expert") for session in Run(run).provenance["sessions"]] == [0, 1, 2, None]  # trained once, by these


def test_an_expert_that_has_failed_keeps_the_run_incomplete(joint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / joint.name
    step = Trainer.step

    def failing(trainer: Trainer, batch: Any) -> Any:
        if batch.interval.index == 1:
            raise ValueError("the second expert cannot be trained today")
        return step(trainer, batch)

    monkeypatch.setattr(Trainer, "step", failing)
    assert [command(tmp_path, "--expert", str(index)).code for index in range(3)] == [0, 2, 0]
    assert run_state(run) == "failed" and expert_states(run) == {0: "done", 1: "failed", 2: "done"}
    assert Run(run).failure == "expert 1: the second expert cannot be trained today" and not (run / "checkpoints").exists()
    monkeypatch.undo()
    assert tsbench("train", run).code == 0
    assert run_state(run) == "done" and not Run(run).failure and tell(run) == tell(joint)


def test_an_expert_that_is_none_is_refused(joint: Path, tmp_path: Path) -> None:
    assert_refused(command(tmp_path, "--expert", "3"), "expert", "0 to 2")
    assert_refused(tsbench("train", "--runs", tmp_path, *SETTINGS, "--expert", "0"), "system.experts=separate_jobs")
    assert_refused(command(tmp_path, "method=remix_dit", "options.bases=2"), "share parameters", "together")
    assert not list(tmp_path.iterdir())
