"""How fast is a part alone, beside the same in plain code?

A part is made from a size ("S/2"), a batch size and a device, and gives two calls that compute the same: ours and the
plain one. Those of the methods are handed in; the loader is here.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.config import DataConfig
from bench.data import load_data
from bench.throughput.clock import speed_ratio, spread_of, synchroniser, time_in_turns, why_out_of_memory
from bench.throughput.contest import CHANNELS, INPUT_SIZE, PLAIN, Setup
from bench.throughput.measure import Row, spread_columns

Call = Callable[[], object]
Part = Callable[[str, int, torch.device], tuple[Call, Call]]

NUM_FILES = 2048  # latents of the loader: 32 MB in float32
LOADER = "loader"


def loader(folder: Path) -> Part:
    """A batch of latents gathered from one memory-mapped file, or from as many files of one image each."""

    def make(size: str, batch_size: int, device: torch.device) -> tuple[Call, Call]:
        latents, paths = write_latents(folder, NUM_FILES)
        images = load_data(DataConfig(name="latents", path=str(folder))).train
        source = torch.Generator().manual_seed(0)

        def indices() -> Tensor:
            return torch.randint(len(latents), (batch_size,), generator=source)

        return lambda: images.batch(indices())[0], lambda: batch_of_files(paths, indices())

    return make


def write_latents(folder: Path, count: int) -> tuple[np.ndarray, list[Path]]:
    """The same images in the form of `bench.data.latents`, and one by one."""
    latents = np.random.default_rng(0).standard_normal((count, CHANNELS, INPUT_SIZE, INPUT_SIZE), dtype=np.float32)
    labels = np.arange(count) % 10
    for part in ("train", "heldout"):
        np.save(folder / f"{part}_latents.npy", latents)
        np.save(folder / f"{part}_labels.npy", labels)
    paths = [folder / f"{index:06d}.npy" for index in range(count)]
    for path, image in zip(paths, latents, strict=True):
        np.save(path, image)
    return latents, paths


def batch_of_files(paths: Sequence[Path], indices: Tensor) -> Tensor:
    return torch.stack([torch.from_numpy(np.load(paths[index])) for index in indices.tolist()])


def measure_parts(
    parts: Mapping[str, Part],
    sizes: Sequence[str],
    batches: Sequence[int],
    precisions: Sequence[str],
    setup: Setup,
    repeats: int,
    least_seconds: float,
    watch: Callable[[str], None] = lambda what: None,
) -> list[Row]:
    """Two rows of each part: ours, with how many times as fast it is as the plain one, and the plain one."""
    rows = []
    torch.set_num_threads(setup.threads)
    with tempfile.TemporaryDirectory() as folder:
        known = {**parts, LOADER: loader(Path(folder))}
        for (name, make), size, batch_size, precision in product(known.items(), sizes, batches, precisions):
            if name == LOADER and (size, precision) != (sizes[0], precisions[0]):
                continue  # it depends on neither
            watch(f"timing {name}, {size}, batch {batch_size}, {precision}")
            rows += _measure(name, make, size, batch_size, precision, setup, repeats, least_seconds)
    return rows


def _measure(
    name: str, make: Part, size: str, batch_size: int, precision: str, setup: Setup, repeats: int, least_seconds: float
) -> list[Row]:
    device, note = torch.device(setup.device), ""
    seconds: dict[str, list[float]] = {}
    try:
        calls = dict(zip(("ours", PLAIN), make(size, batch_size, device), strict=True))
        runs = {code: _under(call, device, precision) for code, call in calls.items()}
        for run in runs.values():
            run()
        seconds, failed = time_in_turns(runs, repeats, synchroniser(device), least_seconds)
        note = "; ".join(failed.values())
    except (MemoryError, RuntimeError) as error:
        note = why_out_of_memory(error)
    rows = []
    for code in ("ours", PLAIN):
        own = seconds.get(code)
        facts = {"what": name, "method": "", "code": code, "size": size, "batch_size": batch_size, "precision": precision}
        row: Row = {**facts, "compile": "none", "beside": "", "rounds": len(own or ()), "note": note}
        row |= spread_columns("step_seconds", spread_of(own) if own else None)
        both = code == "ours" and len(seconds) == 2
        row |= spread_columns(f"speed_over_{PLAIN}", speed_ratio(seconds["ours"], seconds[PLAIN]) if both else None)
        rows.append(row)
    return rows


def _under(call: Call, device: torch.device, precision: str) -> Call:
    """The call under the precision that training would give it."""

    def run() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            call()

    return run
