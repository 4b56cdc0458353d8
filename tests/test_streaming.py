"""Are samples that are scored as they are drawn scored as those that are kept, while few of them are ever held?"""

import dataclasses
import gc
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from command import TINY
from safetensors.torch import load_file
from test_curve import samples_of
from test_ranks import on_ranks

import bench.sample
from bench import job, streaming
from bench.config import RunConfig
from bench.data import DataSource, ImageSet, load_data
from bench.data.source import TensorImages
from bench.distance import nearest_squared
from bench.distributed import World
from bench.evaluate import Seen, score
from bench.files import read_json, write_bytes_atomically, write_json_atomically
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


def in_rounds(monkeypatch: pytest.MonkeyPatch, waiting: int) -> None:
    """Rounds of 50, 50 and 30 images of 64 bytes, and so many bytes for which the training set is read."""
    monkeypatch.setattr(bench.sample, "ROUND", 1)
    monkeypatch.setattr(streaming, "PIXELS_WAITING", waiting)


@pytest.mark.parametrize("waiting", [0, 1])  # rounds, apart from the one that is drawn
def test_no_more_images_are_held_than_may_wait_and_a_round(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, waiting: int) -> None:
    """Nor on disk: what an interruption finds again are features."""
    in_rounds(monkeypatch, 1 + waiting * 3200)
    monkeypatch.setattr(bench.sample, "NUM_IMAGES", 1)  # of the trajectory
    sampler, method, protocol, data = parts_of("evaluation.block_size=10")
    alive: list[int] = []
    on_disk: list[int] = []
    draw_round = Sampler.draw_round

    def watched(self: Sampler, *inputs):
        gc.collect()
        tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.dtype == torch.uint8}
        alive.append(sum(storages.values()))
        on_disk.append(sum(len(load_file(path).get("waiting", ())) for path in tmp_path.iterdir()))
        return draw_round(self, *inputs)

    monkeypatch.setattr(Sampler, "draw_round", watched)
    samples, _ = Stream(sampler, protocol, data, 3).run(method, CPU, World(), tmp_path)
    assert on_disk == ([0, 50, 0] if waiting else [0, 0, 0])
    num_kept = 3 + 2 * len(samples.trajectory.images)
    assert alive[2] - alive[0] <= (num_kept + 1) * 64 < 1000  # not the fifty of a round (3,200 bytes)
    assert (alive[1] - alive[0] > 3200) == bool(waiting)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"seen-{b:06d}-{n}-3.safetensors" for b, n in ((0, 5), (5, 5), (10, 3))
    ]
    assert not any("waiting" in load_file(path) for path in tmp_path.iterdir())


class CountedImages:
    """Knows how often each image was read."""

    def __init__(self, images: ImageSet) -> None:
        self.images, self.labels = images, images.labels
        self.times = torch.zeros(len(images), dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.times[indices] += 1
        return self.images.batch(indices)


def counted(data: DataSource) -> DataSource:
    return dataclasses.replace(data, train=CountedImages(data.train), fingerprint=lambda: data.content_hash)


@pytest.mark.parametrize(("waiting", "num_passes"), [(1, 3), (3201, 2), (6400, 2), (6401, 1), (streaming.PIXELS_WAITING, 1)])
@pytest.mark.parametrize("keeps_parts", [True, False])
def test_the_training_set_is_read_once_for_many_rounds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, waiting: int, num_passes: int, keeps_parts: bool
) -> None:
    in_rounds(monkeypatch, waiting)
    sampler, method, protocol, data = parts_of("evaluation.block_size=10")
    data = counted(data)
    _, scores = Stream(sampler, protocol, data, 60).run(method, CPU, World(), tmp_path if keeps_parts else None)
    assert data.train.times.tolist() == [num_passes + 1] * 1297  # and once for the features to compare with
    kept = sampler.draw(method, CPU)
    assert scores == score(kept.images, kept.labels, protocol, data)


def drawn_in(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first block of each round that is drawn from now on."""
    drawn: list[int] = []
    draw_round = Sampler.draw_round
    monkeypatch.setattr(
        Sampler, "draw_round", lambda self, m, blocks, *rest: drawn.append(blocks[0]) or draw_round(self, m, blocks, *rest)
    )
    return drawn


def stops_at(number: int | str, work: Callable = lambda *_: None, error: type[BaseException] = KeyboardInterrupt) -> Callable:
    """Does `work` that often, and then fails."""
    asked = itertools.count()

    def stopping(*inputs):
        if next(asked) == number:
            raise error
        return work(*inputs)

    return stopping


# Two rounds, the training set, their files again, a round, the training set, its file again
PAUSES = {0: [0, 5, 10], 1: [5, 10], 2: [10], 3: [10], 4: []}  # before a round or a reading: which rounds are drawn again
WRITES = {0: [0, 5, 10], 1: [5, 10], 2: [10], 3: [10], 4: [10], 5: []}  # of a file


@pytest.mark.parametrize(
    ("place", "number"), [*(("pause", number) for number in PAUSES), *(("write", number) for number in WRITES)]
)
def test_an_interruption_loses_a_round_at_most_and_changes_no_score(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str, number: int
) -> None:
    sampler, method, protocol, data = parts_of("evaluation.block_size=10")
    plain = sampler.draw(method, CPU)
    expected = score(plain.images, plain.labels, protocol, data)
    in_rounds(monkeypatch, 6400)
    stream = Stream(sampler, protocol, data, 60)
    pause = stops_at(number) if place == "pause" else lambda: None
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if place == "write":
            patch.setattr(streaming, "write_bytes_atomically", stops_at(number, write_bytes_atomically))
        stream.run(method, CPU, World(), tmp_path, pause)
    drawn = drawn_in(monkeypatch)
    for limit in (6400, 1):  # the second finds all
        monkeypatch.setattr(streaming, "PIXELS_WAITING", limit)
        samples, scores = stream.run(method, CPU, World(), tmp_path)
        assert drawn == (PAUSES if place == "pause" else WRITES)[number]
        assert scores == expected and torch.equal(samples.images, plain.images[:60])
        assert np.array_equal(samples.trajectory.images, plain.trajectory.images)


def test_rounds_that_were_searched_for_and_others_stay_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file in the middle is gone; and of other rounds, as more images are to be kept, none is used."""
    in_rounds(monkeypatch, streaming.PIXELS_WAITING)
    sampler, method, protocol, data = parts_of("evaluation.block_size=10")
    whole = Stream(sampler, protocol, data, 60).run(method, CPU, World(), tmp_path)
    (tmp_path / "seen-000005-5-60.safetensors").unlink()
    drawn = drawn_in(monkeypatch)
    samples, scores = Stream(sampler, protocol, data, 60).run(method, CPU, World(), tmp_path)
    assert drawn == [5]
    nearest = [load_file(path)["nearest"] for path in sorted(tmp_path.iterdir())]
    assert torch.equal(torch.cat(nearest), nearest_squared([sampler.draw(method, CPU).images], data.train))
    assert scores == whole[1] and torch.equal(samples.images, whole[0].images)
    more, _ = Stream(sampler, protocol, data, 70).run(method, CPU, World(), tmp_path)
    assert torch.equal(more.images, sampler.draw(method, CPU).images[:70])


def test_without_training_images_none_wait(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As of latents that are compared with a reference file alone."""
    in_rounds(monkeypatch, streaming.PIXELS_WAITING)
    sampler, method, protocol, data = parts_of("evaluation.block_size=10")
    empty = TensorImages(torch.empty(0, 1, 8, 8), torch.empty(0, dtype=torch.int64))
    given: list[Seen] = []
    monkeypatch.setattr(streaming, "score_seen", lambda seen, *_: given.append(seen) or {})
    without = dataclasses.replace(data, train=empty, fingerprint=lambda: data.content_hash)
    with pytest.raises(KeyboardInterrupt):
        Stream(sampler, protocol, without, 3).run(method, CPU, World(), tmp_path, stops_at(2))
    assert ["waiting" in load_file(path) for path in tmp_path.iterdir()] == [False, False]
    Stream(sampler, protocol, without, 3).run(method, CPU, World(), tmp_path)
    assert len(given[0].nearest) == 0 and len(given[0].features["features"]) == 130


RANKS = ("evaluation.block_size=10", "evaluation.num_samples=230")  # on two, rounds of 100, 100 and 30


def stop_and_go_on(world: World, out: Path) -> None:
    """Interrupted after a round, before the training set is read, between the files that follow, and before it is read again."""
    bench.sample.ROUND, streaming.PIXELS_WAITING = 1, 100 * 64 + 1
    sampler, method, protocol, data = parts_of(*RANKS)
    stream = Stream(sampler, protocol, counted(data), 120)
    for number in (1, 2, "write", 3):
        if number == "write":
            streaming.write_bytes_atomically = stops_at(1, write_bytes_atomically, OSError)
        with pytest.raises((KeyboardInterrupt, OSError if world.is_main else ValueError)):
            stream.run(method, CPU, world, out / "parts", stops_at(number))
        streaming.write_bytes_atomically = write_bytes_atomically
    samples, scores = stream.run(method, CPU, world, out / "parts")
    times = world.sum(stream.data.train.times).unique().tolist()
    write_json_atomically(out / f"{world.rank}.json", {"scores": scores, "images": samples.images.tolist(), "times": times})


@pytest.mark.xdist_group("ranks")
def test_two_ranks_that_are_interrupted_get_the_scores_of_one(tmp_path: Path) -> None:
    sampler, method, protocol, data = parts_of(*RANKS)
    plain = sampler.draw(method, CPU)
    expected = score(plain.images, plain.labels, protocol, data)
    on_ranks(2, stop_and_go_on, tmp_path)
    for rank in range(2):
        found = read_json(tmp_path / f"{rank}.json", dict)
        assert found["scores"] == expected
        assert found["images"] == plain.images[:120].tolist()
        assert found["times"] == [1 + 2]  # for the features to compare with, and in each of two searches


def test_ranks_that_do_not_see_the_same_file_stop(tmp_path: Path) -> None:
    class Torn(World):
        def of_all(self, value):
            return [value, 0]

    sampler, method, protocol, data = parts_of("evaluation.block_size=10")
    with pytest.MonkeyPatch.context() as monkeypatch:
        in_rounds(monkeypatch, 6400)
        with pytest.raises(KeyboardInterrupt):
            Stream(sampler, protocol, data, 60).run(method, CPU, World(), tmp_path, stops_at(1))
        with pytest.raises(
            ValueError, match=r"seen-000000-5-60.safetensors has \[50, 0\] images that wait, by rank: start again"
        ):
            Stream(sampler, protocol, data, 60).run(method, CPU, Torn(), tmp_path)


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
