"""Are packed images, and images kept on a device, the same to the bit as those that they were made from?"""

from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from command import tsbench
from PIL import Image
from training import tiny_config, tiny_data

from bench.config import DataConfig
from bench.data import DataSource, load_data, read_uint8, to_uint8
from bench.data.packed import PackedImages, pack
from bench.data.resident import ResidentImages, keep_on_device, resident
from bench.data.source import TensorImages
from bench.distance import nearest_squared
from bench.intervals import Interval
from bench.randomness import draw_batch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataSource:
    """JPEGs of several sizes in three classes, decoded one by one."""
    root = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for part, count in (("train", 7), ("heldout", 3)):
        for label in ("a", "b", "c"):
            (root / part / label).mkdir(parents=True)
            for index in range(count):
                pixels = draw.integers(0, 256, (20 + index, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / label / f"{index}.jpg")
    return load_data(DataConfig(name="folder", path=str(root), image_size=16))


@pytest.fixture(scope="module")
def packed(folder: DataSource, tmp_path_factory: pytest.TempPathFactory) -> DataSource:
    path = tmp_path_factory.mktemp("packed") / "arrays"
    told: list[tuple[int, int]] = []
    pack(folder, path, lambda done, total: told.append((done, total)))
    assert told[-1] == (30, 30)
    assert sorted(file.name for file in path.iterdir()) == [
        f"{part}_{kind}.npy" for part in ("heldout", "train") for kind in ("images", "labels")
    ]
    return load_data(DataConfig(name="packed", path=str(path)))


def test_packed_images_are_those_of_the_files_in_the_same_order(folder: DataSource, packed: DataSource) -> None:
    assert (packed.num_classes, packed.channels, packed.input_size, packed.pixels) == (3, 3, 16, True)
    for one, other in ((folder.train, packed.train), (folder.heldout, packed.heldout)):
        indices = torch.randperm(len(one), generator=torch.Generator().manual_seed(0))
        (x, y), (packed_x, packed_y) = one.batch(indices), other.batch(indices)
        assert torch.equal(x, packed_x) and torch.equal(y, packed_y) and torch.equal(one.labels, other.labels)
    assert packed.content_hash != folder.content_hash


def test_uint8_is_read_as_it_lies_and_is_what_a_batch_of_floats_would_give(folder: DataSource, packed: DataSource) -> None:
    digits = load_data(DataConfig()).train
    assert isinstance(digits, TensorImages) and digits.images.dtype == torch.float32
    all_values = TensorImages(torch.arange(256).byte().view(1, 1, 16, 16), torch.zeros(1, dtype=torch.int64))
    for images in (folder.train, packed.train, packed.heldout, digits, all_values):
        indices = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:20]
        assert torch.equal(read_uint8(images, indices), to_uint8(images.batch(indices)[0]))
    with mock.patch.object(PackedImages, "batch", side_effect=AssertionError("floats")):
        found = read_uint8(packed.train, torch.tensor([5, 2]))
        assert nearest_squared([found], packed.train).tolist() == [0, 0]
    found.zero_()  # a copy
    assert read_uint8(packed.train, torch.tensor([5])).any()


def test_a_batch_is_a_copy_and_the_arrays_are_mapped(packed: DataSource) -> None:
    assert isinstance(packed.train.images, np.memmap)  # type: ignore[attr-defined]
    before = packed.train.batch(torch.tensor([2]))[0].clone()
    packed.train.batch(torch.tensor([2]))[0].zero_()
    assert torch.equal(packed.train.batch(torch.tensor([2]))[0], before)


def test_the_command_packs_and_a_second_time_is_refused(folder: DataSource, tmp_path: Path) -> None:
    source = folder.train.paths[0].parents[2]  # type: ignore[attr-defined]
    settings = ["data.name=folder", f"data.path={source}", "data.image_size=16"]
    outcome = tsbench("pack", *settings, "--out", tmp_path / "out")
    assert outcome.code == 0 and "21 images to train on and 9 held out" in outcome.out, outcome.err
    again = tsbench("pack", *settings, "--out", tmp_path / "out")
    assert again.code == 2 and "exists already" in again.err


def test_a_full_disk_is_told_in_one_sentence_and_nothing_is_left(
    folder: DataSource, tmp_path: Path, room_for_one: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is the second array that does not fit."""
    source = folder.train.paths[0].parents[2]  # type: ignore[attr-defined]
    settings = ["data.name=folder", f"data.path={source}", "data.image_size=16"]
    outcome = tsbench("pack", *settings, "--out", tmp_path / "out")
    assert outcome.code == 2 and "(No space left on device): make room" in outcome.err and "Traceback" not in outcome.err
    assert room_for_one == [21 * 3 * 16 * 16 + 128, 9 * 3 * 16 * 16 + 128] and list((tmp_path / "out").iterdir()) == []
    monkeypatch.undo()
    assert tsbench("pack", *settings, "--out", tmp_path / "out").code == 0


def spoil(path: Path, name: str, array: np.ndarray) -> None:
    np.save(path / f"{name}.npy", array)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("train_images", np.zeros((4, 1, 8, 8), np.float32), "must be uint8"),
        ("heldout_images", np.zeros((4, 3, 8, 8), np.uint8), "must be uint8"),
        ("train_labels", np.zeros(3, np.int64), "one integer for each"),
        ("heldout_labels", np.full(4, 9), "leave 0..1"),
    ],
)
def test_wrong_arrays_are_refused(name: str, array: np.ndarray, message: str, tmp_path: Path) -> None:
    for part in ("train", "heldout"):
        spoil(tmp_path, f"{part}_images", np.zeros((4, 1, 8, 8), np.uint8))
        spoil(tmp_path, f"{part}_labels", np.arange(4) % 2)
    assert len(load_data(DataConfig(name="packed", path=str(tmp_path))).train) == 4
    spoil(tmp_path, name, array)
    with pytest.raises(ValueError, match=message):
        load_data(DataConfig(name="packed", path=str(tmp_path)))


def test_missing_arrays_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file .*train_images.npy"):
        load_data(DataConfig(name="packed", path=str(tmp_path)))


# Kept on a device


def mirrored_data() -> DataSource:
    """As if of latents: what is mirrored is nothing that the others could be turned into."""
    data = tiny_data()
    assert isinstance(data.train, TensorImages)
    return replace(data, mirrored=replace(data.train, images=torch.rand(20, 2, 4, 4)))


@pytest.mark.parametrize("kind", ["tiny", "packed", "folder", "digits", "mirrored"])
def test_batches_of_a_resident_set_are_the_same_to_the_bit(kind: str, request: pytest.FixtureRequest) -> None:
    """With flips and dropped labels, step after step; on a GPU the same tensors lie elsewhere."""
    made = {"tiny": tiny_data, "digits": lambda: load_data(DataConfig()), "mirrored": mirrored_data}
    data = made[kind]() if kind in made else request.getfixturevalue(kind)
    config = tiny_config("dense", "data.flip=true", "train.label_dropout=0.5")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = DataSource("there", data.num_classes, data.channels, data.input_size, resident(data.train, device), data.heldout, str)
    if kind == "mirrored":
        there = replace(there, mirrored=resident(data.mirrored, device))
    for step in range(6):
        plain, kept = (draw_batch(step, Interval(0, 0, 40), config, source, 0.0, slice(2, 7)) for source in (data, there))
        assert kept.x0.device.type == device.type
        for name in ("x0", "noise", "t", "y"):
            assert torch.equal(getattr(plain, name), getattr(kept, name).cpu()), name


def test_only_a_set_that_fits_is_kept_and_only_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    data, gpu = tiny_data(), torch.device("cuda")
    monkeypatch.setattr(
        "bench.data.resident.resident", lambda images, device: ResidentImages(images.images, images.labels, images.labels)
    )
    size_gb = 20 * 2 * 4 * 4 * 4 / 1e9  # float32
    assert isinstance(keep_on_device(data, gpu, size_gb).train, ResidentImages)
    assert keep_on_device(data, gpu, size_gb).heldout is data.heldout
    assert keep_on_device(data, gpu, size_gb * 0.99) is data
    assert keep_on_device(data, gpu, 0) is data
    assert keep_on_device(data, CPU, 100) is data


def test_mirrored_latents_are_kept_with_the_others_if_both_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "bench.data.resident.resident", lambda images, device: ResidentImages(images.images, images.labels, images.labels)
    )
    data, gpu, size_gb = mirrored_data(), torch.device("cuda"), 2 * 20 * 2 * 4 * 4 * 4 / 1e9
    kept = keep_on_device(data, gpu, size_gb)
    assert isinstance(kept.train, ResidentImages) and isinstance(kept.mirrored, ResidentImages)
    assert data.mirrored is not None and torch.equal(kept.mirrored.images, data.mirrored.batch(torch.arange(20))[0])
    assert keep_on_device(data, gpu, size_gb * 0.99) is data
