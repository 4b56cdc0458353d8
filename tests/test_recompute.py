"""Are gradients and weights the same bits where blocks are computed again, for less memory and the same counted cost?"""

from pathlib import Path

import pytest
import torch
from helpers import VARIANTS, batch, tiny
from torch import Tensor
from training import RUNS, differing, drawn, state_of, tiny_trainer

from bench.flops import measure
from bench.intervals import partition
from bench.method import Method
from bench.recompute import blocks_of, recompute_blocks


def gradients(method: Method, index: int, bf16: bool) -> dict[str, Tensor]:
    """And the output and penalties, of a training pass."""
    interval = method.intervals[index]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        output, penalties = method(*batch(interval), interval, 0.3)
    torch.stack([output.float().square().mean(), *(penalty.float() for penalty in penalties.values())]).sum().backward()
    found = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    return found | {"output": output.detach().float()} | {f"penalty/{name}": value.detach() for name, value in penalties.items()}


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_the_same_bits(variant: str, bf16: bool) -> None:
    last = len(tiny(variant).intervals) - 1
    again = tiny(variant)
    recompute_blocks(again)
    for index in {0, last}:
        again.zero_grad(set_to_none=True)
        assert not differing(gradients(tiny(variant), index, bf16), gradients(again, index, bf16))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_block_is_computed_twice_to_train_and_once_to_sample(variant: str) -> None:
    method = tiny(variant)
    interval = method.intervals[0]
    inputs = batch(interval)
    networks = list(method.networks) if variant == "multi_expert" else [method.network]
    assert blocks_of(method) == [block for network in networks for block in network.blocks]
    calls = [0]
    for name, module in networks[0].named_modules():
        if name.startswith("blocks.1.") and name.endswith("modulation"):
            module.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    sampled, state = method.specialise(interval)(*inputs), method.state_dict()
    recompute_blocks(method)
    calls[0] = 0
    torch.stack([(p := method(*inputs, interval, 0.3)).output.square().mean(), *p.penalties.values()]).sum().backward()
    assert calls == [2]
    with torch.no_grad():
        assert torch.equal(method.specialise(interval)(*inputs), sampled)
    assert calls == [2 if "remix" in variant else 3]  # a mixed network is made for sampling
    assert not differing(state, method.state_dict())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", RUNS)
def test_training_ends_with_the_same_bytes_and_counts_the_same_cost(method: str, precision: str, tmp_path: Path) -> None:
    settings = ("train.ema_half_life_images=30", "train.micro_batches=2", f"train.precision={precision}")
    trainers = []
    for value in ("false", "true"):
        trainer = tiny_trainer(method, *settings, f"system.recompute={value}", folder=tmp_path / value, cost=None)  # type: ignore[arg-type]
        trainer.fit()
        trainers.append(trainer)
    assert not differing(*map(state_of, trainers))
    assert trainers[0].cost == trainers[1].cost and trainers[0].train_flops == trainers[1].train_flops


def test_autocast_keeps_no_copies_of_weights_that_recomputing_makes_again() -> None:
    """Its cache would hold those of the whole network until the forward pass is over."""
    kept = []
    for value in ("false", "true"):
        trainer = tiny_trainer("dense", f"system.recompute={value}", "train.precision=bf16")
        trainer.method.register_forward_pre_hook(lambda *_: kept.append(torch.is_autocast_cache_enabled()))
        trainer.step(drawn(trainer))
    assert kept == [True, False]


def test_it_would_cost_more_if_it_were_counted() -> None:
    method = tiny("dense")
    plain = measure(method, (2, 4, 4))
    recompute_blocks(method)
    assert measure(method, (2, 4, 4)).train_flops_per_image > 1.2 * plain.train_flops_per_image


def test_a_method_without_blocks_is_refused() -> None:
    class Bare(Method):
        intervals = partition(1, 10)

    with pytest.raises(ValueError, match=r"^system.recompute is true, but Bare has no list of blocks [^\n]*: set it to false$"):
        recompute_blocks(Bare())
