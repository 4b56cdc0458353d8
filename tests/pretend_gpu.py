"""How does code for a GPU run where there is none? Tensors that say they are on one, and are held to its rules.

They lie in the host's memory and compute there, so that values are real; what is on the GPU is told by its storage. Where a GPU
would refuse to mix devices, this does; where the host would wait for it, that is counted. What CUDA's own kernels do
(their dtypes, speed, bits) is not seen, and autocast casts what it casts on a CPU.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from pretence import Event, Pretence, names_gpu, tensors_in
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils import _device
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
GPU, HOST = torch.device("cuda:0"), torch.device("cpu")
LOOKS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten._unique2, aten.unique_dim}
GATHERS = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}


class Words(TorchFunctionMode):
    """What Python code says to torch: devices by name, and what is made where."""

    def __init__(self, pretence: Pretence) -> None:
        super().__init__()
        self.pretence = pretence

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """torch leaves this mode while it is handled. Where code of ours runs inside, a backward pass, it is entered again."""
        kwargs, own = dict(kwargs or {}), self.pretence
        name = getattr(func, "__name__", "")
        if name == "_parse_to" or func is torch.device:  # which only read their arguments
            return func(*args, **kwargs)
        if names_gpu(_device.CURRENT_DEVICE) and func in _device._device_constructors():  # inside `with torch.device("cuda")`
            kwargs["device"] = kwargs.get("device") or GPU
        device = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.device)), kwargs.get("device"))
        there = names_gpu(device) if device is not None else any(own.is_there(t) for t in tensors_in((args, kwargs)))
        args = tuple(HOST if names_gpu(value) and isinstance(value, torch.device) else value for value in args)
        kwargs = {key: HOST if names_gpu(value) else value for key, value in kwargs.items()}
        pins = kwargs.pop("pin_memory", False)
        with own.making(there):
            if func in BACKWARD:
                with Words(own):
                    return BACKWARD[func](*args, **kwargs)
            waited = own.waits.copy()
            result = func(*args, **kwargs)
            if func is torch.nn.functional.one_hot:  # which looks at its indices on a CPU alone
                own.waits = waited
        if there and name in ("tensor", "as_tensor") and isinstance(result, Tensor):
            own.put_there(result)
            own.wait("a number that is copied to the GPU")
        return own.pin(result) if pins else result


def _backward(outputs: Any, gradients: Any = None, *plain: Any, **options: Any) -> None:
    """torch's own would leave the mode again."""
    outputs = _as_tuple(outputs)
    for name in ("gradient", "grad_tensors"):
        gradients = options.pop(name, None) if gradients is None else gradients
    assert not any((*plain, *options.values())), "not pretended"
    gradients = tuple(torch.ones_like(output) for output in outputs) if gradients is None else _as_tuple(gradients)
    torch.autograd.graph._engine_run_backward(outputs, gradients, False, False, (), allow_unreachable=True, accumulate_grad=True)


def _grad(outputs: Any, inputs: Any, grad_outputs: Any, **plain: Any) -> Any:
    return torch.autograd.graph._engine_run_backward(
        _as_tuple(outputs), _as_tuple(grad_outputs), False, False, tuple(inputs), allow_unreachable=False, accumulate_grad=False
    )


def _as_tuple(tensors: Any) -> tuple[Tensor, ...]:
    return (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)


BACKWARD = {torch.Tensor.backward: _backward, torch.autograd.backward: _backward, torch.autograd.grad: _grad}


class Manners:
    """What a tensor tells of itself, and how it moves: methods in place of torch's own, which stay in force everywhere."""

    def __init__(self, pretence: Pretence, patch: pytest.MonkeyPatch) -> None:
        self.pretence = own = pretence
        kept = {name: getattr(Tensor, name) for name in ("device", "is_cuda", "is_cpu", "to", "numpy", "__array__", "tolist")}

        def to_other(name: str) -> Any:
            def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
                if own.is_there(tensor):
                    raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first")
                with torch._C.DisableTorchFunction():
                    return kept[name](tensor, *args, **kwargs)

            return call

        def tolist(tensor: Tensor) -> Any:
            if own.is_there(tensor):
                own.wait("tolist")
            with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
                return kept["tolist"](tensor)

        def to(
            tensor: Tensor, *args: Any, device: Any = None, non_blocking: bool = False, copy: bool = False, **rest: Any
        ) -> Any:
            """As Tensor.to: (device, dtype, non_blocking), (dtype, non_blocking), (other, non_blocking)."""
            there = own.is_there(tensor)
            wanted, words = there, list(args)
            if tensor.is_meta or any(str(value) == "meta" for value in (*args, device)):
                with torch._C.DisableTorchFunction():
                    return kept["to"](tensor, *args, **rest, **({} if device is None else {"device": device}))
            for place, value in [*enumerate(args), (None, device)]:
                if isinstance(value, Tensor):
                    wanted, words[place] = own.is_there(value), value.dtype  # type: ignore[index, call-overload]
                elif isinstance(value, torch.device | str):
                    wanted = names_gpu(value)
            non_blocking = non_blocking or True in args[1:]
            dtype = rest.pop("dtype", None) or next((w for w in words if isinstance(w, torch.dtype)), tensor.dtype)
            with own.making(there), torch._C.DisableTorchFunction():
                moved = kept["to"](tensor, dtype, copy=copy, **rest)
            return moved if wanted == there else _Moved.apply(moved, own, wanted, non_blocking)

        patch.setattr(Tensor, "device", property(lambda t: GPU if own.is_there(t) else kept["device"].__get__(t)))
        patch.setattr(Tensor, "is_cuda", property(own.is_there))
        patch.setattr(Tensor, "is_cpu", property(lambda t: not own.is_there(t) and kept["is_cpu"].__get__(t)))
        patch.setattr(Tensor, "to", to)
        patch.setattr(Tensor, "cpu", lambda tensor: to(tensor, HOST))
        patch.setattr(Tensor, "cuda", lambda tensor: to(tensor, GPU))
        patch.setattr(Tensor, "numpy", to_other("numpy"))
        patch.setattr(Tensor, "__array__", to_other("__array__"))
        patch.setattr(Tensor, "tolist", tolist)
        patch.setattr(Tensor, "pin_memory", lambda tensor: own.pinned_copy(tensor))
        patch.setattr(Tensor, "is_pinned", lambda tensor: own.is_pinned(tensor))


class _Moved(torch.autograd.Function):
    """A copy on the other device."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, own: Pretence, there: bool, non_blocking: bool) -> Tensor:
        ctx.own, ctx.there = own, there
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            result = tensor.detach().clone()
        if there:
            own.put_there(result)
            if not (non_blocking and own.is_pinned(tensor)):
                own.wait("a copy to the GPU")
        else:
            assert not non_blocking, "what a copy without waiting brings to the host may not be there yet"
            own.wait("a copy to the host")
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return _Moved.apply(grad, ctx.own, not ctx.there, False), None, None, None


class Rules(TorchDispatchMode):
    """What operations may be given, where their results lie, and which of them wait."""

    def __init__(self, pretence: Pretence) -> None:
        super().__init__()
        self.pretence = pretence

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs, own, packet = kwargs or {}, self.pretence, func.overloadpacket
        given = tensors_in((args, kwargs))
        there = [own.is_there(tensor) for tensor in given]
        if packet is aten.copy_:
            return self.copied(func, args, kwargs)
        if any(there):
            self.check(func, packet, given, there)
        if func.namespace == "timestep_bench" and not any(t.is_meta for t in given):  # an operation of ours: what it does is seen
            with Rules(own), Words(own):
                result = OPDEFS[f"{func.namespace}::{packet.__name__}"]._init_fn(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        if any(there) or (not given and own.makes_there):
            own.put_there(result)
        return result

    def check(self, func: Any, packet: Any, given: list[Tensor], there: list[bool]) -> None:
        own = self.pretence
        strangers = [tensor for tensor, is_there in zip(given, there, strict=True) if not is_there]
        if packet in GATHERS and there[0]:
            indices = [t for t in given[1:] if not t.is_floating_point()]
            if any(t.dtype in (torch.bool, torch.uint8) for t in indices):
                own.wait(f"{packet.__name__} by a mask")
            if any(not own.is_there(t) for t in indices):
                own.wait(f"{packet.__name__} by indices of the host")
            strangers = [t for t in strangers if t.is_floating_point()]
        alone = torch.Tag.pointwise in func.tags or packet in GATHERS or packet in (aten.where, aten.fill_, aten.masked_fill_)
        bad = [tuple(tensor.shape) for tensor in strangers if tensor.dim() or not alone]
        if bad:
            raise RuntimeError(f"{func} is given tensors on cuda:0 and, of shape {bad}, on the CPU")
        if packet in LOOKS:
            own.wait(packet.__name__)

    def copied(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        own, (target, source) = self.pretence, args[:2]
        non_blocking = bool(args[2]) if len(args) > 2 else kwargs.get("non_blocking", False)
        to_gpu, from_gpu = own.is_there(target), own.is_there(source)
        if from_gpu and not to_gpu and non_blocking and own.is_pinned(target):
            own.late.append((own.events, target, source.detach().clone()))
            return target.fill_(float("nan") if target.is_floating_point() else -1)
        if to_gpu != from_gpu and not (to_gpu and source.dim() == 0) and not (non_blocking and own.is_pinned(source)):
            own.wait("a copy to the GPU" if to_gpu else "a copy to the host")
        return func(*args, **kwargs)


@contextmanager
def pretend_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[Pretence]:
    """Inside, there is one GPU, of that capability, and torch's own look at it finds it."""
    own = Pretence(capability)
    autocast, is_enabled, dtype_of = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype

    def on_host(device: str) -> str:
        return "cpu" if device == "cuda" else device

    class Stream:
        def record_event(self) -> Event:
            return Event(own)

    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        for place in (torch, torch.amp):
            patch.setattr(
                place, "autocast", lambda device_type, *rest, **options: autocast(on_host(device_type), *rest, **options)
            )
        patch.setattr(torch, "is_autocast_enabled", lambda device="cpu": is_enabled(on_host(device)))
        patch.setattr(torch, "get_autocast_dtype", lambda device: dtype_of(on_host(device)))
        answers = {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "get_device_capability": lambda device=None: capability,
            "get_device_name": lambda device=None: "NVIDIA H100 80GB HBM3",
            "synchronize": lambda device=None: own.wait("synchronize"),
            "current_stream": lambda device=None: Stream(),
            "empty_cache": lambda: None,
            "set_device": lambda device: None,
            "reset_peak_memory_stats": lambda device=None: None,
            "max_memory_allocated": lambda device=None: 2,
            "memory_allocated": lambda device=None: 1,
        }
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, answer)
        for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):  # 2.15's name, and 2.11's
            patch.setattr(torch.optim.Optimizer, name, lambda optimizer: None, raising=False)
        Manners(own, patch)
        stack.enter_context(Rules(own))
        stack.enter_context(Words(own))
        yield own
