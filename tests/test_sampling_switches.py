"""Do bf16 and compiled networks draw the same images, and does no step wait for the device?"""

import dataclasses
from functools import partial

import pytest
import torch
from helpers import randomise
from sampling import CPU, sampler_and_method
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from training import RUNS

import bench.sample
from bench.sample import Sampler
from bench.trajectory import Film


def test_bf16_draws_nearly_the_same_and_float32_stays_as_it_is():
    plain, method = sampler_and_method("dense", "evaluation.guidance_scale=2")
    bf16, _ = sampler_and_method("dense", "evaluation.guidance_scale=2", "evaluation.precision=bf16")
    one, other = plain.draw(randomise(method, std=0.05), CPU).images, bf16.draw(method, CPU).images
    difference = (one.int() - other.int()).abs().double()
    assert 0 < difference.mean() < 3


class Syncs(TorchDispatchMode):
    """Counts what has to wait for a device: numbers, shapes and branches that depend on a tensor's values."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "unique", "masked_select")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__.strip("_") in {name.strip("_") for name in self.WAITING}:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def waits_in(sampler: Sampler, method) -> list[str]:
    with Syncs() as syncs:
        sampler._draw_blocks(method, [0, 1], CPU, Film(sampler.walk, 2, sampler.pixels).watch)
    return syncs.found


@pytest.mark.parametrize("name", ["dense", "multi_expert", "dtr", "remix_dit"])
@pytest.mark.parametrize("sampler_name", ["ancestral", "ddim", "dpm_solver"])
def test_nothing_in_the_loop_waits_for_the_device(name, sampler_name):
    """Ten steps wait as often as five: what waits is the preparation, and a finished block's look for what is not finite."""
    found = {}
    for steps in (5, 10):
        settings = (f"evaluation.sampler={sampler_name}", f"evaluation.steps={steps}", "evaluation.guidance_scale=2")
        sampler, method = sampler_and_method(name, *settings)
        found[steps] = waits_in(sampler, method)
    on_host = len(method.intervals) + 2 * len(sampler.walk.times)  # `nonzero` and `tolist` of timesteps, which are on the host
    assert [what for what in found[10] if "nonzero" not in what] == [what for what in found[5] if "nonzero" not in what]
    assert len(found[10]) <= on_host


def test_a_wait_in_the_loop_is_found(monkeypatch):
    sampler, method = sampler_and_method("dense", "evaluation.steps=10")
    few = len(waits_in(sampler, method))
    monkeypatch.setattr(bench.sample, "moved", lambda tensor, device: (tensor.sum().item(), tensor)[1])
    assert len(waits_in(sampler, method)) >= few + 20  # the noise of every step of both blocks


MANY = {"multi_expert": ("options.experts=12",), "remix_dit": ("options.experts=12",)}  # more than would be compiled anew


@pytest.mark.parametrize(("name", "backend"), [(name, "inductor" if name == "dense" else "aot_eager") for name in RUNS])
def test_a_compiled_network_draws_the_same_up_to_rounding_and_once_for_all_experts(name, backend, monkeypatch):
    settings = ("evaluation.guidance_scale=2", "evaluation.guidance_start=10", "evaluation.steps=20")
    sampler, method = sampler_and_method(name, *settings, *MANY.get(name, ()))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    counters.clear()
    compiled = dataclasses.replace(sampler, compiled=True).draw(method, CPU).images
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]  # with guidance and without
    assert (compiled.int() - sampler.draw(method, CPU).images.int()).abs().max() <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("name", ["dense", "multi_expert", "dtr", "remix_dit"])
def test_on_a_gpu_no_step_waits(name):
    sampler, method = sampler_and_method(name, "evaluation.guidance_scale=2")
    device = torch.device("cuda")
    method.to(device)
    sampler._draw_blocks(method, [0], device)  # tables and kernels are loaded
    torch.cuda.synchronize()
    steps = []

    film = Film(sampler.walk, 2, sampler.pixels)

    def watch(block, place, x, output):
        film.watch(block, place, x, output)
        torch.cuda.set_sync_debug_mode("error" if place < len(sampler.walk.times) - 1 else "default")
        steps.append(place)

    try:
        sampler._draw_blocks(method, [0], device, watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) == len(sampler.walk.times)
