"""Does a step that trains several intervals take the mean over them, on any number of ranks, and count what each gets?"""

import copy
import json
import math
from collections import Counter
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_distributed import distance
from test_ranks import on_ranks
from test_sharding import gathered_state, sharded_trainer
from training import RUNS, crash_after, differing, rows, saved, state_of, tiny_config, tiny_trainer

from bench import job, randomness
from bench.config import content_hash
from bench.distributed import World
from bench.files import read_yaml
from bench.flops import measure
from bench.intervals import interval_at_step
from bench.journal import Diverged
from bench.method import Prediction
from bench.planning import plan_runs
from bench.prepare import place_config
from bench.randomness import draw_batch
from bench.runs import hash_of_settings
from bench.shares import draw_shares, intervals_of, shares_of
from bench.suite import SuiteRun
from bench.switches import without

pytestmark = pytest.mark.xdist_group("shares")  # its ranks are started once, not by every worker

FOUR = "train.intervals_per_step=4"  # 12 steps of 4 parts of 2 images; 3 experts
AVERAGED = ("train.lr_schedule=cosine", "train.ema_half_life_images=30")


def batches_of(trained, step=0):
    intervals = intervals_of(step, trained.method, trained.config)
    return draw_shares(step, intervals, trained.shares, trained.config, trained.data, 0.25)


# What is drawn


@pytest.mark.parametrize("num_intervals", [1, 2, 4, 8])
def test_ranks_together_train_each_row_once_in_the_interval_of_its_part(num_intervals):
    trained = tiny_trainer("remix_dit", f"train.intervals_per_step={num_intervals}")
    intervals = intervals_of(5, trained.method, trained.config)
    assert len(intervals) == num_intervals
    whole = draw_batch(5, intervals[0], trained.config, trained.data, 0.25)
    for size in (1, 2, 4):
        if num_intervals % size and num_intervals > 1:
            continue
        of_ranks = [shares_of(trained.config.train, trained.method, World(rank, size)) for rank in range(size)]
        drawn = [batch for shares in of_ranks for batch in draw_shares(5, intervals, shares, trained.config, trained.data, 0.25)]
        assert [batch.interval for batch in drawn] == list(intervals if num_intervals > 1 else intervals * size)
        assert all(batch.intervals_of_step == intervals for batch in drawn)
        assert all(((batch.t >= batch.interval.start) & (batch.t < batch.interval.stop)).all() for batch in drawn)
        for name in ("x0", "noise", "y"):
            assert torch.equal(torch.cat([getattr(batch, name) for batch in drawn]), getattr(whole, name))


@pytest.mark.parametrize("settings", [(FOUR,), (FOUR, "data.flip=true", "train.label_dropout=0.5"), ("data.flip=true",)])
def test_shares_are_drawn_together_and_are_what_each_would_draw(settings, monkeypatch):
    """To the bit; but images are read once, and the numbers of the whole batch drawn once."""
    trained = tiny_trainer("remix_dit", *settings)
    drawn_for, reads, generator = Counter(), [], randomness.generator

    class Images:
        labels = trained.data.train.labels

        def __len__(self):
            return len(trained.data.train)

        def batch(self, indices):
            reads.append(indices)
            return trained.data.train.batch(indices)

    def counted(seed, purpose, *place):
        drawn_for[purpose] += 1
        return generator(seed, purpose, *place)

    intervals = intervals_of(3, trained.method, trained.config)
    for size in (1, 2):
        shares = shares_of(trained.config.train, trained.method, World(size - 1, size))
        expected = [draw_batch(3, intervals[s.place], trained.config, trained.data, 0.25, s.rows) for s in shares]
        with monkeypatch.context() as patched:
            patched.setattr(randomness, "generator", counted)
            batches = draw_shares(3, intervals, shares, trained.config, replace(trained.data, train=Images()), 0.25)
        for batch, one in zip(batches, expected, strict=True):
            assert all(torch.equal(getattr(batch, name), getattr(one, name)) for name in ("x0", "noise", "t", "y"))
            assert (batch.interval, batch.progress, batch.intervals_of_step) == (one.interval, 0.25, intervals)
        assert len(reads) == drawn_for["noise"] == drawn_for["label dropout"] == size
        assert drawn_for["flip"] == (size if trained.config.data.flip else 0)


@pytest.mark.parametrize("num_intervals", [1, 2, 4])
def test_intervals_come_in_the_same_cycles_so_that_each_gets_as_many_parts(num_intervals):
    trained = tiny_trainer("remix_dit", f"train.intervals_per_step={num_intervals}")
    drawn = [interval for step in range(30) for interval in intervals_of(step, trained.method, trained.config)]
    assert drawn == [interval_at_step(i, trained.method.intervals, 0) for i in range(30 * num_intervals)]
    assert [drawn.count(interval) for interval in trained.method.intervals] == [10 * num_intervals] * 3


# One step


@pytest.mark.parametrize("plain", [(), ("mixing",)])
@pytest.mark.parametrize("num_passes", [1, 2])
@pytest.mark.parametrize("coefficients", ["global", "local"])
def test_a_step_has_the_mean_of_the_gradients_of_its_intervals(coefficients, num_passes, plain):
    settings = (FOUR, f"options.coefficients={coefficients}", f"train.micro_batches={num_passes}", "options.prior_weight=0.1")
    trained = tiny_trainer("remix_dit", *settings, *(f"system.plain={name}" for name in plain))
    twin, batches = copy.deepcopy(trained.method), batches_of(trained)
    assert len(batches) == 4 and len({batch.interval for batch in batches}) == 3
    losses = trained.step(*batches)
    expected = []
    with without("mixing"):
        for batch in batches:
            twin.zero_grad()
            x_t = trained.objective.noised(batch.x0, batch.t, batch.noise)
            prediction = twin(x_t, batch.t, batch.y, batch.interval, batch.progress)
            loss = trained.objective.loss(trained.objective.terms(prediction.output, x_t, batch), batch.t)
            (loss + prediction.penalties["mixing_prior"]).backward()
            gradients = [p.grad.clone() for p in twin.parameters()]
            expected.append((float(loss.detach()), float(prediction.penalties["mixing_prior"].detach()), gradients))
    for i, (name, p) in enumerate(trained.method.named_parameters()):
        mean = torch.stack([gradients[i] for _, _, gradients in expected]).mean(dim=0)
        assert (p.grad - mean).abs().max() <= 1e-5 * (1 + mean.abs().max()), name
    assert float(losses["loss"]) == pytest.approx(sum(loss for loss, _, _ in expected) / 4, rel=1e-5)
    assert float(losses["penalty/mixing_prior"]) == pytest.approx(expected[0][1], rel=1e-5)
    records = trained.journal.pending
    assert [record.interval for record in records] == [batch.interval for batch in batches]
    assert [float(record.losses["loss"]) for record in records] == pytest.approx([loss for loss, _, _ in expected], rel=1e-5)


def test_every_image_of_every_interval_is_counted(tmp_path):
    cost = measure(tiny_trainer("remix_dit").method, (2, 4, 4))
    trained = tiny_trainer("remix_dit", FOUR, "train.micro_batches=2", folder=tmp_path, cost=cost)
    trained.fit()
    assert trained.steps_done == 12 and trained.updates == [16, 16, 16]
    assert trained.images_seen == 96 and trained.train_flops == 12 * cost.train_flops(8, 8)
    assert set(trained.ema.images_seen.values()) == {96}
    counted, losses = [0, 0, 0], {}
    for row in rows(tmp_path, "train"):
        counted[row["interval"]] += row["num_steps"]
        losses[row["interval"]] = row["loss"]
    assert counted == trained.updates and len(set(losses.values())) == 3
    last = json.loads((tmp_path / "progress.json").read_text())
    assert (last["step"], last["images_seen"]) == (12, 96)


def test_what_is_not_finite_is_named_whichever_part_it_is_in():
    trained = tiny_trainer("remix_dit", FOUR)
    batches = batches_of(trained)
    bad = batches[2]
    bad.x0[1] = torch.nan
    before = state_of(trained)
    with pytest.raises(Diverged, match=rf"^loss term 'mse' is nan at step 0, for timesteps {int(bad.t[1])}$"):
        trained.step(*batches)
    assert not differing(before, state_of(trained))


def test_a_penalty_that_is_not_finite_is_named_whichever_part_it_is_in(monkeypatch):
    trained = tiny_trainer("remix_dit", FOUR)
    batches, forward = batches_of(trained), type(trained.method).forward
    assert batches[1].interval != batches[0].interval

    def breaks(self, x, t, y, interval, progress=0.0):
        prediction = forward(self, x, t, y, interval, progress)
        factor = math.inf if interval == batches[1].interval else 1.0
        return Prediction(prediction.output, {name: penalty * factor for name, penalty in prediction.penalties.items()})

    monkeypatch.setattr(type(trained.method), "forward", breaks)
    with pytest.raises(Diverged, match=r"^loss term 'penalty/mixing_prior' is (inf|nan) at step 0, a batch of timesteps \d+, "):
        trained.step(*batches)


def test_a_step_takes_one_batch_of_each_share_that_name_its_intervals():
    trained = tiny_trainer("remix_dit", FOUR)
    batches = batches_of(trained)
    for wrong in (batches[:1], batches[:3], [batch._replace(intervals_of_step=()) for batch in batches]):
        with pytest.raises(AssertionError, match="one batch of each share"):
            trained.step(*wrong)
    with pytest.raises(AssertionError, match="one batch of each share"):
        tiny_trainer("remix_dit").step(*(batch._replace(intervals_of_step=()) for batch in batches))
    trained.step(*batches)


def test_a_resumed_run_is_the_one_that_was_never_interrupted(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    settings = (*AVERAGED, FOUR, "system.log_every=3")  # a checkpoint holds records that no line tells of yet
    undisturbed = tiny_trainer("remix_dit", *settings, folder=whole)
    undisturbed.fit()
    for _ in range(2):
        crash_after(tiny_trainer("remix_dit", *settings, folder=cut), 5)
    resumed = tiny_trainer("remix_dit", *settings, folder=cut)
    resumed.fit()
    assert not differing(state_of(undisturbed), state_of(resumed))
    assert saved(whole)[1] == saved(cut)[1] and rows(whole) == rows(cut) and len(rows(whole)) > 12


# Ranks

WAYS = {
    "own draws": (*AVERAGED, FOUR),
    "bases exchanged": (FOUR, "system.plain=mixing"),
    "micro-batches": (FOUR, "train.batch_size=16", "train.micro_batches=2"),
    "local": (FOUR, "options.coefficients=local"),
}


def work(world, out):
    for way, settings in WAYS.items():
        trained = tiny_trainer("remix_dit", *settings, folder=out / way, world=world)
        trained.fit()
        save_file(state_of(trained), out / f"{way}.{world.rank}.safetensors")
    if world.size == 2:
        sharded = sharded_trainer("remix_dit", *WAYS["own draws"], folder=out / "sharded", world=world)
        sharded.fit()
        save_file(gathered_state(sharded), out / f"sharded.{world.rank}.safetensors")


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    """The folder in which that many processes have left their work."""
    out = tmp_path_factory.mktemp(f"ranks-{request.param}")
    on_ranks(request.param, work, out)
    return request.param, out


def test_any_number_of_ranks_trains_what_one_process_trains(ranks, tmp_path):
    size, out = ranks
    for way in [*WAYS, *(["sharded"] if size == 2 else [])]:
        states = [load_file(out / f"{way}.{rank}.safetensors") for rank in range(size)]
        assert not any(differing(states[0], state) for state in states[1:])
        alone = tiny_trainer("remix_dit", *WAYS.get(way, WAYS["own draws"]), folder=tmp_path / way)
        start = state_of(alone)
        alone.fit()
        assert distance(state_of(alone), states[0], start) < 2e-3, way
        together, by_itself = rows(out / way), rows(tmp_path / way)
        assert len(together) == len(by_itself) > 12
        for one, other in zip(together, by_itself, strict=True):
            assert one.keys() == other.keys() and one.pop("kind") == other.pop("kind")
            for name in one:  # rank 0 writes the losses of all ranks
                assert one[name] == pytest.approx(other[name], rel=1e-3), (way, name)
        if way != "sharded":
            assert saved(out / way)[1] == saved(tmp_path / way)[1]


# What is refused


@pytest.mark.parametrize("method", [name for name in RUNS if name != "remix_dit"])
def test_methods_whose_intervals_do_not_share_their_parameters_are_refused(method):
    with pytest.raises(ValueError, match=r"^train.intervals_per_step is 4, which is for methods of [^\n]* is none: set it to 1$"):
        tiny_trainer(method, FOUR)
    with pytest.raises(ValueError, match=r"^train.intervals_per_step is 4, [^\n]* is none: set it to 1$"):
        plan_runs([SuiteRun(tiny_config(method, FOUR, "evaluation.steps=2", "data.image_size=8"), {}, "")])


@pytest.mark.parametrize("size", [3, 8])
def test_ranks_that_cannot_share_the_intervals_are_refused(size):
    settings = (FOUR, "train.batch_size=24")
    with pytest.raises(ValueError, match=rf"^train.intervals_per_step 4 cannot be shared equally by {size} ranks: [^\n]*, or 1"):
        tiny_trainer("remix_dit", *settings, world=World(0, size))


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"^train.batch_size 8 cannot be cut into equal parts for [^\n]* 3: choose a divisor$"):
        tiny_config("remix_dit", "train.intervals_per_step=3")
    with pytest.raises(ValueError, match=r"^2 images per rank and interval cannot be cut into 8 micro-batches: choose [^\n]*$"):
        tiny_trainer("remix_dit", FOUR, "train.micro_batches=8")


# Names


def test_where_it_is_not_set_runs_are_called_what_they_were_called_before(tmp_path):
    base, several = tiny_config("remix_dit"), tiny_config("remix_dit", FOUR)
    before = asdict(base)
    del before["train"]["intervals_per_step"]
    scientific = {key: value for key, value in before.items() if key not in ("label", "evaluation", "system")}
    assert base.run_id == f"remix_dit-{content_hash(scientific)}" != several.run_id
    assert hash_of_settings(before) == hash_of_settings(asdict(base)) != hash_of_settings(asdict(several))
    tmp_path.joinpath("config.yaml").write_text(json.dumps(before))  # JSON is YAML
    assert job.read_config(tmp_path).run_id == base.run_id
    place_config(base, tmp_path)
    assert read_yaml(tmp_path / "config.yaml")["train"]["intervals_per_step"] == 1
    place_config(base, tmp_path)
    with pytest.raises(ValueError, match="holds another run"):
        place_config(several, tmp_path)
