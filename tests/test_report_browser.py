"""Can a report be used: in a real browser, by mouse and by keyboard, on narrow and wide screens, light and dark?"""

import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from command import tsbench
from reporting import grouped_suite, material_of, picture, runs_of_three

from bench.report import Material, page_of
from bench.report.material import Figure, Figures
from bench.tables import write_tables

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e .[dev]")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")
PATIENCE_MS = 600_000  # for what takes a second on an idle machine
WIDTHS = (360, 1400)
SCHEMES = ("light", "dark")
CONTRAST = 4.5  # of text to what is behind it, by the web's guidelines

# Text and what is behind it: the first background of an element around it that is not transparent.
TOO_FAINT = """(least) => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = parts(colour).map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = getComputedStyle(each).backgroundColor;
      if ((parts(colour)[3] ?? 1) > 0) return colour;
    }
    return getComputedStyle(document.documentElement).backgroundColor;
  };
  const found = new Set();
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility() || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const [a, b] = [light(element.closest("svg") ? style.fill : style.color), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < least) found.add(`${ratio.toFixed(2)} ${element.tagName} ${element.textContent.trim().slice(0, 40)}`);
  }
  return [...found];
}"""
BEYOND_THE_EDGE = """() => [...document.querySelectorAll("body *")]
  .filter((each) => each.checkVisibility() && each.getBoundingClientRect().right > innerWidth + 1)
  .filter((each) => !each.closest(".scroll, .sheet, pre, svg, .skip"))
  .map((each) => `${each.tagName} ${each.textContent.trim().slice(0, 40)}`)"""


class Opened(NamedTuple):
    page: Any
    complaints: list[str]  # errors and warnings on the console, and requests for anything but the file itself


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Material]:
    """A report, its tables beside it, and what it was made of."""
    folder = tmp_path_factory.mktemp("report")
    wide = Figure("scratch/heldout_loss", "A wide one.", picture((20, 90, 200)))
    material = material_of(runs_of_three(folder), grouped_suite(folder))
    figures = Figures((*material.figures.shown, wide))
    suite = str(folder / "two.yaml")
    material = material_of(
        list(material.runs.values()),
        grouped_suite(folder),
        figures=figures,
        target=str(folder),
        is_suite=False,
        options=("--suite", suite),
    )
    write_tables(material.tables, material.results, folder)
    (folder / "report.html").write_text(page_of(material))
    return folder / "report.html", material


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox"]  # as root there is none
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments, timeout=PATIENCE_MS)
        yield chromium
        chromium.close()


def open_page(browser: Any, path: Path, fragment: str = "", width: int = 1400, **options: Any) -> Opened:
    page = browser.new_page(viewport={"width": width, "height": 900}, **options)
    page.set_default_timeout(PATIENCE_MS)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url}"))
    page.on("request", lambda request: complaints.append(request.url) if not is_own(request.url, path) else None)
    page.goto(path.as_uri() + fragment)
    return Opened(page, complaints)


def is_own(url: str, path: Path) -> bool:
    return url.startswith("data:") or url.split("#")[0] == path.as_uri()


@pytest.fixture
def opened(browser: Any, made: tuple[Path, Material]) -> Iterator[Opened]:
    """Whatever a test does with it: no complaint, and no request."""
    opened = open_page(browser, made[0])
    yield opened
    assert opened.complaints == []
    opened.page.close()


def column(page: Any, table: str, place: int) -> list[str]:
    """The text of the body's cells in a column; 0 is that of the methods."""
    cells: list[str] = page.eval_on_selector_all(f"#{table} tbody tr", f"rows => rows.map(row => row.cells[{place}].textContent)")
    return cells


def mean(text: str) -> float:
    return float(text.split(" ")[0].replace(",", ""))


def head(page: Any, name: str, table: str = "table-2") -> Any:
    return page.locator(f"#{table} thead th", has=page.get_by_role("button", name=name))


def test_headings_sort_by_the_number_behind_the_text(opened: Opened) -> None:
    page = opened.page
    before = column(page, "table-2", 1)
    fid = head(page, "FID (train)")
    assert fid.get_attribute("aria-sort") == "none"
    fid.get_by_role("button").click()
    rising = [mean(text) for text in column(page, "table-2", 1)]
    assert rising == sorted(rising) and fid.get_attribute("aria-sort") == "ascending"
    fid.get_by_role("button").click()
    assert [mean(text) for text in column(page, "table-2", 1)] == rising[::-1] and fid.get_attribute("aria-sort") == "descending"
    fid.get_by_role("button").click()
    assert column(page, "table-2", 1) == before and fid.get_attribute("aria-sort") == "none"


def test_sorting_by_keyboard_and_by_name_moves_whole_rows_and_not_the_floor(opened: Opened) -> None:
    page = opened.page
    rows = dict(zip(column(page, "table-2", 0), column(page, "table-2", 2), strict=True))
    head(page, "FID (held-out)").get_by_role("button").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Space")
    assert head(page, "FID (held-out)").get_attribute("aria-sort") == "descending"
    falling = [mean(text) for text in column(page, "table-2", 2)]
    assert falling == sorted(falling, reverse=True)
    head(page, "Method").get_by_role("button").press("Enter")
    assert head(page, "FID (held-out)").get_attribute("aria-sort") == "none"
    assert column(page, "table-2", 0) == sorted(rows)
    assert dict(zip(column(page, "table-2", 0), column(page, "table-2", 2), strict=True)) == rows
    assert page.locator("#table-2 tfoot th").text_content() == "Real data"


def test_what_has_no_number_stays_last(opened: Opened) -> None:
    page = opened.page
    page.evaluate("document.querySelector('#table-2 tbody tr td').dataset.sort = ''")
    without = column(page, "table-2", 0)[0]
    for _ in range(2):
        head(page, "FID (train)").get_by_role("button").click()
        assert column(page, "table-2", 0)[-1] == without


def shown_views(page: Any, section: str) -> list[str]:
    panels: list[str] = page.eval_on_selector_all(
        f"#{section} [role=tabpanel]", "all => all.filter(each => each.checkVisibility()).map(each => each.textContent)"
    )
    return panels


def test_the_budget_view_is_switched_by_click(opened: Opened) -> None:
    page = opened.page
    (first,) = shown_views(page, "comparison-scratch")
    assert "At equal images (256 k)" in first or "At equal images" in first
    page.locator("#comparison-scratch").get_by_role("tab", name="Equal training FLOPs").click()
    (second,) = shown_views(page, "comparison-scratch")
    assert "At equal training compute" in second and "At equal images" not in second
    (other,) = shown_views(page, "comparison-tuned")
    assert "At equal images" in other


def test_the_budget_view_is_switched_by_arrow_keys(opened: Opened) -> None:
    page = opened.page
    tabs = page.locator("#comparison-tuned").get_by_role("tab")
    tabs.first.focus()
    for key, place in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowRight", 0), ("ArrowLeft", 2), ("Home", 0), ("End", 2)):
        page.keyboard.press(key)
        assert [tab.get_attribute("aria-selected") for tab in tabs.all()] == [str(i == place).lower() for i in range(3)]
        assert tabs.nth(place).evaluate("each => each === document.activeElement && each.tabIndex === 0")
    assert "At equal device time" in shown_views(page, "comparison-tuned")[0]
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "tabpanel"


def test_a_cell_leads_to_each_of_its_runs(opened: Opened, made: tuple[Path, Material]) -> None:
    page, (_, material) = opened.page, made
    runs = material.tables[0].parts[1].rows[0].runs
    page.locator("#table-2 tbody td button").first.press("Enter")
    links = page.get_by_role("dialog").get_by_role("link")
    assert [link.get_attribute("href") for link in links.all()] == [f"#run-{run}" for run in runs] and len(runs) == 3
    links.nth(1).click()
    assert not page.get_by_role("dialog").is_visible()
    run = page.locator(f"#run-{runs[1]}")
    run.get_by_text("All settings").wait_for()  # visible
    assert run.evaluate("each => each.open && each.contains(document.activeElement)")
    assert run.bounding_box()["y"] == pytest.approx(0, abs=40)
    assert page.url.endswith(f"#run-{runs[1]}")
    page.locator("#table-2 tbody td button").first.click()
    page.keyboard.press("Escape")
    assert not page.get_by_role("dialog").is_visible()


def test_the_command_that_a_cell_gives_explains_it(opened: Opened) -> None:
    page = opened.page
    for table in ("table-2", "table-3", "table-5"):
        if page.locator(f"#{table} td button").first.is_visible():
            page.locator(f"#{table} td button").first.click()
            text = page.locator("#behind-value").text_content()
            words = shlex.split(page.locator("#behind-command").text_content())
            outcome = tsbench(*words[1:])
            assert outcome.code == 0 and text.split(": ", 1)[0] in outcome.out
            assert f": {text.rsplit(': ', 1)[1]}" in outcome.out.split("\n")[1]
            page.keyboard.press("Escape")


def test_an_address_opens_its_run(browser: Any, made: tuple[Path, Material]) -> None:
    path, material = made
    run = next(iter(material.runs))
    opened = open_page(browser, path, f"#run-{run}")
    assert opened.page.locator("details.run[open]").evaluate_all("all => all.map(each => each.id)") == [f"run-{run}"]
    assert opened.complaints == []


def test_runs_are_found_by_what_is_on_their_page(opened: Opened, made: tuple[Path, Material]) -> None:
    page, (_, material) = opened.page, made
    run = list(material.runs)[-1]
    page.get_by_role("searchbox").fill(run)
    assert page.locator("details.run:visible").evaluate_all("all => all.map(each => each.id)") == [f"run-{run}"]
    assert page.get_by_role("status").text_content() == f"1 of {len(material.runs)}"
    page.get_by_role("searchbox").fill("")
    assert page.locator("details.run:visible").count() == len(material.runs)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_fits_the_screen_and_can_be_read(browser: Any, made: tuple[Path, Material], width: int, scheme: str) -> None:
    opened = open_page(browser, made[0], width=width, color_scheme=scheme)
    page = opened.page
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    page.evaluate("document.querySelectorAll('[hidden]').forEach((each) => { each.hidden = false; })")
    for state in ("page", "dialog"):
        if state == "dialog":
            page.locator("#table-2 td button").first.click()
        assert page.evaluate(BEYOND_THE_EDGE) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(TOO_FAINT, CONTRAST) == []
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark") and opened.complaints == []


def test_pictures_are_whole(opened: Opened) -> None:
    sizes = opened.page.eval_on_selector_all("img", "all => all.map(each => [each.complete, each.naturalWidth > 0])")
    assert sizes and all(complete and there for complete, there in sizes)


def test_what_has_the_focus_is_seen(opened: Opened) -> None:
    page = opened.page
    seen = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        tag, width = page.evaluate("[document.activeElement.tagName, getComputedStyle(document.activeElement).outlineWidth]")
        seen.add(tag)
        assert float(width.removesuffix("px")) >= 2, tag
    assert {"A", "BUTTON"} <= seen


def test_without_scripts_everything_can_be_read(browser: Any, made: tuple[Path, Material]) -> None:
    page = open_page(browser, made[0], java_script_enabled=False).page
    assert page.locator("[role=tabpanel]:visible").count() == 6
    assert page.locator("details.run > summary:visible").count() == len(made[1].runs)
