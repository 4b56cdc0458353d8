"""What goes into a report: results, tables, figures and, where they are kept, the runs themselves?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench import plots, show
from bench.runs import Run
from bench.tables import Table, TableRefusal
from bench.tidy import Results


class Figure(NamedTuple):
    name: str  # GROUP/NAME in a suite of groups
    caption: str
    png: bytes


class Figures(NamedTuple):
    """`remark`: why there are none, or what to know of them; empty if there is nothing to say."""

    shown: tuple[Figure, ...]
    remark: str = ""


@dataclass(frozen=True)
class Material:
    """All that a report is made of. The same material gives the same bytes."""

    target: str  # as given to the command: a suite, or a folder
    is_suite: bool
    settings: tuple[str, ...]  # that were given with it, as key=value
    options: tuple[str, ...]  # that were given with it, as words
    suite: Mapping[str, Any]
    results: Results
    tables: Sequence[Table]
    runs: Mapping[str, Run]  # by id, those whose folders are there
    figures: Figures
    docstrings: Mapping[str, str]  # of the methods' files, by the name of the method


def draw_figures(folder: Path, found: Sequence[Run], suite: Mapping[str, Any]) -> Figures:
    """Drawn anew from these runs, so that they show what the tables tell; `folder`: where their floor and real images are."""
    images, names = show.real_images(folder, found)
    floor = show.floor_of(folder, found)
    try:
        made = plots.figures_of(
            found, suite, floor=floor, real_images=images, class_names=names, report=lambda _: None, pdf=False
        )
    except TableRefusal as error:  # the tables were made all the same, as it was allowed for them
        return Figures((), f"No figures: {error}.")
    return Figures(tuple(Figure(name, caption, made.files[f"{name}.png"]) for name, caption in made.captions.items()))


def figures_in(folder: Path) -> Figures:
    """Those that were made before, as the runs are not kept."""
    captions = plots.captions_of(folder)
    paths = {name: folder / f"{name}.png" for name in captions}
    shown = tuple(Figure(name, captions[name], path.read_bytes()) for name, path in paths.items() if path.is_file())
    if shown:
        return Figures(shown)
    return Figures((), "No figures: neither runs nor figures are beside these results. `tsbench plots` draws them from runs.")
