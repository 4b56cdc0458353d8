"""Does `tsbench plan` tell, without allocating it, what a network is and what it needs?"""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import TINY, assert_refused, contents, train, tsbench
from helpers import TINY as SHAPE
from helpers import VARIANTS, batch, tiny
from test_memory import IMAGE
from torch import Tensor

from bench.job import build_method, load_data, make_config
from bench.memory import training_memory
from bench.plan import AGAIN, device_hours, plan_of
from bench.planning import PlannedRun
from bench.recompute import recompute_blocks
from bench.sharding import part_of
from methods import METHODS
from methods.backbone import SIZES

PUBLISHED = Path(__file__).parent.parent / "results" / "published" / "dit_moe.csv"
LATENTS = ("data.name=latents", "data.image_size=32")


LARGEST = (
    *("method=dit_moe", "model.size=G/2", "options.experts=16", *LATENTS, "train.batch_size=64"),
    *("system.recompute=true", "system.shard=full", "train.ema_half_life_images=1e6"),
)
IN_A_PROCESS = r"""
import json, re, sys
from pathlib import Path
from bench.plan import plan_of
(planned,) = plan_of(None, sys.argv[1:], 64)
told = {"stored": planned.stored_parameters, "active": planned.active_parameters, "missing": planned.missing}
told |= {"weights": planned.memory.weights, "total": planned.memory.total}
most = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())  # ru_maxrss is that of the parent if it had more
print(json.dumps(told | {"resident": int(most[1]) * 1024}))
"""


def test_the_largest_published_network_has_its_published_size() -> None:
    """16.5B parameters, 3.1B of them active, on 64 devices, in less than 2 GB on this one."""
    done = subprocess.run([sys.executable, "-c", IN_A_PROCESS, *LARGEST], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    rows = list(csv.DictReader(PUBLISHED.read_text().splitlines()))
    stated = {row["metric"]: row["value"] for row in rows if row["model"] == "G/2-16E2A" and "Params" in row["metric"]}
    assert told["stored"] == 16_503_356_704
    assert abs(told["stored"] / 1e6 - float(stated["TotalParams_M"])) < 100  # printed in tenths of billions
    assert abs(told["active"] / 1e6 - float(stated["ActParams_M"])) < 100
    assert told["missing"] == ["data.path, which is not given"]
    assert told["weights"] / 4 == pytest.approx(told["stored"] / 64, rel=0.02)
    assert told["total"] < 80e9 and told["resident"] < 2e9


def test_sizes_go_by_name() -> None:
    for letter in ("S", "B"):  # the others are among the published costs
        (planned,) = plan_of(f"model.size={letter}/8", list(LATENTS), 1)
        depth, width, _ = SIZES[letter]
        assert planned.stored_parameters == pytest.approx(
            18 * depth * width**2, rel=0.12
        )  # 12 D^2 in the linears, 6 D^2 in adaLN
        assert planned.stored_parameters == planned.active_parameters


@pytest.mark.parametrize("variant", VARIANTS)
def test_parts_are_those_that_ranks_hold(variant: str) -> None:
    method = tiny(variant)
    for num_parts in (2, 3):
        memory = training_memory(method, IMAGE, 5, num_parts, averaged=False)
        own = sum(part_of(p.shape, 0, num_parts).of(p).numel() for p in method.parameters())
        assert (memory.gradients, memory.moments, memory.averages) == (4 * own, 8 * own, 0)
        assert memory.activations == training_memory(method, IMAGE, 5).activations


def test_what_is_gathered_is_one_network_around_its_blocks() -> None:
    for variant in ("dense", "multi_expert", "switch_dit"):
        method = tiny(variant)
        network = method.networks[0] if variant == "multi_expert" else method.network
        block = size(network.blocks[0])
        around = size(network) - block * len(network.blocks)
        gate = size(network.blocks[0].gate) if variant == "switch_dit" else 0  # gathered on its own, after the others
        assert training_memory(method, IMAGE, 5, 2).gathered == 4 * (2 * around + 3 * (block - gate))


def size(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputation_keeps_what_is_counted(variant: str) -> None:
    """Of real tensors: what is kept outside blocks; what is inside one comes on top."""
    method = tiny(variant)
    plain, less = (training_memory(method, IMAGE, 40, recompute=recompute) for recompute in (False, True))
    real = max(kept_by_a_real_pass(variant, index) for index in {0, len(method.intervals) - 1})
    inside = (plain.activations - real) / len(method.network.blocks) if hasattr(method, "network") else 0.0
    assert real < less.activations < plain.activations
    if inside:
        assert less.activations - real == pytest.approx(inside, rel=0.35)
    assert less.weights == plain.weights


def kept_by_a_real_pass(variant: str, index: int) -> int:
    method = tiny(variant)
    recompute_blocks(method)
    own = {p.untyped_storage().data_ptr() for p in (*method.parameters(), *method.buffers())}
    held: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    interval = method.intervals[index]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        prediction = method(*batch(interval, 40, SHAPE), interval, 0.0)
        torch.stack([prediction.output.square().mean(), *prediction.penalties.values()]).sum()
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def test_hours_hold_what_is_computed_again() -> None:
    (plain,), (again,) = (plan_of(None, [*TINY, f"system.recompute={value}"], 2) for value in ("false", "true"))
    assert again.train_flops == plain.train_flops
    assert device_hours(plain, 2.0) == pytest.approx(plain.train_flops / 2e12 / 3600)
    assert device_hours(again, 2.0) == pytest.approx(AGAIN * device_hours(plain, 2.0))


def test_attention_is_as_the_device_trains_it() -> None:
    """In bf16 a CPU keeps its weights (B, heads, N, N), a GPU does not, nor does fp32."""
    network = ("model.depth=2", "model.width=64", "model.num_heads=4", *LATENTS, "train.batch_size=8")
    weights = 4 * 2 * 8 * 4 * 256**2
    told = {}
    for precision in ("fp32", "bf16"):
        for device in ("cpu", "cuda"):
            (planned,) = plan_of(None, [*network, f"train.precision={precision}"], 1, device)
            told[precision, device] = planned.memory.activations
    assert told["fp32", "cpu"] == told["fp32", "cuda"] < told["bf16", "cuda"]
    assert told["bf16", "cpu"] - told["bf16", "cuda"] == pytest.approx(weights, rel=0.05)
    (plain,) = plan_of(None, [*network, "system.plain=attention"], 1, "cuda")
    assert plain.memory.activations - told["fp32", "cuda"] == pytest.approx(weights, rel=0.05)


def test_a_sharded_run_in_bf16_holds_copies_of_all_its_weights() -> None:
    """2 bytes a parameter on each device, however many there are; of one block at a time where blocks are computed again."""
    network = ("model.size=S/2", *LATENTS, "train.batch_size=8", "system.shard=full")
    for settings, least, most in (((), 1.8, 2.0), (("system.recompute=true",), 0.1, 0.3)):
        told = []
        for precision in ("fp32", "bf16"):
            (planned,) = plan_of(None, [*network, *settings, f"train.precision={precision}"], 8, "cuda")
            told.append(planned.memory.total)
        assert least < (told[1] - told[0]) / planned.stored_parameters < most


def test_the_plan_is_of_the_profiles_device(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []

    def look(what: str | None, settings: list[str], num_devices: int, device: str) -> list[PlannedRun]:
        devices.append(device)
        return plan_of(what, settings, num_devices, device)

    monkeypatch.setattr("bench.plan.plan_of", look)
    for profile in ("h100", "local"):
        assert tsbench("plan", *TINY, "--devices", "1", "--profile", profile).code == 0
    assert devices == ["cuda", "cpu"]
    (planned,) = plan_of(None, ["system.device=cpu"], 1, "cuda")
    assert planned.config.system.device == "cuda"


# The command


def test_it_takes_settings_a_file_a_run_or_a_suite_and_writes_nothing(tmp_path: Path) -> None:
    folder = train(tmp_path / "runs")
    (tmp_path / "one.yaml").write_text("method: dtr\nmodel: {depth: 2, width: 16, num_heads: 2}\n")
    (tmp_path / "several.yaml").write_text(
        "base: {model: {width: 16, num_heads: 2}}\nmethods: [{method: dense}, {method: remix_dit}]\n"
    )
    before = contents(tmp_path)
    expected = {
        (): ["dense"],
        ("method=switch_dit",): ["switch_dit"],
        (tmp_path / "one.yaml",): ["dtr"],
        (folder,): ["dense"],
        (tmp_path / "several.yaml",): ["dense", "remix_dit"],
        (tmp_path / "several.yaml", "model.depth=1", "--devices", "4", "--profile", "a100"): ["dense", "remix_dit"],
    }
    for arguments, labels in expected.items():
        outcome = tsbench("plan", *arguments)
        assert outcome.code == 0, outcome.err
        rows = outcome.out.splitlines()
        assert [row.split()[0] for row in rows[1 : 1 + len(labels)]] == labels and not rows[1 + len(labels)].startswith("remix")
        config = make_config({"method": labels[0]}) if arguments == ("method=switch_dit",) else None
        if config:
            stored = sum(p.numel() for p in build_method(config, load_data(config.data)).parameters())
            assert rows[1].split()[1] == f"{stored / 1e6:.3g}"
    assert "4 devices" in outcome.out and "profile a100" in outcome.out
    assert contents(tmp_path) == before


def test_what_is_not_possible_is_refused() -> None:
    assert_refused(tsbench("plan", "nowhere"), "there is no suite 'nowhere'")
    assert_refused(tsbench("plan", "--devices", "0"), "--devices is 0")
    assert_refused(tsbench("plan", "--devices", "5"), "train.batch_size 32 cannot be shared equally by 5 ranks")
    assert_refused(tsbench("plan", "--profile", "nowhere"), "there is no cluster profile")
    assert_refused(tsbench("plan", "model.size=Q/2"), "size 'Q/2' is not known")
    assert_refused(tsbench("plan", "data.name=latents"), "data.path is empty")
    assert len(METHODS) >= 6
