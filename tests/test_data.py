"""Are the data sets what they say: fixed, disjoint, balanced, and refused in one sentence when a file is wrong?"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.config import DataConfig
from bench.data import DATA_SETS, balanced_order, latents, load_data, packed, to_uint8
from bench.data.cifar10 import HELDOUT_FILES, RECORD_BYTES, TRAIN_FILES
from bench.data.source import evenly_spread, hash_arrays, spread_choice, to_unit_range

# --- what data sets share


def test_importing_the_package_loads_no_image_library() -> None:
    code = "import sys, bench.data; sys.exit(int(bool({'torchvision', 'sklearn'} & set(sys.modules))))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="mnist.*" + ", ".join(DATA_SETS)):
        load_data(DataConfig(name="mnist"))


def test_to_uint8_inverts_to_unit_range_and_rounds_halves_up() -> None:
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_uint8(to_unit_range(every)), every)
    halves = torch.tensor([-5.0, -1.0, 0.0, 1.0, 5.0])  # 0.0 is 127.5
    assert to_uint8(halves).tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_to_uint8_refuses_what_is_not_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="1 of 3 pixel values are not finite"):
        to_uint8(torch.tensor([0.0, bad, 1.0]))


def test_balanced_order_visits_classes_in_turn_and_passes_over_those_that_run_out() -> None:
    labels = torch.tensor([2, 2, 0, 1, 0, 2])
    order = balanced_order(labels)
    assert order.tolist() == [2, 3, 0, 4, 1, 5]
    assert labels[order].tolist() == [0, 1, 2, 0, 2, 2]


def test_evenly_spread_gives_different_positions_up_to_all() -> None:
    assert evenly_spread(9, 3).tolist() == [1, 4, 7]
    assert evenly_spread(7, 7).tolist() == list(range(7))
    assert len(evenly_spread(183, 50).unique()) == 50


def test_spread_choice_is_balanced_spread_and_fills_up_small_classes() -> None:
    labels = torch.tensor([0] * 9 + [1] * 9 + [2])
    assert spread_choice(labels, 6).tolist()[:3] == [2, 11, 18]
    assert labels[spread_choice(labels, 6)].bincount().tolist() == [3, 2, 1]
    assert sorted(spread_choice(labels, len(labels)).tolist()) == list(range(len(labels)))


# --- CIFAR-10


def write_cifar(folder: Path, per_file: int = 20, label: int | None = None) -> None:
    generator = np.random.default_rng(0)
    for name in (*TRAIN_FILES, *HELDOUT_FILES):
        records = generator.integers(0, 256, (per_file, RECORD_BYTES), dtype=np.uint8)
        records[:, 0] = generator.permutation(per_file) % 10 if label is None else label
        records.tofile(folder / name)


def test_cifar10_reads_the_binary_files(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    source = load_data(DataConfig(name="cifar10", path=str(tmp_path)))
    assert (len(source.train), len(source.heldout), source.num_classes, source.channels) == (100, 20, 10, 3)
    assert torch.equal(source.heldout.labels, torch.arange(20) % 10)
    record = np.fromfile(tmp_path / TRAIN_FILES[1], dtype=np.uint8)[:RECORD_BYTES]
    x, y = source.train.batch(torch.tensor([20]))
    assert y.item() == record[0]
    assert np.array_equal(to_uint8(x).numpy().reshape(-1), record[1:])
    before = source.content_hash
    write_cifar(tmp_path, per_file=30)
    assert load_data(DataConfig(name="cifar10", path=str(tmp_path))).content_hash != before


def test_cifar10_refuses_what_is_missing_or_damaged(tmp_path: Path) -> None:
    config = DataConfig(name="cifar10", path=str(tmp_path))
    with pytest.raises(ValueError, match=r"no file .*data_batch_1.bin: .*binary version"):
        load_data(config)
    write_cifar(tmp_path, label=10)
    with pytest.raises(ValueError, match="label 10"):
        load_data(config)
    write_cifar(tmp_path)
    (tmp_path / "test_batch.bin").write_bytes(b"\0" * (RECORD_BYTES - 1))
    with pytest.raises(ValueError, match=r"test_batch.bin has 3072 bytes"):
        load_data(config)
    with pytest.raises(ValueError, match=r"data.path is empty"):
        load_data(DataConfig(name="cifar10"))
    with pytest.raises(ValueError, match=r"data.image_size is 64"):
        load_data(DataConfig(name="cifar10", path=str(tmp_path), image_size=64))


# --- folders of images


def write_folder(root: Path, counts: dict[str, int], part: str = "train", size: tuple[int, int] = (12, 16)) -> None:
    generator = np.random.default_rng(len(part))
    for name, count in counts.items():
        (root / part / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
            suffix = "png" if i else "JPG"
            Image.fromarray(pixels).save(root / part / name / f"{i:03}.{suffix}")


def folder_config(root: Path, image_size: int = 12) -> DataConfig:
    return DataConfig(name="folder", path=str(root), image_size=image_size)


def test_folder_is_decoded_cropped_and_numbered_by_sorted_names(tmp_path: Path) -> None:
    write_folder(tmp_path, {"wolf": 3, "ant": 2})
    write_folder(tmp_path, {"wolf": 2, "ant": 2}, "heldout")
    (tmp_path / "train" / "ant" / "notes.txt").write_text("no image")
    source = load_data(folder_config(tmp_path))
    assert (len(source.train), source.num_classes, source.channels, source.input_size) == (5, 2, 3, 12)
    assert source.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert source.heldout.labels.tolist() == [0, 1, 0, 1]
    x, y = source.train.batch(torch.tensor([1, 3]))
    assert y.tolist() == [0, 1]
    pixels = np.asarray(Image.open(tmp_path / "train" / "ant" / "001.png"))[:, 2:14]  # the centre of 12 x 16
    assert np.array_equal(to_uint8(x)[0].numpy(), pixels.transpose(2, 0, 1))


def test_folder_resizes_the_shorter_side_and_makes_grey_images_rgb(tmp_path: Path) -> None:
    for part in ("train", "heldout"):
        (tmp_path / part / "grey").mkdir(parents=True)
        Image.new("L", (20, 40), 200).save(tmp_path / part / "grey" / "0.png")
    x, _ = load_data(folder_config(tmp_path, 8)).train.batch(torch.tensor([0]))
    assert torch.equal(to_uint8(x), torch.full((1, 3, 8, 8), 200, dtype=torch.uint8))


def test_folder_hash_follows_content_and_size(tmp_path: Path) -> None:
    for part in ("train", "heldout"):
        write_folder(tmp_path, {"a": 2}, part)
    hashes = {load_data(folder_config(tmp_path, size)).content_hash for size in (12, 8, 12)}
    assert len(hashes) == 2
    Image.new("RGB", (16, 12)).save(tmp_path / "heldout" / "a" / "001.png")
    assert load_data(folder_config(tmp_path)).content_hash not in hashes


def test_folder_refuses_what_is_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no folder .*train: .*train/CLASS"):
        load_data(folder_config(tmp_path))
    write_folder(tmp_path, {"a": 1, "b": 1})
    write_folder(tmp_path, {"a": 1}, "heldout")
    with pytest.raises(ValueError, match="same classes in both"):
        load_data(folder_config(tmp_path))
    (tmp_path / "heldout" / "b").mkdir()
    with pytest.raises(ValueError, match="b holds no image"):
        load_data(folder_config(tmp_path))
    path = tmp_path / "heldout" / "b" / "0.png"
    path.write_bytes(b"not an image")
    source = load_data(folder_config(tmp_path))
    with pytest.raises(ValueError, match=r"0.png cannot be decoded"):
        source.heldout.batch(torch.tensor([1]))
    path.write_bytes((tmp_path / "train" / "a" / "000.JPG").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"0.png cannot be decoded .*truncated"):
        source.heldout.batch(torch.tensor([1]))
    Image.fromarray(np.full((12, 12), 60000, dtype=np.uint16)).save(path)
    with pytest.raises(ValueError, match=r"0.png has more than 8 bits"):
        source.heldout.batch(torch.tensor([1]))
    with pytest.raises(ValueError, match=r"data.image_size is 0"):
        load_data(folder_config(tmp_path, 0))


# --- cached latents


def write_latents(root: Path, **changes: np.ndarray) -> None:
    generator = np.random.default_rng(0)
    arrays = {
        "train_latents": generator.normal(size=(9, 4, 6, 6)).astype(np.float16),
        "train_labels": np.arange(9) % 3,
        "heldout_latents": generator.normal(size=(6, 4, 6, 6)).astype(np.float16),
        "heldout_labels": np.array([0, 0, 1, 1, 2, 2], dtype=np.int32),
    }
    for name, array in {**arrays, **changes}.items():
        np.save(root / f"{name}.npy", array)


def test_latents_are_scaled_and_held_out_in_balanced_order(tmp_path: Path) -> None:
    write_latents(tmp_path)
    config = DataConfig(name="latents", path=str(tmp_path))
    plain = load_data(config)
    (tmp_path / "meta.json").write_text(json.dumps({"scaling": 0.5, "source": "a test"}))
    scaled = load_data(config)
    assert (plain.num_classes, plain.channels, plain.input_size, plain.pixels) == (3, 4, 6, False)
    assert plain.heldout.labels.tolist() == [0, 1, 2, 0, 1, 2]
    stored = torch.from_numpy(np.load(tmp_path / "heldout_latents.npy")).float()
    x, y = scaled.heldout.batch(torch.tensor([1, 3]))
    assert x.dtype == torch.float32 and y.tolist() == [1, 0]
    assert torch.equal(x, 0.5 * stored[[2, 1]])
    assert plain.content_hash != scaled.content_hash


def test_flips_are_of_images_that_were_mirrored_before_they_were_encoded(tmp_path: Path) -> None:
    write_latents(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps({"scaling": 0.5}))
    plain, asked = (DataConfig(name="latents", path=str(tmp_path), flip=flip) for flip in (False, True))
    with pytest.raises(ValueError, match=r"^there is no file .*train_mirrored_latents.npy: data.flip=true .* --mirrored[^\n]*$"):
        load_data(asked)
    before = load_data(plain)
    assert before.mirrored is None
    mirrored = np.random.default_rng(1).normal(size=(9, 4, 6, 6)).astype(np.float16)
    np.save(tmp_path / "train_mirrored_latents.npy", mirrored)
    unflipped, flipped = load_data(plain), load_data(asked)
    assert unflipped.mirrored is None and unflipped.content_hash == before.content_hash  # the file is not looked at
    assert flipped.mirrored is not None and flipped.content_hash != before.content_hash
    x, y = flipped.mirrored.batch(torch.tensor([4, 2]))
    assert torch.equal(x, 0.5 * torch.from_numpy(mirrored[[4, 2]]).float()) and y.tolist() == [1, 2]
    assert torch.equal(flipped.train.batch(torch.arange(9))[0], before.train.batch(torch.arange(9))[0])
    np.save(tmp_path / "train_mirrored_latents.npy", mirrored[::-1])
    assert load_data(asked).content_hash != flipped.content_hash
    for wrong in (mirrored[:8], mirrored.astype(np.float32), mirrored[..., :5]):
        np.save(tmp_path / "train_mirrored_latents.npy", wrong)
        with pytest.raises(ValueError, match=r"train_mirrored_latents.npy .* encode both in the same way"):
            load_data(asked)


def test_a_process_hashes_the_same_files_once_and_changed_ones_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("latents", "packed"):
        (tmp_path / name).mkdir()
    write_latents(tmp_path / "latents")
    for part in ("train", "heldout"):
        np.save(tmp_path / "packed" / f"{part}_images.npy", np.zeros((4, 1, 8, 8), np.uint8))
        np.save(tmp_path / "packed" / f"{part}_labels.npy", np.arange(4) % 2)
    hashed: list[int] = []
    for module in (latents, packed):
        monkeypatch.setattr(module, "hash_arrays", lambda arrays: str(hashed.append(1) or hash_arrays(arrays)))
    for times, (name, changed) in enumerate((("latents", "heldout_latents"), ("packed", "train_images"))):
        config = DataConfig(name=name, path=str(tmp_path / name))
        before = {load_data(config).content_hash for _ in range(3)}
        assert len(before) == 1 and len(hashed) == 2 * times + 1
        path = tmp_path / name / f"{changed}.npy"
        array = np.load(path)
        np.save(path, array + 1)  # of the same size
        assert load_data(config).content_hash not in before and len(hashed) == 2 * times + 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": np.arange(8)}, r"train_labels.npy .* train_latents.npy has 9 images"),
        ({"train_labels": np.zeros(9)}, r"train_labels.npy .* float64"),
        ({"heldout_latents": np.zeros((6, 4, 5, 5), np.float32)}, r"\(4, 6, 6\) to train and \(4, 5, 5\) held out"),
        ({"train_latents": np.zeros((9, 4, 6, 5), np.float32)}, r"train_latents.npy .* \(n, C, H, H\)"),
        ({"train_latents": np.zeros((9, 4, 6, 6), np.uint8)}, "float type"),
        ({"heldout_labels": np.full(6, 3)}, r"leave 0\.\.2"),
        ({"heldout_labels": np.full(6, -1)}, r"leave 0\.\.2"),
        ({"train_latents": np.array([None])}, "cannot be read as a NumPy array"),
    ],
)
def test_latents_refuse_what_disagrees(tmp_path: Path, changes: dict[str, np.ndarray], message: str) -> None:
    write_latents(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_data(DataConfig(name="latents", path=str(tmp_path)))


def test_latents_refuse_missing_files_and_bad_meta(tmp_path: Path) -> None:
    config = DataConfig(name="latents", path=str(tmp_path))
    with pytest.raises(ValueError, match=r"no file .*train_latents.npy: data.path must hold"):
        load_data(config)
    write_latents(tmp_path)
    for text, message in (("{", "JSON"), ('{"scale": 2}', "no other keys"), ('{"scaling": 0}', "above 0"), ("[1]", "mapping")):
        (tmp_path / "meta.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_data(config)
