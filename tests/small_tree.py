"""What stands in for this repository in tests of snapshots and provenance? A few files of code, with or without git."""

import os
import subprocess
from pathlib import Path

import pytest

TREE = {
    "bench/__init__.py": "",
    "bench/trainer.py": "step = 1\n",
    "bench/data/digits.safetensors": "weights\n",
    "bench/data/notes.txt": "no code\n",
    "bench/tables/notes.py": "presentation = True\n",
    "bench/cli.py": "presentation = True\n",
    "bench/suites/demo.yaml": "a: 1\n",
    "methods/__init__.py": "",
    "methods/a.py": "width = 2\n",
    "slurm/sweep.py": "jobs = 3\n",
    "slurm/cluster.sh": "echo up\n",
    "pyproject.toml": "[project]\n",
    "README.md": "text\n",
}


def write_tree(root: Path) -> Path:
    for name, text in TREE.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def forget_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the tests ran neither in a hook of a repository nor in a job of a cluster."""
    for name in [name for name in os.environ if name.startswith(("GIT_", "SLURM"))]:
        monkeypatch.delenv(name)


def git(root: Path, *arguments: str) -> str:
    """git as on a machine without settings; what it prints."""
    identity = ("-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main")
    environment = os.environ | {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    command = ["git", "-C", str(root), *identity, *arguments]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def commit_all(root: Path) -> str:
    """The commit that now holds the tree."""
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "--allow-empty", "-m", "all")
    return git(root, "rev-parse", "HEAD").strip()
