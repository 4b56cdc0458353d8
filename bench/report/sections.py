"""What stands in the section of one comparison: its tables, the three views of equal budgets, its notes and figures?"""

import hashlib
import re
from typing import NamedTuple

from bench.report.material import Figure, Material
from bench.report.pictures import data_uri, size_of, smaller
from bench.report.summary import groups_of
from bench.tables import Part, Table, part_to_html
from bench.tables.columns import SHARE
from bench.tables.views import TITLES

TABS = {"images": "Equal images", "train_flops": "Equal training FLOPs", "device_seconds": "Equal device time"}
NO_CURVE = "none of these runs was scored on its way (evaluation.curve_every), so nothing is known of them at other budgets"
NOT_KNOWN = "not every one of these runs has ended, so nobody knows which budget all of them reach"
PIXELS_PER_PIXEL = 150 / 96  # figures are drawn at 150 dpi; a page has 96 pixels to the inch
ALTHOUGH = " [shown although "  # of a table's title, before what was allowed
SAME = "The runs were trained for this budget, so the tables above are this view; at the others, {}."


class View(NamedTuple):
    unit: str
    tab: str
    html: str  # of its table; empty if there is none
    remark: str


class Plate(NamedTuple):
    """A figure. `uri` is empty where the same picture stands elsewhere in the page, at `same_as`."""

    anchor: str
    title: str
    caption: str
    uri: str
    width: int
    height: int
    same_as: str


class Section(NamedTuple):
    anchor: str
    title: str  # of its table's, what that of the suite does not say
    unfair: str  # what is shown although it is not fair, as that was allowed
    parts: list[str]  # HTML
    views: list[View]
    notes: tuple[str, ...]
    plates: list[Plate]


def sections(material: Material) -> list[Section]:
    """One for each table, in order. A picture that two of them share is in the page once."""
    seen: dict[str, str] = {}
    found = []
    for name, table in zip(groups_of(material), material.tables, strict=True):
        figures = [figure for figure in material.figures.shown if figure.name.rpartition("/")[0] == name]
        parts = [part_to_html(part, material.results.frame) for part in table.parts if not _is_view(part)]
        plates = [_plate(figure, seen) for figure in figures]
        found.append(
            Section(anchor_of(name), *_title(table.title, material), parts, _views(table, material), table.notes, plates)
        )
    return found


def anchor_of(group: str) -> str:
    return "comparison" + (f"-{_plain(group)}" if group else "")


def _title(title: str, material: Material) -> tuple[str, str]:
    """What the suite's own title does not say, and apart from it what was allowed."""
    title, _, unfair = title.partition(ALTHOUGH)
    of_suite = str(material.suite.get("title") or material.suite["name"])
    rest = title.removeprefix(of_suite).removeprefix(":").strip()
    shown = rest if rest and not rest.startswith("(") else f"Comparison {rest}".strip()
    return shown, unfair.removesuffix("]").replace(f"]{ALTHOUGH}", "; ")


def _views(table: Table, material: Material) -> list[View]:
    frame = material.results.frame
    runs = {run for part in table.parts for row in part.rows for run in row.runs}
    own = frame[frame["run"].isin(runs)]
    have_ended = set(own["state"]) == {"done"}
    trained_for = set(own["budget_unit"]) if have_ended else set()
    reason = NO_CURVE if have_ended else NOT_KNOWN
    views = []
    for unit, tab in TABS.items():
        part = next((part for part in table.parts if _is_view(part) and part.title.startswith(TITLES[unit].split(" (")[0])), None)
        html = part_to_html(part, frame) if part else ""
        remark = "" if part else SAME.format(reason) if trained_for == {unit} else f"Not known: {reason}."
        views.append(View(unit, tab, html, remark))
    return views


def _is_view(part: Part) -> bool:
    return SHARE.metric in part.metrics


def _plate(figure: Figure, seen: dict[str, str]) -> Plate:
    anchor = f"figure-{_plain(figure.name)}"
    title = figure.name.rpartition("/")[2].replace("_", " ").replace("fid ", "FID ")
    digest = hashlib.sha256(figure.png).hexdigest()
    first = seen.setdefault(digest, anchor)
    width, height = (round(pixels / PIXELS_PER_PIXEL) for pixels in size_of(figure.png))
    uri = data_uri(smaller(figure.png)) if first == anchor else ""
    return Plate(anchor, title[0].upper() + title[1:], figure.caption, uri, width, height, "" if first == anchor else first)


def _plain(name: str) -> str:
    return re.sub(r"[^\w-]+", "-", name)
