"""What is known of all runs of a folder, in one frame? `results.csv`, from which tables are made, and what explains it.

The tidy frame has a row per run and metric, and per place of training where a run was scored on its way. Beside it,
`protocols.json` spells out its protocol hashes, which a file of thousands of rows does not repeat, and `runs.json` holds
each run's settings and provenance. All are committed with a comparison; `bench.keep` says what is of the run folders.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from bench.files import read_json, write_text_atomically
from bench.runs import Run, hash_of_settings

RESULTS, PROTOCOLS, RECORDS = "results.csv", "protocols.json", "runs.json"
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
IN_RESULTS = [name for name in TIDY_DTYPES if name != "protocol"]  # the columns of the file
PLACES = {"at_images": "images_seen", "at_train_flops": "train_flops", "at_device_seconds": "device_seconds"}
BESIDE_METRICS = ("sample_images_per_second", "network_evaluations_per_sample", "heldout_loss")  # of a record of scores
NOT_KEPT = ("command", "code_files", "diff")  # of the provenance: they tell of one machine, or are long


class Results(NamedTuple):
    """The tidy frame, and by run its `config`, `provenance` and what is known of its `scores`; none where they were not kept."""

    frame: pd.DataFrame
    records: dict[str, dict[str, Any]]

    def settings_hash(self, run_id: str) -> str:
        """What the recorded settings of a run say that its `config_hash` is."""
        return hash_of_settings(self._config_of(run_id), self._config_of)

    def _config_of(self, run_id: str) -> dict[str, Any]:
        config: dict[str, Any] = self.records.get(run_id, {}).get("config", {})
        return config


def gather(runs: Sequence[Run], floor: Mapping[str, Any] | None = None) -> Results:
    """In the order of the runs' ids, whatever order they are given in."""
    runs = sorted(runs, key=lambda run: run.run_id)
    return Results(tidy(runs, floor), {run.run_id: _record(run) for run in runs})


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
    """The files of `result_files` in a folder. The same results give the same bytes."""
    files = result_files(results)
    for name, text in files.items():
        write_text_atomically(folder / name, text)
    return [folder / name for name in files]


def read(folder: Path) -> Results:
    """What `write` wrote, to the last bit. Without `runs.json`, tables can be made but not explained."""
    return Results(read_results(folder / RESULTS), read_json(folder / RECORDS, dict))


def result_files(results: Results) -> dict[str, str]:
    """Name -> content of `results.csv`, `protocols.json` and, if the runs' records are known, `runs.json`."""
    files = {RESULTS: results_text(results.frame), PROTOCOLS: protocols_text(results.frame)}
    return files | ({RECORDS: records_text(results.records)} if results.records else {})


def results_text(frame: pd.DataFrame) -> str:
    return str(frame[IN_RESULTS].to_csv(index=False, lineterminator="\n"))


def protocols_text(frame: pd.DataFrame) -> str:
    """Hash -> protocol."""
    known = frame[frame["protocol_hash"] != ""][["protocol_hash", "protocol"]].drop_duplicates().sort_values("protocol_hash")
    if known["protocol_hash"].duplicated().any():
        twice = known["protocol_hash"][known["protocol_hash"].duplicated()].iloc[0]
        raise ValueError(f"the protocol hash {twice} stands for two different protocols: score these runs again")
    protocols = {name: json.loads(text) for name, text in zip(known["protocol_hash"], known["protocol"], strict=True)}
    return json.dumps(protocols, indent=1) + "\n"


def records_text(records: Mapping[str, Any]) -> str:
    return json.dumps(records, indent=1) + "\n"


def read_results(path: Path) -> pd.DataFrame:
    """The tidy frame in a file, with the protocols beside it."""
    missing = {name: [""] for name in IN_RESULTS if TIDY_DTYPES[name] != "str"}
    as_text = {name: "str" if TIDY_DTYPES[name] == "float64" else TIDY_DTYPES[name] for name in IN_RESULTS}
    try:
        frame = pd.read_csv(path, dtype=as_text, keep_default_na=False, na_values=missing)
        for name in TIDY_DTYPES:
            if TIDY_DTYPES[name] == "float64" and name in frame:
                frame[name] = [float(text) for text in frame[name]]  # Python reads back what it wrote; pandas need not
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as results ({type(error).__name__}): make it again from the runs") from None
    if list(frame.columns) != IN_RESULTS:
        raise ValueError(f"{path} has other columns than results have: make it again from the runs")
    protocols = read_json(path.with_name(PROTOCOLS), dict)
    if unknown := sorted(set(frame["protocol_hash"]) - {"", *protocols}):
        raise ValueError(f"{path.with_name(PROTOCOLS)} does not tell of {', '.join(unknown)}: make it again from the runs")
    texts = {"": "", **{name: json.dumps(protocol, sort_keys=True) for name, protocol in protocols.items()}}
    return frame.assign(protocol=[texts[each] for each in frame["protocol_hash"]])[list(TIDY_DTYPES)].astype(TIDY_DTYPES)


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


def kept_provenance(run: Run) -> dict[str, Any]:
    """The provenance of a run without what tells of one machine only, or is long."""
    provenance = {key: value for key, value in run.provenance.items() if key not in NOT_KEPT}
    if "sessions" in provenance:
        provenance["sessions"] = [
            {key: value for key, value in session.items() if key not in NOT_KEPT} for session in provenance["sessions"]
        ]
    return provenance


def _record(run: Run) -> dict[str, Any]:
    scores = {each["protocol_hash"]: {key: each.get(key) for key in ("code_hash", "scored")} for each in run.evaluations}
    return {"config": run.config, "provenance": kept_provenance(run), "scores": scores}


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
