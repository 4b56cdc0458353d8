"""What do the tests of the command line share? A tiny run, `tsbench` called in this process, and a look at a folder.

`finished_run` is a fixture, offered to all tests by conftest.py.
"""

import contextlib
import io
from pathlib import Path
from typing import NamedTuple

import pytest

from bench import cli

TINY = [
    "model.depth=1",
    "model.width=16",
    "model.num_heads=2",
    "model.patch_size=4",
    "diffusion.num_timesteps=20",
    "budget.amount=64",
    "train.batch_size=32",
    "heldout.bins=2",
    "heldout.images_per_bin=4",
    "heldout.points=2",
    "evaluation.num_samples=60",
    "evaluation.steps=2",
    "evaluation.block_size=30",
    "evaluation.kid_subset_size=20",
]
SAVE_OFTEN = ("system.log_every=1", "system.checkpoint_every=1")


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def tsbench(*arguments: object) -> Outcome:
    """One command, in this process. A traceback is a failure of the test."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse ends the process itself
            code = int(end.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def train(runs: Path, *settings: str) -> Path:
    """Train a tiny run to its end; its folder."""
    before = set(runs.glob("*"))
    outcome = tsbench("train", "--runs", runs, *TINY, *settings)
    assert outcome.code == 0, outcome.err
    (folder,) = set(runs.glob("*")) - before
    return folder


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder, to be copied."""
    return train(tmp_path_factory.mktemp("finished"), *SAVE_OFTEN)


def unfinished(folder: Path) -> Path:
    """As if it had been killed after training."""
    for name in ("done", "eval.json", "samples.npz", "diagnostics.npz", "summary.json"):
        (folder / name).unlink()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file and folder below, with its bytes; empty if there is no such folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b"folder" for path in folder.rglob("*")}


def assert_refused(outcome: Outcome, *words: str, code: int = 2) -> None:
    """One sentence on the error stream, with all of `words` in it, and nothing else."""
    assert outcome.code == code, outcome
    assert outcome.err.startswith("tsbench: ") and outcome.err.count("\n") == 1 and outcome.err.endswith("\n"), outcome.err
    assert "Traceback" not in outcome.err and len(outcome.err) < 800, outcome.err
    for word in words:
        assert word in outcome.err, outcome.err
