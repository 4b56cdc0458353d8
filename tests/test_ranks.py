"""Are samples, held-out losses and scores the same bits on 1, 2 and 4 ranks, and does none wait for one that failed?"""

import dataclasses
import faulthandler
import os
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomise
from torch import Tensor
from training import PROCESSES, RUNS, exit_codes_of, free_port, tiny_config, tiny_data, tiny_trainer

from bench import evaluate, fidelity
from bench.config import DataConfig, EvaluationConfig
from bench.data import DataSource, load_data, to_uint8
from bench.distributed import World, world_from_environment
from bench.evaluate import METRICS, EvalProtocol, protocol_of, score
from bench.files import read_json, write_json_atomically
from bench.heldout import heldout_losses
from bench.job import build_method
from bench.sample import make_sampler

pytestmark = pytest.mark.xdist_group("ranks")  # its ranks are started once, not by every worker

CPU = torch.device("cpu")
SIZES = (1, 2, 4)
# 130 samples and 1297 training images in batches of 50: a short batch, and ranks without one in the last round
SCORING = EvaluationConfig(num_samples=130, kid_subset_size=60)
TINY = ("heldout.images_per_bin=40", "evaluation.num_samples=11", "evaluation.block_size=2", "evaluation.steps=ddim5")


def on_ranks(size: int, work: Callable[[World, Path], None], out: Path) -> None:
    """Do `work` in that many processes; none may fail or hang."""
    port = free_port()
    ranks = [PROCESSES.Process(target=_be_rank, args=(rank, size, port, work, out)) for rank in range(size)]
    for process in ranks:
        process.start()
    codes = exit_codes_of(ranks)
    assert codes == [0] * size, "\n".join(path.read_text()[:4000] for path in sorted(out.glob("rank*.failure")))


def _be_rank(rank: int, size: int, port: int, work: Callable[[World, Path], None], out: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    told = open(out / f"rank{rank}.failure", "w", buffering=1)  # noqa: SIM115 - to the end: a library may abort it even then
    faulthandler.enable(told)
    try:
        with world_from_environment(CPU) as world:
            work(world, out)
    except BaseException:
        traceback.print_exc(file=told)
        raise


@cache
def digits() -> tuple[DataSource, EvalProtocol]:
    data = load_data(DataConfig())
    return data, protocol_of(SCORING, data)


def noisy_samples() -> tuple[Tensor, Tensor]:
    """Real images, some of them under noise, so that no metric is at an end of its range."""
    x, labels = digits()[0].heldout.batch(torch.arange(SCORING.num_samples))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return to_uint8(x + 0.4 * noise), labels


def do_everything(world: World, out: Path) -> None:
    """All that is computed for a trained run, twice: the second scores use what was kept of the first."""
    data, protocol = digits()
    plain, looked_at = fidelity._features_of_batch, []
    fidelity._features_of_batch = lambda images, extractor: looked_at.append(len(images)) or plain(images, extractor)
    found: dict[str, Any] = {"scores": [score(*noisy_samples(), protocol, data, world=world) for _ in range(2)]}
    found["batches"] = len(looked_at)
    extractor = fidelity.build_extractor("digits", protocol.extractor_sha256)
    found["rows"] = [len(features) for features in fidelity.extract_features(noisy_samples()[0], extractor, 50, world).values()]
    for name in RUNS:
        config = tiny_config(name, *TINY)
        sampler = make_sampler(config.diffusion, config.evaluation, config.model, tiny_data())
        found[f"samples of {name}"] = sampler.draw(randomise(build_method(config, tiny_data())), CPU, world).images.tolist()
        trained = tiny_trainer(name, *TINY)
        found[f"losses of {name}"] = heldout_losses(trained.method, trained.objective, trained.heldout, world, CPU)
    write_json_atomically(out / f"{world.size}.{world.rank}.json", found)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], dict[str, Any]]:
    """(Number of ranks, rank) -> what it got."""
    out = tmp_path_factory.mktemp("ranks")
    for size in SIZES:
        on_ranks(size, do_everything, out)
    return {(size, rank): read_json(out / f"{size}.{rank}.json", dict) for size in SIZES for rank in range(size)}


@pytest.mark.parametrize("kind", ["scores", *(f"{kind} of {name}" for kind in ("samples", "losses") for name in RUNS)])
def test_every_rank_of_any_number_gets_the_same_bits(kind: str, found: dict[tuple[int, int], dict[str, Any]]) -> None:
    alone = found[1, 0][kind]
    assert alone
    for place, other in found.items():
        assert other[kind] == alone, place


def test_what_is_compared_is_all_metrics_at_values_that_could_differ(found: dict[tuple[int, int], dict[str, Any]]) -> None:
    first, second = found[1, 0]["scores"]
    assert first == second
    assert first.keys() == {*METRICS, "class_accuracy", "n"} - {"sfid"} and first["n"] == 130  # digits have no spatial features
    for name in ("precision", "recall", "class_accuracy"):
        assert 0.05 < first[name] < 0.98, name
    for name in ("fid_train", "fid_heldout", "kid", "nearest_neighbour"):
        assert first[name] > 1e-3, name


def test_ranks_share_the_work_and_the_first_keeps_the_features(found: dict[tuple[int, int], dict[str, Any]]) -> None:
    """In rounds: 26 batches of training images, 10 held-out ones and, twice, 3 of samples."""
    rounds = {1: 26 + 10 + 2 * 3, 2: 13 + 5 + 2 * 2, 4: 7 + 3 + 2}
    for (size, rank), of_rank in found.items():
        assert of_rank["batches"] == rounds[size]
        assert of_rank["rows"] == ([130, 130] if rank == 0 else [])


# Failures


class Unreadable:
    """A set of images on a disk that this rank does not reach."""

    def __init__(self, images: Any) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labels(self) -> Tensor:
        return self.images.labels

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        raise OSError("the disk is gone")


def fail_in_turn(world: World, out: Path) -> None:
    """What can fail, fails on the last rank, or on the first where it alone works; afterwards all can go on."""
    data, protocol = digits()
    last = world.rank == world.size - 1
    messages = []

    def attempt(work: Callable[[], Any]) -> None:
        try:
            work()
        except (ValueError, OSError, ZeroDivisionError) as error:
            messages.append(f"{type(error).__name__}: {error}")

    for part in ("heldout", "train"):
        gone = dataclasses.replace(data, **{part: Unreadable(getattr(data, part)), "fingerprint": lambda: protocol.data_sha256})
        attempt(lambda there=gone if last else data: score(*noisy_samples(), protocol, there, world=world))
    samples, labels = noisy_samples()
    attempt(lambda: score(samples.float() if last else samples, labels, protocol, data, world=world))
    compare = evaluate._compare
    evaluate._compare = lambda *_: 1 / 0  # type: ignore[assignment]
    attempt(lambda: score(samples, labels, protocol, data, world=world))
    evaluate._compare = compare
    config = tiny_config("dense", *TINY)
    sampler = make_sampler(config.diffusion, config.evaluation, config.model, tiny_data())
    method = randomise(build_method(config, tiny_data()))
    if last:
        method.network.final.linear.bias.data[0] = torch.nan
    attempt(lambda: sampler.draw(method, CPU, world))
    scores = score(samples, labels, protocol, data, world=world)
    write_json_atomically(out / f"failed.{world.rank}.json", {"messages": messages, "scores": scores})


def test_what_fails_on_one_rank_ends_the_call_on_all_and_they_can_go_on(
    found: dict[tuple[int, int], dict[str, Any]], tmp_path: Path
) -> None:
    on_ranks(2, fail_in_turn, tmp_path)
    first, last = (read_json(tmp_path / f"failed.{rank}.json", dict) for rank in range(2))
    for number, own in enumerate(last["messages"]):
        other = first["messages"][number]
        if number == 3:  # rank 0 alone compares
            own, other = other, own
        assert f"stops because rank {int(number != 3)} failed: " in other, (number, other)
        assert "stops because" not in own
    assert [message.split(":")[0] for message in last["messages"]] == ["OSError", "OSError", *["ValueError"] * 3]
    assert first["messages"][3] == "ZeroDivisionError: division by zero"
    assert first["scores"] == last["scores"] == found[1, 0]["scores"][0]
