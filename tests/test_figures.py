"""Do the figures of losses, quality and speed show what they say: means and intervals over seeds, paired differences, fronts?"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from drawing import LABELS, data_of, material_of, only, write_runs
from fake_runs import FLOOR_RECORD, SUITE, write_fake_run, write_fake_runs

from bench.figures.losses import heldout_curve, heldout_loss, moving_mean, training_curve
from bench.figures.quality import fid_vs, pareto_front
from bench.figures.seeds import over_seeds, seeds_sentence
from bench.figures.style import Material, dress, settings
from bench.figures.throughput import throughput
from bench.figures.timesteps import loss_per_timestep, per_expert_loss
from bench.runs import Run, find_runs
from bench.statistics import half_width

THREE = (0, 1, 2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Two seeds of everything."""
    return write_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def three_seeds(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Three seeds of all methods, scored on their way."""
    return write_fake_runs(tmp_path_factory.mktemp("three"), seeds=THREE, curve=(0.25, 0.5))


def edit(path: Path, **values: object) -> None:
    content = json.loads(path.read_text())
    content = [{**each, **values} for each in content] if isinstance(content, list) else {**content, **values}
    path.write_text(json.dumps(content))


def test_three_seeds_are_a_mean_with_an_interval_and_two_are_themselves(tmp_path: Path) -> None:
    shown = dress(write_fake_runs(tmp_path, SUITE["methods"][:2], seeds=THREE), SUITE)[:5]  # 3 of the first, 2 of the second
    curves = [(each, pd.DataFrame({"x": [1, 2, 3], "y": [i, i * i, 7.0]})) for i, each in enumerate(shown, start=1)]
    table = over_seeds(curves, ["x"], "y")
    first, second = table[table["label"] == LABELS[0]], table[table["label"] == LABELS[1]]
    assert first["seeds"].unique().tolist() == ["0 1 2"] and first["y"].tolist() == [2, pytest.approx(14 / 3), 7]
    assert first["half_width"].tolist() == [pytest.approx(half_width([1, 2, 3])), pytest.approx(half_width([1, 4, 9])), 0]
    assert second["seeds"].tolist() == ["0"] * 3 + ["1"] * 3 and second["half_width"].isna().all()
    assert second["y"].tolist() == [4, 16, 7, 5, 25, 7]
    assert "3 seeds" in seeds_sentence(table) and "fewer than three" in seeds_sentence(table)
    assert "Each seed" in seeds_sentence(second) and seeds_sentence(second[:3]) == "One seed each."


def test_a_mean_is_taken_only_where_all_seeds_have_a_value(tmp_path: Path) -> None:
    shown = dress(write_fake_runs(tmp_path, SUITE["methods"][:1], seeds=THREE), SUITE)
    places: list[list[int]] = [[1, 2], [2, 3], [2]]
    curves = [(each, pd.DataFrame({"x": at, "y": [1.0] * len(at)})) for each, at in zip(shown, places, strict=True)]
    assert over_seeds(curves, ["x"], "y")["x"].tolist() == [2]
    nothing_shared = over_seeds([*curves[:2], (shown[2], pd.DataFrame({"x": [9], "y": [1.0]}))], ["x"], "y")
    assert nothing_shared["seeds"].tolist() == ["0", "0", "1", "1", "2"]


def test_differences_are_taken_seed_by_seed(three_seeds: list[Run]) -> None:
    with settings():
        drawn = only(loss_per_timestep(material_of(three_seeds)))
    table = data_of(drawn)
    differences = table[table["panel"] == "difference_percent"]
    assert set(differences["label"]) == set(LABELS[1:]) and LABELS[0] in drawn.caption
    finals = {(run.label, run.config["seed"]): run.metrics[run.metrics["kind"] == "heldout"].tail(20) for run in three_seeds}
    for label in LABELS[1:]:
        percents = [100 * (finals[label, s]["loss"].to_numpy() / finals[LABELS[0], s]["loss"].to_numpy() - 1) for s in THREE]
        own = differences[differences["label"] == label].sort_values("bin")
        np.testing.assert_allclose(own["value"], np.mean(percents, axis=0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(own["half_width"], [half_width(list(of_bin)) for of_bin in np.transpose(percents)], rtol=1e-4)


def test_without_the_baseline_there_is_no_difference(three_seeds: list[Run]) -> None:
    material = Material(dress(three_seeds[3:6], SUITE))
    with settings():
        for draw in (loss_per_timestep, heldout_loss):
            drawn = only(draw(material))
            assert set(data_of(drawn)["panel"]) == {"loss"} and len(drawn.figure.axes) == 1


def test_a_seed_that_the_baseline_lacks_is_in_no_difference(three_seeds: list[Run]) -> None:
    kept = [run for run in three_seeds[:6] if (run.label, run.config["seed"]) != (LABELS[0], 1)]
    with settings():
        table = data_of(only(heldout_loss(material_of(kept))))
    assert set(table[table["panel"] == "difference_percent"]["seeds"]) == {"0", "2"}


def test_the_heldout_loss_weighs_bins_by_their_width(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path, SUITE["methods"][0])
    common = {"kind": "heldout", "step": 1, "images_seen": 32}
    rows = [
        {**common, "bin": 0, "start": 0, "stop": 750, "loss": 1.0},
        {**common, "bin": 1, "start": 750, "stop": 1000, "loss": 5.0},
    ]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert heldout_curve(dress([run], SUITE)[0])["loss"].tolist() == [2.0]


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


def test_each_expert_has_its_own_loss_over_seeds(three_seeds: list[Run]) -> None:
    with settings():
        first, second = per_expert_loss(material_of(three_seeds))
    table = data_of(first)
    assert first.name == "per_expert_loss_multi_expert" and sorted(table["interval"].unique()) == [0, 1, 2, 3]
    assert table["half_width"].notna().all() and set(table["seeds"]) == {"0 1 2"}
    assert sorted(data_of(second)["interval"].unique()) == list(range(8))


def test_fid_is_shown_along_training_and_at_its_end(three_seeds: list[Run]) -> None:
    with settings():
        drawn = only(fid_vs("fid_vs_flops")(material_of(three_seeds, floor=FLOOR_RECORD)))
    table = data_of(drawn)
    assert len(table) == 2 * len(LABELS) * 3 and table["is_end"].sum() == 2 * len(LABELS)
    for label in LABELS:
        own = [run for run in three_seeds if run.label == label]
        rows = table[(table["label"] == label) & (table["panel"] == "fid_heldout")]
        for place, row in rows.reset_index().iterrows():
            records = [run.curve[place] if place < 2 else run.evaluations[-1] | run.summary for run in own]
            fids = [record["metrics"]["fid_heldout"] for record in records]
            assert row["fid"] == pytest.approx(np.mean(fids), rel=1e-5)
            assert row["half_width"] == pytest.approx(half_width(fids), rel=1e-4)
            assert row["train_flops"] == pytest.approx(np.mean([record["train_flops"] for record in records]), rel=1e-5)
    assert "learning rate was still on its way" in drawn.caption and "n = 500" in drawn.figure.get_suptitle()
    legend = [text.get_text() for text in drawn.figure.legends[0].get_texts()]
    assert legend == [*LABELS, "Pareto front", "real against real data"]


def test_a_cost_that_is_the_same_for_all_makes_no_figure(runs: list[Run], tmp_path: Path) -> None:
    at_the_end = write_fake_runs(tmp_path, SUITE["methods"][:3])
    with settings():
        assert fid_vs("fid_vs_images")(material_of(at_the_end)) == []
        assert len(fid_vs("fid_vs_images")(material_of(runs))) == len(fid_vs("fid_vs_flops")(material_of(at_the_end))) == 1


def test_sampling_cost_is_evaluations_times_macs_of_trained_runs(runs: list[Run]) -> None:
    with settings():
        table = data_of(only(fid_vs("fid_vs_sampling_cost")(material_of(runs))))
    assert table["is_end"].all() and len(table) == 2 * len(runs)
    costs = {(run.label, str(run.config["seed"])): 50 * run.summary["forward_macs_per_image"] for run in runs}
    for row in table.itertuples():
        assert row.macs_per_sample == pytest.approx(costs[str(row.label), str(row.seeds)], rel=1e-5)


def test_a_seed_without_one_of_the_fids_keeps_the_others_in_the_figure(tmp_path: Path) -> None:
    made = write_fake_runs(tmp_path, SUITE["methods"][:2], seeds=THREE)
    record = made[0].evaluations[0]
    edit(made[0].path / "eval.json", metrics={key: value for key, value in record["metrics"].items() if key != "fid_heldout"})
    with settings():
        table = data_of(only(fid_vs("fid_vs_flops")(material_of(find_runs(tmp_path)))))
    of_first = table[table["label"] == LABELS[0]]
    assert of_first[of_first["panel"] == "fid_heldout"]["seeds"].tolist() == ["1", "2"]
    assert of_first[of_first["panel"] == "fid_train"]["seeds"].tolist() == ["0 1 2"]


def test_compute_spent_on_initial_weights_is_named(tmp_path: Path) -> None:
    made = write_fake_runs(tmp_path, SUITE["methods"][:2])
    with settings():
        assert "initial weights" not in only(fid_vs("fid_vs_flops")(material_of(made))).caption
        edit(made[0].path / "summary.json", initial_flops=1e12)
        assert "initial weights is not counted" in only(fid_vs("fid_vs_flops")(material_of(find_runs(tmp_path)))).caption


def test_points_that_another_beats_are_not_on_the_front() -> None:
    points = np.array([[3.0, 1.0], [1.0, 5.0], [2.0, 6.0], [2.0, 2.0], [4.0, np.nan], [1.0, 7.0]])
    assert pareto_front(points).tolist() == [1, 3, 0]


@pytest.mark.parametrize(
    ("together", "words"), [(True, "ran side by side"), (False, "No two of these runs"), (None, "is not known")]
)
def test_throughput_says_whether_runs_ran_side_by_side(tmp_path: Path, together: bool | None, words: str) -> None:
    for i, run in enumerate(write_fake_runs(tmp_path, seeds=THREE)):
        started = f"2030-01-{1 if together else 1 + i:02d}T00:00:00Z"
        edit(run.path / "provenance.json", started="" if together is None else started)
        edit(run.path / "summary.json", peak_memory_bytes=2e9)
    made = find_runs(tmp_path)
    with settings():
        drawn = only(throughput(material_of(made)))
    assert words in drawn.caption and ("side by side" in drawn.figure.get_suptitle()) is (together is True)
    table = data_of(drawn).set_index(["panel", "label"])
    speeds = [run.summary["train_images_per_second"] for run in made if run.label == "DTR"]
    assert table.loc[("train_images_per_second", "DTR"), "value"] == pytest.approx(np.mean(speeds), rel=1e-5)
    assert table.loc[("train_images_per_second", "DTR"), "half_width"] == pytest.approx(half_width(speeds), rel=1e-4)
    assert table.loc[("peak_memory_bytes", "DTR"), "value"] == 2e9


def test_memory_that_was_not_measured_has_no_panel(runs: list[Run]) -> None:
    with settings():
        drawn = only(throughput(material_of(runs)))
    assert len(drawn.figure.axes) == 2 and "memory" not in drawn.caption
