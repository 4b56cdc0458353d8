"""Does image i depend on (seed, i) alone, whoever draws it, and is one specialised expert alive at a time?"""

import dataclasses
import gc
import itertools
import math
import weakref

import numpy as np
import pytest
import torch
from helpers import randomise
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from training import RUNS, tiny_config, tiny_data

import bench.sample
from bench.data import to_uint8
from bench.distributed import World
from bench.job import build_method
from bench.randomness import generator
from bench.sample import Sampler, make_sampler

CPU = torch.device("cpu")
SAMPLING = ("evaluation.num_samples=11", "evaluation.block_size=4", "evaluation.steps=ddim5")


def sampler_and_method(name: str, *settings: str):
    config, data = tiny_config(name, *SAMPLING, *settings), tiny_data()
    return make_sampler(config.diffusion, config.evaluation, config.model, data), randomise(build_method(config, data))


class Rank(World):
    """A rank that keeps the blocks it owns and gets the others from where the test put them."""

    def share_block(self, block, owner):
        blocks = Rank.shared.setdefault(self.size, [])
        if owner == self.rank:
            blocks.append(block)
        return block

    def sum(self, tensor):  # of failures: the others have none
        return tensor


def drawn_by(sampler: Sampler, method, size: int) -> torch.Tensor:
    """All images, each block from the rank that owns it."""
    Rank.shared = {}
    per_rank = []
    for rank in range(size):
        Rank.shared = {}
        sampler.draw(method, CPU, Rank(rank, size))
        per_rank.append(list(Rank.shared.get(size, [])))
    num_blocks = sum(map(len, per_rank))
    return torch.cat([per_rank[b % size][b // size] for b in range(num_blocks)])[: sampler.evaluation.num_samples]


@pytest.mark.parametrize("name", RUNS)
def test_bytes_are_equal_for_any_number_of_ranks(name):
    sampler, method = sampler_and_method(name)
    alone = sampler.draw(method, CPU).images
    assert alone.shape == (11, 2, 4, 4) and alone.dtype == torch.uint8
    assert alone.float().std() > 0
    for size in (2, 3, 5):
        assert torch.equal(drawn_by(sampler, method, size), alone)


def test_an_image_does_not_depend_on_how_many_are_drawn():
    few, method = sampler_and_method("remix_dit", "evaluation.num_samples=5")
    many, _ = sampler_and_method("remix_dit", "evaluation.num_samples=23")
    assert torch.equal(few.draw(method, CPU).images, many.draw(method, CPU).images[:5])


def test_the_seed_and_the_index_change_the_image_and_labels_cycle_through_the_classes():
    sampler, method = sampler_and_method("dense")
    other, _ = sampler_and_method("dense", "evaluation.seed=1")
    samples = sampler.draw(method, CPU)
    assert not torch.equal(samples.images, other.draw(method, CPU).images)
    assert samples.labels.tolist() == [i % 3 for i in range(11)]
    same_label = samples.images[0::3]
    assert not torch.equal(same_label[0], same_label[1])


@pytest.mark.parametrize("name", ["multi_expert", "remix_dit"])
def test_one_specialised_expert_is_alive_at_a_time(name, monkeypatch):
    sampler, method = sampler_and_method(name, "options.experts=4")
    alive: weakref.WeakSet = weakref.WeakSet()
    most, made = 0, []
    specialise = method.specialise

    class Watched:
        def __init__(self, denoiser):
            self.denoiser = denoiser

        def __call__(self, *inputs):
            return self.denoiser(*inputs)

    def watched(interval):
        nonlocal most
        gc.collect()
        most = max(most, len(alive) + 1)
        made.append(interval.index)
        denoiser = Watched(specialise(interval))
        alive.add(denoiser)
        return denoiser

    monkeypatch.setattr(method, "specialise", watched)
    sampler.draw(method, CPU)
    assert made == [3, 2, 1, 0]  # from noise to image, each once
    assert most == 1


@pytest.mark.parametrize(
    "settings",
    [
        ("evaluation.sampler=ddim",),
        ("evaluation.sampler=ddim", "evaluation.eta=0.5"),
        ("evaluation.steps=2,3",),
        ("model.learn_sigma=false",),
        ("diffusion.objective=flow", "evaluation.sampler=euler", "evaluation.steps=4"),
    ],
    ids=" ".join,
)
def test_every_sampler_draws(settings):
    sampler, method = sampler_and_method("dtr", *settings)
    samples = sampler.draw(method, CPU)
    assert samples.images.float().std() > 0
    assert samples.network_evaluations_per_sample == len(sampler.walk.times)
    assert torch.equal(samples.images, sampler.draw(method, CPU).images)


def test_guidance_of_scale_one_is_none_and_more_changes_the_guided_channels():
    plain, method = sampler_and_method("dense")
    outputs = {}
    for scale, channels in ((1.0, 0), (1.0 + 1e-9, 0), (3.0, 0), (3.0, 1)):
        sampler, _ = sampler_and_method(
            "dense", f"evaluation.guidance_scale={scale!r}", f"evaluation.guidance_channels={channels}"
        )
        outputs[scale, channels] = sampler.draw(method, CPU)
    assert torch.equal(outputs[1.0, 0].images, plain.draw(method, CPU).images)
    near = (outputs[1.0, 0].images.int() - outputs[1.0 + 1e-9, 0].images.int()).abs()
    assert near.max() <= 1
    assert not torch.equal(outputs[3.0, 0].images, outputs[1.0, 0].images)
    assert not torch.equal(outputs[3.0, 0].images, outputs[3.0, 1].images)
    assert outputs[3.0, 0].network_evaluations_per_sample == 2 * outputs[1.0, 0].network_evaluations_per_sample


WALKS = {
    "ancestral": (),
    "ddim": ("evaluation.sampler=ddim", "evaluation.eta=0.5"),
    "flow": ("diffusion.objective=flow", "evaluation.sampler=euler", "evaluation.steps=5"),
    "guided": ("evaluation.guidance_scale=2",),
}


@pytest.mark.parametrize(
    ("name", "walk"), [*(("dit_moe", walk) for walk in WALKS), ("remix_dit", "ancestral"), ("remix_dit", "ddim")]
)
def test_a_trajectory_goes_from_the_noise_to_the_bytes_of_the_sample(name, walk):
    sampler, method = sampler_and_method(name, *WALKS[walk])
    way = sampler.trajectory(method, CPU, count=3)
    samples = sampler.draw(method, CPU)
    assert way.images.shape == way.predicted.shape == (6, 3, 2, 4, 4) and way.images.dtype == way.predicted.dtype == np.uint8
    assert np.array_equal(way.images[-1], samples.images[:3]) and np.array_equal(way.predicted[-1], samples.images[:3])
    noise = torch.randn((4, 2, 4, 4), generator=generator(0, "sample", 0))[:3]
    assert np.array_equal(way.images[0], to_uint8(noise))
    assert way.labels.tolist() == samples.labels[:3].tolist() == [0, 1, 2]
    assert way.times[:-1].tolist() == pytest.approx(sampler.walk.times.tolist()) and math.isnan(way.times[-1])
    assert all((one != other).any() for one, other in itertools.pairwise(way.images))


def test_the_frames_of_a_trajectory_are_spread_over_the_walk_and_count_no_more_than_is_drawn_together():
    sampler, method = sampler_and_method("dense", "evaluation.steps=20", "diffusion.num_timesteps=40")
    way = sampler.trajectory(method, CPU, num_frames=5)
    assert way.images.shape == (5, 4, 2, 4, 4)  # a block holds four
    assert way.times[:-1].tolist() == [sampler.walk.times[place] for place in (0, 5, 10, 15)]
    whole = sampler.trajectory(method, CPU, num_frames=21)
    assert np.array_equal(way.images, whole.images[::5]) and np.array_equal(way.predicted, whole.predicted[::5])
    few, _ = sampler_and_method("dense", "evaluation.num_samples=2")
    assert few.trajectory(method, CPU).labels.tolist() == [0, 1]


@pytest.mark.parametrize("walk", ["ddim", "flow"])
def test_the_predicted_image_is_the_clean_one_where_the_network_is_right(walk):
    """It knows the image: then every prediction is that image, and so is the end of a deterministic walk."""
    sampler, method = sampler_and_method("dense", *WALKS[walk], "evaluation.eta=0")
    clean = torch.rand(4, 2, 4, 4, generator=torch.Generator().manual_seed(5)) * 1.8 - 0.9

    def specialise(interval):
        def denoise(x, t, y):
            if walk == "flow":
                target = (x - clean) / t.view(-1, 1, 1, 1)  # velocity: x = clean + t (noise - clean)
            else:
                kept = sampler.walk.schedule.alphas_cumprod.values[sampler.walk.times.tolist()[::-1].index(int(t[0]))]
                target = ((x - kept.sqrt() * clean) / (1 - kept).sqrt()).float()
            return torch.cat([target, torch.zeros_like(target)], dim=1)

        return denoise

    method.specialise = specialise
    way = sampler.trajectory(method, CPU)
    expected = to_uint8(clean).int().numpy()
    assert len(way.predicted) == 6
    for predicted in way.predicted:
        assert np.abs(predicted - expected).max() <= 1  # by rounding
    assert (np.abs(way.images[:-1] - expected).max(axis=(1, 2, 3, 4)) > 5).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("evaluation.guidance_channels=3",), "guidance_channels is 3"),
        (("evaluation.sampler=euler",), "does not fit diffusion.objective=noise"),
        (("diffusion.objective=flow",), "for flow euler"),
        (("evaluation.steps=ddim17",), "17"),
        (("evaluation.steps=1000",), "1000"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_drawn(settings, message):
    with pytest.raises(ValueError, match=message):
        sampler_and_method("dense", *settings)


# In rounds


def test_what_is_drawn_is_kept_and_found_again_and_changes_no_image(monkeypatch, tmp_path):
    sampler, method = sampler_and_method("multi_expert", "evaluation.num_samples=23")
    whole = sampler.draw(method, CPU, parts=tmp_path)
    assert not list(tmp_path.iterdir())  # one round
    monkeypatch.setattr(bench.sample, "ROUND", 2)
    pauses = []

    def pause() -> None:
        pauses.append(len(list(tmp_path.iterdir())))
        if len(pauses) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler.draw(method, CPU, parts=tmp_path, pause=pause)
    assert pauses == [0, 1, 2]
    with torch.no_grad():
        for parameter in method.parameters():  # what is kept is not drawn again
            parameter.zero_()
    rest = sampler.draw(method, CPU, parts=tmp_path)
    assert torch.equal(rest.images[:16], whole.images[:16]) and not torch.equal(rest.images[16:], whole.images[16:])
    assert len(list(tmp_path.iterdir())) == 3


def test_rounds_hold_whole_batches_of_features_and_change_no_image():
    sampler, _ = sampler_and_method("dense", "evaluation.num_samples=1000", "evaluation.block_size=6")
    rounds = sampler.rounds(multiple_of=50)
    assert [len(blocks) for blocks in rounds] == [50, 50, 50, 17]  # 25 blocks of 6 are 3 batches of 50
    assert [*itertools.chain(*rounds)] == [*itertools.chain(*sampler.rounds())] == list(range(167))


# Guidance in an interval


def evaluated_in(sampler: Sampler, method) -> list[tuple[int, int]]:
    """(Timestep, images in the batch) of every call of the network for one block."""
    calls = []
    specialise = method.specialise

    def watched(interval):
        denoiser = specialise(interval)

        def denoise(x, t, y):
            calls.append((int(t[0]), len(x)))
            return denoiser(x, t, y)

        return denoise

    method.specialise = watched
    sampler._draw_blocks(method, [0], CPU)
    method.specialise = specialise
    return calls


def test_guidance_is_applied_in_its_interval_alone_and_both_halves_go_in_one_batch():
    guided = ("evaluation.guidance_scale=3", "evaluation.steps=10")
    inside, method = sampler_and_method("dense", *guided, "evaluation.guidance_start=10", "evaluation.guidance_stop=20")
    calls = evaluated_in(inside, method)
    assert len(calls) == 10 and {size for _, size in calls} == {4, 8}
    assert all((size == 8) == (10 <= t < 20) for t, size in calls)
    assert inside.draw(method, CPU).network_evaluations_per_sample == 10 + sum(10 <= t < 20 for t, _ in calls)


def test_an_interval_of_everything_is_plain_guidance_and_one_of_nothing_visited_is_none():
    def images(*settings):
        sampler, method = sampler_and_method("dense", "evaluation.sampler=ddim", "evaluation.steps=5", *settings)
        return sampler.draw(randomise(method, std=0.05), CPU).images

    scale = "evaluation.guidance_scale=20"
    everywhere = images(scale)
    assert torch.equal(everywhere, images(scale, "evaluation.guidance_stop=40"))
    assert not torch.equal(images(scale, "evaluation.guidance_start=15"), images())
    assert not torch.equal(images(scale, "evaluation.guidance_stop=25"), everywhere)  # the noisiest steps are not guided
    visited = [0, 10, 20, 29, 39]
    assert not {1, 2} & set(visited)
    assert torch.equal(images(), images(scale, "evaluation.guidance_start=1", "evaluation.guidance_stop=3"))


def test_guidance_of_a_flow_takes_its_interval_in_timesteps_too():
    flow = ("diffusion.objective=flow", "evaluation.sampler=euler", "evaluation.steps=4", "evaluation.guidance_scale=2")
    sampler, _ = sampler_and_method("dense", *flow, "evaluation.guidance_start=10", "evaluation.guidance_stop=30")
    assert sampler.walk.times.tolist() == [1.0, 0.75, 0.5, 0.25]
    assert sampler.guided_places() == [False, False, True, True]  # timesteps 39, 30, 20, 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("evaluation.guidance_start=10",), "which is no guidance"),
        (("evaluation.guidance_scale=2", "evaluation.guidance_start=10", "evaluation.guidance_stop=10"), "start < stop"),
        (("evaluation.guidance_scale=2", "evaluation.guidance_stop=41"), "at most 40"),
        (("evaluation.guidance_scale=2", "evaluation.guidance_start=40"), "start < stop"),
    ],
)
def test_an_interval_that_guides_nothing_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        sampler_and_method("dense", *settings)


# Switches, beside the plain path


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
        sampler._draw_blocks(method, [0, 1], CPU)
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


@pytest.mark.parametrize("name", ["dense", "remix_dit"])
def test_a_compiled_network_draws_the_same_up_to_rounding_and_once_for_all_experts(name):
    settings = ("evaluation.guidance_scale=2", "evaluation.guidance_start=10", "evaluation.steps=20")
    experts = ("options.experts=12",) if name == "remix_dit" else ()  # more than the compiler would compile anew
    sampler, method = sampler_and_method(name, *settings, *experts)
    torch._dynamo.reset()
    counters.clear()
    compiled = dataclasses.replace(sampler, compiled=True).draw(method, CPU).images
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]  # with guidance and without
    assert (compiled.int() - sampler.draw(method, CPU).images.int()).abs().max() <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["dense", "multi_expert", "dtr", "remix_dit"])
def test_on_a_gpu_no_step_waits(name):
    sampler, method = sampler_and_method(name, "evaluation.guidance_scale=2")
    device = torch.device("cuda")
    method.to(device)
    sampler._draw_blocks(method, [0], device)  # tables and kernels are loaded
    torch.cuda.synchronize()
    steps = []

    def watch(place, x, output):
        torch.cuda.set_sync_debug_mode("error" if place < len(sampler.walk.times) - 1 else "default")
        steps.append(place)

    try:
        sampler._draw_blocks(method, [0], device, watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) == len(sampler.walk.times)
