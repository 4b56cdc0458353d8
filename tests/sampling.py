"""What do the tests of sampling share? A sampler of few small images, and a method to draw them with."""

import torch
from helpers import randomise
from training import tiny_config, tiny_data

from bench.job import build_method
from bench.sample import make_sampler

CPU = torch.device("cpu")
SAMPLING = ("evaluation.num_samples=11", "evaluation.block_size=4", "evaluation.steps=ddim5")


def sampler_and_method(name: str, *settings: str):
    config, data = tiny_config(name, *SAMPLING, *settings), tiny_data()
    return make_sampler(config.diffusion, config.evaluation, config.model, data), randomise(build_method(config, data))
