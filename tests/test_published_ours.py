"""Which runs of ours stand beside a paper's figures, in tables and in figures?"""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from published_runs import config_of, write_run

from bench.figures.published import published_mixing
from bench.figures.style import save, settings
from bench.job import make_config
from bench.published import published_table, read_facts, to_csv
from bench.runs import Run, find_runs
from bench.tables import TableRefusal


def ours(table: Any, row: str, metric: str) -> str:
    found = [r for section in table.sections for r in section.rows if r.label == row]
    return next(cell.ours for cell in found[0].cells if cell.metric == metric)


def draw(table: Any, folder: Path) -> list[Path]:
    folder.mkdir()
    with settings():
        return [path for drawn in published_mixing(table) for path in save(drawn, folder)]


# In tables


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


# In figures


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
