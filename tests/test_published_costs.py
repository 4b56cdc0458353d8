"""Do our networks cost what the papers say, and is a difference the one that the table explains?

Multiply-accumulates and parameters of `results/published/computed_costs.csv`, which is compared with the networks first.
"""

from functools import cache

import pytest

from bench.job import build_method, make_config
from bench.published.costs import computed, read_costs
from bench.published.table import Cell, load_published_suite, published_names, published_table
from bench.suite import SuiteRun, suite_runs
from methods.backbone import SIZES

NAMES = published_names()
TOKENS = 256  # of patch size 2 on 32 x 32 latents
SMALL = ("S/8", "S/4", "S/2", "B/8", "B/4", "B/2")


@cache
def suite_of(name: str) -> list[SuiteRun]:
    return suite_runs(load_published_suite(name), [], make_config)


def is_small(run: SuiteRun) -> bool:
    family = run.config.method == "multi_expert" or ("bases" in run.config.options and run.config.model.size != "S/2")
    return run.config.model.size in SMALL and not family


def rows_of(name: str, section: int = 0) -> dict[str, dict[str, Cell]]:
    shown = published_table(name).sections[section]
    return {row.label: dict(zip(shown.metrics, row.cells, strict=True)) for row in shown.rows}


def published_and_ours(name: str, metric: str, section: int = 0) -> dict[str, tuple[float, float]]:
    """Row -> the published figure and ours, both in the published unit's units of one."""
    unit = 1e9 if metric == "Gflops" else 1e6
    cells = {label: row[metric] for label, row in rows_of(name, section).items() if row[metric].published and row[metric].values}
    return {label: (float(cell.published), cell.values[0] / unit) for label, cell in cells.items()}


def assert_agree(figures: dict[str, tuple[float, float]], relative: float, last_digit: float) -> None:
    """Within a part of the value and half a unit of its last printed digit."""
    assert figures
    off = {label: pair for label, pair in figures.items() if abs(pair[0] - pair[1]) > relative * pair[1] + last_digit / 2 + 1e-9}
    assert off == {}


# Is the file what our networks cost?


def test_every_entry_has_its_costs() -> None:
    assert list(read_costs()) == [(name, run.config.label) for name in NAMES for run in suite_of(name)]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("small", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["small", "the others"])
def test_networks_cost_what_the_file_says(small: bool) -> None:
    chosen = [(name, [run for run in suite_of(name) if is_small(run) == small]) for name in NAMES]
    found = {(name, run.config.label): costs for name, run, costs in computed(chosen, build_method)}
    assert len(found) > 30
    assert found == {(name, run.config.label): read_costs()[name, run.config.label] for name, runs in chosen for run in runs}


# Do they agree with the papers?


def test_sizes_and_patches_of_dit() -> None:
    for section in range(5):
        assert_agree(published_and_ours("dit.table4", "Gflops", section), 0.001, 0.01)
        assert_agree(published_and_ours("dit.table4", "Params_M", section), 0, 1)
    assert len(published_and_ours("dit.table4", "Gflops")) == 12


def test_sizes_of_dit_moe() -> None:
    """Parameters within one of the last printed digit; MACs to the last printed digit without attention's two products."""
    for metric in ("TotalParams_M", "ActParams_M"):
        for label, (published, own) in published_and_ours("dit_moe.table1", metric).items():
            unit = 100 if published >= 1000 else 1  # printed in tenths of billions
            assert abs(published - own) < unit, (label, metric)
    macs = published_and_ours("dit_moe.table1", "Gflops")
    assert len(macs) == 6
    for label, (published, own) in macs.items():
        depth, width, _ = SIZES[label.partition("/")[0]]
        attention = 2 * TOKENS**2 * width * depth / 1e9
        assert own - attention == pytest.approx(published, abs=0.005 + 1e-9), label
        assert 1.010 < own / published < 1.040


def test_switch_dit() -> None:
    """Active parameters within one of the last digit; MACs between one expert's products with the tokens, ours, and two."""
    parameters = published_and_ours("switch_dit.table2", "Params_M")
    assert all(abs(published - own) < 1 for published, own in parameters.values()) and len(parameters) == 9
    macs = published_and_ours("switch_dit.table2", "Gflops")
    with_experts = {label: pair for label, pair in macs.items() if label.startswith("Switch")}
    assert_agree({label: pair for label, pair in macs.items() if label not in with_experts}, 0.001, 0.01)
    in_experts = {}
    for label, (published, own) in with_experts.items():
        depth, width, _ = SIZES[label.rpartition("-")[2]]
        one_expert = TOKENS * width**2 * depth / 1e9
        dense = macs[label.removeprefix("Switch-")][1]
        assert own < published < dense + 2 * one_expert and own - dense == pytest.approx(one_expert, rel=0.02)
        in_experts[label] = round((published - dense) / one_expert, 2), round(published / own - 1, 3)
    assert in_experts == {"Switch-DiT-S": (1.51, 0.035), "Switch-DiT-B": (1.96, 0.069), "Switch-DiT-XL": (1.48, 0.035)}


def test_remix_dit() -> None:
    """Active parameters with the table of positions, to the last digit; MACs within 0.3%; stored as the note says."""
    positions = {label: costs["position_values"] / 1e6 for (name, label), costs in read_costs().items() if name == "dit.table4"}
    for name, section in (("remix_dit.table1", 0), ("remix_dit.table2", 0), ("remix_dit.table2", 2)):
        assert_agree(published_and_ours(name, "Gflops", section), 0.003, 0.01)
    active = published_and_ours("remix_dit.table1", "ActParams_M")
    assert len(active) == 13
    assert_agree({label: (figure, own + positions[label[:7]]) for label, (figure, own) in active.items()}, 0, 0.01)
    rows = rows_of("remix_dit.table1")
    stored = {label: row["TotalParams_M"] for label, row in rows.items() if row["TotalParams_M"].published}
    for label, cell in stored.items():
        networks = cell.values[0] / rows[label]["ActParams_M"].values[0]
        times, _, size = cell.published.partition("x")
        assert float(size) == float(rows[label]["ActParams_M"].published)
        expected = {"S": 2.94, "B": 2.96, "L": 2.98}[label[4]] if "Remix" in label else 8
        assert round(networks, 2) == expected <= float(times)
