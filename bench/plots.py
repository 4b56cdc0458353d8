"""Which figures are there, and how are they all made from a folder of runs?"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.figures import inside, losses, outcome
from bench.figures.style import Drawn, Material, dress, save, settings
from bench.runs import Run

FIGURES: dict[str, Callable[[Material], list[Drawn]]] = {
    "training_loss": losses.training_loss,
    "heldout_loss": losses.heldout_loss,
    "loss_per_timestep": losses.loss_per_timestep,
    "per_expert_loss": losses.per_expert_loss,
    "mixing_coefficients": inside.mixing_coefficients,
    "routing": inside.routing,
    "channel_masks": inside.channel_masks,
    "fid_vs_flops": outcome.fid_vs_flops,
    "samples": outcome.samples,
}


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
    """Every figure for which there is data, as PNG, PDF and, except for the samples, the CSV of what it shows.

    `suite` as in `bench/suites`: its methods' labels give the order, its colours the look. `floor`: the content of `floor.json`.
    `real_images` (n, H, W, C) uint8, image i of class i mod num_classes, become the last row of the samples, whose columns are
    headed by `class_names`. A figure that has no data is named to `report`. The same runs give the same bytes.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    material = Material(dress(runs, suite), floor, real_images, class_names)
    paths: list[Path] = []
    for name, draw in FIGURES.items():
        with settings():
            drawn = draw(material)
            for each in drawn:
                paths += save(each, out_dir)
        if not drawn:
            report(f"figure {name} is not made, as no run has data for it")
    return paths
