"""What has been run, how far is it, and what came out?

Everything is told from run folders alone, without torch. `tidy` gives one row per run and metric, of which tables are
made.
"""

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from bench.arrays import Diagnostic
from bench.arrays import read_diagnostics as read_diagnostics
from bench.arrays import read_samples as read_samples
from bench.config import NOT_SCIENTIFIC, content_hash
from bench.files import read_json, read_text, read_yaml, write_text_atomically

STATES = ("planned", "running", "failed", "diverged", "done")
HEARTBEAT_FRESH_SECONDS = 300.0
FLOOR = "floor"  # stands for the run in rows that compare real data with real data
TIDY_DTYPES = {
    **dict.fromkeys(("run", "method", "label", "options", "config_hash"), "str"),
    "seed": "Int64",
    **dict.fromkeys(("state", "budget_unit"), "str"),
    "budget_amount": "float64",
    **dict.fromkeys(("protocol_hash", "protocol", "metric"), "str"),
    "value": "float64",
    "n": "Int64",
    "commit": "str",
    "dirty": "boolean",
    **dict.fromkeys(("code_hash", "device"), "str"),
    "threads": "Int64",
    "world_size": "Int64",
    "started": "str",
}


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
        path = self.path / "eval.json"
        records: list[dict[str, Any]] = read_json(path, list)
        for record in records:
            if not isinstance(record, dict) or not {"protocol_hash", "protocol", "n", "metrics"} <= set(record):
                raise ValueError(f"{path} holds a record without protocol, n or metrics: delete the file and score the run again")
        return [record for record in records if record["protocol_hash"].startswith(self.protocol_hash)]

    @cached_property
    def provenance(self) -> dict[str, Any]:
        return read_json(self.path / "provenance.json", dict)

    @cached_property
    def metrics(self) -> pd.DataFrame:
        return read_metrics(self.path)

    @cached_property
    def diagnostics(self) -> dict[str, Diagnostic]:
        return read_diagnostics(self.path)

    @property
    def failure(self) -> str:
        """Why it failed, in one sentence; empty if it did not."""
        return str(read_json(self.path / "failure.json", dict).get("cause", ""))

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
        return content_hash({key: value for key, value in self.config.items() if key not in (*NOT_SCIENTIFIC, "seed")})


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
    _ = run.state, run.config, run.summary, run.evaluations, run.provenance, run.metrics, run.diagnostics
    read_samples(run.path)


def run_state(path: Path, now: float | None = None) -> str:
    """One of STATES, from the folder alone.

    `running` means a heartbeat of the last HEARTBEAT_FRESH_SECONDS. A run that was interrupted is `planned` again: the same
    command goes on from its last checkpoint.
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
    return "running" if seconds < HEARTBEAT_FRESH_SECONDS else "planned"


def read_metrics(path: Path) -> pd.DataFrame:
    """All rows of a run's `metrics.jsonl`, in order; empty if nothing is logged yet.

    A last line without its end is one that is being written, and is left out, unless the run is done.
    """
    file = Path(path) / "metrics.jsonl"
    text = read_text(file)
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
    return pd.DataFrame(rows)


def read_floor(path: Path) -> dict[str, Any] | None:
    """A suite folder's `floor.json`: real data scored against real data; None if there is none."""
    floor = read_json(Path(path), dict)
    if floor and not {"protocol_hash", "protocol", "n", "metrics"} <= set(floor):
        raise ValueError(f"{path} lacks protocol, n or metrics: delete it and let the suite measure the floor again")
    return floor or None


def tidy(runs: Iterable[Run], floor: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """One row per run and metric, with the columns and types of TIDY_DTYPES.

    `value` is in the metric's own unit; `n`, `protocol_hash` and `protocol` (JSON) are there for what depends on the scoring.
    A run that is not finished has at least the row `images_seen`. Lists (updates per parameter set) become a _min and a _max.
    """
    rows: list[dict[str, Any]] = []
    for run in runs:
        common = _run_columns(run)
        rows += [{**common, "metric": metric, "value": value} for metric, value in _costs(run).items()]
        for record in {record["protocol_hash"]: record for record in run.evaluations}.values():
            rows += _score_rows(common, record, run.path / "eval.json")
    if floor is not None:
        empty = {name: "" for name, dtype in TIDY_DTYPES.items() if dtype == "str"}
        rows += _score_rows(
            {**empty, "run": FLOOR, "label": "Real data", "state": "done", "options": "{}"}, floor, Path("floor.json")
        )
    frame = pd.DataFrame(rows, columns=list(TIDY_DTYPES))
    return frame.astype(TIDY_DTYPES)


def distinct_labels(keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """(label, options as JSON) -> the label, with the options that tell apart those of the same label."""
    keys = sorted(set(keys))
    shown = {}
    for label, text in keys:
        options = json.loads(text)
        others = [json.loads(other) for name, other in keys if name == label and other != text]
        telling = [f"{key}={value}" for key, value in options.items() if any(other.get(key) != value for other in others)]
        shown[label, text] = f"{label} ({', '.join(telling)})" if telling else label
    return shown


def write_results(frame: pd.DataFrame, path: Path) -> None:
    """The tidy frame as CSV; the same frame gives the same bytes."""
    write_text_atomically(path, frame.to_csv(index=False, lineterminator="\n"))


def read_results(path: Path) -> pd.DataFrame:
    """The tidy frame that `write_results` wrote, to the last bit."""
    missing = {name: [""] for name, dtype in TIDY_DTYPES.items() if dtype != "str"}
    as_text = {name: "str" if dtype == "float64" else dtype for name, dtype in TIDY_DTYPES.items()}
    try:
        frame = pd.read_csv(path, dtype=as_text, keep_default_na=False, na_values=missing)
        for name in TIDY_DTYPES:
            if TIDY_DTYPES[name] == "float64" and name in frame:
                frame[name] = [float(text) for text in frame[name]]  # Python reads back what it wrote; pandas need not
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as results ({type(error).__name__}): make it again from the runs") from None
    if list(frame.columns) != list(TIDY_DTYPES):
        raise ValueError(f"{path} has other columns than results have: make it again from the runs")
    return frame


def _run_columns(run: Run) -> dict[str, Any]:
    provenance, budget = run.provenance, run.config["budget"]
    text = {key: str(provenance.get(key) or "") for key in ("commit", "code_hash", "device", "started")}
    return {
        "run": run.run_id,
        "method": str(run.config["method"]),
        "label": run.label,
        "options": run.options,
        "config_hash": run.config_hash,
        "seed": run.config["seed"],
        "state": run.state,
        "budget_unit": str(budget["unit"]),
        "budget_amount": budget["amount"],
        "protocol_hash": "",
        "protocol": "",
        "dirty": provenance.get("dirty"),
        "threads": provenance.get("threads"),
        "world_size": provenance.get("world_size"),
        **text,
    }


def _costs(run: Run) -> dict[str, float]:
    if not run.summary:
        return {"images_seen": float(read_json(run.path / "progress.json", dict).get("images_seen", 0))}
    costs: dict[str, float] = {}
    for name, value in run.summary.items():
        if isinstance(value, list):
            numbers = [_number(item, name, run.path / "summary.json") for item in value]
            costs |= {f"{name}_min": min(numbers), f"{name}_max": max(numbers)} if numbers else {}
        elif value is not None:
            costs[name] = _number(value, name, run.path / "summary.json")
    return costs


def _score_rows(common: dict[str, Any], record: Mapping[str, Any], file: Path) -> list[dict[str, Any]]:
    protocol = {key: value for key, value in record["protocol"].items() if not key.endswith("_path")}  # where a file lies
    scored = {
        **common,
        "protocol_hash": str(record["protocol_hash"]),
        "protocol": json.dumps(protocol, sort_keys=True),
        "n": record["n"],
    }
    beside = ("sample_images_per_second", "network_evaluations_per_sample", "heldout_loss")
    values = {**record["metrics"], **{key: record[key] for key in beside if key in record}}
    return [{**scored, "metric": key, "value": _number(value, key, file)} for key, value in values.items() if value is not None]


def _number(value: Any, name: str, file: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{file} gives {name} as {value!r}, which is no number: delete the file and run this again")
    return float(value)
