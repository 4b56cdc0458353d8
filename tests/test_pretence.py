"""Does a pretended GPU refuse what a GPU refuses, and is waiting for it seen?"""

import pytest
import torch
from pretence import waits_of
from pretend_gpu import pretend_gpu
from training import drawn, tiny_trainer


def test_devices_are_not_mixed():
    with pretend_gpu():
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        for wrong in (
            lambda: there + here,
            lambda: torch.cat([there, here]),
            lambda: here[there.long()],
            lambda: there.copy_(here) @ here,
        ):
            with pytest.raises(RuntimeError, match="on the CPU"):
                wrong()
        with pytest.raises(TypeError, match="cuda:0"):
            there.numpy()
        assert (there * torch.tensor(2.0)).is_cuda and torch.nn.Linear(3, 2).to("cuda")(there).is_cuda
        assert torch.zeros_like(there).is_cuda and there.new_zeros(2).is_cuda and not there.cpu().is_cuda
        learned = there.clone().requires_grad_()
        (learned * 2).sum().backward()
        assert learned.grad is not None and learned.grad.device == torch.device("cuda:0")
    assert torch.ones(1).device.type == "cpu" and "pretend_gpu" not in repr(torch.cuda.is_available)


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[torch.tensor([0])],
        lambda x: torch.tensor([1.0], device="cuda"),
        lambda x: torch.ones(2).to("cuda", non_blocking=True),
        lambda x: torch.ones(2).pin_memory().to("cuda"),
        lambda x: torch.empty(3).copy_(x),
    ],
)
def test_waiting_is_seen(waits):
    with pretend_gpu() as own:
        x = torch.ones(3, device="cuda")
        assert sum(waits_of(own, lambda: waits(x)).values()) == 1


def test_what_does_not_wait_is_not_counted():
    with pretend_gpu() as own:
        x = torch.ones(3, device="cuda")
        torch.ones(2).pin_memory().to("cuda", non_blocking=True)
        x[x.long()] = torch.full((3,), 2.0, device="cuda")
        torch.where(x > 0, x, 0.0), torch.nn.functional.one_hot(x.long(), 4), x[0], x.sum() * 3
        assert not own.waits


def test_a_training_step_that_looks_is_found(monkeypatch):
    with pretend_gpu() as own:
        trainer = tiny_trainer("dense", "system.device=cuda")
        trainer.step(drawn(trainer, 0))
        forward = trainer.method.forward
        trainer.method.forward = lambda *inputs: float(inputs[0].sum()) and forward(*inputs)
        assert waits_of(own, lambda: trainer.step(drawn(trainer, 1))) == {"_local_scalar_dense in trainer.py:_backward": 1}
