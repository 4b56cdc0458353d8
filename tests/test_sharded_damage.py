"""Do all ranks go back to the same checkpoint, whatever one of them alone finds of the newest?"""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_ranks import on_ranks
from test_sharding import sharded_trainer
from torch import Tensor
from training import crash_after, differing, state_of

from bench import sharded_checkpoint
from bench.distributed import World, local
from bench.sharded_checkpoint import list_checkpoints
from bench.trainer import Trainer


def damage(newest: Path, rank: int) -> None:
    """In the file that this rank looks at."""
    with open(shards(newest)[rank], "rb+") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\x07")


def missing(newest: Path, rank: int) -> None:
    shards(newest)[1 - rank].unlink()


def unreadable(newest: Path, rank: int) -> None:
    path = shards(newest)[rank]
    path.unlink()
    path.mkdir()


def half_a_record(newest: Path, rank: int) -> None:
    (newest / "counters.json").write_text('{"counters": ')


def another_record(newest: Path, rank: int) -> None:
    record = json.loads((newest / "counters.json").read_text())
    record["counters"]["steps_done"] = 7
    (newest / "counters.json").write_text(json.dumps(record))


def not_to_be_seen(newest: Path, rank: int) -> None:
    shutil.rmtree(newest)


def shards(checkpoint: Path) -> list[Path]:
    """The first rank looks at the first, the second at the second."""
    return sorted(checkpoint.glob("*.safetensors"))


DAMAGES = (damage, missing, unreadable, half_a_record, another_record, not_to_be_seen)


def own_parts(trainer: Trainer) -> dict[str, Tensor]:
    """Of the state, without asking the other rank."""
    return {name: local(tensor) for name, tensor in state_of(trainer).items()}


def go_back(world: World, out: Path) -> None:
    """What one of two ranks does. Each has a copy of the run to itself; in one of them the newest checkpoint is damaged."""
    sharded_checkpoint.FILE_BYTES = 10_000  # several files of each rank
    crash_after(sharded_trainer("dense", folder=out / "run", world=world), 9)  # checkpoints after steps 4 and 8
    world.barrier()
    assert len(shards(list_checkpoints(out / "run")[-1])) > 2 * world.size

    def copy(name: str) -> Path:
        return Path(shutil.copytree(out / "run", out / f"{name}, rank {world.rank}"))

    whole = sharded_trainer("dense", folder=copy("whole"), world=world)
    whole.resume()
    assert whole.steps_done == 8
    folder = copy("without the newest")
    shutil.rmtree(list_checkpoints(folder)[-1])
    expected = sharded_trainer("dense", folder=folder, world=world)
    expected.resume()
    assert differing(own_parts(expected), own_parts(whole))
    everywhere = [(another_record, None)]  # where all look at one folder
    for harm, harmed in [*itertools.product(DAMAGES, range(world.size)), *everywhere]:
        folder = copy(f"{harm.__name__} on rank {harmed}")
        if harmed in (world.rank, None):
            harm(list_checkpoints(folder)[-1], world.rank)
        trainer = sharded_trainer("dense", folder=folder, world=world)
        with pytest.warns(UserWarning, match=r"step-000000008.sharded is damaged .* passed over"):
            trainer.resume()
        assert trainer.steps_done == 4, (harm, harmed, world.rank)
        assert not differing(own_parts(expected), own_parts(trainer)), (harm, harmed, world.rank)


def give_up(world: World, out: Path) -> None:
    """Each rank finds another of the two checkpoints damaged."""
    crash_after(sharded_trainer("dense", folder=out / "run", world=world), 9)
    world.barrier()
    folder = Path(shutil.copytree(out / "run", out / f"rank {world.rank}"))
    damage(list_checkpoints(folder)[world.rank], world.rank)
    trainer = sharded_trainer("dense", folder=folder, world=world)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"^every checkpoint in [^\n]* is damaged: delete"):
        trainer.resume()


@pytest.mark.parametrize("work", [go_back, give_up])
def test_ranks_agree_on_the_newest_checkpoint_that_all_find_sound(work: Callable[[World, Path], None], tmp_path: Path) -> None:
    on_ranks(2, work, tmp_path)
