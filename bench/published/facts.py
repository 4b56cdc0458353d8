"""Which figures did the papers publish, where do they stand, and how sure are they?

`results/published/PAPER.csv` has one figure a line, as text: what was printed is shown as it was printed.
"""

import re
from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).parent.parent.parent / "results" / "published"
COLUMNS = ("paper", "arxiv", "table", "setting", "model", "metric", "value", "higher_is_better", "source", "confidence")
KEY = ["paper", "table", "setting", "model", "metric"]  # names one figure
CONFIDENCES = ("primary", "secondary", "digitised")
ARXIV = re.compile(r"\d{4}\.\d{5}( / \d{4}\.\d{5})*")
VALUE = re.compile(r"(\d+x)?\d+(\.\d+)?(\+-\d+(\.\d+)?)?")  # 4x458.10: four whole networks; 5.16+-0.04: over seeds


def read_facts(name: str) -> pd.DataFrame:
    """The published figures of one paper, all text; ValueError in one sentence if the file is not as it must be."""
    path = FOLDER / f"{name}.csv"
    if not path.is_file():
        raise ValueError(
            f"there is no file {path}: published figures come with a checkout of the repository, not with the package"
        )
    try:
        facts = pd.read_csv(path, dtype=str, keep_default_na=False)
    except ValueError as error:  # pandas' parser errors are ValueErrors
        raise ValueError(f"{path} cannot be read as CSV ({str(error).splitlines()[0]}): restore it") from None
    if list(facts.columns) != list(COLUMNS):
        raise ValueError(f"{path} has the columns {', '.join(facts.columns)}: it must have {', '.join(COLUMNS)}")
    _check(facts, path)
    return facts


def _check(facts: pd.DataFrame, path: Path) -> None:
    faults = {
        "no source": facts["source"].str.strip() == "",
        f"a confidence other than {', '.join(CONFIDENCES)}": ~facts["confidence"].isin(CONFIDENCES),
        "higher_is_better other than true, false or nothing": ~facts["higher_is_better"].isin(["true", "false", ""]),
        "no arXiv number": ~facts["arxiv"].str.fullmatch(ARXIV),
        "a value that is no figure": ~facts["value"].str.fullmatch(VALUE),
        "an empty name": (facts[KEY] == "").any(axis=1),
        "a figure that is there twice": facts.duplicated(KEY),
    }
    for fault, found in faults.items():
        if found.any():
            raise ValueError(f"{path} has {fault} in line {int(found.to_numpy().argmax()) + 2}: restore the file")
