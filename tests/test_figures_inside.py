"""Do the figures of what is inside, and of images, show what they say: coefficients, routing, load, masks, trajectories?"""

from pathlib import Path

import numpy as np
import pytest
from drawing import LABELS, add_diagnostics, data_of, first_of, material_of, only, only_diagnostic, shares, write_runs
from fake_runs import NUM_CLASSES, SUITE, fake_images, write_fake_run, write_fake_runs

from bench.arrays import Trajectory, write_trajectory
from bench.figures.diagnostics import mean_over
from bench.figures.load import dead_experts, expert_load, load_entropy
from bench.figures.masks import channel_masks
from bench.figures.mixing import mixing_coefficients, mixing_over_training
from bench.figures.pictures import mosaic, samples, trajectories
from bench.figures.routing import in_groups, mosaic_of_maps, routing, routing_by_class, routing_by_position
from bench.figures.style import settings
from bench.runs import Run, find_runs

NAMES = [str(i) for i in range(NUM_CLASSES)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Two seeds of everything."""
    return write_runs(tmp_path_factory.mktemp("runs"))


def test_mixing_coefficients_lie_over_the_timesteps_of_their_expert(runs: list[Run]) -> None:
    with settings():
        table = data_of(only(mixing_coefficients(material_of(runs))))
        over_training = data_of(only(mixing_over_training(material_of(runs))))
    assert table.groupby("expert")["coefficient"].sum().to_numpy() == pytest.approx(np.ones(8), abs=1e-4)
    first = first_of(runs, "Remix-DiT")
    assert table[table["basis"] == 0][["start", "stop"]].to_numpy().tolist() == first.diagnostics["intervals"].values.tolist()
    last = over_training[over_training["images_seen"] == over_training["images_seen"].max()]
    np.testing.assert_array_equal(last["coefficient"], table["coefficient"])


def test_coefficients_below_zero_are_written_and_coloured_by_their_sign(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path, SUITE["methods"][5])
    add = {"intervals": np.array([[0, 500], [500, 1000]]), "intervals/axes": np.array(["interval", "edge"])}
    values = {
        "mixing_coefficients": np.array([[-2.0, -0.001], [0.5, 1.5]]),
        "mixing_coefficients/axes": np.array(["expert", "basis"]),
    }
    np.savez(run.path / "diagnostics.npz", **add, **values)  # type: ignore[arg-type]
    with settings():
        axes = only(mixing_coefficients(material_of(find_runs(tmp_path)))).figure.axes[0]
    assert axes.collections[0].get_clim() == (-2, 2)
    assert [text.get_text() for text in axes.texts] == ["-2.00", "0.00", "0.50", "1.50"]


def test_coefficients_without_their_intervals_are_refused(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path, SUITE["methods"][5])
    np.savez(
        run.path / "diagnostics.npz", mixing_coefficients=np.ones((8, 4)), **{"mixing_coefficients/axes": ["expert", "basis"]}
    )
    with settings(), pytest.raises(ValueError, match="8 experts but 0 intervals: delete it and score the run again"):
        mixing_coefficients(material_of(find_runs(tmp_path)))


def test_load_entropy_and_dead_experts() -> None:
    load = np.array([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.498, 0.5, 0.002, 0.0]])
    np.testing.assert_allclose(load_entropy(load)[:3], [1.0, 0.0, 0.5], atol=1e-12)
    assert dead_experts(load).sum(axis=1).tolist() == [0, 3, 2, 2]


def test_dead_experts_are_counted_over_blocks(runs: list[Run]) -> None:
    with settings():
        drawn = only(expert_load(material_of(runs)))
    table = data_of(drawn)
    dead = table[table["panel"] == "dead_experts"].drop_duplicates("label").set_index("label")["value"]
    assert dead["DiT-MoE"] == pytest.approx(100 / 32, rel=1e-5)  # one of 4 blocks x 8 experts
    assert "less than 1%" in drawn.caption
    blocks = table[(table["panel"] == "by_block") & (table["label"] == "DiT-MoE") & (table["seeds"] == "0")]
    usage = first_of(runs, "DiT-MoE").diagnostics["expert_usage"].values
    np.testing.assert_allclose(blocks["value"], load_entropy(usage), rtol=1e-5)


def test_without_dead_experts_there_is_no_panel_of_them(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path, SUITE["methods"][4])
    only_diagnostic(run.path, "expert_usage", np.full((3, 4), 0.25), ["block", "expert"])
    with settings():
        drawn = only(expert_load(material_of(find_runs(tmp_path))))
    assert len(drawn.figure.axes) == 1 and "No expert is dead" in drawn.caption


def test_routing_is_shown_by_timestep_with_gaps_where_nothing_was_seen(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path, SUITE["methods"][4])
    values = shares(np.random.default_rng(0), 2, 20, 4)
    values[:, 7] = np.nan
    only_diagnostic(run.path, "routing", values, ["block", "timestep", "expert"])
    with settings():
        drawn = only(routing(material_of(find_runs(tmp_path))))
    table = data_of(drawn)
    assert table["value"].isna().sum() == 8 and table[table["value"].isna()]["start"].unique().tolist() == [350]
    np.testing.assert_allclose(table["value"], values.ravel(), rtol=1e-5)
    assert "nothing was seen" in drawn.caption and "1/4 everywhere" in drawn.caption


def test_weights_that_need_not_sum_to_one_are_not_called_shares(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path, SUITE["methods"][3])
    values = 0.9 * shares(np.random.default_rng(0), 2, 20, 4)
    only_diagnostic(run.path, "routing", values, ["block", "timestep", "expert"])
    with settings():
        caption = only(routing(material_of(find_runs(tmp_path)))).caption
    assert "routing weight" in caption and "share" not in caption and "everywhere" not in caption


def test_many_timesteps_are_averaged_in_groups() -> None:
    shares_of = np.arange(2 * 250 * 3, dtype=float).reshape(2, 250, 3)
    grouped, edges = in_groups(shares_of, np.arange(251.0))
    assert grouped.shape == (2, 100, 3) and len(edges) == 101 and (edges[0], edges[-1]) == (0, 250)
    np.testing.assert_allclose(grouped[:, 0], shares_of[:, 0 : int(edges[1])].mean(axis=1))
    same, _ = in_groups(shares_of[:, :100], np.arange(101.0))
    np.testing.assert_array_equal(same, shares_of[:, :100])


def test_routing_by_position_is_a_map_of_the_image(runs: list[Run]) -> None:
    values = first_of(runs, "DiT-MoE").diagnostics["routing_by_position"].values
    whole, centres_x, centres_y = mosaic_of_maps(values.transpose(0, 2, 1))
    assert (centres_x[0], centres_x[1], centres_y[1]) == (1.5, 6.5, 6.5)
    np.testing.assert_array_equal(whole[5:9, 10:14], values[1, :, 2].reshape(4, 4))  # block 1, expert 2, raster order
    assert np.isnan(whole[4]).all() and np.isnan(whole[:, 4]).all()
    assert mosaic_of_maps(values[:, :15].transpose(0, 2, 1))[0].shape == (4 + 3 * 3, 8 * 15 + 7 * 3)  # no square: strips
    with settings():
        table = data_of(only(routing_by_position(material_of(runs))))
    np.testing.assert_allclose(table.groupby(["block", "position"])["value"].sum(), 1, rtol=1e-5)


def test_routing_by_class_names_the_classes(runs: list[Run]) -> None:
    with settings():
        drawn = only(routing_by_class(material_of(runs, class_names=[f"class {name}" for name in NAMES])))
    table = data_of(drawn)
    values = first_of(runs, "DiT-MoE").diagnostics["routing_by_class"].values
    row = table[(table["block"] == 2) & (table["class"] == 7) & (table["expert"] == 5)]
    assert row["value"].tolist() == [pytest.approx(values[2, 7, 5], rel=1e-5)]
    assert [text.get_text() for text in drawn.figure.axes[4].get_xticklabels()][:2] == ["class 0", "class 1"]


def test_many_classes_are_numbered_and_the_caption_says_that_they_are_averaged(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path, SUITE["methods"][4])
    add_diagnostics(run.path, routing_by_class=shares(np.random.default_rng(0), 2, 300, 4))
    with settings():
        drawn = only(routing_by_class(material_of(find_runs(tmp_path), class_names=["name"] * 300)))
        drawn.figure.draw_without_rendering()
    ticks = [text.get_text() for text in drawn.figure.axes[0].get_xticklabels()]
    assert "name" not in ticks and len(ticks) <= 6 and "100 groups of neighbours" in drawn.caption
    assert data_of(drawn)["class"].nunique() == 100


def test_of_many_blocks_and_experts_some_are_shown_and_the_caption_says_so(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path, SUITE["methods"][4])
    add_diagnostics(run.path, routing_by_position=shares(np.random.default_rng(0), 28, 16, 64))
    with settings():
        drawn = only(routing_by_position(material_of(find_runs(tmp_path))))
    table = data_of(drawn)
    assert table["block"].nunique() == 8 and table["expert"].nunique() == 16
    assert {0, 27} <= set(table["block"]) and "8 of 28 blocks and 16 of 64 experts" in drawn.caption


def test_masks_tell_which_channels_are_on(runs: list[Run]) -> None:
    with settings():
        table = data_of(only(channel_masks(material_of(runs))))
    assert (table["num_on"] == 76).all() and (table["last_on"] - table["first_on"] == 75).all()


def test_samples_take_the_same_indices_of_every_run(runs: list[Run]) -> None:
    real = fake_images(np.random.default_rng(1), 13)
    with settings():
        drawn = only(samples(material_of(runs[:4], real_images=real, class_names=NAMES)))
    axes = drawn.figure.axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()][-1] == "Real data"
    assert [text.get_text() for text in axes.get_xticklabels()] == [*NAMES, *NAMES[:3]]  # 13 columns: as many as all have
    picture = np.asarray(axes.images[0].get_array())
    np.testing.assert_array_equal(picture[-64::8, 4:64:8][:8], real[0, :, :8, 0][:, : picture[-64::8, 4:64:8].shape[1]])


def test_trajectories_set_methods_side_by_side_at_the_same_timesteps(runs: list[Run]) -> None:
    chosen = [run for run in runs if run.label in LABELS[:2]]
    with settings():
        drawn = only(trajectories(material_of(chosen)))
    left, right = drawn.figure.axes
    assert [text.get_text() for text in left.get_xticklabels()] == ["900", "600", "300", "0", "end"]
    assert [text.get_text() for text in left.get_yticklabels()] == LABELS[:2]
    stored = np.load(first_of(chosen, LABELS[0]).path / "trajectory.npz")
    for axes, kind in ((left, "images"), (right, "predicted")):
        picture = np.asarray(axes.images[0].get_array())
        np.testing.assert_array_equal(picture[4:64:8, 4:64:8], stored[kind][0, 0, 0])
        np.testing.assert_array_equal(picture[67 + 4 : 67 + 64 : 8, 67 + 4 : 67 + 64 : 8], stored[kind][1, 1, 0])


def test_other_timesteps_come_in_a_figure_of_their_own(tmp_path: Path) -> None:
    made = write_fake_runs(tmp_path, SUITE["methods"][:2])
    for run, start in zip(made, (900.0, 0.9), strict=True):
        frames = np.zeros((2, 1, 1, 8, 8), dtype=np.uint8)
        write_trajectory(run.path, Trajectory(frames, frames, np.array([start, np.nan]), np.array([0])))
    with settings():
        drawn = trajectories(material_of(made))
    assert [each.name for each in drawn] == ["trajectories", "trajectories_2"]


def test_groups_of_rows_are_set_apart() -> None:
    rows = [np.full((2, 8, 8, 1), i, dtype=np.uint8) for i in range(4)]
    whole, _, centres = mosaic(rows, group=2)
    assert whole.shape == (4 * 64 + 2 * 3 + 18, 2 * 64 + 3)  # gaps of 3 within, 18 between
    assert [int(whole[int(y), 10]) for y in (10, 100, 180, 250)] == [0, 1, 2, 3]
    assert centres.tolist() == [65.0, 65.0 + 2 * 64 + 3 + 18]


def test_a_mean_leaves_out_what_was_not_seen() -> None:
    values = np.array([[[1.0, np.nan, np.nan], [3.0, 5.0, np.nan]]])
    np.testing.assert_array_equal(mean_over(values, ("a", "b", "c"), ("a", "c")), [[2.0, 5.0, np.nan]])
    assert mean_over(values, ("a", "b", "c"), ("c", "a")).shape == (3, 1)
