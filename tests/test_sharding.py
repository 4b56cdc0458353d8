"""Does a run whose ranks hold parts train what one process trains, resume to the bit, and end as any other run does?"""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from command import TINY
from helpers import NUM_TIMESTEPS, VARIANTS, randomise
from safetensors.torch import load_file, save_file
from test_distributed import distance
from test_ranks import on_ranks
from torch import Tensor
from training import RUNS, UNMEASURED, crash_after, differing, rows, state_of, tiny_config, tiny_data, tiny_trainer

from bench import checkpoint, job, run_folder, sharded_checkpoint, sharded_run, trained
from bench.config import SystemConfig
from bench.distributed import World, whole
from bench.files import read_json
from bench.method import Method
from bench.sharded_start import draw_parts
from bench.sharding import part_of, shard
from bench.trainer import Trainer
from methods import METHODS
from methods.initial import build

pytestmark = pytest.mark.xdist_group("sharding")  # its ranks are started once, not by every worker

CPU = torch.device("cpu")
AVERAGED = ("train.lr_schedule=cosine", "train.lr_warmup_images=40", "train.ema_half_life_images=30")
WAYS = {method: (method, AVERAGED) for method in RUNS} | {
    "micro-batches": ("dtr", (*AVERAGED, "train.micro_batches=2", "system.checkpoint_every=0")),
    "recomputed": ("switch_dit", (*AVERAGED, "system.recompute=true", "system.checkpoint_every=0")),
    "uncertainty": ("dense", ("diffusion.loss_weight=uncertainty", "system.checkpoint_every=0")),
}
DIGITS = ("system.shard=full", "train.ema_half_life_images=30", "system.checkpoint_every=1", "seed=3")


def sharded_trainer(method: str, *settings: str, folder: Path, world: World) -> Trainer:
    """As `tiny_trainer`."""
    config, data = tiny_config(method, "system.shard=full", *settings), tiny_data()
    folder.mkdir(exist_ok=True)
    return Trainer(shard(randomise(build_tiny(method, settings)), CPU), config, data, folder, world, UNMEASURED)


def build_tiny(method: str, settings: tuple[str, ...] = ()) -> Method:
    return job.build_method(tiny_config(method, *settings), tiny_data())


def gathered_state(trainer: Trainer) -> dict[str, Tensor]:
    return {name: whole(tensor).clone() for name, tensor in state_of(trainer).items()}


def work(world: World, out: Path) -> None:
    """What one of two ranks does: every way, every method crashed and resumed, too; then a run from its configuration on."""
    for name, (method, settings) in WAYS.items():
        folder = out / name
        undisturbed = sharded_trainer(method, *settings, folder=folder, world=world)
        undisturbed.fit()
        state = gathered_state(undisturbed)
        sharded_checkpoint.gather(undisturbed)
        parts = sum(p.to_local().numel() for p in undisturbed.method.parameters())  # type: ignore[operator]
        save_file(state | {"parts": torch.tensor(parts)}, out / f"{name}.{world.rank}.safetensors")
        if name not in RUNS:
            continue
        folder = out / f"{name} cut"
        crash_after(sharded_trainer(method, *settings, folder=folder, world=world), 7)
        if name == "dense":
            crash_after(sharded_trainer(method, *settings, folder=folder, world=world), 5)  # from step 4 again
            if world.is_main:
                damage(sharded_checkpoint.list_checkpoints(folder)[-1])
            world.barrier()
            with pytest.warns(UserWarning, match=r"step-000000008.sharded is damaged") if world.is_main else pytest.warns():
                resumed = sharded_trainer(method, *settings, folder=folder, world=world)
                resumed.resume()
            assert resumed.steps_done == 4
        resumed = sharded_trainer(method, *settings, folder=folder, world=world)
        resumed.fit()
        assert not differing(state, gathered_state(resumed))
    config = job.make_config({"method": "remix_dit"}, [*TINY, *DIGITS])
    job.run(config, out / "run", world)


def damage(checkpoint_folder: Path) -> None:
    with open(sorted(checkpoint_folder.glob("*.safetensors"))[-1], "rb+") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\x07")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sharded")
    on_ranks(2, work, out)
    return out


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_with_half_the_weights_train_what_one_process_trains(way: str, pair: Path, tmp_path: Path) -> None:
    """Weights, averages, moments and every line of the journal; and each rank really holds about half."""
    states = [load_file(pair / f"{way}.{rank}.safetensors") for rank in range(2)]
    held = [int(state.pop("parts")) for state in states]
    assert not differing(*states)
    method, settings = WAYS[way]
    alone = tiny_trainer(method, *settings, folder=tmp_path)
    total = sum(p.numel() for p in alone.method.parameters())
    assert sum(held) == total and max(held) < 0.51 * total
    start = state_of(alone)
    alone.fit()
    assert states[0].keys() == state_of(alone).keys()
    assert distance(state_of(alone), states[0], start) < 2e-3
    for name, tensor in state_of(alone).items():
        if name.startswith("ema."):
            assert (tensor - states[0][name]).abs().max() < 2e-3, name
        elif name.endswith(".step"):
            assert torch.equal(tensor, states[0][name])
    together, by_itself = rows(pair / way), rows(tmp_path)
    assert len(together) == len(by_itself) > 12
    for one, other in zip(together, by_itself, strict=True):
        assert one.keys() == other.keys() and one.pop("kind") == other.pop("kind")
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=1e-3), name
    if way in RUNS:
        assert rows(pair / way) == rows(pair / f"{way} cut")


@pytest.mark.parametrize("way", WAYS)
def test_gathered_it_is_an_ordinary_checkpoint(way: str, pair: Path, tmp_path: Path) -> None:
    state = load_file(pair / f"{way}.0.safetensors")
    method, settings = WAYS[way]
    shutil.copytree(pair / way, tmp_path / "run")
    taken = tiny_trainer(method, *settings, folder=tmp_path / "run")
    taken.restore()
    without_optimizer = {name: tensor for name, tensor in state.items() if not name.startswith(("optimizer.", "parts"))}
    assert not differing(without_optimizer, state_of(taken))
    assert taken.steps_done == 12 and sum(taken.updates) == 12
    (path,) = checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")
    found = checkpoint.load(path)  # its checksum is that of its contents
    again = checkpoint.save(tmp_path / "again", 12, found.tensors, found.counters)
    assert checkpoint.load(again).counters == found.counters


def test_the_last_two_are_kept_and_nothing_half_written(pair: Path) -> None:
    names = sorted(path.name for path in (pair / "dense" / "checkpoints").iterdir())
    assert names == ["step-000000008.sharded", "step-000000012.safetensors", "step-000000012.sharded"]
    inside = sorted(path.suffix for path in (pair / "dense" / "checkpoints" / names[0]).iterdir())
    assert inside == [".json", ".safetensors", ".safetensors"]  # nothing that could be executed


# A run, from its configuration to its end


def test_a_run_ends_as_any_other_and_is_scored_again_by_one_process(pair: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(pair / "run", folder)
    assert (folder / "done").exists()
    (record,) = read_json(folder / "eval.json", list)
    again = trained.evaluate_again(folder, [])
    assert again["metrics"] == record["metrics"] and again["heldout_loss"] == record["heldout_loss"]
    alone = job.make_config({"method": "remix_dit"}, [*TINY, *DIGITS, "system.shard=none"])
    assert alone.run_id == job.read_config(folder).run_id
    job.run(alone, tmp_path / "alone")
    (expected,) = read_json(tmp_path / "alone" / "eval.json", list)
    assert record["heldout_loss"] == pytest.approx(expected["heldout_loss"], rel=1e-4)
    summaries = [read_json(each / "summary.json", dict) for each in (folder, tmp_path / "alone")]
    for key in ("stored_parameters", "active_parameters", "forward_macs_per_image", "images_seen", "updates_per_parameter_set"):
        assert summaries[0][key] == summaries[1][key], key
    _, _, method = job.load_trained(folder)
    assert all(type(p) is torch.nn.Parameter for p in method.parameters())
    run_folder.clear(folder)
    assert not folder.exists()


# The start


@pytest.mark.parametrize("variant", VARIANTS)
def test_parts_are_drawn_as_the_whole_is(variant: str) -> None:
    """To the bit, for any number of ranks; what is stacked over few experts is cut inside them."""
    make = partial(built, variant)
    expected = make()
    for size in (1, 2, 3, 8):
        for rank in range(size):
            method, parts = draw_parts(make, rank, size)
            assert parts.keys() == dict(expected.named_parameters()).keys()
            for name, parameter in expected.named_parameters():
                assert torch.equal(part_of(parameter.shape, rank, size).of(parameter.detach()), parts[name]), (name, size, rank)
            buffers = dict(method.named_buffers())
            assert all(torch.equal(buffer, buffers[name]) for name, buffer in expected.named_buffers())


def built(variant: str) -> Method:
    name, options = VARIANTS[variant]
    model = {"size": "", "depth": 2, "width": 16, "num_heads": 2, "patch_size": 2, "mlp_ratio": 2.0, "learn_sigma": True}
    return build(METHODS[name], model, options, seed=3, num_timesteps=NUM_TIMESTEPS, input_size=4, channels=2, num_classes=3)


def test_parts_are_whole_and_share_equally_where_they_can() -> None:
    for shape in ((16, 3, 2), (4, 24, 6), (5, 7), (1,)):
        whole_tensor = torch.arange(torch.Size(shape).numel()).view(shape)
        for size in (1, 2, 4, 8):
            parts = [part_of(torch.Size(shape), rank, size) for rank in range(size)]
            assert torch.equal(torch.cat([part.of(whole_tensor) for part in parts], dim=parts[0].dim), whole_tensor)
            if any(length % size == 0 for length in shape):
                assert len({part.stop - part.start for part in parts}) == 1


def test_a_start_that_cannot_be_drawn_in_parts_is_refused() -> None:
    def make(fill: Callable[[Tensor], Any]) -> Method:
        method = Method()
        method.weight = torch.nn.Parameter(torch.empty(4, 4))
        with torch.no_grad():
            fill(method.weight)
        return method

    with pytest.raises(ValueError, match=r"^the initial weights [^\n]*mul[^\n]*: set system.shard=none$"):
        draw_parts(lambda: make(lambda w: w.normal_().mul_(2)), 0, 2)
    with pytest.raises(ValueError, match="cannot do part by part"):
        draw_parts(lambda: make(lambda w: w.t()[1:].normal_()), 0, 2)


# Refusals


def test_what_cannot_be_sharded_is_refused(tmp_path: Path) -> None:
    alone, two = World(), World(1, 2)

    def check(world: World, *settings: str) -> None:
        sharded_checkpoint.check(job.make_config({}, list(settings)), tmp_path, world)

    check(alone)
    check(two, "system.shard=full")
    with pytest.raises(ValueError, match=r"only one rank to hold the parts: start more [^\n]*$"):
        check(alone, "system.shard=full")
    with pytest.raises(ValueError, match=r"curve_every"):
        check(two, "system.shard=full", "evaluation.curve_every=1")
    with pytest.raises(ValueError, match=r"init_from"):
        check(two, "system.shard=full", "train.init_from=weights.safetensors")
    with pytest.raises(ValueError, match=r"separate_jobs"):
        SystemConfig(shard="full", experts="separate_jobs")
    (tmp_path / "checkpoints" / "step-000000004.sharded").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"was begun with system.shard=full: go on so, or delete its folder"):
        check(two)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-000000004.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"was begun with system.shard=none"):
        check(two, "system.shard=full")


def test_what_is_compiled_as_one_graph_gathers_nothing_inside() -> None:
    for method in RUNS:
        config = job.make_config({"method": method, "system": {"shard": "full", "compile": "blocks"}})
        if method == "switch_dit":
            with pytest.raises(
                ValueError, match=r"^system.shard is full, and the blocks of SwitchDiT [^\n]*: set system.compile=none$"
            ):
                sharded_run.check_compiled(config, build_tiny(method))
        else:
            sharded_run.check_compiled(config, build_tiny(method))
    config = job.make_config({"system": {"shard": "full", "compile": "cuda_graphs"}})
    with pytest.raises(ValueError, match=r"cuda_graphs replays fixed memory"):
        sharded_run.check_compiled(config, build_tiny("dense"))


def test_it_is_no_other_run() -> None:
    plain, sharded = (job.make_config({}, settings) for settings in ([], ["system.shard=full", "system.recompute=true"]))
    assert plain.run_id == sharded.run_id and json.dumps(plain.scientific) == json.dumps(sharded.scientific)
