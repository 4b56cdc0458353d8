"""Does every run get its share and no more: in images, training FLOPs or device-seconds?"""

from contextlib import nullcontext

import pytest
from training import RUNS, UNMEASURED, crash_after, drawn, rows, tiny_config, tiny_data, tiny_trainer

from bench import measuring, trainer
from bench.budget import plan
from bench.config import BudgetConfig
from bench.distributed import Agreement, World
from bench.flops import Cost, measure
from bench.job import build_method


def test_images_are_whole_steps():
    budget = plan(BudgetConfig("images", 96), UNMEASURED, 8)
    assert (budget.num_steps, budget.device_seconds) == (12, None)
    assert [budget.progress(steps, 1e9) for steps in (0, 3, 12, 20)] == [0, 0.25, 1, 1]
    assert plan(BudgetConfig("images", 100_000), UNMEASURED, 128).num_steps == 781  # 32 images less, but within 1%


def test_flops_count_what_a_step_costs_beside_its_images():
    cost = Cost(train_flops_per_pass=200.0, train_flops_per_image=100.0, forward_flops_per_image=30.0)
    assert plan(BudgetConfig("train_flops", 100_000), cost, 8).num_steps == 100
    assert cost.train_flops(8, num_passes=4) == 1600  # what is paid once per forward pass is paid by each micro-batch
    cut = tiny_trainer("remix_dit", "train.micro_batches=4", "budget.unit=train_flops", "budget.amount=19200", cost=cost)
    assert cut.budget.num_steps == 12
    cut.step(drawn(cut))
    assert cut.train_flops == 1600


@pytest.mark.parametrize(("unit", "amount", "suggested"), [("images", 100, 96), ("images", 3, 8), ("train_flops", 1550, 2000)])
def test_a_budget_that_steps_miss_by_more_than_a_hundredth_is_refused(unit, amount, suggested):
    cost = Cost(200.0, 100.0, 30.0)
    sentence = (
        rf"^a budget of {amount} {unit} is not a whole number of steps of \d+ within 1%: "
        rf"choose a smaller train.batch_size or a budget.amount such as {suggested}$"
    )
    with pytest.raises(ValueError, match=sentence):
        plan(BudgetConfig(unit, amount), cost, 8)
    assert plan(BudgetConfig(unit, suggested), cost, 8).num_steps is not None


def test_equal_flops_are_different_numbers_of_images():
    data, images, spent = tiny_data(), {}, {}
    for method in RUNS:
        config = tiny_config(method, "budget.unit=train_flops", "budget.amount=5e9")
        cost = measure(build_method(config, data), (2, 4, 4))
        steps = plan(config.budget, cost, 8).num_steps
        images[method], spent[method] = 8 * steps, steps * cost.train_flops(8)
    assert max(spent.values()) - min(spent.values()) < 0.01 * 5e9
    assert images["dense"] == images["dtr"] == images["multi_expert"]
    assert images["dit_moe"] < images["dense"] / 1.5 and images["switch_dit"] < images["dense"] / 1.1
    assert images["remix_dit"] < images["dense"]


@pytest.mark.parametrize("method", ["dense", "remix_dit"])
def test_a_run_ends_when_its_flops_are_spent(method, tmp_path):
    cost = measure(tiny_trainer(method).method, (2, 4, 4))
    amount = 7 * cost.train_flops(8)
    trained = tiny_trainer(method, "budget.unit=train_flops", f"budget.amount={amount}", folder=tmp_path, cost=cost)
    trained.fit()
    assert trained.steps_done == 7 and trained.train_flops == pytest.approx(amount)
    assert rows(tmp_path, "train")[-1]["train_flops"] == trained.train_flops


# Device-seconds, by a clock that stands still except where a test moves it


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def perf_counter(self) -> float:
        return self.seconds

    monotonic = perf_counter


@pytest.fixture
def clock(monkeypatch):
    """A step takes 0.5 s; measuring the held-out loss, saving and logging take 100 s each."""
    clock = Clock()
    monkeypatch.setattr(trainer, "time", clock)

    def slow(function, seconds):
        def slower(*arguments, **keywords):
            clock.seconds += seconds
            return function(*arguments, **keywords)

        return slower

    monkeypatch.setattr(trainer.Trainer, "step", slow(trainer.Trainer.step, 0.5))
    monkeypatch.setattr(measuring, "item_losses", slow(measuring.item_losses, 100))
    monkeypatch.setattr(trainer.Trainer, "save", slow(trainer.Trainer.save, 100))
    monkeypatch.setattr(trainer.Journal, "flush", slow(trainer.Journal.flush, 100))
    return clock


SECONDS = (
    "budget.unit=device_seconds",
    "budget.amount=10",
    "train.lr_schedule=cosine",
    "system.log_every=1",
    "system.checkpoint_every_seconds=1e9",
)


def test_the_clock_ends_a_run_and_counts_training_only(clock, tmp_path):
    trained = tiny_trainer("multi_expert", *SECONDS, folder=tmp_path)
    trained.fit()
    assert trained.steps_done == 20 and trained.device_seconds == 10
    assert clock.seconds > 1000 + 20 * 100
    measured = {row["step"] for row in rows(tmp_path, "heldout")}
    assert measured == {0, 10, 20}
    lr = [row["lr"] for row in rows(tmp_path, "train")]
    assert len(lr) == 20 and lr == sorted(lr, reverse=True) and lr[10] == pytest.approx(0.5e-3)


def test_seconds_that_a_crash_undid_are_counted_apart(clock, tmp_path):
    crash_after(tiny_trainer("multi_expert", *SECONDS, folder=tmp_path), 8)  # saved at step 4, seen at step 7
    trained = tiny_trainer("multi_expert", *SECONDS, folder=tmp_path)
    trained.fit()
    assert trained.steps_done == 20 and trained.device_seconds == 10
    assert trained.lost == {"images": 8 * 3, "device_seconds": 1.5}


def test_seconds_are_summed_over_devices(clock, monkeypatch):
    monkeypatch.setattr(trainer, "Agreement", lambda world: Agreement(World()))  # who asks to stop
    monkeypatch.setattr(trainer, "averaging", lambda leaves, world, num_passes: nullcontext())

    class Alone(World):  # two ranks' arithmetic in one process
        def sum(self, tensor, group=None):
            return tensor

        def mean(self, values):
            return values

        def agree(self, number, device):
            return number

        def decide(self, value, device):
            return value

    trained = tiny_trainer("dense", *SECONDS, world=Alone(0, 2))
    trained.fit()
    assert trained.steps_done == 10 and trained.device_seconds == 10


@pytest.mark.parametrize("amount", [0, -1, float("nan")])
def test_nothing_is_no_budget(amount):
    with pytest.raises(ValueError, match=r"^budget.amount is .*: it must be above 0$"):
        BudgetConfig("images", amount)
