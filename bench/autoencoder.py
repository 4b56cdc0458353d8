"""How do images become latents, and latents images?

By an autoencoder as latent diffusion (arXiv 2112.10752) uses it, AutoencoderKL of diffusers, read from a local folder as
diffusers lays it out: config.json and diffusion_pytorch_model.safetensors. It works in float32, whatever else is set: it
is part of the protocol under which images are scored.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from bench.config import content_hash
from bench.data.digest import Stamp, hashed_once, stamp
from bench.data.source import hash_file
from bench.precision import full_precision

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
HINT = f"give a folder with {CONFIG} and {WEIGHTS}, such as a copy of stabilityai/sd-vae-ft-ema"
INSTALL = "install it with `pip install 'timestep-bench[latents]'`"
NUMBERS = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "scaling_factor": 0.18215}  # the class's own defaults
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}  # sd-vae-ft-ema has them
TOGETHER = 8  # images that go through it at once: of 256x256 pixels, 33 MB for each of the widest layer's activations


@dataclass(frozen=True)
class Layout:
    """What config.json tells of an autoencoder."""

    folder: Path
    image_channels: int
    latent_channels: int
    shrinkage: int  # pixels of an image's width for each of a latent's
    scaling: float  # latents are multiplied by it to be trained on; 0.18215 for Stable Diffusion's


def read_layout(folder: Path) -> Layout:
    """ValueError in one sentence if `folder` does not hold such an autoencoder. The weights are not read."""
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"there is no file {folder / missing[0]}: {HINT}")
    config = _read_config(folder / CONFIG)
    shifts = [key for key in ("shift_factor", "latents_mean", "latents_std") if config.get(key)]
    if shifts:
        raise ValueError(f"the autoencoder in {folder} has a {shifts[0]} for its latents, which are only scaled here: {HINT}")
    numbers = {key: config.get(key, default) for key, default in NUMBERS.items()}
    levels = config.get("block_out_channels", [64])
    if not all(_is_positive(number) for number in numbers.values()) or not isinstance(levels, list) or not levels:
        given = ", ".join(f"{key} {value!r}" for key, value in {**numbers, "block_out_channels": levels}.items())
        raise ValueError(f"{folder / CONFIG} gives {given}: they must be positive numbers, and a list of such; {HINT}")
    if numbers["in_channels"] != numbers["out_channels"]:
        given = f"{numbers['in_channels']} channels to images of {numbers['out_channels']}"
        raise ValueError(f"the autoencoder in {folder} turns images of {given}, but both must be of the same: {HINT}")
    channels = int(numbers["in_channels"]), int(numbers["latent_channels"])
    return Layout(folder, *channels, 2 ** (len(levels) - 1), float(numbers["scaling_factor"]))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}): {HINT}") from None
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind != "AutoencoderKL":
        raise ValueError(f"{path} describes {kind or 'no model'}, not AutoencoderKL: {HINT}")
    return dict(config)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def digest_of(layout: Layout) -> str:
    """64 hexadecimal digits of what is in both files. Reads them, if this process has not since they changed."""
    return hashed_once(_stamp(layout), lambda: content_hash([hash_file(path) for path in _files(layout)], length=64))


def _stamp(layout: Layout) -> Stamp:
    return stamp(_files(layout), "autoencoder")


def _files(layout: Layout) -> list[Path]:
    return [layout.folder / name for name in (CONFIG, WEIGHTS)]


class Autoencoder:
    """Its networks, on a device. Images are (B, C, H, W) in [-1, 1]; latents (B, c, h, w), not scaled."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout, self.device = layout, device
        self.model: Any = _load(layout.folder).to(device)

    @torch.no_grad()
    def encode(self, x: Tensor, noise: Tensor) -> Tensor:
        """A draw from what each image may be encoded as, made with standard normal `noise` (B, c, h, w)."""

        def draw(x: Tensor, noise: Tensor) -> Tensor:
            posterior = self.model.encode(x).latent_dist
            drawn: Tensor = posterior.mean + posterior.std * noise
            return drawn

        return self._in_parts(draw, x, noise)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self._in_parts(lambda z: self.model.decode(z).sample, latents)

    def _in_parts(self, work: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """On the device; always the same images together, so that the same bits come out."""
        there = (tensor.to(self.device).split(TOGETHER) for tensor in inputs)
        with full_precision():
            return torch.cat([work(*parts) for parts in zip(*there, strict=True)])


def load_autoencoder(layout: Layout, device: torch.device) -> Autoencoder:
    """Once for all runs that one process scores, and again if the files change. ValueError if they do not fit each other."""
    return _loaded(layout, device, digest_of(layout))


@cache
def _loaded(layout: Layout, device: torch.device, digest: str) -> Autoencoder:
    return Autoencoder(layout, device)


def check_loadable(layout: Layout) -> None:
    """ValueError, the same as of `load_autoencoder`, before anything is trained for it. Only names and shapes are read."""
    _check(layout.folder, _stamp(layout).key)


@cache
def _check(folder: Path, stamped: str) -> None:
    """Once for all runs of a sweep: diffusers alone takes seconds."""
    _load(folder, _read_shapes, "meta")


def _read_shapes(path: Path) -> dict[str, Tensor]:
    """Weights without their numbers."""
    with safe_open(path, framework="pt") as file:
        return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}  # noqa: SIM118


def _load(folder: Path, read: Callable[[Path], dict[str, Tensor]] = load_file, device: str = "cpu") -> torch.nn.Module:
    """Strictly: `from_pretrained` of diffusers warns of weights that are missing, and leaves random ones in their place."""
    kind = _import_autoencoder()
    try:
        # Layers draw weights, to be replaced, from the global generator.
        with torch.random.fork_rng(devices=[]), torch.device(device):
            model: torch.nn.Module = kind.from_config(_read_config(folder / CONFIG))
        model.load_state_dict({_present_name(name): weight for name, weight in read(folder / WEIGHTS).items()})
    except (RuntimeError, ValueError, TypeError, LookupError, OSError, SafetensorError) as error:
        raise ValueError(f"the autoencoder in {folder} cannot be loaded ({_reason(error)}): {HINT}") from None
    return model.eval().requires_grad_(False)


def _present_name(name: str) -> str:
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name


def _reason(error: Exception) -> str:
    """In one line, which may be the second of PyTorch's; it can list hundreds of names."""
    lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    line = lines[1] if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    return line.rstrip(".")[:300]


def _import_autoencoder() -> Any:
    """Imported where it is asked for: most runs do without, and it takes seconds."""
    try:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    except ImportError as error:
        raise ValueError(f"latents need diffusers to be encoded or decoded ({error}): {INSTALL}") from None
    return AutoencoderKL
