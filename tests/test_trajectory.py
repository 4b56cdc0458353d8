"""Does a trajectory lead from the noise to the image that is drawn, and show what the network predicts on its way?"""

import itertools
import math

import numpy as np
import pytest
import torch
from sampling import CPU, sampler_and_method

import bench.sample
from bench.arrays import Trajectory
from bench.data import to_uint8
from bench.method import Method
from bench.randomness import generator
from bench.sample import Sampler
from bench.trajectory import Film

WALKS = {
    "ancestral": (),
    "ddim": ("evaluation.sampler=ddim", "evaluation.eta=0.5"),
    "flow": ("diffusion.objective=flow", "evaluation.sampler=euler", "evaluation.steps=5"),
    "guided": ("evaluation.guidance_scale=2",),
}


def filmed(sampler: Sampler, method: Method, num_frames: int) -> Trajectory:
    film = Film(sampler.walk, sampler.evaluation.block_size, sampler.pixels, num_frames)
    (first, _) = sampler._draw_blocks(method, [0, 1], CPU, film.watch)
    return film.trajectory(first, sampler.labels(4))


@pytest.mark.parametrize(
    ("name", "walk"), [*(("dit_moe", walk) for walk in WALKS), ("remix_dit", "ancestral"), ("remix_dit", "ddim")]
)
def test_a_trajectory_goes_from_the_noise_to_the_bytes_of_the_sample(name, walk):
    sampler, method = sampler_and_method(name, *WALKS[walk])
    samples = sampler.draw(method, CPU)
    way = samples.trajectory
    assert way.images.shape == way.predicted.shape == (6, 4, 2, 4, 4) and way.images.dtype == way.predicted.dtype == np.uint8
    assert np.array_equal(way.images[-1], samples.images[:4]) and np.array_equal(way.predicted[-1], samples.images[:4])
    noise = torch.randn((4, 2, 4, 4), generator=generator(0, "sample", 0))
    assert np.array_equal(way.images[0], to_uint8(noise))
    assert way.labels.tolist() == samples.labels[:4].tolist() == [0, 1, 2, 0]
    assert way.times[:-1].tolist() == pytest.approx(sampler.walk.times.tolist()) and math.isnan(way.times[-1])
    assert all((one != other).any() for one, other in itertools.pairwise(way.images))


def test_the_frames_of_a_trajectory_are_spread_over_the_walk_and_count_no_more_than_is_drawn_together():
    sampler, method = sampler_and_method("dense", "evaluation.steps=20", "diffusion.num_timesteps=40")
    way = filmed(sampler, method, num_frames=5)
    assert way.images.shape == (5, 4, 2, 4, 4)  # a block holds four
    assert way.times[:-1].tolist() == [sampler.walk.times[place] for place in (0, 5, 10, 15)]
    whole = filmed(sampler, method, num_frames=21)
    assert np.array_equal(way.images, whole.images[::5]) and np.array_equal(way.predicted, whole.predicted[::5])
    few, _ = sampler_and_method("dense", "evaluation.num_samples=2")
    assert few.draw(method, CPU).trajectory.labels.tolist() == [0, 1]


def test_a_trajectory_costs_no_step_of_its_own_and_is_found_again_after_an_interruption(monkeypatch, tmp_path):
    monkeypatch.setattr(bench.sample, "ROUND", 1)
    sampler, method = sampler_and_method("dense", "evaluation.num_samples=10")
    evaluated, evaluate = [], Sampler._evaluate
    monkeypatch.setattr(Sampler, "_evaluate", lambda self, *inputs: evaluated.append(1) or evaluate(self, *inputs))
    whole = sampler.draw(method, CPU).trajectory
    assert len(evaluated) == 3 * len(sampler.walk.times)  # three blocks

    def stop():
        if list(tmp_path.iterdir()):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler.draw(method, CPU, parts=tmp_path, pause=stop)
    del evaluated[:]
    found = sampler.draw(method, CPU, parts=tmp_path).trajectory
    assert len(evaluated) == 2 * len(sampler.walk.times)
    assert all(np.array_equal(one, other, equal_nan=True) for one, other in zip(whole, found, strict=True))
    assert all(one.dtype == other.dtype for one, other in zip(whole, found, strict=True))


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
    way = sampler.draw(method, CPU).trajectory
    expected = to_uint8(clean).int().numpy()
    assert len(way.predicted) == 6
    for predicted in way.predicted:
        assert np.abs(predicted - expected).max() <= 1  # by rounding
    assert (np.abs(way.images[:-1] - expected).max(axis=(1, 2, 3, 4)) > 5).all()
