"""Is a data set hashed again whenever it may be another one, and read no more often than that by all processes together?"""

import dataclasses
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from command import TINY
from test_ranks import on_ranks
from training import PROCESSES, exit_codes_of

from bench import job, trained
from bench.config import DataConfig
from bench.data import DataSource, digest, load_data, packed
from bench.data.digest import RACY_SECONDS, Stamp
from bench.distributed import World
from bench.files import read_json, write_json_atomically
from bench.protocol import hashed_by_rank_0

KNOWN_HASHES = ["28b782561ab30c4b", "d664139323ddf4c3", "862f98449ec4c90a"]  # of packed, latents, folder
PACKED = ("train_images", "train_labels", "heldout_images", "heldout_labels")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that packed images are read as a whole."""
    return count_reads(monkeypatch)


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Also, what a test writes is large, and was written long ago."""
    monkeypatch.setattr(digest, "KEPT_FROM_BYTES", 0)
    monkeypatch.setattr(digest.time, "time", lambda now=time.time: now() + RACY_SECONDS + 5)
    found: list[int] = []
    plain = packed.hash_arrays
    monkeypatch.setattr(packed, "hash_arrays", lambda arrays: str(found.append(1) or plain(arrays)))
    return found


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_packed(tmp_path / "images")


def write_packed(root: Path) -> Path:
    root.mkdir()
    for part in ("train", "heldout"):
        np.save(root / f"{part}_images.npy", np.arange(4 * 64, dtype=np.uint8).reshape(4, 1, 8, 8))
        np.save(root / f"{part}_labels.npy", np.arange(4) % 2)
    return root


def hash_of(root: Path, digests: Path | None) -> str:
    """As another process would find it."""
    digest._HASHES.clear()
    data = load_data(DataConfig(name="packed", path=str(root)))
    return dataclasses.replace(data, digests=digests).content_hash


def hash_apart(root: Path, out: Path, name: str) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        found = count_reads(monkeypatch)
        write_json_atomically(out / name, {"hash": hash_of(root, out / "digests"), "reads": len(found)})


def test_a_second_process_reads_no_image(images: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        process = PROCESSES.Process(target=hash_apart, args=(images, tmp_path, name))
        process.start()
        assert exit_codes_of([process]) == [0]
    first, second = (read_json(tmp_path / name, dict) for name in ("first", "second"))
    assert first["hash"] == second["hash"] == hash_of(images, None)
    assert (first["reads"], second["reads"]) == (1, 0)
    assert len(list((tmp_path / "digests").iterdir())) == 1


def test_what_may_have_changed_is_read_again(images: Path, tmp_path: Path, reads: list[int]) -> None:
    hashes = {hash_of(images, tmp_path / "digests")}
    path, changes = images / "train_images.npy", 0
    there = path.stat()
    for way in ("in its place", "by another file", "with its old time"):
        array = np.load(path)
        if way == "by another file":
            np.save(tmp_path / "other.npy", array + 1)
            (tmp_path / "other.npy").replace(path)
        else:
            np.save(path, array + 1)
        if way == "with its old time":
            os.utime(path, ns=(there.st_atime_ns, there.st_mtime_ns))
        changes += 1
        hashes.add(hash_of(images, tmp_path / "digests"))
        assert len(reads) == len(hashes) == changes + 1, way
    moved = images.rename(tmp_path / "elsewhere")
    assert hash_of(moved, tmp_path / "digests") in hashes and len(reads) == changes + 2


@pytest.mark.parametrize("seconds_ago", [-100.0, 0.0, RACY_SECONDS - 5])
def test_nothing_is_kept_of_what_could_change_again_without_another_time(
    seconds_ago: float, images: Path, tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = max((images / f"{name}.npy").stat().st_ctime for name in PACKED)
    monkeypatch.setattr(digest.time, "time", lambda: newest + seconds_ago)
    assert hash_of(images, tmp_path / "digests") == hash_of(images, tmp_path / "digests")
    assert len(reads) == 2 and not (tmp_path / "digests").exists()
    monkeypatch.setattr(digest.time, "time", lambda: newest + RACY_SECONDS + 1)
    assert hash_of(images, tmp_path / "digests") == hash_of(images, tmp_path / "digests")
    assert len(reads) == 3


def test_a_small_data_set_leaves_no_file(images: Path, tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    num_bytes = sum((images / f"{name}.npy").stat().st_size for name in PACKED)
    monkeypatch.setattr(digest, "KEPT_FROM_BYTES", num_bytes + 1)
    hash_of(images, tmp_path / "digests")
    assert not (tmp_path / "digests").exists()
    monkeypatch.setattr(digest, "KEPT_FROM_BYTES", num_bytes)
    hash_of(images, tmp_path / "digests")
    assert len(list((tmp_path / "digests").iterdir())) == 1


@pytest.mark.parametrize("damage", ["cut short", "another hash", "of other files", "a list"])
def test_a_damaged_file_is_made_anew(damage: str, images: Path, tmp_path: Path, reads: list[int]) -> None:
    known = hash_of(images, tmp_path / "digests")
    (path,) = (tmp_path / "digests").iterdir()
    sound, found = path.read_text(), json.loads(path.read_text())
    other = {"another hash": {"sha256": "0" * 64}, "of other files": {"stamp": "0" * 64}}.get(damage, {})
    path.write_text({"cut short": sound[:40], "a list": "[]"}.get(damage, json.dumps(found | other)))
    with pytest.warns(UserWarning, match=r"^\S*data-\w+\.json is damaged: the data set is read and hashed again$"):
        assert hash_of(images, tmp_path / "digests") == known
    assert len(reads) == 2 and path.read_text() == sound
    assert hash_of(images, tmp_path / "digests") == known and len(reads) == 2


def hash_on_ranks(world: World, out: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        found, hashes = count_reads(monkeypatch), set()
        for _ in range(2):
            digest._HASHES.clear()
            data = load_data(DataConfig(name="packed", path=str(out / "images")))
            hashes.add(hashed_by_rank_0(data, world, out / "digests").content_hash)
        assert len(hashes) == 1 and len(found) == (1 if world.is_main else 0)


def test_of_several_ranks_the_first_reads_and_keeps(images: Path, tmp_path: Path) -> None:
    on_ranks(2, hash_on_ranks, tmp_path)
    assert len(list((tmp_path / "digests").iterdir())) == 1


def test_runs_find_the_hash_beside_them_and_have_the_protocol_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a run is to be trained, to be looked at before a sweep, or to be scored again."""
    reads: list[int] = []

    def large(config: DataConfig) -> DataSource:
        digest._HASHES.clear()
        data = load_data(config)
        stamped = Stamp("k" * 64, digest.KEPT_FROM_BYTES, True)
        return dataclasses.replace(data, fingerprint=lambda: str(reads.append(1) or data.content_hash), stamp=lambda: stamped)

    config, other = job.make_config({}, TINY), job.make_config({"seed": 1}, TINY)
    job.run(config, tmp_path / "plain" / config.run_id)
    monkeypatch.setattr(job, "load_data", large)
    monkeypatch.setattr(trained, "load_data", large)
    folder = tmp_path / "runs" / config.run_id
    job.run(config, folder)
    assert len(reads) == 1 and [path.name for path in (tmp_path / "runs" / "references").iterdir()] == [f"data-{'k' * 20}.json"]
    assert job.is_scored(config, folder)
    job.run(other, tmp_path / "runs" / other.run_id)
    trained.evaluate_again(folder, ["evaluation.steps=3"])
    assert len(reads) == 1
    plain, first, again = (
        record["protocol_hash"]
        for place in (tmp_path / "plain" / config.run_id, folder)
        for record in read_json(place / "eval.json", list)
    )
    assert plain == first != again


def test_a_data_set_has_the_hash_that_kept_digests_were_made_with(tmp_path: Path) -> None:
    """If one of these changes, a new `bench.data.digest.VERSION` keeps runs from believing what was kept before."""
    write_packed(tmp_path / "packed")
    (tmp_path / "latents").mkdir()
    for part in ("train", "heldout"):
        np.save(tmp_path / "latents" / f"{part}_latents.npy", np.arange(2 * 16, dtype=np.float16).reshape(2, 1, 4, 4))
        np.save(tmp_path / "latents" / f"{part}_labels.npy", np.arange(2))
        (tmp_path / "folder" / part / "ant").mkdir(parents=True)
        (tmp_path / "folder" / part / "ant" / "0.png").write_bytes(b"never decoded")
    found = [
        load_data(DataConfig(name=name, path=str(tmp_path / name), image_size=size)).content_hash[:16]
        for name, size in (("packed", 8), ("latents", 4), ("folder", 12))
    ]
    assert found == KNOWN_HASHES and digest.VERSION == 1
