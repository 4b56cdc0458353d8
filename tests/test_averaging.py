"""Do ranks get the same averages, in the same bits, whenever their gradients are sent?"""

import copy
import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from test_ranks import on_ranks
from torch import Tensor, nn
from training import (
    RUNS,
    crash_after,
    differing,
    drawn,
    rows,
    saved,
    state_of,
    tiny_trainer,
)

from bench import averaging
from bench.compiled import compile_blocks
from bench.distributed import World
from bench.switches import without
from bench.trainer import Trainer

pytestmark = pytest.mark.xdist_group("averaging")  # its ranks are started once, not by every worker

SMALL = 2500  # bytes of a bucket: of the tiny networks' tensors few, or one alone
STEPS = ("train.batch_size=24", "budget.amount=120", "train.lr_schedule=cosine", "train.ema_half_life_images=30")
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {method: (method, ()) for method in RUNS} | {
    "micro-batches": ("remix_dit", ("train.micro_batches=2",)),
    "recomputed": ("dit_moe", ("system.recompute=true", "train.micro_batches=2")),
    "uncertainty": ("dtr", ("diffusion.loss_weight=uncertainty",)),
    "no gradient": ("remix_dit", ("options.prior_weight=0",)),
    "bases exchanged": ("remix_dit", ("system.plain=mixing",)),
}


# Cutting


def leaf(size: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.zeros(size, dtype=dtype))


def test_buckets_begin_with_what_is_used_last_and_hold_no_more_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averaging, "BUCKET_BYTES", 40)
    leaves = [leaf(2), leaf(5), leaf(6), leaf(11), leaf(4), leaf(2)]
    sizes = [[member.numel() for member in bucket] for bucket in averaging.cut(leaves)]
    assert sizes == [[2, 4], [11], [6], [5, 2]]
    assert averaging.cut([]) == []


def test_a_bucket_is_of_one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averaging, "BUCKET_BYTES", 40)
    half = torch.bfloat16
    leaves = [leaf(3), leaf(3, half), leaf(9), leaf(8, half), leaf(1), leaf(10, half)]
    cut = [[(member.numel(), member.dtype) for member in bucket] for bucket in averaging.cut(leaves)]
    assert cut == [[(10, half), (8, half)], [(1, torch.float32), (9, torch.float32)], [(3, half)], [(3, torch.float32)]]


def test_one_bucket_is_as_large_as_those_of_torch() -> None:
    (bucket, rest) = averaging.cut([leaf(1), leaf(2**20), leaf(25 * 2**18 - 2**20)])
    assert [member.numel() for member in bucket] == [25 * 2**18 - 2**20, 2**20] and [member.numel() for member in rest] == [1]


# What gets gradients


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_arrive_in_every_pass_at_all_that_a_step_names(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What gets none delays what comes before it in the list; here only one of the first of it does."""
    method, settings = VARIANTS[variant]
    trained = tiny_trainer(method, *STEPS, *settings)
    named: list[nn.Parameter] = []
    arrived: Counter[int] = Counter()

    @contextmanager
    def watched(leaves: list[nn.Parameter], world: World, num_passes: int) -> Iterator[None]:
        named.extend(leaves)
        hooks = [each.register_post_accumulate_grad_hook(lambda leaf: arrived.update([id(leaf)])) for each in leaves]
        yield
        for hook in hooks:
            hook.remove()

    monkeypatch.setattr("bench.trainer.averaging", watched)
    trained.step(drawn(trained, interval=-1))
    assert len({id(leaf) for leaf in named}) == len(named) > 10
    lacking = [leaf for leaf in named if arrived[id(leaf)] != trained.config.train.micro_batches]
    if variant == "no gradient":  # of the coefficients in the passes: it follows at the end of the step
        assert len(lacking) == 1 and lacking[0] is named[0] is trained.method.logits
    else:
        assert not lacking
    if "bases exchanged" in variant or method != "remix_dit":  # whose bases get theirs from the mixed weights
        own = [*trained.method.parameters(), *trained.objective.module.parameters()]
        assert [id(p) for p in own if p.grad is not None] == [id(leaf) for leaf in named]


# On ranks


def trainers_of(variant: str, world: World) -> Iterator[Trainer]:
    """One that sends gradients during the backward pass, and one that does after it."""
    method, settings = VARIANTS[variant]
    yield tiny_trainer(method, *STEPS, *settings, world=world)
    plain = ["overlap", *(setting.removeprefix("system.plain=") for setting in settings if "system.plain=" in setting)]
    yield tiny_trainer(method, *STEPS, *settings, f"system.plain={','.join(plain)}", world=world)


def assert_unhooked(trained: Trainer) -> None:
    for parameter in (*trained.method.parameters(), *trained.objective.module.parameters()):
        assert not parameter._post_accumulate_grad_hooks  # type: ignore[attr-defined]


def trained_whole(trainer: Trainer) -> dict[str, Tensor]:
    trainer.fit()
    assert trainer.steps_done == 5
    assert_unhooked(trainer)
    return state_of(trainer)


def compare(world: World, out: Path) -> None:
    """All variants on few ranks, some on many; buckets small or as they are."""
    variants = VARIANTS if world.size == 2 else ("dense", "micro-batches") if world.size == 3 else ("multi_expert", "recomputed")
    for variant in variants:
        for size in (SMALL, averaging.BUCKET_BYTES) if world.size > 2 else (SMALL,):
            with mock.patch.object(averaging, "BUCKET_BYTES", size):
                one, other = (trained_whole(trainer) for trainer in trainers_of(variant, world))
            assert not differing(one, other), (variant, size)
            assert len(set(world.of_all(digest(one)))) == 1, (variant, size)


def digest(state: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in state.values())).hexdigest()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_when_gradients_are_sent_changes_no_bit(size: int, tmp_path: Path) -> None:
    on_ranks(size, compare, tmp_path)


def average_some(world: World, out: Path) -> None:
    """The mean of all ranks' gradients, each of which has its own; one leaf has none, one a transposed one."""
    for plain in ((), ("overlap",)):
        source = torch.Generator().manual_seed(world.rank)
        shapes = [(3, 4), (5,), (7, 2), (6,), (1,)]
        leaves = [nn.Parameter(torch.randn(shape, generator=source)) for shape in shapes]
        twins = copy.deepcopy(leaves)
        for several in (leaves, twins):
            several[2].grad = torch.randn(2, 7, generator=source).t() if several is leaves else leaves[2].grad.clone()  # type: ignore[union-attr]
        factors = [torch.randn(shape, generator=source) for shape in shapes]

        def loss(of: list[nn.Parameter], factors: list[Tensor] = factors) -> Tensor:
            return torch.stack([(p * f).sum() for i, (p, f) in enumerate(zip(of, factors, strict=True)) if i != 1]).sum()

        loss(twins).backward()
        small = mock.patch.object(averaging, "BUCKET_BYTES", 40)
        with small, without(*plain), averaging.averaging(leaves, world):
            loss(leaves).backward()
        for index, (mine, twin) in enumerate(zip(leaves, twins, strict=True)):
            if index == 1:
                assert mine.grad is None
                continue
            assert mine.grad is not None and twin.grad is not None
            expected = world.gather(twin.grad[None]).sum(dim=0) / world.size
            assert mine.grad.shape == mine.shape and mine.grad.is_contiguous()
            torch.testing.assert_close(mine.grad, expected)


def test_each_gradient_becomes_the_mean_over_ranks(tmp_path: Path) -> None:
    on_ranks(3, average_some, tmp_path)


def compile_and_compare(world: World, out: Path) -> None:
    states = []
    for trained in trainers_of("micro-batches", world):
        torch.compiler.reset()
        compile_blocks(trained.method, "blocks", torch.device("cpu"), backend="aot_eager")
        with mock.patch.object(averaging, "BUCKET_BYTES", SMALL):
            for step in range(3):
                trained.step(drawn(trained, step, interval=step).part(trained.shares[0].rows))
        states.append(state_of(trained))
    assert not differing(*states)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")  # torch's own, compiling
def test_compiled_blocks_give_the_same_bits_too(tmp_path: Path) -> None:
    on_ranks(2, compile_and_compare, tmp_path)


def interrupt_and_go_on(world: World, out: Path) -> None:
    settings = (*STEPS, "system.checkpoint_every=2", "system.log_every=1")
    with mock.patch.object(averaging, "BUCKET_BYTES", SMALL):
        tiny_trainer("multi_expert", *settings, folder=out / "whole", world=world).fit()
        crash_after(tiny_trainer("multi_expert", *settings, folder=out / "cut", world=world), 3)
        tiny_trainer("multi_expert", *settings, folder=out / "cut", world=world).fit()
    world.barrier()
    assert not differing(saved(out / "whole")[0], saved(out / "cut")[0])
    assert rows(out / "whole") == rows(out / "cut")


def test_three_ranks_go_on_where_they_were_interrupted(tmp_path: Path) -> None:
    on_ranks(3, interrupt_and_go_on, tmp_path)
