"""Do batches that are drawn early change no number, and is the next one drawn while a step is computed?"""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training import Crash, crash_after, differing, rows, state_of, tiny_trainer

from bench import trainer
from bench.ahead import Ahead
from bench.trainer import Trainer


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("draw")]


def test_the_next_step_is_drawn_while_this_one_is_computed() -> None:
    begun = {step: threading.Event() for step in range(9)}

    def draw(step: int) -> tuple[int, str]:
        begun[step].set()
        return step, threading.current_thread().name

    with Ahead(draw, early=True) as batches:
        assert batches.take(3)[0] == 3
        assert begun[4].wait(60) and not begun[5].is_set()
        step, thread = batches.take(4)
        assert step == 4 and thread.startswith("draw")
        assert batches.take(7)[0] == 7  # resumed elsewhere: what was drawn is not taken for it
        assert begun[8].wait(60) and not begun[6].is_set()
    assert not threads()
    with Ahead(draw, early=False) as batches:
        assert batches.take(0) == (0, "MainThread") and not begun[1].is_set()


def test_what_fails_early_is_raised_where_its_step_begins() -> None:
    def draw(step: int) -> int:
        if step == 1:
            raise ValueError("image 5 cannot be read")
        return step

    with pytest.raises(ValueError, match="image 5 cannot be read"), Ahead(draw, early=True) as batches:
        assert batches.take(0) == 0
        batches.take(1)
    assert not threads()


@pytest.mark.parametrize("experts", [None, frozenset({1})], ids=["all", "one expert"])
def test_training_is_the_same_to_the_bit_also_when_it_is_resumed(
    experts: frozenset[int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny_trainer("multi_expert", "data.flip=true", folder=tmp_path / "plain", experts=experts)
    plain.fit()
    drawing: list[list[str]] = []
    monkeypatch.setattr(trainer, "Ahead", lambda draw, early: Ahead(draw, early=True))
    monkeypatch.setattr(
        Trainer, "_train_on", lambda self, *given, of=Trainer._train_on: drawing.append(threads()) or of(self, *given)
    )
    early = tiny_trainer("multi_expert", "data.flip=true", folder=tmp_path / "early", experts=experts)
    crash_after(early, 3)
    early = tiny_trainer("multi_expert", "data.flip=true", folder=tmp_path / "early", experts=experts)
    early.fit()
    assert not differing(state_of(plain), state_of(early)) and rows(tmp_path / "plain") == rows(tmp_path / "early")
    assert drawing and all(drawing) and not threads()


@pytest.mark.parametrize(("device", "resident", "early"), [("cpu", False, False), ("cuda", False, True), ("cuda", True, False)])
def test_who_draws_early(device: str, resident: bool, early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's trainer, unless its images lie there: on a CPU the thread would take from the step what it gives."""
    told: list[bool] = []
    of = tiny_trainer("dense")

    def begin(draw: object, early: bool) -> None:
        told.append(early)
        raise Crash

    monkeypatch.setattr(trainer, "Ahead", begin)
    monkeypatch.setattr(trainer, "keep_on_device", lambda data, *_: replace(data) if resident else data)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: None)
    of.device = torch.device(device)
    with pytest.raises(Crash):
        of.fit()
    assert told == [early]
