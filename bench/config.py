"""What exactly is one run, and what is its name?

A run's configuration is a tree of frozen dataclasses, read from YAML and `key=value` overrides through OmegaConf.
Defaults are filled in once, saved and hashed: the run id is a hash of everything that can change the trained weights.
How a run is scored (`evaluation`), where and how often it writes (`system`) and what it is called (`label`) do not
change the weights and are not part of the id; the scoring has a hash of its own (`bench.evaluate`).
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

NOT_SCIENTIFIC = ("label", "evaluation", "system")


@dataclass(frozen=True)
class ModelConfig:
    """The backbone: a named size ("S/2") or, where `size` is empty, the dimensions."""

    size: str = ""
    depth: int = 4
    width: int = 96
    num_heads: int = 3
    patch_size: int = 2
    mlp_ratio: float = 4.0
    learn_sigma: bool = True


@dataclass(frozen=True)
class DataConfig:
    """What is denoised. `path` is for data sets that are not embedded; `flip`: horizontal flips with probability 1/2."""

    name: str = "digits"
    path: str = ""
    image_size: int = 0  # 0: the data set's own
    flip: bool = False


@dataclass(frozen=True)
class DiffusionConfig:
    """`objective`: noise (discrete diffusion, the network predicts the noise) or flow (rectified flow)."""

    objective: str = "noise"
    schedule: str = "cosine"
    num_timesteps: int = 1000
    loss_weight: str = "uniform"  # uniform, min_snr, uncertainty
    min_snr_gamma: float = 5.0
    uncertainty_lr: float = 0.025
    flow_times: str = "logit_normal"  # logit_normal, uniform, stratified

    def __post_init__(self) -> None:
        _choice("diffusion.objective", self.objective, ("noise", "flow"))
        _choice("diffusion.schedule", self.schedule, ("linear", "cosine"))
        _choice("diffusion.loss_weight", self.loss_weight, ("uniform", "min_snr", "uncertainty"))
        _choice("diffusion.flow_times", self.flow_times, ("logit_normal", "uniform", "stratified"))
        _at_least("diffusion.num_timesteps", self.num_timesteps, 2)
        if self.objective == "flow" and self.loss_weight != "uniform":
            raise ValueError(
                f"diffusion.loss_weight is {self.loss_weight!r}, which rectified flow does not have: set it to uniform"
            )


@dataclass(frozen=True)
class TrainConfig:
    """One optimiser step sees `batch_size` images over all ranks, in `micro_batches` parts per rank."""

    batch_size: int = 32
    micro_batches: int = 1
    lr: float = 1e-3
    lr_schedule: str = "constant"  # constant; cosine: to lr_final * lr at the end of the budget
    lr_final: float = 0.0
    lr_warmup_images: int = 0
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    label_dropout: float = 0.1
    ema_half_life_images: float = 0.0  # 0: no averaging
    ema_warmup: float = 0.05  # the half-life is at most this part of the images the parameters have seen; 0: no warm-up
    precision: str = "fp32"  # fp32, bf16 (autocast)
    threads: int = 1  # of one process on a CPU; part of the settings, as it can change the last bit
    init_from: str = ""  # weights of a dense network to start from

    def __post_init__(self) -> None:
        _at_least("train.batch_size", self.batch_size, 1)
        _at_least("train.micro_batches", self.micro_batches, 1)
        _at_least("train.threads", self.threads, 1)
        _choice("train.lr_schedule", self.lr_schedule, ("constant", "cosine"))
        _choice("train.precision", self.precision, ("fp32", "bf16"))
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"train.label_dropout is {self.label_dropout}: choose a probability from 0 to 1")
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"train.batch_size {self.batch_size} cannot be cut into {self.micro_batches} micro-batches: choose a divisor"
            )


@dataclass(frozen=True)
class BudgetConfig:
    """How much training a run gets: `amount` of `images` (summed over experts), `train_flops` or `device_seconds`."""

    unit: str = "images"
    amount: float = 256_000

    def __post_init__(self) -> None:
        _choice("budget.unit", self.unit, ("images", "train_flops", "device_seconds"))
        if not self.amount > 0:
            raise ValueError(f"budget.amount is {self.amount}: it must be above 0")


@dataclass(frozen=True)
class HeldoutConfig:
    """The denoising loss on fixed held-out images and noise: `points` times over training, in `bins` of timesteps."""

    bins: int = 20
    images_per_bin: int = 25
    points: int = 16

    def __post_init__(self) -> None:
        for name in ("bins", "images_per_bin", "points"):
            _at_least(f"heldout.{name}", getattr(self, name), 1)


@dataclass(frozen=True)
class EvaluationConfig:
    """How a trained run is sampled and scored; see `bench.evaluate` for the frozen protocol that this becomes."""

    num_samples: int = 500
    sampler: str = "ancestral"  # ancestral, ddim, euler (rectified flow)
    steps: str = "50"
    eta: float = 0.0  # ddim
    guidance_scale: float = 1.0
    guidance_channels: int = 0  # how many output channels are guided; 0: all that are predicted
    seed: int = 0
    block_size: int = 50  # consecutive images drawn together; part of what a sample is
    extractor: str = "digits"  # digits, inception
    extractor_weights: str = ""  # a local file, for inception
    reference: str = ""  # an ADM reference file instead of the data set's own images
    kid_subset_size: int = 250

    def __post_init__(self) -> None:
        _choice("evaluation.sampler", self.sampler, ("ancestral", "ddim", "euler"))
        _choice("evaluation.extractor", self.extractor, ("digits", "inception"))
        for name in ("num_samples", "block_size", "kid_subset_size"):
            _at_least(f"evaluation.{name}", getattr(self, name), 1)
        if self.guidance_channels < 0:
            raise ValueError(f"evaluation.guidance_channels is {self.guidance_channels}: give a count, or 0 for all channels")


@dataclass(frozen=True)
class SystemConfig:
    """Where a run works and how often it writes: nothing here changes a number."""

    device: str = "cpu"
    log_every: int = 50  # steps
    checkpoint_every_seconds: float = 60.0
    checkpoint_every: int = 0  # steps; 0: by time only

    def __post_init__(self) -> None:
        _at_least("system.log_every", self.log_every, 1)


@dataclass(frozen=True)
class RunConfig:
    """One run. `options` are the method's own (its constructor's keywords); `label` is its name in tables and figures."""

    method: str = "dense"
    label: str = ""
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    heldout: HeldoutConfig = field(default_factory=HeldoutConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    system: SystemConfig = field(default_factory=SystemConfig)

    @property
    def scientific(self) -> dict[str, Any]:
        """All that can change the trained weights."""
        return {key: value for key, value in asdict(self).items() if key not in NOT_SCIENTIFIC}

    @property
    def run_id(self) -> str:
        return f"{self.method}-{content_hash(self.scientific)}"

    def to_yaml(self) -> str:
        return str(OmegaConf.to_yaml(OmegaConf.create(asdict(self))))


def resolve(tree: Mapping[str, Any], overrides: Iterable[str], methods: Mapping[str, Mapping[str, Any]]) -> RunConfig:
    """A configuration from a tree (as read from YAML) and `key=value` overrides, with all defaults filled in.

    `methods` gives the name -> {option: default} of every method. Raises ValueError in one sentence for an unknown
    key, a value of the wrong type or one that is not allowed.
    """
    merged = _merge(OmegaConf.create(dict(tree)), OmegaConf.create({}))
    for override in overrides:
        merged = _merge(merged, _override(override))
    name = merged.get("method", RunConfig.method)
    if name not in methods:
        raise ValueError(f"method {name!r} is not known: choose one of {', '.join(methods)}")
    given = merged.get("options")
    if given is not None and not isinstance(given, DictConfig):
        raise ValueError(f"options is {given!r}: give a mapping, or set single ones with options.NAME=VALUE")
    merged.options = _typed_options(name, methods[name], given or {})
    config = _merge(OmegaConf.structured(RunConfig), merged)
    try:
        resolved = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ValueError(_one_sentence(error)) from None
    assert isinstance(resolved, RunConfig)
    return resolved


def read_yaml(path: Path) -> dict[str, Any]:
    """The tree in a YAML file; ValueError in one sentence if it is missing or is no YAML mapping."""
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}: check the path") from None
    except Exception as error:  # yaml, OmegaConf and decoding errors share no base class
        raise ValueError(f"{path} cannot be read as YAML ({_one_sentence(error)}): mend or replace it") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds a {type(tree).__name__}, not a mapping of keys to values")
    return {str(key): value for key, value in tree.items()}


def content_hash(value: Any, length: int = 10) -> str:
    """A short SHA-256 of a JSON-able value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]


def _override(text: str) -> Any:
    if "=" not in text or text.startswith("="):
        raise ValueError(f"override {text!r} is not of the form key=value, for example train.lr=1e-3")
    try:
        return OmegaConf.from_dotlist([text])
    except Exception as error:  # OmegaConf lets the YAML parser's errors through
        raise ValueError(f"override {text!r} cannot be read ({_one_sentence(error)})") from None


def _merge(base: Any, other: Any) -> Any:
    try:
        return OmegaConf.merge(base, other)
    except OmegaConfBaseException as error:
        raise ValueError(_one_sentence(error)) from None


def _typed_options(method: str, defaults: Mapping[str, Any], given: Any) -> dict[str, Any]:
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        allowed = ", ".join(defaults) or "none"
        raise ValueError(f"method {method!r} has no option {', '.join(unknown)}: its options are {allowed}")
    schema = make_dataclass("Options", [(key, type(value), value) for key, value in defaults.items()])
    merged = _merge(OmegaConf.structured(schema), given)
    return {str(key): value for key, value in dict(merged).items()}


def _one_sentence(error: Exception) -> str:
    """OmegaConf's first line, with the full key, in place of its listing."""
    lines = str(error).splitlines() or [type(error).__name__]
    key = next((line.split(":", 1)[1].strip() for line in lines if line.strip().startswith("full_key:")), "")
    return f"configuration key {key}: {lines[0]}" if key else lines[0]


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}: choose one of {', '.join(allowed)}")


def _at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise ValueError(f"{name} is {value}: it must be at least {low}")
