"""Do devices and types agree under CUDA's own autocast, which casts other operations than that of a CPU?

On torch's fake tensors, which have a device and a type and no values. They need no driver as long as nothing is differentiated:
backward passes, updates and waiting are held by `test_pretend_gpu`.
"""

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from training import RUNS, tiny_config, tiny_data

from bench.job import build_method
from methods import grouped

CHANNELS, SIZE, BATCH = 2, 4, 4  # as in `tiny_data`


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An H100, as far as types go."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)  # else autocast is switched off
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *given, **named: True)
    monkeypatch.setattr(grouped, "gpu_can_group", lambda: True)
    with FakeTensorMode():
        yield


class Products(TorchDispatchMode):
    """The types in which matrices are multiplied, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.types: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm"):
            given = {each.dtype for each in args if isinstance(each, torch.Tensor) and each.is_floating_point()}
            assert len(given) == 1 and all(each.is_cuda for each in args if isinstance(each, torch.Tensor)), func
            self.types.setdefault(name, set()).update(given)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", RUNS)
def test_a_pass_has_the_types_that_it_should(method, precision, fake_gpu):
    prior = ("options.prior_weight=0",) if method == "switch_dit" else ()  # it is solved on the host, from values
    config, dtype = tiny_config(method, *prior), torch.bfloat16 if precision == "bf16" else torch.float32
    with torch.device("cuda"):
        built = build_method(config, tiny_data())
        x, t = torch.empty(BATCH, CHANNELS, SIZE, SIZE), torch.empty(BATCH, dtype=torch.int64)
    assert all(tensor.is_cuda for tensor in built.state_dict().values())
    with Products() as products, torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == "bf16"):
        prediction = built(x, t, t, built.intervals[0], 0.3)
        drawn = built.specialise(built.intervals[0])(x, t, t)
    for output in (prediction.output, drawn):
        assert (output.device, output.dtype) == (torch.device("cuda:0"), dtype)
    assert all((loss.dtype, loss.device.type) == (torch.float32, "cuda") for loss in prediction.penalties.values())
    assert products.types["addmm"] == {dtype}
    assert ("_grouped_mm" in products.types) == ((method, precision) == ("dit_moe", "bf16"))
    assert products.types.get("_grouped_mm", {torch.bfloat16}) == {torch.bfloat16}
    if method in ("dit_moe", "remix_dit"):  # routing and mixing keep float32
        assert torch.float32 in products.types["mm"]
