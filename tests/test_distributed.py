"""Do two processes, or one job per expert, train what one process trains?"""

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from training import (
    PROCESSES,
    RUNS,
    crash_after,
    differing,
    drawn,
    exit_codes_of,
    free_port,
    rows,
    saved,
    start_command,
    state_of,
    tiny_trainer,
)

from bench.distributed import World, world_from_environment
from bench.files import read_json
from bench.journal import Diverged
from bench.trainer import Trainer

pytestmark = pytest.mark.xdist_group("distributed")  # its ranks are started once, not by every worker

AVERAGED = ("train.lr_schedule=cosine", "train.lr_warmup_images=40", "train.ema_half_life_images=30")
VARIANTS = {method: (method, AVERAGED) for method in RUNS} | {
    "micro-batches": ("dense", (*AVERAGED, "train.micro_batches=2")),
    "local balance": ("dit_moe", ("options.balance_scope=local", "options.balance_weight=1")),
    "heavy balance": ("dit_moe", ("options.balance_weight=1",)),
    "uncertainty": ("dense", ("diffusion.loss_weight=uncertainty",)),
    "bases exchanged": ("remix_dit", (*AVERAGED, "system.plain=mixing")),
    "flow": ("switch_dit", ("diffusion.objective=flow", "diffusion.flow_times=stratified")),
}
BY_THE_CLOCK = ("budget.unit=device_seconds", "budget.amount=0.5", "train.lr_schedule=cosine")


class Clock:
    """In place of the module `time`: between two looks, 1/64 s has passed on rank 0, and 4 times that on rank 1."""

    def __init__(self, rank: int) -> None:
        self.now, self.tick = 0.0, (1 + 3 * rank) / 64

    def perf_counter(self) -> float:
        self.now += self.tick
        return self.now

    monotonic = perf_counter


def work(rank: int, size: int, port: int, out: Path) -> None:
    """What one rank does: every variant, and what else needs two processes."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with world_from_environment(torch.device("cpu")) as world:
        assert (world.rank, world.size) == (rank, size)
        for name, (method, settings) in VARIANTS.items():
            trained = tiny_trainer(method, *settings, folder=out / name, world=world)
            trained.fit()
            save_file(state_of(trained), out / f"{name}.{rank}.safetensors")
        crash_after(tiny_trainer("multi_expert", *AVERAGED, folder=out / "cut", world=world), 7)
        resumed = tiny_trainer("multi_expert", *AVERAGED, folder=out / "cut", world=world)
        resumed.fit()
        save_file(state_of(resumed), out / f"cut.{rank}.safetensors")
        with mock.patch("bench.trainer.time", Clock(rank)):
            timed = tiny_trainer("remix_dit", *BY_THE_CLOCK, world=world)
            timed.fit()
        save_file(state_of(timed) | {"steps": torch.tensor(timed.steps_done)}, out / f"timed.{rank}.safetensors")
        (out / f"diverged.{rank}").write_text(diverge(world))


def diverge(world: World) -> str:
    """The message of a run in which one image, of the second rank's part, is not finite."""
    trained = tiny_trainer("dense", world=world)
    batch = drawn(trained)
    batch.x0[6] = torch.nan
    batch.t[6] = 17
    before = state_of(trained)
    with pytest.raises(Diverged) as caught:
        trained.step(batch.part(trained.shares[0].rows))
    assert not differing(before, state_of(trained))
    return str(caught.value)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """The folder in which two processes have left their work."""
    out = tmp_path_factory.mktemp("pair")
    port = free_port()
    ranks = [PROCESSES.Process(target=work, args=(rank, 2, port, out)) for rank in range(2)]
    for process in ranks:
        process.start()
    assert exit_codes_of(ranks) == [0, 0]
    return out


def of_rank(pair: Path, name: str, rank: int) -> dict[str, torch.Tensor]:
    return load_file(pair / f"{name}.{rank}.safetensors")


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> float:
    """How far two states are from each other, as a part of how far training moved the weights: the most of any tensor.

    Left out: biases of attention keys. Their gradient is nought but for rounding, which Adam blows up to whole steps.
    """
    parts = []
    for name in one:
        if name.startswith("model.") and one[name].is_floating_point() and not torch.equal(one[name], start[name]):
            kept = slice(None)
            if name.endswith("qkv.bias"):
                width = one[name].shape[-1] // 3
                kept = [*range(width), *range(2 * width, 3 * width)]
            gap, way = (one[name] - other[name])[..., kept], (one[name] - start[name])[..., kept]
            parts.append(float(gap.abs().max() / way.abs().max()))
    assert len(parts) > 10
    return max(parts)


@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_end_with_the_same_bytes_and_match_one_process(variant, pair, tmp_path):
    states = [of_rank(pair, variant, rank) for rank in range(2)]
    assert not differing(*states)
    method, settings = VARIANTS[variant]
    alone = tiny_trainer(method, *settings, folder=tmp_path)
    start = state_of(alone)
    alone.fit()
    gap = distance(state_of(alone), states[0], start)
    if variant == "local balance":  # statistics of half the batch: not what one process trains
        assert gap > 0.02
        return
    assert gap < 2e-3
    for name, tensor in state_of(alone).items():
        if name.startswith("ema."):
            assert (tensor - states[0][name]).abs().max() < 2e-3
        elif name.endswith(".step"):
            assert torch.equal(tensor, states[0][name])
    assert saved(pair / variant)[1] == saved(tmp_path)[1]
    together, by_itself = rows(pair / variant), rows(tmp_path)
    assert len(together) == len(by_itself) > 12
    for one, other in zip(together, by_itself, strict=True):
        assert one.keys() == other.keys() and one.pop("kind") == other.pop("kind")
        for name in one:  # rank 0 writes the losses of all ranks
            assert one[name] == pytest.approx(other[name], rel=1e-3), name


def test_gradients_of_one_mixed_network_exchanged_are_those_of_all_bases(pair):
    """Ranks that share an expert need no more than its gradient: the bases' follow from it and the coefficients."""
    start = state_of(tiny_trainer("remix_dit", *AVERAGED))
    assert distance(of_rank(pair, "remix_dit", 0), of_rank(pair, "bases exchanged", 1), start) < 2e-3


def test_ranks_resume_together(pair, tmp_path):
    states = [of_rank(pair, "cut", rank) for rank in range(2)]
    assert not differing(*states)
    assert not differing(states[0], of_rank(pair, "multi_expert", 0))
    assert rows(pair / "cut") == rows(pair / "multi_expert")


def test_ranks_stop_together_by_the_clock_of_the_first(pair):
    """Its seconds decide not only when to stop but also the learning rate and the annealing of every step."""
    states = [of_rank(pair, "timed", rank) for rank in range(2)]
    assert not differing(*states) and states[0]["steps"] == 0.5 / (2 / 64)


def test_every_rank_names_what_went_wrong_on_one(pair):
    messages = [(pair / f"diverged.{rank}").read_text() for rank in range(2)]
    assert messages == ["loss term 'mse' is nan at step 0, for timesteps 17"] * 2


def test_a_process_on_its_own_needs_no_other():
    with world_from_environment(torch.device("cpu")) as world:
        assert world == World(0, 1) and world.is_main and not torch.distributed.is_initialized()


def test_the_command_runs_in_two_processes_and_again_when_it_is_done(tmp_path):
    settings = [
        "method=remix_dit",
        "options.bases=2",
        "options.experts=3",
        "model.depth=1",
        "model.width=16",
        "model.num_heads=2",
        "budget.amount=320",
        "heldout.points=1",
        "evaluation.num_samples=20",
        "evaluation.steps=2",
        "evaluation.block_size=5",
        "evaluation.kid_subset_size=10",
    ]

    def run(*more: str) -> list[int | None]:
        places = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        ranks = [
            start_command("train", "--runs", str(tmp_path), *settings, *more, environment={**places, "RANK": str(rank)})
            for rank in range(2)
        ]
        return exit_codes_of(ranks)

    assert run() == [0, 0]
    (folder,) = tmp_path.iterdir()
    assert (folder / "done").exists()
    assert read_json(folder / "provenance.json", dict)["world_size"] == 2
    scored = (folder / "eval.json").read_bytes()
    assert run() == [0, 0]
    assert (folder / "eval.json").read_bytes() == scored
    assert run("evaluation.steps=3") == [0, 0]  # trained already, but not scored so
    assert len(read_json(folder / "eval.json", list)) == 2
    assert run("train.lr=1e30") == [1, 1]
    (other,) = (path for path in tmp_path.iterdir() if path != folder)
    assert read_json(other / "failure.json", dict)["state"] == "diverged"


# An expert per job


@pytest.mark.parametrize("num_steps", [12, 13])
def test_an_expert_trained_in_a_job_of_its_own_gets_the_same_bytes(num_steps, tmp_path):
    settings = (*AVERAGED, f"budget.amount={8 * num_steps}")
    together = tiny_trainer("multi_expert", *settings)
    start = state_of(together)
    together.fit()
    expected = state_of(together)
    for expert in range(3):
        folder = tmp_path / str(expert)
        crash_after(tiny_trainer("multi_expert", *settings, folder=folder, experts=frozenset({expert})), 2)
        job = tiny_trainer("multi_expert", *settings, folder=folder, experts=frozenset({expert}))
        job.fit()
        state = state_of(job)
        own = [name for name in expected if f".networks.{expert}." in name]
        others = [name for name in start if ".networks." in name and f".networks.{expert}." not in name]
        assert any(name.startswith("optimizer.") for name in own) and any(name.startswith("ema.") for name in own)
        assert not differing({name: expected[name] for name in own}, {name: state[name] for name in own})
        assert not differing({name: start[name] for name in others}, {name: state[name] for name in others})
        assert [n for n, count in enumerate(job.updates) if count] == [expert]
        assert job.updates[expert] == together.updates[expert] and job.images_seen == 8 * job.updates[expert]
        assert {row["interval"] for row in rows(folder, "train")} == {expert}
    assert not differing(expected, joined(settings))


def joined(settings: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Two experts in one job, the third in another."""
    jobs: list[Trainer] = []
    for experts in ({0, 2}, {1}):
        jobs.append(tiny_trainer("multi_expert", *settings, experts=frozenset(experts)))
        jobs[-1].fit()
    first, second = map(state_of, jobs)
    return {n: t for n, t in first.items() if ".networks.1." not in n} | {n: t for n, t in second.items() if ".networks.1." in n}
