"""Are the figures made from what is there, the same bytes every time, and right in what they compute?"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fake_runs import FLOOR_RECORD, NUM_CLASSES, SUITE, fake_images, write_fake_run, write_fake_runs
from matplotlib.image import imread

from bench.figures.inside import dead_experts, load_entropy
from bench.figures.losses import moving_mean, training_curve
from bench.figures.outcome import pareto_front, samples
from bench.figures.style import Material, dress, settings
from bench.plots import FIGURES, make_figures
from bench.runs import Run, find_runs

LABELS = [entry["label"] for entry in SUITE["methods"]]
NAMES = [str(i) for i in range(NUM_CLASSES)]
EXPECTED = [
    "channel_masks",
    "fid_vs_flops",
    "heldout_loss",
    "loss_per_timestep",
    "mixing_coefficients",
    "per_expert_loss_multi_expert",
    "per_expert_loss_remix_dit",
    "routing_dit_moe",
    "routing_switch_dit",
    "samples",
    "training_loss",
]


def draw_all(root: Path) -> list[Path]:
    write_fake_runs(root)
    real = fake_images(np.random.default_rng(1), 60)
    return make_figures(find_runs(root), SUITE, root / "figures", floor=FLOOR_RECORD, real_images=real, class_names=NAMES)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    paths = draw_all(root)
    assert sorted(paths) == sorted((root / "figures").iterdir())
    return root


@pytest.fixture(scope="module")
def runs(demo: Path) -> list[Run]:
    return find_runs(demo)


def test_every_figure_is_made_as_png_pdf_and_csv(demo: Path) -> None:
    found = {path.name for path in (demo / "figures").iterdir()}
    assert found == {f"{name}.{suffix}" for name in EXPECTED for suffix in ("png", "pdf", "csv")} - {"samples.csv"}
    for name in EXPECTED:
        picture = imread(demo / "figures" / f"{name}.png")
        assert picture.shape[1] >= 700 and picture[..., :3].std() > 0.02


def test_another_process_gives_the_same_bytes(demo: Path, tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from test_plots import draw_all; draw_all(Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "demo"], cwd=Path(__file__).parent, env=environment, check=True)
    for path in sorted((demo / "figures").iterdir()):
        assert (tmp_path / "demo" / "figures" / path.name).read_bytes() == path.read_bytes(), path.name


def test_pdfs_embed_their_fonts_and_hold_no_date(demo: Path) -> None:
    for path in (demo / "figures").glob("*.pdf"):
        content = path.read_bytes()
        assert b"/FontFile2" in content and b"/Subtype /Type3" not in content
        assert b"Date" not in content


def test_figures_without_data_are_reported_by_name(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path, SUITE["methods"][0])
    for name in ("metrics.jsonl", "samples.npz", "eval.json"):
        (run.path / name).unlink()
    reports: list[str] = []
    assert make_figures(find_runs(tmp_path), SUITE, tmp_path / "figures", report=reports.append) == []
    assert [report.split()[1] for report in reports] == list(FIGURES)


def test_csvs_hold_what_is_shown(demo: Path, runs: list[Run]) -> None:
    figures = demo / "figures"
    curves = pd.read_csv(figures / "training_loss.csv")
    assert list(dict.fromkeys(curves["label"])) == LABELS
    per_bin = pd.read_csv(figures / "loss_per_timestep.csv")
    first = per_bin[per_bin["label"] == LABELS[0]]
    assert len(first) == 20 and (first["difference_percent"].abs() < 1e-9).all()
    second = per_bin[per_bin["label"] == LABELS[1]]
    ratio = second["loss"].to_numpy() / first["loss"].to_numpy() - 1
    np.testing.assert_allclose(second["difference_percent"], 100 * ratio, atol=1e-2)
    mixing = pd.read_csv(figures / "mixing_coefficients.csv")
    assert mixing.groupby("expert")["coefficient"].sum().to_numpy() == pytest.approx(np.ones(8), abs=1e-4)
    routing = pd.read_csv(figures / "routing_dit_moe.csv")
    assert routing[routing["dead"]][["block", "expert"]].to_numpy().tolist() == [[3, 7]]
    masks = pd.read_csv(figures / "channel_masks.csv")
    assert (masks["num_on"] == 76).all() and (masks["last_on"] - masks["first_on"] == 75).all()
    fids = pd.read_csv(figures / "fid_vs_flops.csv").set_index("run")["fid_train"]
    for run in runs:
        assert fids[run.run_id] == pytest.approx(run.evaluations[0]["metrics"]["fid_train"], rel=1e-5)


def test_training_loss_leaves_penalties_out_and_weighs_intervals_by_steps(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path, SUITE["methods"][1])
    common = {"kind": "train", "step": 9, "images_seen": 90, "loss": 99.0, "vb": 0.5, "penalty/x": 9.0}
    rows = [{**common, "interval": 0, "num_steps": 3, "mse": 1.0}, {**common, "interval": 1, "num_steps": 1, "mse": 5.0}]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curve = training_curve(dress([run], SUITE)[0])
    assert curve["loss"].tolist() == [pytest.approx((3 * 1.5 + 5.5) / 4)]


def test_the_moving_mean_is_centred_at_the_start_and_keeps_its_past_at_the_end() -> None:
    values = np.arange(100.0)
    smoothed = moving_mean(values, np.ones(100))
    np.testing.assert_allclose(smoothed[:96], values[:96])
    assert smoothed[-1] == np.mean(values[95:])
    weighted = moving_mean(np.array([0.0, 1.0, 3.0]), np.array([1.0, 2.0, 1.0]))
    assert weighted.tolist() == [0.0, (0 + 2 + 3) / 4, (2 + 3) / 3]


def test_a_run_keeps_its_look_whatever_else_is_shown(runs: list[Run]) -> None:
    shown = dress(runs, SUITE)
    assert [each.label for each in shown] == LABELS
    assert [each.colour for each in shown] == [entry["colour"] for entry in SUITE["methods"]]
    assert len({str(each.line) for each in shown}) == len({each.marker for each in shown}) == len(LABELS)


def test_seeds_share_one_look_and_one_legend_entry(tmp_path: Path) -> None:
    write_fake_runs(tmp_path, SUITE["methods"][:2], seeds=(0, 1))
    shown = dress(find_runs(tmp_path), SUITE)
    assert len(shown) == 4 and len({(each.label, each.colour, each.marker) for each in shown}) == 2
    with settings():
        for name in ("training_loss", "heldout_loss", "fid_vs_flops"):
            (drawn,) = FIGURES[name](Material(shown))
            labels = [text.get_text() for text in drawn.figure.legends[0].get_texts()]
            assert [labels.count(label) for label in LABELS[:2]] == [1, 1], name


def test_samples_take_the_same_indices_of_every_run(runs: list[Run]) -> None:
    real = fake_images(np.random.default_rng(1), 13)
    with settings():
        (drawn,) = samples(Material(dress(runs[:2], SUITE), None, real, NAMES))
    axes = drawn.figure.axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()][-1] == "Real data"
    assert [text.get_text() for text in axes.get_xticklabels()] == [*NAMES, *NAMES[:3]]  # 13 columns: as many as all have
    picture = np.asarray(axes.images[0].get_array())
    np.testing.assert_array_equal(picture[-64::8, 4:64:8][:8], real[0, :, :8, 0][:, : picture[-64::8, 4:64:8].shape[1]])


def test_points_that_another_beats_are_not_on_the_front() -> None:
    points = np.array([[3.0, 1.0], [1.0, 5.0], [2.0, 6.0], [2.0, 2.0], [4.0, np.nan], [1.0, 7.0]])
    assert pareto_front(points).tolist() == [1, 3, 0]


def test_load_entropy_and_dead_experts() -> None:
    load = np.array([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.498, 0.5, 0.002, 0.0]])
    np.testing.assert_allclose(load_entropy(load)[:3], [1.0, 0.0, 0.5], atol=1e-12)
    assert dead_experts(load).sum(axis=1).tolist() == [0, 3, 2, 2]
