"""Are samples that are scored as they are drawn scored as those that are kept, while no more than a round is held?"""

import gc
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command import TINY
from test_curve import samples_of

import bench.sample
from bench import evaluate, job
from bench.config import RunConfig
from bench.data import load_data
from bench.data.source import to_uint8
from bench.distributed import World
from bench.evaluate import score
from bench.protocol import protocol_of
from bench.runs import Run
from bench.sample import Sampler, make_sampler
from bench.streaming import Stream

CPU = torch.device("cpu")


def config_of(*settings: str) -> RunConfig:
    small = ("evaluation.block_size=7", "evaluation.num_samples=130", "evaluation.kid_subset_size=50", "evaluation.steps=3")
    return job.make_config({"method": "multi_expert"}, [*TINY, *small, *settings])


def parts_of(*settings: str):
    config = config_of(*settings)
    data = load_data(config.data)
    sampler = make_sampler(config.diffusion, config.evaluation, config.model, data)
    return sampler, job.build_method(config, data), protocol_of(config.evaluation, data), data


def test_scores_and_kept_images_are_the_same_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds, of 7 blocks of 7 images and of the rest."""
    sampler, method, protocol, data = parts_of()
    plain = sampler.draw(method, CPU)
    expected = score(plain.images, plain.labels, protocol, data)
    monkeypatch.setattr(Sampler, "rounds", lambda *_: [[*range(7)], [*range(7, 19)]])
    for protocol_batch, kept in ((49, 60), (7, 20)):  # a round is a whole number of batches, as `rounds` sees to
        other = protocol.__class__(**{**vars(protocol), "feature_batch_size": protocol_batch})
        samples, scores = Stream(sampler, other, data, kept).run(method, CPU, World())
        assert torch.equal(samples.images, plain.images[:kept]) and torch.equal(samples.labels, plain.labels[:kept])
        assert scores == score(plain.images, plain.labels, other, data)
        assert scores["nearest_neighbour"] == expected["nearest_neighbour"] and scores["n"] == 130


def test_no_more_than_a_round_of_images_is_held(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor on disk: what an interruption finds again are features."""
    monkeypatch.setattr(bench.sample, "ROUND", 1)
    monkeypatch.setattr(bench.sample, "NUM_IMAGES", 1)  # of the trajectory
    sampler, method, protocol, data = parts_of("evaluation.block_size=10")
    alive: list[int] = []
    draw_round = Sampler.draw_round

    def watched(self: Sampler, *inputs):
        gc.collect()
        tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.dtype == torch.uint8}
        alive.append(sum(storages.values()))
        return draw_round(self, *inputs)

    monkeypatch.setattr(Sampler, "draw_round", watched)
    samples, _ = Stream(sampler, protocol, data, 3).run(method, CPU, World(), tmp_path)
    assert len(alive) == 3  # 50, 50 and 30 images
    num_kept = 3 + 2 * len(samples.trajectory.images)
    assert max(alive) - alive[0] <= (num_kept + 1) * 64 < 1000  # not the fifty of a round (3,200 bytes)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"seen-{b:06d}-{n}-3.safetensors" for b, n in ((0, 5), (5, 5), (10, 3))
    ]


def test_an_interruption_loses_a_round_and_changes_no_score(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench.sample, "ROUND", 1)
    sampler, method, protocol, data = parts_of("evaluation.block_size=10")
    whole = Stream(sampler, protocol, data, 60).run(method, CPU, World())
    asked = iter(range(2))

    def pause() -> None:
        if next(asked, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Stream(sampler, protocol, data, 60).run(method, CPU, World(), tmp_path, pause)
    drawn: list[list[int]] = []
    draw_round = Sampler.draw_round
    monkeypatch.setattr(
        Sampler, "draw_round", lambda self, m, blocks, *rest: drawn.append(blocks) or draw_round(self, m, blocks, *rest)
    )
    samples, scores = Stream(sampler, protocol, data, 60).run(method, CPU, World(), tmp_path)
    assert drawn == [[10, 11, 12]]
    assert scores == whole[1] and torch.equal(samples.images, whole[0].images)
    assert np.array_equal(samples.trajectory.images, whole[0].trajectory.images)
    more, _ = Stream(sampler, protocol, data, 70).run(method, CPU, World(), tmp_path)  # none of the rounds holds as many
    assert torch.equal(more.images, sampler.draw(method, CPU).images[:70])


def test_a_run_that_keeps_some_samples_has_the_scores_of_one_that_keeps_all(tmp_path: Path) -> None:
    for name, settings in {"all": (), "some": ("system.keep_samples=9",)}.items():
        job.run(config_of(*settings), tmp_path / name)
    (whole,), (streamed,) = (Run(tmp_path / name).evaluations for name in ("all", "some"))
    assert whole["protocol_hash"] == streamed["protocol_hash"] and whole["n"] == streamed["n"] == 130
    assert whole["metrics"] == streamed["metrics"] and whole["heldout_loss"] == streamed["heldout_loss"]
    assert (samples_of(tmp_path / "some") == samples_of(tmp_path / "all")[:9]).all()
    assert len(samples_of(tmp_path / "some")) == 9
    assert (tmp_path / "some" / "trajectory.npz").read_bytes() == (tmp_path / "all" / "trajectory.npz").read_bytes()
    for record in (whole, streamed):
        assert record["seconds"].keys() == {"sampling", "features", "reference", "comparison"}
        json.dumps(record)


def test_data_of_another_protocol_are_refused_before_anything_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, method, protocol, data = parts_of()
    monkeypatch.setattr(Sampler, "draw_round", lambda *_: 1 / 0)
    other = protocol.__class__(**{**vars(protocol), "data_sha256": "0"})
    with pytest.raises(ValueError, match="not the one the protocol was made for"):
        Stream(sampler, other, data, 3).run(method, CPU, World())
    assert evaluate.to_uint8 is to_uint8
