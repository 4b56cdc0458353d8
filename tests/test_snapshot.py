"""Does a queued job run the code that was there when it was submitted, and can it be told which that was?"""

import compileall
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from small_tree import TREE, commit_all, forget_surroundings, write_tree

from bench.files import read_json
from slurm import snapshot as module
from slurm.snapshot import take_snapshot

ROOT = Path(__file__).parents[1]
NOT_NEEDED = {"bench/data/notes.txt", "README.md"}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    forget_surroundings(monkeypatch)
    return write_tree(tmp_path / "tree")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_holds_what_a_job_needs_and_says_what_it_is(tree: Path, store: Path) -> None:
    commit = commit_all(tree)
    (tree / "bench/trainer.py").write_text("step = 2\n")
    (tree / "bench/__pycache__").mkdir()
    (tree / "bench/__pycache__/trainer.pyc").write_text("compiled")
    (tree / "bench/.#trainer.py").symlink_to("an editor's lock that is nowhere")
    taken = take_snapshot(tree, store)
    needed = {name: text for name, text in TREE.items() if name not in NOT_NEEDED} | {"bench/trainer.py": "step = 2\n"}
    found = contents(taken)
    found.pop("snapshot.json")
    assert found == needed
    record = read_json(taken / "snapshot.json", dict)
    assert record["hash"] == taken.name and record["commit"] == commit and record["dirty"] is True
    assert "-step = 1\n+step = 2\n" in record["diff"] and "new file: bench/.#trainer.py" in record["diff"]
    assert set(record["files"]) == set(needed) and record["made"].endswith("Z")


def test_is_read_only(tree: Path, store: Path) -> None:
    taken = take_snapshot(tree, store)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in taken.rglob("*") if path.is_file()}
    assert modes.pop("cluster.sh") == 0o555
    assert set(modes.values()) == {0o444}
    assert stat.S_IMODE(taken.stat().st_mode) == 0o755, "others of the project can read it"


def test_editing_changes_no_snapshot_and_makes_another(tree: Path, store: Path) -> None:
    first = take_snapshot(tree, store)
    before = contents(first)
    assert take_snapshot(tree, store) == first and len(list(store.iterdir())) == 1
    (tree / "methods/a.py").write_text("width = 3\n")
    second = take_snapshot(tree, store)
    assert second != first and contents(first) == before
    (tree / "methods/a.py").write_text(TREE["methods/a.py"])
    assert take_snapshot(tree, store) == first


def test_the_same_files_of_another_commit_are_another_snapshot(tree: Path, store: Path) -> None:
    """Or its runs would be said to come from a commit that they do not come from."""
    taken = [take_snapshot(tree, store)]
    for _ in range(2):
        commit_all(tree)
        taken.append(take_snapshot(tree, store))
    (tree / "README.md").write_text("edited")
    taken.append(take_snapshot(tree, store))
    assert len(set(taken)) == 4
    assert [read_json(each / "snapshot.json", dict)["dirty"] for each in taken] == [None, False, False, True]


def test_from_within_a_snapshot_it_is_the_same(tree: Path, store: Path, tmp_path: Path) -> None:
    commit_all(tree)
    taken = take_snapshot(tree, store)
    assert take_snapshot(taken, tmp_path / "other") == taken and not (tmp_path / "other").exists()


def test_a_link_to_the_store_is_followed(tree: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job starts in another folder, maybe after the link has gone elsewhere."""
    store.mkdir()
    (store.parent / "link").symlink_to(store)
    monkeypatch.chdir(store.parent)
    assert take_snapshot(tree, Path("link")).parent == store.resolve()


def test_many_launchers_at_once_make_one(tree: Path, store: Path) -> None:
    commit_all(tree)
    code = "import sys, pathlib, slurm.snapshot as s; print(s.take_snapshot(*map(pathlib.Path, sys.argv[1:])))"
    command = [sys.executable, "-c", code, str(tree), str(store)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    launchers = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    with ThreadPoolExecutor(8) as pool:
        here = list(pool.map(lambda _: take_snapshot(tree, store), range(16)))
    there = [Path(launcher.communicate()[0].strip()) for launcher in launchers]
    assert list(store.iterdir()) == [here[0]] and set(here + there) == {here[0]}


def test_who_comes_second_leaves_the_first_alone(tree: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process makes the same snapshot after we looked, and before ours is in its place."""
    write, firsts = module._write, []

    def overtaken(files: dict[str, bytes], record: dict[str, object], target: Path) -> None:
        write(files, record, target)
        firsts.append((target / "snapshot.json").stat().st_ino)
        write(files, record, target)

    monkeypatch.setattr(module, "_write", overtaken)
    taken = take_snapshot(tree, store)
    assert firsts == [(taken / "snapshot.json").stat().st_ino] and list(store.iterdir()) == [taken]


def edit(path: Path) -> None:
    path.chmod(0o644)
    path.write_text("{}")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda taken: edit(taken / "methods/a.py"), "methods/a.py changed"),
        (lambda taken: (taken / "slurm/sweep.py").unlink(), "slurm/sweep.py removed"),
        (lambda taken: (taken / "bench/new.py").write_text(""), "bench/new.py added"),
        (lambda taken: [(taken / f"bench/{n}.py").write_text("") for n in range(5)], "bench/2.py added and 2 more"),
        (lambda taken: edit(taken / "snapshot.json"), "damaged"),
        (
            lambda taken: (
                (taken / "snapshot.json").chmod(0o644)
                or (taken / "snapshot.json").write_text(
                    (taken / "snapshot.json").read_text().replace('"commit": "', '"commit": "0')
                )
            ),
            "snapshot.json changed",
        ),
    ],
)
def test_a_damaged_one_is_refused(damage, words: str, tree: Path, store: Path) -> None:
    """What is queued may have been given it: it is neither used nor mended."""
    commit_all(tree)
    taken = take_snapshot(tree, store)
    damage(taken)
    before = contents(taken)
    for source in (tree, taken):
        with pytest.raises(ValueError, match=r"^the code snapshot \S+ is damaged \([^\n]*$") as refusal:
            take_snapshot(source, store)
        assert words in str(refusal.value)
    assert contents(taken) == before


def test_what_python_compiles_in_it_is_no_damage(tree: Path, store: Path) -> None:
    taken = take_snapshot(tree, store)
    compileall.compile_dir(taken, quiet=2)
    assert len(list(taken.rglob("*.pyc"))) > 5 and take_snapshot(tree, store) == taken


def test_what_cannot_be_written_is_one_sentence_and_leaves_nothing(
    tree: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write_text("a file")
    with pytest.raises(ValueError, match=r"^cannot write to \S+ \([^\n]*$"):
        take_snapshot(tree, store)
    store.unlink()
    write_bytes, count = Path.write_bytes, iter(range(100))

    def full(path: Path, content: bytes) -> int:
        if next(count) == 3:
            raise OSError(28, "No space left on device")
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ValueError, match=r"^cannot write to \S+ \(No space left on device\)[^\n]*$"):
        take_snapshot(tree, store)
    assert list(store.iterdir()) == []
    with pytest.raises(ValueError, match=r"holds no code of timestep-bench[^\n]*$"):
        take_snapshot(store, store)


def test_this_code_runs_from_its_snapshot(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line works there, and its provenance is that of the repository, edited since."""
    forget_surroundings(monkeypatch)
    copy = tmp_path / "copy"
    for package in module.PACKAGES:
        for path in (ROOT / package).rglob("*"):
            if path.suffix in module.ENDINGS:
                target = copy / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    commit = commit_all(copy)
    told = "p.ROOT, p.code_hash(), p.snapshot_of(p.ROOT).get('hash'), *p.version_of(p.ROOT).values()"
    tell = f"import bench.provenance as p; print({told})"

    def run(root: Path, *arguments: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(root), "PYTHONSAFEPATH": "1"}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=copy, env=environment, check=True, capture_output=True, text=True).stdout

    _, code_hash, *_ = run(copy, "-c", tell).split()
    taken = take_snapshot(copy, store)
    (copy / "bench/provenance.py").write_text("raise SystemExit('edited')\n")
    assert run(taken, "-c", tell).split() == [str(taken), code_hash, taken.name, commit, "False"]
    assert "demo" in run(taken, "-m", "bench", "--help")
