"""What do the tests of reports share? A suite of two groups, its made-up runs, and a report of them."""

import io
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from fake_runs import FLOOR_RECORD, SUITE, write_fake_runs
from PIL import Image

from bench import tidy
from bench.report import Material
from bench.report.material import Figure, Figures
from bench.runs import Run
from bench.suite import load_suite
from bench.tables import comparisons

ENTRIES = SUITE["methods"]
DOCSTRING = """One: a made-up method.

Paper: Nobody, arXiv 0000.00000.

Deviations: it does not `exist`, and
never did.
"""


def picture(colour: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    """A small PNG."""
    content = io.BytesIO()
    Image.new("RGB", (150, 75), colour).save(content, "png")
    return content.getvalue()


def grouped_suite(folder: Path) -> dict[str, Any]:
    """The first two of the demo's methods from scratch; then the second and third, compared with the second."""
    groups = {
        "scratch": {"title": "From scratch", "methods": ENTRIES[:2]},
        "tuned": {"title": "Tuned", "methods": ENTRIES[1:3]},
    }
    path = folder / "two.yaml"
    path.write_text(yaml.safe_dump({"title": "Two groups", "groups": groups}))
    return load_suite(str(path))


def runs_of_three(root: Path, seeds: Sequence[int] = (0, 1, 2), curve: Sequence[float] = (0.3, 0.6)) -> list[Run]:
    return write_fake_runs(root, ENTRIES[:3], seeds, curve)


def material_of(runs: Sequence[Run], suite: dict[str, Any], **changes: Any) -> Material:
    results = tidy.gather(runs, FLOOR_RECORD)
    material = Material(
        target="two",
        is_suite=True,
        settings=(),
        options=(),
        suite=suite,
        results=results,
        tables=comparisons(results.frame, suite),
        runs={run.run_id: run for run in runs},
        figures=Figures((Figure("scratch/samples", "What to see.", picture()), Figure("tuned/samples", "The same.", picture()))),
        docstrings={entry["method"]: DOCSTRING for entry in ENTRIES},
    )
    return replace(material, **changes)


def section(page: str, anchor: str) -> str:
    """The HTML of one section, by its anchor."""
    start = page.index(f'<section id="{anchor}"')
    return page[start : page.index("</section>", start)]


def text_of(html: str) -> str:
    """Without tags, and with single spaces."""
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())
