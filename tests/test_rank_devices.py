"""Does each rank work on a GPU of its own, and is a GPU waited for no more often than it must be?"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench import distributed, job
from bench.distributed import World, gradient_norm, world_from_environment
from bench.intervals import Interval
from bench.journal import Journal, Record

CUDA = torch.device("cuda")
PLACES = [  # environment, GPUs that the task sees, the one that is this rank's
    ({}, 2, 0),
    ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, 1, 0),
    ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, 2, 1),
    ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, 2, 1),  # the second of the second node
    ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, 1, 0),  # each task sees its own alone
    ({"RANK": "3", "WORLD_SIZE": "4"}, 2, 1),
]


@pytest.fixture
def on_node(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str], int], list[int]]:
    """Pretends an environment and a number of GPUs; the list is of those that something was put on."""

    def pretend(environment: dict[str, str], num_gpus: int) -> list[int]:
        current, used, zeros = [0], [], torch.zeros

        def set_device(index: int) -> None:
            if index >= num_gpus:
                raise RuntimeError("CUDA error: invalid device ordinal")
            current[0] = index

        def put_zeros(*size: int, device: torch.device) -> Tensor:
            assert device.type == "cuda"
            used.append(current[0])
            return zeros(*size)

        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
        monkeypatch.setattr(torch.cuda, "set_device", set_device)
        monkeypatch.setattr(torch, "zeros", put_zeros)
        monkeypatch.setattr(dist, "init_process_group", lambda backend: used.append(current[0]))
        monkeypatch.setattr(dist, "new_group", lambda backend, timeout: None)
        monkeypatch.setattr(dist, "get_rank", lambda: int(environment["RANK"]))
        monkeypatch.setattr(dist, "get_world_size", lambda: int(environment["WORLD_SIZE"]))
        monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
        monkeypatch.setattr(distributed, "FAREWELL_SECONDS", 0)
        return used

    return pretend


@pytest.mark.parametrize(("environment", "num_gpus", "own"), PLACES)
def test_a_rank_puts_nothing_on_the_gpu_of_another(
    environment: dict[str, str], num_gpus: int, own: int, on_node: Callable[[dict[str, str], int], list[int]]
) -> None:
    used = on_node(environment, num_gpus)
    with world_from_environment(job.find_device("cuda")) as world:
        assert world == World(int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1")))
    assert set(used) == {own}


def test_a_gpu_that_is_named_by_its_number_is_the_current_one(on_node: Callable[[dict[str, str], int], list[int]]) -> None:
    used = on_node({}, 2)
    assert job.find_device("cuda:1") == torch.device("cuda:1") and used == [1]
    with pytest.raises(ValueError, match=r"'cuda:2', which cannot be used here \(CUDA error: invalid device ordinal\)"):
        job.find_device("cuda:2")


def test_where_there_is_no_gpu_it_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here, which is not refused")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match=r"^system.device is 'cuda', which cannot be used here \([^\n]*\): choose cpu or cuda$"):
        job.find_device("cuda")


def take_norms(world: World, out: Path) -> None:
    """Of gradients of which each of two ranks holds half, alone and with one that each holds whole."""
    plain, mesh = torch.nn.utils.get_total_norm, init_device_mesh("cpu", (world.size,))
    source = torch.Generator().manual_seed(0)
    values, cut, uncut = torch.randn(4, 3, generator=source), nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(5))
    cut = nn.Parameter(distribute_tensor(cut.detach(), mesh, [Shard(0)]))
    cut.grad, uncut.grad = distribute_tensor(values, mesh, [Shard(0)]), torch.randn(5, generator=source)
    before = torch.hypot(plain([cut.grad]).full_tensor(), torch.tensor(0.0))  # type: ignore[attr-defined]

    def of_some(tensors: Any) -> Tensor:
        assert tensors, "the norm of nothing is on the CPU, and a GPU has to wait for it"
        return plain(tensors)

    torch.nn.utils.get_total_norm = of_some  # type: ignore[assignment]
    assert torch.equal(gradient_norm([cut]), before)
    torch.testing.assert_close(gradient_norm([cut]), values.norm())
    torch.testing.assert_close(gradient_norm([cut, uncut]), torch.cat([values.reshape(-1), uncut.grad]).norm())
    assert torch.equal(gradient_norm([uncut]), plain([uncut.grad]))


def test_the_norm_of_sharded_gradients_takes_in_only_what_there_is(tmp_path: Path) -> None:
    on_ranks(2, take_norms, tmp_path)


class Looks(TorchDispatchMode):
    """Counts how often a number is taken from a tensor, for which a GPU is waited for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_all_losses_since_the_last_flush_are_looked_at_at_once() -> None:
    journal = Journal(None, World())
    for step in range(50):
        losses = {name: torch.tensor(float(step)) for name in ("loss", "mse", "vb", "penalty/balance", "grad_norm")}
        journal.record(Record(Interval(0, 0, 40), step, losses, {}, torch.tensor([7])))
    with Looks() as looks:
        journal.check_finite()
        journal.check_finite()
    assert looks.count == 1
