"""What is known of all runs of a folder, in one frame? `results.csv` and `runs.json`, from which tables are made and explained.

The tidy frame has a row per run and metric, and per place of training where a run was scored on its way. `runs.json`
holds each run's settings and provenance. Both are committed with a comparison; run folders are not.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from bench.files import read_json, write_text_atomically
from bench.runs import Run

RESULTS, RECORDS = "results.csv", "runs.json"
FLOOR = "floor"  # stands for the run in rows that compare real data with real data
TIDY_DTYPES = {
    **dict.fromkeys(("run", "method", "label", "options", "config_hash"), "str"),
    "seed": "Int64",
    **dict.fromkeys(("state", "budget_unit"), "str"),
    "budget_amount": "float64",
    **dict.fromkeys(("protocol_hash", "protocol", "metric"), "str"),
    "value": "float64",
    "n": "Int64",
    **dict.fromkeys(("at_images", "at_train_flops", "at_device_seconds"), "float64"),  # a place of training; none: its end
    "commit": "str",
    "dirty": "boolean",
    **dict.fromkeys(("code_hash", "job", "node", "device"), "str"),
    "threads": "Int64",
    "world_size": "Int64",
    "started": "str",
}
PLACES = {"at_images": "images_seen", "at_train_flops": "train_flops", "at_device_seconds": "device_seconds"}
BESIDE_METRICS = ("sample_images_per_second", "network_evaluations_per_sample", "heldout_loss")  # of a record of scores
NOT_KEPT = ("command", "code_files", "diff")  # of the provenance: they tell of one machine, or are long


class Results(NamedTuple):
    """The tidy frame, and by run its `config`, `provenance` and what is known of its `scores`; none where they were not kept."""

    frame: pd.DataFrame
    records: dict[str, dict[str, Any]]


def gather(runs: Sequence[Run], floor: Mapping[str, Any] | None = None) -> Results:
    return Results(tidy(runs, floor), {run.run_id: _record(run) for run in sorted(runs, key=lambda run: run.run_id)})


def tidy(runs: Iterable[Run], floor: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """One row per run and metric, with the columns and types of TIDY_DTYPES.

    `value` is in the metric's own unit; `n`, `protocol_hash` and `protocol` (JSON) are there for what depends on the scoring,
    `at_*` for scores on the way. A run that is not finished has at least the row `images_seen`. Lists (updates per parameter
    set) become a _min and a _max.
    """
    rows: list[dict[str, Any]] = []
    for run in runs:
        common = _run_columns(run)
        rows += [{**common, "metric": metric, "value": value} for metric, value in _costs(run).items()]
        for record in {record["protocol_hash"]: record for record in run.evaluations}.values():
            rows += _score_rows(common, record, run.path / "eval.json")
        for record in {(record["protocol_hash"], record["images_seen"]): record for record in run.curve}.values():
            at = {column: _number(record[name], name, run.path / "curve.json") for column, name in PLACES.items()}
            rows += _score_rows({**common, **at}, record, run.path / "curve.json")
    if floor is not None:
        empty = {name: "" for name, dtype in TIDY_DTYPES.items() if dtype == "str"}
        rows += _score_rows(
            {**empty, "run": FLOOR, "label": "Real data", "state": "done", "options": "{}"}, floor, Path("floor.json")
        )
    frame = pd.DataFrame(rows, columns=list(TIDY_DTYPES))
    return frame.astype(TIDY_DTYPES)


def at_the_end(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of trained runs, without what was scored on the way."""
    return frame[frame["at_images"].isna()]


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


def write(results: Results, folder: Path) -> list[Path]:
    """`results.csv` and, if the runs' records are known, `runs.json`. The same results give the same bytes."""
    write_text_atomically(folder / RESULTS, results_text(results.frame))
    if not results.records:
        return [folder / RESULTS]
    write_text_atomically(folder / RECORDS, records_text(results.records))
    return [folder / RESULTS, folder / RECORDS]


def read(folder: Path) -> Results:
    """What `write` wrote, to the last bit. Without `runs.json`, tables can be made but not explained."""
    return Results(read_results(folder / RESULTS), read_json(folder / RECORDS, dict))


def results_text(frame: pd.DataFrame) -> str:
    return str(frame.to_csv(index=False, lineterminator="\n"))


def records_text(records: Mapping[str, Any]) -> str:
    return json.dumps(records, indent=1) + "\n"


def read_results(path: Path) -> pd.DataFrame:
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
    text = {key: str(provenance.get(key) or "") for key in ("commit", "code_hash", "node", "device", "started")}
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
        "job": _job(provenance.get("slurm") or {}),
        "dirty": provenance.get("dirty"),
        "threads": provenance.get("threads"),
        "world_size": provenance.get("world_size"),
        **text,
    }


def _job(slurm: Mapping[str, Any]) -> str:
    """A Slurm job as its commands name it: 12, or 12_3 of an array; empty outside Slurm."""
    if slurm.get("array_job_id"):
        return f"{slurm['array_job_id']}_{slurm.get('array_task_id')}"
    return str(slurm.get("job_id") or "")


def _record(run: Run) -> dict[str, Any]:
    provenance = {key: value for key, value in run.provenance.items() if key not in NOT_KEPT}
    if "sessions" in provenance:
        provenance["sessions"] = [
            {key: value for key, value in session.items() if key not in NOT_KEPT} for session in provenance["sessions"]
        ]
    scores = {each["protocol_hash"]: {key: each.get(key) for key in ("code_hash", "scored")} for each in run.evaluations}
    return {"config": run.config, "provenance": provenance, "scores": scores}


def _costs(run: Run) -> dict[str, float]:
    if not run.summary:
        return {"images_seen": run.images_seen}
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
    values = {**record["metrics"], **{key: record[key] for key in BESIDE_METRICS if key in record}}
    return [{**scored, "metric": key, "value": _number(value, key, file)} for key, value in values.items() if value is not None]


def _number(value: Any, name: str, file: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{file} gives {name} as {value!r}, which is no number: delete the file and run this again")
    return float(value)
