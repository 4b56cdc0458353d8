"""How do the runs of a folder become results.csv, tables and figures beside them?"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bench import plots, runs, tables, tidy


def results_of(folder: Path, protocol_hash: str = "") -> tidy.Results:
    """The results of a folder: from its runs or, where they are not kept, from its `results.csv`."""
    if (folder / tidy.RESULTS).is_file() and not runs.find_runs(folder, protocol_hash):
        return tidy.read(folder)
    return results_of_runs(folder, find(folder, protocol_hash))


def results_of_runs(folder: Path, found: Sequence[runs.Run]) -> tidy.Results:
    """The results of these runs, with the folder's floor."""
    return tidy.gather(found, floor_of(folder, found))


def write_tables(
    folder: Path,
    results: tidy.Results,
    suite: Mapping[str, Any],
    console: Console,
    protocol_hash: str = "",
    allow: Collection[str] = (),
) -> list[Path]:
    """The results and the tables of them, which are printed too; the files written."""
    made = tables.comparisons(results.frame, suite, protocol_hash, allow)
    paths = tables.write_tables(made, results, folder)
    for table in made:
        console.print(tables.to_rich(table))
    return paths


def write_figures(folder: Path, found: Sequence[runs.Run], suite: dict[str, Any]) -> list[Path]:
    """Everything in `figures/`, from the runs; the files written. All is read before anything is written."""
    floor = floor_of(folder, found)
    for run in found:
        runs.read_all(run)
    tables.shared_protocol(tidy.tidy([run for run in found if run.evaluations], floor))
    images, class_names = real_images(found[0].config)
    return plots.make_figures(found, suite, folder / "figures", floor=floor, real_images=images, class_names=class_names)


def find(folder: Path, protocol_hash: str = "") -> list[runs.Run]:
    """The runs of a folder; ValueError if there is none."""
    found = runs.find_runs(folder, protocol_hash)
    if not found:
        raise ValueError(f"{folder} holds no runs: give a folder in which `tsbench train` or `tsbench demo` has left some")
    return found


def floor_of(folder: Path, found: Sequence[runs.Run]) -> dict[str, Any] | None:
    """The floor beside the runs; None if it was measured by another protocol than the one that was asked for."""
    floor = runs.read_floor(folder / "floor.json")
    return floor if floor and floor["protocol_hash"].startswith(found[0].protocol_hash) else None


def real_images(config: dict[str, Any]) -> tuple[np.ndarray | None, list[str]]:
    """Held-out images (n, H, W, C) uint8, image i of class i mod the number of classes, None for data that are not
    pixels; and the numbers of the classes.
    """
    import torch

    from bench.config import DataConfig
    from bench.data import load_data, to_uint8

    data = load_data(DataConfig(**config["data"]))
    class_names = [str(number) for number in range(data.num_classes)]
    if not data.pixels:
        return None, class_names
    x, _ = data.heldout.batch(torch.arange(min(len(data.heldout), 100)))
    return to_uint8(x).permute(0, 2, 3, 1).numpy(), class_names
