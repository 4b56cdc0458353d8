"""Which contestants do the words of the command line stand for, and beside which baselines?"""

import pytest
from timing import SIZE

from bench.throughput.contest import Contestant, Setup, baseline_of, config_of, contestants, groups_of, with_baselines
from methods import METHODS


def test_all_methods_are_chosen_unless_some_are_named():
    assert [each.method for each in contestants([], [SIZE], [4], ["fp32"], "none")] == list(METHODS)
    grid = contestants(["dense", "dtr"], ["S/2", "B/2"], [4, 8], ["fp32", "bf16"], "none")
    assert len(grid) == len(set(grid)) == 16
    together = groups_of(grid, [], together=True)
    assert [(group.beside, len(group.contestants)) for group in together] == [("", 4)] * 4
    assert all(len({(each.size, each.batch_size) for each in group.contestants}) == 1 for group in together)


def test_each_method_is_beside_its_baselines_unless_all_are_together():
    chosen = contestants(["dense", "dtr"], [SIZE], [4], ["fp32"], "none")
    apart = groups_of(chosen, ["naive", "dense"], together=False)
    who = [(group.beside, [(each.method, each.plain) for each in group.contestants]) for group in apart]
    assert who == [
        ("dense", [("dense", True), ("dense", False)]),
        ("dtr", [("dtr", True), ("dtr", False), ("dense", False)]),
    ]
    (together,) = groups_of(chosen, ["naive", "dense"], together=True)
    assert len(together.contestants) == 4


def test_baselines_are_timed_once_and_beside_theirs():
    chosen = contestants(["dtr", "dense"], [SIZE], [4], ["bf16"], "none")
    every = with_baselines(chosen, ["naive", "fp32", "dense"])
    assert len(every) == len(set(every)) == 6
    assert {(each.method, each.precision, each.plain) for each in every} == {
        (method, *kind) for method in ("dtr", "dense") for kind in (("bf16", True), ("bf16", False), ("fp32", False))
    }
    assert [each.method for each in every] == ["dtr"] * 3 + ["dense"] * 3


def test_what_a_baseline_is():
    ours = Contestant("dtr:beta=0.5", SIZE, 4, "bf16", "blocks")
    assert baseline_of(ours, "naive") == Contestant("dtr:beta=0.5", SIZE, 4, "bf16", "none", plain=True)
    assert baseline_of(ours, "fp32") == Contestant("dtr:beta=0.5", SIZE, 4, "fp32", "blocks")
    assert baseline_of(ours, "dense") == Contestant("dense", SIZE, 4, "bf16", "blocks")
    assert baseline_of(baseline_of(ours, "naive"), "naive") is None
    assert baseline_of(Contestant("dense", SIZE, 4), "dense") is None
    assert baseline_of(Contestant("dense", SIZE, 4), "fp32") is None


def test_words_become_a_configuration():
    setup = Setup("cpu", 3, 1.25, ("train.beta2=0.95",))
    config = config_of(Contestant("dit_moe:experts=16,top_k=4", "2x24x3/8", 12, "bf16", "blocks"), setup)
    assert (config.method, config.options["experts"], config.options["top_k"]) == ("dit_moe", 16, 4)
    model = config.model
    assert (model.depth, model.width, model.num_heads, model.patch_size, model.size) == (2, 24, 3, 8, "")
    assert (config.train.batch_size, config.train.precision, config.train.threads, config.train.beta2) == (12, "bf16", 3, 0.95)
    assert config.train.ema_half_life_images > 0
    assert (config.evaluation.precision, config.evaluation.guidance_scale) == ("bf16", 1.25)
    assert config.system.compile == "blocks" and config.system.compile_sampling
    assert config_of(Contestant("dense", "XL/2", 1), setup).model.size == "XL/2"


@pytest.mark.parametrize(
    ("setting", "flag"),
    [
        ("method=dense", "--methods"),
        ("options.experts=8", "--methods"),
        ("model.depth=5", "--size"),
        ("model.size=XL/2", "--size"),
        ("model.mlp_ratio=2", "--size"),
        ("train.batch_size=64", "--batch"),
        ("train={batch_size: 64}", "--batch"),
        ("train.precision=bf16", "--precision"),
        ("train.threads=2", "--threads"),
        ("evaluation.block_size=64", "--batch"),
        ("evaluation.guidance_scale=1", "--guidance"),
        ("evaluation.precision=bf16", "--precision"),
        ("system.device=cuda", "--device"),
        ("system.compile=blocks", "--compile"),
        ("system.compile_sampling=true", "--compile"),
    ],
)
def test_no_setting_changes_what_a_row_says(setting, flag):
    method = "dit_moe" if setting.startswith("method") else "dit_moe:experts=4"  # another would not know that option
    with pytest.raises(ValueError, match=rf"^[a-z_.]+ is what {flag} says: give that$"):
        config_of(Contestant(method, SIZE, 4), Setup(settings=(setting,)))


def test_sampling_steps_are_always_as_many():
    with pytest.raises(ValueError, match=r"^evaluation\.steps is 250 here: leave it out$"):
        config_of(Contestant("dense", SIZE, 4), Setup(settings=("evaluation.steps=10",)))


def test_what_no_row_says_is_free():
    free = ("train.lr=0.5", "diffusion.schedule=cosine", "train.ema_half_life_images=7", "system.plain=masks")
    free += ("options.top_k=1", "heldout.bins=2", "label=other")
    config = config_of(Contestant("dit_moe:experts=4", SIZE, 4), Setup(settings=free))
    assert (config.train.lr, config.diffusion.schedule, config.train.ema_half_life_images) == (0.5, "cosine", 7)
    assert (config.system.plain, config.options["top_k"], config.heldout.bins) == ("masks", 1, 2)
