"""Is it written down which code, in which job, on which device made a number?"""

import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_tree import TREE, commit_all, forget_surroundings, git, write_tree

from bench import provenance as module
from bench.provenance import code_difference, code_files, code_hash, gpu_versions, provenance, version_of

HASH_OF_TREE = "e62dbd496437"  # as commit b44dbc6 computed it: run folders hold such hashes
THAT_COUNT = ["bench/__init__.py", "bench/data/digits.safetensors", "bench/trainer.py", "methods/__init__.py", "methods/a.py"]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small tree of code in place of this one."""
    root = write_tree(tmp_path / "tree")
    forget_surroundings(monkeypatch)
    monkeypatch.setattr(module, "ROOT", root)
    module._read_code.cache_clear()
    yield root
    module._read_code.cache_clear()


def test_the_hash_is_of_the_files_that_can_change_a_number(tree: Path) -> None:
    before = code_files()
    assert code_hash() == HASH_OF_TREE and sorted(before) == THAT_COUNT
    for name, text in TREE.items():
        (tree / name).write_text("edited\n")
        module._read_code.cache_clear()
        assert (code_hash() != HASH_OF_TREE) == (name in THAT_COUNT)
        assert code_difference(before, code_files()) == ([f"{name} changed"] if name in THAT_COUNT else [])
        (tree / name).write_text(text)


def test_hash_and_files_are_of_one_moment(tree: Path) -> None:
    """What is edited while a run goes on is not what the process has imported."""
    before = code_hash()
    (tree / "bench/trainer.py").write_text("step = 2\n")
    assert code_hash() == before and code_files()["bench/trainer.py"] == "f9106bcd5f83"


def test_a_difference_names_each_file() -> None:
    before = {"bench/a.py": "1", "bench/b.py": "2", "methods/gone.py": "3"}
    now = {"methods/new.py": "3", "bench/b.py": "other", "bench/a.py": "1"}
    assert code_difference(before, now) == ["bench/b.py changed", "methods/gone.py removed", "methods/new.py added"]
    assert code_difference(before, before) == []


def test_a_clean_tree_is_its_commit(tree: Path) -> None:
    commit = commit_all(tree)
    assert version_of(tree) == {"commit": commit, "dirty": False, "diff": ""}


def test_what_is_not_committed_is_kept_whole(tree: Path) -> None:
    """The diff brings the edited files back to the byte, whatever the user's settings of git are."""
    (tree / "bench/trainer.py").write_bytes(b"a\r\nb\r\nlatin \xe9\n")
    commit = commit_all(tree)
    git(tree, "config", "color.ui", "always")
    git(tree, "config", "diff.external", "/bin/true")
    (tree / "methods/a.py").write_bytes(b"width = 3\r\n")
    (tree / "bench/cli.py").unlink()
    (tree / "methods/new.py").write_text("depth = 1\n")
    git(tree, "add", "bench/cli.py")
    version = version_of(tree)
    assert version["commit"] == commit and version["dirty"] is True
    assert version["diff"].startswith("new file: methods/new.py\ndiff --git a/bench/cli.py b/bench/cli.py\n")
    git(tree, "add", ".")
    git(tree, "stash", "-q")
    (tree / "patch").write_bytes(version["diff"].encode())
    git(tree, "apply", "patch")
    assert (tree / "methods/a.py").read_bytes() == b"width = 3\r\n" and not (tree / "bench/cli.py").exists()


def test_a_diff_that_is_no_text_does_not_stop_a_run(tree: Path) -> None:
    (tree / "bench/trainer.py").write_bytes(b"latin \xe9\n")
    commit_all(tree)
    (tree / "bench/trainer.py").write_bytes(b"latin \xe8\n")
    assert r"+latin \xe8" in version_of(tree)["diff"]


def test_without_git_nothing_is_claimed(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = {"commit": None, "dirty": None, "diff": None}
    assert version_of(tree) == nothing
    git(tree, "init", "-q")
    git(tree, "add", ".")
    assert version_of(tree) == nothing, "there is no commit yet"
    commit_all(tree)
    monkeypatch.setenv("PATH", "")
    assert version_of(tree) == nothing


def test_the_repository_around_an_installed_tree_is_not_its_commit(tree: Path) -> None:
    """A virtual environment lies in a repository, and is ignored by it."""
    (tree.parent / ".gitignore").write_text("tree/\n")
    commit_all(tree.parent)
    assert version_of(tree)["commit"] is None


def test_a_snapshot_says_from_what_it_was_taken(tree: Path) -> None:
    commit_all(tree)
    (tree / "snapshot.json").write_text('{"hash": "5a5a", "commit": "c0ffee", "dirty": true, "diff": "+1\\n", "made": "now"}')
    assert version_of(tree) == {"commit": "c0ffee", "dirty": True, "diff": "+1\n"}
    found = provenance("cpu", 1, 1)
    assert (found["snapshot"], found["commit"], found["dirty"], found["diff"]) == ("5a5a", "c0ffee", True, "+1\n")


def test_a_job_starts_no_program_to_describe_itself(tree: Path) -> None:
    """A cluster that samples memory would count the job's own once more for as long as it takes to start one."""
    (tree / "snapshot.json").write_text(json.dumps({"hash": "a", "commit": None, "dirty": None, "diff": None}))
    script = f"""
import sys
from pathlib import Path
from bench import provenance as module

sys.addaudithook(lambda event, _: event != "subprocess.Popen" or sys.exit("starts a program"))
module.ROOT = Path({str(tree)!r})
assert module.provenance("cpu", 1, 1)["platform"] == {platform.platform()!r}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_job_is_written_down(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"JOB_ID": "14", "ARRAY_JOB_ID": "12", "ARRAY_TASK_ID": "2", "JOB_NODELIST": "n[1-2]"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "ci")
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    found = provenance("cpu", 1, 4)
    job = {"job_id": "14", "array_job_id": "12", "array_task_id": "2", "restart_count": None, "nodes": "n[1-2]", "cluster": "ci"}
    assert found["slurm"] == job and found["node"] == "n2"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert provenance("cpu", 1, 4)["slurm"] == job | {"restart_count": "3"}


def test_on_a_laptop_there_is_no_job_no_snapshot_and_no_driver(tree: Path) -> None:
    found = provenance("cpu", 1, 1)
    assert set(found["slurm"].values()) == {None} and found["node"] == found["host"]
    assert [found[key] for key in ("snapshot", "driver", "cuda", "cudnn", "commit", "dirty", "diff")] == [None] * 7
    assert found["code_hash"] == HASH_OF_TREE and found["code_files"] == code_files()


def test_the_driver_is_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$*" = "--query-gpu=driver_version --format=csv,noheader" ] && printf "570.1.2\\n570.1.2\\n"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    assert gpu_versions("cuda:0") == {"driver": "570.1.2", "cuda": "13.0", "cudnn": "91900"}
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert gpu_versions("cuda")["driver"] is None


def test_the_version_of_a_tree_is_told_without_torch() -> None:
    code = "import sys, bench.provenance as p; p.version_of(p.ROOT); p.code_files(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
