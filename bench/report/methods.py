"""What do the methods' own files say of them: the paper, and where they deviate from it?"""

import inspect
import re
from collections.abc import Mapping
from typing import NamedTuple

BREAK = "\n\n"


class About(NamedTuple):
    method: str
    name: str
    title: str
    paper: str
    deviations: str


def about(method: str, docstring: str) -> About:
    """From the docstring of a method's file: its first line, the paragraph of its paper, and what follows "Deviations:"."""
    paragraphs = inspect.cleandoc(docstring).split(BREAK)
    paper = next((text for text in paragraphs if re.match(r"Papers?:", text)), "")
    start = next((i for i, text in enumerate(paragraphs) if text.startswith("Deviations:")), None)
    deviations = BREAK.join(paragraphs[start:]).removeprefix("Deviations:") if start is not None else "not told"
    title = _joined(paragraphs[0])
    return About(method, title.partition(":")[0], title, _joined(re.sub(r"^Papers?:", "", paper)), _joined(deviations))


def about_all(methods: list[str], docstrings: Mapping[str, str]) -> list[About]:
    return [about(method, docstrings[method]) for method in methods if method in docstrings]


def _joined(text: str) -> str:
    return " ".join(text.split())
