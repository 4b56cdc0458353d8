"""What do `tsbench collect`, `tables`, `plots`, `report` and `explain` do? They lead from a suite or a folder to `bench.show`.

A suite's runs lie among those of all suites; what is made of them goes to results/SUITE. A folder has its own runs, or
holds the results that were collected from some.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from bench.sweeps import RUNS, check_folder, is_suite

if TYPE_CHECKING:  # imports are made where they are needed, so that help and refusals come at once
    from bench.config import RunConfig
    from bench.runs import Run
    from bench.tidy import Results

RESULTS = Path("results")
SUITE = "demo"  # of a folder that was given none


def add_parsers(commands: Any) -> None:
    """The commands, for `bench.cli`."""
    for name, run, text in (
        ("collect", run_collect, "gather the runs of a suite or a folder into one tidy results.csv"),
        ("tables", run_tables, "the comparison tables of a suite's or a folder's runs, or a paper's table beside ours"),
        ("plots", run_plots, "the figures of a suite's or a folder's runs: PNG, PDF and the data shown"),
        ("report", run_report, "one HTML file that opens from disk: tables, figures and every run behind them"),
        ("explain", run_explain, "where a cell of a table comes from: runs, settings, code, machine, protocol"),
    ):
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.add_argument(
            "target", metavar="SUITE|FOLDER", help="a suite, a table of a paper (PAPER.TABLE), or a folder such as results/demo"
        )
        if run is run_explain:
            for part, of in (
                ("table", "the number it is printed with, or the beginning of its title"),
                ("row", ""),
                ("column", ""),
            ):
                command.add_argument(part, metavar=part.upper(), help=of or "as printed, or its beginning")
        command.add_argument("settings", nargs="*", metavar="key=value", help="settings of a suite's runs, as given to sweep")
        command.add_argument("--runs", type=Path, help=f"where a suite's runs are (default {RUNS})")
        if run is run_report:
            command.add_argument("--out", type=Path, dest="file", help="the HTML file (default report.html with the results)")
            command.set_defaults(out=None)
        else:
            command.add_argument("--out", type=Path, help="where a suite's results go (default results/SUITE)")
        command.add_argument("--suite", help=f"of a folder: what gives title, labels and colours (default {SUITE})")
        command.add_argument("--protocol", default="", metavar="HASH", help="which scores, of runs that were scored by several")
        if run in (run_tables, run_report, run_explain):
            command.add_argument("--allow", default="", metavar="WHAT", help="show all the same: protocols,incomplete,n,budgets")
        if run is run_collect:
            command.add_argument("--keep-runs", action="store_true", help="and a slim folder of each run, to draw figures from")
        if run is run_tables:
            command.add_argument("--check", action="store_true", help="only say which committed files no longer follow")
            command.add_argument("--pictures", action="store_true", help="with --check: draw PNG and PDF files too")
        command.set_defaults(run=run)


@dataclass(frozen=True)
class Target:
    """What a command was pointed at."""

    folder: Path  # of the results
    suite: dict[str, Any]
    runs: "list[Run] | None"  # of a suite; None: what the folder itself holds
    configs: "dict[str, RunConfig]"  # of a suite's runs, by id


def find_target(parsed: argparse.Namespace) -> Target:
    """ValueError in one sentence if there is nothing there."""
    from bench.runs import Run, find_runs
    from bench.suite import load_suite

    if not is_suite(parsed.target):
        folder = Path(parsed.target)
        if not folder.is_dir():
            raise ValueError(f"there is neither a suite nor a folder {parsed.target!r}: see `ls bench/suites`, or check the path")
        if parsed.settings:
            raise ValueError(
                f"settings {' '.join(parsed.settings)} choose runs of a suite, but {folder} is a folder: leave them out"
            )
        for option in ("runs", "out"):
            if getattr(parsed, option) is not None:
                raise ValueError(f"--{option} is for a suite, but {folder} is a folder, which has its own: leave it out")
        _check_protocol(parsed.protocol, find_runs(folder))
        return Target(folder, load_suite(parsed.suite or SUITE), None, {})
    if parsed.suite is not None:
        raise ValueError(
            f"--suite is for a folder, but {parsed.target} is a suite, which has its own title and labels: leave it out"
        )
    suite = load_suite(parsed.target)
    configs = _configs_of(suite, parsed.settings)
    root = parsed.runs or RUNS
    check_folder(root)
    begun = [Run(root / run_id, parsed.protocol) for run_id in configs if (root / run_id / "config.yaml").is_file()]
    _check_protocol(parsed.protocol, begun)
    return Target(parsed.out or RESULTS / str(suite["name"]), suite, begun, configs)


def _check_protocol(protocol_hash: str, runs: "list[Run]") -> None:
    """ValueError if these runs were scored, but none by the protocol that is asked for."""
    if not protocol_hash:
        return
    known = sorted({str(record["protocol_hash"]) for run in runs for record in replace(run, protocol_hash="").evaluations})
    if known and not any(known_hash.startswith(protocol_hash) for known_hash in known):
        raise ValueError(f"no run was scored by the protocol {protocol_hash}: choose from {', '.join(known)}")


def _configs_of(suite: dict[str, Any], settings: list[str]) -> "dict[str, RunConfig]":
    from bench import job
    from bench.suite import suite_configs

    return {config.run_id: config for config in suite_configs(suite, settings, job.make_config)}


def _results(target: Target, parsed: argparse.Namespace) -> "Results":
    """From runs where there are some, else from what was collected before."""
    from bench import show, tidy

    if target.runs:
        _write_floor(target)
        return show.results_of_runs(target.folder, target.runs)
    if target.runs is not None and not (target.folder / tidy.RESULTS).is_file():
        raise ValueError(f"no run of this suite has begun in {parsed.runs or RUNS}: start some with `tsbench sweep`")
    return show.results_of(target.folder, parsed.protocol)


def _write_floor(target: Target) -> None:
    """Real data against real data, by the protocol of the suite's runs. Their own files may lack settings that came later."""
    from bench.demo import write_floor

    assert target.runs
    scored = next((run for run in target.runs if run.evaluations), None)
    if scored is not None:
        write_floor(target.folder, target.configs[scored.run_id])


def run_collect(parsed: argparse.Namespace) -> int:
    from bench import show, tidy
    from bench.files import make_folder

    target = find_target(parsed)
    results = _results(target, parsed)
    make_folder(target.folder)
    kept = show.keep_runs(target.folder, _runs_to_show(target, parsed)) if parsed.keep_runs else []
    for path in [*tidy.write(results, target.folder), *kept]:
        print(path)
    return 0


def run_tables(parsed: argparse.Namespace) -> int:
    from bench import show

    if parsed.target in _published_names():
        return _published_table(parsed)
    if parsed.pictures and not parsed.check:
        raise ValueError("--pictures is for --check: draw figures with `tsbench plots`")
    target, allow = find_target(parsed), _allowed(parsed)
    if parsed.check:
        checked = show.check(target.folder, target.suite, parsed.protocol, allow, parsed.pictures)
        print("\n".join(checked.faults) or f"all that was checked in {target.folder} follows from its results")
        print("\n".join(checked.unchecked), end="\n" if checked.unchecked else "")
        return 1 if checked.faults else 0
    console = Console(width=None if Console().is_terminal else 160)  # into a file: no column is cut
    paths = show.write_tables(target.folder, _results(target, parsed), target.suite, console, parsed.protocol, allow)
    print("\n" + "\n".join(str(path) for path in paths))
    return 0


def run_plots(parsed: argparse.Namespace) -> int:
    from bench import show

    target = find_target(parsed)
    runs = _runs_to_show(target, parsed)
    if target.runs:
        _write_floor(target)
    for path in show.write_figures(target.folder, runs, target.suite):
        print(path)
    return 0


def _runs_to_show(target: Target, parsed: argparse.Namespace) -> "list[Run]":
    """Those of the suite that have begun, else those that are kept beside its results."""
    from bench import keep, show

    if target.runs is not None and not target.runs and not (target.folder / keep.RUNS).is_dir():
        raise ValueError(f"no run of this suite has begun in {parsed.runs or RUNS}: start some with `tsbench sweep`")
    return target.runs or show.find(target.folder, parsed.protocol)


def run_report(parsed: argparse.Namespace) -> int:
    from bench import report, tables
    from bench.files import make_folder, write_text_atomically
    from bench.runs import find_runs

    target, allow = find_target(parsed), _allowed(parsed)
    path = parsed.file or target.folder / "report.html"
    if path.is_dir():
        raise ValueError(f"--out is {path}, which is a folder: give the name of the HTML file")
    results = _results(target, parsed)
    made = tables.comparisons(results.frame, target.suite, parsed.protocol, allow)  # or a refusal, before anything is drawn
    runs = target.runs or find_runs(target.folder, parsed.protocol)
    given = {"suite": (parsed.suite or SUITE) if target.runs is None else "", "protocol": parsed.protocol, "allow": parsed.allow}
    material = report.Material(
        target=parsed.target,
        is_suite=target.runs is not None,
        settings=tuple(parsed.settings),
        options=tuple(word for name, value in given.items() if value for word in (f"--{name}", value)),
        suite=target.suite,
        results=results,
        tables=made,
        runs={run.run_id: run for run in runs},
        figures=report.draw_figures(target.folder, runs, target.suite) if runs else report.figures_in(target.folder / "figures"),
        docstrings=_docstrings(),
    )
    make_folder(path.parent)
    write_text_atomically(path, report.page_of(material))
    print(path)
    return 0


def _docstrings() -> dict[str, str]:
    """By method, that of its file."""
    import sys

    from bench import job

    return {name: sys.modules[method.__module__].__doc__ or "" for name, method in job.METHODS.items()}


def run_explain(parsed: argparse.Namespace) -> int:
    from bench import tables

    target, allow = find_target(parsed), _allowed(parsed)
    results = _results(target, parsed)
    made = tables.comparisons(results.frame, target.suite, parsed.protocol, allow)
    print(tables.explain(made, results, parsed.table, parsed.row, parsed.column))
    return 0


def _allowed(parsed: argparse.Namespace) -> tuple[str, ...]:
    from bench.tables import ALLOWABLE

    given = tuple(name for name in parsed.allow.split(",") if name)
    unknown = [name for name in given if name not in ALLOWABLE]
    if unknown:
        raise ValueError(f"--allow names {', '.join(unknown)}: choose from {', '.join(ALLOWABLE)}")
    return given


def _published_names() -> list[str]:
    from bench.published import published_names

    return published_names()


def _published_table(parsed: argparse.Namespace) -> int:
    """A paper's figures beside ours, and its coefficients as a figure; written only where --out says."""
    from bench.figures import style
    from bench.figures.published import published_mixing
    from bench.published import published_table, to_rich, write_published
    from bench.runs import find_runs

    for option in ("check", "pictures", "allow", "suite"):
        if getattr(parsed, option):
            raise ValueError(f"--{option} is for tables of our own runs: leave it out for {parsed.target}")
    if parsed.runs is None:
        table = published_table(parsed.target)
    else:
        from bench import job  # which takes seconds, as torch does

        found = find_runs(parsed.runs, parsed.protocol)
        table = published_table(parsed.target, found, parsed.settings, job.make_config)
    Console().print(to_rich(table))
    paths: list[Path] = []
    if parsed.out is not None:
        paths = write_published(table, parsed.out)
        with style.settings():
            for drawn in published_mixing(table):
                paths += style.save(drawn, parsed.out)
                print(f"\n{drawn.name}: {drawn.caption}")
    print("\n".join(str(path) for path in paths), end="\n" if paths else "")
    return 0
