"""Does everything run where tensors are on a GPU: no devices mixed, and no waiting for it inside a step?

On `pretend_gpu`, as no GPU was there when this was written; `pytest -m gpu` has the few tests that need one.
"""

from functools import partial

import numpy as np
import pytest
import torch
from command import TINY, tsbench
from encoding import command
from helpers import assert_close
from pretence import waits_of
from pretend_gpu import pretend_gpu
from timing import PLAIN, SIZE
from torch import Tensor
from training import RUNS, UNMEASURED, state_of, tiny_config, tiny_data, tiny_trainer

from bench import job
from bench.distributed import World
from bench.run_folder import summary_of
from bench.shares import draw_shares, intervals_of
from bench.throughput import peak
from bench.throughput.contest import Contestant, Setup
from bench.throughput.entrant import Entrant
from bench.trainer import Trainer
from methods.bases import inner
from methods.naive import NAIVE
from methods.naive_parts import PARTS
from methods.switch_dit import Matching

ON_GPU = "system.device=cuda"
STEPS = 2  # the first fills tables and states
AWAITED = {  # what a step waits for, by method and precision; nothing where none is named
    ("switch_dit", "fp32"): {"an event": 1},  # the costs of the assignment, which were queued before the network
    ("switch_dit", "bf16"): {"an event": 1},
    ("dit_moe", "fp32"): {"tolist in grouped.py:groups": 12},  # no grouped kernel: 2 products of 2 blocks, forward and twice back
}


def step(trainer: Trainer, number: int) -> dict[str, Tensor]:
    """As `fit` takes it, on what it draws."""
    intervals = intervals_of(number, trainer.method, trainer.config)
    return trainer.step(*draw_shares(number, intervals, trainer.shares, trainer.config, trainer.data, trainer.spent))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", RUNS)
def test_no_training_step_waits_and_all_of_it_is_on_the_gpu(method, precision):
    with pretend_gpu() as own:
        trainer = tiny_trainer(method, ON_GPU, f"train.precision={precision}", "train.ema_half_life_images=30")
        for number in range(STEPS):
            step(trainer, number)
        waits = waits_of(own, lambda: [step(trainer, number) for number in range(STEPS, 2 * STEPS)])
        assert waits == {what: STEPS * count for what, count in AWAITED.get((method, precision), {}).items()}
        assert all(tensor.is_cuda for tensor in trainer.method.state_dict().values())
        states = [value for state in trainer.optimizer.state.values() for value in state.values()]
        assert states and all(value.is_cuda for value in (*states, *trainer.ema.averages.values()))
        assert all(loss.is_cuda for record in trainer.journal.pending for loss in record.losses.values())
        assert trainer.flush() is None


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("dense", ("diffusion.objective=flow",)),
        ("dtr", ("diffusion.loss_weight=uncertainty", "train.micro_batches=2", "options.routing=random")),
        ("multi_expert", ("diffusion.loss_weight=min_snr", "data.flip=true")),
        ("remix_dit", ("train.intervals_per_step=4", "options.coefficients=local")),
        ("remix_dit", ("options.mixer=one_hot", "train.micro_batches=2")),
        ("switch_dit", ("system.recompute=true", "diffusion.objective=flow", "train.micro_batches=2")),
        ("dit_moe", ("system.recompute=true", "options.expert=gelu_mlp", "options.shared_width=0", "train.precision=bf16")),
    ],
)
def test_no_other_way_of_training_waits(method, settings):
    with pretend_gpu() as own:
        trainer = tiny_trainer(method, ON_GPU, *settings)
        for number in range(STEPS):
            step(trainer, number)
        awaited = {"an event": 1} if method == "switch_dit" else {}
        assert waits_of(own, lambda: step(trainer, STEPS)) == awaited


def test_an_older_gpu_waits_for_group_sizes_alone():
    with pretend_gpu((8, 0)) as own:
        trainer = tiny_trainer("dit_moe", ON_GPU, "train.precision=bf16")
        for number in range(STEPS):
            step(trainer, number)
        assert waits_of(own, lambda: step(trainer, STEPS)) == {"tolist in grouped.py:groups": 12}


@pytest.mark.parametrize("method", RUNS)
def test_training_there_gives_the_weights_of_training_here(method):
    settings = "train.ema_half_life_images=30", "train.micro_batches=2", "system.plain=pieces"  # grouped, as a GPU has them
    here = tiny_trainer(method, *settings)
    for number in range(2 * STEPS):
        step(here, number)
    with pretend_gpu():
        there = tiny_trainer(method, ON_GPU, *settings)
        for number in range(2 * STEPS):
            step(there, number)
    one, other = state_of(here), state_of(there)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert_close(other[name], tensor, 1e-5)


SAMPLERS = {
    "ancestral": ("evaluation.guidance_scale=2",),
    "ddim": ("evaluation.sampler=ddim", "evaluation.eta=0.5", "evaluation.guidance_scale=2", "evaluation.guidance_stop=20"),
    "dpm_solver": ("evaluation.sampler=dpm_solver", "evaluation.guidance_scale=2"),
    "euler": ("evaluation.sampler=euler", "diffusion.objective=flow"),
}


@pytest.mark.parametrize(
    ("method", "precision", "sampler"),
    [
        *((method, "bf16", "ancestral") for method in RUNS),
        *(("dense", "fp32", sampler) for sampler in SAMPLERS),
        ("dit_moe", "fp32", "ancestral"),
    ],
)
def test_drawing_waits_as_often_for_eight_steps_as_for_four(method, precision, sampler):
    waits = {}
    with pretend_gpu() as own:
        for num_steps in (4, 8):
            settings = ON_GPU, *SAMPLERS[sampler], f"evaluation.steps={num_steps}", f"evaluation.precision={precision}"
            config, data = tiny_config(method, *settings, "evaluation.num_samples=4", "evaluation.block_size=2"), tiny_data()
            drawing = job.make_sampler(config.diffusion, config.evaluation, config.model, data)
            built = job.build_method(config, data).to("cuda")
            run = partial(drawing._draw_blocks, built, [0, 1], torch.device("cuda"))
            assert all(image.is_cuda and image.dtype == torch.uint8 for image in run())  # and tables are filled
            waits[num_steps] = waits_of(own, run)
    loops = waits[8].pop("tolist in grouped.py:groups", 0), waits[4].pop("tolist in grouped.py:groups", 0)
    assert loops == ((2 * 2 * 2 * 8, 2 * 2 * 2 * 4) if (method, precision) == ("dit_moe", "fp32") else (0, 0))
    assert waits[8] == waits[4] and sum(waits[4].values()) <= 2 + 2  # times and labels; each block's pixels are looked at


@pytest.mark.parametrize("method", ["switch_dit", "dit_moe"])
def test_a_whole_run_there_is_one_here(method, tmp_path):
    """Trained, saved, measured, sampled, scored."""
    options = [f"options.{key}={value}" for key, value in RUNS[method].items()]
    settings = [*TINY, f"method={method}", *options, "system.plain=pieces", "system.keep_samples=10"]
    for place, device in (("here", "cpu"), ("there", "cuda")):
        arguments = "train", "--runs", tmp_path / place, *settings, f"system.device={device}"
        if device == "cpu":
            outcome = tsbench(*arguments)
        else:
            with pretend_gpu():
                outcome = tsbench(*arguments)
        assert outcome.code == 0, outcome.err
    folders = [next((tmp_path / place).glob(f"{method}*")) for place in ("here", "there")]
    here, there = (job.read_run(folder) for folder in folders)
    assert there.summary["peak_memory_bytes"] == 2 and there.provenance["device"] != here.provenance["device"]
    one, other = here.evaluations[0]["metrics"], there.evaluations[0]["metrics"]
    assert other == pytest.approx(one, rel=1e-3)
    with pretend_gpu():
        outcome = tsbench("sample", folders[1], "--out", tmp_path / "again.npz")
    assert outcome.code == 0, outcome.err
    drawn, kept = np.load(tmp_path / "again.npz")["arr_0"], np.load(folders[1] / "samples.npz")["arr_0"]
    assert np.array_equal(drawn[: len(kept)], kept)


def test_latents_are_encoded_trained_on_and_resumed_there(images, autoencoder, tmp_path):
    with pretend_gpu() as own:
        outcome = tsbench(*command(images, autoencoder, tmp_path / "latents", "--mirrored", "--device", "cuda"))
        assert outcome.code == 0, outcome.err
        config = job.make_config(
            {"method": "dense", "data": {"name": "latents", "path": str(tmp_path / "latents"), "flip": True}},
            ["model.depth=1", "model.width=16", "model.num_heads=2", "budget.amount=64", "train.batch_size=16", ON_GPU,
             "evaluation.num_samples=2", "evaluation.block_size=2", f"evaluation.autoencoder={autoencoder}"],
        )  # fmt: skip
        data = job.load_data(config.data)
        trainer = Trainer(job.build_method(config, data), config, data, tmp_path, cost=UNMEASURED)
        (tmp_path / "checkpoints").mkdir()
        step(trainer, 0)
        trainer.save()
        again = Trainer(job.build_method(config, data), config, data, tmp_path, cost=UNMEASURED)
        again.resume()
        for each in (trainer, again):
            step(each, 1)
        assert waits_of(own, lambda: step(again, 2)) == {}  # read from files, and mirrored by other ones
        step(trainer, 2)
        assert all(value.is_cuda for state in again.optimizer.state.values() for value in state.values())
        one, other = (dict(each.method.named_parameters()) for each in (trainer, again))
        assert all(torch.equal(one[name].cpu(), other[name].cpu()) for name in one)
        sampler = job.make_sampler(config.diffusion, config.evaluation, config.model, data)
        drawn = sampler.draw(again.method, torch.device("cuda"), World())
        assert drawn.images.shape == (2, 3, 16, 16) and not drawn.images.is_cuda


@pytest.mark.parametrize("method", ["multi_expert", "switch_dit", "dit_moe"])
def test_ours_are_timed_there_beside_plain_code(method):
    with pretend_gpu() as own:
        for plain in (False, True) if method in NAIVE else (False,):
            entrant = Entrant(Contestant(method, SIZE, 2, "bf16", plain=plain), Setup("cuda"), UNMEASURED, PLAIN)
            assert entrant.memory_kind == "allocated on the GPU" and entrant.peak_memory_bytes == 1
            assert entrant.train()["loss"].is_cuda
            assert entrant.sample().is_cuda
            if not plain:
                assert waits_of(own, entrant.train).keys() <= {"an event"} and not waits_of(own, entrant.sample)


@pytest.mark.parametrize("part", PARTS)
def test_parts_run_there(part):
    with pretend_gpu() as own:
        ours, plain = PARTS[part](SIZE, 2, torch.device("cuda"))
        with torch.autocast("cuda", torch.bfloat16):
            assert not waits_of(own, ours)
            plain()


def test_the_peak_is_measured_there():
    with pretend_gpu() as own:
        assert peak.measure_peak(torch.device("cuda"), "bf16", size=8, repeats=2) > 0
        assert own.waits["synchronize in clock.py:<lambda>"] == 2 * 3


def test_peak_memory_is_that_of_this_run_on_its_gpu(monkeypatch):
    asked = []
    with pretend_gpu():
        for name in ("reset_peak_memory_stats", "max_memory_allocated"):
            monkeypatch.setattr(torch.cuda, name, lambda device=None, name=name: asked.append((name, str(device))) or 7)
        trainer = tiny_trainer("dense", "system.device=cuda:0")
        trainer.fit()
        assert asked == [("reset_peak_memory_stats", "cuda:0")]
        assert summary_of(trainer, 0.0)["peak_memory_bytes"] == 7 and asked[1:] == [("max_memory_allocated", "cuda:0")]


def test_products_with_a_stack_are_the_same_row_by_row():
    stacked, other = torch.randn(3, 8, 5), torch.randn(8, 5)
    with pretend_gpu():
        for shape in ((3, 8, 5), (3, 8)):
            there = inner(
                stacked.view(-1)[: np.prod(shape)].view(shape).to("cuda"),
                other.view(-1)[: np.prod(shape[1:])].view(shape[1:]).to("cuda"),
            )
            here = inner(stacked.view(-1)[: np.prod(shape)].view(shape), other.view(-1)[: np.prod(shape[1:])].view(shape[1:]))
            assert there.is_cuda and not here.is_cuda
            assert_close(there.cpu(), here, 1e-5)


def test_an_assignment_is_not_read_before_it_has_arrived():
    cost = torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    with pretend_gpu():
        matching = Matching(cost.to("cuda"))
        assert matching.cost.isnan().all()  # under way
        columns = matching.columns()
        assert columns.is_cuda and columns.cpu().tolist() == [0, 2, 1]
