"""Are all figures made from what is there, with captions, the same bytes every time, and nothing else?"""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from drawing import LABELS, write_runs
from fake_runs import FLOOR_RECORD, REAL_NAMES, SUITE, write_fake_run, write_fake_runs
from matplotlib.image import imread

from bench import plots
from bench.figures.style import COLOURS, Material, dress, names_for, settings, spread
from bench.plots import CAPTIONS, FIGURES, captions_of, figures_of, make_figures
from bench.runs import find_runs, read_run

EXPECTED = [
    "fid_vs_flops",
    "fid_vs_images",
    "fid_vs_device_seconds",
    "fid_vs_sampling_cost",
    "throughput",
    "samples",
    "trajectories",
    "training_loss",
    "heldout_loss",
    "loss_per_timestep",
    "per_expert_loss_multi_expert",
    "per_expert_loss_remix_dit",
    "mixing_coefficients",
    "mixing_over_training",
    "expert_load",
    "routing_switch_dit",
    "routing_dit_moe",
    "routing_by_position",
    "routing_by_class",
    "channel_masks",
]
pytestmark = pytest.mark.xdist_group("plots")  # what its tests look at is made once, not by every worker
PICTURES = {"samples.csv", "trajectories.csv"}


def test_every_figure_is_made_as_png_pdf_and_csv(with_figures: Path) -> None:
    found = {path.name for path in (with_figures / "figures").iterdir()}
    assert found == {f"{name}.{suffix}" for name in EXPECTED for suffix in ("png", "pdf", "csv")} - PICTURES | {CAPTIONS}
    for name in EXPECTED:
        picture = imread(with_figures / "figures" / f"{name}.png")
        assert picture.shape[1] >= 700 and picture[..., :3].std() > 0.02


def test_another_process_gives_the_same_bytes(with_figures: Path, tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from drawing import draw_all; draw_all(Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "demo"], cwd=Path(__file__).parent, env=environment, check=True)
    for path in sorted((with_figures / "figures").iterdir()):
        assert (tmp_path / "demo" / "figures" / path.name).read_bytes() == path.read_bytes(), path.name


def test_pictures_embed_their_fonts_and_hold_no_date(with_figures: Path) -> None:
    for path in (with_figures / "figures").glob("*.pdf"):
        content = path.read_bytes()
        assert b"/FontFile2" in content and b"/Subtype /Type3" not in content
        assert b"Date" not in content
    for path in (with_figures / "figures").glob("*.png"):
        content = path.read_bytes()
        assert b"tEXt" not in content and b"tIME" not in content


def test_every_figure_has_a_caption_of_sentences_in_the_order_of_reading(with_figures: Path) -> None:
    captions = captions_of(with_figures / "figures")
    assert list(captions) == EXPECTED
    for name, caption in captions.items():
        assert 40 < len(caption) < 600 and caption.endswith(".") and "  " not in caption and "nan" not in caption.lower(), name
    assert len(set(captions.values())) == len(EXPECTED)


def test_the_data_alone_are_the_same_as_beside_the_pictures(with_figures: Path) -> None:
    made = figures_of(find_runs(with_figures), SUITE, floor=FLOOR_RECORD, class_names=REAL_NAMES, only_data=True)
    assert set(made.files) == {path.name for path in (with_figures / "figures").glob("*.csv")}
    for name, content in made.files.items():
        assert (with_figures / "figures" / name).read_bytes() == content


def test_figures_without_data_are_reported_by_name(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path, SUITE["methods"][0])
    for name in ("metrics.jsonl", "samples.npz", "eval.json", "summary.json"):
        (run.path / name).unlink()
    reports: list[str] = []
    assert make_figures(find_runs(tmp_path), SUITE, tmp_path / "figures", report=reports.append) == []
    assert [report.split()[1] for report in reports] == list(FIGURES)


def test_what_is_no_longer_made_goes_and_what_is_not_ours_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("training_loss", "per_expert_loss", "mixing_coefficients", "mixing_over_training", "channel_masks")
    monkeypatch.setattr(plots, "FIGURES", {name: FIGURES[name] for name in few})
    runs, figures = write_runs(tmp_path), tmp_path / "figures"
    make_figures([run for run in runs if run.label in ("DTR", "Remix-DiT")], SUITE, figures, report=lambda _: None)
    (figures / "mine.png").write_bytes(b"mine")
    make_figures([run for run in runs if run.label in ("DTR", "Multi-expert")], SUITE, figures, report=lambda _: None)
    there = {path.name for path in figures.iterdir()}
    assert "mine.png" in there and "channel_masks.png" in there and "per_expert_loss.csv" in there
    assert not {name for name in there if name.startswith("mixing")}
    assert {name.rpartition(".")[0] for name in there} == {*captions_of(figures), "mine", "captions"}


@pytest.mark.parametrize("name", ["../mine", "a/../../mine", "/mine", "a/b/mine"])
def test_captions_that_name_files_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "mine.png").write_bytes(b"mine")
    (tmp_path / "figures" / CAPTIONS).write_text(json.dumps({name: "A figure."}))
    with pytest.raises(ValueError, match="none of ours: delete it"):
        make_figures([write_fake_run(tmp_path, SUITE["methods"][0])], SUITE, tmp_path / "figures", report=lambda _: None)
    assert (tmp_path / "mine.png").exists()


def test_each_group_of_a_suite_has_its_own_figures_and_baseline(tmp_path: Path) -> None:
    runs = write_fake_runs(tmp_path, SUITE["methods"][:4], seeds=(0, 1, 2))
    first, second, third, fourth = SUITE["methods"][:4]
    entries = [
        *({**entry, "group": "main"} for entry in (first, second)),
        *({**e, "group": "other"} for e in (first, third, fourth)),
    ]
    entries.append({"method": "dense", "label": "Not run", "group": "later"})
    groups = {"main": {}, "other": {"baseline": third["label"]}, "later": {}}
    reports: list[str] = []
    made = figures_of(runs, {"methods": entries, "groups": groups}, only_data=True, report=reports.append)
    tables = {group: read(made.files[f"{group}/loss_per_timestep.csv"]) for group in ("main", "other")}
    assert set(tables["main"]["label"]) == {first["label"], second["label"]}
    assert set(tables["other"]["label"]) == {first["label"], third["label"], fourth["label"]}
    compared = tables["other"][tables["other"]["panel"] == "difference_percent"]
    assert set(compared["label"]) == {first["label"], fourth["label"]}
    assert third["label"] in made.captions["other/loss_per_timestep"]
    assert "group later/ has no figures, as none of it is run" in reports


def read(content: bytes) -> pd.DataFrame:
    return pd.read_csv(io.BytesIO(content), dtype={"seeds": str})


def test_a_run_keeps_its_look_whatever_else_is_shown(with_figures: Path) -> None:
    runs = find_runs(with_figures)
    shown = {each.label: each for each in dress(runs, SUITE)}
    assert list(shown) == LABELS
    assert [each.colour for each in shown.values()] == [entry["colour"] for entry in SUITE["methods"]]
    assert len({str(each.line) for each in shown.values()}) == len({each.marker for each in shown.values()}) == len(LABELS)
    for each in dress([run for run in runs if run.label in LABELS[3:]], SUITE):
        assert (each.colour, each.line, each.marker) == (
            shown[each.label].colour,
            shown[each.label].line,
            shown[each.label].marker,
        )


def test_what_has_no_colour_in_the_suite_gets_one_that_no_other_has(tmp_path: Path) -> None:
    given = [{**SUITE["methods"][0], "colour": COLOURS[1]}, *({**e, "colour": None} for e in SUITE["methods"][1:])]
    suite = {"methods": [{key: value for key, value in entry.items() if value is not None} for entry in given]}
    shown = dress(write_fake_runs(tmp_path), suite)
    assert len({each.colour for each in shown}) == len(LABELS) and shown[0].colour == COLOURS[1]


def test_file_names_are_plain_and_differ_where_labels_do(with_figures: Path) -> None:
    shown = {each.label: each for each in dress(find_runs(with_figures), SUITE)}["DTR"]
    labels = ("Mix (a)", "Mix [a]", "Mix a", "混合", "Mix b")
    others = [type(shown)(shown.run, label, shown.colour, shown.line, shown.marker) for label in labels]
    assert names_for("x", others) == ["x_mix_a", "x_mix_a_again1", "x_mix_a_again2", "x_unnamed", "x_mix_b"]
    assert names_for("x", others[:1]) == ["x"]


def test_what_has_room_for_a_few_only_shows_the_first_and_the_last() -> None:
    assert spread(5, 9) == [0, 1, 2, 3, 4]
    assert spread(100, 4) == [0, 33, 66, 99]
    assert spread(1, 4) == [0]


def test_many_labels_fit_beside_the_figure(tmp_path: Path) -> None:
    """As in a sweep of learning rates: the legend is within the figure, with all of them."""
    entries = [{"method": "dense", "label": f"Dense DiT, a rate of {i}e-3"} for i in range(24)]
    runs = [write_fake_run(tmp_path, entry, seed) for seed, entry in enumerate(entries)]
    shown = dress(runs, {"methods": entries})
    with settings():
        for name in ("training_loss", "heldout_loss", "loss_per_timestep"):
            (drawn,) = FIGURES[name](Material(shown))
            drawn.figure.draw_without_rendering()
            (legend,) = drawn.figure.legends
            assert [text.get_text() for text in legend.get_texts()] == [entry["label"] for entry in entries]
            box, whole = legend.get_window_extent(), drawn.figure.bbox
            assert whole.y0 <= box.y0 and box.y1 <= whole.y1 and whole.x0 <= box.x0 and box.x1 <= whole.x1


def test_a_few_far_points_do_not_flatten_the_difference_to_the_baseline(tmp_path: Path) -> None:
    runs = write_fake_runs(tmp_path, SUITE["methods"][:4])
    for far in (1.0, 1000.0):
        rows = [json.loads(line) for line in (runs[1].path / "metrics.jsonl").read_text().splitlines()]
        for row in (row for row in rows if row["kind"] == "heldout" and row["step"] == 500):
            row["loss"] *= far
        (runs[1].path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with settings():
            shown = dress([read_run(run.path) for run in runs], SUITE)
            (drawn,) = FIGURES["heldout_loss"](Material(shown, baseline=LABELS[0]))
        axes = drawn.figure.axes[1]
        assert axes.get_ylim()[1] < 100
        assert ("lines leave the axis" in axes.get_ylabel()) == (far > 1)


def test_seeds_share_one_look_and_one_legend_entry(with_figures: Path) -> None:
    shown = [each for each in dress(find_runs(with_figures), SUITE) if each.label in LABELS[:2]]
    assert len(shown) == 4 and len({(each.label, each.colour, each.marker) for each in shown}) == 2
    with settings():
        for name in ("training_loss", "heldout_loss", "fid_vs_flops"):
            (drawn,) = FIGURES[name](Material(tuple(shown)))
            labels = [text.get_text() for text in drawn.figure.legends[0].get_texts()]
            assert [labels.count(label) for label in LABELS[:2]] == [1, 1], name
