"""Which files do tables become, and do those that are committed still follow from the results beside them?"""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bench import tidy
from bench.files import make_folder, write_text_atomically
from bench.runs import hash_of_settings
from bench.tables.comparison import comparisons
from bench.tables.formats import to_csv, to_latex, to_markdown
from bench.tables.html import to_html
from bench.tables.table import Table

Figures = Callable[[Path], Mapping[str, bytes]]  # of a folder: file -> what it should hold


def table_files(tables: Sequence[Table], frame: pd.DataFrame) -> dict[str, str]:
    """Name -> content of every file; `frame`: what the tables were made of."""
    return {
        "table.md": "\n".join(to_markdown(table) for table in tables),
        "table.tex": "\n".join(to_latex(table) for table in tables),
        "table.csv": to_csv(tables),
        "table.html": "\n".join(to_html(table, frame) for table in tables),
    }


def write_tables(tables: Sequence[Table], results: tidy.Results, folder: Path) -> list[Path]:
    """The results and the tables in `folder`."""
    make_folder(folder)
    paths = tidy.write(results, folder)
    for name, text in table_files(tables, results.frame).items():
        write_text_atomically(folder / name, text)
        paths.append(folder / name)
    return paths


def check(
    folder: Path,
    suite: Mapping[str, Any],
    protocol_hash: str = "",
    allow: Collection[str] = (),
    figures: Figures | None = None,
) -> list[str]:
    """One line for each file in `folder` that does not follow from its `results.csv`; arguments as the tables were made with.

    `figures` makes anew what figures show, from the same folder. ValueError or TableRefusal if the tables cannot be made at all.
    """
    results = tidy.read(folder)
    expected = {tidy.RESULTS: tidy.results_text(results.frame).encode()}
    tables = comparisons(results.frame, suite, protocol_hash, allow)
    expected |= {name: text.encode() for name, text in table_files(tables, results.frame).items()}
    expected |= figures(folder) if figures else {}
    found = [_difference(folder / name, content) for name, content in expected.items()]
    return [line for line in found if line] + _strange_records(folder, results)


def _difference(path: Path, expected: bytes) -> str:
    if not path.is_file():
        return f"{path} is missing"
    content = path.read_bytes()
    if content == expected:
        return ""
    lines, should = content.splitlines(), expected.splitlines()
    number = next((i for i, (a, b) in enumerate(zip(lines, should, strict=False)) if a != b), min(len(lines), len(should))) + 1
    return f"{path} does not follow from {tidy.RESULTS}: line {number} differs"


def _strange_records(folder: Path, results: tidy.Results) -> list[str]:
    """What `runs.json` says of other runs than the results are of, or of other settings."""
    path, records = folder / tidy.RECORDS, results.records
    if not path.exists():
        return [f"{path} is missing"]
    hashes = dict(zip(results.frame["run"], results.frame["config_hash"], strict=True))
    hashes.pop(tidy.FLOOR, None)
    lines = [f"{path} does not tell of run {run}" for run in sorted(hashes.keys() - records.keys())]
    lines += [f"{path} tells of run {run}, of which there are no results" for run in sorted(records.keys() - hashes.keys())]
    for run in sorted(hashes.keys() & records.keys()):
        if hash_of_settings(records[run]["config"]) != hashes[run]:
            lines.append(f"{path} gives run {run} other settings than it was made with")
    return lines
