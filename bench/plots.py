"""Which figures are there, and how are they all made from a folder of runs?"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.figures import load, losses, masks, mixing, pictures, quality, routing, throughput, timesteps
from bench.figures.style import Drawn, Material, data_file, dress, render, settings
from bench.files import make_folder, read_json, write_bytes_atomically, write_json_atomically
from bench.runs import Run

FIGURES: dict[str, Callable[[Material], list[Drawn]]] = {
    **{name: quality.fid_vs(name) for name in quality.COSTS},
    "throughput": throughput.throughput,
    "samples": pictures.samples,
    "trajectories": pictures.trajectories,
    "training_loss": losses.training_loss,
    "heldout_loss": losses.heldout_loss,
    "loss_per_timestep": timesteps.loss_per_timestep,
    "per_expert_loss": timesteps.per_expert_loss,
    "mixing_coefficients": mixing.mixing_coefficients,
    "mixing_over_training": mixing.mixing_over_training,
    "expert_load": load.expert_load,
    "routing": routing.routing,
    "routing_by_position": routing.routing_by_position,
    "routing_by_class": routing.routing_by_class,
    "channel_masks": masks.channel_masks,
}
CAPTIONS = "captions.json"  # figure -> caption, in the order in which they are best read; also which files are ours
OWN_NAME = re.compile(r"([\w.-]+/)?\w[\w.-]*")  # of a figure: within the folder, or in that of a group
ENDINGS = ("png", "pdf", "csv")


class Figures(NamedTuple):
    """`files`: path within the folder of figures -> content; `captions`: name of a figure -> what to see in it."""

    files: dict[str, bytes]
    captions: dict[str, str]


def figures_of(
    runs: Iterable[Run],
    suite: Mapping[str, Any],
    *,
    floor: Mapping[str, Any] | None = None,
    real_images: np.ndarray | None = None,
    class_names: Sequence[str] = (),
    report: Callable[[str], None] = print,
    only_data: bool = False,
    pdf: bool = True,
) -> Figures:
    """Every figure for which there is data, as PNG, PDF and, except for pictures, the CSV of what it shows.

    `suite` as in `bench/suites`: its methods' labels give the order, its colours the look, its `baseline` (or else its first
    entry) what losses are compared with. In a suite of groups, each has its figures in a folder of its name, with the runs that
    have the label of one of its entries. `floor`: the content of `floor.json`. `real_images` (n, H, W, C) uint8, image i of
    class i mod num_classes, become the last row of the samples, whose columns are headed by `class_names`. A figure that has no
    data is named to `report`. `only_data`: the CSVs alone; not `pdf`: no PDFs. The same runs give the same bytes.
    """
    shown = dress(runs, suite)
    made = Figures({}, {})
    for folder, labels, baseline in _groups(suite):
        own = tuple(each for each in shown if not folder or each.run.label in labels)
        if folder and not own:
            report(f"group {folder} has no figures, as none of it is run")
            continue
        material = Material(own, floor, real_images, class_names, _first_of(baseline, own))
        for name, draw in FIGURES.items():
            with settings():
                drawn = draw(material)
                for each in drawn:
                    files = data_file(each) if only_data else render(each, pdf)
                    made.files.update({f"{folder}{file}": content for file, content in files.items()})
                    made.captions[f"{folder}{each.name}"] = each.caption
            if not drawn:
                report(f"figure {folder}{name} is not made, as no run has data for it")
    return made


def make_figures(
    runs: Iterable[Run],
    suite: Mapping[str, Any],
    out_dir: Path,
    *,
    floor: Mapping[str, Any] | None = None,
    real_images: np.ndarray | None = None,
    class_names: Sequence[str] = (),
    report: Callable[[str], None] = print,
) -> list[Path]:
    """The files of `figures_of` in `out_dir`, and `captions.json`. What is left of figures that are no longer made is removed."""
    old = [out_dir / f"{name}.{ending}" for name in captions_of(out_dir) for ending in ENDINGS]  # may refuse: before all is drawn
    made = figures_of(runs, suite, floor=floor, real_images=real_images, class_names=class_names, report=report)
    make_folder(out_dir)
    paths = [out_dir / file for file in made.files]
    write_json_atomically(out_dir / CAPTIONS, {**captions_of(out_dir), **made.captions})  # so that nothing is ever left unknown
    for path, content in zip(paths, made.files.values(), strict=True):
        make_folder(path.parent)
        write_bytes_atomically(path, content)
    for path in set(old) - set(paths):
        path.unlink(missing_ok=True)
    write_json_atomically(out_dir / CAPTIONS, made.captions)
    return [*paths, out_dir / CAPTIONS] if paths else []


def captions_of(folder: Path) -> dict[str, str]:
    """Name of a figure (GROUP/NAME in a suite of groups) -> its caption, of the figures that were made in a folder."""
    captions = read_json(folder / CAPTIONS, dict)
    for name in captions:
        if not OWN_NAME.fullmatch(name) or ".." in name:
            raise ValueError(
                f"{folder / CAPTIONS} names a figure {name!r}, which is none of ours: delete it and make the figures again"
            )
    return {str(name): str(caption) for name, caption in captions.items()}


def _groups(suite: Mapping[str, Any]) -> list[tuple[str, set[str], list[str]]]:
    """Of each group its folder ("NAME/"; "" if there are no groups), its labels, and what may be its baseline, the best first."""
    entries = suite.get("methods", [])
    names = list(dict.fromkeys(str(entry.get("group") or "") for entry in entries)) or [""]
    groups = []
    for name in names:
        own = [entry for entry in entries if str(entry.get("group") or "") == name]
        labels = [str(entry.get("label") or entry["method"]) for entry in own]
        settings_of = {**suite, **((suite.get("groups") or {}).get(name) or {})}
        groups.append((f"{name}/" if name else "", set(labels), [str(settings_of.get("baseline") or ""), *labels[:1]]))
    return groups


def _first_of(labels: Sequence[str], shown: Sequence[Any]) -> str:
    there = {each.label for each in shown}
    return next((label for label in labels if label in there), "")
