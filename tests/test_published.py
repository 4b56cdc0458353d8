"""Do the published tables show the papers' figures unchanged, and what differs in ours?"""

import csv
import io
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from bench.job import make_config
from bench.published import published_names, published_table, read_facts, to_csv, to_latex, to_markdown, to_rich, write_published
from bench.published import table as table_module
from bench.published.table import config_without_methods, load_published_suite
from bench.settings import flat_settings
from bench.suite import suite_configs, suite_runs
from methods.backbone import SIZES

NAMES = published_names()
LATEX = shutil.which("pdflatex") or shutil.which("tectonic")


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


# Files


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
