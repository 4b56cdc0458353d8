"""Does a plan tell what runs will really cost, and refuse to compare runs of unequal budgets?"""

import io
from types import SimpleNamespace
from typing import Any

import pytest
from command import TINY
from helpers import PUBLISHED
from omegaconf import OmegaConf
from rich.console import Console

from bench import job, planning
from bench.memory import training_memory
from bench.planning import PlannedRun, plan_runs
from bench.published import published_names
from bench.published.costs import Latents
from bench.suite import load_suite, suite_runs
from bench.sweep_views import plan_table
from slurm.profile import load_profile
from slurm.states import Status
from slurm.sweep import Choice

BASE = OmegaConf.to_container(OmegaConf.from_dotlist(TINY))


def plan(*methods: dict[str, Any], settings: tuple[str, ...] = (), world_size: int = 1, **others: Any) -> list[PlannedRun]:
    suite = {"base": BASE, "methods": list(methods), **others}
    return plan_runs(suite_runs(suite, list(settings), job.make_config), world_size)


def grouped(groups: dict[str, list[dict[str, Any]]]) -> list[PlannedRun]:
    suite = {"base": BASE, "groups": {name: {"methods": methods} for name, methods in groups.items()}}
    return plan_runs(suite_runs(suite, [], job.make_config))


DENSE, DTR = {"method": "dense", "label": "One"}, {"method": "dtr", "label": "Two"}


@pytest.mark.parametrize("method", PUBLISHED)
def test_a_plan_tells_what_the_trainer_counts(method: str) -> None:
    """Steps, images, FLOPs and parameters are those of the run's own trainer."""
    (planned,) = plan({"method": method})
    config = planned.config
    data = job.load_data(config.data)
    cost = job.check(config)
    built = job.build_method(config, data)
    assert planned.num_images == 64 and planned.train_flops == 2 * cost.train_flops(32)
    assert planned.stored_parameters == sum(p.numel() for p in built.parameters())
    assert planned.memory_bytes == training_memory(built, (1, 8, 8), 32, averaged=False).total
    assert planned.label == method and planned.device_seconds != planned.device_seconds


def test_ranks_and_micro_batches_share_a_step() -> None:
    """A pass has a fixed cost in some methods; each rank holds its part of the batch."""
    alone, shared = (plan({"method": "remix_dit"}, world_size=size)[0] for size in (1, 4))
    in_parts = plan({"method": "remix_dit"}, settings=("train.micro_batches=4",))[0]
    assert alone.train_flops < shared.train_flops == in_parts.train_flops
    assert alone.memory_bytes > shared.memory_bytes == in_parts.memory_bytes


@pytest.mark.parametrize(
    ("settings", "world_size", "message"),
    [
        ((), 3, r"^train.batch_size 32 cannot be shared equally by 3 ranks: choose a multiple of 3, or another number of ranks$"),
        (("train.micro_batches=16",), 4, r"^8 images per rank cannot be cut into 16 micro-batches: choose a divisor[^\n]*$"),
        (
            ("train.intervals_per_step=32", "train.micro_batches=8"),
            1,
            r"^1 image per rank and interval cannot be cut into 8 micro-batches: [^\n]*, or a smaller train.intervals_per_step$",
        ),
        (("train.intervals_per_step=4",), 3, r"^train.intervals_per_step 4 cannot be shared equally by 3 ranks: [^\n]*$"),
    ],
)
def test_a_batch_that_cannot_be_divided_is_refused_in_the_words_of_who_divides_it(
    settings: tuple[str, ...], world_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan({"method": "remix_dit"}, settings=settings, world_size=world_size)


def test_device_hours_are_of_the_speed_given_or_of_the_budget() -> None:
    (by_images,) = plan(DENSE)
    assert by_images.device_hours(0.5) == pytest.approx(by_images.train_flops / 0.5e12 / 3600)
    (by_time,) = plan({**DENSE, "budget": {"unit": "device_seconds", "amount": 7200}})
    assert by_time.device_hours(0.5) == 2 and by_time.num_images != by_time.num_images


def test_what_differs_in_seed_or_learning_rate_alone_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def measure(method: Any, *arguments: Any) -> Any:
        measured.append(type(method).__name__)
        return job.Cost(0.0, 1.0, 1.0)

    monkeypatch.setattr(planning, "measure", measure)
    planning._measured.cache_clear()
    planning._memory.cache_clear()
    grid = {"seed": [0, 1], "train.lr": [0.1, 0.2]}
    planned = plan(DENSE, DTR, grid=grid)
    assert len(planned) == 8 and len(measured) == 2
    different = ("model.depth=2", "model.width=32", "diffusion.num_timesteps=30", "data.image_size=8")
    for setting in different:
        plan(DENSE, settings=(setting,))
    assert len(measured) == 2 + len(different)
    planning._measured.cache_clear()
    planning._memory.cache_clear()


# Budgets


@pytest.mark.parametrize("amount", [128, 65])
def test_unequal_budgets_are_refused_naming_the_runs(amount: int) -> None:
    other = {**DTR, "budget": {"amount": amount}, "train": {"batch_size": 1}}
    with pytest.raises(ValueError, match=r"^the budgets of this suite are not equal within 1%: [^\n]*$") as refusal:
        plan(DENSE, other)
    for word in ("dense-", "(One) has 64 images", "dtr-", f"(Two) has {amount} images", "the same budget", "groups"):
        assert word in str(refusal.value)


def test_budgets_within_one_percent_are_equal() -> None:
    """Of 1600 images, batches of 32 take 50 steps; 1585 are within 1%, 1568 are not."""
    same = {**DENSE, "budget": {"amount": 1600}}
    assert len(plan(same, {**DTR, "budget": {"amount": 1585}, "train": {"batch_size": 5}})) == 2
    with pytest.raises(ValueError, match="not equal"):
        plan(same, {**DTR, "budget": {"amount": 1568}})


def test_budgets_of_different_units_are_unequal() -> None:
    with pytest.raises(ValueError, match=r"has 64 images, .*\(Two\) has 60 device_seconds; "):
        plan(DENSE, {**DTR, "budget": {"unit": "device_seconds", "amount": 60}})


def test_equal_flops_are_equal_budgets_and_unequal_images_do_not_matter() -> None:
    """The more expensive method gets fewer steps."""
    budget = {"unit": "train_flops", "amount": 5e9}
    cheap, dear = plan({**DENSE, "budget": budget}, {"method": "dit_moe", "budget": budget})
    assert cheap.num_images > dear.num_images
    assert cheap.train_flops == pytest.approx(5e9, rel=0.01) and dear.train_flops == pytest.approx(5e9, rel=0.01)


def test_each_group_has_a_budget_of_its_own() -> None:
    longer = {"budget": {"amount": 128}}
    assert len(grouped({"short": [DENSE, DTR], "long": [{**DENSE, **longer}, {**DTR, **longer}]})) == 4
    with pytest.raises(ValueError, match=r"^the budgets of group long are not equal within 1%: "):
        grouped({"short": [DENSE, DTR], "long": [{**DENSE, **longer}, {**DTR, "budget": {"amount": 256}}]})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("budget.amount=70",), "not a whole number of steps"),
        (("evaluation.sampler=euler",), "does not fit diffusion.objective"),
        (("evaluation.num_samples=0",), "evaluation.num_samples is 0"),
        (("data.name=folder", "data.path=nowhere", "data.image_size=8"), "nowhere"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_starts(settings: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as refusal:
        plan(DENSE, settings=settings)
    assert words in str(refusal.value)


# Data that are not here

LATENTS = ("data.name=latents", "data.path=nowhere", "data.image_size=8", "evaluation.extractor=inception")
SCORING = ("evaluation.extractor_weights=weights.pth", "evaluation.reference=reference.npz")


def test_a_look_at_a_plan_needs_no_data_and_says_what_is_missing() -> None:
    (suite_run,) = suite_runs({"base": BASE, "methods": [DENSE]}, [*LATENTS, *SCORING], job.make_config)
    (planned,) = plan_runs([suite_run], only_look=True)
    assert planned.missing == ("nowhere", "weights.pth", "reference.npz")
    config = planned.config
    of_imagenet = job.build_method(config, Latents(8))  # type: ignore[arg-type]
    assert planned.stored_parameters == sum(p.numel() for p in of_imagenet.parameters()) and planned.train_flops > 0
    with pytest.raises(ValueError, match=r"^there is no file nowhere/train_latents.npy: [^\n]*$"):
        plan_runs([suite_run])
    (here,) = plan_runs(suite_runs({"base": BASE, "methods": [DENSE]}, [], job.make_config), only_look=True)
    assert here.train_flops == plan(DENSE)[0].train_flops and here.missing == ()
    console = Console(width=200, record=True, file=io.StringIO())
    status = Status("planned")
    console.print(plan_table([planned], {config.run_id: status}, Choice([], {}), load_profile("local")))
    told = console.export_text()
    assert "needed before any of these runs starts: nowhere, weights.pth, reference.npz" in told
    assert "4 channels, 1000 classes" in told


@pytest.mark.parametrize("name", published_names())
def test_runs_of_published_tables_have_equal_budgets_in_each_group(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And can be looked at where there are no data."""
    network = SimpleNamespace(parameters=list, num_active_parameters=int)
    monkeypatch.setattr(planning, "_measured", lambda _: (network, job.Cost(0.0, 1.0, 1.0)))
    monkeypatch.setattr(planning, "_memory", lambda *_: None)
    planned = plan_runs(suite_runs(load_suite(name), [], job.make_config), only_look=True)
    assert planned and all(each.missing and each.num_images > 0 for each in planned)
