"""Are the papers' figures those that were checked, and is a faulty file of them refused in one sentence?"""

import hashlib
from pathlib import Path

import pandas as pd
import pytest

from bench.published import facts as facts_module
from bench.published import read_facts
from bench.published.facts import FOLDER
from bench.published.table import METRICS

FILES = {  # lines, and a checksum of what they say
    "diffmoe": (152, "e03fd4841d6f4a96"),
    "dit": (109, "a8ba8dbfac97db5a"),
    "dit_moe": (87, "67bae2430c543d74"),
    "dsmoe": (50, "a001cbf19a6b9e5f"),
    "dtr": (99, "69d1b3edb6f03b5e"),
    "others": (85, "7edec189565ce6f5"),
    "promoe": (151, "12194ba8fcd7ec85"),
    "race_dit": (142, "7cc0bb93dcf945da"),
    "remix_dit": (310, "055bb9671340bcc4"),
    "switch_dit": (66, "fab4a770796fa794"),
}


def checksum(facts: pd.DataFrame) -> str:
    return hashlib.sha256(facts.to_csv(index=False, lineterminator="\n").encode()).hexdigest()[:16]


def test_every_file_is_known() -> None:
    assert {path.stem for path in FOLDER.glob("*.csv")} == {*FILES, "computed_costs"}


@pytest.mark.parametrize("name", FILES)
def test_the_figures_are_those_that_were_checked(name: str) -> None:
    facts = read_facts(name)
    assert (len(facts), checksum(facts)) == FILES[name]


def test_a_directions_metric_is_the_same_wherever_it_is_published() -> None:
    facts = pd.concat(read_facts(name) for name in FILES)
    told = facts[facts["higher_is_better"] != ""].groupby("metric")["higher_is_better"].nunique()
    assert (told == 1).all()
    words = {"lower": "false", "higher": "true"}
    known = facts[facts["metric"].isin([metric for metric, column in METRICS.items() if column.better])]
    told_here = known[known["higher_is_better"] != ""].drop_duplicates("metric").set_index("metric")["higher_is_better"]
    assert {metric: words[METRICS[metric].better] for metric in told_here.index} == told_here.to_dict()


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("source", " ", "no source in line 3"),
        ("confidence", "certain", "confidence other than primary, secondary, digitised in line 3"),
        ("higher_is_better", "yes", "higher_is_better"),
        ("arxiv", "2212.9748", "no arXiv number"),
        ("value", "12.5 FID", "no figure"),
        ("model", "", "an empty name"),
        ("model", "DiT-S/8", "there twice in line 3"),
    ],
)
def test_a_faulty_file_is_one_sentence(
    column: str, value: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = read_facts("dit")[lambda frame: frame["metric"] == "FID-50K"]
    facts.iloc[1, facts.columns.get_loc(column)] = value
    facts.to_csv(tmp_path / "dit.csv", index=False)
    monkeypatch.setattr(facts_module, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as refusal:
        read_facts("dit")
    assert words in str(refusal.value)


def test_missing_and_strange_files_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts_module, "FOLDER", tmp_path)
    (tmp_path / "strange.csv").write_text("a,b\n1,2\n")
    (tmp_path / "torn.csv").write_text('a,b\n"1,2\n')
    for name, words in (("none", "there is no file"), ("strange", "has the columns a, b"), ("torn", "cannot be read as CSV")):
        with pytest.raises(ValueError, match=rf"^[^\n]*{words}[^\n]*$"):
            read_facts(name)
