"""Does a trajectory lead from the noise to the image that is drawn, and show what the network predicts on its way?"""

import itertools
import math

import numpy as np
import pytest
import torch
from sampling import CPU, sampler_and_method

from bench.data import to_uint8
from bench.randomness import generator

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
