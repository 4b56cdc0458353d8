"""Does the tree keep its rules: who imports whom, and where may a method be named?"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PUBLISHED

from bench.provenance import PRESENTATION
from methods import METHODS

ROOT = Path(__file__).parent.parent
NAMES = {*METHODS, *(method.__name__ for method in METHODS.values())}
BENCH = sorted((ROOT / "bench").rglob("*.py"))
SLURM = sorted((ROOT / "slurm").rglob("*.py"))
METHOD_FILES = sorted((ROOT / "methods").glob("*.py"))
MAY_IMPORT_METHODS = {"bench/cli.py", "bench/job.py"}
TEXT = (".py", ".md", ".toml", ".txt", ".yaml", ".sh", "")
JOB = "bench/job.py"
A_METHOD_MAY_IMPORT = {
    "methods.backbone",
    "methods.bases",
    "methods.grouped",
    "bench.method",
    "bench.intervals",
    "bench.switches",
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports_of(path: Path) -> set[str]:
    """Modules of ours that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module in ("bench", "methods", "slurm")}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("bench", "methods", "slurm")}


def words_of(path: Path) -> set[str]:
    """All words of a file, comments and strings included."""
    return set(re.findall(r"\w+", path.read_text()))


@pytest.mark.parametrize("path", [*BENCH, *SLURM], ids=relative)
def test_the_laboratory_names_no_method(path):
    named = words_of(path) & (NAMES - {"dense"})
    assert not named
    code = "\n".join(ast.unparse(node) for node in ast.parse(path.read_text()).body)
    assert not re.search(r"""['"]dense['"]""", code)  # the word is also English: as a value it would be the method


@pytest.mark.parametrize("path", [*BENCH, *SLURM], ids=relative)
def test_only_the_entry_points_import_methods(path):
    if relative(path) not in MAY_IMPORT_METHODS:
        assert not {name for name in imports_of(path) if name.split(".")[0] == "methods"}


@pytest.mark.parametrize("path", METHOD_FILES, ids=relative)
def test_methods_import_no_other_method(path):
    if path.stem == "__init__" or path.stem.startswith(("released", "naive")):
        return
    assert imports_of(path) <= A_METHOD_MAY_IMPORT | {"bench", "methods"}


@pytest.mark.parametrize("path", SLURM, ids=relative)
def test_slurm_knows_configurations_and_run_folders_only(path):
    allowed = {"bench.config", "bench.runs", "bench.files", "bench.lease", "bench.provenance", "bench.stopping", "bench"}
    assert {name for name in imports_of(path) if name.startswith("bench")} <= allowed


@pytest.mark.parametrize("path", [*BENCH, *SLURM, *METHOD_FILES], ids=relative)
def test_every_file_says_first_what_it_is_for(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring and docstring.split("\n")[0].endswith(("?", ".", "here")), "a first line that says which question it answers"


@pytest.mark.parametrize("path", METHOD_FILES, ids=relative)
def test_every_method_says_its_paper_and_its_deviations(path):
    if path.stem in PUBLISHED:
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert "arXiv" in docstring and "Deviations" in docstring


@pytest.mark.parametrize("module", ["bench.runs", "bench.tables", "bench.plots", "bench.suite", "bench.config", "slurm.local"])
def test_a_laptop_rebuilds_tables_without_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_registry_and_no_path_of_one_machine_is_in_the_tree():
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout: nothing tells which files are ours")
    forbidden = re.compile("python" + r"hosted|py" + r"pi\.org|deb\." + r"debian|download\." + r"pytorch|/wo" + r"rk/[a-z.]")
    ours = [ROOT / name for name in listed.stdout.split() if Path(name).suffix in TEXT]
    assert [relative(path) for path in ours if path.is_file() and forbidden.search(path.read_text())] == []


def test_what_no_job_imports_changes_no_number():
    """A new module for people's eyes must be listed, or it would make every run stale."""
    reached, to_read = {JOB}, [JOB]
    while to_read:
        for node in ast.walk(ast.parse((ROOT / to_read.pop()).read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            package = node.module.replace(".", "/")
            paths = [package, *(f"{package}/{alias.name}" for alias in node.names)]
            new = {f"{path}{end}" for path in paths for end in (".py", "/__init__.py") if (ROOT / f"{path}{end}").is_file()}
            new -= reached
            reached |= new
            to_read += sorted(new)
    unreached = {relative(path) for path in BENCH if path.stem != "__init__"} - reached
    assert {path for path in unreached if not PRESENTATION & set(Path(path).with_suffix("").parts)} == set()
