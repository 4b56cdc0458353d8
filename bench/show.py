"""How do the runs of a folder become results.csv, tables and figures beside them, and do these still follow from them?"""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from bench import keep, plots, runs, tables, tidy
from bench.files import json_text
from bench.keep import RealImages

FIGURES = "figures"


class Checked(NamedTuple):
    """`faults`: a line for each file that does not follow; `unchecked`: what could not be looked at, and why."""

    faults: list[str]
    unchecked: list[str]


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
    images, names = real_images(folder, found)
    return plots.make_figures(found, suite, folder / FIGURES, floor=floor, real_images=images, class_names=names)


def keep_runs(folder: Path, found: Sequence[runs.Run]) -> list[Path]:
    """What of these runs is committed beside their results, so that all is made again from it; the files written."""
    return keep.keep(found, folder, real_images(folder, found))


def check(
    folder: Path,
    suite: Mapping[str, Any],
    protocol_hash: str = "",
    allow: Collection[str] = (),
    pictures: bool = False,
) -> Checked:
    """Whether runs are as they were kept, results follow from them, tables from the results, and figures' data and captions
    from the runs; with `pictures`, PNG and PDF files too, byte for byte.
    """
    faults = keep.changes(folder)
    found = runs.find_runs(folder, protocol_hash)
    if faults or not found:
        why = "not all runs are as they were kept" if faults else f"no runs are kept in {folder / keep.RUNS}"
        left_out = [f"not checked, as {why}: whether {tidy.RESULTS} and {FIGURES} follow from the runs"]
        return Checked(faults + tables.check(folder, suite, protocol_hash, allow), left_out)
    from_runs = results_of_runs(folder, found)
    figures = partial(figure_files, found=found, suite=suite, pictures=pictures) if (folder / FIGURES).is_dir() else None
    unchecked = [f"not checked, as there is no {folder / FIGURES}: figures"] * (figures is None)
    unchecked += ["not checked without --pictures: PNG and PDF files"] * (figures is not None and not pictures)
    faults += tables.check(folder, suite, protocol_hash, allow, figures, from_runs)
    return Checked(faults + _strange_figures(folder), unchecked)


def figure_files(folder: Path, found: Sequence[runs.Run], suite: Mapping[str, Any], pictures: bool) -> dict[str, bytes]:
    """Path within `folder` -> content of the figures' data and captions and, of `pictures`, of those that are there."""
    images, names = real_images(folder, found)
    floor = floor_of(folder, found)
    options = {"floor": floor, "real_images": images, "class_names": names, "report": lambda _: None}
    made = plots.figures_of(found, suite, **options, only_data=not pictures)  # type: ignore[arg-type]
    files = {f"{FIGURES}/{name}": content for name, content in made.files.items()}
    kept = {name: content for name, content in files.items() if name.endswith(".csv") or (folder / name).is_file()}
    return kept | {f"{FIGURES}/{plots.CAPTIONS}": json_text(made.captions).encode()}


def _strange_figures(folder: Path) -> list[str]:
    """Files among the figures that `captions.json` does not know: what was drawn of other runs, say."""
    known = {folder / FIGURES / f"{name}.{ending}" for name in plots.captions_of(folder / FIGURES) for ending in plots.ENDINGS}
    there = [path for path in sorted((folder / FIGURES).rglob("*")) if path.suffix[1:] in plots.ENDINGS]
    return [f"{path} is no figure of these runs" for path in there if path not in known]


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


def real_images(folder: Path, found: Sequence[runs.Run]) -> RealImages:
    """Held-out images and the numbers of their classes: what was kept beside these runs, else from the data."""
    own = found[0].path.parent == folder / keep.RUNS
    return (keep.read_real_images(folder) if own else None) or _from_data(found[0].config)


def _from_data(config: Mapping[str, Any]) -> RealImages:
    import torch

    from bench.config import DataConfig, EvaluationConfig
    from bench.data import load_data, read_uint8
    from bench.pixels import pixels_of

    data = load_data(DataConfig(**config["data"]))
    class_names = [str(number) for number in range(data.num_classes)]
    pixels = pixels_of(EvaluationConfig(**config["evaluation"]), data)
    if pixels is None or not len(pixels.heldout):
        return RealImages(None, class_names)
    shown = read_uint8(pixels.heldout, torch.arange(min(len(pixels.heldout), 100)))
    return RealImages(shown.permute(0, 2, 3, 1).numpy(), class_names)
