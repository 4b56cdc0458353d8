"""What exactly is one run, and what is its name?

A run's configuration is a tree of frozen dataclasses, read by `bench.settings`. Defaults are filled in once, saved
and hashed: the run id is a hash of every setting that can change the trained weights (paths as they are given). How a
run is scored (`evaluation`), where and how often it writes (`system`) and what it is called (`label`) do not change
the weights and are not part of the id; the scoring has a hash of its own (`bench.evaluate`).
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from omegaconf import OmegaConf

from bench import switches

NOT_SCIENTIFIC = ("label", "evaluation", "system")
RUN = "run:"  # before the id of a run, as a value of train.init_from
LATER = {"train": {"intervals_per_step": 1}}  # settings that came later: at these values they have no part in a run's id
ONLY_WHEN_SET = ("guidance_start", "guidance_stop", "solver")  # of a protocol: what came later, and has no part in older hashes
MAX_SEED = 2**63 - 1


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

    def __post_init__(self) -> None:
        for name, high in (("depth", 1000), ("width", 100_000)):
            _between(f"model.{name}", getattr(self, name), 1, high)
        if not 0 < self.mlp_ratio <= 100:
            raise ValueError(f"model.mlp_ratio is {self.mlp_ratio}: choose a value above 0, up to 100")


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
        _between("diffusion.num_timesteps", self.num_timesteps, 2, 1_000_000)
        _between("diffusion.uncertainty_lr", self.uncertainty_lr, 0)
        if not self.min_snr_gamma > 0:
            raise ValueError(f"diffusion.min_snr_gamma is {self.min_snr_gamma}: choose a value above 0, 5 in the paper")
        if self.objective == "flow" and self.loss_weight != "uniform":
            raise ValueError(
                f"diffusion.loss_weight is {self.loss_weight!r}, which rectified flow does not have: set it to uniform"
            )


@dataclass(frozen=True)
class TrainConfig:
    """One optimiser step sees `batch_size` images over all ranks, in `micro_batches` parts per rank (and interval)."""

    batch_size: int = 32
    micro_batches: int = 1
    intervals_per_step: int = 1  # each a part of the batch that draws its own: see `bench.shares`
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
    init_from: str = ""  # weights of a plain backbone to start from: a file, or a run folder

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batches", "intervals_per_step"):
            _between(f"train.{name}", getattr(self, name), 1, 10_000_000)
        _between("train.threads", self.threads, 1, 1024)
        for name in ("lr", "lr_final", "lr_warmup_images", "weight_decay", "ema_half_life_images", "ema_warmup"):
            _between(f"train.{name}", getattr(self, name), 0)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}: choose a value from 0 to below 1")
        _choice("train.lr_schedule", self.lr_schedule, ("constant", "cosine"))
        _choice("train.precision", self.precision, ("fp32", "bf16"))
        _between("train.label_dropout", self.label_dropout, 0, 1)
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"train.batch_size {self.batch_size} cannot be cut into {self.micro_batches} micro-batches: choose a divisor"
            )
        if self.batch_size % self.intervals_per_step:
            raise ValueError(
                f"train.batch_size {self.batch_size} cannot be cut into equal parts for train.intervals_per_step "
                f"{self.intervals_per_step}: choose a divisor"
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
            _between(f"heldout.{name}", getattr(self, name), 1, 1_000_000)


@dataclass(frozen=True)
class EvaluationConfig:
    """How a trained run is sampled and scored; see `bench.evaluate` for the frozen protocol that this becomes."""

    num_samples: int = 500
    sampler: str = "ancestral"  # ancestral, ddim, dpm_solver (second order, by diffusers), euler (rectified flow)
    steps: str = "ddim50"  # a count, spread from the first timestep to the last; ddimS: every T/S-th from 0; a,b,c: by sections
    eta: float = 0.0  # ddim
    guidance_scale: float = 1.0
    guidance_channels: int = 0  # how many output channels are guided; 0: all that are predicted
    guidance_start: int = 0  # guided where start <= timestep < stop (arXiv 2404.07724), and conditional alone elsewhere
    guidance_stop: int = 0  # 0: up to the last timestep
    precision: str = "fp32"  # of the network that is sampled: fp32, bf16 (autocast)
    seed: int = 0
    block_size: int = 50  # consecutive images drawn together; part of what a sample is
    extractor: str = "digits"  # digits, inception
    extractor_weights: str = ""  # a local file, for inception
    reference: str = ""  # an ADM reference file instead of the data set's own images
    autoencoder: str = ""  # the folder of what decodes latents; without it, runs on latents have no scores
    images: str = ""  # what latents were encoded from, to compare with: a folder of images, or what `tsbench pack` has written
    kid_subset_size: int = 250
    curve_every: int = 0  # score also the weights at every n-th of heldout.points; 0: only those at the end

    def __post_init__(self) -> None:
        _choice("evaluation.sampler", self.sampler, ("ancestral", "ddim", "dpm_solver", "euler"))
        _choice("evaluation.precision", self.precision, ("fp32", "bf16"))
        _choice("evaluation.extractor", self.extractor, ("digits", "inception"))
        for name in ("num_samples", "block_size", "kid_subset_size"):
            _between(f"evaluation.{name}", getattr(self, name), 1, 10_000_000)
        for name in ("guidance_scale", "guidance_channels", "guidance_start", "guidance_stop", "curve_every"):
            _between(f"evaluation.{name}", getattr(self, name), 0)
        _between("evaluation.eta", self.eta, 0, 1)
        _between("evaluation.seed", self.seed, 0, MAX_SEED)


@dataclass(frozen=True)
class SystemConfig:
    """Where a run works and how often it writes: nothing here changes a number."""

    device: str = "cpu"
    log_every: int = 50  # steps
    checkpoint_every_seconds: float = 60.0  # or 20 times what the last one took, where that is more
    checkpoint_every: int = 0  # steps; 0: by time only
    resident_gb: float = 2.0  # training images of at most this size are kept on the GPU; 0: none
    compile_sampling: bool = False  # a compiled network draws the images, equal up to rounding
    keep_samples: int = 0  # images in samples.npz, the others go straight into features; 0: all
    experts: str = "together"  # separate_jobs: each in a job of its own, which needs no other; they are assembled at the end
    compile: str = "none"  # blocks: each block by torch.compile while training; cuda_graphs: replayed, too (on a GPU)
    plain: str = ""  # optimisations to do without, by name, with commas between them: see `bench.switches`
    shard: str = "none"  # full: each rank holds its part of all weights, gradients, moments and averages (FSDP2)
    recompute: bool = False  # blocks are computed again in the backward pass, instead of keeping what is inside them

    def __post_init__(self) -> None:
        _choice("system.experts", self.experts, ("together", "separate_jobs"))
        _choice("system.shard", self.shard, ("none", "full"))
        _choice("system.compile", self.compile, ("none", "blocks", "cuda_graphs"))
        try:
            switches.parse(self.plain)
        except ValueError as error:
            raise ValueError(f"system.plain: {error}") from None
        if self.shard == "full" and self.experts == "separate_jobs":
            raise ValueError(
                "system.shard is full and system.experts separate_jobs, which do not go together: choose one of them"
            )
        _between("system.log_every", self.log_every, 1)
        for name in ("checkpoint_every", "checkpoint_every_seconds", "resident_gb", "keep_samples"):
            _between(f"system.{name}", getattr(self, name), 0)


@dataclass(frozen=True)
class RunConfig:
    """One run. `options` are the method's own (its constructor's keywords); `label` is its name in tables and figures."""

    method: str = ""  # resolved to the first that is known
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

    def __post_init__(self) -> None:
        _between("seed", self.seed, 0, MAX_SEED)

    @property
    def scientific(self) -> dict[str, Any]:
        """All that can change the trained weights."""
        return scientific_part(asdict(self))

    @property
    def run_id(self) -> str:
        return f"{self.method}-{content_hash(self.scientific)}"

    def to_yaml(self) -> str:
        return str(OmegaConf.to_yaml(OmegaConf.create(asdict(self))))


def scientific_part(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Of a configuration as a tree, all that can change the trained weights."""
    part = {key: value for key, value in tree.items() if key not in NOT_SCIENTIFIC}
    for section, unset in LATER.items():
        if section in part:
            part[section] = {key: value for key, value in part[section].items() if key not in unset or value != unset[key]}
    return part


def content_hash(value: Any, length: int = 10) -> str:
    """A short SHA-256 of a JSON-able value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}: choose one of {', '.join(allowed)}")


def _between(name: str, value: float, low: float, high: float = math.inf) -> None:
    if not low <= value <= high:
        allowed = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        raise ValueError(f"{name} is {value}: choose a value {allowed}")
