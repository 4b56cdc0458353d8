"""Does a report say what its results say, with everything in it, and the same bytes for the same results?"""

import base64
import html
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import assert_refused, contents, tsbench
from fake_runs import SUITE, write_fake_runs
from PIL import Image
from reporting import DOCSTRING, ENTRIES, grouped_suite, material_of, picture, runs_of_three, section, text_of

from bench import tidy
from bench.arrays import read_samples
from bench.files import read_yaml
from bench.report import Material, draw_figures, figures_in, page_of
from bench.report.chart import MOST_POINTS, Line, chart
from bench.report.material import Figures
from bench.report.methods import about
from bench.report.pictures import CELL_PIXELS, contact_sheet, smaller
from bench.report.summary import verdict
from bench.runs import find_runs
from bench.tables import TableRefusal, comparisons, part_to_html

DEMO = Path(__file__).parent.parent / "results" / "reference" / "demo"
LABELS = [entry["label"] for entry in ENTRIES]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder = tmp_path_factory.mktemp("report")
    return material_of(runs_of_three(folder), grouped_suite(folder))


@pytest.fixture(scope="module")
def page(material: Material) -> str:
    return page_of(material)


def ids_in(page: str) -> list[str]:
    return re.findall(r' id="([^"]+)"', page)


def test_the_same_results_give_the_same_bytes(material: Material, page: str) -> None:
    again = find_runs(next(iter(material.runs.values())).path.parent.parent)[::-1]
    assert page_of(replace(material, runs={run.run_id: run for run in again})) == page


def test_nothing_is_fetched_from_elsewhere(page: str) -> None:
    assert not re.search(r"https?:|@import|url\(", page)
    sources = re.findall(r'\b(?:src|href)="([^"]*)"', page)
    assert sources and all(source.startswith(("data:", "#")) for source in sources)


def test_every_link_and_every_cell_leads_to_something_in_the_page(material: Material, page: str) -> None:
    ids = ids_in(page)
    assert len(ids) == len(set(ids))
    assert {link for link in re.findall(r'href="#([^"]+)"', page)} <= set(ids)
    behind = {run for runs in re.findall(r'data-runs="([^"]*)"', page) for run in runs.split()} - {tidy.FLOOR}
    assert behind == set(material.runs) and {f"run-{run}" for run in behind} <= set(ids)


def test_the_tables_are_those_of_the_comparison(material: Material, page: str) -> None:
    assert len(material.tables) == 2
    for table in material.tables:
        for part in table.parts:
            assert part_to_html(part, material.results.frame) in page
        for note in table.notes:
            assert f"<li>{note}</li>" in html.unescape(page)


def test_each_group_has_its_section_with_its_tables_views_and_figures(page: str) -> None:
    scratch, tuned = section(page, "comparison-scratch"), section(page, "comparison-tuned")
    assert "<h2>From scratch</h2>" in scratch and "<h2>Tuned</h2>" in tuned
    assert LABELS[0] in scratch and LABELS[0] not in text_of(tuned) and LABELS[2] in tuned
    for text in (scratch, tuned):
        assert re.findall(r'role="tab"[^>]*>([^<]+)<', text) == ["Equal images", "Equal training FLOPs", "Equal device time"]
        assert text.count('role="tabpanel"') == 3
    assert 'id="figure-scratch-samples"' in scratch and 'id="figure-tuned-samples"' in tuned


def test_a_picture_that_two_groups_share_is_in_the_page_once(page: str) -> None:
    assert "data:image/png" in section(page, "comparison-scratch") and "data:image/png" not in section(page, "comparison-tuned")
    assert '<a href="#figure-scratch-samples">' in section(page, "comparison-tuned")
    assert "What to see." in section(page, "comparison-scratch") and "The same." in section(page, "comparison-tuned")


def test_the_summary_names_the_rows_that_have_the_mark(material: Material, page: str) -> None:
    table = material.tables[0]
    quality = next(part for part in table.parts if part.title == "Quality")
    told = {score.score: score for score in verdict(table).scores}
    for column, heading in enumerate(quality.headings):
        best = [f"{row.label}: {row.cells[column].text}" for row in quality.rows if row.cells[column].mark == "best"]
        assert (told[heading].best if heading in told else "") == "; ".join(best)
    assert len(told) >= 6 and "±" in told["FID (train) ↓"].best
    summary = text_of(section(page, "summary"))
    assert "9, all finished" in summary and "256,000 training images" in summary and "0, 1, 2" in summary


def test_few_seeds_are_called_chance_and_three_are_not(material: Material, tmp_path: Path) -> None:
    assert verdict(material.tables[0]).caution == ""
    runs = write_fake_runs(tmp_path, ENTRIES[:2])
    (table,) = comparisons(tidy.tidy(runs), SUITE)
    assert "1 seed in a row: which is best may be chance" in verdict(table).caution


def test_differences_are_told_as_far_as_their_interval_excludes_zero(material: Material) -> None:
    table = material.tables[0]
    paired = next(part for part in table.parts if part.title.startswith("Difference"))
    clear = [(row, i) for row in paired.rows for i, cell in enumerate(row.cells) if cell.mark == "clear"]
    told = verdict(table).differences
    for row, i in clear:
        assert f"{row.label} in {paired.headings[i]} ({row.cells[i].text})" in told
    none = replace(
        paired, rows=tuple(row._replace(cells=tuple(cell._replace(mark="") for cell in row.cells)) for row in paired.rows)
    )
    assert verdict(replace(table, parts=(none,))).differences.endswith("excludes zero: none.")


def test_a_run_has_its_settings_samples_curves_and_provenance(material: Material, page: str) -> None:
    run_id, run = next(iter(material.runs.items()))
    start = page.index(f'id="run-{run_id}"')
    own = page[start : page.index('<details class="run"', start)]
    settings = re.search(r"<summary>All settings</summary><pre[^>]*><code>(.*?)</code>", own, re.S)
    assert settings
    path = run.path.parent / "again.yaml"
    path.write_text(html.unescape(settings[1]))
    assert read_yaml(path) == run.config
    sheet = re.search(r'src="data:image/png;base64,([^"]+)"', own)
    samples = read_samples(run.path)
    assert sheet and samples is not None
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(sheet[1]))).convert("L"))
    assert (shown[:8, :8] == samples[0, ..., 0]).all() and (shown[9:17, 9:17] == samples[11, ..., 0]).all()
    assert own.count("<svg") == 2 and "held-out loss, from" in own and "FID over training" in own
    assert "b02412e5d3c4b5a69788796a5b4c3d2e1f000000, clean" in own
    fid = run.evaluations[-1]["metrics"]["fid_train"]
    shown_fid = re.search(r'data-metric="fid_train"><dt>[^<]*</dt><dd>([^<]+)</dd>', own)
    assert shown_fid and float(shown_fid[1]) == pytest.approx(fid, abs=0.005)


def test_results_without_their_runs_say_what_cannot_be_shown(material: Material) -> None:
    page = page_of(replace(material, runs={}, figures=figures_in(Path("nowhere"))))
    assert page.count("its curves and samples cannot be shown") == len(material.runs)
    assert "held-out loss, from" not in page and page.count("FID over training") == len(material.runs)
    assert "No figures: neither runs nor figures are beside these results" in page


def test_runs_without_records_say_so(material: Material) -> None:
    page = page_of(replace(material, runs={}, results=material.results._replace(records={})))
    assert page.count("Its provenance is not kept") == len(material.runs)


def test_what_is_not_known_of_other_budgets_is_said(tmp_path: Path) -> None:
    runs = runs_of_three(tmp_path, seeds=(0,), curve=())
    views = section(page_of(material_of(runs, grouped_suite(tmp_path))), "comparison-scratch").split('role="tabpanel"')[1:]
    assert "The runs were trained for this budget, so the tables above are this view" in views[0]
    assert all("Not known: none of these runs was scored on its way (evaluation.curve_every)" in view for view in views[1:])


def test_runs_that_have_not_ended_are_counted_and_nothing_is_said_of_their_budgets(tmp_path: Path) -> None:
    runs = runs_of_three(tmp_path, seeds=(0,), curve=())
    for name in ("done", "summary.json", "eval.json", "provenance.json"):
        (runs[1].path / name).unlink()
    again = find_runs(tmp_path)
    results = tidy.gather(again)
    suite = grouped_suite(tmp_path)
    with pytest.raises(TableRefusal, match="not done"):
        comparisons(results.frame, suite)
    tables = comparisons(results.frame, suite, allow=["incomplete"])
    material = material_of(runs_of_three(tmp_path / "other"), suite, results=results, tables=tables)
    page = page_of(replace(material, runs={run.run_id: run for run in again}))
    assert "3, of which 1 planned" in text_of(section(page, "summary"))
    assert "b02412e5d3 clean" in page and "no commit" not in section(page, "summary")
    scratch = section(page, "comparison-scratch")
    assert "Shown although runs " in scratch and "<h2>From scratch</h2>" in scratch
    assert scratch.count("Not known: not every one of these runs has ended") == 3
    assert page.count('<strong class="state">planned</strong>') == 1


def test_what_others_wrote_is_text(material: Material) -> None:
    strange = '<img src=x onerror="alert(1)">'
    suite = {**material.suite, "title": strange}
    figures = Figures((material.figures.shown[0]._replace(caption=strange),))
    page = page_of(replace(material, suite=suite, figures=figures, docstrings={ENTRIES[0]["method"]: strange}))
    assert strange not in page and page.count(html.escape(strange).replace("&quot;", "&#34;")) >= 4


def test_deviations_come_from_the_docstring() -> None:
    assert about("one", DOCSTRING) == (
        "one",
        "One",
        "One: a made-up method.",
        "Nobody, arXiv 0000.00000.",
        "it does not `exist`, and never did.",
    )
    assert about("two", "Two.").deviations == "not told"


def test_samples_that_are_no_pixels_are_not_shown_and_large_ones_shrink() -> None:
    assert contact_sheet(np.zeros((3, 8, 8, 4), np.uint8)) is None
    sheet = contact_sheet(np.zeros((3, 256, 256, 3), np.uint8))
    assert sheet and Image.open(io.BytesIO(sheet[0])).size[1] == CELL_PIXELS


def test_a_picture_is_made_smaller_only_where_nobody_sees_it() -> None:
    reduced = smaller(picture())
    assert len(reduced) < len(picture()) and Image.open(io.BytesIO(reduced)).convert("RGB").getpixel((0, 0)) == (200, 30, 30)
    noise, content = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8), io.BytesIO()
    Image.fromarray(noise).save(content, "png")
    assert smaller(content.getvalue()) == content.getvalue()


def test_a_chart_has_every_end_and_few_points() -> None:
    many = [float(i) for i in range(1, 1001)]
    drawn = chart([Line("heldout", "loss", many, [1 / x for x in many])], "Loss", "loss")
    (points,) = re.findall(r'points="([^"]+)"', drawn)
    places = [tuple(map(float, point.split(","))) for point in points.split()]
    assert len(places) == MOST_POINTS and places == sorted(places) and places[0][1] < places[-1][1]
    assert "Loss: loss, from 1 to 0.001" in drawn and ">1k<" in drawn
    assert chart([Line("heldout", "loss", [1.0, 2.0], [0.0, float("nan")])], "Loss", "loss") == ""
    assert "polyline" in chart([Line("heldout", "loss", [0.0], [0.5])], "Loss", "loss")


def test_figures_are_drawn_of_these_runs(tmp_path: Path) -> None:
    runs = write_fake_runs(tmp_path, ENTRIES[:1])
    drawn = draw_figures(tmp_path, runs, SUITE)
    assert drawn.remark == "" and {"samples", "heldout_loss"} <= {figure.name for figure in drawn.shown}
    assert all(figure.png.startswith(b"\x89PNG") and figure.caption for figure in drawn.shown)
    assert not (tmp_path / "figures").exists()


# The command.


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    """The demo's results, as they are committed: without runs."""
    folder = tmp_path / "demo"
    folder.mkdir()
    for path in DEMO.iterdir():
        if path.is_file() and path.name != "report.html":
            shutil.copy(path, folder)
    (folder / "figures").mkdir()
    for name in ("captions.json", "samples.png", "heldout_loss.png"):
        shutil.copy(DEMO / "figures" / name, folder / "figures")
    return folder


def test_the_command_writes_one_file_and_nothing_else(committed: Path, tmp_path: Path) -> None:
    before = contents(committed)
    outcome = tsbench("report", committed)
    assert outcome == (0, f"{committed / 'report.html'}\n", "")
    page = (committed / "report.html").read_text()
    assert {**before, "report.html": page.encode()} == contents(committed)
    assert re.findall(r'<figure id="([^"]+)"', page) == ["figure-samples", "figure-heldout_loss"]
    assert "token by token" not in page and "Deviations:" in page and "arXiv 2212.09748" in page
    again = tsbench("report", committed, "--out", tmp_path / "new" / "other.html")
    assert again.code == 0 and (tmp_path / "new" / "other.html").read_text() == page


def test_the_committed_demo_has_a_page_for_each_of_its_runs(committed: Path) -> None:
    assert tsbench("report", committed).code == 0
    page = (committed / "report.html").read_text()
    runs = set(json.loads((committed / "runs.json").read_text()))
    assert len(runs) == 6 and {name for name in ids_in(page) if name.startswith("run-")} == {f"run-{run}" for run in runs}
    steps = html.unescape(text_of(section(page, "reproduce")))
    assert "tsbench sweep demo --cluster local" in steps and f"tsbench report {committed} --suite demo" in steps


def mix_protocols(folder: Path) -> None:
    frame = tidy.read(folder).frame
    run = frame["run"].iloc[0]
    other: dict[str, Any] = {**json.loads(frame["protocol"][frame["protocol_hash"] != ""].iloc[0]), "steps": "7"}
    own = (frame["run"] == run) & (frame["protocol_hash"] != "")
    frame.loc[own, "protocol_hash"], frame.loc[own, "protocol"] = "another", json.dumps(other)
    tidy.write(tidy.read(folder)._replace(frame=frame), folder)


def test_what_tables_refuse_a_report_refuses_too(committed: Path) -> None:
    mix_protocols(committed)
    refused = tsbench("report", committed)
    assert_refused(refused, "differ in steps", "--allow protocols", code=3)
    assert refused.err == tsbench("tables", committed).err
    assert not (committed / "report.html").exists()
    assert tsbench("report", committed, "--allow", "protocols").code == 0
    page = (committed / "report.html").read_text()
    assert "Shown although runs" in text_of(section(page, "comparison")) and page.count("<summary>Protocol ") == 2
    assert 'data-options="--suite demo --allow protocols"' in page


def test_what_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    assert_refused(tsbench("report", tmp_path / "nowhere"), "neither a suite nor a folder")
    assert_refused(tsbench("report", tmp_path), "holds no runs")
