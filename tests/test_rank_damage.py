"""Do ranks that all hold everything do the same, whatever one of them alone finds in the run's folder?"""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import TINY
from test_ranks import on_ranks
from training import crash_after, differing, state_of, tiny_trainer

from bench import checkpoint, finish, job
from bench.curve import kept_weights
from bench.distributed import World
from bench.runs import Run

pytestmark = pytest.mark.xdist_group("ranks")  # its ranks are started once, not by every worker


def cut_short(newest: Path) -> None:
    newest.write_bytes(newest.read_bytes()[:-100])


def flipped(newest: Path) -> None:
    content = bytearray(newest.read_bytes())
    content[-3] ^= 1
    newest.write_bytes(content)


def missing(newest: Path) -> None:
    newest.unlink()


def unreadable(newest: Path) -> None:
    newest.unlink()
    newest.mkdir()


def another(newest: Path) -> None:
    """Sound, but not what the other rank has under that name."""
    found = checkpoint.load(newest)
    checkpoint.save(newest.parent, 8, found.tensors, {**found.counters, "device_seconds": 7.0})


DAMAGES = (cut_short, flipped, missing, unreadable, another)


def newest_of(folder: Path) -> Path:
    return checkpoint.list_checkpoints(folder / "checkpoints")[-1]


def crashed(world: World, out: Path) -> Callable[[str], Path]:
    """A run that crashed after its checkpoints of steps 4 and 8; what makes a copy of it, of this rank's own."""
    crash_after(tiny_trainer("dense", folder=out / "run", world=world), 9)
    world.barrier()
    return lambda name: Path(shutil.copytree(out / "run", out / f"{name}, rank {world.rank}"))


def go_back(world: World, out: Path) -> None:
    """What one of two ranks does."""
    copy = crashed(world, out)
    whole = tiny_trainer("dense", folder=copy("whole"), world=world)
    whole.resume()
    assert whole.steps_done == 8
    folder = copy("without the newest")
    missing(newest_of(folder))
    expected = tiny_trainer("dense", folder=folder, world=world)
    expected.resume()
    assert expected.steps_done == 4
    for harm, harmed in itertools.product(DAMAGES, range(world.size)):
        folder = copy(f"{harm.__name__} on rank {harmed}")
        if harmed == world.rank:
            harm(newest_of(folder))
        trainer = tiny_trainer("dense", folder=folder, world=world)
        with pytest.warns(UserWarning, match=r"^checkpoint [^\n]*step-000000008[^\n]* (damaged|cannot be read)[^\n]*$"):
            trainer.resume()
        assert trainer.steps_done == 4, (harm, harmed, world.rank)
        assert not differing(state_of(expected), state_of(trainer)), (harm, harmed, world.rank)


def go_by_what_is_there(world: World, out: Path) -> None:
    """One rank is shown an old listing, but can read the file that the other names."""
    copy, listed = crashed(world, out), checkpoint.list_checkpoints
    trainer = tiny_trainer("dense", folder=copy("old listing"), world=world)
    checkpoint.list_checkpoints = lambda folder: listed(folder)[:1] if world.rank == 1 else listed(folder)
    trainer.resume()
    assert trainer.steps_done == 8


def give_up(world: World, out: Path) -> None:
    """Each rank finds another of the two checkpoints damaged."""
    folder = crashed(world, out)("run")
    cut_short(checkpoint.list_checkpoints(folder / "checkpoints")[world.rank])
    trainer = tiny_trainer("dense", folder=folder, world=world)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"^no checkpoint in [^\n]* on all of the 2 ranks: [^\n]*$"):
        trainer.resume()


def fail_alone(world: World, out: Path) -> None:
    """Where one rank fails, the other does not wait for it."""
    copy, load = crashed(world, out), checkpoint.load

    def out_of_memory(path: Path) -> checkpoint.Checkpoint:
        raise MemoryError

    folder = copy("out of memory")
    checkpoint.load = out_of_memory if world.rank == 1 else load
    with pytest.raises(MemoryError if world.rank == 1 else ValueError, match="" if world.rank else "rank 1 failed: MemoryError"):
        tiny_trainer("dense", folder=folder, world=world).resume()
    checkpoint.load = load
    folder = copy("lost lines")
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="rank 0 failed: [^\n]*lost lines" if world.rank else "lost lines"):
        tiny_trainer("dense", folder=folder, world=world).resume()
    torch.distributed.barrier()  # nothing is under way


@pytest.mark.parametrize("work", [go_back, go_by_what_is_there, give_up, fail_alone])
def test_ranks_agree_on_the_newest_checkpoint_that_all_can_load(work: Callable[[World, Path], None], tmp_path: Path) -> None:
    on_ranks(2, work, tmp_path)


def score_again(world: World, out: Path) -> None:
    """Once it is trained; the second rank does not see that it is."""
    settings = [*TINY, "options.experts=2", "system.experts=separate_jobs"]
    job.run(job.make_config({"method": "multi_expert"}, settings), out / "run", world)
    is_trained = job.is_trained
    job.is_trained = lambda folder: world.is_main and is_trained(folder)
    job.run(job.make_config({"method": "multi_expert"}, [*settings, "evaluation.steps=3"]), out / "run", world)


def test_whether_a_run_is_trained_the_first_rank_says(tmp_path: Path) -> None:
    on_ranks(2, score_again, tmp_path)
    assert len(Run(tmp_path / "run").evaluations) == 2


def score_curve(world: World, out: Path) -> None:
    """The second rank does not see the weights that were kept."""
    places = ("budget.amount=320", "heldout.points=5", "evaluation.curve_every=2", "system.log_every=1")
    finish.kept_weights = lambda folder: kept_weights(folder) if world.is_main else []
    job.run(job.make_config({"method": "dense"}, [*TINY, *places]), out / "run", world)


def test_which_places_of_the_curve_are_scored_the_first_rank_says(tmp_path: Path) -> None:
    on_ranks(2, score_curve, tmp_path)
    assert [record["step"] for record in Run(tmp_path / "run").curve] == [4, 8]
    assert not kept_weights(tmp_path / "run")
