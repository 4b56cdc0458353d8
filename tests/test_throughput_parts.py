"""Are parts timed beside plain code that computes the same?"""

import pandas as pd
import pytest
import torch
from PIL import Image
from timing import SIZE, TINY
from torch import nn

from bench import cli
from bench.adamw import AdamW
from bench.throughput import loaders, parts
from bench.throughput.contest import Setup
from bench.throughput.loaders import LOADERS, batch_of_files, image_sets, latent_loader
from bench.throughput.parts import measure_parts
from methods import naive_parts
from methods.naive_parts import PARTS, mixing_and_adamw, mixing_forward, mixing_forward_and_backward, optimiser_and_average


def test_parts_are_timed_beside_plain_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loaders, "NUM_FILES", 8)
    monkeypatch.setattr(loaders, "NUM_PHOTOS", 8)
    told: list[bool] = []
    monkeypatch.setattr(parts, "keep_freed_memory", told.append)
    out = tmp_path / "parts.csv"
    assert cli.main(["throughput", "--parts", *TINY, "--out", str(out)]) == 0
    assert told == [True]  # as training has it
    frame = pd.read_csv(out)
    assert [tuple(row) for row in frame[["what", "code"]].to_numpy()] == [
        (what, code) for what in (*PARTS, *LOADERS) for code in ("ours", "naive")
    ]
    assert (frame[frame["code"] == "ours"]["speed_over_naive"] > 0).all() and (frame["rounds"] == 2).all()
    assert (tmp_path / "parts.png").is_file() and "mixture of 8 experts" in capsys.readouterr().out


def test_a_part_that_runs_out_of_memory_says_so():
    def too_large(size, batch_size, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    rows = next(measure_parts({"large": too_large}, [SIZE], [4], ["fp32"], Setup(), 1, 0.0))
    assert [(row["what"], row["note"]) for row in rows] == [("large", "out of memory: CUDA out of memory")] * 2


@pytest.mark.parametrize("small", [False, True])
def test_both_mixtures_have_the_same_gradients(small):
    torch.manual_seed(0)
    ours, plain = PARTS["mixture of 32 small experts" if small else "mixture of 8 experts"](SIZE, 3, torch.device("cpu"))
    for one, other in zip(ours(), plain(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert len(ours()) == 4  # tokens, router, and the experts' two stacks


def test_small_experts_do_the_same_arithmetic():
    sizes = []
    for name in ("mixture of 8 experts", "mixture of 32 small experts"):
        tokens, *stacks, router = PARTS[name](SIZE, 1, torch.device("cpu"))[0]()
        sizes.append((tokens.shape, sum(stack.numel() for stack in stacks)))
        assert {len(stack) for stack in stacks} == {len(router)}
    assert sizes[0] == sizes[1]  # 4 times as many experts, each a quarter


def test_both_mixers_give_the_same_weights():
    ours, plain = mixing_forward(SIZE, 4, torch.device("cpu"))
    mixed = [tensor for pair in ours() for tensor in pair]
    assert len(mixed) == 2 * 4 * 2  # blocks, linears, weight and bias
    for one, other in zip(mixed, plain(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("part", [mixing_forward_and_backward, mixing_and_adamw])
def test_both_mixers_give_the_same_gradients(part, monkeypatch):
    """AdamW takes the same, as its moments tell, of which the first is a tenth of the first gradient."""
    made = []

    class Kept(AdamW):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(naive_parts, "AdamW", Kept)
    runs, moments = part(SIZE, 4, torch.device("cpu")), []
    (optimizer,) = made
    (group,) = optimizer.param_groups
    group["lr"] = 0.0  # both from the same weights
    for run in runs:
        optimizer.state.clear()
        run()
        assert bool(optimizer.state) == (part is mixing_and_adamw)
        if part is mixing_forward_and_backward:
            optimizer.step()
        moments.append([optimizer.state[parameter]["exp_avg"] for parameter in group["params"]])
        assert all(moment.any() for moment in moments[-1])
    for one, other in zip(*moments, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_both_optimisers_update_alike(monkeypatch):
    twins = []
    original = torch.optim.Optimizer.add_param_group
    monkeypatch.setattr(
        torch.optim.Optimizer, "add_param_group", lambda self, group: (original(self, group), twins.append(group["params"]))[0]
    )
    ours, plain = optimiser_and_average(SIZE, 4, torch.device("cpu"))
    for one, other in zip(*twins, strict=True):
        other.grad = one.grad.clone()
    before = twins[0][0].detach().clone()
    ours(), plain()
    assert not torch.equal(twins[0][0], before)
    for one, other in zip(*twins, strict=True):
        assert isinstance(one, nn.Parameter)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_both_loaders_read_the_same_images(tmp_path, monkeypatch):
    monkeypatch.setattr(loaders, "NUM_FILES", 16)
    drawn = []
    randint = torch.randint
    monkeypatch.setattr(torch, "randint", lambda *size, **options: drawn.append(randint(*size, **options)) or drawn[-1])
    ours, plain = latent_loader(tmp_path)("any", 6, torch.device("cpu"))
    gathered, one_by_one = ours(), plain()
    paths = sorted(tmp_path.glob("0*.npy"))
    assert gathered.shape == one_by_one.shape == (6, 4, 32, 32) and len(paths) == 16
    assert torch.equal(gathered, batch_of_files(paths, drawn[0]))
    assert torch.equal(one_by_one, batch_of_files(paths, drawn[1]))


def test_packed_images_are_those_of_the_photos(tmp_path):
    packed, files = image_sets(tmp_path, 5)
    indices = torch.tensor([4, 0, 4])
    assert packed.batch(indices)[0].shape == (3, 3, 256, 256)
    assert torch.equal(packed.batch(indices)[0], files.batch(indices)[0])
    with Image.open(files.paths[0]) as photo:
        assert photo.size == (500, 375)
    again, _ = image_sets(tmp_path, 5)  # for the next batch size
    assert torch.equal(packed.batch(indices)[0], again.batch(indices)[0])
