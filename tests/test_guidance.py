"""Does guidance change the channels and the timesteps that it is asked for, and no others?"""

import pytest
import torch
from diffusing import close
from helpers import randomise
from sampling import CPU, sampler_and_method
from torch import Tensor

from bench.diffusion import guide
from bench.sample import Sampler


def labelled_network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x * y.view(-1, 1, 1, 1), x + t.view(-1, 1, 1, 1)], dim=1)


def guided(scale: float, channels: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    z, t = torch.randn(2, 4, 3, 3), torch.tensor([1, 2])
    pair = torch.cat([z, z]), torch.cat([t, t]), torch.tensor([2, 3, 7, 7])
    return guide(labelled_network, *pair, scale, channels), labelled_network(*pair)


def test_guidance_of_scale_one_is_the_conditional_output() -> None:
    output, plain = guided(scale=1.0, channels=4)
    close(output[:2], plain[:2], atol=1e-6)
    close(output[2:, :4], plain[:2, :4], atol=1e-6)


def test_guidance_leaves_other_channels_to_each_half() -> None:
    output, plain = guided(scale=4.0, channels=3)
    conditional, null = plain[:2, :3], plain[2:, :3]
    expected = null + 4 * (conditional - null)
    assert torch.equal(output[:2, :3], expected) and torch.equal(output[2:, :3], expected)
    assert torch.equal(output[:, 3:], plain[:, 3:])


def test_guidance_of_an_odd_batch_or_of_too_many_channels_is_refused() -> None:
    x = torch.zeros(3, 4, 2, 2)
    with pytest.raises(ValueError, match="stack the batch twice"):
        guide(labelled_network, x, torch.zeros(3), torch.zeros(3), 2.0, 3)
    with pytest.raises(ValueError, match="choose from 1 to 8"):
        guide(labelled_network, x[:2], torch.zeros(2), torch.zeros(2), 2.0, 9)


# Sampling with it


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


# In an interval of timesteps


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
