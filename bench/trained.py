"""What can still be done with a run that is trained? It can be scored under another protocol, and draw more images."""

import shutil
from pathlib import Path
from typing import Any

import torch

from bench import job
from bench.data import load_data
from bench.distributed import World
from bench.finish import REFERENCES, Finisher
from bench.pixels import check_drawn, pixels_needed
from bench.protocol import hashed_by_rank_0, protocol_of
from bench.run_folder import locked
from bench.runs import Run
from bench.sample import Samples, make_sampler
from bench.trainer import Trainer


def evaluate_again(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Sample and score a trained run under changed `evaluation` settings; the record is added to its `eval.json`."""
    config = job.read_config(folder, overrides)
    job.find_device(config.system.device)
    if not job.is_trained(folder):
        raise ValueError(f"run {folder} is not trained to its end: go on with `tsbench train {folder}`")
    data = load_data(config.data)
    pixels = hashed_by_rank_0(pixels_needed(config.evaluation, data), World(), folder.parent / REFERENCES)
    protocol = protocol_of(config.evaluation, pixels)
    sampler = make_sampler(config.diffusion, config.evaluation, config.model, data, config.system.compile_sampling)
    is_first = not Run(folder).evaluations  # they can be read and added to: found out before anything is computed
    with locked(folder):
        trainer = Trainer(job.build_method(config, data), config, data, folder, only_scored=True)
        trainer.restore()
        finisher = Finisher(trainer, sampler, protocol, pixels)
        with trainer.ema.applied():
            samples, record = finisher.score()
        if is_first:  # of latents that nothing decoded before
            finisher.put_samples(samples)
        finisher.put_score(record)
        shutil.rmtree(finisher.parts, ignore_errors=True)
        return record


def draw_samples(folder: Path, overrides: list[str]) -> Samples:
    """Images from a trained run under changed `evaluation` settings."""
    config, data, method = job.load_trained(folder, overrides)
    check_drawn(config.evaluation, data)
    sampler = make_sampler(config.diffusion, config.evaluation, config.model, data, config.system.compile_sampling)
    return sampler.draw(method, torch.device(config.system.device))
