"""Where does a trainer's state go, and where does it come back from? Whole, or from each rank its part."""

from typing import TYPE_CHECKING, Any

from bench import checkpoint, sharded_checkpoint
from bench.training_state import counters_of, take, tensors_of

if TYPE_CHECKING:
    from bench.trainer import Trainer


def save(trainer: "Trainer") -> None:
    """A checkpoint of everything that the next step depends on, if there is a folder for it. All ranks call this, and go on
    when it is there: to wait for rank 0 here or at the next step's gradients costs the same.
    """
    if trainer.folder is None:
        return
    if trainer.is_sharded:
        sharded_checkpoint.save(trainer)
        return
    with trainer.world.together():
        if trainer.world.is_main:
            checkpoint.save(trainer.folder / "checkpoints", trainer.steps_done, tensors_of(trainer), counters_of(trainer))


def take_newest(trainer: "Trainer") -> dict[str, Any] | None:
    """Be where the newest checkpoint was made that all ranks find sound; its counters, None if there is none. All call this."""
    if trainer.folder and trainer.is_sharded:
        return sharded_checkpoint.load_latest(trainer)
    found = checkpoint.load_latest(trainer.folder / "checkpoints", trainer.world) if trainer.folder else None
    if found is None:
        return None
    with trainer.world.together():
        take(trainer, found)
    return found.counters
