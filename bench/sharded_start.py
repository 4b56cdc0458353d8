"""How does a network begin that no machine can hold as a whole? Drawn tensor by tensor; each rank keeps its part.

The initial weights are those of an ordinary start, to the bit: every rank draws every number in the same order, one
tensor at a time, and what it does not keep is let go. What a constructor computes itself, it may; what it makes with
`torch.empty` is on the meta device, and may be filled by uniform_, normal_, zero_ and fill_ alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.method import Method
from bench.sharding import Part, part_of

aten = torch.ops.aten
FILLS = {aten.uniform_.default, aten.normal_.default, aten.zero_.default, aten.fill_.Scalar}


def draw_parts(build: Callable[[], Method], rank: int, size: int) -> tuple[Method, dict[str, Tensor]]:
    """What `build()` makes, with parameters that it leaves on the meta device, and a rank's part of each parameter.

    `build` is called twice and must do the same both times. ValueError where it fills tensors in other ways.
    """
    look = _Build(None)
    with look:
        seen = build()
    shapes = {look.place(p): p.shape for p in seen.parameters() if p.is_meta}
    draw = _Build({place: (shape, part_of(shape, rank, size)) for place, shape in shapes.items()})
    with draw:
        method = build()
    if unknown := [name for name, buffer in method.named_buffers() if buffer.is_meta]:
        raise ValueError(
            f"the buffers {', '.join(unknown)} of this method are made with torch.empty, which a sharded run cannot fill: make "
            "them with what they hold, or set system.shard=none"
        )
    parts = {}
    for name, parameter in method.named_parameters():
        if parameter.is_meta:
            parts[name] = draw.parts[draw.place(parameter)]
        else:
            parts[name] = part_of(parameter.shape, rank, size).of(parameter.detach()).clone()
    return method, parts


def make_empty(build: Callable[[], Method], device: torch.device) -> Method:
    """What `build()` makes, with parameters that are NaN until they are loaded from elsewhere."""
    with _Build(None):
        method = build()
    empty = {name: torch.full(p.shape, torch.nan, dtype=p.dtype, device=device) for name, p in method.named_parameters()}
    method.load_state_dict(dict(method.named_buffers()) | empty, assign=True, strict=False)  # some buffers are in no state
    return method.to(device)


class _Build(TorchDispatchMode):
    """Puts what torch.empty makes on the meta device, and numbers it. `wanted`: of which tensors a rank's part is filled."""

    def __init__(self, wanted: dict[int, tuple[torch.Size, Part]] | None) -> None:
        super().__init__()
        self.wanted = wanted
        self.parts = {place: torch.zeros(_shape(part, shape)) for place, (shape, part) in (wanted or {}).items()}
        self.made: list[Tensor] = []  # kept, so that no storage's address is used again
        self.places: dict[int, int] = {}

    def place(self, tensor: Tensor) -> int:
        """How many tensors were made before the one that this is, or is a view of."""
        return self.places[tensor.untyped_storage()._cdata]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.empty.memory_format:
            tensor = func(*args, **(kwargs | {"device": "meta"}))
            self.places[tensor.untyped_storage()._cdata] = len(self.made)
            self.made.append(tensor)
            return tensor
        if func._schema.is_mutable and isinstance(args[0], Tensor) and args[0].is_meta:
            if func not in FILLS or not args[0].is_contiguous():
                raise ValueError(
                    f"the initial weights of this method are made with {func}, which a sharded run cannot do part by part: "
                    "set system.shard=none"
                )
            if self.wanted is not None:
                self._fill(self.wanted, func, args, kwargs)
            return args[0]
        return func(*args, **kwargs)

    def _fill(self, wanted: dict[int, tuple[torch.Size, Part]], func: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        values = func(torch.empty(args[0].shape, dtype=args[0].dtype, device="cpu"), *args[1:], **kwargs)
        place = self.place(args[0])
        if place in wanted:
            shape, part = wanted[place]
            keep(values.view(-1), args[0].storage_offset(), self.parts[place], shape, part)


def keep(values: Tensor, offset: int, kept: Tensor, shape: torch.Size, part: Part) -> None:
    """Of `values` (n,), which are the places `offset` and after of a contiguous tensor of that shape, write into `kept` those
    that lie in a rank's part.
    """
    inner = shape[part.dim + 1 :].numel()
    row, own = shape[part.dim] * inner, (part.stop - part.start) * inner
    rows = kept.view(-1, own) if own else kept.view(0, 1)
    first = part.start * inner
    for index in range(offset // row, min(-(-(offset + len(values)) // row), len(rows))):
        start = max(index * row + first, offset)
        stop = min(index * row + first + own, offset + len(values))
        if start < stop:
            within = start - index * row - first
            rows[index, within : within + stop - start] = values[start - offset : stop - offset]


def _shape(part: Part, shape: torch.Size) -> list[int]:
    return [*shape[: part.dim], part.stop - part.start, *shape[part.dim + 1 :]]
