"""What has been run, how far is it, and what came out?

Everything is told from run folders alone, without torch. `bench.tidy` gathers it in one frame.
"""

import gzip
import json
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.arrays import Diagnostic
from bench.arrays import read_diagnostics as read_diagnostics
from bench.arrays import read_samples as read_samples
from bench.config import ONLY_WHEN_SET, RUN, content_hash, scientific_part
from bench.files import read_json, read_text, read_yaml

if TYPE_CHECKING:
    import pandas as pd

STATES = ("planned", "running", "failed", "diverged", "done")
HEARTBEAT_FRESH_SECONDS = 300.0
SPENT = {"images": "images_seen", "train_flops": "train_flops", "device_seconds": "device_seconds"}  # unit: in progress.json
LEFT_BY_EXPERT = ("config.yaml", "provenance.json", "summary.json", "metrics.jsonl", "done")  # in a folder of its own
METRICS = "metrics.jsonl"  # of a run that is kept beside results: compressed, with .gz after it
CURVE = "curve.json"  # scores of the weights at places of training, one record each
RECORD = ("protocol_hash", "protocol", "n", "metrics")  # what a record of scores has at least
LATENTS = "latents"  # the data set whose samples are images only when they are decoded
PLACE = ("images_seen", "train_flops", "device_seconds")  # of training


@dataclass(frozen=True)
class Run:
    """One run folder. A file is read when it is first asked for, and once."""

    path: Path
    protocol_hash: str = ""  # where given (or its beginning), only scores under that protocol count

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def state(self) -> str:
        return run_state(self.path)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration as plain mappings."""
        config = read_yaml(self.path / "config.yaml")
        missing = [key for key in ("method", "seed", "budget", "diffusion") if key not in config]
        if missing:
            raise ValueError(f"{self.path / 'config.yaml'} has no {', '.join(missing)}: start this run again in a new folder")
        return config

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Cost and size of the finished training; empty before."""
        return read_json(self.path / "summary.json", dict)

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """One record per scoring, oldest first."""
        return self._scores("eval.json", RECORD)

    @cached_property
    def curve(self) -> list[dict[str, Any]]:
        """One record per scoring of the weights at a place of training before its end."""
        return self._scores(CURVE, (*RECORD, *PLACE))

    @cached_property
    def provenance(self) -> dict[str, Any]:
        return read_json(self.path / "provenance.json", dict)

    @cached_property
    def metrics(self) -> "pd.DataFrame":
        return read_metrics(self.path)

    @cached_property
    def diagnostics(self) -> dict[str, Diagnostic]:
        return read_diagnostics(self.path)

    def has_pixels(self, evaluation: Mapping[str, Any]) -> bool:
        """Whether it draws images, which can be scored; one on latents is done without, where nothing decodes them."""
        config = read_yaml(self.path / "config.yaml")
        name: str = (config.get("data") or {}).get("name", "")
        return name != LATENTS or bool({**(config.get("evaluation") or {}), **evaluation}.get("autoencoder"))

    def is_scored_under(self, evaluation: Mapping[str, Any]) -> bool:
        """Whether there are scores under a protocol of these settings. Files (a reference, an extractor) are not compared."""
        wanted = {**evaluation, "reference": "adm" if evaluation.get("reference") else "train"} if evaluation else {}
        unset = {key: "" if key == "solver" else 0 for key in ONLY_WHEN_SET}  # what a protocol without them stands for
        protocols = [{**unset, **record["protocol"]} for record in self.evaluations]
        return any(all(protocol.get(key, value) == value for key, value in wanted.items()) for protocol in protocols)

    def _scores(self, name: str, needed: tuple[str, ...]) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = read_json(self.path / name, list)
        for record in records:
            if not isinstance(record, dict) or not set(needed) <= set(record):
                raise ValueError(
                    f"{self.path / name} holds a record without {', '.join(needed[:-1])} or {needed[-1]}: "
                    "delete the file and score the run again"
                )
        return [record for record in records if record["protocol_hash"].startswith(self.protocol_hash)]

    @property
    def failure(self) -> str:
        """Why it failed, in one sentence; empty if it did not. An expert that failed in a job of its own is named."""
        causes = {"": read_json(self.path / "failure.json", dict).get("cause", "")}
        causes |= {f"expert {i}: ": Run(place).failure for i, place in expert_folders(self.path).items()}
        return "; ".join(f"{of}{cause}" for of, cause in causes.items() if cause)

    @property
    def images_seen(self) -> float:
        """So far; of a run whose experts train in jobs of their own, their sum."""
        places = [self.path] if (self.path / "progress.json").exists() else expert_folders(self.path).values()
        return sum(float(read_json(place / "progress.json", dict).get("images_seen", 0)) for place in places)

    @property
    def label(self) -> str:
        return str(self.config.get("label") or self.config["method"])

    @property
    def options(self) -> str:
        """The method's options as JSON."""
        return json.dumps(self.config.get("options") or {}, sort_keys=True)

    @property
    def config_hash(self) -> str:
        """The same for runs that differ in nothing but the seed."""
        return hash_of_settings(self.config, self.config_beside)

    def config_beside(self, run_id: str) -> dict[str, Any]:
        """Of a run beside this one; empty if it is not there."""
        beside = Run(self.path.parent / run_id)
        return beside.config if (beside.path / "config.yaml").is_file() else {}


def hash_of_settings(config: Mapping[str, Any], config_of: Callable[[str], Mapping[str, Any]] = lambda run_id: {}) -> str:
    """Of a configuration, whatever its seed; and whatever the seed of the run that it starts from, whose configuration
    `config_of` gives by id (empty where it is not known: then the id itself counts).
    """
    settings = {key: value for key, value in scientific_part(config).items() if key != "seed"}
    given = str(config.get("train", {}).get("init_from", ""))
    source = config_of(given.removeprefix(RUN)) if given.startswith(RUN) else {}
    if source:
        settings["train"] = {**settings["train"], "init_from": RUN + hash_of_settings(source, config_of)}
    return content_hash(settings)


def read_run(path: Path) -> Run:
    """The run in a folder; ValueError if there is none."""
    path = Path(path)
    if not (path / "config.yaml").is_file():
        raise ValueError(f"{path} is not a run folder, as it holds no config.yaml: give a folder that a run has written")
    return Run(path)


def find_runs(root: Path, protocol_hash: str = "") -> list[Run]:
    """The runs in `root/runs`, or in `root` itself where that does not exist, by name, with their scores by that protocol."""
    root = Path(root)
    folder = root / "runs" if (root / "runs").is_dir() else root
    if not folder.is_dir():
        raise ValueError(f"there is no folder {root}: check the path, or train a run first")
    return [Run(path.parent, protocol_hash) for path in sorted(folder.glob("*/config.yaml"))]


def read_all(run: Run) -> None:
    """Read every file that a figure may need: damage is found before anything is written."""
    _ = run.state, run.config, run.summary, run.evaluations, run.curve, run.provenance, run.metrics, run.diagnostics
    read_samples(run.path)


def run_state(path: Path, now: float | None = None) -> str:
    """One of STATES, from the folder alone.

    `running` means a heartbeat of the last HEARTBEAT_FRESH_SECONDS. A run that was interrupted is `planned` again: the same
    command goes on from its last checkpoint. Where experts train in jobs of their own, one that failed is a run that failed.
    """
    path = Path(path)
    if (path / "done").exists():
        return "done"
    failure = read_json(path / "failure.json", dict)
    if failure:
        state = str(failure.get("state"))
        if state not in ("failed", "diverged"):
            raise ValueError(
                f"{path / 'failure.json'} has the state {state!r}, not failed or diverged: delete it and start the run again"
            )
        return state
    beat = read_json(path / "progress.json", dict).get("time")
    seconds = (time.time() if now is None else now) - float(beat) if beat is not None else float("inf")
    states = [*expert_states(path, now).values(), "running" if seconds < HEARTBEAT_FRESH_SECONDS else "planned"]
    return next(state for state in ("diverged", "failed", "running", "planned") if state in states)


def expert_folder(path: Path, index: int) -> Path:
    """Where the job of one expert works, in the folder of its run."""
    return Path(path) / "experts" / str(index)


def expert_folders(path: Path) -> dict[int, Path]:
    """The experts that have begun in jobs of their own; empty for a run that one job trains."""
    return {index: expert_folder(path, index) for index in sorted(int(p.name) for p in Path(path).glob("experts/[0-9]*"))}


def expert_is_trained(path: Path, index: int) -> bool:
    """Whether nothing is left to do for one expert of a run. What was deleted of it is made anew."""
    place = expert_folder(path, index)
    return all((place / name).exists() for name in LEFT_BY_EXPERT) and any((place / "checkpoints").glob("step-*"))


def expert_states(path: Path, now: float | None = None) -> dict[int, str]:
    """One of STATES for each of them. The run itself is done when they are all done and assembled."""
    return {index: run_state(place, now) for index, place in expert_folders(path).items()}


def read_metrics(path: Path) -> "pd.DataFrame":
    """All rows of a run's `metrics.jsonl`, in order; empty if nothing is logged yet."""
    import pandas as pd  # here: a job that trains has no use for it

    return pd.DataFrame(read_metric_rows(path))


def read_metric_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` as they were written.

    A last line without its end is one that is being written, and is left out, unless the run is done.
    """
    file = Path(path) / METRICS
    text = metrics_bytes(path).decode(errors="replace")
    lines = text.splitlines()
    if lines and not text.endswith("\n") and not (Path(path) / "done").exists():
        lines.pop()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or not {"kind", "step", "images_seen"} <= set(row):
            raise ValueError(f"{file} is damaged in line {number}: delete the run folder and train the run again")
        rows.append(row)
    return rows


def metrics_bytes(path: Path) -> bytes:
    """`metrics.jsonl` as it was written; empty if nothing is logged yet."""
    packed = Path(path) / f"{METRICS}.gz"
    if not packed.is_file():
        return read_text(Path(path) / METRICS).encode()
    try:
        return gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error):
        raise ValueError(f"{packed} is damaged: restore it, or keep the runs again") from None


def read_floor(path: Path) -> dict[str, Any] | None:
    """A suite folder's `floor.json`: real data scored against real data; None if there is none."""
    floor = read_json(Path(path), dict)
    if floor and not set(RECORD) <= set(floor):
        raise ValueError(f"{path} lacks protocol, n or metrics: delete it and let the suite measure the floor again")
    return floor or None
