"""What do several tests need? Golden files, tiny methods with random weights, gradients under released names."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.intervals import Interval, interval_of
from bench.method import Method
from methods import METHODS
from methods.backbone import Shape
from methods.released import LAYOUTS, load_released, method_rows
from methods.released_layouts import to_theirs

GOLDEN = Path(__file__).parent / "golden"
TINY = Shape(depth=2, width=16, num_heads=2, patch_size=2, input_size=4, channels=2, num_classes=3, mlp_ratio=2.0)
NUM_TIMESTEPS = 24

LAYOUT_OF_GOLDEN = {
    "dit": "dit",
    "dtr": "dtr",
    "switch_dit": "switch_dit",
    "dit_moe_tp1": "dit_moe",
    "remix_b2e10": "remix_dit",
}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "multi_expert": ("multi_expert", {"experts": 5}),
    "dtr": ("dtr", {}),
    "dtr random": ("dtr", {"routing": "random"}),
    "switch_dit": ("switch_dit", {}),
    "switch_dit one of four": ("switch_dit", {"experts": 4, "top_k": 1}),
    "dit_moe": ("dit_moe", {"experts": 4}),
    "dit_moe no shared": ("dit_moe", {"experts": 3, "top_k": 1, "shared_width": 0, "renormalise": False}),
    "dit_moe gelu": ("dit_moe", {"experts": 3, "expert": "gelu_mlp", "shared_width": 0, "renormalise": True}),
    "remix_dit": ("remix_dit", {"bases": 2, "experts": 5}),
    "remix_dit local": ("remix_dit", {"bases": 3, "experts": 2, "coefficients": "local"}),
    "remix_dit raw": ("remix_dit", {"bases": 2, "experts": 3, "mixer": "raw"}),
    "remix_dit one_hot": ("remix_dit", {"bases": 2, "experts": 3, "mixer": "one_hot"}),
}
PUBLISHED = tuple(dict.fromkeys(name for name, _ in VARIANTS.values()))  # the six; METHODS may hold more
VARIANTS |= {name: (name, {}) for name in METHODS if name not in VARIANTS}
"""Every method at a tiny size, and the options that change what it computes; a new one with its defaults."""


@cache
def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the facts of one golden file. Read only: they are shared."""
    return load_file(GOLDEN / f"{name}.safetensors"), json.loads((GOLDEN / f"{name}.json").read_text())


def golden_state(name: str) -> dict[str, Tensor]:
    """The released checkpoint of a golden file."""
    return {key.removeprefix("state."): tensor for key, tensor in golden(name)[0].items() if key.startswith("state.")}


def golden_method(name: str, **options: Any) -> Method:
    return load_released(LAYOUT_OF_GOLDEN[name], golden_state(name), num_heads=4, **options)


def golden_interval(method: Method, name: str, key: str = "t") -> Interval:
    return interval_of(int(golden(name)[0][key][0]), method.intervals)


def block_outputs(method: Method, run: Any) -> list[Tensor]:
    """The tokens that each block of `method.network` returns while `run()` runs."""
    outputs: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [block.register_forward_hook(keep) for block in method.network.blocks]  # type: ignore[union-attr]
    run()
    for hook in hooks:
        hook.remove()
    return outputs


def released_gradients(method: Method) -> dict[str, Tensor]:
    """The gradients of all parameters, named and cut as the released code has them."""
    layout = next(name for name, known in LAYOUTS.items() if type(method) is known.method)
    gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    return to_theirs([row for row in method_rows(layout, method) if row.ours in gradients], gradients)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_gradients(method: Method, name: str) -> None:
    """Sum and norm of every gradient, and those that the golden file holds in full."""
    tensors, facts = golden(name)
    gradients = released_gradients(method)
    expected = {key: pair for key, pair in facts["grad_sum_and_l2norm_of_every_parameter"].items() if pair is not None}
    assert gradients.keys() == expected.keys()
    for key, (total, norm) in expected.items():
        gradient = gradients[key].double()
        assert abs(gradient.norm().item() - norm) <= 1e-5 * norm, f"norm of {key}"
        assert abs(gradient.sum().item() - total) <= 1e-6 * norm * gradient.numel() ** 0.5 + 1e-5 * abs(total), f"sum of {key}"
    for key, tensor in tensors.items():
        if key.startswith("grad."):
            scale = tensor.norm() / tensor.numel() ** 0.5
            assert (gradients[key.removeprefix("grad.")] - tensor).abs().max() <= 1e-3 * scale, key
            assert_close(gradients[key.removeprefix("grad.")], tensor)


def randomise(method: Method, seed: int = 0, std: float = 0.2) -> Method:
    """Every parameter from N(0, std): the real initialisation starts at zero, which hides errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return method


def tiny(variant: str, shape: Shape = TINY, seed: int = 0, **options: Any) -> Method:
    """A method at a tiny size with random weights."""
    name, chosen = VARIANTS[variant]
    torch.manual_seed(seed)
    return randomise(METHODS[name](shape, num_timesteps=NUM_TIMESTEPS, **(chosen | options)), seed)


def batch(interval: Interval, size: int = 6, shape: Shape = TINY, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and y with all t in `interval`, labels including the null class."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, shape.channels, shape.input_size, shape.input_size, generator=generator)
    t = torch.randint(interval.start, interval.stop, (size,), generator=generator)
    return x, t, torch.randint(0, shape.num_classes + 1, (size,), generator=generator)
