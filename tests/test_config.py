"""Is a configuration resolved once, named by its content, and everything that is not allowed refused in one sentence?"""

from dataclasses import FrozenInstanceError, asdict
from pathlib import Path

import pytest
from command import TINY, assert_refused, tsbench

from bench.config import RunConfig, content_hash
from bench.files import read_yaml
from bench.job import OPTIONS, make_config
from bench.settings import flat_settings
from methods import METHODS

NOT_ALLOWED = {
    # what there is no such thing of
    "foo.bar=1": ("no setting foo", "method, label, seed"),
    "train.foo=1": ("no setting train.foo", "batch_size, micro_batches"),
    "lr=1": ("no setting lr", "did you mean train.lr?"),
    "train.batchsize=1": ("train.batchsize", "did you mean train.batch_size?"),
    "method=transformer": ("'transformer'", "dense, multi_expert"),
    "options.experts=3": ("'dense' has no option experts",),
    "method=multi_expert options.num_timesteps=3": ("no option num_timesteps", "experts"),
    # wrong type, or no value
    "train.lr=fast": ("train.lr", "'fast'", "Float"),
    "train.batch_size=1.5": ("train.batch_size", "1.5", "Integer"),
    "seed=true": ("seed", "True"),
    "model.learn_sigma=maybe": ("model.learn_sigma", "'maybe'"),
    "method=multi_expert options.experts=some": ("options.experts", "'some'"),
    "train=3": ("train is 3", "train.NAME=VALUE"),
    "options=3": ("options is 3", "options.NAME=VALUE"),
    "model=null": ("model",),
    "train.lr=": ("train.lr", "None"),
    "method=": ("method None", "dense"),
    "seed=???": ("seed", "left open"),
    "train.lr=${nothing}": ("train.lr", "nothing"),
    "method=multi_expert options.experts=${nothing}": ("options.experts", "nothing"),
    # no setting at all
    "nothing": ("'nothing'", "key=value"),
    "=3": ("'=3'", "key=value"),
    "train.lr=[1": ("'train.lr=[1'",),
    # out of range
    "seed=-1": ("seed is -1",),
    "seed=9223372036854775808": ("seed is 9223372036854775808",),
    "model.depth=0": ("model.depth is 0", "from 1"),
    "model.depth=100000": ("model.depth is 100000",),
    "model.mlp_ratio=0": ("model.mlp_ratio is 0.0", "above 0"),
    "diffusion.objective=vp": ("'vp'", "noise, flow"),
    "diffusion.schedule=square": ("'square'", "linear, cosine"),
    "diffusion.num_timesteps=1": ("diffusion.num_timesteps is 1",),
    "diffusion.min_snr_gamma=0": ("diffusion.min_snr_gamma is 0.0",),
    "diffusion.objective=flow diffusion.loss_weight=min_snr": ("diffusion.loss_weight is 'min_snr'", "uniform"),
    "train.lr=-1": ("train.lr is -1.0",),
    "train.lr=nan": ("train.lr is nan",),
    "train.lr=inf": ("train.lr is inf", "finite"),
    "train.beta1=1": ("train.beta1 is 1.0", "below 1"),
    "train.threads=0": ("train.threads is 0",),
    "train.batch_size=0": ("train.batch_size is 0",),
    "train.micro_batches=3": ("32", "3 micro-batches", "divisor"),
    "train.label_dropout=1.5": ("train.label_dropout is 1.5", "from 0 to 1"),
    "train.precision=fp8": ("'fp8'", "fp32, bf16"),
    "budget.unit=euros": ("'euros'", "images, train_flops, device_seconds"),
    "budget.amount=0": ("budget.amount is 0.0",),
    "budget.amount=inf": ("budget.amount is inf", "finite"),
    "heldout.bins=0": ("heldout.bins is 0",),
    "evaluation.num_samples=0": ("evaluation.num_samples is 0",),
    "evaluation.num_samples=100000000000": ("evaluation.num_samples is 100000000000",),
    "evaluation.sampler=heun": ("'heun'", "ancestral, ddim, dpm_solver, euler"),
    "evaluation.eta=-1": ("evaluation.eta is -1.0", "from 0 to 1"),
    "evaluation.guidance_scale=-1": ("evaluation.guidance_scale is -1.0",),
    "evaluation.guidance_channels=-1": ("evaluation.guidance_channels is -1",),
    "system.log_every=0": ("system.log_every is 0",),
    "system.compile=fast": ("system.compile is 'fast'", "none, blocks, cuda_graphs"),
    "system.plain=ema,speed": ("system.plain", "'speed'", "attention, optimizer"),
    "system.checkpoint_every=-1": ("system.checkpoint_every is -1",),
}

NOT_POSSIBLE = {
    "model.num_heads=3": ("width 16", "3 heads"),
    "model.patch_size=3": ("input size 8", "patches of 3"),
    "model.size=Q/2": ("'Q/2'", "S, B, L, XL, G"),
    "model.size=S/3": ("input size 8", "patches of 3"),
    "method=multi_expert options.experts=0": ("0 intervals", "from 1 to 20"),
    "method=multi_expert options.experts=21": ("20 timesteps", "21 intervals"),
    "method=switch_dit options.top_k=4": ("top_k is 4", "from 1 to 3"),
    "method=dit_moe options.expert=relu": ("'relu'", "swiglu, gelu_mlp"),
    "method=remix_dit options.bases=0": ("bases is 0",),
    "method=dtr options.beta=2": ("beta is 2.0",),
    "method=multi_expert diffusion.loss_weight=uncertainty": ("uncertainty", "splits into 4"),
    "method=multi_expert diffusion.objective=flow evaluation.sampler=euler": ("rectified flow", "splits into 4"),
    "budget.amount=5": ("5 images", "32"),
    "heldout.bins=21": ("heldout.bins is 21", "20 timesteps"),
    "data.name=imagenet": ("'imagenet'", "digits"),
    "data.name=cifar10 data.path=/nowhere": ("/nowhere",),
    "data.name=folder data.path=/nowhere data.image_size=8": ("/nowhere/train",),
    "data.name=latents data.path=/nowhere": ("/nowhere",),
    "data.image_size=7": ("7", "8 pixels"),
    "evaluation.sampler=euler": ("'euler'", "objective=noise"),
    "diffusion.objective=flow": ("'ancestral'", "objective=flow"),
    "evaluation.steps=0": ("'0'",),
    "evaluation.steps=many": ("'many'",),
    "evaluation.steps=21": ("'21'", "20"),
    "evaluation.eta=1": ("evaluation.eta is 1.0", "ddim"),
    "evaluation.guidance_channels=5": ("guidance_channels is 5", "digits has 1"),
    "evaluation.kid_subset_size=100": ("60", "kid_subset_size is 100"),
    "evaluation.extractor=inception": ("inception", "3 channels"),
    "evaluation.reference=/nowhere.npz": ("/nowhere.npz",),
    "train.init_from=/nowhere": ("/nowhere",),
    "train.init_from=.": ("not a run folder",),
    "system.device=toaster": ("'toaster'", "choose cpu or cuda"),
    "system.compile=cuda_graphs": ("system.compile is cuda_graphs", "GPU", "choose blocks or none"),
    "system.device=meta": ("'meta'", "choose cpu or cuda"),
}


@pytest.mark.parametrize(("settings", "words"), [*NOT_ALLOWED.items(), *NOT_POSSIBLE.items()])
def test_what_is_not_allowed_is_refused_in_one_sentence_before_anything_is_written(
    settings: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    assert_refused(tsbench("train", "--runs", tmp_path / "runs", *TINY, *settings.split()), *words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ("there is no file",)),
        (b"- a\n- b\n", ("holds a list", "mapping")),
        (b"seed: [1\nb: }\n", ("cannot be read as YAML", "line 2")),
        (b"seed: 1\nseed: 2\n", ("cannot be read as YAML", "line 2", "duplicate key")),
        (b"\xff\xfe\x00\x00", ("cannot be read as YAML",)),
        (b"seed: !!python/object:os.system {}\n", ("cannot be read as YAML", "python/object")),
        (b"just words\n", ("no setting just words",)),
        (b"1: 2\n", ("no setting 1",)),
        (b"train: {lr: fast}\n", ("train.lr", "'fast'")),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(content: bytes | None, words: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    assert_refused(tsbench("train", "--runs", tmp_path / "runs", path), *words)
    assert not (tmp_path / "runs").exists()


def test_defaults_are_filled_in_once_and_a_saved_configuration_reads_back_the_same(tmp_path: Path) -> None:
    config = make_config({"method": "remix_dit", "options": {"experts": 3}}, ["train.lr=1e-3", "evaluation.steps=10,10"])
    assert config.options == OPTIONS["remix_dit"] | {"experts": 3}
    assert config.train.lr == 1e-3 and config.evaluation.steps == "10,10"
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    again = make_config(read_yaml(tmp_path / "config.yaml"))
    assert again == config and again.run_id == config.run_id
    with pytest.raises(FrozenInstanceError):
        config.seed = 3  # type: ignore[misc]


def test_later_settings_win_and_may_refer_to_others() -> None:
    config = make_config(
        {"seed": 1, "label": "file"}, ["seed=2", "seed=3", "evaluation.seed=${seed}", "train.lr_final=${train.lr}"]
    )
    assert (config.seed, config.evaluation.seed, config.label, config.train.lr_final) == (3, 3, "file", config.train.lr)


def test_an_empty_file_is_all_defaults_of_the_first_method(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    config = make_config(read_yaml(tmp_path / "empty.yaml"))
    assert config == make_config({}) and config.method == next(iter(METHODS))
    assert asdict(config) | {"method": ""} == asdict(RunConfig())


OTHER_CHOICES = {
    "diffusion.objective": "flow",
    "diffusion.schedule": "linear",
    "diffusion.loss_weight": "min_snr",
    "diffusion.flow_times": "uniform",
    "train.micro_batches": 2,
    "train.intervals_per_step": 2,
    "train.lr_schedule": "cosine",
    "train.precision": "bf16",
    "budget.unit": "train_flops",
    "evaluation.sampler": "ddim",
    "evaluation.extractor": "inception",
    "system.experts": "separate_jobs",
    "evaluation.precision": "bf16",
    "system.shard": "full",
    "system.compile": "blocks",
    "system.plain": "ema",
}


def other_value(key: str, value: object) -> object:
    """Another value that is allowed."""
    if key in OTHER_CHOICES:
        return OTHER_CHOICES[key]
    if isinstance(value, str):
        return f"{value}x"
    return not value if isinstance(value, bool) else value * 0.5 if isinstance(value, float) and value else value + 1  # type: ignore[operator]


def test_the_run_is_named_by_what_can_change_its_weights() -> None:
    """Every setting but how a run is scored, where it works and what it is called."""
    base = make_config({})
    for key, value in flat_settings(asdict(base)).items():
        if key in ("method", "options"):
            continue
        changed = make_config({}, [f"{key}={other_value(key, value)}"])
        assert changed != base, key
        scientific = key.split(".")[0] not in ("label", "evaluation", "system")
        assert (changed.run_id != base.run_id) == scientific, key
    assert base.run_id.startswith("dense-") and make_config({}, ["method=dtr"]).run_id.startswith("dtr-")
    assert make_config({}, ["method=dtr", "options.alpha=1"]).run_id != make_config({}, ["method=dtr"]).run_id


def test_a_hash_depends_on_content_and_not_on_order() -> None:
    assert content_hash({"a": 1, "b": [1, 2]}) == content_hash({"b": [1, 2], "a": 1})
    assert content_hash({"a": 1, "b": [1, 2]}) != content_hash({"a": 1, "b": [2, 1]})
    assert len(content_hash({})) == 10
