"""Do the published tables show the papers' figures unchanged, ours beside them, and what differs?"""

import csv
import hashlib
import io
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from rich.console import Console

from bench.config import RunConfig
from bench.figures.published import published_mixing
from bench.figures.style import save, settings
from bench.job import make_config
from bench.published import facts as facts_module
from bench.published import published_names, published_table, read_facts, to_csv, to_latex, to_markdown, to_rich, write_published
from bench.published import table as table_module
from bench.published.facts import FOLDER
from bench.published.ours import SCORING
from bench.published.table import METRICS, config_without_methods, load_published_suite
from bench.runs import Run, find_runs
from bench.settings import flat_settings
from bench.suite import suite_configs, suite_runs
from bench.tables import TableRefusal
from methods.backbone import SIZES

FILES = {  # lines, and a checksum of what they say
    "diffmoe": (152, "e03fd4841d6f4a96"),
    "dit": (109, "a8ba8dbfac97db5a"),
    "dit_moe": (87, "67bae2430c543d74"),
    "dsmoe": (50, "a001cbf19a6b9e5f"),
    "dtr": (99, "69d1b3edb6f03b5e"),
    "others": (85, "7edec189565ce6f5"),
    "promoe": (151, "12194ba8fcd7ec85"),
    "race_dit": (142, "7cc0bb93dcf945da"),
    "remix_dit": (310, "055bb9671340bcc4"),
    "switch_dit": (66, "fab4a770796fa794"),
}
NAMES = published_names()
LATEX = shutil.which("pdflatex") or shutil.which("tectonic")


def checksum(facts: pd.DataFrame) -> str:
    return hashlib.sha256(facts.to_csv(index=False, lineterminator="\n").encode()).hexdigest()[:16]


# The figures


def test_every_file_is_known() -> None:
    assert {path.stem for path in FOLDER.glob("*.csv")} == {*FILES, "computed_costs"}


@pytest.mark.parametrize("name", FILES)
def test_the_figures_are_those_that_were_checked(name: str) -> None:
    facts = read_facts(name)
    assert (len(facts), checksum(facts)) == FILES[name]


def test_a_directions_metric_is_the_same_wherever_it_is_published() -> None:
    facts = pd.concat(read_facts(name) for name in FILES)
    told = facts[facts["higher_is_better"] != ""].groupby("metric")["higher_is_better"].nunique()
    assert (told == 1).all()
    words = {"lower": "false", "higher": "true"}
    known = facts[facts["metric"].isin([metric for metric, column in METRICS.items() if column.better])]
    told_here = known[known["higher_is_better"] != ""].drop_duplicates("metric").set_index("metric")["higher_is_better"]
    assert {metric: words[METRICS[metric].better] for metric in told_here.index} == told_here.to_dict()


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("source", " ", "no source in line 3"),
        ("confidence", "certain", "confidence other than primary, secondary, digitised in line 3"),
        ("higher_is_better", "yes", "higher_is_better"),
        ("arxiv", "2212.9748", "no arXiv number"),
        ("value", "12.5 FID", "no figure"),
        ("model", "", "an empty name"),
        ("model", "DiT-S/8", "there twice in line 3"),
    ],
)
def test_a_faulty_file_is_one_sentence(
    column: str, value: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = read_facts("dit")[lambda frame: frame["metric"] == "FID-50K"]
    facts.iloc[1, facts.columns.get_loc(column)] = value
    facts.to_csv(tmp_path / "dit.csv", index=False)
    monkeypatch.setattr(facts_module, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as refusal:
        read_facts("dit")
    assert words in str(refusal.value)


def test_missing_and_strange_files_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts_module, "FOLDER", tmp_path)
    (tmp_path / "strange.csv").write_text("a,b\n1,2\n")
    (tmp_path / "torn.csv").write_text('a,b\n"1,2\n')
    for name, words in (("none", "there is no file"), ("strange", "has the columns a, b"), ("torn", "cannot be read as CSV")):
        with pytest.raises(ValueError, match=rf"^[^\n]*{words}[^\n]*$"):
            read_facts(name)


# The tables


def test_the_tables_that_there_are() -> None:
    assert (
        sorted(
            ["dit.table4", "dtr.table1", "dtr.table2", "switch_dit.table2"]
            + [f"dit_moe.table{i}" for i in (1, 2, 3)]
            + [f"remix_dit.{name}" for name in ("table1", "table2", "table3", "figure4")]
        )
        == NAMES
    )
    with pytest.raises(ValueError, match=r"^there is no published table 'remix_dit.table9': choose one of dit.table4, [^\n]*$"):
        published_table("remix_dit.table9")
    with pytest.raises(ValueError, match="there is no published table 'demo'"):
        published_table("demo")


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_is_shown_as_it_was_printed(name: str) -> None:
    suite, table = load_published_suite(name), published_table(name)
    facts = read_facts(suite["published"]["facts"])
    for given, section in zip(suite["published"]["sections"], table.sections, strict=True):
        chosen = facts[(facts["table"] == given["table"]) & facts["setting"].str.contains(given.get("setting", ""), regex=False)]
        printed = sorted(chosen[["metric", "value", "confidence", "source"]].itertuples(index=False, name=None))
        cells = [cell for row in section.rows for cell in row.cells if cell.published]
        assert sorted((c.metric, c.published, c.confidence, c.source) for c in cells) == printed
        assert len(section.rows) == len(chosen.drop_duplicates(["setting", "model"]))
    text = to_markdown(table)
    for section in table.sections:
        for row in section.rows:
            assert all(cell.published in text for cell in row.cells)


@pytest.mark.parametrize("name", NAMES)
def test_every_suite_states_its_runs_and_what_differs(name: str) -> None:
    suite = load_published_suite(name)
    assert suite["name"] == name and suite["title"] and suite["settings"] and suite["notes"]
    assert suite["deviations"] and all(len(text) > 30 and text.endswith((".", ")")) for text in suite["deviations"])
    runs = suite_runs(suite, [], make_config)
    assert len({run.config.label for run in runs}) == len(runs)
    assert all(run.entry.get("published") or any(other.starts_from == run.config.run_id for other in runs) for run in runs)
    for run in runs:
        config = run.config
        assert config.data.name == "latents" and config.train.batch_size == 256
        assert config.diffusion.schedule == "linear" or config.diffusion.objective == "flow"
        assert config.train.ema_half_life_images == round(256 * np.log(0.5) / np.log(0.9999)) and config.train.ema_warmup == 0
        assert not Path(config.data.path).is_absolute() and config.budget.amount % 256 == 0
    own = {key for run in runs for key in flat_settings(asdict(run.config))}
    assert set(suite["settings"]) <= own
    assert all(setting.paper and setting.ours for setting in published_table(name).settings)


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_the_same_with_and_without_methods(name: str) -> None:
    """Without torch, the options that a suite does not give are not known: what is shown must be given."""
    suite = load_published_suite(name)
    for bare, full in zip(suite_runs(suite, [], config_without_methods), suite_runs(suite, [], make_config), strict=True):
        settings_of_bare, settings_of_full = (flat_settings(asdict(run.config)) for run in (bare, full))
        same = {key: settings_of_full[key] for key in settings_of_bare}
        assert {**settings_of_bare, "train.init_from": ""} == {**same, "train.init_from": ""}


def test_budgets_are_the_papers_steps() -> None:
    def steps(name: str) -> dict[str, float]:
        return {c.label: c.budget.amount / 256 for c in suite_configs(load_published_suite(name), [], make_config)}

    dit = steps("dit.table4")
    assert dit["DiT-S/8"] == 400e3 and dit["DiT-XL/2, 2352K steps"] == 2352e3 and dit["DiT-XL/2, 7000K steps"] == 7000e3
    assert dit["DiT-XL/2 at 512, 1301K steps"] == 1301e3 and dit["DiT-XL/2 at 512, 3000K steps"] == 3000e3
    assert {*steps("switch_dit.table2").values(), *steps("dtr.table1").values(), *steps("dtr.table2").values()} == {400e3}
    remix = steps("remix_dit.table1")
    assert remix["DiT-L/2-1M"] == remix["DiT-S/2-1M"] == 1e6 and remix["DiT-S/2-2M"] == 2e6
    assert remix["Remix-L-4-20"] == remix["L/2 multi-expert"] == remix["L/2 continued"] == 100e3
    assert {label: n for label, n in steps("remix_dit.table2").items() if n != 10e3} == {"DiT-S/2-2M": 2e6}


def test_layouts_of_single_tables() -> None:
    remix = published_table("remix_dit.table1")
    (section,) = remix.sections
    assert [row.label for row in section.rows][:4] == [
        "DiT-L/2-1M",
        "DiT-L/2-1M + 100k Cont. Training",
        "DiT-L/2-1M + 100k Multi Experts 8xL",
        "DiT-L/2-1M + 100k Remix-L-4-20",
    ]
    row = dict(zip(section.metrics, section.rows[3].cells, strict=True))
    assert (row["FID"].published, row["FID"].ours) == ("3.22", "")
    assert (row["TotalParams_M"].published, row["TotalParams_M"].ours) == ("4x458.10", "1,364.47")
    assert (row["Gflops"].published, row["Gflops"].ours) == ("80.79", "80.70")
    lines = to_markdown(remix).splitlines()
    wanted = "| 4x458.10 | 1,364.47 | 458.1 | 457.84 | 80.79 | 80.70 | 3.22 | – | 207.54 | – | 0.8175 | – | 0.5451 | – |"
    assert f"| DiT-L/2-1M + 100k Remix-L-4-20 {wanted}" in lines
    assert [len(section.rows) for section in published_table("remix_dit.table2").sections] == [4, 2, 7]
    assert [len(section.rows) for section in published_table("remix_dit.figure4").sections] == [20, 8]
    assert [len(section.rows) for section in published_table("dit.table4").sections] == [12, 1, 1, 1, 1, 3]


def test_one_run_may_stand_for_several_rows() -> None:
    linked = [run.entry["published"] for run in suite_runs(load_published_suite("remix_dit.table2"), [], make_config)]
    assert ["Softmax Mixer", "Global Mixer", "Remix-S-4-20"] in linked


def test_figures_that_are_not_the_papers_print_are_marked() -> None:
    table = published_table("dtr.table2")
    for text in (to_markdown(table), to_latex(table)):
        assert text.count("20.98") == 1 and text.count("12.59") == 1
    assert "| ≈20.98 |" in to_markdown(table) and "| 12.59 |" in to_markdown(table) and "| §5.85 |" in to_markdown(table)
    assert r"$\approx$20.98" in to_latex(table) and r"\S{}5.85" in to_latex(table)
    assert any(note.startswith("≈: digitised") for note in table.notes) and any(n.startswith("§: secondary") for n in table.notes)
    others = [note for name in NAMES if name != "dtr.table2" for note in published_table(name).notes]
    assert not any(note.startswith(("≈", "§")) for note in others)
    lines = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert {line["confidence"] for line in lines} == {"primary", "digitised", "secondary"}


def test_nothing_is_ranked() -> None:
    for name in NAMES:
        table = published_table(name)
        rows = [line for line in to_markdown(table).splitlines() if line.startswith("| ")]
        assert not any("**" in row or "<ins>" in row for row in rows)
        assert not any((r"\textbf" in line and "&" in line) or r"\underline" in line for line in to_latex(table).splitlines())


def test_printing_needs_no_torch() -> None:
    code = (
        "import sys; from bench.published import *; t = published_table('remix_dit.figure4'); "
        "to_rich(t), to_markdown(t), to_latex(t), to_csv(t); "
        "from bench.figures.published import published_mixing; published_mixing(t); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_entry_whose_row_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = load_published_suite("dit.table4")
    for change in ({"published": "DiT-H/2"}, {"published": "DiT-S/4"}, {"published": "DiT-XL/2"}):
        sizes = suite["groups"]["sizes"]
        entries = [{**sizes["methods"][0], **change}, *sizes["methods"][1:]]
        altered = {**suite, "groups": {**suite["groups"], "sizes": {**sizes, "methods": entries}}}
        monkeypatch.setattr(table_module, "load_published_suite", lambda name, altered=altered: altered)
        with pytest.raises(ValueError, match=r"^DiT-S/[84] in the suite dit.table4 stands for the published row [^\n]*$"):
            published_table("dit.table4")


def test_the_widths_and_depths_are_those_of_our_sizes() -> None:
    (section,) = published_table("dit_moe.table1").sections
    for row in section.rows:
        cells = dict(zip(section.metrics, row.cells, strict=True))
        shape = tuple(int(cells[metric].published) for metric in ("n_blocks", "hidden_dim", "n_heads"))
        assert SIZES[row.label.partition("/")[0]] == shape


# Ours, from runs


def write_run(root: Path, config: RunConfig, fid: float, protocol_hash: str = "0123456789", **protocol: Any) -> Path:
    """A finished run of these settings, as a folder."""
    folder = root / "runs" / config.run_id
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    scoring = {key: value for key, value in asdict(config.evaluation).items() if key in SCORING}
    metrics = {"fid_train": fid, "inception_score": 100 + fid, "precision": 0.5, "recall": 0.25}
    record = {
        "protocol_hash": protocol_hash,
        "protocol": {**scoring, **protocol},
        "n": scoring["num_samples"],
        "metrics": metrics,
    }
    (folder / "eval.json").write_text(json.dumps([{**record, "metrics": metrics}]))
    (folder / "summary.json").write_text(json.dumps({"train_images_per_second": 512.0, "peak_memory_bytes": 3 * 2**30}))
    if "experts" in config.options:
        rng = np.random.default_rng(config.seed)
        values = rng.dirichlet(np.ones(config.options["bases"]), config.options["experts"])
        axes = np.array(["expert", "basis"])
        np.savez(folder / "diagnostics.npz", **{"mixing_coefficients": values, "mixing_coefficients/axes": axes})
    (folder / "done").touch()
    return folder


def config_of(name: str, label: str, seed: int = 0, *settings: str) -> RunConfig:
    runs = suite_runs(load_published_suite(name), [*settings], make_config)
    return replace(next(run.config for run in runs if run.config.label == label), seed=seed)


def ours(table: Any, row: str, metric: str) -> str:
    found = [r for section in table.sections for r in section.rows if r.label == row]
    return next(cell.ours for cell in found[0].cells if cell.metric == metric)


def test_finished_runs_fill_their_row_with_the_mean_over_seeds(tmp_path: Path) -> None:
    for seed, fid in enumerate((8.0, 9.0, 10.0)):
        write_run(tmp_path, config_of("dtr.table1", "DiT-L/2 + DTR", seed), fid)
    write_run(tmp_path, config_of("dtr.table1", "DiT-L/2"), 12.0)
    table = published_table("dtr.table1", find_runs(tmp_path), make_config=make_config)
    assert ours(table, "DiT + DTR", "FID-50K") == "9.00 ± 2.48"  # 4.303 / sqrt(3)
    assert ours(table, "DiT", "FID-50K") == "12.00" and ours(table, "DiT", "IS") == "112.00"
    assert ours(table, "DiT + R-TR (random routing)", "FID-50K") == ""
    elsewhere = [row for section in table.sections[1:] for row in section.rows for cell in row.cells if cell.ours]
    assert elsewhere == []  # the other sections have rows of the same name
    assert any(note.startswith("Ours from 4 finished runs") and "1 to 3" in note for note in table.notes)
    published = published_table("dtr.table1")
    assert [c.published for s in table.sections for r in s.rows for c in r.cells] == [
        c.published for s in published.sections for r in s.rows for c in r.cells
    ]
    lines = {(line["row"], line["metric"]): line for line in csv.DictReader(io.StringIO(to_csv(table)))}
    assert lines["DiT + DTR", "FID-50K"]["ours_from"] == "runs" and lines["DiT + DTR", "FID-50K"]["num_seeds"] == "3"


def test_other_settings_other_scoring_and_unfinished_runs_do_not_count(tmp_path: Path) -> None:
    write_run(tmp_path, config_of("dtr.table1", "DiT-L/2", 0, "train.lr=2e-4"), 1.0)
    write_run(tmp_path, config_of("dtr.table1", "DiT-L/2 + DTR"), 2.0, num_samples=10_000)
    folder = write_run(tmp_path, config_of("dtr.table1", "DiT-L/2 + R-TR"), 3.0)
    (folder / "done").unlink()
    table = published_table("dtr.table1", find_runs(tmp_path), make_config=make_config)
    assert not any(cell.ours for section in table.sections for row in section.rows for cell in row.cells)
    notes = "\n".join(table.notes)
    assert f"{folder.name} is planned, not done" in notes and "is not scored as the suite says" in notes
    there = published_table("dtr.table1", find_runs(tmp_path), ["train.lr=2e-4"], make_config)
    assert ours(there, "DiT", "FID-50K") == "1.00"


def test_two_protocols_in_one_section_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path, config_of("dtr.table1", "DiT-L/2"), 12.0)
    write_run(tmp_path, config_of("dtr.table1", "DiT-L/2 + DTR"), 9.0, "other", reference_sha256="ab")
    with pytest.raises(TableRefusal, match=r"^runs of one section were scored by [^\n]*reference_sha256[^\n]*$"):
        published_table("dtr.table1", find_runs(tmp_path), make_config=make_config)
    only = published_table("dtr.table1", find_runs(tmp_path, "other"), make_config=make_config)
    assert ours(only, "DiT + DTR", "FID-50K") == "9.00" and ours(only, "DiT", "FID-50K") == ""


def test_speed_and_memory_come_from_runs(tmp_path: Path) -> None:
    write_run(tmp_path, config_of("remix_dit.table3", "Remix-B/2-4-20"), 1.0)
    table = published_table("remix_dit.table3", find_runs(tmp_path), make_config=make_config)
    assert ours(table, "Remix-B/2-4-20", "steps_per_sec") == "2.00" and ours(table, "Remix-B/2-4-20", "gpu_mem_MiB") == "3,072"
    assert ours(table, "Remix-B/2-4-20", "latency_mixing_ms") == "" and ours(table, "DiT-B/2", "steps_per_sec") == ""


# Files and figures


def test_the_files_are_written_and_the_same_each_time(tmp_path: Path) -> None:
    table = published_table("remix_dit.table1")
    paths = write_published(table, tmp_path / "out")
    assert [path.name for path in paths] == [f"remix_dit.table1.{suffix}" for suffix in ("md", "tex", "csv")]
    first = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write_published(published_table("remix_dit.table1"), tmp_path / "out")] == first
    with pytest.raises(ValueError, match="cannot write"):
        write_published(table, paths[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_terminal_shows_every_row_and_deviation(name: str) -> None:
    table = published_table(name)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(to_rich(table))
    shown = " ".join(console.export_text().split())
    assert all(text in shown for text in (*table.deviations, table.title)) and "…" not in shown
    assert max(map(len, console.export_text().splitlines() or [""])) <= 100


@pytest.mark.skipif(LATEX is None, reason="no pdflatex or tectonic is installed")
def test_latex_compiles(tmp_path: Path) -> None:
    tables = "\n\\clearpage\n".join(to_latex(published_table(name)) for name in NAMES)
    document = "\\documentclass{article}\n\\usepackage[utf8]{inputenc}\n\\usepackage{booktabs,graphicx}\n"
    (tmp_path / "all.tex").write_text(f"{document}\\begin{{document}}\n{tables}\n\\end{{document}}\n")
    done = subprocess.run([str(LATEX), "all.tex"], cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


def draw(table: Any, folder: Path) -> list[Path]:
    folder.mkdir()
    with settings():
        return [path for drawn in published_mixing(table) for path in save(drawn, folder)]


def test_published_coefficients_are_drawn_alone_and_beside_ours(tmp_path: Path) -> None:
    paths = draw(published_table("remix_dit.figure4"), tmp_path / "alone")
    assert [path.suffix for path in paths] == [".png", ".pdf", ".csv"]
    alone = pd.read_csv(paths[2])
    assert list(alone.groupby("panel", sort=False).size()) == [80, 32]
    facts = read_facts("remix_dit")
    published = facts[facts["table"].isin(["Figure 4a", "Figure 4b"])]["value"].astype(float)
    assert list(alone["coefficient"]) == list(published)
    assert list(alone["start"][:5]) == [0, 0, 0, 0, 50] and list(alone["stop"][-2:]) == [1000, 1000]
    assert draw(published_table("remix_dit.figure4"), tmp_path / "again")[0].read_bytes() == paths[0].read_bytes()

    folders = [write_run(tmp_path, config_of("remix_dit.figure4", "Remix-S-4-8", seed), 1.0) for seed in (0, 1)]
    table = published_table("remix_dit.figure4", find_runs(tmp_path), make_config=make_config)
    beside = draw(table, tmp_path / "beside")
    shown = pd.read_csv(beside[2])
    panels = list(dict.fromkeys(shown["panel"]))
    assert len(panels) == 3 and panels[2].endswith("8 experts, ours (2 seeds)")
    mean = np.mean([Run(folder).diagnostics["mixing_coefficients"].values for folder in folders], axis=0)
    np.testing.assert_allclose(shown[shown["panel"] == panels[2]]["coefficient"], mean.ravel(), atol=1e-5)
    assert imread(beside[0]).shape[0] > imread(paths[0]).shape[0]


def test_the_caption_of_published_coefficients_says_whose_they_are(tmp_path: Path) -> None:
    alone = published_mixing(published_table("remix_dit.figure4"))[0].caption
    assert "as published in Remix-DiT, arXiv" in alone and "none of ours is run" in alone and alone.endswith(".")
    write_run(tmp_path, config_of("remix_dit.figure4", "Remix-S-4-8", 0), 1.0)
    beside = published_mixing(published_table("remix_dit.figure4", find_runs(tmp_path), make_config=make_config))[0].caption
    assert "ours below, as the mean over seeds" in beside


def test_tables_without_coefficients_have_no_figure() -> None:
    assert published_mixing(published_table("remix_dit.table1")) == []
