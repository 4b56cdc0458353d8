"""When is a run measured while it trains, and what is kept of it then?

At `heldout.points` + 1 places, evenly spaced over the budget, the first before any training: its held-out loss, what the
method shows of itself, and at some the weights, to be scored later.
"""

from typing import TYPE_CHECKING

from bench.curve import keep_weights
from bench.distributed import World
from bench.heldout import bin_rows, item_losses, item_row

if TYPE_CHECKING:
    from bench.trainer import Trainer


def is_due(trainer: "Trainer") -> bool:
    points = trainer.config.heldout.points
    return trainer.heldout_points <= points and trainer.spent * points >= trainer.heldout_points


def measure_if_due(trainer: "Trainer") -> None:
    """All ranks call this."""
    if not is_due(trainer):
        return
    config, journal = trainer.config, trainer.journal
    trainer.heldout_points = int(trainer.spent * config.heldout.points) + 1
    world = World() if trainer.is_sharded else trainer.world  # sharded, all ranks go through all images together
    with trainer.ema.applied():
        losses = item_losses(trainer.method, trainer.objective, trainer.heldout, world, trainer.device, trainer.intervals)
        snapshot = trainer.method.diagnostics() if trainer.folder else {}
        with trainer.world.together():
            if trainer.folder and is_on_curve(trainer):
                images_of_all = trainer.steps_done * config.train.batch_size  # one place for jobs that train apart
                keep_weights(trainer.folder, trainer.method, {**trainer.place(), "images_seen": images_of_all})
    with trainer.world.together():
        if trainer.experts is None:
            for row in bin_rows(trainer.heldout, losses):
                journal.write({"kind": "heldout", **trainer.place(), **row})
        else:  # of a bin's images only some, it may be: it takes all experts to tell its mean
            row = item_row(trainer.heldout, losses, trainer.intervals)
            journal.write({"kind": "heldout items", **trainer.place(), **row})
        journal.snapshot(trainer.images_seen, snapshot)


def is_on_curve(trainer: "Trainer") -> bool:
    """Whether the held-out loss that was just measured is one at which the weights are kept."""
    every, point = trainer.config.evaluation.curve_every, trainer.heldout_points - 1
    writes = trainer.folder is not None and trainer.world.is_main
    return writes and every > 0 and point % every == 0 and 0 < point < trainer.config.heldout.points
