"""How does a table of a paper stand beside ours: which rows, which metrics, which settings, and what differs?

A suite with a header `published` says which published figures make up the table, in sections, and each of its entries which
row it stands for. Published and own figures stand side by side; nothing here ranks them, or averages one with the other.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import pandas as pd

from bench.config import RunConfig
from bench.published.costs import FILE, read_costs
from bench.published.facts import read_facts
from bench.published.ours import OwnRuns, gather
from bench.runs import Run
from bench.settings import flat_settings, resolve
from bench.suite import FOLDER, MakeConfig, SuiteRun, load_suite, suite_runs
from bench.tables.numbers import Style, write_seeds

MISSING = "–"
SIGNS = {"digitised": "≈", "secondary": "§"}  # by confidence
SIGN_NOTES = {
    "digitised": "≈: digitised from a figure, not printed as a number.",
    "secondary": "§: secondary, a figure of one paper as another source quotes it.",
}
EXPERT = re.compile(r"(?P<row>.*) expert (?P<index>\d+)")  # a published row that is one expert of a network
NUM_SETTINGS_SHOWN = 4  # different values of one setting; more are said to be as in the rows


class Metric(NamedTuple):
    """A published metric as a column, and the one beside it for ours: computed from the network, or from runs.

    `decimals`: of ours at least, where the paper prints fewer. `block`: cost or quality, as terminals are narrow.
    """

    title: str
    block: str
    better: str = ""
    computed: str = ""  # a column of computed_costs.csv
    from_runs: str = ""
    divisor: float = 1.0
    decimals: int = 0

    @property
    def has_ours(self) -> bool:
        """Not where the column says what the row is, as its number of blocks."""
        return bool(self.computed or self.from_runs or self.better)


def _count(title: str, computed: str) -> Metric:
    return Metric(title, "cost", computed=computed, divisor=1e6, decimals=1)


METRICS = {
    "TotalParams_M": _count("Stored params (M)", "stored_parameters"),
    "ActParams_M": _count("Active params (M)", "active_parameters"),
    "Params_M": _count("Params (M)", "active_parameters"),
    "n_blocks": Metric("Blocks", "cost"),
    "hidden_dim": Metric("Width", "cost"),
    "n_heads": Metric("Heads", "cost"),
    "Gflops": Metric("Forward / image (G MACs)", "cost", computed="forward_macs_per_image", divisor=1e9, decimals=2),
    "steps_per_sec": Metric("Training steps/s", "cost", "higher", from_runs="train_steps_per_second", decimals=2),
    "gpu_mem_MiB": Metric("Device memory (MiB)", "cost", "lower", from_runs="peak_memory_bytes", divisor=2**20),
    "latency_mixing_ms": Metric("Latency, mixing (ms)", "quality", "lower"),
    "latency_precomputed_ms": Metric("Latency, mixed before (ms)", "quality", "lower"),
    "FID": Metric("FID", "quality", "lower", from_runs="fid_train"),
    "FID-50K": Metric("FID-50K", "quality", "lower", from_runs="fid_train"),
    "FID-10K": Metric("FID-10K", "quality", "lower", from_runs="fid_train"),
    "sFID": Metric("sFID", "quality", "lower", from_runs="sfid"),
    "IS": Metric("IS", "quality", "higher", from_runs="inception_score"),
    "IS-10K": Metric("IS-10K", "quality", "higher", from_runs="inception_score"),
    "Precision": Metric("Precision", "quality", "higher", from_runs="precision"),
    "Precision-10K": Metric("Precision-10K", "quality", "higher", from_runs="precision"),
    "Recall": Metric("Recall", "quality", "higher", from_runs="recall"),
    "Recall-10K": Metric("Recall-10K", "quality", "higher", from_runs="recall"),
    **{f"alpha_basis{i}": Metric(f"Basis {i}", "quality", from_runs=f"alpha_basis{i}") for i in range(1, 9)},
}


class Cell(NamedTuple):
    """`published` as printed, "" where the paper has none, with its confidence and source."""

    metric: str
    published: str
    confidence: str
    source: str
    ours: str  # "" where there is none, or none can be
    values: tuple[float, ...]  # of ours, one a seed

    @property
    def shown(self) -> str:
        """Marked where it is not the paper's own print."""
        return f"{SIGNS.get(self.confidence, '')}{self.published}" or MISSING


class Row(NamedTuple):
    label: str
    cells: tuple[Cell, ...]  # in the order of the section's metrics


@dataclass(frozen=True)
class Section:
    title: str
    setting: str  # the paper's, in words
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]


class Setting(NamedTuple):
    name: str
    paper: str
    ours: str


@dataclass(frozen=True)
class PublishedTable:
    """A table of a paper beside ours; everything is text."""

    name: str
    title: str
    paper: str  # with its arXiv number
    sections: tuple[Section, ...]
    settings: tuple[Setting, ...]
    notes: tuple[str, ...]
    deviations: tuple[str, ...]


@dataclass(frozen=True)
class _Material:
    """What the sections are made from."""

    suite: str
    linked: Mapping[tuple[str, str], SuiteRun]  # (section, published row) -> the run that stands for it
    costs: Mapping[tuple[str, str], Mapping[str, int]]
    own: OwnRuns


def published_names() -> list[str]:
    """The tables there are."""
    return [path.stem for path in sorted(FOLDER.glob("*.*.yaml")) if "published" in load_suite(path.stem)]


def published_table(
    name: str, runs: Iterable[Run] | None = None, overrides: Sequence[str] = (), make_config: MakeConfig | None = None
) -> PublishedTable:
    """The published table PAPER.TABLE, with ours from finished `runs` that have the settings of its suite (seed aside).

    With `runs`, `make_config` (bench.job's) must fill in the defaults of methods; without, no torch is needed. `overrides`
    (`key=value`) are those that the runs were made with. ValueError for an unknown table, TableRefusal (exit code 3) where
    the runs of one section were scored by different protocols.
    """
    assert runs is None or make_config is not None
    suite = load_published_suite(name)
    header = suite["published"]
    facts = read_facts(header["facts"])
    parts = {str(section["name"]): _facts_of(facts, section, name) for section in header["sections"]}
    shown = suite_runs(suite, list(overrides), config_without_methods)
    own_runs = suite_runs(suite, list(overrides), make_config) if make_config else shown
    own = gather(runs or [], [run.config for run in own_runs])
    material = _Material(name, _link(own_runs, parts, name), read_costs(), own)
    sections = tuple(_section(section, parts[str(section["name"])], material) for section in header["sections"])
    return PublishedTable(
        name=name,
        title=str(suite["title"]),
        paper=f"{facts['paper'].iloc[0]}, arXiv {facts['arxiv'].iloc[0]}",
        sections=sections,
        settings=tuple(_setting(key, str(paper), shown) for key, paper in suite["settings"].items()),
        notes=(*legend(sections, own if runs is not None else None), *suite.get("notes", [])),
        deviations=tuple(suite["deviations"]),
    )


def load_published_suite(name: str) -> dict[str, Any]:
    """The suite that stands for a published table; ValueError if there is none of this name."""
    suite = load_suite(name) if (FOLDER / f"{name}.yaml").is_file() else {}
    if "published" not in suite:
        raise ValueError(f"there is no published table {name!r}: choose one of {', '.join(published_names())}")
    return suite


def config_without_methods(tree: dict[str, Any], overrides: list[str]) -> RunConfig:
    """As bench.job.make_config, but of a method's options it knows those that are given."""
    return resolve(tree, overrides, {str(tree["method"]): tree.get("options") or {}})


def _facts_of(facts: pd.DataFrame, section: Mapping[str, Any], name: str) -> pd.DataFrame:
    """The figures of one section: those of its table, where the setting holds the words that the section gives."""
    chosen = facts[(facts["table"] == section["table"]) & facts["setting"].str.contains(section.get("setting", ""), regex=False)]
    if chosen.empty:
        raise ValueError(f"section {section['name']} of {name} names no published figures: correct its table or setting")
    return chosen


def _link(own_runs: Sequence[SuiteRun], parts: Mapping[str, pd.DataFrame], name: str) -> dict[tuple[str, str], SuiteRun]:
    rows = {section: {_row_of(model)[0] for model in part["model"]} for section, part in parts.items()}
    linked: dict[tuple[str, str], SuiteRun] = {}
    for run in own_runs:
        given = run.entry.get("published") or []
        for row in [given] if isinstance(given, str) else given:
            places = [(s, row) for s in rows if row in rows[s] and s == str(run.entry.get("section", s))]
            if len(places) != 1 or places[0] in linked:
                raise ValueError(
                    f"{run.config.label} in the suite {name} stands for the published row {row!r}, which is in {len(places)} "
                    "sections or has a run already: give `published`, and `section` where rows of two have one name"
                )
            linked[places[0]] = run
    return linked


def _row_of(model: str) -> tuple[str, int | None]:
    """The row's name, and which of its experts it is."""
    match = EXPERT.fullmatch(model)
    return (match["row"], int(match["index"])) if match else (model, None)


def _section(given: Mapping[str, Any], part: pd.DataFrame, material: _Material) -> Section:
    order = list(METRICS)
    metrics = tuple(sorted(dict.fromkeys(part["metric"]), key=order.index))
    styles = {metric: _style(metric, part.loc[part["metric"] == metric, "value"]) for metric in metrics}
    one_setting = part["setting"].nunique() == 1
    rows = []
    for (model, setting), figures in part.groupby(["model", "setting"], sort=False):
        printed = {figure["metric"]: figure for figure in figures.to_dict("records")}
        cells = tuple(_cell(str(given["name"]), str(model), m, printed.get(m), styles[m], material) for m in metrics)
        rows.append(Row(str(model) if one_setting else f"{model}, {setting}", cells))
    material.own.check_protocols()
    return Section(str(given["title"]), str(part["setting"].iloc[0]) if one_setting else "", metrics, tuple(rows))


def _cell(section: str, model: str, metric: str, figure: Mapping[Any, Any] | None, style: Style, material: _Material) -> Cell:
    row, expert = _row_of(model)
    run, column = material.linked.get((section, row)), METRICS[metric]
    values: list[float] = []
    if run is not None and column.computed:
        if (material.suite, run.config.label) not in material.costs:
            raise ValueError(f"{FILE} lacks {run.config.label} of {material.suite}: compute it again, as its README says")
        values = [material.costs[material.suite, run.config.label][column.computed]]
    elif run is not None and column.from_runs:
        values = material.own.values(run.config, column.from_runs, expert)
    ours = write_seeds(values, style) if values else ""
    if figure is None:
        return Cell(metric, "", "", "", ours, tuple(values))
    return Cell(metric, figure["value"], figure["confidence"], figure["source"], ours, tuple(values))


def _style(metric: str, published: Iterable[str]) -> Style:
    """As many decimals as the paper prints, or more."""
    printed = [len(text.partition(".")[2]) for text in published]
    return Style(METRICS[metric].divisor, max(METRICS[metric].decimals, *printed))


def _setting(name: str, paper: str, shown: Sequence[SuiteRun]) -> Setting:
    values = [flat_settings(asdict(run.config)).get(name) for run in shown if run.entry.get("published")]
    texts = list(dict.fromkeys(_write(value) for value in values if value is not None))
    return Setting(name, paper, " or ".join(texts) if len(texts) <= NUM_SETTINGS_SHOWN else "as in the rows")


def _write(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:,.10g}" if isinstance(value, int | float) else str(value)


def legend(sections: Sequence[Section], own: OwnRuns | None) -> list[str]:
    """What a reader must know of every such table; `own` where runs were looked for."""
    columns = [METRICS[metric] for section in sections for metric in section.metrics]
    cells = [cell for section in sections for row in section.rows for cell in row.cells]
    notes = ["Published figures as they were printed, ours beside them: never ranked together, never averaged with each other."]
    if any(cell.ours and METRICS[cell.metric].computed for cell in cells):
        notes.append("Ours, computed: counted from our networks, for which nothing is trained. Forward counts matrix products.")
    confidences = {cell.confidence for cell in cells}
    notes += [note for confidence, note in SIGN_NOTES.items() if confidence in confidences]
    notes.append(f"{MISSING}: not published, or not run here.")
    notes.append(f"Sources: {'; '.join(dict.fromkeys(cell.source for cell in cells if cell.source))}.")
    if own is not None and any(column.from_runs for column in columns):
        used = [run for runs in own.runs.values() for run in runs]
        notes.append(f"Ours from {len(used)} finished runs with the settings of this suite. {own.seeds_note}".strip())
        notes += own.notes
    return notes
