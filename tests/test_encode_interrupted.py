"""Is what was interrupted gone on with, to the same bytes, and what does not fit it refused?"""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from autoencoders import write_autoencoder
from command import assert_refused, contents, tsbench
from encoding import command

from bench.autoencoder import read_layout
from bench.config import DataConfig
from bench.data import encode as encoding
from bench.data import load_data
from bench.data.encode import RECORD, encode
from bench.data.folder import FolderImages

CPU = torch.device("cpu")


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


def test_interrupted_when_all_is_done_it_ends_well(
    images: DataConfig, autoencoder: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == RECORD:
            raise Killed
        own(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(Killed):
            encode(images, load_data(images), read_layout(autoencoder), tmp_path, CPU, mirrored=True)
    assert contents(tmp_path).keys() == {*contents(latents), RECORD}
    assert_refused(tsbench(*command(images, autoencoder, tmp_path)), "made of something else (mirrored)")
    outcome = tsbench(*command(images, autoencoder, tmp_path, "--mirrored"))
    assert outcome.code == 0, outcome.err
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


def changed(record: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    return {**record, "made_of": {**record["made_of"], key: value}}


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
    others = {"device": "cuda", "read_together": 16, "torch": "2.0.0", "diffusers": "0.1.0"}  # which round otherwise, or count
    for key, value in others.items():
        (begun / RECORD).write_text(json.dumps(changed(json.loads(record), key, value)))
        assert_refused(tsbench(*command(images, autoencoder, begun, "--mirrored")), f"something else ({key})")
    (begun / RECORD).write_text(record)
    (begun / "train_latents.npy").write_text("mine")
    assert_refused(tsbench(*command(images, autoencoder, begun, "--mirrored")), "train_latents.npy exists already")
    (begun / "train_latents.npy").unlink()
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
