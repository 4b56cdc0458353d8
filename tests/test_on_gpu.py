"""Does a real GPU agree with what was seen on a pretended one? No step waits, and its own kernels compute what plain ones do.

Written where there was none: `pytest -m gpu` on a machine that has one.
"""

from collections.abc import Iterator

import pytest
import torch
from training import RUNS, drawn, tiny_trainer

from methods.grouped import GROUPED_DTYPES, gpu_can_group, grouped_linear, looped_mm, sort_by_expert

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf Tensor",  # torch's own, compiling
        "ignore:TensorFloat32 tensor cores",  # which are off on purpose
        "ignore:Synchronization debug mode is a prototype",
    ),
]
DEVICE = torch.device("cuda")
ON_GPU = ("system.device=cuda", "train.precision=bf16")
STEPS = 4  # states are made, kernels are loaded, graphs are recorded


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    """From when it says so."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("waiting_is_an_error")
@pytest.mark.parametrize("method", RUNS)
def test_no_training_step_waits(method):
    if method == "dit_moe" and not gpu_can_group():
        pytest.skip("without a grouped kernel, experts wait for the sizes of their groups")
    trainer = tiny_trainer(method, *ON_GPU, "train.micro_batches=2", "train.ema_half_life_images=30")
    batches = [drawn(trainer, step) for step in range(STEPS + 1)]
    for batch in batches[:STEPS]:
        trainer.step(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    trainer.step(batches[STEPS])


def test_grouped_products_are_those_of_a_loop():
    """In bfloat16, forward and back, where an expert gets no rows, too."""
    if not (gpu_can_group() and torch.bfloat16 in GROUPED_DTYPES):
        pytest.skip("there is no grouped kernel for this GPU")
    torch.manual_seed(0)
    chosen = torch.randint(0, 7, (100, 2), device=DEVICE)
    _, _, ends = sort_by_expert(chosen, 8)  # the last gets none
    weight = torch.randn(8, 32, 16, device=DEVICE, dtype=torch.bfloat16)
    rows = torch.randn(200, 16, device=DEVICE, dtype=torch.bfloat16)
    results = []
    for product in (lambda r, w: grouped_linear(r, w, None, ends), lambda r, w: looped_mm(r, w, ends)):
        own = rows.clone().requires_grad_(), weight.clone().requires_grad_()
        output = product(*own)
        output.float().square().sum().backward()
        results.append((output, *(tensor.grad for tensor in own)))
    for grouped, looped in zip(*results, strict=True):
        assert grouped.dtype == torch.bfloat16
        assert (grouped.float() - looped.float()).norm() <= 0.01 * looped.float().norm()


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["blocks", "cuda_graphs"])
@pytest.mark.parametrize("method", RUNS)
def test_compiled_training_is_the_plain_one_up_to_rounding(method, setting):
    torch.compiler.reset()
    plain, compiled = (tiny_trainer(method, *ON_GPU, f"system.compile={how}") for how in ("none", setting))
    for step in range(STEPS):
        batch = drawn(plain, step, step % len(plain.method.intervals))
        one, other = ({name: float(loss) for name, loss in each.step(batch).items()} for each in (plain, compiled))
        assert other == pytest.approx(one, rel=0.05)
