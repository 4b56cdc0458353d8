"""Is what samples are compared with computed once, found again by its contents, and never taken from a damaged file?"""

import dataclasses
from pathlib import Path

import pytest
import torch
from test_evaluate import training_images
from training import PROCESSES, exit_codes_of

from bench import evaluate, fidelity, reference
from bench.config import DataConfig, EvaluationConfig
from bench.data import DataSource, load_data
from bench.evaluate import Seconds, score
from bench.protocol import EvalProtocol, protocol_of
from bench.reference import reference_key


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> DataSource:
    monkeypatch.setattr(reference, "KEPT_FROM", 1)
    return load_data(DataConfig())


def protocol_for(data: DataSource) -> EvalProtocol:
    return protocol_of(EvaluationConfig(), data)


def scores_of(data: DataSource, folder: Path | None, seconds: Seconds | None = None) -> dict[str, float]:
    evaluate._reference.cache_clear()  # as another process
    return score(*training_images(data, 500), protocol_for(data), data, references=folder, seconds=seconds)


def batches_looked_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    plain = fidelity._features_of_batch
    monkeypatch.setattr(fidelity, "_features_of_batch", lambda *inputs: sizes.append(len(inputs[0])) or plain(*inputs))
    return sizes


def test_the_next_process_looks_at_its_samples_alone_and_gets_the_same_bits(
    data: DataSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at = batches_looked_at(monkeypatch)
    without = scores_of(data, None)
    first = scores_of(data, tmp_path / "references")
    assert sum(looked_at) == 2 * (500 + 1297 + 500)
    looked_at.clear()
    seconds = Seconds()
    second = scores_of(data, tmp_path / "references", seconds)
    assert sum(looked_at) == 500
    assert without == first == second
    assert seconds.keys() == {"features", "reference", "comparison"} and all(value > 0 for value in seconds.values())
    assert [path.name for path in (tmp_path / "references").iterdir()] == [
        f"{reference_key(protocol_for(data), 'cpu')}.safetensors"
    ]


def test_a_small_set_leaves_no_file(tmp_path: Path) -> None:
    scores_of(load_data(DataConfig()), tmp_path / "references")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"data_sha256": "0"},
        {"extractor_sha256": "0"},
        {"reference_sha256": "0"},
        {"reference": "adm"},
        {"feature_batch_size": 7},
        {"uint8_rule": "another"},
    ],
    ids=str,
)
def test_other_contents_have_another_name(change: dict[str, object], data: DataSource) -> None:
    protocol = protocol_for(data)
    assert reference_key(dataclasses.replace(protocol, **change), "cpu") != reference_key(protocol, "cpu")


def test_what_does_not_change_it_does_not_change_its_name(data: DataSource) -> None:
    protocol = protocol_for(data)
    other = dataclasses.replace(protocol, num_samples=400, steps="250", seed=7, extractor_path="elsewhere")
    assert reference_key(other, "cpu") == reference_key(protocol, "cpu") != reference_key(protocol, "cuda")


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_file_is_made_anew_with_a_warning(damage: str, data: DataSource, tmp_path: Path) -> None:
    before = scores_of(data, tmp_path)
    (path,) = tmp_path.iterdir()
    sound = path.read_bytes()
    path.write_bytes(sound[:-100] if damage == "cut" else sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.warns(UserWarning, match="is damaged and is computed again"):
        assert scores_of(data, tmp_path) == before
    assert path.read_bytes() == sound


def _score_in(folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    reference.KEPT_FROM = 1
    out.write_text(repr(scores_of(load_data(DataConfig()), folder)))


def test_processes_that_begin_together_do_not_disturb_each_other(tmp_path: Path) -> None:
    outs = [tmp_path / f"{i}.txt" for i in range(3)]
    processes = [PROCESSES.Process(target=_score_in, args=(tmp_path / "references", out)) for out in outs]
    for process in processes:
        process.start()
    assert exit_codes_of(processes) == [0, 0, 0]
    assert len({out.read_text() for out in outs}) == 1
    assert [path.suffix for path in (tmp_path / "references").iterdir()] == [".safetensors"]
