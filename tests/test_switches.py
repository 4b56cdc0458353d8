"""Do optimisations leave the numbers as they are, each on and off, and does a step leave the device alone?"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from helpers import (
    LAYOUT_OF_GOLDEN,
    NUM_TIMESTEPS,
    TINY,
    VARIANTS,
    assert_close,
    assert_gradients,
    batch,
    golden,
    golden_interval,
    golden_method,
    tiny,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training import RUNS, drawn, gradient_of, tiny_trainer

import methods.grouped
from bench import switches
from bench.compiled import compile_blocks
from bench.distributed import World
from bench.ema import EMA
from bench.flops import measure
from bench.journal import Journal
from bench.method import Method
from bench.recompute import recompute_blocks
from bench.switches import SWITCHES, is_on, parse, without
from methods import METHODS
from methods.switch_dit import SwitchDiT, match_columns

every_switch = pytest.mark.parametrize("names", [(), *((name,) for name in SWITCHES), tuple(SWITCHES)], ids=",".join)
OPTIONS = {"remix_b2e10": {"prior_weight": 0.1, "prior_annealing": "constant"}}


@pytest.fixture(autouse=True)
def _all_on() -> Iterator[None]:
    switches.set_plain(())
    yield
    switches.set_plain(())


@every_switch
@pytest.mark.parametrize("name", LAYOUT_OF_GOLDEN)
def test_released_numbers_hold_with_every_switch_on_and_off(name, names):
    """As the trainer takes a step, also in two passes."""
    with without(*names):
        for num_passes in (1, 2):
            assert_released_numbers(golden_method(name, **OPTIONS.get(name, {})), name, num_passes)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")  # torch's own, compiling
@pytest.mark.parametrize("how", ["compiled", "recomputed"])
@pytest.mark.parametrize("name", LAYOUT_OF_GOLDEN)
def test_released_numbers_hold_with_compiled_and_with_recomputed_blocks(name, how):
    method = golden_method(name, **OPTIONS.get(name, {}))
    if how == "compiled":
        torch.compiler.reset()
        compile_blocks(method, "blocks", torch.device("cpu"), backend="aot_eager")
    else:
        recompute_blocks(method)
    assert_released_numbers(method, name)


def assert_released_numbers(method: Method, name: str, num_passes: int = 1) -> None:
    """Those of a training step, and those of sampling."""
    tensors, _ = golden(name)
    x, t, y = (tensors[key] for key in "xty")
    interval = golden_interval(method, name)
    with method.one_step(interval):
        for _ in range(num_passes):
            prediction = method(x, t, y, interval)
            assert_close(prediction.output, tensors["out_train"])
            penalties = sum(prediction.penalties.values(), torch.zeros(()))
            ((prediction.output.square().mean() + penalties) / num_passes).backward()
    assert_gradients(method, name)
    assert_close(method.specialise(interval)(x, t, y), tensors["out_eval"])


@pytest.mark.parametrize("name", SWITCHES)
def test_a_step_is_the_same_without_an_optimisation_and_computed_otherwise(name):
    settings = ("train.micro_batches=2", "train.ema_half_life_images=20", "train.ema_warmup=0", "train.weight_decay=0.1")
    differs, kernel = set(), KERNELS.get(name, "")
    for method in RUNS:
        results, operations = [], []
        for plain in ((), (name,)):
            trained = tiny_trainer(method, *settings, *(f"system.plain={name}" for name in plain))
            assert is_on(name) == (not plain)
            drawn_before = drawn(trained)
            with Watch() as watch:
                losses = trained.step(drawn_before)
            results.append((trained, losses))
            operations.append(watch.seen)
        (one, of_one), (other, of_other) = results
        for term in of_one:
            assert float(of_other[term]) == pytest.approx(float(of_one[term]), rel=1e-5), (method, term)
        for (label, p), q in zip(one.method.named_parameters(), other.method.parameters(), strict=True):
            gradient, others = gradient_of(one, p), gradient_of(other, q)
            assert (gradient is None) == (others is None), label
            if gradient is not None:
                assert_close(others, gradient, 1e-5)
                clear = gradient.abs() > 1e-5 * (1 + gradient.abs().max())  # elsewhere Adam makes whole steps of rounding
                assert_close(q[clear], p[clear], 1e-5)
                averages = (each.ema.averages[label][clear] for each in (other, one))
                assert_close(*averages, 1e-6)  # which a step moves by 2e-5
        assert not kernel or [any(kernel in one for one in seen) for seen in operations] == [True, False], method
        if operations[0] != operations[1]:
            differs.add(method)
    assert differs & PUBLISHED == CONCERNED[name]


PUBLISHED = {"dense", "multi_expert", "dtr", "switch_dit", "dit_moe", "remix_dit"}
CONCERNED = dict.fromkeys(("attention", "optimizer", "ema"), PUBLISHED)
CONCERNED |= {
    "memory": set(),  # the same operations
    "grouped": {"dit_moe"},
    "pieces": {"dit_moe"},
    "mixing": {"remix_dit"},
    "outer": {"remix_dit"},
    "masks": {"switch_dit"},
    "matching": {"switch_dit"},
    "overlap": set(),  # a process on its own sends nothing: see `test_averaging` and `test_overlap`
}
KERNELS = {"attention": "_flash_attention", "optimizer": "aten._fused_adamw_", "ema": "aten._foreach_lerp_"}
"""The operation that a switch puts in the place of many, on a CPU too."""


@pytest.mark.parametrize("plain", [(), ("ema",)], ids=",".join)
def test_averages_take_in_the_same_part_of_what_has_moved(plain):
    """Of each parameter with a gradient; the others' stand still."""
    method = tiny("multi_expert")
    ema = EMA(method, half_life_images=20, warmup=0)
    expected = {}
    for number, (label, p) in enumerate(method.named_parameters()):
        start = p.detach().clone()
        with torch.no_grad():
            p += torch.randn_like(p)
        p.grad = torch.ones_like(p) if number % 3 else None
        expected[label] = start if p.grad is None else start + (1 - 0.5 ** (8 / 20)) * (p.detach() - start)
    with without(*plain):
        ema.update(8)
    assert ema.averages.keys() == expected.keys()
    for label, average in ema.averages.items():
        assert_close(average, expected[label], 1e-6)


class Watch(TorchDispatchMode):
    """Keeps the names of all operations, forward and backward, and how often a tensor went from one kind of device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.crossings = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        output = function(*arguments, **(named or {}))
        self.seen.append(str(function))
        tensors = [a for a in tree_leaves(arguments[1:]) if isinstance(a, torch.Tensor)]
        if "index" in str(function) and any(a.dtype == torch.bool for a in tensors):
            self.seen.append("nonzero, of a mask used as an index")
        inputs = {a.device.type for a in arguments if isinstance(a, torch.Tensor) and a.dim()}
        if isinstance(output, torch.Tensor) and inputs and output.device.type not in inputs:
            self.crossings += 1
        return output


WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "aten.equal.", "looped_mm", "match_columns")


def waits(watch: Watch) -> list[str]:
    return [operation for operation in watch.seen if any(word in operation for word in WAITS)]


# Nothing waits for the device


def test_a_step_never_looks_at_a_number(monkeypatch):
    """Checks that a CPU can afford aside. The one exception is an assignment that the host solves, once a step."""
    monkeypatch.setattr(Journal, "check_finite", lambda self: None)
    for module in {METHODS[method].__module__ for method in RUNS}:
        monkeypatch.setattr(f"{module}.check_timesteps", lambda *arguments: None)
    for method in RUNS:
        trained = tiny_trainer(method, "train.micro_batches=2", "train.ema_half_life_images=20")
        for step in range(2):  # the first makes the optimiser's state
            drawn_before = drawn(trained, step)
            with Watch() as watch:
                trained.step(drawn_before)
        assert len(watch.seen) > 100
        expected = ["timestep_bench.match_columns.default"] if method == "switch_dit" else []
        assert waits(watch) == expected, method


def test_what_waits_is_seen():
    with Watch() as watch:
        ones = torch.ones(3)
        bool(ones.sum() > 1)
        ones[ones > 0]
    assert len(waits(watch)) == 2
    with without("grouped"), Watch() as watch:
        method = tiny("dit_moe")
        method(*batch(method.intervals[0]), method.intervals[0])
    assert waits(watch)


@pytest.mark.parametrize("variant", VARIANTS)
def test_on_a_gpu_nothing_of_a_pass_comes_to_the_host(variant, monkeypatch):
    """On pretended tensors of a GPU, which have no numbers: looking at one would raise."""
    monkeypatch.setattr(methods.grouped, "gpu_can_group", lambda: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    name, options = VARIANTS[variant]
    if name == "switch_dit":
        options = options | {"prior_weight": 0.0}  # its assignment is solved by the host: see below
    with FakeTensorMode(), torch.device("cuda"):
        method = METHODS[name](TINY, num_timesteps=NUM_TIMESTEPS, **options)
        interval = method.intervals[-1]
        x, t, y = torch.randn(6, 2, 4, 4), torch.full((6,), interval.start), torch.zeros(6, dtype=torch.int64)
        with Watch() as watch, torch.autocast("cuda", dtype=torch.bfloat16):
            prediction = method(x, t, y, interval, 0.5)
    assert prediction.output.device.type == "cuda" and prediction.output.dtype == torch.bfloat16
    assert len(watch.seen) > 50 and not waits(watch) and not watch.crossings


def test_the_assignment_is_under_way_before_the_network_and_asked_for_after_it(monkeypatch):
    order = []
    begun, solved, denoise = SwitchDiT.begin_matching, match_columns, SwitchDiT.denoise_and_route
    module = "methods.switch_dit"
    monkeypatch.setattr(SwitchDiT, "begin_matching", lambda *a: order.append("begin") or begun(*a))
    monkeypatch.setattr(SwitchDiT, "denoise_and_route", lambda *a: order.append("network") or denoise(*a))
    monkeypatch.setattr(f"{module}.match_columns", lambda cost: order.append("solve") or solved(cost))
    method = tiny("switch_dit")
    x, t, y = batch(method.intervals[0])
    with method.one_step(method.intervals[0]):
        for _ in range(2):
            method(x, t, y, method.intervals[0])
    assert order == ["begin", "network", "solve", "begin", "network"]
    method(x, t, y, method.intervals[0])
    method(x, t, y, method.intervals[0])
    assert order.count("solve") == 3  # outside of a step the gates may have changed
    del order[:]
    with without("matching"), method.one_step(method.intervals[0]):
        for _ in range(2):
            method(x, t, y, method.intervals[0])
    assert order == ["network", "begin", "solve"] * 2


# Mixing once per step


def test_ranks_exchange_the_gradient_of_one_network(monkeypatch):
    """And the coefficients: the bases' gradients follow from it. Plainly, they exchange those of all bases."""
    sent: list[int] = []

    @contextmanager
    def count(leaves: list[torch.nn.Parameter], world: World, num_passes: int) -> Iterator[None]:
        yield
        sent.append(sum(p.grad.numel() for p in leaves if p.grad is not None))

    monkeypatch.setattr("bench.trainer.averaging", count)
    trained = tiny_trainer("remix_dit")
    trained.step(drawn(trained))
    assert sent == [trained.method.num_active_parameters() + trained.method.logits.numel()]
    with without("mixing"):
        trained.step(drawn(trained))
    assert sent[1] == sum(p.numel() for p in trained.method.parameters())


def test_a_step_that_fails_leaves_nothing_mixed():
    method = tiny("remix_dit")
    interval = method.intervals[0]
    with pytest.raises(RuntimeError, match="no more"), method.one_step(interval):
        assert method.mixed
        raise RuntimeError("no more")
    assert not method.mixed


# Names


def test_a_name_that_is_no_optimisation_is_refused():
    assert parse("") == frozenset() and parse("ema,mixing") == {"ema", "mixing"}
    with pytest.raises(ValueError, match=r"^'speed' is no optimisation that can be switched off: choose from attention, "):
        parse("ema,speed")


def test_a_cost_does_not_depend_on_what_is_off():
    """Of this run, or of the one before in this process: a budget in FLOPs would buy other steps."""
    for method in ("switch_dit", "remix_dit", "dit_moe"):
        expected = measure(tiny(method), (2, 4, 4))
        with without(*SWITCHES):
            assert measure(tiny(method), (2, 4, 4)) == expected
            assert not any(map(is_on, SWITCHES))


def test_what_is_off_is_on_again_afterwards():
    with without("ema"), without("mixing"):
        assert not is_on("ema") and not is_on("mixing") and is_on("masks")
    assert all(map(is_on, SWITCHES))
