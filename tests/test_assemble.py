"""Are experts that trained in jobs of their own, once assembled, the run that one job would have trained?"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from apart import APART, AVERAGED, NUM_EXPERTS, assembled, train_apart, trainer_of
from helpers import randomise
from safetensors import safe_open
from training import PROCESSES, Crash, crash_after, differing, exit_codes_of, free_port, rows, saved, state_of, tiny_trainer

from bench import assemble, checkpoint, experts
from bench.distributed import world_from_environment
from bench.files import read_json, write_json_atomically
from bench.heldout import heldout_losses
from bench.job import prepare_folder
from bench.run_folder import summary_of
from bench.runs import Run, expert_folder, read_metric_rows
from bench.trainer import Interrupted, Trainer


def together(folder: Path, *settings: str) -> Trainer:
    trainer = tiny_trainer("multi_expert", *settings, folder=folder)
    trainer.fit()
    return trainer


def contents(folder: Path) -> dict[str, Any]:
    """Of every file that assembling writes, but for the times of the heartbeat and of the sessions.

    Of checkpoints what they hold: safetensors writes the entries of the header in any order.
    """
    found: dict[str, Any] = {"metrics.jsonl": (folder / "metrics.jsonl").read_bytes()}
    for path in (*folder.glob("checkpoints/*"), *folder.glob("snapshots/*")):
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118
            found[path.relative_to(folder).as_posix()] = (file.metadata(), tensors)
    return found


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose experts are trained, and not yet assembled. Read only."""
    return train_apart(tmp_path_factory.mktemp("apart"), *AVERAGED)


@pytest.fixture
def folder(apart: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(apart, tmp_path / "run"))


# The same run


@pytest.mark.parametrize(
    "settings",
    [
        AVERAGED,
        (*AVERAGED, "budget.amount=104", "heldout.points=5", "system.log_every=5"),  # 13 steps: no multiple of anything
        ("budget.unit=train_flops", "system.log_every=1", "heldout.bins=7", "train.micro_batches=2"),
        ("options.experts=1",),
        ("budget.amount=16",),  # two steps for three experts: one is never trained
    ],
    ids=["averaged", "odd", "flops", "one expert", "one untrained"],
)
def test_assembled_is_the_run_that_one_job_trains(settings: tuple[str, ...], tmp_path: Path) -> None:
    whole = together(tmp_path / "whole", *settings)
    for index in range(len(whole.method.intervals)):
        experts.train_expert(trainer_of(tmp_path / "run", index, *settings))
    run = assembled(tmp_path / "run", *settings)
    assert not differing(state_of(whole), state_of(run))
    tensors, counters = saved(tmp_path / "run")
    assert not differing(saved(tmp_path / "whole")[0], tensors) and saved(tmp_path / "whole")[1] == counters
    told, expected = rows(tmp_path / "run"), rows(tmp_path / "whole")
    assert len(told) > 8 and {row["kind"] for row in told} == {"train", "heldout"}
    assert [list(row.items()) for row in told] == [list(row.items()) for row in expected]  # to the bit, and in this order
    assert run.images_seen == whole.images_seen and run.train_flops == whole.train_flops and run.finished()


def test_it_can_be_restored_and_the_last_held_out_losses_are_those_of_its_weights(folder: Path) -> None:
    assembled(folder, *AVERAGED)
    restored = tiny_trainer("multi_expert", *AVERAGED, folder=folder)
    restored.restore()
    with restored.ema.applied():
        losses = heldout_losses(restored.method, restored.objective, restored.heldout, restored.world, restored.device)
    assert [row["loss"] for row in rows(folder, "heldout")[-4:]] == losses


def test_interrupted_experts_change_nothing_but_what_was_lost(tmp_path: Path) -> None:
    settings = (*AVERAGED, "system.log_every=3", "system.checkpoint_every=6")
    for index in (0, 1):  # after the heartbeat at step 9, and before the checkpoint at step 12
        crash_after(trainer_of(tmp_path / "run", index, *settings), 4)
    stopped = trainer_of(tmp_path / "run", 2, *settings)
    stopped.should_stop = lambda: stopped.steps_done == 7
    with pytest.raises(Interrupted):
        stopped.fit()
    train_apart(tmp_path / "run", *settings)
    run = assembled(tmp_path / "run", *settings)
    lost = [read_json(expert_folder(tmp_path / "run", i) / "progress.json", dict)["lost"] for i in range(NUM_EXPERTS)]
    assert [job["images"] for job in lost] == [8, 8, 0] and run.lost["images"] == 16
    assert run.lost["device_seconds"] == sum(job["device_seconds"] for job in lost) > 0
    whole = together(tmp_path / "whole", *settings)
    assert not differing(state_of(whole), state_of(run)) and rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_the_weights_on_the_way_are_those_of_the_joint_run(tmp_path: Path) -> None:
    settings = (*AVERAGED, "evaluation.curve_every=1", "heldout.points=12")
    together(tmp_path / "whole", *settings)
    assembled(train_apart(tmp_path / "run", *settings), *settings)
    kept, expected = (sorted((tmp_path / name / "snapshots").iterdir()) for name in ("run", "whole"))
    assert [path.name for path in kept] == [path.name for path in expected] and len(kept) == 11
    for one, other in zip(kept, expected, strict=True):
        (ours, place), (theirs, place_there) = assemble.load_weights(one), assemble.load_weights(other)
        assert not differing(ours, theirs)
        assert place.pop("device_seconds") > 0 and place_there.pop("device_seconds") > 0 and place == place_there


def work(rank: int, port: int, folder: Path) -> None:
    """What one of two ranks does: each expert, and the run that they become."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with world_from_environment(torch.device("cpu")) as world:
        tiny_trainer("multi_expert", *AVERAGED, folder=folder / "whole", world=world).fit()
        for index in range(NUM_EXPERTS):
            experts.train_expert(trainer_of(folder / "run", index, *AVERAGED, world=world))
        run = tiny_trainer("multi_expert", APART, *AVERAGED, folder=folder / "run", world=world)
        if world.is_main:
            prepare_folder(run.config, folder / "run")
        assemble.assemble(run)
        assert run.finished()  # on both
        restored = tiny_trainer("multi_expert", *AVERAGED, folder=folder / "run", world=world)
        restored.restore()
        assert restored.finished()


def test_two_ranks_train_and_assemble_what_two_ranks_train_together(tmp_path: Path) -> None:
    for name in ("whole", "run/experts/0", "run/experts/1", "run/experts/2"):
        (tmp_path / name).mkdir(parents=True)
    port = free_port()
    ranks = [PROCESSES.Process(target=work, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    assert exit_codes_of(ranks) == [0, 0]
    assert not differing(saved(tmp_path / "whole")[0], saved(tmp_path / "run")[0])
    assert rows(tmp_path / "whole") == rows(tmp_path / "run")


# Costs and origin


def test_costs_are_sums_and_memory_is_the_most(folder: Path) -> None:
    jobs = []
    for index, (images_per_second, memory) in enumerate([(10.0, 5), (20.0, 9), (40.0, 7)]):
        path = expert_folder(folder, index) / "summary.json"
        jobs.append(read_json(path, dict))
        assert jobs[-1].keys() == set(experts.COSTS) and jobs[-1]["images_seen"] == 32 and jobs[-1]["peak_memory_bytes"] > 1e6
        write_json_atomically(path, {**jobs[-1], "train_images_per_second": images_per_second, "peak_memory_bytes": memory})
    run = assembled(folder, *AVERAGED)
    summary, alone = assemble.summary_of_jobs(run, 3.0), summary_of(run, 3.0)
    assert (
        summary["device_seconds"] == pytest.approx(sum(job["device_seconds"] for job in jobs), rel=1e-12)
        and run.device_seconds > 0
    )
    assert summary["peak_memory_bytes"] == 9
    assert summary["train_images_per_second"] == pytest.approx(96 / (3.2 + 1.6 + 0.8))
    assert summary["images_seen"] == 96 and summary["num_steps"] == 12 and summary["updates_per_parameter_set"] == [4]
    assert summary["initial_flops"] == 3.0 and summary["num_intervals"] == NUM_EXPERTS
    assert {name for name in summary if summary[name] != alone[name]} == {"peak_memory_bytes", "train_images_per_second"}


def test_seconds_in_the_journal_are_those_of_all_experts_so_far(folder: Path) -> None:
    run = assembled(folder, *AVERAGED)
    told = [row["device_seconds"] for row in read_metric_rows(folder)]
    assert told[0] == 0 and told == sorted(told) and told[-1] == pytest.approx(run.device_seconds, abs=0.005)
    assert read_json(folder / "progress.json", dict)["images_seen"] == 96


def test_provenance_tells_of_all_sessions_and_all_code(folder: Path) -> None:
    other = expert_folder(folder, 1) / "provenance.json"
    there = read_json(other, dict)
    there["sessions"][0]["code_hash"] = "0ther"
    write_json_atomically(other, there)
    assembled(folder, *AVERAGED)
    assemble.assemble(tiny_trainer("multi_expert", APART, *AVERAGED, folder=folder))
    told = Run(folder).provenance
    assert [session.get("expert") for session in told["sessions"]] == [0, 1, 2, None]
    assert told["code_hash"] == f"{told['sessions'][0]['code_hash']}+0ther" and told["host"]


# Crashes, and what is not as it should be


@pytest.mark.parametrize("crashing", ["checkpoint.save", "assemble.write_text_atomically", "assemble.keep_weights"])
def test_a_crash_while_assembling_leaves_nothing_half(crashing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = (*AVERAGED, "evaluation.curve_every=1")
    folder = train_apart(tmp_path / "run", *settings)

    def crash(*_: object) -> None:
        raise Crash

    monkeypatch.setattr(f"bench.{crashing}", crash)
    with pytest.raises(Crash):
        assembled(folder, *settings)
    assert not (folder / "checkpoints").exists()
    monkeypatch.undo()
    assembled(folder, *settings)
    first = contents(folder)
    assert {
        "metrics.jsonl",
        "checkpoints/step-000000012.safetensors",
        "snapshots/weights-000000000048.safetensors",
    } <= first.keys()
    assembled(folder, *settings)
    assert contents(folder) == first


def test_an_expert_that_is_not_at_its_end_keeps_the_run_from_being_assembled(folder: Path) -> None:
    place = expert_folder(folder, 1)
    before, last = checkpoint.list_checkpoints(place / "checkpoints")
    last.unlink()
    with pytest.raises(ValueError, match=re.escape(f"the expert in {place} is at step {int(before.stem[-9:])} of 12")):
        assembled(folder, *AVERAGED)
    before.unlink()
    assert not experts.all_done(folder, NUM_EXPERTS)
    with pytest.raises(ValueError, match="is at step 0 of 12"):
        assembled(folder, *AVERAGED)
    assert not (folder / "checkpoints").exists() and not (folder / "metrics.jsonl").exists()


def test_an_expert_of_another_run_is_refused(folder: Path) -> None:
    config = expert_folder(folder, 2) / "config.yaml"
    config.write_text(config.read_text().replace("seed: 0", "seed: 1", 1))
    with pytest.raises(ValueError, match=rf"{config.parent} holds another run than multi_expert-\w+"):
        assembled(folder, *AVERAGED)
    config.write_text(config.read_text().replace("seed: 1", "seed: 0", 1).replace("log_every: 2", "log_every: 3"))
    assembled(folder, *AVERAGED)  # where and how often it writes is no other run


def test_experts_that_began_with_other_weights_are_refused(folder: Path) -> None:
    place = expert_folder(folder, 1)
    for path in (place / "checkpoints").iterdir():
        path.unlink()
    (place / "metrics.jsonl").unlink()
    job = trainer_of(folder, 1, *AVERAGED)
    randomise(job.method, seed=1)
    experts.train_expert(job)
    with pytest.raises(ValueError, match=r"experts 0 and 1 have both changed \S+, as jobs that began with different weights do"):
        assembled(folder, *AVERAGED)


def test_a_tensor_is_changed_by_its_bytes() -> None:
    joined = assemble.Joined({"a": torch.zeros(2), "b": torch.zeros(2), "n": torch.tensor(1)})
    joined.add(0, {"a": torch.tensor([0.0, -0.0]), "b": torch.zeros(2), "n": torch.tensor(1), "new": torch.tensor(2.0)})
    assert str(joined.merged["a"][1]) == "tensor(-0.)" and joined.merged["new"] == 2
    with pytest.raises(ValueError, match="expert 1 has left no b, n"):
        joined.add(1, {"a": torch.zeros(2)})
    with pytest.raises(ValueError, match="experts 0 and 1 have both changed new"):
        joined.add(1, {"a": torch.zeros(2), "b": torch.ones(2), "n": torch.tensor(1), "new": torch.tensor(2.0)})


def test_held_out_losses_that_are_missing_or_told_twice_are_refused(folder: Path) -> None:
    path = expert_folder(folder, 0) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    items = next(line for line in lines if json.loads(line)["kind"] == "heldout items")
    for damaged in ([line for line in lines if line is not items], [items, *lines]):
        path.write_text("".join(damaged))
        with pytest.raises(ValueError, match=r"have told of \d+ held-out losses where there are 12"):
            assembled(folder, *AVERAGED)
