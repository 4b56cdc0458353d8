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

REFERENCES = "references"  # beside the run folders: what samples are compared with, for all runs


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
        with trainer.ema.applied():
            with trainer.world.together():
                if is_main and not (self.folder / "diagnostics.npz").exists():
                    write_diagnostics(trainer, self.folder)
            samples, record = self.score()
            with trainer.world.together():
                if is_main:
                    assert samples.trajectory is not None
                    write_trajectory(self.folder, samples.trajectory)
                    adm.write_samples(self.folder / "samples.npz", samples.images)
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

    def put_score(self, record: dict[str, Any]) -> None:
        """Into `eval.json`, in place of one under the same protocol."""
        others = [other for other in Run(self.folder).evaluations if other["protocol_hash"] != self.protocol.hash]
        write_json_atomically(self.folder / "eval.json", [*others, record])

    def _score_curve(self) -> None:
        trainer, world = self.trainer, self.trainer.world
        paths = kept_weights(self.folder)
        world.barrier()  # all have listed them before the first goes
        for path in paths:
            weights, place = load_weights(path)
            if not world.decide(is_on_curve(self.folder, self.protocol.hash, place["step"]), trainer.device):
                load_exactly(trainer.method, weights, str(path))
                _, record = self.score(place["step"])
                with world.together():
                    if world.is_main:
                        add_to_curve(self.folder, record, place)
            with world.together():
                if world.is_main:
                    path.unlink()
        if paths:
            trainer.restore()

    def _pause(self) -> None:
        if self.trainer.world.any(self.should_stop(), self.trainer.device):
            raise Interrupted("stopped while it was scored; everything made so far is kept")
