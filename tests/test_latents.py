"""Can runs on latents be trained, swept and compared where nothing decodes them, so that no image is drawn or scored?"""

from pathlib import Path

import numpy as np
import pytest
import yaml
from command import TINY, assert_refused, contents, train, tsbench
from test_ranks import on_ranks

from bench import checkpoint, job
from bench.config import DataConfig
from bench.data import DataSource, load_data
from bench.distributed import World
from bench.files import read_json, write_json_atomically
from bench.protocol import hashed_by_rank_0
from bench.runs import read_metrics, read_run
from slurm.claims import Work
from slurm.states import NOTHING, status_of

pytestmark = pytest.mark.xdist_group("ranks")

LEFT = {
    *("config.yaml", "provenance.json", "metrics.jsonl", "progress.json", "summary.json", "diagnostics.npz"),
    *("done", "checkpoints", "snapshots"),
}


def write_latents(root: Path) -> list[str]:
    """Tiny ones; the settings that name them."""
    root.mkdir()
    draw = np.random.default_rng(0)
    for part, count in (("train", 40), ("heldout", 12)):
        np.save(root / f"{part}_latents.npy", draw.normal(size=(count, 4, 8, 8)).astype(np.float16))
        np.save(root / f"{part}_labels.npy", np.arange(count) % 3)
    np.save(root / "train_mirrored_latents.npy", draw.normal(size=(40, 4, 8, 8)).astype(np.float16))
    return ["data.name=latents", f"data.path={root}", "data.image_size=8", "data.flip=true"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_latents(tmp_path_factory.mktemp("data") / "latents")


@pytest.fixture(scope="module")
def folder(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs"), "method=remix_dit", *settings)


@pytest.fixture
def unhashed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(data: DataSource) -> str:
        raise AssertionError(f"{data.name} was hashed")

    monkeypatch.setattr(DataSource, "content_hash", property(refuse))


def test_a_run_trains_to_its_end_and_is_done_without_scores(folder: Path, unhashed: None) -> None:
    assert {path.name for path in folder.iterdir()} == LEFT
    run = read_run(folder)
    assert run.state == "done" and run.evaluations == [] and run.summary["images_seen"] == 64
    assert run.diagnostics.keys() > {"intervals"} and set(read_metrics(folder)["kind"]) == {"train", "heldout"}
    checkpoint.load(checkpoint.list_checkpoints(folder / "checkpoints")[-1])
    assert status_of([Work(folder, folder)], NOTHING, lambda _: [], run.config["budget"], {"seed": 7}).state == "done"
    before = contents(folder)
    again = tsbench("train", folder)
    assert (again.code, again.out) == (0, f"{folder}: trained\n") and contents(folder) == before


def test_why_it_is_not_scored_is_said_once_and_what_is_deleted_is_made_anew(folder: Path) -> None:
    before = contents(folder)
    (folder / "provenance.json").unlink()
    assert tsbench("train", folder).code == 0 and (folder / "provenance.json").exists()
    for missing in ("diagnostics.npz", "done"):
        (folder / missing).unlink()
        outcome = tsbench("train", folder)
        assert outcome.code == 0 and outcome.err.count("\n") == 1, outcome.err
        for words in (folder.name, "not scored", "latents", "evaluation.autoencoder", "tsbench evaluate"):
            assert words in outcome.err
        after = contents(folder)
        assert after.keys() == before.keys() and after["diagnostics.npz"] == before["diagnostics.npz"]


def test_what_would_take_latents_for_images_is_refused(folder: Path, settings: list[str], tmp_path: Path) -> None:
    assert_refused(tsbench("evaluate", folder), "holds latents", "evaluation.autoencoder")
    assert_refused(tsbench("sample", folder, "--out", tmp_path / "drawn.npz"), "holds latents", "evaluation.autoencoder")
    curve = tsbench("train", "--runs", tmp_path, *TINY, *settings, "evaluation.curve_every=1")
    assert_refused(curve, "not scored without evaluation.autoencoder", "set it to 0")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["here", "nowhere"])
def test_a_plan_is_the_same_with_and_without_the_files_and_hashes_nothing(
    where: str, settings: list[str], unhashed: None
) -> None:
    elsewhere = ["data.path=nowhere"] if where == "nowhere" else []
    outcome = tsbench("plan", *TINY, *settings, *elsewhere)
    assert outcome.code == 0 and outcome.out.splitlines()[1].startswith("dense "), outcome
    assert ("still missing: nowhere" in outcome.out) == (where == "nowhere")
    assert tsbench("plan", *TINY).code == 0


def test_a_sweep_of_them_ends_done_and_its_tables_have_empty_quality_cells(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    methods = [{"method": "dense", "label": "One"}, {"method": "dtr", "label": "Two"}]
    base = job.make_config({}, [*TINY, *settings])
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump({"name": "mine", "base": yaml.safe_load(base.to_yaml()), "methods": methods})
    )
    swept = tsbench("sweep", "mine.yaml", "--cluster", "inline")
    assert swept.code == 0 and swept.err.count("not scored") == 2, swept
    assert "2 done" in tsbench("status", "mine.yaml").out
    tables = tsbench("tables", "mine.yaml")
    assert tables.code == 0, tables.err
    rows = (tmp_path / "results" / "mine" / "table.md").read_text().splitlines()
    quality = rows[next(i for i, row in enumerate(rows) if "KID" in row) :]
    assert [set(row.replace("|", " ").split()[1:]) for row in quality if row.startswith(("| One", "| Two"))] == [{"–"}] * 2
    for command in ("report", "plots", "collect"):
        outcome = tsbench(command, "mine.yaml")
        assert outcome.code == 0, outcome.err
    assert tsbench("collect", "mine.yaml", "--keep-runs").code == 0
    assert tsbench("tables", "mine.yaml", "--check").code == 0
    again = tsbench("sweep", "mine.yaml", "--cluster", "inline")
    assert again.code == 0 and "2 of 2 runs: done" in again.out


# Who hashes


def test_a_run_on_pixels_is_hashed_when_it_is_scored_and_not_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that is preempted ten times reads its data to train on them, and not to hash them ten times."""
    fingerprint, hashed = DataSource.content_hash.func, []  # type: ignore[attr-defined]

    def tell(data: DataSource) -> str:
        hashed.append((tmp_path / "run" / "checkpoints").is_dir())
        return str(fingerprint(data))

    monkeypatch.setattr(DataSource.content_hash, "func", tell)
    job.run(job.make_config({}, TINY), tmp_path / "run")
    assert hashed and all(hashed)


def hash_and_tell(world: World, out: Path) -> None:
    data = load_data(DataConfig())
    own, read = data.fingerprint, []
    object.__setattr__(data, "fingerprint", lambda: read.append(1) or own())
    shared = hashed_by_rank_0(data, world)
    write_json_atomically(out / f"{world.rank}.json", {"hash": shared.content_hash + shared.content_hash, "read": len(read)})


def fail_to_hash(world: World, out: Path) -> None:
    data = load_data(DataConfig())
    object.__setattr__(data, "fingerprint", lambda: (out / "nowhere").read_text())
    with pytest.raises(FileNotFoundError if world.is_main else ValueError):
        _ = hashed_by_rank_0(data, world).content_hash


def test_one_rank_hashes_for_all(tmp_path: Path) -> None:
    on_ranks(2, hash_and_tell, tmp_path)
    own = load_data(DataConfig()).content_hash
    assert [read_json(tmp_path / f"{rank}.json", dict) for rank in range(2)] == [
        {"hash": own + own, "read": reads} for reads in (1, 0)
    ]
    on_ranks(2, fail_to_hash, tmp_path)
