"""What is made of a trained run? A look inside, its curve, samples and scores; all that is missing before `done`."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import adm
from bench.arrays import write_trajectory
from bench.curve import add_to_curve, is_on_curve, kept_weights, load_weights
from bench.data import DataSource
from bench.evaluate import EvalProtocol, Seconds, score
from bench.files import write_json_atomically
from bench.heldout import heldout_losses
from bench.method import load_exactly
from bench.provenance import code_hash
from bench.run_folder import write_diagnostics
from bench.runs import Run
from bench.sample import Sampler, Samples
from bench.streaming import Stream
from bench.trainer import Interrupted, Trainer, never

OF_TRAINING, OF_SCORING = ("summary.json", "diagnostics.npz"), ("samples.npz", "trajectory.npz")
NOT_SCORED = (
    "trained to its end, and not scored: its data are latents, and evaluation.autoencoder, which decodes them, is not set; "
    "`tsbench evaluate RUN evaluation.autoencoder=FOLDER evaluation.images=IMAGES evaluation.extractor=inception ...` scores it"
)
FILMS = "bench/trajectory.py"  # code that leaves a trajectory
REFERENCES = "references"  # beside the run folders: what samples are compared with, for all runs


def is_trained(folder: Path) -> bool:
    """Trained to the end. What was damaged and therefore deleted is made anew."""
    return all((folder / name).exists() for name in ("done", *OF_TRAINING))


def is_scored_by(folder: Path, protocol: EvalProtocol) -> bool:
    """Whether a trained run has all that scoring leaves. One of before there were trajectories is whole without."""
    run = Run(folder)
    films = FILMS in run.provenance.get("code_files", {})
    needed = [name for name in OF_SCORING if films or name != "trajectory.npz"]
    return protocol.hash in [record["protocol_hash"] for record in run.evaluations] and all((folder / n).exists() for n in needed)


def look_inside(trainer: Trainer) -> None:
    """What the averaged weights show of themselves, unless that is there. All ranks call this; rank 0 writes."""
    assert trainer.folder is not None
    with trainer.ema.applied(), trainer.world.together():
        if trainer.world.is_main and not (trainer.folder / "diagnostics.npz").exists():
            write_diagnostics(trainer, trainer.folder)


class Finisher:
    """Samples and scores what a trainer holds. Every rank takes part in everything; rank 0 writes.

    `should_stop` is asked before each piece of work: what is made stays, and Interrupted is raised.
    """

    def __init__(
        self,
        trainer: Trainer,
        sampler: Sampler,
        protocol: EvalProtocol,
        data: DataSource,
        should_stop: Callable[[], bool] = never,
    ) -> None:
        assert trainer.folder is not None
        self.trainer, self.sampler, self.protocol, self.data = trainer, sampler, protocol, data
        self.folder: Path = trainer.folder
        self.parts = self.folder / "parts"  # samples that are not complete yet
        self.should_stop = should_stop

    def finish(self) -> None:
        """From the trainer's final state. The weights that were kept on the way are scored first, and then go."""
        self._score_curve()
        trainer, is_main = self.trainer, self.trainer.world.is_main
        look_inside(trainer)
        with trainer.ema.applied():
            samples, record = self.score()
            with trainer.world.together():
                if is_main:
                    self.put_samples(samples)
                    self.put_score(record)
                    shutil.rmtree(self.parts, ignore_errors=True)

    def score(self, step: int | None = None) -> tuple[Samples, dict[str, Any]]:
        """Samples of the weights as they are (those of `step`; by default of the end), and a record of their scores."""
        trainer, protocol = self.trainer, self.protocol
        parts = self.parts / f"{protocol.hash}-{trainer.steps_done if step is None else step}"
        seconds = Seconds()
        samples, metrics = self._draw_and_score(parts, seconds)
        losses = heldout_losses(trainer.method, trainer.objective, trainer.heldout, trainer.world, trainer.device)
        record = {
            "protocol_hash": protocol.hash,
            "protocol": protocol.content,
            "n": protocol.num_samples,
            "metrics": metrics,
            "seconds": {"sampling": protocol.num_samples / samples.images_per_second, **seconds},
            "sample_images_per_second": samples.images_per_second,
            "network_evaluations_per_sample": samples.network_evaluations_per_sample,
            "heldout_loss": sum(losses) / len(losses),
            "code_hash": code_hash(),
            "scored": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        return samples, record

    def _draw_and_score(self, parts: Path, seconds: Seconds) -> tuple[Samples, dict[str, float]]:
        """The samples that are kept, and the scores of all: see `system.keep_samples`."""
        trainer, num_kept = self.trainer, self.trainer.config.system.keep_samples
        references = self.folder.parent / REFERENCES
        where = trainer.device, trainer.world
        if num_kept:
            stream = Stream(self.sampler, self.protocol, self.data, num_kept)
            return stream.run(trainer.method, *where, parts, self._pause, references, seconds)
        samples = self.sampler.draw(trainer.method, *where, parts, self._pause)
        self._pause()
        how = self.protocol, self.data, str(trainer.device), trainer.world, references, seconds
        return samples, score(samples.images, samples.labels, *how)

    def put_samples(self, samples: Samples) -> None:
        """Into the run's folder."""
        assert samples.trajectory is not None
        write_trajectory(self.folder, samples.trajectory)
        adm.write_samples(self.folder / "samples.npz", samples.images)

    def put_score(self, record: dict[str, Any]) -> None:
        """Into `eval.json`, in place of one under the same protocol."""
        others = [other for other in Run(self.folder).evaluations if other["protocol_hash"] != self.protocol.hash]
        write_json_atomically(self.folder / "eval.json", [*others, record])

    def _score_curve(self) -> None:
        trainer, world = self.trainer, self.trainer.world
        with world.together():
            own = [path.name for path in kept_weights(self.folder)]
        names = world.of_all(own)[0]  # no rank goes by a list of its own: a folder on the network may show it an old one
        for name in names:
            path = self.folder / "snapshots" / name
            with world.together():
                weights, place = load_weights(path)
                is_scored = is_on_curve(self.folder, self.protocol.hash, place["step"])
            if not world.decide(is_scored, trainer.device):
                load_exactly(trainer.method, weights, str(path))
                _, record = self.score(place["step"])
                with world.together():
                    if world.is_main:
                        add_to_curve(self.folder, record, place)
            with world.together():
                if world.is_main:
                    path.unlink()
        if names:
            trainer.restore()

    def _pause(self) -> None:
        world = self.trainer.world
        with world.together():  # rank 0 may have lost the run to another process
            told = self.should_stop()
        if world.any(told, self.trainer.device):
            raise Interrupted("stopped while it was scored; everything made so far is kept")
