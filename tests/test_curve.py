"""Are the weights kept on the way those of that moment, scored as they would be alone, and without a trace in the run?"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import TINY
from training import differing, rows, saved

from bench import job
from bench.config import RunConfig
from bench.curve import kept_weights, load_weights
from bench.finish import Finisher
from bench.protocol import protocol_of
from bench.run_folder import read_back
from bench.runs import Run, read_samples
from bench.trainer import Interrupted, Trainer

SETTINGS = (
    *TINY,
    *("budget.amount=320", "heldout.points=5", "train.ema_half_life_images=100", "evaluation.seed=3"),
    *("system.log_every=1", "system.checkpoint_every=1"),
    "evaluation.block_size=1",  # so that samples are drawn in two rounds, of which the first is kept
)
EVERY = 2  # of five held-out points: steps 4 and 8 of ten


def config_of(*settings: str) -> RunConfig:
    return job.make_config({"method": "dense"}, [*SETTINGS, *settings])


def trained(folder: Path, *settings: str) -> Path:
    job.run(config_of(*settings), folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without a curve."""
    return trained(tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module")
def curved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("curved") / "run", f"evaluation.curve_every={EVERY}")


def test_places_are_those_of_the_heldout_loss(curved: Path) -> None:
    curve, (final,) = Run(curved).curve, Run(curved).evaluations
    assert [(record["step"], record["images_seen"]) for record in curve] == [(4, 128), (8, 256)]
    assert {record["protocol_hash"] for record in curve} == {final["protocol_hash"]} and final["n"] == 60
    summary = Run(curved).summary
    for record in curve:
        assert record["train_flops"] == pytest.approx(summary["train_flops"] * record["images_seen"] / 320)
        assert 0 < record["device_seconds"] < summary["device_seconds"]
        heldout = [row for row in rows(curved, "heldout") if row["step"] == record["step"]]
        assert record["heldout_loss"] == pytest.approx(np.mean([row["loss"] for row in heldout]), rel=1e-6)
    assert curve[0]["metrics"] != curve[1]["metrics"] != final["metrics"]


def test_nothing_else_of_the_run_is_changed_by_its_curve(plain: Path, curved: Path) -> None:
    assert not differing(saved(plain)[0], saved(curved)[0]) and saved(plain)[1] == saved(curved)[1]
    assert rows(plain) == rows(curved)
    assert Run(plain).run_id == Run(curved).run_id
    assert_same_results_but_the_curve(plain, curved)


def assert_same_results_but_the_curve(plain: Path, curved: Path) -> None:
    assert np.array_equal(samples_of(plain), samples_of(curved))
    assert [record["metrics"] for record in Run(plain).evaluations] == [record["metrics"] for record in Run(curved).evaluations]
    assert not Run(plain).curve and len(Run(curved).curve) == 2


def test_a_run_without_averages_is_scored_by_its_final_weights(tmp_path: Path) -> None:
    folders = [
        trained(tmp_path / str(every), "train.ema_half_life_images=0", f"evaluation.curve_every={every}") for every in (0, EVERY)
    ]
    assert_same_results_but_the_curve(*folders)


def samples_of(folder: Path) -> np.ndarray:
    samples = read_samples(folder)
    assert samples is not None
    return samples


def test_weights_and_parts_are_gone_when_they_are_scored(curved: Path) -> None:
    assert not kept_weights(curved) and not (curved / "parts").exists()
    assert not list(curved.rglob("*.tmp"))
    read_back(curved)


def scored_alone(config: RunConfig, folder: Path, step: int) -> dict[str, Any]:
    """A record of the averages in the checkpoint of a step, by a trainer that does nothing else."""
    data = job.load_data(config.data)
    trainer = Trainer(job.build_method(config, data), config, data, folder)
    tensors, counters = saved(folder)
    assert counters["steps_done"] == step
    averages = {name.removeprefix("ema."): tensor for name, tensor in tensors.items() if name.startswith("ema.")}
    missing, unexpected = trainer.method.load_state_dict(averages, strict=False)
    assert not unexpected and set(missing) <= {name for name, _ in trainer.method.named_buffers()}
    sampler = job.make_sampler(config.diffusion, config.evaluation, config.model, data)
    return Finisher(trainer, sampler, protocol_of(config.evaluation, data), data).score(step)[1]


def stopped_at(config: RunConfig, folder: Path, step: int) -> None:
    """Train so far and no further, as a job that is interrupted."""
    asked = iter(range(step))  # it stops at the step after the one that asks, as ranks have to agree
    with pytest.raises(Interrupted):
        job.run(config, folder, should_stop=lambda: next(asked, None) is None)


def test_a_place_has_the_scores_of_its_averaged_weights_alone(curved: Path, tmp_path: Path) -> None:
    config = config_of(f"evaluation.curve_every={EVERY}")
    for record in Run(curved).curve:
        folder = tmp_path / str(record["step"])
        stopped_at(config, folder, record["step"])
        assert Run(folder).images_seen == record["images_seen"]
        alone = scored_alone(config, folder, record["step"])
        assert alone["metrics"] == record["metrics"] and alone["heldout_loss"] == record["heldout_loss"]


def test_weights_that_are_kept_say_where_they_are_from(tmp_path: Path) -> None:
    config = config_of(f"evaluation.curve_every={EVERY}")
    stopped_at(config, tmp_path / "run", 6)
    (path,) = kept_weights(tmp_path / "run")
    tensors, place = load_weights(path)
    assert path.name == "weights-000000000128.safetensors" and (place["step"], place["images_seen"]) == (4, 128)
    data = job.load_data(config.data)
    assert tensors.keys() == job.build_method(config, data).state_dict().keys()


@pytest.mark.parametrize("pieces", range(9))  # each of three weights is sampled in two rounds, then scored
def test_a_run_that_is_stopped_while_its_curve_is_scored_goes_on(pieces: int, curved: Path, tmp_path: Path) -> None:
    """After each piece of scoring in turn: nothing is scored twice, and all comes out as without a stop."""
    config, folder = config_of(f"evaluation.curve_every={EVERY}"), tmp_path / "run"
    asked = [0]

    def should_stop() -> bool:
        asked[0] += is_trained(folder)
        return asked[0] > pieces

    with pytest.raises(Interrupted):
        job.run(config, folder, should_stop=should_stop)
    before = Run(folder).curve
    assert len(before) + len(kept_weights(folder)) == 2 and not (folder / "done").exists()
    job.run(config, folder)
    assert Run(folder).curve[: len(before)] == before  # to the second when they were scored
    assert [record["metrics"] for record in Run(folder).curve] == [record["metrics"] for record in Run(curved).curve]
    assert np.array_equal(samples_of(folder), samples_of(curved))
    assert [record["metrics"] for record in Run(folder).evaluations] == [record["metrics"] for record in Run(curved).evaluations]
    assert not kept_weights(folder) and not differing(saved(folder)[0], saved(curved)[0])


def is_trained(folder: Path) -> bool:
    return (folder / "summary.json").exists()


def test_a_run_that_was_killed_between_a_record_and_its_weights_scores_no_place_twice(curved: Path, tmp_path: Path) -> None:
    config, folder = config_of(f"evaluation.curve_every={EVERY}"), tmp_path / "run"
    stopped_at(config, folder, 6)
    (curve := Run(curved).curve[:1])[0]["scored"] = "before"
    (folder / "curve.json").write_text(json.dumps(curve))
    job.run(config, folder)
    assert [record["scored"] == "before" for record in Run(folder).curve] == [True, False]
    assert not kept_weights(folder)
