"""What does a contestant compute, and what memory does it need? Counted on the meta device, where nothing is allocated.

In fp32: bf16 keeps less, but for copies of weights.
"""

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch

from bench import job, switches
from bench.flops import Cost, measure
from bench.memory import training_memory, trains_fused_attention
from bench.method import Method
from bench.throughput.contest import CHANNELS, FP32, INPUT_SIZE, Contestant, Setup, config_of
from bench.throughput.entrant import synthetic_latents
from bench.throughput.pieces import Need

SHAPE = (CHANNELS, INPUT_SIZE, INPUT_SIZE)  # of an image
# What a step needs beside what it keeps for its backward pass, from peaks that were measured (LOG.md): as a part of that for
# gradients on their way and gaps between pieces, and bytes for the libraries' own.
PASSING, LIBRARIES = 0.25, 200e6


class Count(NamedTuple):
    cost: Cost
    need: Need


def count_of(contestant: Contestant, setup: Setup) -> Count:
    """Of a plain version as of ours but for attention and whole gradients: sorted rows are as many as those behind masks."""
    return Count(_cost(replace(contestant, precision=FP32, compiled="none", plain=False), setup), _need(contestant, setup))


@cache
def _cost(contestant: Contestant, setup: Setup) -> Cost:
    return measure(_on_meta(contestant, setup), SHAPE)


def _need(contestant: Contestant, setup: Setup) -> Need:
    method, config = _on_meta(contestant, setup), config_of(contestant, setup)
    fused = not contestant.plain and trains_fused_attention(setup.device, contestant.precision)
    with switches.only_off(switches.parse(config.system.plain)):
        one_interval = not contestant.plain and config.train.intervals_per_step == 1
        memory = training_memory(method, SHAPE, contestant.batch_size, fused_attention=fused, one_interval=one_interval)
        made = bytes_made_for_steps(method)
    # gradients go, but a method may keep their memory; what it makes for a step it keeps too, and makes again for the sampler
    held = memory.total - memory.activations + 2 * made
    return Need(held + (1 + PASSING) * memory.activations + LIBRARIES, held)


def _on_meta(contestant: Contestant, setup: Setup) -> Method:
    with torch.device("meta"):
        return job.build_method(config_of(contestant, setup), synthetic_latents())


def bytes_made_for_steps(method: Method) -> int:
    """Of what gradients arrive at in a step and is no parameter, as mixed weights. `method` is on the meta device."""
    own = {id(parameter) for parameter in method.parameters()}
    with method.one_step(method.intervals[0]) as leaves:
        for leaf in leaves:
            leaf.grad = torch.empty_like(leaf)
    return sum(leaf.nbytes for leaf in leaves if id(leaf) not in own)
