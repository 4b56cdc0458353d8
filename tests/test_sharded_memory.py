"""Is no more held than is needed, when a sharded run is saved, gathered and scored?"""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_ranks import on_ranks
from test_sharding import AVERAGED, build_tiny, gathered_state, sharded_trainer
from training import crash_after, differing, drawn, state_of, tiny_config, tiny_trainer

from bench import checkpoint, sharded_checkpoint, sharded_run
from bench.distributed import World, local
from bench.heldout import heldout_losses
from bench.training_state import tensors_of

FILE_BYTES = 1000
WAYS = {"averaged": AVERAGED, "not averaged": (*AVERAGED, "train.ema_half_life_images=0")}


def save_both_ways(world: World, out: Path) -> None:
    """What one of two ranks does: a checkpoint of one file per rank, as before there were more, and the same in many."""
    numbers, sharded_checkpoint.file_numbers = sharded_checkpoint.file_numbers, lambda *_: None  # type: ignore[assignment, return-value]
    crash_after(sharded_trainer("dit_moe", *AVERAGED, folder=out / "as before", world=world), 5)  # a checkpoint after step 4
    sharded_checkpoint.file_numbers, sharded_checkpoint.FILE_BYTES = numbers, FILE_BYTES
    trainer = sharded_trainer("dit_moe", *AVERAGED, folder=out / "as before", world=world)
    trainer.resume()
    if world.is_main:
        shutil.copytree(out / "as before", out / "in files", ignore=shutil.ignore_patterns("step-*"))
    world.barrier()
    trainer.folder = out / "in files"
    trainer.save()
    world.barrier()
    (before,), (path,) = (sharded_checkpoint.list_checkpoints(out / name) for name in ("as before", "in files"))
    assert len(list(before.glob("*.safetensors"))) == 2
    largest = max(local(tensor).nbytes for tensor in tensors_of(trainer).values())
    sizes = [size_of(file) for file in path.glob("*.safetensors")]
    assert len(sizes) > 20 and FILE_BYTES < max(sizes) <= FILE_BYTES + largest < sum(sizes) / 10


def size_of(file: Path) -> int:
    """The bytes of the tensors inside."""
    with safe_open(file, framework="pt") as opened:
        return sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118


def resume_in_both(world: World, out: Path) -> None:
    """What one of any number of ranks does."""
    states = []
    for name in ("as before", "in files"):
        trainer = sharded_trainer("dit_moe", *AVERAGED, folder=out / name, world=world)
        trainer.resume()
        assert trainer.steps_done == 4 and trainer.optimizer.state
        states.append(gathered_state(trainer))
    assert not differing(*states)
    if world.is_main:
        torch.save(states[0], out / f"{world.size}.pt")


def test_a_rank_writes_files_of_a_size_and_any_number_of_ranks_reads_them_as_it_does_one(tmp_path: Path) -> None:
    on_ranks(2, save_both_ways, tmp_path)
    for size in (2, 4):
        on_ranks(size, resume_in_both, tmp_path)
    assert not differing(torch.load(tmp_path / "2.pt"), torch.load(tmp_path / "4.pt"))


def test_files_take_what_begins_in_their_bytes() -> None:
    tensors = {
        name: torch.zeros(size, dtype=torch.uint8) for name, size in {"a": 4, "b": 0, "c": 9, "d": 1, "e": 30, "f": 1}.items()
    }
    assert sharded_checkpoint.file_numbers(tensors, 10) == {"a": 1, "b": 1, "c": 1, "d": 2, "e": 2, "f": 5}
    assert set(sharded_checkpoint.file_numbers(tensors, 1000).values()) == {1}


def gather_and_score(world: World, out: Path) -> None:
    """What one of two ranks does."""
    for way, settings in WAYS.items():
        sharded = sharded_trainer("remix_dit", *settings, folder=out / way, world=world)
        sharded.fit()
        averages = {name: tensor for name, tensor in gathered_state(sharded).items() if name.startswith("ema.")}
        assert bool(averages) == (way == "averaged")
        parts = [local(parameter).untyped_storage() for parameter in sharded.method.parameters()]
        method = sharded.method  # who calls holds on to it
        trainer = sharded_run.gathered(sharded, partial(build_tiny, "remix_dit", settings))
        assert method is sharded.method and not any(part.nbytes() for part in parts)
        assert list(tensors_of(trainer)) == [f"model.{name}" for name in trainer.method.state_dict()]
        (path,) = checkpoint.list_checkpoints(out / way / "checkpoints")
        tensors = checkpoint.load(path).tensors
        assert {name for name in tensors if name.startswith("ema.")} == averages.keys()
        full = tiny_trainer("remix_dit", *settings, folder=out / way, world=world)
        full.restore()
        assert len(full.ema.averages) == len(averages)
        with full.ema.applied():
            for one, other in zip(full.method.parameters(), trainer.method.parameters(), strict=True):
                assert torch.equal(one, other)
            losses = [heldout_losses(each.method, each.objective, full.heldout, world, full.device) for each in (full, trainer)]
            assert losses[0] == losses[1]
        if averages:
            assert losses[0] != heldout_losses(full.method, full.objective, full.heldout, world, full.device)


def test_what_is_gathered_is_one_network_and_scored_as_any_other(tmp_path: Path) -> None:
    on_ranks(2, gather_and_score, tmp_path)


@pytest.mark.parametrize("way", WAYS)
def test_who_is_only_scored_holds_one_network_and_cannot_be_taken_for_another(way: str, tmp_path: Path) -> None:
    settings = WAYS[way]
    trained = tiny_trainer("dense", *settings, folder=tmp_path)
    trained.fit()
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    config = tiny_config("dense", *settings)
    scored = sharded_run.Trainer(
        build_tiny("dense", settings), config, trained.data, tmp_path, cost=trained.cost, only_scored=True
    )
    scored.restore()
    assert scored.finished() and not scored.ema.averages and not scored.optimizer.state
    assert (scored.steps_done, scored.updates, scored.ema.images_seen) == (12, trained.updates, trained.ema.images_seen)
    with trained.ema.applied(), scored.ema.applied():
        expected = {name: tensor.clone() for name, tensor in trained.method.state_dict().items()}
        assert not differing(expected, dict(scored.method.state_dict()))
    with pytest.raises(AssertionError):
        scored.save()
    with pytest.raises(AssertionError):
        scored.step(drawn(scored))
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()} == before
    scored.prepare_to_train()
    scored.resume()
    assert not differing(state_of(trained), state_of(scored))
    scored.save()
