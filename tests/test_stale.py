"""Is a run stale by a change of what made it, and by nothing else?"""

from pathlib import Path
from typing import Any

import pytest
from command import TINY

from bench import job, provenance
from bench.provenance import code_files, imported_methods
from bench.runs import Run
from methods import METHODS

OTHER = "0" * 12  # the hash of other code


def run_of(method: str, **code: str | None) -> Run:
    """Made by this code, but for the files given; None: a file that was not there."""
    before: dict[str, Any] = {**code_files(), **{name.replace("__", "/") + ".py": found for name, found in code.items()}}
    run = Run(Path("runs") / method)
    run.__dict__["provenance"] = {"code_files": {name: found for name, found in before.items() if found is not None}}
    run.__dict__["config"] = {"method": method}
    return run


def test_a_run_of_this_code_is_not_stale_nor_one_that_nobody_began(tmp_path: Path) -> None:
    assert all(job.difference_of(run_of(method)) == [] for method in METHODS)
    assert job.difference_of(Run(tmp_path / "nothing")) == []


@pytest.mark.parametrize("file", ["bench/trainer", "bench/sample", "bench/data/digits", "methods/initial", "methods/backbone"])
def test_what_all_runs_are_made_by_concerns_all(file: str) -> None:
    for method in METHODS:
        assert job.difference_of(run_of(method, **{file.replace("/", "__"): OTHER})) == [f"{file}.py changed"]


def test_another_method_concerns_nobody_else() -> None:
    """It may be mended, added or removed."""
    for method in METHODS:
        changes = {
            f"methods__{METHODS[other].__module__.removeprefix('methods.')}": OTHER for other in METHODS if other != method
        }
        assert job.difference_of(run_of(method, **changes, methods__gone=OTHER)) == []
        own = METHODS[method].__module__.replace(".", "/")
        assert job.difference_of(run_of(method, **{own.replace("/", "__"): OTHER})) == [f"{own}.py changed"]
        assert job.difference_of(run_of(method, **{own.replace("/", "__"): None})) == [f"{own}.py added"]


def test_what_a_method_imports_and_what_that_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "one": "from methods.two import f\nimport torch\n",
        "two": "def f():\n    from methods.three import g\n    from bench.method import Method\n",
        "three": "from methods.one import f\n",
        "four": "import methods.one\n",
        "five": "from methods import one\n",
    }
    (tmp_path / "methods").mkdir()
    for name, text in files.items():
        (tmp_path / "methods" / f"{name}.py").write_text(text)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    ring = {"methods.one", "methods.two", "methods.three"}
    assert imported_methods("methods.one") == imported_methods("methods.two") == ring
    assert imported_methods("methods.four") == {"methods.four"} | ring
    assert imported_methods("methods.five") == {"methods.five"} | ring
    assert imported_methods("methods.none") == {"methods.none"}


@pytest.mark.parametrize(
    ("method", "settings", "count"),
    [
        ("multi_expert", ["options.experts=3", "system.experts=separate_jobs"], 3),
        ("multi_expert", ["options.experts=3"], 0),
        ("dense", [], 0),
    ],
)
def test_how_many_jobs_a_run_takes(method: str, settings: list[str], count: int) -> None:
    assert job.num_separate_experts(job.make_config({"method": method}, [*TINY, *settings])) == count


def test_experts_that_share_are_refused_before_any_job() -> None:
    with pytest.raises(ValueError, match=r"^system.experts is separate_jobs, but the intervals of this method share "):
        job.num_separate_experts(job.make_config({"method": "remix_dit"}, [*TINY, "system.experts=separate_jobs"]))
