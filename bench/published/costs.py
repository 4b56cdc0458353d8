"""What do our networks cost, for the rows whose paper states a configuration? Parameters and multiply-accumulates.

`results/published/computed_costs.csv` keeps the answers, so that tables are printed without torch; nothing is trained for
them, and the meta device holds the networks. `write_costs` computes all of them again.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from bench.config import RunConfig, content_hash
from bench.files import write_text_atomically
from bench.published.facts import FOLDER
from bench.suite import SuiteRun

if TYPE_CHECKING:
    from bench.method import Method

FILE = FOLDER / "computed_costs.csv"
COLUMNS = (
    "suite",
    "label",
    "stored_parameters",
    "active_parameters",
    "position_values",  # of the fixed table, which is no parameter of ours
    "forward_macs_per_image",
)
NUM_CLASSES, CHANNELS = 1000, 4  # of ImageNet, and of the latents of Stable Diffusion's autoencoder


class Latents(NamedTuple):
    """Stands for the data of a configuration, of which a network needs the dimensions only."""

    input_size: int
    channels: int = CHANNELS
    num_classes: int = NUM_CLASSES


Build = Callable[[RunConfig, Any], "Method"]  # as bench.job.build_method


def read_costs() -> dict[tuple[str, str], dict[str, int]]:
    """(suite, label) -> the other columns; ValueError in one sentence if the file is missing or damaged."""
    try:
        frame = pd.read_csv(FILE)
        if list(frame.columns) != list(COLUMNS):
            raise ValueError("its columns are others")
        return {(str(row.pop("suite")), str(row.pop("label"))): row for row in frame.to_dict("records")}  # type: ignore[misc]
    except (OSError, ValueError) as error:
        raise ValueError(f"{FILE} cannot be read ({str(error).splitlines()[0]}): restore it") from None


def write_costs(suites: Sequence[tuple[str, Sequence[SuiteRun]]], build: Build) -> None:
    """Compute `computed_costs.csv` anew, for every run of the (named) suites. Takes minutes."""
    rows = [{"suite": name, "label": run.config.label, **costs} for name, run, costs in computed(suites, build)]
    write_text_atomically(FILE, pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(index=False, lineterminator="\n"))


def computed(suites: Sequence[tuple[str, Sequence[SuiteRun]]], build: Build) -> Iterator[tuple[str, SuiteRun, dict[str, int]]]:
    """The costs of every run; those of the same network are computed once."""
    known: dict[str, dict[str, int]] = {}
    for name, runs in suites:
        for run in runs:
            config = run.config
            key = content_hash([config.method, config.options, asdict(config.model), config.data.image_size])
            if key not in known:
                known[key] = network_costs(config, build)
            yield name, run, known[key]


def network_costs(config: RunConfig, build: Build) -> dict[str, int]:
    """The columns of `computed_costs.csv`, from a network on the meta device."""
    import torch

    from bench.flops import forward_macs_per_image

    size = config.data.image_size
    with torch.device("meta"):
        method = build(config, Latents(size))
    position_tables = {name: values.numel() for name, values in method.named_buffers() if name.endswith("positions")}
    method.intervals = method.intervals[:1]  # the experts of a family cost the same
    return {
        "stored_parameters": sum(p.numel() for p in method.parameters()),
        "active_parameters": method.num_active_parameters(),
        "position_values": next(iter(position_tables.values())),
        "forward_macs_per_image": round(forward_macs_per_image(method, (CHANNELS, size, size))),
    }
