"""Does image i depend on (seed, i) alone, whoever draws it, and is one specialised expert alive at a time?"""

import dataclasses
import gc
import itertools
import weakref
from types import SimpleNamespace

import pytest
import torch
from autoencoders import write_autoencoder
from sampling import CPU, sampler_and_method
from training import RUNS

import bench.autoencoder
import bench.sample
from bench.autoencoder import read_layout
from bench.distributed import World
from bench.pixels import Decoder
from bench.sample import Sampler


class Rank(World):
    """A rank that keeps the blocks it owns and gets the others from where the test put them."""

    def share_block(self, block, owner):
        blocks = Rank.shared.setdefault(self.size, [])
        if owner == self.rank:
            blocks.append(block)
        return block

    def sum(self, tensor, group=None):  # of failures: the others have none
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


def test_the_seconds_of_sampling_are_those_of_drawing_and_decoding_the_images_alone(monkeypatch):
    """By a clock on which only the decoder takes time."""
    now, loaded = [0.0], []

    class Slow:
        def load(self, device):
            now[0] += 0 if loaded else 100
            loaded.append(device)

        def __call__(self, x):
            self.load(x.device)
            now[0] += 2
            return x

        def shape_of(self, latent):
            return latent

    monkeypatch.setattr(bench.sample, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    sampler, method = sampler_and_method("dense")
    samples = dataclasses.replace(sampler, decoder=Slow()).draw(method, CPU)
    assert len(samples.images) / samples.images_per_second == pytest.approx(3 * 2)  # seconds, of three blocks
    assert now[0] == 100 + 3 * 2 + 2 * 5 * 2  # and of what a trajectory shows before its end


def test_a_decoder_that_is_loaded_is_not_loaded_again(monkeypatch, tmp_path):
    """Also for a device that tensors call by another name."""
    loaded, load = [], bench.autoencoder.Autoencoder
    monkeypatch.setattr(bench.autoencoder, "Autoencoder", lambda *given: loaded.append(given) or load(*given))
    decoder = Decoder(read_layout(write_autoencoder(tmp_path / "autoencoder")), 1.0)
    decoder.load(torch.device("cpu", 0))
    assert len(loaded) == 1
    decoder(torch.zeros(1, 4, 2, 2))
    assert len(loaded) == 1


def test_rounds_hold_whole_batches_of_features_and_change_no_image():
    sampler, _ = sampler_and_method("dense", "evaluation.num_samples=1000", "evaluation.block_size=6")
    lengths = {
        (1, 1): [40, 40, 40, 40, 7],
        (1, 50): [50, 50, 50, 17],  # 25 blocks of 6 are 3 batches of 50
        (16, 1): [48, 48, 48, 23],  # no rank waits for the others' third block
        (10, 50): [50, 50, 50, 17],
        (64, 50): [167],
    }
    for (num_ranks, multiple), expected in lengths.items():
        rounds = sampler.rounds(num_ranks, multiple)
        assert [len(blocks) for blocks in rounds] == expected
        assert [*itertools.chain(*rounds)] == list(range(167))
