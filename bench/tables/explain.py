"""Where does a cell of a table come from: which runs, settings, code, job, machine and protocol?"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from bench.config import scientific_part
from bench.settings import flat_settings
from bench.tables.table import Cell, Part, Row, Table
from bench.tidy import FLOOR, PLACES, Results

ABSENT = "–"


def explain(tables: Sequence[Table], results: Results, table: str, row: str, column: str) -> str:
    """All that is known of one cell, as text.

    `table`: the number of a part as printed, or the beginning of its title; `row` and `column`: labels as printed, or the
    beginning of one. ValueError, in one sentence with what there is, if that is none or several.
    """
    part = _find_part(tables, table)
    labels = {each.label: each for each in part.all_rows}
    found = labels[_find("row", row, list(labels))]
    headings = [_plain(heading) for heading in part.headings]
    position = headings.index(_find("column", column, headings))
    cell = found.cells[position]
    text = cell.text + {"best": ", best", "second": ", second", "clear": ", interval excludes zero", "": ""}[cell.mark]
    sections = [f"{part.caption}\n{found.label}, {headings[position]}: {text}", *_sections(cell, found, part, results)]
    return "\n\n".join(sections) + "\n"


def _sections(cell: Cell, row: Row, part: Part, results: Results) -> list[str]:
    rows = results.frame.loc[list(cell.sources)]
    if rows.empty:
        return ["no value: none of the row's runs has this number"]
    runs = [run for run in dict.fromkeys(rows["run"]) if run != FLOOR]
    if not runs:
        return [_values(rows), _protocols(rows)]
    unknown = [run for run in runs if run not in results.records]
    if unknown:
        raise ValueError(f"runs.json does not tell of {', '.join(unknown)}: make it again with `tsbench collect`")
    return [
        _values(rows),
        _settings(row, part, results),
        *(_origin(run, results.records[run], rows[rows["run"] == run]) for run in runs),
        _protocols(rows),
    ]


def _values(rows: pd.DataFrame) -> str:
    shown = rows[["run", "label", "seed", "metric", "value", "n", *PLACES]].dropna(axis="columns", how="all")
    shown = shown.drop(columns="label" if rows["label"].nunique() == 1 else [])
    text = shown.astype(object).where(shown.notna(), ABSENT)
    for name in {"value", *PLACES} & set(text):
        text[name] = [each if isinstance(each, str) else f"{each:.10g}" for each in text[name]]
    return "values\n" + _indented(text.to_string(index=False))


def _settings(row: Row, part: Part, results: Results) -> str:
    """The row's settings hash, and where its settings are not those of the other rows."""
    by_row = {each.label: _settings_of(each, results) for each in part.rows}
    own = by_row.pop(row.label)
    own_hash = results.settings_hash(row.runs[0])
    lines = [f"settings {own_hash}, and what distinguishes them from those of other rows"]
    names = dict.fromkeys(name for settings in [own, *by_row.values()] for name in settings)
    for name in names:
        others: dict[str, list[str]] = {}
        for label, settings in by_row.items():
            if settings and settings.get(name, ABSENT) != own.get(name, ABSENT):
                others.setdefault(str(settings.get(name, ABSENT)), []).append(label)
        if others:
            elsewhere = "; ".join(f"{value} ({', '.join(labels)})" for value, labels in others.items())
            lines.append(f"  {name} = {own.get(name, ABSENT)}, elsewhere {elsewhere}")
    return "\n".join(lines if len(lines) > 1 else [*lines, "  nothing: no other row, or the same settings"])


def _settings_of(row: Row, results: Results) -> dict[str, Any]:
    config = results.records.get(row.runs[0], {}).get("config", {})
    return flat_settings({key: value for key, value in scientific_part(config).items() if key != "seed"})


def _origin(run: str, record: Mapping[str, Any], rows: pd.DataFrame) -> str:
    return "\n".join([f"run {run}", *(f"  {name}: {text}" for name, text in origin(record, rows).items())])


def origin(record: Mapping[str, Any], rows: pd.DataFrame) -> dict[str, str]:
    """Which code, job, machine and libraries made a run, in words; `rows`: of the tidy frame, that run's."""
    known, provenance = rows.iloc[0], record["provenance"]
    state = {True: "with uncommitted changes", False: "clean", None: "unknown whether clean"}[provenance.get("dirty")]
    libraries = {"python": provenance.get("python"), **(provenance.get("libraries") or {})}
    scores = record["scores"].get(known["protocol_hash"], {})
    slurm = {key: value for key, value in (provenance.get("slurm") or {}).items() if value is not None}
    lines = {
        "state": known["state"],
        "code": f"{known['code_hash'] or 'unknown'}, commit {provenance.get('commit') or 'none'}, {state}",
        "snapshot": provenance.get("snapshot"),
        "scored": f"{scores['scored']} by code {scores['code_hash']}" if scores.get("scored") else None,
        "job": ", ".join([known["job"], *(f"{key} {value}" for key, value in slurm.items())]) or "none, as it ran outside Slurm",
        "node": known["node"] or provenance.get("host"),
        "device": f"{known['world_size']} × {known['device'] or 'unknown'}, threads {known['threads']}",
        "driver": ", ".join(f"{key} {provenance[key]}" for key in ("driver", "cuda", "cudnn") if provenance.get(key)),
        "versions": ", ".join(f"{name} {version}" for name, version in libraries.items() if version),
        "started": ", ".join(session["started"] for session in provenance.get("sessions", [])) or known["started"],
    }
    return {name: str(text) for name, text in lines.items() if text}


def _protocols(rows: pd.DataFrame) -> str:
    scored = rows[rows["protocol_hash"] != ""].drop_duplicates("protocol_hash")
    if scored.empty:
        return "protocol: none, as this number does not depend on the scoring"
    texts = []
    for protocol_hash, text in zip(scored["protocol_hash"], scored["protocol"], strict=True):
        texts.append("\n".join([f"protocol {protocol_hash}", *(f"  {key}: {value}" for key, value in json.loads(text).items())]))
    return "\n\n".join(texts)


def _find_part(tables: Sequence[Table], name: str) -> Part:
    parts = {part.number: part for table in tables for part in table.parts}
    if name.isdigit() and int(name) in parts:
        return parts[int(name)]
    captions = [part.caption for part in parts.values()]
    titles = {f"{part.title} ({part.number})": part for part in parts.values()}
    if name.isdigit() or not name:
        raise ValueError(f"there is no table {name!r}: choose one of {', '.join(captions)}")
    return titles[_find("table", name, list(titles))]


def _find(kind: str, name: str, known: Sequence[str]) -> str:
    """The one of these that is called so or, if only one is, that begins so; capitals and signs do not matter."""
    wanted = _plain(name).lower()
    exact = [each for each in known if _plain(each).lower() == wanted]
    found = exact or [each for each in known if wanted and _plain(each).lower().startswith(wanted)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{kind} {name!r} could be any of {', '.join(found)}: give more of its name")
    raise ValueError(f"there is no {kind} {name!r}: choose one of {', '.join(known)}")


def _plain(heading: str) -> str:
    """Without the signs that say what is better and where a note is."""
    return " ".join(heading.replace("↓", "").replace("↑", "").replace("†", "").split())


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
