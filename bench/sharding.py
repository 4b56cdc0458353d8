"""How does a network train by FSDP2 that is too large for one device?

Each rank holds one part of every weight, and of its gradient, moments and average. The weights of a unit
(`Method.units`) are gathered when it is called and let go afterwards; its gradients are averaged over ranks and cut
into parts again. The numbers are those of ranks that hold everything, up to the order of sums.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from bench.intervals import Interval
from bench.method import Denoiser, Diagnostics, Method


class Part(NamedTuple):
    """Of a tensor, the rows `start <= i < stop` along `dim`."""

    dim: int
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.narrow(self.dim, self.start, self.stop - self.start)


def part_of(shape: torch.Size, rank: int, size: int) -> Part:
    """A rank's part of a parameter: along the first dimension that ranks can share equally (stacks of few experts or bases
    are not cut between them), else along the first of all, where the last ranks may get less or nothing.
    """
    dim = cut_dimension(shape, size)
    length = -(-shape[dim] // size)
    start = min(rank * length, shape[dim])
    return Part(dim, start, min(start + length, shape[dim]))


def cut_dimension(shape: torch.Size, size: int) -> int:
    return next((dim for dim, length in enumerate(shape) if length % size == 0), 0)


def shard(method: Method, device: torch.device, parts: dict[str, Tensor] | None = None) -> Method:
    """The method, cut into one part per rank. All ranks must call it, and from then on do the same with it at the same time.
    Nothing is computed once for all passes of a step: outside its pass no unit has its weights.

    `parts`: this rank's part of each parameter, where the method's own are on the meta device (`bench.sharded_start`).
    """
    if scalars := [name for name, parameter in method.named_parameters() if parameter.dim() == 0]:
        raise ValueError(
            f"system.shard is full, but {', '.join(scalars)} of this method is a single number, which has no parts: give it a "
            "dimension, or set system.shard=none"
        )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in dict.fromkeys([*method.units(), method]):
        if next(module.parameters(), None) is None:
            continue
        placement = partial(_placement, mesh.size())
        unit = fully_shard(module, mesh=mesh, reshard_after_forward=True, shard_placement_fn=placement)
        if device.type == "cpu":  # gloo has no mean
            unit.set_force_sum_reduction_for_comms(True)
    if parts is not None:
        _put(method, parts, mesh, device)
    method.to(device)  # the buffers
    method.one_step = partial(Method.one_step, method)  # type: ignore[method-assign]
    method.specialise = partial(_together, method)  # type: ignore[method-assign]
    method.diagnostics = partial(_shown, method, method.diagnostics)  # type: ignore[method-assign]
    return method


def is_sharded(method: nn.Module) -> bool:
    return isinstance(method, FSDPModule)


def _placement(size: int, parameter: nn.Parameter) -> Shard:
    return Shard(cut_dimension(parameter.shape, size))


def _put(method: Method, parts: dict[str, Tensor], mesh: DeviceMesh, device: torch.device) -> None:
    state: dict[str, Tensor] = {name: tensor.to(device) for name, tensor in method.named_buffers()}
    state = {name: state[name] for name in method.state_dict() if name in state}
    for name, parameter in method.named_parameters():
        assert isinstance(parameter, DTensor)
        part = parts.pop(name).to(device)
        state[name] = DTensor.from_local(
            part, mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
    method.load_state_dict(state, assign=True)


def _together(method: Method, interval: Interval) -> Denoiser:
    """In place of a specialised network, which would need weights gathered: the training pass, through which all ranks go."""
    return lambda x, t, y: method(x, t, y, interval, 0.0).output


def _shown(method: Method, show: Callable[..., Diagnostics], probe: None = None) -> Diagnostics:
    """What needs no more than units that are called, and what is in no unit. A probe takes the whole method."""
    assert probe is None and isinstance(method, FSDPModule)
    method.unshard()
    try:
        return show()
    finally:
        method.reshard()
