"""How does a data set of pixels become cached latents?

Each latent is one draw from what the autoencoder holds possible for an image, with noise that follows from the image's part
and index alone; it is kept in float16, not scaled, for `bench.data.latents`. A mirrored latent is that of a mirrored image,
which is another one than the image's own latent, mirrored.

Millions of images take hours. Until all are encoded the arrays have other names, and a record beside them says what they are
made of and how far they are: the same command goes on from there, and ends with the same bytes.
"""

import io
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.autoencoder import TOGETHER, Autoencoder, Layout, digest_of
from bench.config import DataConfig
from bench.data import DataSource, ImageSet
from bench.data.packed import make_array
from bench.data.source import open_array
from bench.files import make_folder, read_json, write_bytes_atomically, write_json_atomically
from bench.randomness import generator

PARTS = ("train", "heldout")
MIRRORED = "train_mirrored"
RECORD = ".encoding.json"
READ_TOGETHER = 8 * TOGETHER  # images; a multiple of what the autoencoder takes at once, so that the same bits come out
SAVE_SECONDS = 30.0
SEED = 0

Batch = tuple[str, Tensor]  # one of PARTS, and the indices of images in it


def encode(
    config: DataConfig,
    data: DataSource,
    layout: Layout,
    folder: Path,
    device: torch.device,
    mirrored: bool = False,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the latents of `data`, which `config` names, or go on with those that were begun; `mirrored`: those too.

    `told` is called with the images encoded so far and their number. ValueError in one sentence if data and autoencoder do
    not fit, if the folder holds latents already, or the beginning of others, or if a latent is not finite in float16.
    """
    _check(config, data, layout, folder)
    parts = {"train": data.train, "heldout": data.heldout}
    copies = {
        "train": ["train", MIRRORED] if mirrored else ["train"],
        "heldout": ["heldout"],
    }  # the arrays that a part's images go to
    side = data.input_size // layout.shrinkage
    shapes = {name: (len(parts[part]), layout.latent_channels, side, side) for part in PARTS for name in copies[part]}
    batches = [(part, indices) for part in PARTS for indices in torch.arange(len(parts[part])).split(READ_TOGETHER)]
    autoencoder = Autoencoder(layout, device)  # before anything is written
    made_of = _ingredients(data, layout, device, mirrored)
    num_done = _begin(folder, shapes, made_of)
    if num_done < len(batches):
        arrays = {name: _open(folder, name, shape) for name, shape in shapes.items()}
        record = {"made_of": made_of, "batches_encoded": num_done}
        _encode_all(autoencoder, parts, batches, arrays, folder, record, told)
    images = f"{config.name} {config.path}".rstrip()  # digits have no path
    size = f"{data.input_size}x{data.input_size} pixels"
    source = f"{images}, {size}, by AutoencoderKL {made_of['autoencoder']}"  # which protocols name in the same way
    _finish(folder, list(shapes), parts, {"scaling": layout.scaling, "source": source})


def _check(config: DataConfig, data: DataSource, layout: Layout, folder: Path) -> None:
    if not data.pixels:
        raise ValueError(f"data set {data.name!r} holds latents, which are encoded already: give images")
    if config.flip:
        raise ValueError("data.flip=true is for training, and draws from the mirrored latents: write them with --mirrored")
    if data.channels != layout.image_channels:
        raise ValueError(
            f"the autoencoder in {layout.folder} encodes images of {layout.image_channels} channels, but those of data set "
            f"{data.name!r} have {data.channels}: give one that fits"
        )
    if data.input_size % layout.shrinkage:
        raise ValueError(
            f"images of data set {data.name!r} are {data.input_size} pixels wide, but the autoencoder in {layout.folder} "
            f"makes one of {layout.shrinkage}: give data.image_size a multiple of {layout.shrinkage}"
        )
    if config.path and folder.resolve().is_relative_to(Path(config.path).resolve()):
        raise ValueError(f"--out {folder} lies in data.path {config.path}: choose a folder beside it")


def _ingredients(data: DataSource, layout: Layout, device: torch.device, mirrored: bool) -> dict[str, Any]:
    """All that decides about the bytes. Of images in files, which may be millions, only paths, sizes and times of change."""
    return {
        "autoencoder": digest_of(layout),
        "data": data.stamp().key if data.stamp else data.content_hash,
        "mirrored": mirrored,
        "device": device.type,
        "read_together": READ_TOGETHER,  # what the batches that are counted have
        **{library: metadata.version(library) for library in ("torch", "diffusers")},
    }


def _begin(folder: Path, shapes: Mapping[str, tuple[int, ...]], made_of: dict[str, Any]) -> int:
    """How many batches are encoded already; if there is no record of any, the arrays are made."""
    begun = read_json(folder / RECORD, dict)
    latents = [f"{name}_latents.npy" for name in (*PARTS, MIRRORED)]
    names = [*latents, *(f"{part}_labels.npy" for part in PARTS), "meta.json"]
    if begun:  # the others are its own, and so are these if they do not wait for their name any more
        names = latents[:1] if _partial(folder, "train").exists() else []
    there = [name for name in names if (folder / name).exists()]
    if there:
        raise ValueError(f"{folder / there[0]} exists already: choose another folder, or delete it")
    if begun:
        differing = [key for key, value in made_of.items() if begun.get("made_of", {}).get(key) != value]
        if differing:
            raise ValueError(
                f"the latents that were begun in {folder} are made of something else ({', '.join(differing)}): give the same as "
                "then, choose another folder, or delete it"
            )
        return int(begun["batches_encoded"])
    make_folder(folder)
    try:
        for name, shape in shapes.items():
            make_array(_partial(folder, name), shape, np.float16)
    except OSError:  # no room on the disk
        for name in shapes:
            _partial(folder, name).unlink(missing_ok=True)
        raise
    write_json_atomically(folder / RECORD, {"made_of": made_of, "batches_encoded": 0})
    return 0


def _partial(folder: Path, name: str) -> Path:
    return folder / f".{name}_latents.npy.partial"


def _open(folder: Path, name: str, shape: tuple[int, ...]) -> np.memmap:
    """To be written to, where it was begun."""
    path, remedy = _partial(folder, name), f"delete {folder}, and encode from the beginning"
    if open_array(path, remedy, remedy).shape != shape:
        raise ValueError(f"{path} has another shape than the {shape} that was begun: {remedy}")
    array: np.memmap = np.lib.format.open_memmap(path, mode="r+")
    return array


def _encode_all(
    autoencoder: Autoencoder,
    parts: dict[str, ImageSet],
    batches: list[Batch],
    arrays: dict[str, np.memmap],
    folder: Path,
    record: dict[str, Any],
    told: Callable[[int, int], None],
) -> None:
    """All batches that the record does not count. It is brought up to date once their latents are on the disk."""

    def save() -> None:
        for array in arrays.values():
            array.flush()
        write_json_atomically(folder / RECORD, record)

    first, saved = record["batches_encoded"], time.monotonic()
    num_images, total = (sum(len(indices) for _, indices in some) for some in (batches[:first], batches))
    try:
        for part, indices, x in _read_ahead(parts, batches[first:]):
            arrays[part][indices.numpy()] = _latents(autoencoder, x, part, indices)
            if part == "train" and MIRRORED in arrays:
                arrays[MIRRORED][indices.numpy()] = _latents(autoencoder, x.flip(-1), MIRRORED, indices)
            record["batches_encoded"] += 1
            num_images += len(indices)
            told(num_images, total)
            if time.monotonic() - saved >= SAVE_SECONDS:
                save()
                saved = time.monotonic()
    finally:
        save()


def _read_ahead(parts: dict[str, ImageSet], batches: list[Batch]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Batches with their images: the next is read by a thread of its own while one is encoded."""

    def read(batch: Batch) -> tuple[str, Tensor, Tensor]:
        part, indices = batch
        return part, indices, parts[part].batch(indices)[0]

    with ThreadPoolExecutor(max_workers=1) as reader:
        readings = (reader.submit(read, batch) for batch in batches)
        reading = next(readings, None)
        while reading is not None:
            following = next(readings, None)
            yield reading.result()
            reading = following


def _latents(autoencoder: Autoencoder, x: Tensor, name: str, indices: Tensor) -> np.ndarray:
    """(B, C, H, W) in [-1, 1] -> (B, c, h, w) float16; `name` is that of their array."""
    layout = autoencoder.layout
    shape = layout.latent_channels, x.shape[2] // layout.shrinkage, x.shape[3] // layout.shrinkage
    noise = [torch.randn(shape, generator=generator(SEED, "posterior", name, index)) for index in indices.tolist()]
    latents = autoencoder.encode(x, torch.stack(noise)).half().cpu()
    bad = indices[~latents.isfinite().flatten(1).all(dim=1)]
    if len(bad):
        raise ValueError(
            f"{name}: the latents of {len(bad)} of {len(indices)} images, the first of them number {int(bad[0])}, are not finite "
            f"numbers in float16: the weights in {layout.folder} are damaged, or not for such images"
        )
    array: np.ndarray = latents.numpy()
    return array


def _finish(folder: Path, names: list[str], parts: dict[str, ImageSet], meta: dict[str, Any]) -> None:
    """Latents get their names when all else is there, those that are trained on last."""
    for part, images in parts.items():
        content = io.BytesIO()
        np.save(content, images.labels.numpy())
        write_bytes_atomically(folder / f"{part}_labels.npy", content.getvalue())
    write_json_atomically(folder / "meta.json", meta)
    for name in reversed(names):
        if _partial(folder, name).exists():  # or it has its name already: from here too, the command goes on
            os.replace(_partial(folder, name), folder / f"{name}_latents.npy")
    (folder / RECORD).unlink()
