"""Do compiled blocks compute what plain ones do, as one graph each, and without being compiled anew for another expert?"""

import shutil
from collections.abc import Iterator

import pytest
import torch
from command import TINY
from helpers import VARIANTS, assert_close, batch, tiny
from torch import nn
from torch._dynamo.utils import counters
from training import RUNS, drawn, tiny_config, tiny_data, tiny_trainer

from bench.compiled import compile_blocks
from bench.job import build_method, make_config, run
from bench.method import Method
from methods.backbone import Shape
from methods.dense import Dense

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MANY = {"multi_expert": {"experts": 12}, "remix_dit": {"experts": 12}}  # more than torch.compile would compile anew for
# of torch's own: it reads .grad of what a graph is given
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler here")


@pytest.fixture(autouse=True)
def _nothing_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def losses_and_gradients(method: Method, index: int, precision: str = "fp32") -> list[torch.Tensor]:
    """Of one training pass on an interval."""
    interval = method.intervals[index]
    x, t, y = batch(interval, seed=index)
    method.zero_grad()
    with method.one_step(interval):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            prediction = method(x, t, y, interval, 0.3)
        (prediction.output.square().mean() + sum(prediction.penalties.values(), torch.zeros(()))).backward()
    return [prediction.output.detach(), *(p.grad for p in method.parameters() if p.grad is not None)]


def num_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def assert_near(one: torch.Tensor, other: torch.Tensor, precision: str) -> None:
    """In bfloat16 as a whole, and about as far as float32 is: in a graph attention and experts add up in another order."""
    if precision == "fp32":
        assert_close(other, one, 1e-6)
    assert other.dtype == one.dtype and (other.float() - one.float()).norm() <= 0.05 * one.float().norm()


@pytest.mark.parametrize(
    ("variant", "precision"),
    [*((variant, "fp32") for variant in VARIANTS), *((variant, "bf16") for variant in VARIANTS if variant.startswith("dit_moe"))],
)
def test_every_block_is_one_graph_for_all_blocks_and_experts(variant, precision):
    options = MANY.get(VARIANTS[variant][0], {})
    plain, compiled = tiny(variant, **options), tiny(variant, **options)
    compile_blocks(compiled, "blocks", CPU, backend="aot_eager")
    after_first = 0
    for index in range(len(plain.intervals)):
        expected, found = (losses_and_gradients(each, index, precision) for each in (plain, compiled))
        for one, other in zip(expected, found, strict=True):
            assert_near(one, other, precision)
        after_first = after_first or num_graphs()
    assert num_graphs() == after_first == 1
    assert not counters["graph_break"] and not counters["recompile_limit"]


def test_a_graph_break_would_be_an_error():
    method = tiny("dense")
    block = method.network.blocks[1]
    mlp = block.mlp.forward
    block.mlp.forward = lambda x: torch._dynamo.graph_break() or mlp(x)
    compile_blocks(method, "blocks", CPU, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        losses_and_gradients(method, 0)


@needs_compiler
@pytest.mark.parametrize(
    ("method", "precision"),
    [
        ("dit_moe", "fp32"),
        pytest.param("dit_moe", "bf16", marks=pytest.mark.slow),
        pytest.param("switch_dit", "bf16", marks=pytest.mark.slow),
        pytest.param("remix_dit", "fp32", marks=pytest.mark.slow),
    ],
)
def test_compiled_training_is_the_plain_one_up_to_rounding(method, precision):
    plain, compiled = (
        tiny_trainer(method, f"train.precision={precision}", f"system.compile={setting}") for setting in ("none", "blocks")
    )
    for step in range(4):
        drawn_batch = drawn(plain, step, step % len(plain.method.intervals))
        one, other = plain.step(drawn_batch), compiled.step(drawn_batch)
        for name in one:
            assert float(other[name]) == pytest.approx(float(one[name]), rel=1e-4 if precision == "fp32" else 0.05), name
    assert num_graphs() and not counters["graph_break"]


@needs_compiler
@pytest.mark.slow
def test_a_block_of_a_published_width_is_compiled_well_in_bf16():
    """Seen in torch 2.15: NaN on a CPU, where the tokens of the first block lay in memory channel by channel."""
    torch.manual_seed(0)
    dit = Dense(Shape(depth=1)).network
    x, t, y = torch.randn(2, 4, 32, 32), torch.tensor([5, 900]), torch.tensor([1, 2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens, _, condition = dit.embed(x, t, y)
        assert tokens.is_contiguous()
        compiled = torch.compile(dit.blocks[0].forward, fullgraph=True)(tokens, condition)
        torch.testing.assert_close(compiled, dit.blocks[0](tokens, condition), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("method", RUNS)
def test_what_is_not_trained_is_not_compiled(method, tmp_path, monkeypatch):
    """Held-out batches, of other sizes, and sampling; with recomputation the blocks are compiled all the same."""
    monkeypatch.setattr("bench.compiled.compile_blocks.__defaults__", ("aot_eager",))
    # grouped, as in a graph: Adam makes whole steps of gradients that are nothing but rounding, as those of a key's bias
    whole = tiny_trainer(method, "train.micro_batches=2", "system.plain=pieces", folder=tmp_path / "plain")
    whole.fit()
    settings = ("train.micro_batches=2", "system.compile=blocks", "system.recompute=true")
    compiled = tiny_trainer(method, *settings, folder=tmp_path / "compiled")
    compiled.fit()
    assert compiled.config.run_id == whole.config.run_id
    assert num_graphs() == 1
    for one, other in zip(whole.method.parameters(), compiled.method.parameters(), strict=True):
        assert_close(other, one, 1e-5)
    assert build_method(compiled.config, tiny_data()).state_dict().keys() == compiled.method.state_dict().keys()


def test_runs_of_one_process_do_not_use_up_what_the_compiler_would_compile_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.compiled.compile_blocks.__defaults__", ("aot_eager",))
    with torch._dynamo.config.patch(recompile_limit=1):
        for width in (16, 24):
            config = make_config({"method": "dense"}, [*TINY, f"model.width={width}", "system.compile=blocks"])
            run(config, tmp_path / config.run_id)


@pytest.mark.parametrize(("setting", "mode"), [("blocks", "default"), ("cuda_graphs", "reduce-overhead")])
def test_only_cuda_graphs_ask_the_compiler_to_record_and_mark_every_step(setting, mode, monkeypatch):
    asked, marked = [], []
    monkeypatch.setattr(torch, "compile", lambda forward, **options: asked.append(options) or forward)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marked.append(1))
    monkeypatch.setattr("bench.trainer.compile_blocks", lambda method, setting, _: compile_blocks(method, setting, GPU))
    trained = tiny_trainer("dense", f"system.compile={setting}")
    assert asked == [{"fullgraph": True, "backend": "inductor", "mode": mode}] * len(trained.method.network.blocks)
    for step in range(2):
        trained.step(drawn(trained, step))
    assert len(marked) == (2 if setting == "cuda_graphs" else 0)


def test_what_cannot_be_compiled_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match=r"^system.compile is cuda_graphs, which need a GPU, and [^\n]*: choose blocks or none$"):
        tiny_trainer("dense", "system.compile=cuda_graphs")
    with pytest.raises(ValueError, match="no list of blocks"):
        compile_blocks(nn.Linear(1, 1), "blocks", CPU)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'fast': choose one of none, blocks, cuda_graphs"):
        tiny_config("dense", "system.compile=fast")
