"""Which settings does the page of a run name as its own?"""

import copy
from pathlib import Path

from reporting import grouped_suite, material_of, runs_of_three

from bench.report.run_pages import run_pages


def test_a_setting_that_older_runs_lack_is_no_difference_where_it_is_at_its_default(tmp_path: Path) -> None:
    material = material_of(runs_of_three(tmp_path / "runs"), grouped_suite(tmp_path))
    records = material.results.records
    before = [page.own for page in run_pages(material)]
    assert before[0] and not any("train.intervals_per_step" in own for own in before)
    for record in list(records.values())[1:]:  # the first is of today's code
        record["config"] = copy.deepcopy(record["config"])
        del record["config"]["train"]["intervals_per_step"], record["config"]["evaluation"]["guidance_start"]
    assert [page.own for page in run_pages(material)] == before
    next(iter(records.values()))["config"]["train"]["intervals_per_step"] = 2
    assert [page.own.get("train.intervals_per_step") for page in run_pages(material)].count("2") == 1
