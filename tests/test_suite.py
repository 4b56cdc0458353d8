"""Does a suite file become exactly its runs, and a faulty one a clear sentence?"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import assert_refused, tsbench
from helpers import PUBLISHED

from bench.job import make_config
from bench.suite import FOLDER, SuiteRun, load_suite, suite_configs, suite_runs

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


# Groups, and runs that start from others

GROUPS: dict[str, Any] = {
    "base": SUITE["base"],
    "groups": {
        "short": {"methods": [{"method": "dense", "name": "source"}, {"method": "dtr"}], "grid": {"seed": [0, 1]}},
        "long": {"base": {"budget": {"amount": 64}, "train": {"lr": 0.2}}, "methods": [{"method": "dense"}]},
    },
}


def runs_of(tree: dict[str, Any], *overrides: str) -> list[SuiteRun]:
    return suite_runs(tree, list(overrides), make_config)


def loaded(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    (folder / "mine.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return load_suite(str(folder / "mine.yaml"))


def test_groups_have_settings_and_grids_of_their_own(tmp_path: Path) -> None:
    suite = loaded(GROUPS, tmp_path)
    runs = runs_of(suite, "train.batch_size=16")
    assert [(run.group, run.config.method, run.config.seed) for run in runs] == [
        *(("short", method, seed) for method in ("dense", "dtr") for seed in (0, 1)),
        ("long", "dense", 0),
    ]
    assert [run.config.train.lr for run in runs] == [0.1] * 4 + [0.2] and runs[4].config.budget.amount == 64
    assert all(run.config.model.width == 16 and run.config.train.batch_size == 16 for run in runs)
    assert [(entry["method"], entry["group"]) for entry in suite["methods"]] == [
        ("dense", "short"),
        ("dtr", "short"),
        ("dense", "long"),
    ]


def test_a_grid_of_an_entry_is_its_own() -> None:
    suite = {"methods": [{"method": "dense", "grid": {"train.lr": [0.1, 0.2]}}, {"method": "dtr"}], "grid": {"seed": [3]}}
    assert [(run.config.method, run.config.train.lr, run.config.seed) for run in runs_of(suite)] == [
        *(("dense", lr, 3) for lr in (0.1, 0.2)),
        ("dtr", 1e-3, 3),
    ]


def test_a_run_in_two_groups_is_one_run_listed_twice() -> None:
    """It is trained once, and counts in both comparisons; twice in one group is refused."""
    same = {"method": "dense"}
    groups = {"one": {"methods": [{"method": "dense"}, {"method": "dtr"}]}, "two": {"methods": [same, {"method": "dit_moe"}]}}
    runs = runs_of({"groups": groups})
    assert [run.group for run in runs] == ["one", "one", "two", "two"]
    assert runs[0].config.run_id == runs[2].config.run_id
    assert len(suite_configs({"groups": groups}, [], make_config)) == 3
    groups["two"]["methods"].append({"method": "dense"})
    with pytest.raises(ValueError, match=r"^dense-\w+ \(dense\) is in the suite more than once"):
        runs_of({"groups": groups})


def test_an_entry_starts_from_the_run_of_another_with_its_seed() -> None:
    follower = {"method": "multi_expert", "start_from": "source"}
    groups = {**GROUPS["groups"], "after": {"methods": [follower], "grid": {"seed": [1, 0]}}}
    runs = runs_of({**GROUPS, "groups": groups})
    sources = {run.config.seed: run.config.run_id for run in runs if run.entry.get("name") == "source"}
    assert [(run.config.seed, run.starts_from) for run in runs if run.group == "after"] == [(1, sources[1]), (0, sources[0])]
    assert all(not run.starts_from for run in runs if run.group != "after")
    assert runs[-1].config.train.init_from == f"run:{sources[0]}"
    others = runs_of({**GROUPS, "groups": groups}, "train.lr=0.7")
    assert others[-1].starts_from not in sources.values()  # another source makes it another run
    assert others[-1].config.run_id != runs[-1].config.run_id


def test_one_source_serves_all_seeds_and_may_stand_in_the_same_group() -> None:
    methods = [
        {"method": "dense", "name": "source"},
        {"method": "multi_expert", "start_from": "source", "grid": {"seed": [0, 1, 2]}},
    ]
    source, *followers = runs_of({"methods": methods})
    assert [run.starts_from for run in followers] == [source.config.run_id] * 3


@pytest.mark.parametrize(
    "methods",
    [
        [{"method": "dense", "start_from": "nothing"}],
        [{"method": "dense", "start_from": "later"}, {"method": "dtr", "name": "later"}],
        [
            {"method": "dense", "name": "source", "grid": {"seed": [1, 2]}},
            {"method": "dtr", "start_from": "source"},
        ],
        [
            {"method": "dense", "name": "source", "grid": {"train.lr": [0.1, 0.2]}},
            {"method": "dtr", "start_from": "source"},
        ],
    ],
    ids=["unknown", "later", "no such seed", "two of that seed"],
)
def test_a_source_that_is_not_one_run_is_refused(methods: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r"^start_from is '\w+', of which \d runs with seed 0 come before: name [^\n]*$"):
        runs_of({"methods": methods})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{groups: [a]}", ("groups that are no mapping",)),
        ("{groups: {}}", ("groups that are no mapping",)),
        ("{groups: {a: {methods: [{method: dense}]}}, methods: [{method: dense}]}", ("methods beside them",)),
        ("{groups: {a: 3}}", ("group a of suite", "is 3")),
        ("{groups: {a: {methods: []}}}", ("group a of suite", "lists no methods")),
        ("{groups: {a: {methods: [{method: dense}], budget: 3}}}", ("group a of suite", "unknown keys budget")),
        ("{groups: {a: {methods: [{method: dense, grid: {seed: 0}}]}}}", ("group a of suite", "seed: [0, 1, 2]")),
    ],
)
def test_a_faulty_group_is_one_sentence(text: str, words: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    assert_refused(tsbench("status", path), *words)


def test_one_run_under_two_labels_is_refused() -> None:
    """It knows one of them only, so it would be missing where the other is shown."""
    entry = {"method": "dense", "label": "One"}
    twice = {"groups": {"a": {"methods": [entry]}, "b": {"methods": [{**entry, "label": "Two"}]}}}
    with pytest.raises(ValueError, match=r"^dense-\w+ is in the suite as 'One' and as 'Two', with the same settings: [^\n]*$"):
        suite_runs(twice, [], make_config)
    twice["groups"]["b"]["methods"] = [entry]
    assert len(suite_runs(twice, [], make_config)) == 2
