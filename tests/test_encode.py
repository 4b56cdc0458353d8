"""Are cached latents those of the images, also of mirrored ones, and the same however often encoding was interrupted?"""

import errno
import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from autoencoders import SCALING, write_autoencoder
from command import assert_refused, contents, train, tsbench
from PIL import Image
from safetensors.torch import load_file, save_file
from training import tiny_config

from bench.autoencoder import WEIGHTS, Autoencoder, read_layout
from bench.config import DataConfig
from bench.data import encode as encoding
from bench.data import load_data
from bench.data.encode import MIRRORED, RECORD, encode
from bench.data.folder import FolderImages
from bench.intervals import Interval
from bench.randomness import draw_batch, generator, image_indices

CPU = torch.device("cpu")
NUM_TRAIN, NUM_HELDOUT = 21, 9
PLAIN = {"meta.json", *(f"{part}_{kind}.npy" for part in ("train", "heldout") for kind in ("latents", "labels"))}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """PNGs of 16x20 in three classes, cropped to 16x16."""
    root = tmp_path_factory.mktemp("images") / "images"
    draw = np.random.default_rng(0)
    for part, count in (("train", NUM_TRAIN), ("heldout", NUM_HELDOUT)):
        for index in range(count):
            folder = root / part / "abc"[index % 3]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(folder / f"{index:02}.png")
    return DataConfig(name="folder", path=str(root), image_size=16)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_autoencoder(tmp_path_factory.mktemp("autoencoder") / "tiny")


def command(images: DataConfig, autoencoder: Path, out: Path, *more: str) -> list[object]:
    settings = [f"data.name={images.name}", f"data.path={images.path}", f"data.image_size={images.image_size}"]
    return ["encode", *settings, "--autoencoder", autoencoder, "--out", out, *more]


@pytest.fixture(scope="module")
def latents(images: DataConfig, autoencoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By the command, mirrored ones too."""
    out = tmp_path_factory.mktemp("latents") / "new" / "latents"
    outcome = tsbench(*command(images, autoencoder, out, "--mirrored"))
    assert (outcome.code, outcome.out) == (0, f"latents of 21 images to train on and 9 held out: {out}\n"), outcome.err
    return out


def expected(autoencoder: Path, x: torch.Tensor, name: str) -> torch.Tensor:
    """Of all images of an array, one by one their noise, by its definition."""
    noise = [torch.randn(4, 8, 8, generator=generator(0, "posterior", name, index)) for index in range(len(x))]
    return Autoencoder(read_layout(autoencoder), CPU).encode(x, torch.stack(noise)).half()


def test_latents_are_draws_and_mirrored_ones_are_those_of_mirrored_images(
    images: DataConfig, autoencoder: Path, latents: Path
) -> None:
    assert {path.name for path in latents.iterdir()} == {*PLAIN, f"{MIRRORED}_latents.npy"}
    data = load_data(images)
    x, y = data.train.batch(torch.arange(NUM_TRAIN))
    found = {name: torch.from_numpy(np.load(latents / f"{name}_latents.npy")) for name in ("train", MIRRORED, "heldout")}
    assert torch.equal(found["train"], expected(autoencoder, x, "train"))
    assert torch.equal(found[MIRRORED], expected(autoencoder, x.flip(-1), MIRRORED))
    assert torch.equal(found["heldout"], expected(autoencoder, data.heldout.batch(torch.arange(NUM_HELDOUT))[0], "heldout"))
    assert not torch.allclose(found[MIRRORED].float(), found["train"].flip(-1).float(), atol=0.1)
    assert np.load(latents / "train_labels.npy").tolist() == y.tolist()


def test_they_are_read_back_in_the_order_of_the_images_and_scaled(images: DataConfig, latents: Path) -> None:
    pixels, data = load_data(images), load_data(DataConfig(name="latents", path=str(latents), flip=True))
    assert (data.num_classes, data.channels, data.input_size, data.pixels, data.scaling) == (3, 4, 8, False, SCALING)
    for part in ("train", "heldout"):
        own, of_pixels = getattr(data, part), getattr(pixels, part)
        stored = torch.from_numpy(np.load(latents / f"{part}_latents.npy")).float()
        x, y = own.batch(torch.arange(len(of_pixels)))
        assert torch.equal(x, SCALING * stored) and torch.equal(y, of_pixels.labels)
    meta = json.loads((latents / "meta.json").read_text())
    assert meta.keys() == {"scaling", "source"} and "16x16" in meta["source"] and images.path in meta["source"]


def test_training_draws_flipped_rows_from_mirrored_latents(latents: Path, tmp_path: Path) -> None:
    data = load_data(DataConfig(name="latents", path=str(latents), flip=True))
    config = tiny_config("dense", "data.flip=true")
    plain, mirrored = (SCALING * torch.from_numpy(np.load(latents / f"{n}_latents.npy")).float() for n in ("train", MIRRORED))
    num_flipped = 0
    for step in range(5):
        for x, i in zip(draw_batch(step, Interval(0, 0, 40), config, data, 0.0).x0, image_indices(step, 8, 21, 0), strict=True):
            assert torch.equal(x, plain[i]) != torch.equal(x, mirrored[i])
            num_flipped += int(torch.equal(x, mirrored[i]))
    assert 8 < num_flipped < 32
    train(tmp_path, "data.name=latents", f"data.path={latents}", "data.flip=true", "budget.amount=32")


def test_without_mirrored_latents_images_are_not_mirrored(
    images: DataConfig, autoencoder: Path, latents: Path, tmp_path: Path
) -> None:
    assert tsbench(*command(images, autoencoder, tmp_path / "plain")).code == 0
    plain, both = contents(tmp_path / "plain"), contents(latents)
    assert plain.keys() == PLAIN and plain == {name: both[name] for name in PLAIN}
    settings = ["data.name=latents", f"data.path={tmp_path / 'plain'}", "data.flip=true"]
    assert_refused(tsbench("train", "--runs", tmp_path / "runs", *settings), "train_mirrored_latents.npy", "--mirrored")


def test_images_are_read_while_others_are_encoded(
    images: DataConfig, autoencoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second_is_read, own_batch, own_latents = threading.Event(), FolderImages.batch, encoding._latents
    monkeypatch.setattr(encoding, "READ_TOGETHER", 8)

    def batch(of_part: FolderImages, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if 8 in indices.tolist():
            second_is_read.set()
        return own_batch(of_part, indices)

    def latents(*arguments: object) -> np.ndarray:
        assert second_is_read.wait(timeout=20)
        return own_latents(*arguments)

    monkeypatch.setattr(FolderImages, "batch", batch)
    monkeypatch.setattr(encoding, "_latents", latents)
    encode(images, load_data(images), read_layout(autoencoder), tmp_path, CPU)


# Interrupted


class Killed(BaseException):
    """As by the system."""


def killed_at(last: int, owner: object, name: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The process ends when `name` is called for the time after `last`; one entry for each call."""
    calls: list[int] = []
    own = getattr(owner, name)

    def call(*arguments: object) -> object:
        if len(calls) == last:
            raise Killed
        calls.append(1)
        return own(*arguments)

    monkeypatch.setattr(owner, name, call)
    return calls


READING, ENCODING = (FolderImages, "batch"), (encoding, "_latents")
WHEN = [*((READING, last, last) for last in range(5)), *((ENCODING, n, (0, 0, 1, 1, 2, 2, 3, 4)[n]) for n in range(8))]


@pytest.mark.parametrize(("where", "last", "num_done"), WHEN)
def test_interrupted_at_any_batch_it_goes_on_and_ends_with_the_same_bytes(
    where: tuple[object, str],
    last: int,
    num_done: int,
    images: DataConfig,
    autoencoder: Path,
    latents: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three batches of training images, each also mirrored, and two of those held out."""
    monkeypatch.setattr(encoding, "READ_TOGETHER", 8)
    layout, data = read_layout(autoencoder), load_data(images)
    with monkeypatch.context() as patch:
        killed_at(last, *where, patch)
        with pytest.raises(Killed):
            encode(images, data, layout, tmp_path, CPU, mirrored=True)
    assert all(path.name.startswith(".") for path in tmp_path.iterdir())
    told: list[tuple[int, int]] = []
    read = killed_at(5, *READING, monkeypatch)
    encode(images, data, layout, tmp_path, CPU, mirrored=True, told=lambda done, total: told.append((done, total)))
    assert len(read) == 5 - num_done and told == [(n, 30) for n in (8, 16, 21, 29, 30)[num_done:]]
    assert contents(tmp_path) == contents(latents)


def test_progress_is_on_the_disk_before_it_is_counted(
    images: DataConfig, autoencoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is said when the system itself goes down: then the record tells what there is."""
    monkeypatch.setattr(encoding, "READ_TOGETHER", 8)
    monkeypatch.setattr(encoding, "SAVE_SECONDS", 0.0)
    seen: list[tuple[str, int]] = []
    own = encoding.write_json_atomically
    monkeypatch.setattr(np.memmap, "flush", lambda array: seen.append(("flushed", len(array))))
    monkeypatch.setattr(
        encoding,
        "write_json_atomically",
        lambda path, value: (own(path, value), seen.append(("counted", value.get("batches_encoded", -1)))),
    )
    encode(images, load_data(images), read_layout(autoencoder), tmp_path, CPU)
    flushed = [("flushed", 21), ("flushed", 9)]
    steps = [step for n in (1, 2, 3, 4, 5, 5) for step in [*flushed, ("counted", n)]]
    assert seen == [("counted", 0), *steps, ("counted", -1)]


@pytest.mark.parametrize("last", range(6))
def test_interrupted_while_names_are_given_it_goes_on(
    last: int, images: DataConfig, autoencoder: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """train_latents.npy means that all is there."""
    layout, data = read_layout(autoencoder), load_data(images)
    renamed: list[str] = []
    own = os.replace

    def replace(source: Path, target: Path) -> None:
        if not Path(target).name.startswith("."):
            if len(renamed) == last:
                raise Killed
            renamed.append(Path(target).name)
        own(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            encode(images, data, layout, tmp_path, CPU, mirrored=True)
    assert "train_latents.npy" not in renamed and (tmp_path / RECORD).exists()
    encode(images, data, layout, tmp_path, CPU, mirrored=True)
    assert contents(tmp_path) == contents(latents)


@pytest.fixture
def begun(images: DataConfig, autoencoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of mirrored latents too, with four of five batches encoded."""
    monkeypatch.setattr(encoding, "READ_TOGETHER", 8)
    with monkeypatch.context() as patch:
        killed_at(4, *READING, patch)
        with pytest.raises(Killed):
            encode(images, load_data(images), read_layout(autoencoder), tmp_path / "begun", CPU, mirrored=True)
    return tmp_path / "begun"


def copy_of(images: DataConfig, folder: Path) -> DataConfig:
    """Files of their own, to be changed."""
    shutil.copytree(images.path, folder / "images")
    return replace(images, path=str(folder / "images"))


def test_others_than_those_that_were_begun_are_refused(
    begun: Path, images: DataConfig, autoencoder: Path, tmp_path: Path
) -> None:
    before = contents(begun)
    other = write_autoencoder(tmp_path / "other", seed=1)
    assert_refused(tsbench(*command(images, autoencoder, begun)), "made of something else (mirrored)", "delete")
    assert_refused(tsbench(*command(images, other, begun, "--mirrored")), "something else (autoencoder)")
    assert_refused(tsbench(*command(copy_of(images, tmp_path), autoencoder, begun, "--mirrored")), "something else (data)")
    assert contents(begun) == before
    record = (begun / RECORD).read_text()
    (begun / RECORD).write_text(record.replace('"cpu"', '"cuda"'))  # which rounds otherwise
    assert_refused(tsbench(*command(images, autoencoder, begun, "--mirrored")), "something else (device)")
    (begun / RECORD).write_text(record)
    assert tsbench(*command(images, autoencoder, begun, "--mirrored")).code == 0


@pytest.mark.parametrize("damage", ["record", "missing", "cut short", "another shape"])
def test_damage_to_what_was_begun_is_told(damage: str, begun: Path, images: DataConfig, autoencoder: Path) -> None:
    array = begun / ".heldout_latents.npy.partial"
    if damage == "record":
        (begun / RECORD).write_text("{")
    elif damage == "missing":
        array.unlink()
    elif damage == "cut short":
        array.write_bytes(array.read_bytes()[:-1])
    else:
        with array.open("wb") as file:
            np.save(file, np.zeros((9, 4, 4, 4), np.float16))
    assert_refused(tsbench(*command(images, autoencoder, begun, "--mirrored")), str(begun), "delete")


def test_a_file_that_cannot_be_decoded_is_named_and_mended_makes_it_another_data_set(
    images: DataConfig, autoencoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "READ_TOGETHER", 8)
    own = copy_of(images, tmp_path)
    file = Path(own.path) / "heldout" / "c" / "08.png"
    content = file.read_bytes()
    file.write_bytes(bytes(len(content)))
    for _ in range(2):
        assert_refused(tsbench(*command(own, autoencoder, tmp_path / "out")), "08.png cannot be decoded")
        assert json.loads((tmp_path / "out" / RECORD).read_text())["batches_encoded"] == 4
    file.write_bytes(content)
    assert_refused(tsbench(*command(own, autoencoder, tmp_path / "out")), "something else (data)")


# What is refused


def test_what_does_not_fit_is_refused_before_anything_is_written(
    images: DataConfig, autoencoder: Path, latents: Path, tmp_path: Path
) -> None:
    out, gray = tmp_path / "out", write_autoencoder(tmp_path / "gray", channels=1)
    run = command(images, autoencoder, out)
    assert_refused(tsbench(*run[:1], "data.name=latents", f"data.path={latents}", *run[4:]), "holds latents", "give images")
    assert_refused(tsbench(*run, "data.image_size=15"), "15 pixels wide", "a multiple of 2")
    assert_refused(tsbench(*command(images, gray, out)), "images of 1 channels", "have 3")
    assert_refused(tsbench(*run, "data.flip=true"), "--mirrored")
    assert_refused(tsbench(*run, "seed=1"), "seed=1 would change nothing in what is encoded")
    assert_refused(tsbench(*command(images, autoencoder, Path(images.path) / "out")), "lies in data.path")
    assert_refused(tsbench(*command(images, tmp_path / "nothing", out)), "there is no file", "config.json")
    (gray / WEIGHTS).write_bytes(b"")
    assert_refused(tsbench("encode", "--autoencoder", gray, "--out", out), "cannot be loaded")
    assert not out.exists() and not (Path(images.path) / "out").exists()


@pytest.mark.parametrize("name", [*sorted(PLAIN), f"{MIRRORED}_latents.npy"])
def test_files_that_are_there_are_left_alone(name: str, images: DataConfig, autoencoder: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    assert_refused(tsbench(*command(images, autoencoder, tmp_path)), name, "exists already")
    assert contents(tmp_path) == {name: b"mine"}


@pytest.mark.parametrize("factor", [float("nan"), 1e6])
def test_latents_that_float16_cannot_hold_are_refused(
    factor: float, images: DataConfig, autoencoder: Path, tmp_path: Path
) -> None:
    damaged = write_autoencoder(tmp_path / "damaged")
    weights = load_file(damaged / WEIGHTS)
    save_file({**weights, "quant_conv.bias": weights["quant_conv.bias"] + factor}, damaged / WEIGHTS)
    outcome = tsbench(*command(images, damaged, tmp_path / "out"))
    assert_refused(outcome, "train: the latents of 21 of 21 images", "number 0, are not finite", "float16")
    assert not (tmp_path / "out" / "train_latents.npy").exists()


def test_a_full_disk_is_told_and_nothing_is_left(
    images: DataConfig, autoencoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def only_the_first_fits(file: int, start: int, length: int) -> None:
        asked.append(length)
        if len(asked) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", only_the_first_fits)
    assert_refused(tsbench(*command(images, autoencoder, tmp_path, "--mirrored")), "No space left on device", "make room")
    assert asked == [21 * 4 * 8 * 8 * 2 + 128] * 2 and list(tmp_path.iterdir()) == []
