"""Which files do tables become, and do those that are committed still follow from the results beside them?"""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bench import tidy
from bench.files import make_folder, write_text_atomically
from bench.tables.comparison import comparisons
from bench.tables.formats import to_csv, to_latex, to_markdown
from bench.tables.html import to_html
from bench.tables.table import Table

Figures = Callable[[Path], Mapping[str, bytes]]  # of a folder: file -> what it should hold
PICTURES = (".png", ".pdf")


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
    from_runs: tidy.Results | None = None,
) -> list[str]:
    """One line for each file in `folder` that does not follow from its `results.csv`; arguments as the tables were made with.

    `from_runs`: what the runs beside the results say, from which the results must follow. `figures` makes anew what figures
    show, from the same folder. ValueError or TableRefusal if the tables cannot be made at all.
    """
    results = tidy.read(folder)
    lines = _differences(folder, tidy.result_files(from_runs or results), "the runs" if from_runs else tidy.RESULTS)
    tables = comparisons(results.frame, suite, protocol_hash, allow)
    files = {name: text.encode() for name, text in table_files(tables, results.frame).items()}
    lines += _differences(folder, files, tidy.RESULTS)
    if figures:
        lines += _differences(folder, figures(folder), "the runs")
    return lines + _strange_records(folder, results)


def _differences(folder: Path, expected: Mapping[str, str | bytes], source: str) -> list[str]:
    contents = {name: content.encode() if isinstance(content, str) else content for name, content in expected.items()}
    return [line for name, content in contents.items() if (line := _difference(folder / name, content, source))]


def _difference(path: Path, expected: bytes, source: str) -> str:
    if not path.is_file():
        return f"{path} is missing"
    content = path.read_bytes()
    if content == expected:
        return ""
    if path.suffix in PICTURES:
        return f"{path} does not follow from {source}"
    lines, should = content.splitlines(), expected.splitlines()
    number = next((i for i, (a, b) in enumerate(zip(lines, should, strict=False)) if a != b), min(len(lines), len(should))) + 1
    about = (should[number - 1 :] or lines[number - 1 :] or [b""])[0].decode(errors="replace").partition(",")[0]
    whose = f" (run {about})" if path.name == tidy.RESULTS else ""
    return f"{path} does not follow from {source}: line {number} differs{whose}"


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
        if results.settings_hash(run) != hashes[run]:
            lines.append(f"{path} gives run {run} other settings than it was made with")
    return lines
