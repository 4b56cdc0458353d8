"""Is an interrupted and resumed run the run that was never interrupted?"""

import json
import os
import random
import signal
import sys
import threading
import time

import pytest
from training import PROCESSES, RUNS, crash_after, differing, exit_codes_of, rows, saved, start_command, state_of, tiny_trainer

from bench import checkpoint, cli, saving
from bench.files import read_json
from bench.trainer import Interrupted

AVERAGED = ("train.ema_half_life_images=30", "train.lr_schedule=cosine", "train.lr_warmup_images=40")

VARIANTS = {method: (method, AVERAGED) for method in RUNS} | {
    "uncertainty": ("dense", ("diffusion.loss_weight=uncertainty",)),
    "flow": ("dit_moe", ("diffusion.objective=flow",)),
    "no averaging, micro-batches, bf16": ("multi_expert", ("train.micro_batches=2", "train.precision=bf16", "data.flip=true")),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_equals_uninterrupted(variant, tmp_path):
    method, settings = VARIANTS[variant]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    undisturbed = tiny_trainer(method, *settings, folder=whole)
    undisturbed.fit()
    crash_after(tiny_trainer(method, *settings, folder=cut), 3)  # before any checkpoint
    crash_after(tiny_trainer(method, *settings, folder=cut), 7)  # after the checkpoint at step 4
    crash_after(tiny_trainer(method, *settings, folder=cut), 7)  # after the one at step 8
    resumed = tiny_trainer(method, *settings, folder=cut)
    resumed.fit()
    assert not differing(state_of(undisturbed), state_of(resumed))
    tensors, counters = saved(whole)
    assert not differing(tensors, saved(cut)[0]) and counters == saved(cut)[1]
    assert rows(whole) == rows(cut) and len(rows(whole)) > 12
    assert [p.name for p in sorted((whole / "snapshots").glob("*"))] == [p.name for p in sorted((cut / "snapshots").glob("*"))]
    assert not list(tmp_path.rglob("*.tmp"))
    assert undisturbed.lost == {"images": 0, "device_seconds": 0.0}
    assert resumed.lost["images"] == 8 * (2 - 0 + 6 - 4 + 10 - 8)  # at the heartbeat before each crash, less the checkpoint
    assert resumed.lost["device_seconds"] > 0


class Clock:
    """In place of the module `time`: it stands still but for what the test lets pass."""

    now = 0.0

    def monotonic(self):
        return self.now

    perf_counter = monotonic


@pytest.mark.parametrize(
    ("every", "save_seconds", "saved_at"),  # a step takes 10 s; at every second step it is looked whether a checkpoint is due
    [
        ("1e9", 0, [12]),  # the end
        ("0", 0, [2, 4, 6, 8, 10, 12]),
        ("30", 0, [4, 8, 12]),
        ("30", 1, [4, 8, 12]),
        ("0", 3, [2, 10, 12]),  # 60 s from the end of a save to the begin of the next are not enough: 20 times what it took
    ],
)
def test_checkpoints_are_also_made_by_wall_time(every, save_seconds, saved_at, tmp_path, monkeypatch):
    clock, save, steps = Clock(), saving.save, []
    monkeypatch.setattr("bench.trainer.time", clock)

    def slow_save(trainer):
        clock.now += save_seconds
        steps.append(trainer.steps_done)
        save(trainer)

    monkeypatch.setattr(saving, "save", slow_save)
    trained = tiny_trainer("dense", "system.checkpoint_every=0", f"system.checkpoint_every_seconds={every}", folder=tmp_path)
    step = trained.step

    def timed_step(*batches):
        clock.now += 10
        return step(*batches)

    monkeypatch.setattr(trained, "step", timed_step)
    trained.fit()
    assert steps == saved_at  # the last step once, also where a save by time is due
    found = [checkpoint.load(path).counters["steps_done"] for path in checkpoint.list_checkpoints(tmp_path / "checkpoints")]
    assert found == saved_at[-2:]  # the last two are kept


def test_the_last_step_is_saved_once_and_holds_what_was_measured_then(tmp_path, monkeypatch):
    save, steps = saving.save, []
    monkeypatch.setattr(saving, "save", lambda trainer: steps.append(trainer.steps_done) or save(trainer))
    for every in (4, 0):
        (tmp_path / str(every)).mkdir()
        tiny_trainer("dense", f"system.checkpoint_every={every}", folder=tmp_path / str(every)).fit()
    assert steps == [4, 8, 12, 12]
    (often, counters), (once, same) = saved(tmp_path / "4"), saved(tmp_path / "0")
    assert not differing(often, once) and counters == same and counters["heldout_points"] == 3


def test_a_crash_before_the_first_heartbeat_after_a_crash_counts_the_lost_work_once(tmp_path):
    crash_after(tiny_trainer("dense", folder=tmp_path), 7)
    for _ in range(3):
        crash_after(tiny_trainer("dense", folder=tmp_path), 1)
    resumed = tiny_trainer("dense", folder=tmp_path)
    resumed.fit()
    assert resumed.lost["images"] == 8 * (6 - 4)


def test_a_finished_run_is_left_as_it_is(tmp_path):
    tiny_trainer("remix_dit", folder=tmp_path).fit()
    before = saved(tmp_path), rows(tmp_path)
    again = tiny_trainer("remix_dit", folder=tmp_path)
    again.fit()
    assert not differing(before[0][0], saved(tmp_path)[0]) and before[1] == rows(tmp_path)
    assert again.lost["images"] == 0


@pytest.mark.parametrize("method", ["dense", "multi_expert"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(method, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    tiny_trainer(method, *AVERAGED, folder=whole).fit()
    crash_after(tiny_trainer(method, *AVERAGED, folder=cut), 9)
    newest = cut / "checkpoints" / "step-000000008.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    resumed = tiny_trainer(method, *AVERAGED, folder=cut)
    with pytest.warns(UserWarning, match=r"^checkpoint .*step-000000008.safetensors cannot be read"):
        resumed.fit()
    assert not differing(saved(whole)[0], saved(cut)[0]) and rows(whole) == rows(cut)
    assert resumed.lost["images"] == 8 * (8 - 4)


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(tmp_path):
    crash_after(tiny_trainer("dense", folder=tmp_path), 9)
    written = rows(tmp_path)
    for path in checkpoint.list_checkpoints(tmp_path / "checkpoints"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"^every checkpoint in .* is damaged: delete that folder [^\n]*$"):
        tiny_trainer("dense", folder=tmp_path).fit()
    assert rows(tmp_path) == written  # nothing is thrown away


def test_work_is_not_resumed_from_a_folder_without_checkpoints(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint yet"):
        tiny_trainer("dense", folder=tmp_path).restore()


# Killed

KILLED = [
    "method=multi_expert",
    "options.experts=3",
    "model.depth=1",
    "model.width=16",
    "model.num_heads=2",
    "train.batch_size=8",
    "budget.amount=2000",
    "train.lr_schedule=cosine",
    "train.ema_half_life_images=300",
    "heldout.bins=6",
    "heldout.images_per_bin=3",
    "heldout.points=9",
    "evaluation.num_samples=20",
    "evaluation.steps=3",
    "evaluation.block_size=10",
    "evaluation.kid_subset_size=10",
    "system.log_every=2",
    "system.checkpoint_every=6",
    "system.checkpoint_every_seconds=1e9",
]
NUM_STEPS = 250


def steps_of(folder):
    return read_json(folder / "progress.json", dict).get("step", 0)


def train_and_be_killed(folder, target, seconds):
    """So long after a step that this process has done, the target or one after it, is seen. By a thread of its own, which a busy
    machine holds up no longer than the training.
    """
    before = steps_of(folder)

    def kill():
        while not (steps_of(folder) >= target and (steps_of(folder) != before or target == NUM_STEPS)):
            time.sleep(0.001)
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    sys.exit(cli.main(["train", "--runs", str(folder.parent), *KILLED]))


def test_a_process_killed_at_random_moments_ends_where_an_undisturbed_one_does(tmp_path):
    undisturbed = start_command("train", "--runs", str(tmp_path / "whole"), *KILLED)
    assert exit_codes_of([undisturbed]) == [0]
    (whole,) = (tmp_path / "whole").iterdir()
    cut = tmp_path / "cut" / whole.name
    chance, kills, lost = random.Random(), 0, 0
    targets = [*sorted(chance.sample(range(4, 220), 5)), NUM_STEPS]  # the last one while it samples and scores
    for target in targets:
        process = PROCESSES.Process(target=train_and_be_killed, args=(cut, target, chance.random() * 0.03))
        process.start()
        (code,) = exit_codes_of([process])
        kills += code == -signal.SIGKILL
        there = checkpoint.list_checkpoints(cut / "checkpoints")
        lost += steps_of(cut) - (checkpoint.load(there[-1]).counters["steps_done"] if there else 0)
    assert kills >= 5
    last = start_command("train", "--runs", str(tmp_path / "cut"), *KILLED)
    assert exit_codes_of([last]) == [0]
    tensors, counters = saved(whole)
    assert counters["steps_done"] == NUM_STEPS
    assert not differing(tensors, saved(cut)[0]) and counters == saved(cut)[1]
    assert rows(whole) == rows(cut)
    for name in ("samples.npz", "diagnostics.npz", "config.yaml"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name
    scores = [json.loads((folder / "eval.json").read_text())[0]["metrics"] for folder in (whole, cut)]
    assert scores[0] == scores[1]
    summary = json.loads((cut / "summary.json").read_text())
    assert summary["lost_images"] == 8 * lost and summary["images_seen"] == 2000
    assert {path.name for path in whole.rglob("*")} == {path.name for path in cut.rglob("*")}
    assert (cut / "done").exists() and not list(cut.rglob("*.tmp"))


# Asked to stop


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_that_is_asked_to_stop_saves_at_the_next_step_and_loses_nothing(variant, tmp_path):
    method, settings = VARIANTS[variant]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    tiny_trainer(method, *settings, folder=whole).fit()
    for stop_after in (1, 2, 4, 0):  # more steps; between two flushes, and at one
        stopped = tiny_trainer(method, *settings, folder=cut)
        stopped.should_stop = Countdown(stop_after)
        with pytest.raises(Interrupted, match=f"stopped after step {stopped.should_stop.total(cut)}; everything is saved"):
            stopped.fit()
    resumed = tiny_trainer(method, *settings, folder=cut)
    resumed.fit()
    tensors, counters = saved(whole)
    assert not differing(tensors, saved(cut)[0]) and counters == saved(cut)[1]
    assert rows(whole) == rows(cut)
    assert resumed.lost["images"] == 0


class Countdown:
    """Asks to stop when it was called `steps` times before."""

    def __init__(self, steps: int) -> None:
        self.steps, self.calls = steps, 0

    def __call__(self) -> bool:
        self.calls += 1
        return self.calls > self.steps

    def total(self, folder) -> int:
        """The step at which a run in this folder will stop."""
        return steps_of(folder) + self.steps
