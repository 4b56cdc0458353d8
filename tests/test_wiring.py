"""Does a setting of `system` reach what it switches, in a step, in a run, and when a trained run is sampled again?"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command import unfinished
from torch import Tensor
from training import RUNS, drawn, tiny_trainer

from bench import job
from bench.data.source import TensorImages
from bench.recompute import blocks_of
from bench.trained import draw_samples, evaluate_again


@pytest.mark.parametrize(("setting", "num_calls"), [("false", 1), ("true", 2)])
@pytest.mark.parametrize("method", RUNS)
def test_a_step_computes_a_block_again_where_it_should(method, setting, num_calls):
    trainer = tiny_trainer(method, f"system.recompute={setting}")
    calls = []
    for block in blocks_of(trainer.method)[:2]:
        next(block.children()).register_forward_pre_hook(lambda *_: calls.append(1))
    trainer.step(drawn(trainer))
    assert len(calls) == 2 * num_calls


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """How torch.compile was asked, each time; nothing is compiled."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda network, **options: asked.append(options) or network)
    return asked


@pytest.mark.parametrize("setting", [False, True])
def test_what_samples_is_compiled_where_it_should(setting, compiled, finished_run, tmp_path):
    """In a run, when it is scored again, and when more is drawn; held-out batches and diagnostics are not."""
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    settings = [f"system.compile_sampling={setting}"]
    samplings = (
        lambda: job.run(job.read_config(unfinished(folder), settings), folder),
        lambda: evaluate_again(folder, [*settings, "evaluation.seed=1"]),
        lambda: draw_samples(folder, [*settings, "evaluation.num_samples=3"]),
    )
    for sample in samplings:
        sample()
        assert compiled == [{"fullgraph": True, "dynamic": False}] * setting
        compiled.clear()


def test_training_draws_from_what_is_kept_on_the_device(monkeypatch, tmp_path: Path):
    trainer = tiny_trainer("dense", "system.resident_gb=0.25", folder=tmp_path / "run")
    asked, read = [], []

    class Kept(TensorImages):
        def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
            read.append(len(indices))
            return super().batch(indices)

    def keep(data, *limits):
        asked.append((data, *limits))
        return replace(data, train=Kept(data.train.images, data.train.labels))

    monkeypatch.setattr("bench.trainer.keep_on_device", keep)
    trainer.fit()
    assert asked == [(trainer.data, torch.device("cpu"), 0.25)]
    assert read == [8] * trainer.steps_done and trainer.steps_done == 12
