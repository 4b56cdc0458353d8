"""Is the memory that a contestant needs counted as it is used, and is what is free that of its control group too?"""

import gc
import math
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from timing import PLAIN
from torch import Tensor, UntypedStorage
from torch.nn import Parameter
from training import UNMEASURED

from bench.throughput import free
from bench.throughput.contest import Contestant, Setup
from bench.throughput.count import LIBRARIES, PASSING, count_of
from bench.throughput.entrant import Entrant
from bench.throughput.free import free_bytes, free_in_groups
from bench.throughput.memory import Memory
from methods.bases import Bases

WIDE = "2x64x4/2"  # 4 heads, 256 tokens
STACKED = 2 * 4 * (12 * 64**2 + 9 * 64)  # bytes of its blocks' four linears, once
ATTENTION_WEIGHTS = 2 * 8 * 4 * 256 * 256 * 4  # bytes of its blocks for 8 images: a third of dense's peak or more


# What is counted


@pytest.mark.parametrize("plain", [True, False], ids=["naive", "ours"])
@pytest.mark.parametrize("method", ["dense", "dit_moe", "remix_dit"])
def test_no_more_is_needed_than_was_counted(method: str, plain: bool) -> None:
    contestant, setup = Contestant(method, WIDE, 8, plain=plain), Setup()
    counted = count_of(contestant, setup).need.peak
    if math.isnan(Memory(torch.device("cpu")).peak_bytes()):
        pytest.skip("this system does not let a process reset its peak")
    peak = Entrant(contestant, setup, UNMEASURED, PLAIN).peak_memory_bytes
    assert peak > ATTENTION_WEIGHTS or not plain
    assert peak <= counted <= 2 * peak + LIBRARIES + 64e6  # nor is it a figure that nothing exceeds


@pytest.mark.parametrize("method", ["dense", "dtr", "dit_moe", "remix_dit"])
def test_ours_keeps_no_attention_weights(method: str) -> None:
    plain, ours = (count_of(Contestant(method, WIDE, 8, plain=plain), Setup()).need for plain in (True, False))
    assert plain.held - ours.held == (3 * STACKED if method == "remix_dit" else 0)  # gradients of 4 bases, where one is enough
    assert plain.peak - ours.peak == pytest.approx((1 + PASSING) * ATTENTION_WEIGHTS, rel=0.1)


def test_where_ours_does_without_the_fused_kernel_it_keeps_them() -> None:
    fused = count_of(Contestant("dense", WIDE, 8), Setup()).need
    plain = count_of(Contestant("dense", WIDE, 8, plain=True), Setup()).need
    assert count_of(Contestant("dense", WIDE, 8, "bf16"), Setup()).need == plain  # in pieces
    assert count_of(Contestant("dense", WIDE, 8), Setup(settings=("system.plain=attention",))).need == plain
    assert plain.peak > fused.peak


@pytest.mark.parametrize("method", ["dense", "remix_dit:bases=2", "remix_dit:bases=4"])
def test_who_rests_holds_what_was_counted(method: str) -> None:
    """Mixed weights are kept from step to step, and the sampler has its own: with two bases that is a fifth of all."""
    contestant = Contestant(method, "2x256x4/8", 4)
    held, before = count_of(contestant, Setup()).need.held, alive()  # which stay alive, so that no other gets their address
    entrant = Entrant(contestant, Setup(), UNMEASURED, PLAIN)
    images = entrant.trainer.data.train.batch(torch.arange(1024))[0].nbytes
    found = sum(storage.nbytes() for place, storage in alive().items() if place not in before) - images
    stacked = {p for module in entrant.trainer.method.modules() if isinstance(module, Bases) for p in module.parameters()}
    freed = sum(p[0].nbytes if p in stacked else p.nbytes for p in entrant.trainer.method.parameters())  # gradients
    assert 0.97 * held <= found + freed <= 1.03 * held


def alive() -> dict[int, UntypedStorage]:
    """Every storage that a tensor has, by its address; not of what compiling left behind, which has no memory."""
    gc.collect()
    found: dict[int, UntypedStorage] = {}
    for tensor in (each for each in gc.get_objects() if type(each) in (Tensor, Parameter) and not each.is_meta):
        with suppress(RuntimeError):  # of a tensor that stands for another
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
    return found


# What is measured, and what is free


def test_memory_is_what_is_there_at_the_peak() -> None:
    memory = Memory(torch.device("cpu"))
    if math.isnan(memory.peak_bytes()):
        pytest.skip("this system does not let a process reset its peak")
    held = torch.ones(64 << 20, dtype=torch.uint8)
    del held
    assert 60 << 20 < memory.peak_bytes() < 120 << 20
    assert Memory(torch.device("cpu")).peak_bytes() < 32 << 20  # the next starts over


def test_a_gpu_refuses_by_itself() -> None:
    assert free_bytes(torch.device("cuda")) == math.inf
    assert 0 < free_bytes(torch.device("cpu")) < math.inf


def make_group(folder: Path, names: free.Names, limit: str, used: int, reclaimable: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names.limit).write_text(f"{limit}\n")
    (folder / names.used).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 17\n{names.reclaimable} {reclaimable}\n")


def test_a_job_has_what_its_groups_leave_it(tmp_path: Path) -> None:
    """Slurm's: the limit is that of the job, around the group of the process; files that were read can go."""
    membership, job = tmp_path / "cgroup", tmp_path / "mount/slurm/job_7"
    membership.write_text("0::/slurm/job_7/step_0/task_0\n")
    make_group(job, free.V2, "4000", 1500, 700)
    make_group(job / "step_0/task_0", free.V2, "max", 900, 0)
    (tmp_path / "mount/slurm/other").mkdir()
    assert list(free_in_groups(membership, tmp_path / "mount")) == [4000 - 1500 + 700]
    make_group(job / "step_0", free.V2, "2000", 1000, 0)
    assert sorted(free_in_groups(membership, tmp_path / "mount")) == [1000, 3200]


def test_a_container_of_the_first_version_sees_its_own_limit(tmp_path: Path) -> None:
    """Its path is that outside, which is not there inside."""
    membership = tmp_path / "cgroup"
    membership.write_text("9:name=systemd:/\n4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n0::/\n")
    make_group(tmp_path / "mount/memory", free.V1, "3000", 1000, 200)
    assert list(free_in_groups(membership, tmp_path / "mount")) == [3000 - 1000 + 200]


def test_what_is_free_is_the_least(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, membership = tmp_path / "meminfo", tmp_path / "cgroup"
    monkeypatch.setattr(free, "MACHINE", machine)
    monkeypatch.setattr(free, "MEMBERSHIP", membership)
    monkeypatch.setattr(free, "MOUNT", tmp_path / "mount")
    cpu = torch.device("cpu")
    assert free_bytes(cpu) == math.inf  # a system that does not tell
    machine.write_text("MemTotal:  9000 kB\nMemAvailable:   5 kB\n")
    assert free_bytes(cpu) == 5 * 1024
    membership.write_text("0::/job\n")
    make_group(tmp_path / "mount/job", free.V2, "4000", 1000, 0)
    assert free_bytes(cpu) == 3000
    make_group(tmp_path / "mount/job", free.V2, "400000", 1000, 0)
    assert free_bytes(cpu) == 5 * 1024
