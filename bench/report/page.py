"""How do the parts of a report become one HTML file that needs nothing else?"""

import json
import re
from importlib.resources import files

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup, escape

from bench.report.material import Material
from bench.report.methods import about_all
from bench.report.reproduce import options_of, steps
from bench.report.run_pages import run_pages
from bench.report.sections import sections
from bench.report.summary import facts, verdict
from bench.tidy import FLOOR


def page_of(material: Material) -> str:
    """The whole file. The same material gives the same text."""
    frame = material.results.frame
    described = about_all(sorted(set(frame[frame["run"] != FLOOR]["method"])), material.docstrings)
    return _template().render(
        title=str(material.suite.get("title") or material.suite["name"]),
        material=material,
        facts=facts(material, {each.method: each.name for each in described}),
        verdicts=[verdict(table) for table in material.tables],
        sections=sections(material),
        runs=run_pages(material),
        protocols=_protocols(material),
        about=described,
        suite_deviations=[str(text) for text in material.suite.get("deviations") or []],
        steps=steps(material),
        options=options_of(material),
        style=Markup(_part("report.css")),
        script=Markup(_part("report.js")),
    )


def _protocols(material: Material) -> dict[str, dict[str, str]]:
    frame = material.results.frame
    scored = frame[frame["protocol_hash"] != ""].drop_duplicates("protocol_hash").sort_values("protocol_hash")
    texts = zip(scored["protocol_hash"], scored["protocol"], strict=True)
    return {str(name): {key.replace("_", " "): str(value) for key, value in json.loads(text).items()} for name, text in texts}


def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"html": Markup, "code": _with_code}
    return environment.from_string(_part("page.html"))


def _with_code(text: str) -> Markup:
    """What stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _part(name: str) -> str:
    return files("bench.report").joinpath(name).read_text(encoding="utf-8")
