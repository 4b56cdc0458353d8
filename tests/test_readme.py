"""Does the README show what the repository holds, and does its recipe for a seventh method work?"""

import re
import shutil
from pathlib import Path

import pytest
import torch

from bench import cli
from bench.intervals import partition
from bench.method import Method
from methods.backbone import Shape

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "results" / "reference" / "demo"
README = (ROOT / "README.md").read_text()


def test_reference_tables_follow_from_the_committed_results(tmp_path):
    for name in ("results.csv", "protocols.json"):
        shutil.copy(REFERENCE / name, tmp_path)
    assert cli.main(["tables", str(tmp_path)]) == 0
    for name in ("results.csv", "protocols.json", "table.md", "table.tex"):
        assert (tmp_path / name).read_bytes() == (REFERENCE / name).read_bytes(), name


@pytest.mark.parametrize("suite", ["demo", "digits"])
def test_committed_tables_and_figures_follow_from_the_runs_that_were_kept(suite, capsys):
    folder = REFERENCE if suite == "demo" else ROOT / "results" / suite
    code = cli.main(["tables", suite, "--check", "--out", str(folder), "--runs", str(folder / "none")])
    told = capsys.readouterr().out
    assert code == 0, told
    assert "not checked, as" not in told


def test_what_was_not_kept_is_said(tmp_path, capsys):
    for file in REFERENCE.glob("*.*"):
        if file.name != "kept.json":
            shutil.copy(file, tmp_path)
    assert cli.main(["tables", str(tmp_path), "--check"]) == 0
    assert "not checked, as no runs are kept in" in capsys.readouterr().out


def test_the_readme_shows_the_reference_table():
    table_rows = [line for line in (REFERENCE / "table.md").read_text().splitlines() if line.startswith("|")]
    readme_rows = README.splitlines()
    assert len(table_rows) > 15
    assert [row for row in table_rows if row not in readme_rows] == []


def test_every_figure_and_file_that_the_readme_names_exists():
    names = re.findall(r"\]\(([^)#:]+)\)", README)  # links within the repository
    assert names
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_tree_names_every_module():
    tree = README.split("## The tree")[1]
    modules = [p for folder in ("bench", "methods", "slurm") for p in (ROOT / folder).glob("*.py") if not p.stem.startswith("__")]
    missing = [str(p.relative_to(ROOT)) for p in modules if not re.search(rf"\b{p.name}\b", tree)]
    assert [
        name for name in missing if not name.startswith("methods/") or "released" in name
    ] == []  # a new method may come first


def test_the_recipe_for_a_seventh_method_keeps_the_contract():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code
    namespace: dict[str, object] = {}
    exec(compile(code.group(1), "README.md", "exec"), namespace)
    (seventh,) = [v for v in namespace.values() if isinstance(v, type) and issubclass(v, Method) and v is not Method]
    torch.manual_seed(0)
    method = seventh(Shape(depth=3, width=16, num_heads=2, input_size=4, channels=1, num_classes=3), skipped=2)
    for parameter in method.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    assert method.intervals == partition(2)
    x, y = torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 3])
    outputs = []
    for interval in method.intervals:
        t = torch.full((4,), interval.start)
        prediction = method(x, t, y, interval)
        assert torch.equal(prediction.output, method.specialise(interval)(x, t, y))
        outputs.append(method.denoise(x, torch.zeros(4), y, interval))
    assert not torch.allclose(*outputs)  # the noisy half really skips blocks
    with pytest.raises(ValueError, match="interval"):
        method(x, torch.full((4,), 999), y, method.intervals[0])
