"""Are cached latents those of the images, also of mirrored ones, and what cannot be encoded refused?"""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from autoencoders import SCALING, write_autoencoder
from command import assert_refused, contents, train, tsbench
from encoding import NUM_HELDOUT, NUM_TRAIN, command
from safetensors.torch import load_file, save_file
from training import tiny_config

from bench.autoencoder import WEIGHTS, Autoencoder, digest_of, read_layout
from bench.config import DataConfig
from bench.data import encode as encoding
from bench.data import load_data
from bench.data.encode import MIRRORED, encode
from bench.data.folder import FolderImages
from bench.intervals import Interval
from bench.randomness import draw_batch, generator, image_indices

CPU = torch.device("cpu")
PLAIN = {"meta.json", *(f"{part}_{kind}.npy" for part in ("train", "heldout") for kind in ("latents", "labels"))}


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


def test_they_are_read_back_in_the_order_of_the_images_and_scaled(images: DataConfig, autoencoder: Path, latents: Path) -> None:
    pixels, data = load_data(images), load_data(DataConfig(name="latents", path=str(latents), flip=True))
    assert (data.num_classes, data.channels, data.input_size, data.pixels, data.scaling) == (3, 4, 8, False, SCALING)
    for part in ("train", "heldout"):
        own, of_pixels = getattr(data, part), getattr(pixels, part)
        stored = torch.from_numpy(np.load(latents / f"{part}_latents.npy")).float()
        x, y = own.batch(torch.arange(len(of_pixels)))
        assert torch.equal(x, SCALING * stored) and torch.equal(y, of_pixels.labels)
    digest = digest_of(read_layout(autoencoder))  # as in the protocol of those that are decoded by it
    source = f"folder {images.path}, 16x16 pixels, by AutoencoderKL {digest}"
    assert json.loads((latents / "meta.json").read_text()) == {"scaling": SCALING, "source": source}


def test_images_without_a_folder_are_named(tmp_path: Path) -> None:
    gray = write_autoencoder(tmp_path / "gray", channels=1)
    assert tsbench("encode", "--autoencoder", gray, "--out", tmp_path / "out").code == 0
    source = json.loads((tmp_path / "out" / "meta.json").read_text())["source"]
    assert source == f"digits, 8x8 pixels, by AutoencoderKL {digest_of(read_layout(gray))}"


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
        assert second_is_read.wait(timeout=600)
        return own_latents(*arguments)

    monkeypatch.setattr(FolderImages, "batch", batch)
    monkeypatch.setattr(encoding, "_latents", latents)
    encode(images, load_data(images), read_layout(autoencoder), tmp_path, CPU)


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
    images: DataConfig, autoencoder: Path, tmp_path: Path, room_for_one: list[int]
) -> None:
    assert_refused(tsbench(*command(images, autoencoder, tmp_path, "--mirrored")), "No space left on device", "make room")
    assert room_for_one == [21 * 4 * 8 * 8 * 2 + 128] * 2 and list(tmp_path.iterdir()) == []
