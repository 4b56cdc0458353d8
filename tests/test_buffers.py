"""Is memory of large batches used again, and never while something still refers to what lies there?"""

import numpy as np
import pytest
import torch

from bench.data import buffers
from bench.data.buffers import Buffers
from bench.data.packed import PackedImages


@pytest.fixture(autouse=True)
def keeps_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "KEPT_FROM", 0)


def test_memory_is_used_again_once_its_batch_is_gone() -> None:
    own = Buffers()
    x = own.empty((3, 4))
    place = x.data_ptr()
    assert x.dtype == torch.float32 and x.is_contiguous()
    del x
    assert own.empty((2, 4)).data_ptr() == place  # a smaller one fits
    assert own.empty((3, 4)).data_ptr() == place
    assert own.empty((4, 4)).shape == (4, 4)


def test_a_view_holds_the_memory() -> None:
    own = Buffers()
    x = own.empty((3, 4))
    place, view = x.data_ptr(), x[1:].T
    del x
    held = own.empty((3, 4))
    assert held.data_ptr() != place
    del view
    assert own.empty((3, 4)).data_ptr() == place


def test_what_is_kept_for_a_backward_pass_holds_the_memory() -> None:
    own, weight = Buffers(), torch.ones(4, requires_grad=True)
    x = own.empty((3, 4)).fill_(2.0)
    place, loss = x.data_ptr(), (x * weight).sum()
    del x
    other = own.empty((3, 4)).zero_()
    assert other.data_ptr() != place
    loss.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None and weight.grad.tolist() == [6.0] * 4


def test_no_more_than_two_are_kept() -> None:
    own = Buffers()
    alive = [own.empty((3, 4)).fill_(float(i)) for i in range(5)]
    assert len(own.kept) == buffers.MOST_KEPT == 2
    assert [x.unique().tolist() for x in alive] == [[float(i)] for i in range(5)]


def test_small_batches_are_left_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "KEPT_FROM", 13)
    own = Buffers()
    own.empty((3, 4))
    assert own.kept == []
    own.empty((13,))
    assert len(own.kept) == 1


def test_batches_that_are_alive_keep_their_images() -> None:
    images = np.arange(6, dtype=np.uint8)[:, None, None, None].repeat(2, axis=2).repeat(2, axis=3)
    packed = PackedImages(images, np.arange(6)[::-1], torch.arange(6))
    batches = [packed.batch(torch.tensor([i, 5 - i]))[0] for i in range(6)]
    for i, x in enumerate(batches):
        rows = torch.tensor([5 - i, i])
        assert torch.equal(x, (rows.float() / 127.5 - 1)[:, None, None, None].expand(2, 1, 2, 2))
    place = batches.pop().data_ptr()
    del x
    assert packed.batch(torch.tensor([0, 1]))[0].data_ptr() == place
