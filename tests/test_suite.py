"""Does a suite file become exactly its runs, and a faulty one a clear sentence?"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from command import assert_refused, tsbench
from helpers import PUBLISHED

from bench.job import make_config
from bench.suite import FOLDER, load_suite, suite_configs

SUITE: dict[str, Any] = {
    "base": {"model": {"width": 16, "num_heads": 2}, "train": {"lr": 0.1}},
    "methods": [{"method": "dense", "label": "One", "colour": "#000000"}, {"method": "multi_expert", "options": {"experts": 2}}],
}


@pytest.mark.parametrize("name", [path.stem for path in FOLDER.glob("demo*.yaml")])
def test_the_demos_compare_every_method_and_nothing_but_the_method(name: str) -> None:
    suite = load_suite(name)
    configs = suite_configs(suite, [], make_config)
    assert [config.method for config in configs] == list(PUBLISHED)
    assert len({config.run_id for config in configs}) == len(configs) == len({config.label for config in configs})
    same = [{**asdict(config), "method": "", "label": "", "options": {}} for config in configs]
    assert all(settings == same[0] for settings in same)
    assert suite.get("converged", True) == (name == "demo")


def test_a_suite_is_every_method_at_every_point_of_the_grid() -> None:
    suite = {**SUITE, "grid": {"seed": [0, 1], "diffusion.schedule": ["linear", "cosine"], "data.flip": [True]}}
    configs = suite_configs(suite, ["train.lr=0.5"], make_config)
    assert [(c.method, c.seed, c.diffusion.schedule) for c in configs] == [
        (method, seed, schedule) for method in ("dense", "multi_expert") for seed in (0, 1) for schedule in ("linear", "cosine")
    ]
    assert all(c.model.width == 16 and c.train.lr == 0.5 and c.data.flip for c in configs)
    assert configs[0].label == "One" and configs[-1].options == {"experts": 2}


def test_the_same_run_twice_is_refused() -> None:
    twice = {"methods": [{"method": "dense", "label": "One"}, {"method": "dense", "label": "Two"}]}
    with pytest.raises(ValueError, match=r"^dense-\w+ \(Two\) is in the suite more than once with these settings: [^\n]*$"):
        suite_configs(twice, [], make_config)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ("there is no suite", "demo, demo-quick")),
        ("", ("lists no methods",)),
        ("- a", ("holds a list",)),
        ("methods: 3", ("lists no methods",)),
        ("methods: []", ("lists no methods",)),
        ("methods: [dense]", ("lists no methods", "`method` each")),
        ("methods: [{label: x}]", ("lists no methods",)),
        ("method: dense", ("unknown keys method", "methods")),
        ("{methods: [{method: dense}], grid: [seed]}", ("grid", "seed: [0, 1, 2]")),
        ("{methods: [{method: dense}], grid: {seed: 3}}", ("grid", "seed: [0, 1, 2]")),
        ("{methods: [{method: dense}], base: 3}", ("base 3",)),
        ("methods: [", ("cannot be read as YAML",)),
    ],
)
def test_a_faulty_suite_is_one_sentence(text: str | None, words: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as refusal:
        load_suite(str(path))
    assert all(word in str(refusal.value) for word in words)
    assert_refused(tsbench("tables", tmp_path, "--suite", path), *words)


def test_a_fault_in_an_entry_is_named_when_its_run_is_made() -> None:
    for entry, word in (({"method": "nothing"}, "'nothing'"), ({"method": "dense", "lr": 1}, "train.lr")):
        with pytest.raises(ValueError, match=word):
            suite_configs({"methods": [entry]}, [], make_config)
