"""Does a run of several ranks on several nodes come to the same end as without Slurm, also when ranks are stopped or killed?"""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from same_runs import assert_nothing_half_written, assert_same_bytes, scores
from sweeping import MIDDLE, PATIENCE_SECONDS, REMIX, TinySuite, images_seen, sessions, tasks_of
from training import exit_codes_of, free_port, saved, start_command

from bench import checkpoint, trained
from bench.runs import read_run, read_samples

pytestmark = pytest.mark.slurm

BEGUN = 800  # images: well inside of what MIDDLE trains


def test_two_nodes_with_two_tasks_train_what_one_process_trains(tiny_suite: TinySuite) -> None:
    tiny_suite.write(REMIX)
    tiny_suite.write_profile(nodes=2, tasks_per_node=2, memory_gb=3)
    tiny_suite.sweep()
    tiny_suite.wait_for("done")
    folder, (alone,) = tiny_suite.run_folder(), tiny_suite.undisturbed()
    (attempt,) = tiny_suite.assert_ended("COMPLETED")
    assert attempt.ended - (folder / "done").stat().st_mtime < 300  # no rank waits for another that has left
    (session,) = sessions(folder)
    assert session["world_size"] == 4 and session["slurm"]["nodes"] == "n[1-2]"
    assert_same_bytes(folder, trained_by_local_ranks(alone, tiny_suite.folder / "local", 4))
    assert apart(saved(folder)[0], saved(alone)[0]) < 1e-3
    samples, by_four = trained.draw_samples(folder, []), scores(folder)
    assert (samples.images.permute(0, 2, 3, 1).numpy() == read_samples(folder)).all()
    again = trained.evaluate_again(folder, [])
    assert (again["metrics"], again["heldout_loss"]) == by_four[0][2:]


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """How far two trained networks are from each other, as a part of their size: the most of any tensor.

    Left out: biases of attention, as those of keys have no gradient but rounding, which Adam blows up to whole steps.
    """
    assert one.keys() == other.keys()
    names = [name for name in one if name.startswith("model.") and not name.endswith("qkv.bias")]
    return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in names)


def trained_by_local_ranks(like: Path, place: Path, size: int) -> Path:
    """The same run, made by that many processes without Slurm; its folder."""
    folder = place / like.name
    folder.mkdir(parents=True)
    shutil.copy(like / "config.yaml", folder)
    meet = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [start_command("train", str(folder), environment={**meet, "RANK": str(rank)}) for rank in range(size)]
    assert exit_codes_of(ranks, PATIENCE_SECONDS) == [0] * size
    return folder


@pytest.mark.slow
def test_ranks_on_two_nodes_are_warned_and_then_one_is_killed(tiny_suite: TinySuite) -> None:
    """It goes on from where all ranks were: first as the same job, then as another one on other nodes."""
    tiny_suite.write(REMIX, **MIDDLE)
    tiny_suite.write_profile(nodes=2, additional={"nodelist": "n[1-2]"})
    tiny_suite.sweep()
    tiny_suite.wait_for_images(BEGUN)
    (job,), folder = tiny_suite.jobs(), tiny_suite.run_folder()
    tiny_suite.cluster.run("scancel", "--signal=USR2", job)
    tiny_suite.wait_for("preempted")
    assert images_seen(folder) == images_saved(folder) >= BEGUN

    tiny_suite.wait_for_images(2 * BEGUN)
    _, other_rank = tasks_of(job)
    os.kill(other_rank, signal.SIGKILL)
    tiny_suite.wait_for("failed")
    assert tiny_suite.status().kind == "killed"  # not what the first rank says of it
    assert tiny_suite.status().detail == f"a task of job {job} was killed by signal 9 (SIGKILL) on n[1-2]"
    undone = images_seen(folder) - images_saved(folder)

    tiny_suite.write_profile(nodes=2, additional={"nodelist": "n[3-4]"})
    tiny_suite.sweep()
    undisturbed = trained_by_local_ranks(folder, tiny_suite.folder / "local", 2)  # beside it
    tiny_suite.wait_for("done")
    first, second, third = tiny_suite.assert_ended("REQUEUED", "FAILED", "COMPLETED")
    assert first.job == second.job != third.job
    assert [session["slurm"]["nodes"] for session in sessions(folder)] == ["n[1-2]", "n[1-2]", "n[3-4]"]
    assert [session["world_size"] for session in sessions(folder)] == [2, 2, 2]
    assert read_run(folder).summary["lost_images"] == undone
    tiny_suite.assert_one_at_a_time()
    assert_same_bytes(folder, undisturbed)
    assert_nothing_half_written(folder)


def images_saved(folder: Path) -> int:
    found = checkpoint.load_latest(folder / "checkpoints")
    return 8 * found.counters["steps_done"] if found else 0
