"""Does one new class in one file, with one line in METHODS, get everything: training, sampling, scores, table and figures?"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import TINY

from bench.method import Method
from methods.backbone import Shape
from methods.initial import option_defaults

ROOT = Path(__file__).resolve().parent.parent

SEVENTH = '''"""Which scale should the noise prediction have in each part of the schedule? Made up for a test."""

import torch
from torch import Tensor, nn

from bench.intervals import Interval, partition
from bench.method import Denoiser, Method, Prediction, check_range, check_timesteps
from methods.backbone import DiT, Shape


class Scaled(Method):
    """A backbone whose output each of `parts` intervals scales by a number of its own."""

    def __init__(self, shape: Shape, *, num_timesteps: int = 1000, parts: int = 3, pull: float = 0.1) -> None:
        super().__init__()
        check_range("pull", pull, 0, 10)
        self.intervals = partition(parts, num_timesteps)
        self.num_timesteps, self.pull = num_timesteps, pull
        self.network = DiT(shape)
        self.scale = nn.Parameter(torch.ones(parts))

    def forward(self, x: Tensor, t: Tensor, y: Tensor, interval: Interval, progress: float = 0.0) -> Prediction:
        check_timesteps(t, interval, self.num_timesteps)
        scale = self.scale[interval.index]
        return Prediction(self.network(x, t, y) * scale, {"pull": self.pull * (scale - 1).square()})

    def specialise(self, interval: Interval) -> Denoiser:
        return lambda x, t, y: self.network(x, t, y) * self.scale[interval.index]
'''

USE = """
from bench import cli
settings = {settings!r}
for method in ("scaled", "dense"):
    assert cli.main(["train", "--runs", "out/runs", *settings, f"method={{method}}"]) == 0
(folder,) = __import__("pathlib").Path("out/runs").glob("scaled-*")
assert cli.main(["sample", str(folder), "--out", "drawn.npz"]) == 0
assert cli.main(["evaluate", str(folder)]) == 0
assert cli.main(["tables", "out"]) == 0
assert cli.main(["train", "--runs", "out/runs", *settings, "method=scaled", "options.pull=11"]) == 2
assert cli.main(["train", "--runs", "out/runs", *settings, "method=scaled", "options.parts=few"]) == 2
assert "scaled: parts=3 pull=0.1" in cli._settings_help()
"""


def test_a_seventh_method_is_one_file_and_one_line(tmp_path: Path) -> None:
    """In a copy of the source tree, as a contributor would do it."""
    for package in ("bench", "methods", "slurm"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "methods" / "scaled.py").write_text(SEVENTH)
    registry = tmp_path / "methods" / "__init__.py"
    before = registry.read_text()
    after = before.replace("\n}\n", '\n    "scaled": Scaled,\n}\n', 1)
    after = after.replace(
        "from methods.switch_dit import SwitchDiT\n",
        "from methods.scaled import Scaled\nfrom methods.switch_dit import SwitchDiT\n",
    )
    assert len(after.splitlines()) == len(before.splitlines()) + 2  # its import, and its line in METHODS
    registry.write_text(after)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", USE.format(settings=TINY)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    refusals = [line for line in done.stderr.splitlines() if line.startswith("tsbench: ")]
    assert len(refusals) == 2 and "pull is 11.0" in refusals[0] and "options.parts" in refusals[1]
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| scaled " in table and "| dense " in table
    (metrics,) = (tmp_path / "out" / "runs").glob("scaled-*/metrics.jsonl")
    assert '"penalty/pull"' in metrics.read_text()


class NoDefault(Method):
    def __init__(self, shape: Shape, *, num_timesteps: int = 1000, parts: int) -> None: ...


class NoneAsDefault(Method):
    def __init__(self, shape: Shape, *, num_timesteps: int = 1000, parts: int | None = None) -> None: ...


class Loose(Method):
    def __init__(self, shape: Shape, *, num_timesteps: int = 1000, scale: float = 3, parts=3, on=True) -> None: ...  # type: ignore[no-untyped-def]


@pytest.mark.parametrize("method", [NoDefault, NoneAsDefault])
def test_an_option_that_cannot_be_a_setting_is_named_at_once(method: type[Method]) -> None:
    with pytest.raises(TypeError, match=rf"option parts of {method.__name__} needs a default of its type"):
        option_defaults(method)


def test_an_option_has_the_type_of_its_default_and_a_float_may_be_written_as_a_whole_number() -> None:
    defaults = option_defaults(Loose)
    assert defaults == {"scale": 3.0, "parts": 3, "on": True}
    assert [type(value) for value in defaults.values()] == [float, int, bool]
