"""Does a step see what it should: the same for every method, nothing but (seed, step), each image once an epoch?"""

import math
from dataclasses import replace

import pytest
import torch
from helpers import PUBLISHED
from training import NUM_TIMESTEPS, tiny_config, tiny_data

from bench.data.source import TensorImages
from bench.intervals import Interval, interval_at_step, partition, steps_per_interval
from bench.randomness import Batch, draw_batch, generator, image_indices

DATA = tiny_data()
FIELDS = ("x0", "noise", "t", "y")


def draw(step: int, method: str = "dense", *settings: str, count: int = 1, progress: float = 0.0) -> Batch:
    config = tiny_config(method, *settings)
    interval = interval_at_step(step, partition(count, NUM_TIMESTEPS), config.seed)
    return draw_batch(step, interval, config, DATA, progress)


def equal(one: Batch, other: Batch, *fields: str) -> list[bool]:
    return [torch.equal(getattr(one, field), getattr(other, field)) for field in fields or FIELDS]


def test_a_batch_depends_on_seed_and_step_alone():
    torch.manual_seed(1)
    first = draw(5)
    draw(2), draw(900), torch.rand(3)
    torch.manual_seed(2)
    assert all(equal(first, draw(5, progress=0.5)))
    assert all(equal(first, draw(5, "dense", "train.lr=1", "budget.amount=8000", "train.precision=bf16", "label=other")))
    assert not any(equal(first, draw(6)))
    assert not any(equal(first, draw(5, "dense", "seed=1")))


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    draw(3)
    assert torch.equal(torch.rand(1), expected)


def test_all_methods_see_the_same_images_noise_and_labels_and_relative_timesteps():
    for step in (0, 7, 31):
        batches = {
            method: draw(step, method, count=count)
            for method, count in zip(PUBLISHED, (1, 3, 1, 1, 1, 8), strict=True)  # intervals
        }
        assert batches.keys() == set(PUBLISHED)
        first = batches["dense"]
        for method, batch in batches.items():
            assert all(equal(first, batch, "x0", "noise", "y")), method
            assert (batch.t >= batch.interval.start).all() and (batch.t < batch.interval.stop).all(), method
            relative = (batch.t - batch.interval.start) * NUM_TIMESTEPS / batch.interval.length
            assert ((relative - first.t).abs() <= NUM_TIMESTEPS / batch.interval.length).all(), method


def test_different_purposes_draw_different_numbers():
    places = [(0, "noise", 1), (0, "noise", 2), (1, "noise", 1), (0, "timestep", 1), (0, "noise", 11)]
    draws = torch.stack([torch.randn(1000, generator=generator(*place)) for place in places])
    assert (torch.corrcoef(draws) - torch.eye(len(places))).abs().max() < 0.15
    assert torch.equal(draws[0], torch.randn(1000, generator=generator(*places[0])))
    assert all(generator(seed, "x").initial_seed() >= 0 for seed in range(50))


# Images


@pytest.mark.parametrize(("batch_size", "num_images"), [(8, 40), (7, 40), (30, 7), (1, 3)])
def test_every_epoch_visits_every_image_once_in_another_order(batch_size, num_images):
    num_steps = math.lcm(batch_size, num_images) // batch_size
    drawn = torch.cat([image_indices(step, batch_size, num_images, seed=0) for step in range(3 * num_steps)])
    epochs = drawn.view(-1, num_images)
    assert len(epochs) >= 3
    assert all(torch.equal(epoch.sort().values, torch.arange(num_images)) for epoch in epochs)
    if num_images > 3:
        assert not (epochs[1:] == epochs[:-1]).all(dim=1).any()
        assert not torch.equal(epochs[0], torch.arange(num_images))
        other = torch.cat([image_indices(step, batch_size, num_images, seed=1) for step in range(num_steps)])
        assert not torch.equal(other, drawn[: len(other)])


def test_images_come_with_their_labels():
    batch = draw(4, "dense", "train.label_dropout=0", "train.batch_size=20")
    for image, label in zip(batch.x0, batch.y, strict=True):
        matches = (DATA.train.images == image).all(dim=(1, 2, 3)).nonzero().squeeze(1)
        assert len(matches) == 1 and DATA.train.labels[matches[0]] == label


def test_half_of_the_images_are_flipped_if_asked():
    plain = [draw(step, "dense", "train.batch_size=20") for step in range(60)]
    flipped = [draw(step, "dense", "train.batch_size=20", "data.flip=true") for step in range(60)]
    same = torch.cat([(one.x0 == other.x0).all(dim=(1, 2, 3)) for one, other in zip(plain, flipped, strict=True)])
    mirrored = torch.cat([(one.x0.flip(-1) == other.x0).all(dim=(1, 2, 3)) for one, other in zip(plain, flipped, strict=True)])
    assert (same ^ mirrored).all()
    assert abs(same.float().mean() - 0.5) < 4 * 0.5 / math.sqrt(len(same))


class Watched:
    """Images, and which of them were read."""

    def __init__(self, images):
        self.images, self.labels, self.seen = images, images.labels, []

    def __len__(self):
        return len(self.images)

    def batch(self, indices):
        self.seen += indices.tolist()
        return self.images.batch(indices)


def test_latents_are_flipped_by_reading_those_of_mirrored_images_and_no_more():
    images = DATA.train.images
    train, mirrored = Watched(DATA.train), Watched(TensorImages(torch.rand_like(images), DATA.train.labels))
    latents = replace(DATA, train=train, mirrored=mirrored)
    config = tiny_config("dense", "data.flip=true", "train.batch_size=20", "train.label_dropout=0.5")
    num_flipped = 0
    for step in range(6):
        train.seen.clear(), mirrored.seen.clear()
        whole, own = (draw_batch(step, Interval(0, 0, 40), config, data, 0.0) for data in (latents, DATA))
        indices = image_indices(step, 20, 20, config.seed)
        flipped = torch.tensor([(own.x0[i] != images[j]).any() for i, j in enumerate(indices)])
        assert torch.equal(whole.x0[~flipped], images[indices[~flipped]])
        assert torch.equal(whole.x0[flipped], mirrored.images.images[indices[flipped]])
        assert all(torch.equal(getattr(whole, name), getattr(own, name)) for name in ("noise", "t", "y"))
        assert (train.seen, mirrored.seen) == (indices[~flipped].tolist(), indices[flipped].tolist())
        for rows in (slice(0, 3), slice(3, 20), slice(7, 8), slice(5, 5)):  # of a rank, also where none or all are flipped
            part = draw_batch(step, Interval(0, 0, 40), config, latents, 0.0, rows)
            assert all(torch.equal(getattr(part, name), getattr(whole, name)[rows]) for name in ("x0", "noise", "t", "y"))
        num_flipped += int(flipped.sum())
    assert 30 < num_flipped < 90


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_labels_are_dropped_at_the_rate(rate):
    settings = (f"train.label_dropout={rate}", "train.batch_size=100")
    dropped = torch.cat([draw(step, "dense", *settings).y == DATA.num_classes for step in range(40)]).float().mean()
    assert abs(dropped - rate) <= 4 * math.sqrt(rate * (1 - rate) / 4000)


# Timesteps


@pytest.mark.parametrize("count", [1, 4, 8])  # that divide the number of timesteps
def test_every_method_sees_the_same_uniform_timesteps(count):
    num_steps, batch_size = 700, 40
    t = torch.cat([draw(step, "dense", f"train.batch_size={batch_size}", count=count).t for step in range(num_steps)])
    seen = torch.bincount(t, minlength=NUM_TIMESTEPS).double()
    expected = num_steps * batch_size / NUM_TIMESTEPS
    assert len(seen) == NUM_TIMESTEPS
    chi_square = float(((seen - expected) ** 2 / expected).sum())
    assert chi_square < NUM_TIMESTEPS + 4 * math.sqrt(2 * NUM_TIMESTEPS)


def test_equal_intervals_get_equal_steps_at_any_time():
    for count in (2, 4, 5, 8):
        intervals = partition(count, NUM_TIMESTEPS)
        for num_steps in (1, 7, 40, 101):
            counts = steps_per_interval(num_steps, intervals, seed=3)
            assert sum(counts) == num_steps and max(counts) - min(counts) <= 1


def test_rectified_flow_times_and_clusters_are_spread_over_what_a_rank_takes():
    flow = [draw(step, "dense", "diffusion.objective=flow", "diffusion.flow_times=stratified").t for step in range(200)]
    assert all(t.is_floating_point() and (t > 0).all() and (t < 1).all() for t in flow)
    clusters = [draw(step, "dense", "diffusion.loss_weight=uncertainty").t for step in range(200)]
    for t in clusters:
        assert torch.equal((t // 5).sort().values, torch.arange(8))
    for t, middle in ((torch.stack(flow), 0.5), (torch.stack(clusters).double(), 19.5)):
        assert abs(t[:, :4].mean() - middle) < 0.1 * middle
